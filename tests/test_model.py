import copy
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import ROOT

from engine.errors import UserError
from model import GPT, GPTConfig


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    return GPT(GPTConfig(**{**shape, **changes}))


def slow_forward(model, idx):
    """GPT-2 by its formulas, one head and one position at a time. (B, T) to (B, T, V)"""
    w = model.state_dict()
    c = model.config
    D = c.n_embd // c.n_head

    def norm(x, name):
        variance = x.var(-1, unbiased=False, keepdim=True)
        x = (x - x.mean(-1, keepdim=True)) / torch.sqrt(variance + 1e-5)
        return x * w[f'{name}.weight'] + w.get(f'{name}.bias', 0)

    def linear(x, name):
        return x @ w[f'{name}.weight'].t() + w.get(f'{name}.bias', 0)

    def gelu(x):
        if c.activation == 'gelu':
            return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))

    x = w['transformer.wte.weight'][idx] + w['transformer.wpe.weight'][:idx.size(1)]
    for layer in range(c.n_layer):
        block = f'transformer.h.{layer}'
        q, k, v = linear(norm(x, f'{block}.ln_1'), f'{block}.attn.c_attn').split(c.n_embd, dim=-1)
        heads = torch.zeros_like(x)
        for h in range(c.n_head):
            part = slice(h * D, (h + 1) * D)
            for t in range(idx.size(1)):
                scores = (k[:, :t + 1, part] @ q[:, t, part, None])[..., 0] / math.sqrt(D)
                heads[:, t, part] = (scores.softmax(-1)[..., None] * v[:, :t + 1, part]).sum(1)
        x = x + linear(heads, f'{block}.attn.c_proj')
        h = gelu(linear(norm(x, f'{block}.ln_2'), f'{block}.mlp.c_fc'))
        x = x + linear(h, f'{block}.mlp.c_proj')
    return norm(x, 'transformer.ln_f') @ w['lm_head.weight'].t()


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('activation', ['gelu', 'gelu_tanh'])
def test_forward_is_gpt2_by_its_formulas(bias, activation):
    model = tiny_gpt(bias=bias, activation=activation).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    idx = torch.randint(50, (2, 9))
    logits, loss = model(idx, idx)
    torch.testing.assert_close(logits, slow_forward(model, idx), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, -logits.log_softmax(-1).gather(2, idx[..., None]).mean())
    last, none = model(idx)
    assert none is None
    torch.testing.assert_close(last, logits[:, -1:])


@pytest.mark.parametrize('bias', [True, False])
def test_future_tokens_leave_the_past_alone(bias):
    model = tiny_gpt(bias=bias).eval()
    a = torch.randint(50, (1, 12))
    b = a.clone()
    b[:, 8:] = (b[:, 8:] + 1) % 50
    torch.testing.assert_close(model(a, a)[0][:, :8], model(b, b)[0][:, :8])


def test_targets_of_minus_one_do_not_count():
    model = tiny_gpt().eval()
    idx = torch.randint(50, (2, 8))
    targets = idx.roll(-1, 1)
    targets[:, 3:] = -1
    torch.testing.assert_close(model(idx, targets)[1], model(idx[:, :3], targets[:, :3])[1])


def test_initial_weights_have_gpt2s_deviations():
    model = tiny_gpt(n_layer=8, n_embd=128, vocab_size=500, bias=True)
    for name, p in model.named_parameters():
        if name.endswith('c_proj.weight'):
            assert p.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05), name
        elif p.dim() == 2:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert set(p.tolist()) == ({1.0} if name.endswith('weight') else {0.0}), name
    loss = model(torch.randint(500, (4, 16)), torch.randint(500, (4, 16)))[1]
    assert loss.item() == pytest.approx(math.log(500), rel=0.02)


def test_gpt2_has_124m_parameters_under_nanogpts_names():
    with torch.device('meta'):
        model = GPT(GPTConfig(vocab_size=50257))
    assert model.get_num_params(non_embedding=False) == 124_439_808     # Radford et al.
    names = set(model.state_dict())
    assert {'transformer.wte.weight', 'transformer.wpe.weight', 'transformer.h.11.attn.c_attn.bias',
            'transformer.h.0.mlp.c_fc.weight', 'transformer.ln_f.weight', 'lm_head.weight'} <= names
    assert len(names) == 2 + 12 * 12 + 2 + 1
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_first_step_imports_nothing_that_it_does_not_need():
    """Each of these takes seconds to import."""
    code = """
import sys, torch
from model import GPT, GPTConfig
m = GPT(GPTConfig(8, 9, 1, 1, 4))
o = m.configure_optimizers(0.1, 1e-3, (0.9, 0.95))
x = torch.zeros(1, 8, dtype=torch.long)
m(x, x)[1].backward()
o.step()
print([n for n in ('transformers', 'datasets', 'wandb', 'matplotlib') if n in sys.modules])
"""
    ended = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert ended.stdout == '[]\n', ended.stderr


def test_cropped_model_equals_the_long_one_on_short_text():
    model = tiny_gpt().eval()
    short = copy.deepcopy(model)
    short.crop_block_size(8)
    idx = torch.randint(50, (2, 8))
    torch.testing.assert_close(short(idx)[0], model(idx)[0])
    with pytest.raises(UserError, match='9 tokens do not fit block_size=8'):
        short(torch.randint(50, (2, 9)))


def test_a_longer_context_stretches_learned_positions():
    """Each channel is interpolated as numpy does it, and the ends stay."""
    model = tiny_gpt()
    before = model.transformer.wpe.weight.detach().clone()
    model.resize_context(41)
    found = model.transformer.wpe.weight
    places = np.linspace(0, 15, 41)
    for channel in range(found.size(1)):
        expected = np.interp(places, np.arange(16), before[:, channel])
        np.testing.assert_allclose(found[:, channel].detach(), expected, atol=1e-6)
    assert found.requires_grad
    assert model(torch.randint(50, (2, 41)))[0].shape == (2, 1, 50)


def test_dropout_is_where_gpt2_has_it(monkeypatch):
    """After the embedding, in the attention weights, and after each half of a block."""
    model = tiny_gpt(dropout=0.5)
    kept = []
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.register_forward_hook(lambda m, i, o: kept.append((o != 0).float().mean().item()))
    rates = record_attention_dropout(monkeypatch)
    model(torch.randint(50, (8, 16)))
    model.eval()(torch.randint(50, (8, 16)))
    assert kept[:5] == pytest.approx([0.5] * 5, abs=0.05)
    assert rates == [0.5, 0.5, 0.0, 0.0]


def test_attention_weights_can_go_without_dropout(monkeypatch):
    rates = record_attention_dropout(monkeypatch)
    model = tiny_gpt(dropout=0.5, attention_dropout=False)
    idx = torch.randint(50, (8, 16))
    assert model.hidden(idx).ne(model.hidden(idx)).any()        # the other places drop as before
    assert rates == [0.0] * 4


def record_attention_dropout(monkeypatch):
    """A list that gets the dropout of each later call of PyTorch's attention."""
    attention = F.scaled_dot_product_attention
    rates = []

    def spy(*args, dropout_p=0.0, **kwargs):
        rates.append(dropout_p)
        return attention(*args, dropout_p=dropout_p, **kwargs)

    monkeypatch.setattr(F, 'scaled_dot_product_attention', spy)
    return rates


def test_activation_checkpointing_gives_the_same_gradients():
    """Dropout included: when a block runs again, it drops the same."""
    idx = torch.randint(50, (4, 16))
    found = []
    forwards = []

    def count(*arguments, checkpointed):
        forwards.append(checkpointed)

    for checkpointed in (False, True):
        model = tiny_gpt(dropout=0.3)
        mlp = model.transformer.h[1].mlp
        mlp.register_forward_pre_hook(partial(count, checkpointed=checkpointed))
        if checkpointed:
            model.recompute = True
        torch.manual_seed(5)
        model(idx, idx)[1].backward()
        found.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found))
    assert forwards == [False, True, True]


def test_flops_count_the_matmuls():
    model = tiny_gpt(bias=False, n_embd=64, n_layer=3)
    c = model.config
    forward = 0
    forward += c.n_layer * (2 * 12 * c.n_embd ** 2)         # the four Linears of a block
    forward += c.n_layer * 2 * 2 * c.block_size * c.n_embd  # scores, and their use
    forward += 2 * c.n_embd * c.vocab_size
    norms = (2 * c.n_layer + 1) * c.n_embd                  # it counts them as matrices
    assert model.flops_per_token() == 3 * (forward + 2 * norms)
    seconds = model.flops_per_token() * c.block_size * 4 / 1e9
    assert model.estimate_mfu(4, seconds, 1e9) == pytest.approx(1.0)
    assert model.estimate_mfu(4, seconds, None) is None
    assert model.estimate_mfu(4, seconds) == pytest.approx(1e9 / 312e12)      # an A100's


@pytest.mark.parametrize('changes, words', [
    (dict(n_layer=0), 'n_layer=0 should be'), (dict(n_head=3), 'try --n_embd=33'),
    (dict(n_head=-2), 'n_head=-2 should be'),
    (dict(n_embd=30, n_head=4), 'n_embd=30 does not divide over n_head=4; try --n_embd=32'),
    (dict(dropout=1.5), 'dropout=1.5 should be'), (dict(dropout=-0.1), 'dropout=-0.1 should be'),
    (dict(block_size=-1), 'block_size=-1 should be'),
    (dict(vocab_size=2.5), 'vocab_size=2.5 should be a whole number'),
    (dict(activation='relu'), 'gelu')])
def test_a_shape_that_cannot_be_is_refused(changes, words):
    with pytest.raises(UserError, match=words):
        tiny_gpt(**changes)


def test_weights_of_another_shape_are_refused_by_name():
    model = tiny_gpt()
    weights = dict(model.state_dict())
    weights['transformer.ln_f.weight'] = torch.zeros(31)
    with pytest.raises(UserError, match='transformer.ln_f.weight'):
        GPT.from_weights(model.config, weights)
    del weights['transformer.ln_f.weight']
    with pytest.raises(UserError, match='ln_f.weight: missing'):
        GPT.from_weights(model.config, weights)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights['lm_head.weight'][0, 0] += 1
    with pytest.raises(UserError, match='lm_head.weight differs from transformer.wte.weight'):
        GPT.from_weights(model.config, weights)
