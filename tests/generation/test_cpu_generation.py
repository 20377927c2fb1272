"""The layouts of weights for generation on a CPU: the text that the plain model writes."""

import copy

import pytest
import torch
import torch.nn as nn

from engine.generation import cpu as cpu_generation
from engine.generation.cpu import (
    Float16Linear,
    PackedLinear,
    PlainLinear,
    SplitLinear,
    choose_layout,
    optimize_for_generation,
)
from engine.generation.kv_cache import new_caches
from model import GPT, Block, GPTConfig

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]
SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)


def build(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SHAPE, **changes})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)            # far from uniform, so that mistakes show
    return model


def layouts_of(model):
    return {type(layer) for layer in model.modules() if 'Linear' in type(layer).__name__}


def layouts_for(dtype):
    """Those that this machine has for a precision."""
    found = [PlainLinear]
    if dtype == torch.float32:
        found.append(SplitLinear)
    if dtype == torch.float16 and 'fbgemm' in torch.backends.quantized.supported_engines:
        found.append(Float16Linear)
    if dtype != torch.float16 and cpu_generation.onednn_packs(dtype):
        found.append(PackedLinear)
    return found


CASES = [(layout, dtype) for dtype in PRECISIONS for layout in layouts_for(dtype)]


@pytest.mark.parametrize('layout, dtype', CASES)
@pytest.mark.parametrize('n_in', [64, 60])
@pytest.mark.parametrize('bias', [True, False])
def test_each_layout_is_a_product_with_the_stored_weight(layout, dtype, n_in, bias):
    """Of one token and of a prompt, against float64. In 16 bits, inputs and outputs are rounded
    too."""
    linear = nn.Linear(n_in, 24, bias=bias, dtype=dtype)
    found = layout(linear)
    tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    for shape in [(1, 1, n_in), (1, 9, n_in), (3, 1, n_in)]:
        x = torch.randn(shape)
        expected = copy.deepcopy(linear).double()(x.double()).float()
        y = found(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('layout, dtype', CASES)
def test_layouts_change_no_text(monkeypatch, layout, dtype):
    model = build().to(dtype)
    idx = torch.randint(50, (1, 5))
    expected = copy.deepcopy(model).float().generate(idx, 10, temperature=0)
    monkeypatch.setattr(cpu_generation, 'choose_layout', lambda *arguments: layout)
    optimize_for_generation(model, 1)
    assert layouts_of(model) == {layout}
    if dtype != torch.bfloat16:                                 # which rounds 8 times as much
        assert torch.equal(model.generate(idx, 10, temperature=0), expected)


@pytest.mark.parametrize('dtype', PRECISIONS)
@pytest.mark.parametrize('batch_size', [1, 3])
def test_the_layout_depends_on_precision_and_batch_size_alone(dtype, batch_size):
    for shape in (SHAPE, dict(SHAPE, n_embd=64, vocab_size=999)):
        model = build(**shape).to(dtype)
        optimize_for_generation(model, batch_size)
        assert layouts_of(model) == {choose_layout(dtype, batch_size)}


@pytest.mark.parametrize('batch_size', [1, 2])
def test_one_token_of_one_sequence_is_read_without_onednn(batch_size):
    """A prompt, and several sequences at once, are read with it; and so is all that the caller of
    stream does between two tokens."""
    model = build()
    hidden = model.hidden
    before = torch.backends.mkldnn.enabled
    found = []

    def spy(idx, *arguments):
        found.append((idx.size(1), torch.backends.mkldnn.enabled))
        return hidden(idx, *arguments)
    model.hidden = spy
    for _ in model.stream(torch.zeros(batch_size, 3, dtype=torch.long), 3):
        assert torch.backends.mkldnn.enabled == before
    enabled = before and batch_size > 1
    assert found == [(3, before), (1, enabled), (1, enabled)]


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize('dtype', PRECISIONS)
@pytest.mark.parametrize('batch_size', [1, 3])
def test_a_text_depends_on_its_seed_alone(dtype, batch_size, set_threads):
    """Twice with one thread, once with two: the same tokens, drawn at a temperature of 1."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(64, 500, 2, 4, 128, init_std=0.1)).to(dtype).eval()
    idx = torch.zeros(batch_size, 3, dtype=torch.long)
    noise = torch.rand(batch_size, 80)
    texts = []
    for threads in (1, 1, 2):
        set_threads(threads)
        optimized = copy.deepcopy(model)
        optimize_for_generation(optimized, batch_size)
        texts.append(optimized.generate(idx, 80, noise=noise))
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@pytest.mark.parametrize('dtype', PRECISIONS)
def test_one_sequence_and_many_differ_by_rounding_alone(dtype):
    """With GPT-2's vocabulary: the logits of each of 12 sequences, alone and with the others."""
    model = build(n_layer=1, n_embd=64, vocab_size=50304).to(dtype)
    idx = torch.randint(50304, (12, 1))
    exact = copy.deepcopy(model).double()(idx)[0]
    alone = copy.deepcopy(model)
    optimize_for_generation(alone, 1)
    optimize_for_generation(model, 12)

    together = model(idx)[0]
    one_by_one = torch.cat([alone(row)[0] for row in idx.split(1)])
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for logits in (together, one_by_one):
        assert (logits - exact).norm() < tolerance * exact.norm()


def test_a_transposed_weight_keeps_its_text():
    model = build()
    idx = torch.randint(50, (1, 5))
    expected = model.generate(idx, 10, temperature=0)
    for block in model.transformer.h:
        weight = block.mlp.c_fc.weight
        weight.data = weight.data.t().contiguous().t()
    optimize_for_generation(model, 1)
    assert torch.equal(model.generate(idx, 10, temperature=0), expected)


@pytest.mark.parametrize('batch_size', [1, 3])
@pytest.mark.parametrize('changes', [
    {}, dict(bias=False), dict(position='rotary'), dict(position='alibi'),
    dict(position='rotary', n_kv_head=2, qk_norm=True),
    dict(activation='swiglu', norm='rmsnorm_gain'),
    dict(activation='relu2', norm='rmsnorm', tied=False, softcap=5.0),
    dict(position='rotary', norm='rmsnorm', bias=False),        # no parameters but matrices
    dict(activation='gelu_tanh', embedding_norm=True),
    dict(position='alibi', n_kv_head=1, n_inner=40)], ids=str)
def test_every_option_keeps_its_text(changes, batch_size):
    """In float32, past the end of the block too."""
    model = build(**changes)
    idx = torch.randint(50, (batch_size, 5))
    expected = model.generate(idx, 20, temperature=0)
    optimize_for_generation(model, batch_size)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('batch_size', [1, 3])
def test_16_bits_are_as_near_to_float32_as_before(dtype, batch_size):
    """Token by token with a cache. The same weights in float32 are the reference."""
    model = build().to(dtype)
    idx = torch.randint(50, (batch_size, 12))
    exact = copy.deepcopy(model).float()(idx)[0]
    errors = []
    for optimized in (False, True):
        if optimized:
            optimize_for_generation(model, batch_size)
        kv_caches = new_caches(model, batch_size, 16)
        for part in (idx[:, :5], *idx[:, 5:].split(1, dim=1)):
            x = model.hidden(part, kv_caches)
        errors.append((model.logits(x).float() - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0] < 0.1


class ParallelBlock(Block):
    """Attention and MLP read the same input."""

    def forward(self, x, encoding, context):
        return x + self.attn(self.ln_1(x), encoding, context) + self.mlp(self.ln_2(x))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize('change', ['block', 'mlp', 'parts', 'layer'])
def test_a_changed_model_keeps_what_it_computes(change):
    """An option of one's own never loses its effect to an optimization that does not know it."""
    model = build()
    idx = torch.randint(50, (1, 5))
    plain = copy.deepcopy(model)(idx)[0]
    block = model.transformer.h[0]
    if change == 'block':
        block.__class__ = ParallelBlock
    elif change == 'mlp':
        class SquaredMLP(type(block.mlp)):
            def forward(self, x):
                return super().forward(x) ** 2
        block.mlp.__class__ = SquaredMLP
    elif change == 'parts':
        block.mlp = nn.Sequential(nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 32))
    else:
        adapter = ScaledLinear(32, 32)
        adapter.load_state_dict(block.attn.c_proj.state_dict())
        block.attn.c_proj = adapter
    assert not torch.allclose(model(idx)[0], plain, atol=0.01)
    expected = model.generate(idx, 10, temperature=0)
    optimize_for_generation(model, 1)
    assert (ScaledLinear in layouts_of(model)) == (change == 'layer')
    assert torch.equal(model.generate(idx, 10, temperature=0), expected)
