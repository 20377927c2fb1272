"""The loss without whole logits, and what a CPU wants in training: the results of PyTorch's own
operations, for less memory."""

import platform

import pytest
import torch

from engine.training import chunked_loss
from engine.training import cpu as cpu_training
from model import GPT, GPTConfig


@pytest.fixture(autouse=True)
def no_smallest_size(monkeypatch):
    """Take the loss in chunks at any size."""
    monkeypatch.setattr(chunked_loss, 'MIN_LOGITS', 0)


def build(optimized=True, **changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    model = GPT(GPTConfig(**{**shape, **changes}))
    model.keep_logits = not optimized
    return model


def losses_and_gradients(model, idx, targets, dtype, scale=1.0):
    """Of two micro-batches, one after the other."""
    model.zero_grad()
    losses = []
    for rows in (slice(0, 2), slice(2, None)):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = model(idx[rows], targets[rows])[1]
        (loss * scale).backward()
        losses.append(loss.detach())
    return [torch.stack(losses)] + [p.grad for p in model.parameters()]


def assert_close(found, expected, tolerance):
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


# At a time: 1, 7 and all positions; in bfloat16 4, 28 and all. A soft cap of 0.1 squeezes the
# logits of a new model.
@pytest.mark.parametrize('chunk', [50, 350, 10 ** 6])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('softcap', [0.0, 0.1])
@pytest.mark.parametrize('tied', [True, False])
def test_losses_and_gradients_are_those_that_autograd_derives(
        chunk, dtype, softcap, tied, monkeypatch):
    monkeypatch.setitem(chunked_loss.CHUNK_LOGITS, 'cpu', chunk)
    model = build(softcap=softcap, tied=tied)
    reference = build(optimized=False, softcap=softcap, tied=tied)
    idx = torch.randint(50, (3, 16))
    targets = idx.roll(-1, 1)
    targets[0, :5] = -1

    found = losses_and_gradients(model, idx, targets, dtype, scale=1 / 3)
    expected = losses_and_gradients(reference, idx, targets, dtype, scale=1 / 3)
    assert_close(found, expected, 2e-2 if dtype == torch.bfloat16 else 1e-5)

    with torch.no_grad():
        logits, loss = model(idx, targets)
        assert logits is None
        torch.testing.assert_close(loss, reference(idx, targets)[1])
        torch.testing.assert_close(model(idx)[0], reference(idx)[0])


def test_gradients_survive_float16():
    """With many positions and a large vocabulary, each gradient of a logit is below float16's
    smallest number until the loss is scaled. The error against float32 is that of PyTorch's own
    operations."""
    changes = dict(block_size=64, vocab_size=8000, n_layer=1)
    idx = torch.randint(8000, (16, 64))
    targets = idx.roll(-1, 1)
    exact = losses_and_gradients(build(False, **changes), idx, targets, torch.float32, scale=65536)
    plain = losses_and_gradients(build(False, **changes), idx, targets, torch.float16, scale=65536)
    found = losses_and_gradients(build(**changes), idx, targets, torch.float16, scale=65536)

    def error_of(gradients):
        return sum((a - b).norm() ** 2 for a, b in zip(gradients[1:], exact[1:])) ** 0.5

    size = sum(g.norm() ** 2 for g in exact[1:]) ** 0.5
    assert error_of(found) < 0.01 * size
    assert error_of(found) < 2 * error_of(plain)


def train_curve(model):
    """The losses of a hundred steps."""
    text = 'pack my box with five dozen liquor jugs, or the quick onyx goblin jumps over '
    tokens = torch.tensor([ord(character) for character in text * 60])
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
    curve = []
    for step in range(100):
        positions = torch.arange(8)[:, None] * 331 + step * 17 + torch.arange(33)
        loss = model(tokens[positions[:, :-1]], tokens[positions[:, 1:]])[1]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def test_a_curve_of_a_hundred_steps_is_that_of_plain_operations():
    """Within 1e-5; it was within 2e-7 when this was written."""
    found = train_curve(build(vocab_size=128, block_size=32))
    expected = train_curve(build(optimized=False, vocab_size=128, block_size=32))
    assert expected[-1] < 0.8 * expected[0]
    assert max(abs(a - b) / b for a, b in zip(found, expected)) < 1e-5


def bytes_saved_for_backward(model, idx):
    """The bytes of every storage that the loss of idx keeps for its backward pass."""
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(idx, idx)[1]
    total = sum(storages.values())
    loss.backward()
    return total


def test_less_is_saved_for_the_backward_pass(monkeypatch):
    """Of the head, two gradients instead of the softmax."""
    monkeypatch.setitem(chunked_loss.CHUNK_LOGITS, 'cpu', 1000)
    idx = torch.randint(1000, (4, 64))
    chunked = bytes_saved_for_backward(build(vocab_size=1000, block_size=64), idx)
    whole = bytes_saved_for_backward(build(optimized=False, vocab_size=1000, block_size=64), idx)
    positions = 4 * 64
    softmax = positions * 1000
    gradient_of_head = 1000 * 32
    gradient_of_x = positions * 32
    assert whole - chunked >= 4 * (softmax - gradient_of_head - gradient_of_x)


def test_an_embedding_that_is_used_without_the_loss_gets_its_gradient():
    """And the loss of the next forward pass is not that of an earlier one."""
    idx = torch.randint(50, (2, 16))
    gradients = []
    for optimized in (True, False):
        model = build(optimized)
        model.hidden(idx).square().sum().backward()
        model(idx.flip(1), idx)[1].backward()
        gradients.append(model.transformer.wte.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_changed_loss_keeps_its_effect():
    class Offset(GPT):
        def loss_fn(self, x, targets):
            logits, loss = super().loss_fn(x, targets)
            return logits, loss + 100

    model = build(optimized=False)
    model.__class__ = Offset
    model.keep_logits = False
    idx = torch.randint(50, (2, 16))
    assert model(idx, idx)[1] > 100


@pytest.mark.parametrize('checkpointed', [False, True])
def test_dropout_falls_where_it_does_in_plain_operations(checkpointed):
    """The same seed drops the same, with activation checkpointing too."""
    idx = torch.randint(50, (3, 16))
    found = []
    for optimized in (True, False):
        model = build(optimized, dropout=0.3)
        if checkpointed:
            model.recompute = True
        torch.manual_seed(7)
        found.append(losses_and_gradients(model, idx, idx.roll(-1, 1), torch.float32))
    assert_close(*found, 1e-5)


def test_a_small_model_keeps_pytorchs_operations(monkeypatch):
    monkeypatch.undo()
    idx = torch.randint(50, (2, 16))
    monkeypatch.setattr(chunked_loss, 'chunked_cross_entropy', None)
    assert torch.equal(build()(idx, idx)[1], build(optimized=False)(idx, idx)[1])


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
    assert after != before
    assert after == model.eval()(idx, idx)[1]


def test_no_layer_is_replaced_and_no_forward():
    model = build(norm='rmsnorm', activation='relu2')
    plain = build(optimized=False, norm='rmsnorm', activation='relu2')
    for layer, expected in zip(model.modules(), plain.modules(), strict=True):
        assert type(layer) is type(expected)
        assert layer.__dict__.keys() == expected.__dict__.keys()


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has this threshold')
def test_freed_memory_is_kept_for_the_next_step():
    """If glibc does not keep it, a block of 16 MiB costs 4,096 page faults each time it is made."""
    import resource  # Windows has none

    cpu_training.keep_freed_memory()
    faults = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2 ** 22)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 100
