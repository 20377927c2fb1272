"""What is put on a model to train it on a CPU, and the chunked loss: the results of PyTorch's own operations, for less
memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.training import chunked_loss
from engine.training import cpu as cpu_training
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def no_smallest_size(monkeypatch):
    """Use the custom operations at any size."""
    monkeypatch.setattr(chunked_loss, 'MIN_LOGITS', 0)
    monkeypatch.setattr(cpu_training, 'MIN_ACTIVATIONS', 0)


def build(optimized=True, **changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32), **changes}))
    if optimized:
        cpu_training.optimize_for_training(model)
    return model


def losses_and_gradients(model, idx, targets, dtype, scale=1.0):
    """Of two micro-batches, one after the other."""
    model.zero_grad()
    losses = []
    for rows in (slice(0, 2), slice(2, None)):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            losses.append(model(idx[rows], targets[rows])[1])
        (losses[-1] * scale).backward()
    return [torch.stack(losses).detach()] + [p.grad for p in model.parameters()]


@pytest.mark.parametrize('chunk', [50, 350, 10 ** 6])           # 1, 7 and all positions at a time; bfloat16: 4, 28
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('activation', ['gelu', 'gelu_tanh', 'relu2'])
def test_losses_and_gradients_are_those_that_autograd_derives(chunk, dtype, bias, activation, monkeypatch):
    monkeypatch.setitem(chunked_loss.CHUNK_LOGITS, 'cpu', chunk)
    model, reference = (build(optimized, bias=bias, activation=activation) for optimized in (True, False))
    idx = torch.randint(50, (3, 16))
    targets = idx.roll(-1, 1)
    targets[0, :5] = -1
    found = losses_and_gradients(model, idx, targets, dtype, scale=1 / 3)
    expected = losses_and_gradients(reference, idx, targets, dtype, scale=1 / 3)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= (2e-2 if dtype == torch.bfloat16 else 1e-5) * b.norm()
    with torch.no_grad():
        logits, loss = model(idx, targets)
        assert logits is None
        torch.testing.assert_close(loss, reference(idx, targets)[1])
        torch.testing.assert_close(model(idx)[0], reference(idx)[0])


def test_gradients_survive_float16():
    """With many positions and a large vocabulary, each gradient of a logit is below float16's smallest number
    until the loss is scaled. The error against float32 is that of PyTorch's own operations."""
    changes = dict(block_size=64, vocab_size=8000, n_layer=1)
    idx = torch.randint(8000, (16, 64))
    batch = idx, idx.roll(-1, 1)
    exact = losses_and_gradients(build(False, **changes), *batch, torch.float32, scale=65536)
    plain = losses_and_gradients(build(False, **changes), *batch, torch.float16, scale=65536)
    found = losses_and_gradients(build(**changes), *batch, torch.float16, scale=65536)
    error, plain_error = (sum((a - b).norm() ** 2 for a, b in zip(gradients[1:], exact[1:])) ** 0.5
                          for gradients in (found, plain))
    assert error < 0.01 * sum(g.norm() ** 2 for g in exact[1:]) ** 0.5 and error < 2 * plain_error


def test_a_curve_of_a_hundred_steps_is_that_of_plain_operations():
    """Within 1e-5; it was within 2e-7 when this was written."""
    text = 'pack my box with five dozen liquor jugs, or the quick onyx goblin jumps over '
    tokens = torch.tensor([ord(character) for character in text * 60])
    curves = {}
    for optimized in (True, False):
        model = build(optimized, vocab_size=128, block_size=32)
        optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
        curve = curves[optimized] = []
        for step in range(100):
            positions = torch.arange(8)[:, None] * 331 + step * 17 + torch.arange(33)
            loss = model(tokens[positions[:, :-1]], tokens[positions[:, 1:]])[1]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.item())
    assert curves[False][-1] < 0.8 * curves[False][0]
    assert max(abs(a - b) / b for a, b in zip(curves[True], curves[False])) < 1e-5


def test_less_is_saved_for_the_backward_pass(monkeypatch):
    """Of each MLP, one inner activation less; of the head, two gradients instead of the softmax."""
    monkeypatch.setitem(chunked_loss.CHUNK_LOGITS, 'cpu', 1000)
    idx, saved_bytes = torch.randint(1000, (4, 16)), {}
    for optimized in (True, False):
        model, storages = build(optimized, vocab_size=1000), {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(idx, idx)[1]
        saved_bytes[optimized] = sum(storages.values())
        loss.backward()
    positions, inner, gradient_of_head = 4 * 16, 4 * 32, 1000 * 32
    assert saved_bytes[False] - saved_bytes[True] >= 4 * (
        2 * positions * inner + positions * 1000 - gradient_of_head - positions * 32)


def test_the_backward_pass_makes_no_second_gradient_of_the_embedding():
    """(V, C) tensors that are made while it runs: with the chunked loss, the one of the loss exists before."""
    class Made(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            inputs = {a.data_ptr() for a in args if isinstance(a, torch.Tensor)}
            if isinstance(result, torch.Tensor) and result.shape == (1000, 32) and result.data_ptr() not in inputs:
                self.count += 1
            return result

    idx, counts = torch.randint(1000, (4, 16)), []
    for optimized in (True, False):
        loss = build(optimized, vocab_size=1000)(idx, idx)[1]
        with Made() as made:
            loss.backward()
        counts.append(made.count)
    assert counts[0] == 0 and counts[1] >= 2


def test_an_embedding_that_is_used_without_the_loss_gets_its_gradient():
    """And the loss of the next forward pass is not that of an earlier one."""
    idx, gradients = torch.randint(50, (2, 16)), []
    for optimized in (True, False):
        model = build(optimized)
        model.hidden(idx).square().sum().backward()
        model(idx.flip(1), idx)[1].backward()
        gradients.append(model.transformer.wte.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_changed_head_or_loss_is_left_alone():
    class Offset(type(build(False))):
        def loss_fn(self, x, targets):
            logits, loss = super().loss_fn(x, targets)
            return logits, loss + 100
    model = build(False)
    model.__class__ = Offset
    cpu_training.optimize_for_training(model)
    idx = torch.randint(50, (2, 16))
    assert model(idx, idx)[1] > 100
    model = build(False)
    model.lm_head = torch.nn.Linear(32, 50)
    torch.nn.init.zeros_(model.lm_head.bias)
    cpu_training.optimize_for_training(model)
    model(idx, idx)[1].backward()
    assert model.lm_head.bias.grad.abs().sum() > 0


@pytest.mark.parametrize('checkpointed', [False, True])
def test_dropout_falls_where_it_does_in_plain_operations(checkpointed):
    """The same seed drops the same, with activation checkpointing too."""
    idx, found = torch.randint(50, (3, 16)), []
    for optimized in (True, False):
        model = build(optimized, dropout=0.3)
        if checkpointed:
            model.checkpoint_activations()
        torch.manual_seed(7)
        found.append(losses_and_gradients(model, idx, idx.roll(-1, 1), torch.float32))
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_a_small_model_keeps_pytorchs_operations(monkeypatch):
    monkeypatch.undo()
    idx = torch.randint(50, (2, 16))
    logits, loss = build()(idx, idx)
    expected_logits, expected_loss = build(optimized=False)(idx, idx)
    assert torch.equal(logits, expected_logits) and torch.equal(loss, expected_loss)


def test_a_layer_put_in_place_of_another_is_called():
    """Such as an adapter for finetuning, which may have a `weight` too."""
    class Adapter(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x[..., :32]

    model = build(bias=False)
    idx = torch.randint(50, (2, 16))
    before = model(idx, idx)[1]
    mlp = model.transformer.h[0].mlp
    adapter = Adapter(128, 32, bias=False)
    adapter.weight = mlp.c_proj.weight
    mlp.c_proj = adapter
    after = model(idx, idx)[1]
    assert after != before and after == model.eval()(idx, idx)[1]


class SoftCapped(GPT):
    """A head that is more than a product with its weight."""

    def logits(self, x):
        return 3 * torch.tanh(super().logits(x) / 3)


class SquaredMLP(torch.nn.Module):
    """Layers with the usual names, in an unusual order."""

    def __init__(self, mlp):
        super().__init__()
        self.c_fc, self.activation, self.c_proj, self.dropout = mlp.c_fc, mlp.activation, mlp.c_proj, mlp.dropout

    def forward(self, x):
        return self.dropout(self.c_proj(self.activation(self.c_fc(x)) ** 2))


@pytest.mark.parametrize('change', ['logits', 'mlp'])
def test_a_changed_model_keeps_what_it_computes(change):
    """An option of one's own never loses its effect to an optimization that does not know it."""
    losses, idx = {}, torch.randint(50, (2, 16))
    for name in ('plain', 'changed', 'optimized'):
        model = build(optimized=False)
        for p in model.parameters():
            torch.nn.init.normal_(p, std=0.3)
        if name != 'plain' and change == 'logits':
            model.__class__ = SoftCapped
        elif name != 'plain':
            model.transformer.h[0].mlp = SquaredMLP(model.transformer.h[0].mlp)
        if name == 'optimized':
            cpu_training.optimize_for_training(model)
        losses[name] = model(idx, idx)[1]
    assert abs(losses['plain'] - losses['changed']) > 0.01
    torch.testing.assert_close(losses['optimized'], losses['changed'])
