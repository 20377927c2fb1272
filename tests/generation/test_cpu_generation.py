"""What is put on a model to generate on a CPU: the text that the plain model writes."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from engine.generation import cpu as cpu_generation
from engine.generation.cpu import LAYOUTS, PlainLinear, optimize_for_generation
from engine.generation.kv_cache import new_caches
from model import GPT, Block, GPTConfig

PRECISIONS = [torch.float32, torch.bfloat16, torch.float16]


def build(**changes):
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32), **changes})).eval()
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)                            # far from uniform, so that mistakes show
    return model


def is_optimized(block):
    return getattr(block.forward, 'func', None) is cpu_generation.block_forward


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('dtype', PRECISIONS)
@pytest.mark.parametrize('batch_size', [1, 3])
@pytest.mark.parametrize('bias', [True, False])
def test_each_layout_is_a_product_with_the_stored_weight(layout, dtype, batch_size, bias):
    """Of one token and of a prompt, against float64. In 16 bits, inputs and outputs are rounded too."""
    linear = nn.Linear(64, 24, bias=bias, dtype=dtype)
    try:
        found = layout(linear, batch_size)
        found(torch.ones(batch_size, 1, 64))
    except (RuntimeError, AttributeError) as error:
        if dtype == torch.float32 and layout is PlainLinear:
            raise
        pytest.skip(f'not for this, or not in this PyTorch: {error}')
    for T in (1, 9):
        x = torch.randn(batch_size, T, 64)
        expected = copy.deepcopy(linear).double()(x.double()).float()
        y = found(x)
        assert y.dtype == torch.float32
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)
    assert torch.backends.mkldnn.enabled == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize('layout', LAYOUTS)
def test_layouts_change_no_text(monkeypatch, layout):
    """Whichever layout the measurement prefers."""
    model = build().to(torch.float16 if layout is cpu_generation.Float16Linear else torch.float32)
    idx = torch.randint(50, (1, 5))
    expected = copy.deepcopy(model).float().generate(idx, 10, temperature=0)
    try:
        layout(model.lm_head, 1)(torch.ones(1, 1, 32))
    except (RuntimeError, AttributeError) as error:
        pytest.skip(f'not in this PyTorch: {error}')
    monkeypatch.setattr(cpu_generation, 'LAYOUTS', [layout])
    optimize_for_generation(model, 1)
    assert {type(m) for m in model.modules() if 'Linear' in type(m).__name__} == {layout}
    assert torch.equal(model.generate(idx, 10, temperature=0), expected)


def test_the_fastest_layout_is_chosen(monkeypatch):
    """By a clock that only SlowLinear moves. It stores all layers of the shape, also those that are not measured."""
    seconds = 0

    class SlowLinear(PlainLinear):
        def forward(self, x):
            nonlocal seconds
            seconds += 1
            return super().forward(x)
    monkeypatch.setattr(cpu_generation, 'time', SimpleNamespace(perf_counter=lambda: seconds))
    linears = [nn.Linear(2048, 2048, bias=False, dtype=torch.bfloat16) for _ in range(10)]       # 80 MiB
    for layouts in ([SlowLinear, PlainLinear], [PlainLinear, SlowLinear]):
        monkeypatch.setattr(cpu_generation, 'LAYOUTS', layouts)
        found = cpu_generation.in_fastest_layout(linears, 1, [])
        assert [type(layer) for layer in found] == [PlainLinear] * 10
        assert all(layer.weight.data_ptr() == linear.weight.data_ptr() for layer, linear in zip(found, linears))


def test_a_transposed_weight_keeps_its_text():
    model, idx = build(), torch.randint(50, (1, 5))
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
    dict(activation='swiglu', norm='rmsnorm_gain'), dict(activation='relu2', norm='rmsnorm', tied=False, softcap=5.0),
    dict(activation='gelu_tanh', embedding_norm=True), dict(position='alibi', n_kv_head=1, n_inner=40)], ids=str)
def test_every_option_keeps_its_text(changes, batch_size):
    """In float32, past the end of the block too, with the layouts that the measurement chooses."""
    model, idx = build(**changes), torch.randint(50, (batch_size, 5))
    expected = model.generate(idx, 20, temperature=0)
    optimize_for_generation(model, batch_size)
    assert all(is_optimized(block) for block in model.transformer.h)
    assert torch.equal(model.generate(idx, 20, temperature=0), expected)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('batch_size', [1, 3])
def test_16_bits_are_as_near_to_float32_as_before(dtype, batch_size):
    """Token by token with a cache. The same weights in float32 are the reference."""
    model, idx = build().to(dtype), torch.randint(50, (batch_size, 12))
    exact, errors = copy.deepcopy(model).float()(idx)[0], []
    for optimized in (False, True):
        if optimized:
            optimize_for_generation(model, batch_size)
        kv_caches = new_caches(model, batch_size, 16)
        x = [model.hidden(part, kv_caches) for part in (idx[:, :5], *idx[:, 5:].split(1, dim=1))][-1]
        errors.append((model.logits(x).float() - exact).norm() / exact.norm())
    assert errors[1] < 1.2 * errors[0] < 0.1


class ParallelBlock(Block):
    """Attention and MLP read the same input."""

    def forward(self, x, kv_cache=None, rotation=None, attn_bias=None):
        return x + self.attn(self.ln_1(x), kv_cache, rotation, attn_bias) + self.mlp(self.ln_2(x))


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


@pytest.mark.parametrize('change', ['block', 'mlp', 'parts', 'layer'])
def test_a_changed_model_keeps_what_it_computes(change):
    """An option of one's own never loses its effect to an optimization that does not know it."""
    model, idx = build(), torch.randint(50, (1, 5))
    plain, block = copy.deepcopy(model)(idx)[0], model.transformer.h[0]
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
    assert is_optimized(model.transformer.h[1]) and is_optimized(block) == (change == 'layer')
    assert torch.equal(model.generate(idx, 10, temperature=0), expected)
