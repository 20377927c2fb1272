"""What GPT has beyond GPT-2, each option with each other one. Whether the shapes are those of other
implementations is tested in test_hf_weights.py."""

import copy
import itertools
import math
from dataclasses import dataclass
from typing import Literal

import harness  # noqa: F401, puts the project on sys.path
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.attention import CausalAttention
from engine.checkpoint.contents import NANOGPT_ARGS, Checkpoint
from engine.errors import UserError
from engine.generation import cpu as cpu_generation
from engine.generation.kv_cache import KVCache, StaticKVCache, new_caches
from engine.positions import ALiBi, PositionEncoding, RotaryPositions
from engine.training import chunked_loss
from model import GPT, GPTConfig

OPTIONS = [('position', 'rotary'), ('position', 'alibi'), ('norm', 'rmsnorm'),
           ('norm', 'rmsnorm_gain'),
           ('activation', 'relu2'), ('activation', 'swiglu'), ('qk_norm', True),
           ('embedding_norm', True), ('n_kv_head', 2), ('tied', False), ('softcap', 1.0),
           ('zero_init', True)]
PAIRS = [dict(pair) for pair in itertools.combinations(OPTIONS, 2) if pair[0][0] != pair[1][0]]
NANOCHAT = dict(position='rotary', norm='rmsnorm', activation='relu2', qk_norm=True,
                embedding_norm=True, tied=False, softcap=15.0, bias=False)
LLAMA = dict(position='rotary', norm='rmsnorm_gain', activation='swiglu', n_kv_head=2, qk_norm=True,
             bias=False)
ALIBI = dict(position='alibi', n_kv_head=2, tied=False)


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=4, n_embd=32)
    return GPT(GPTConfig(**{**shape, **changes}))


def with_random_weights(model):
    torch.manual_seed(1)
    for p in model.parameters():
        # far from uniform, so that mistakes show
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.2)
    return model.eval()


def from_its_checkpoint(model):
    return GPT.from_checkpoint(Checkpoint(**model.to_checkpoint(), iter_num=0, best_val_loss=1.0))


def describe(changes):
    return ' '.join(f'{name}={value}' for name, value in changes.items())


each_pair = pytest.mark.parametrize('changes', PAIRS, ids=describe)
each_shape = pytest.mark.parametrize('changes', [NANOCHAT, LLAMA, ALIBI],
                                     ids=['nanochat', 'llama', 'alibi'])


# Positions

def test_rotary_positions_turn_pairs_of_channels_as_complex_numbers():
    x = torch.randn(2, 5, 3, 8)
    positions = torch.tensor([0, 1, 2, 10, 1000])
    pairs = torch.complex(x[..., :4], x[..., 4:])
    frequencies = torch.tensor([100.0 ** (-2 * i / 8) for i in range(4)])
    turned = pairs * torch.polar(torch.ones(5, 4), positions[:, None] * frequencies)[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    encoding = RotaryPositions(positions, 8, 100.0)
    torch.testing.assert_close(encoding.rotate(x), expected, rtol=1e-4, atol=1e-4)
    assert encoding.rotate(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize('n_head, slopes', [
    (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),      # as published
    (1, [2 ** -8]),
    (12, [2 ** -n for n in range(1, 9)] + [2 ** -0.5, 2 ** -1.5, 2 ** -2.5, 2 ** -3.5])])
def test_alibi_has_the_published_slopes(n_head, slopes):
    bias = ALiBi(torch.arange(6), 6, n_head).bias[0]
    for h, slope in enumerate(slopes):
        for i, j in itertools.product(range(6), repeat=2):
            expected = -slope * (i - j) if j <= i else -math.inf
            assert bias[h, i, j].item() == pytest.approx(expected)


@pytest.mark.parametrize('position', ['rotary', 'alibi'])
def test_only_distances_count(position):
    """Text that begins at another position gives the same, and the order of tokens still
    matters."""
    model = with_random_weights(tiny_gpt(position=position, block_size=64))
    idx = torch.randint(50, (1, 12))
    plain = model.hidden(idx)

    def attend(q, k, v, bias):
        if bias is not None:
            bias = bias[..., -12:]
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=bias is None)

    caches = new_caches(model, 1, 64)
    for cache in caches:
        cache.length = 20                               # zeros, which `attend` hides from attention
        cache.attend = attend
    torch.testing.assert_close(model.hidden(idx, caches), plain, rtol=1e-3, atol=1e-4)
    swapped = torch.cat([idx[:, 1:2], idx[:, :1], idx[:, 2:]], dim=1)
    assert (model.hidden(swapped)[:, -1] - plain[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize('position', ['rotary', 'alibi'])
def test_a_context_without_position_embeddings_can_grow(position):
    model = with_random_weights(tiny_gpt(position=position))
    idx = torch.randint(50, (2, 30))
    with pytest.raises(UserError, match='30 tokens do not fit block_size=16'):
        model(idx)
    short = model(idx[:, :16], idx[:, :16])[0]
    model.crop_block_size(32)
    torch.testing.assert_close(model(idx, idx)[0][:, :16], short)
    assert from_its_checkpoint(model).config.block_size == 32


# Every pair

@each_pair
def test_a_checkpoint_names_what_differs_from_gpt2_and_comes_back_the_same(changes):
    model = with_random_weights(tiny_gpt(**changes))
    saved = model.to_checkpoint()
    assert set(saved['model_args']) == {*NANOGPT_ARGS, *changes}
    assert saved['activation'] == changes.get('activation', 'gelu')
    again = from_its_checkpoint(model)
    assert again.config == model.config
    both = zip(model.state_dict().items(), again.state_dict().items(), strict=True)
    for (name, a), (other, b) in both:
        assert name == other and torch.equal(a, b)
    assert (again.lm_head.weight is again.transformer.wte.weight) == changes.get('tied', True)


@each_pair
@pytest.mark.parametrize('kind', [KVCache, StaticKVCache])
def test_cached_logits_are_uncached_logits(changes, kind):
    """As a compiled step uses the static cache: with the position in a tensor."""
    model = with_random_weights(tiny_gpt(**changes))
    idx = torch.randint(50, (2, 16))
    kv_caches = new_caches(model, 2, 16, kind)
    assert kv_caches[0].keys.shape == (2, changes.get('n_kv_head', 4), 16, 8)
    parts = [model.hidden(idx[:, :5], kv_caches)]
    for i in range(5, 16):
        position = torch.tensor([i]) if kind is StaticKVCache else None
        for kv_cache in kv_caches:
            kv_cache.length, kv_cache.position = i, position
        parts.append(model.hidden(idx[:, i:i + 1], kv_caches, position))
    torch.testing.assert_close(torch.cat(parts, dim=1), model.hidden(idx), rtol=1e-4, atol=1e-5)


@each_pair
def test_generation_goes_on_past_the_block(changes):
    model = with_random_weights(tiny_gpt(**changes))
    idx = expected = torch.randint(50, (2, 7))
    for _ in range(20):
        logits, _ = model(expected[:, -16:])
        expected = torch.cat([expected, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(idx, 20, temperature=0, exact_window=True), expected)
    assert torch.equal(model.generate(idx, 10, temperature=0), expected[:, :17])


@each_pair
def test_a_cpu_computes_the_same_losses_and_gradients(changes, monkeypatch):
    """With the chunked loss, for every parameter, as DDP expects."""
    monkeypatch.setattr(chunked_loss, 'MIN_LOGITS', 0)
    monkeypatch.setitem(chunked_loss.CHUNK_LOGITS, 'cpu', 350)
    idx = torch.randint(50, (3, 16))
    targets = idx.roll(-1, 1)
    targets[0, :5] = -1
    plain = with_random_weights(tiny_gpt(**changes)).train()
    fast = copy.deepcopy(plain)
    fast.keep_logits = False
    for model in (plain, fast):
        model(idx, targets)[1].backward()
    with torch.no_grad():
        assert fast(idx, targets)[0] is None            # no logits, so the chunked loss is in use
        torch.testing.assert_close(fast(idx, targets)[1], plain(idx, targets)[1])
    for (name, a), b in zip(plain.named_parameters(), fast.parameters(), strict=True):
        # a bias of keys has gradients of 0
        assert (a.grad - b.grad).norm() <= 1e-5 * a.grad.norm() + 1e-7, name


@each_pair
def test_flops_and_parameters_are_those_that_are_there(changes):
    """PyTorch's counter sees the matrix products. The estimate also counts norms and biases as
    matrices."""
    model = tiny_gpt(**changes)
    idx = torch.randint(50, (1, 16))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx, idx)[1].backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert model.flops_per_token() * 16 == counter.get_total_flops() + 6 * 16 * vectors
    numbers = {p.data_ptr(): p.numel() for p in model.state_dict().values()}
    assert model.get_num_params(non_embedding=False) == sum(numbers.values())
    n_learned = 16 * 32 if changes.get('position') is None else 0
    assert model.get_num_params() == sum(numbers.values()) - n_learned


@each_pair
def test_layouts_for_generation_change_no_logits(changes):
    model = with_random_weights(tiny_gpt(**changes))
    expected = copy.deepcopy(model)
    cpu_generation.optimize_for_generation(model, 1)
    idx = torch.randint(50, (1, 9))
    assert isinstance(model.transformer.h[1].mlp.c_fc, cpu_generation.SplitLinear)
    torch.testing.assert_close(model(idx)[0], expected(idx)[0], rtol=1e-4, atol=1e-5)


# Single options

def test_zero_init_begins_with_equal_probabilities_and_blocks_that_add_nothing():
    model = tiny_gpt(zero_init=True, tied=False)
    idx = torch.randint(50, (2, 16))
    assert model(idx, idx)[1].item() == pytest.approx(math.log(50))
    x = torch.randn(2, 16, 32)
    assert torch.equal(model.transformer.h[0](x, PositionEncoding(), CausalAttention()), x)
    # a tied head is the embedding too
    assert tiny_gpt(zero_init=True).lm_head.weight.std() > 0.01


def test_a_soft_cap_bounds_the_logits():
    model = with_random_weights(tiny_gpt(softcap=1.0))
    plain = tiny_gpt()
    plain.load_state_dict(model.state_dict())
    idx = torch.randint(50, (2, 16))
    expected = plain(idx)[0]
    assert expected.abs().max() > 1
    torch.testing.assert_close(model(idx)[0], torch.tanh(expected))


def test_swiglu_is_as_large_as_gpt2s_mlp_unless_its_width_is_given():
    for n_embd in (384, 768, 1024):
        with torch.device('meta'):
            gelu = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=n_embd))
            swiglu = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=n_embd, activation='swiglu'))
        assert swiglu.get_num_params() == pytest.approx(gelu.get_num_params(), rel=0.02)
    mlp = tiny_gpt(activation='swiglu', n_inner=40).transformer.h[0].mlp
    assert mlp.c_fc.weight.shape == (80, 32)


@each_shape
def test_activation_checkpointing_gives_the_same_gradients(changes):
    idx = torch.randint(50, (2, 16))
    found = []
    for checkpointed in (False, True):
        model = tiny_gpt(dropout=0.2, **changes)
        if checkpointed:
            model.recompute = True
        torch.manual_seed(5)
        model(idx, idx)[1].backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@each_shape
def test_16_bits_are_near_32(changes):
    """Losses and gradients under autocast, and cached positions with 16-bit weights."""
    idx = torch.randint(50, (4, 16))
    found = []
    model = with_random_weights(tiny_gpt(**changes))
    for dtype in (torch.float32, torch.bfloat16):
        with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
            loss = model(idx, idx)[1]
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters()]
        found.append(torch.cat([loss.detach()[None], *gradients]))
        model.zero_grad()
    assert (found[1] - found[0]).norm() < 0.03 * found[0].norm()
    exact = model.hidden(idx)
    model.bfloat16()
    caches = new_caches(model, 4, 16)
    parts = [model.hidden(idx[:, :5], caches)]
    parts += [model.hidden(idx[:, i:i + 1], caches) for i in range(5, 16)]
    assert (torch.cat(parts, dim=1) - exact).norm() < 0.03 * exact.norm()


@each_shape
def test_training_and_decoding_trace_to_one_graph_each(changes, monkeypatch):
    """Without graph breaks, and no other graph for another token."""
    torch_compile = torch.compile
    monkeypatch.setattr(torch, 'compile', lambda function, mode=None, **options: torch_compile(
        function, backend='eager', **options))
    model = with_random_weights(tiny_gpt(**changes))
    idx = torch.randint(50, (2, 12))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counters = torch._dynamo.utils.counters
    compiled = torch.compile(model, dynamic=False)
    for _ in range(2):
        torch.testing.assert_close(compiled(idx, idx)[1], model(idx, idx)[1])
    assert counters['stats']['unique_graphs'] == 1 and not counters['graph_break']
    expected = model.generate(idx, 30, temperature=0)
    assert torch.equal(model.generate(idx, 30, temperature=0, compile=True), expected)
    assert counters['stats']['unique_graphs'] == 2 and not counters['graph_break']
    torch._dynamo.reset()


@pytest.mark.parametrize('changes, words', [
    (dict(position='sinus'), "position='sinus' should be one of 'learned', 'rotary', 'alibi'"),
    (dict(norm='batch'), "norm='batch' should be one of"),
    (dict(qk_norm=1), 'qk_norm=1 should be one of True, False'),
    (dict(tied='False'), "tied='False' should be"),
    (dict(softcap=-1), 'softcap=-1 should be a number from 0'),
    (dict(softcap=float('nan')), 'softcap=nan should be'),
    (dict(softcap=torch.ones(2)), 'softcap='),
    (dict(n_kv_head=3), 'n_head=4 does not divide over n_kv_head=3; try --n_kv_head=2'),
    (dict(n_kv_head=True), 'n_kv_head=True should be'),
    (dict(n_inner=2.5), 'n_inner=2.5 should be a whole number'),
    (dict(rope_theta=0), 'rope_theta=0 should be'), (dict(norm=['rmsnorm']), 'norm='),
    (dict(position=torch.ones(2)), 'position='),
    (dict(position='rotary', n_embd=36), 'is 9; try --n_embd=72')])
def test_an_impossible_option_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_gpt(**changes)


def test_an_untied_head_may_differ_and_a_tied_one_may_not():
    model = with_random_weights(tiny_gpt(tied=False))
    weights = model.state_dict()
    again = GPT.from_weights(model.config, weights)
    assert not torch.equal(again.lm_head.weight, model.transformer.wte.weight)
    with pytest.raises(UserError, match='here they are tied'):
        GPT.from_weights(tiny_gpt().config, weights)


@dataclass
class LargerConfig(GPTConfig):
    embedding_scale: float = 1.0
    gate: Literal['sigmoid', 'tanh'] = 'sigmoid'


@pytest.mark.parametrize('changes, words', [
    (dict(embedding_scale='2'), "embedding_scale='2' should be a number"),
    (dict(embedding_scale=float('nan')), 'embedding_scale=nan should be a number'),
    (dict(gate='relu'), "gate='relu' should be one of 'sigmoid', 'tanh'")])
def test_a_new_field_is_checked_by_its_annotation(changes, words):
    assert LargerConfig(embedding_scale=3, gate='tanh').gate == 'tanh'
    with pytest.raises(UserError, match=words):
        LargerConfig(**changes)
