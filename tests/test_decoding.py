import pytest
import torch

from decoding import FixedMemory, Memory, draw, lay_out
from model import GPT, GPTConfig


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.15)              # far from uniform, so that mistakes show
    return model


def uncached(model, idx, count):
    """Greedy continuation by the whole model over the whole window for every token."""
    for _ in range(count):
        logits, _ = model(idx[:, -model.config.block_size:])
        idx = torch.cat([idx, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return idx


@pytest.mark.parametrize('length', [1, 7, 15, 16, 20])
def test_cached_text_is_uncached_text(model, length):
    idx = torch.randint(50, (3, length))
    expected = uncached(model, idx, 40)
    found = model.generate(idx, 40, temperature=0, exact_window=True)
    assert torch.equal(found, expected)
    within = max(0, 16 - length) + 1                    # tokens before the window has to move
    assert torch.equal(model.generate(idx, within, temperature=0), expected[:, :length + within])


def test_cached_logits_are_uncached_logits(model):
    idx = torch.randint(50, (2, 16))
    memories = [Memory(2, 2, 16, 16, model.lm_head.weight) for _ in range(2)]
    parts = [model.hidden(idx[:, :5], memories)] + [model.hidden(idx[:, i:i + 1], memories) for i in range(5, 16)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(idx))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('kind', [Memory, FixedMemory])
def test_16_bits_with_a_cache_are_as_near_as_without(model, dtype, kind):
    """To float32, over positions that a cache holds in another precision than the weights."""
    idx = torch.randint(50, (2, 16))
    exact = model.hidden(idx)
    model.to(dtype)
    memories = [kind(2, 2, 16, 16, model.lm_head.weight) for _ in range(2)]
    assert memories[0].keys.dtype == torch.float32
    parts = [model.hidden(idx[:, :5], memories)]
    for i in range(5, 16):
        position = torch.tensor([i])
        for memory in memories:
            memory.length = i
            memory.position = position if kind is FixedMemory else None
        parts.append(model.hidden(idx[:, i:i + 1], memories, position))
    cached = torch.cat(parts, dim=1)
    assert cached.dtype == dtype
    assert (cached - exact).norm() < 1.5 * (model.hidden(idx) - exact).norm() < 0.05 * exact.norm()


def test_past_the_block_the_last_half_is_read_again(model):
    """At each refill, the next token is that of the last half of the block alone."""
    idx = torch.randint(50, (2, 16))
    found = model.generate(idx, 20, temperature=0)
    refills = range(17, 36, 9)                          # 8 read again and 1 drawn, then 8 more fit
    for at in refills:
        assert torch.equal(found[:, at], uncached(model, found[:, at - 8:at], 1)[:, -1])


def test_a_compiled_step_draws_the_same(model):
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1))
    except Exception as error:
        pytest.skip(f'no compiler here: {type(error).__name__}')
    idx = torch.randint(50, (2, 5))
    assert torch.equal(model.generate(idx, 30, temperature=0, compile=True), model.generate(idx, 30, temperature=0))


@pytest.mark.parametrize('layout', ['Linear', 'TransposedLinear', 'PackedLinear'])
def test_layouts_change_no_text(model, monkeypatch, layout):
    """Whichever layout the measurement prefers."""
    import decoding
    idx = torch.randint(50, (2, 5))
    before = model.generate(idx, 10, temperature=0)
    try:
        decoding.PackedLinear(model.lm_head, 2)(torch.ones(2, 1, 32))
    except (RuntimeError, AttributeError) as error:
        if layout == 'PackedLinear':
            pytest.skip(f'this PyTorch packs no weights: {error}')
    monkeypatch.setattr(decoding, 'median_seconds', lambda layers, x, others: layers[0](x).numel() and type(layers[0]).__name__ != layout)
    lay_out(model, 2)
    assert {type(m).__name__ for m in model.modules() if hasattr(m, 'weight') and 'Linear' in type(m).__name__} == {layout}
    assert torch.equal(model.generate(idx, 10, temperature=0), before)


def test_draws_follow_the_softmax():
    logits = torch.randn(1, 6).expand(20000, 6)
    noise = torch.rand(20000, 1, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(draw(logits, 0.7, None, 1.0, noise), minlength=6) / 20000
    torch.testing.assert_close(counts, (logits[0] / 0.7).softmax(-1), atol=0.015, rtol=0)


@pytest.mark.parametrize('top_k, top_p, kept', [(2, 1.0, {1, 3}), (0, 0.75, {1, 3}), (0, 0.5, {3}), (3, 0.99, {1, 3, 0}),
                                                (100, 1.0, {0, 1, 2, 3, 4}), (1, 0.1, {3})])
def test_top_k_and_top_p_keep_the_likeliest(top_k, top_p, kept):
    probabilities = torch.tensor([[0.14, 0.25, 0.06, 0.5, 0.05]])
    noise = torch.linspace(0, 1 - 2 ** -24, 4000)[:, None]
    drawn = draw(probabilities.log().expand(4000, 5), 1.0, top_k, top_p, noise)
    assert set(drawn.tolist()) == kept


def test_padding_of_the_vocabulary_is_never_drawn(model):
    with torch.no_grad():
        model.lm_head.weight[40:] *= 20
    for temperature in (0, 1.0, 5.0):
        found = model.generate(torch.zeros(4, 1, dtype=torch.long), 60, temperature, vocab_size=40)
        assert found.max() < 40


def test_a_sample_does_not_depend_on_its_batch(model):
    noise = torch.rand(4, 12)
    idx = torch.tensor([[3, 1, 4]])
    together = model.generate(idx.expand(4, 3), 12, noise=noise)
    for i in range(4):
        assert torch.equal(model.generate(idx, 12, noise=noise[i:i + 1]), together[i:i + 1])
