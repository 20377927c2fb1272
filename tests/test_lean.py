import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lean
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def lean_at_any_size(monkeypatch):
    monkeypatch.setattr(lean, 'ENOUGH', 0)


def build(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    return GPT(GPTConfig(**{**shape, **changes}))


def plainly(monkeypatch):
    """From here on, models run PyTorch's own operations, whose gradients autograd derives."""
    monkeypatch.setattr(lean, 'ENOUGH', float('inf'))


def losses_and_gradients(model, idx, targets, dtype, scale=1.0):
    """Of two micro-batches, one after the other."""
    model.zero_grad()
    losses = []
    for rows in (slice(0, 2), slice(2, None)):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            losses.append(model(idx[rows], targets[rows], loss_only=True)[1])
        (losses[-1] * scale).backward()
    return [torch.stack(losses).detach()] + [p.grad for p in model.parameters()]


@pytest.mark.parametrize('chunk', [50, 350, 10 ** 6])           # 1, 7 and all positions at a time; bfloat16: 4, 28
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('activation', ['gelu', 'gelu_tanh'])
def test_losses_and_gradients_are_those_that_autograd_derives(chunk, dtype, bias, activation, monkeypatch):
    monkeypatch.setattr(lean, 'LOGITS_AT_ONCE', chunk)
    model = build(bias=bias, activation=activation)
    idx = torch.randint(50, (3, 16))
    targets = idx.roll(-1, 1)
    targets[0, :5] = -1
    found = losses_and_gradients(model, idx, targets, dtype, scale=1 / 3)
    with torch.no_grad():
        evaluated = model(idx, targets, loss_only=True)[1]
    plainly(monkeypatch)
    expected = losses_and_gradients(model, idx, targets, dtype, scale=1 / 3)
    for a, b in zip(found, expected):
        assert (a - b).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * b.norm()
    torch.testing.assert_close(evaluated, model(idx, targets)[1].detach())


def test_gradients_survive_float16(monkeypatch):
    """At many positions and tokens, each gradient of a logit is below float16's smallest number,
    until the loss is scaled. Against float32, as near as PyTorch's own operations come."""
    model = build(block_size=64, vocab_size=20000, n_layer=1)
    idx = torch.randint(20000, (16, 64))
    arguments = model, idx, idx.roll(-1, 1)
    ours = losses_and_gradients(*arguments, torch.float16, scale=65536)
    plainly(monkeypatch)
    plain = losses_and_gradients(*arguments, torch.float16, scale=65536)
    exact = losses_and_gradients(*arguments, torch.float32, scale=65536)
    errors = [sum((a - b).norm() ** 2 for a, b in zip(found[1:], exact[1:])) ** 0.5 for found in (ours, plain)]
    assert errors[0] < 0.01 * sum(g.norm() ** 2 for g in exact[1:]) ** 0.5 and errors[0] < 2 * errors[1]


def test_a_curve_of_a_hundred_steps_is_that_of_plain_operations(monkeypatch):
    """To 1e-5, of which it took 2e-7 when this was written."""
    tokens = torch.tensor([ord(c) for c in 'pack my box with five dozen liquor jugs, or the quick onyx goblin jumps over ' * 60])
    curves = []
    for _ in range(2):
        model = build(vocab_size=128, block_size=32)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
        curves.append([])
        for step in range(100):
            at = torch.arange(8)[:, None] * 331 + step * 17 + torch.arange(33)
            loss = model(tokens[at[:, :-1]], tokens[at[:, 1:]], loss_only=True)[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curves[-1].append(loss.item())
        plainly(monkeypatch)
    ours, plain = curves
    assert plain[-1] < 0.8 * plain[0]
    assert max(abs(a - b) / b for a, b in zip(ours, plain)) < 1e-5


def test_less_is_kept_for_backward(monkeypatch):
    """By one inner MLP activation a layer, and by the logits' softmax but for two gradients in its place."""
    model = build(vocab_size=1000)
    idx = torch.randint(1000, (4, 16))
    monkeypatch.setattr(lean, 'LOGITS_AT_ONCE', 1000)
    kept = []
    for _ in range(2):
        storages = {}

        def keep(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(idx, idx, loss_only=True)[1]
        kept.append(sum(storages.values()))
        loss.backward()
        plainly(monkeypatch)
    positions, inner, gradient_of_head = 4 * 16, 4 * 32, 1000 * 32
    assert kept[1] - kept[0] >= 4 * (2 * positions * inner + positions * 1000 - gradient_of_head - positions * 32)


def test_backward_makes_no_gradient_of_the_embedding_but_one(monkeypatch):
    """(V, C) tensors made while it runs: the one of the loss exists before."""
    class Made(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            held = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.shape == (1000, 32) and result.data_ptr() not in held:
                self.count += 1
            return result

    model = build(vocab_size=1000)
    idx = torch.randint(1000, (4, 16))
    counts = []
    for _ in range(2):
        loss = model(idx, idx, loss_only=True)[1]
        with Made() as made:
            loss.backward()
        counts.append(made.count)
        model.zero_grad()
        plainly(monkeypatch)
    assert counts[0] == 0 and counts[1] >= 2


@pytest.mark.parametrize('recompute', [False, True])
def test_dropout_falls_where_it_does_in_plain_operations(recompute, monkeypatch):
    """The same seed drops the same, and recomputed activations too."""
    model = build(dropout=0.3)
    model.recompute = recompute
    idx = torch.randint(50, (3, 16))
    found = []
    for _ in range(2):
        torch.manual_seed(7)
        found.append(losses_and_gradients(model, idx, idx.roll(-1, 1), torch.float32))
        plainly(monkeypatch)
    for a, b in zip(*found):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_layer_put_in_place_of_another_is_called():
    """Such as an adapter for finetuning, which may have a `weight` too."""
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x[..., :32]

    model = build(bias=False)
    idx = torch.randint(50, (2, 16))
    before = model(idx, idx, loss_only=True)[1]
    mlp = model.transformer.h[0].mlp
    adapter = Adapter(128, 32, bias=False)
    adapter.weight = mlp.c_proj.weight
    mlp.c_proj = adapter
    after = model(idx, idx, loss_only=True)[1]
    assert after != before and after == model.eval()(idx, idx, loss_only=True)[1]
