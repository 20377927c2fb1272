"""Compared with transformers, whose GPT-2 is an implementation of its own."""

import re

import pytest
import torch
import torch.nn.functional as F

from engine import hf
from engine.errors import RunError, UserError
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')


def reference_gpt2(**changes):
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=4, n_embd=64, n_positions=48, vocab_size=211, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    reference = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.1)               # biases and norms that are not 0 and 1
    return reference


def assert_same_function(model, reference):
    """Logits, loss and every gradient, to 1e-5 of their size."""
    idx = torch.randint(211, (3, 48))
    logits, loss = model(idx, idx.roll(-1, 1))
    expected = reference(idx).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten())
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    loss.backward()
    expected_loss.backward()
    grads = {name: p.grad for name, p in reference.named_parameters()}
    for name, p in model.named_parameters():
        expected = grads[name].t() if name.endswith(hf.TRANSPOSED) else grads[name]
        assert (p.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_imported_weights_give_the_same_logits_loss_and_gradients(tmp_path, activation):
    reference = reference_gpt2(activation_function=activation)
    reference.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    assert model.config.activation == {'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}[activation]
    assert_same_function(model, reference)


@pytest.mark.parametrize('bias', [True, False])
def test_exported_weights_give_the_same_logits_loss_and_gradients(tmp_path, bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, 211, 3, 4, 64, bias=bias))
    hf.to_transformers(model.config, model.state_dict()).save_pretrained(tmp_path)
    assert_same_function(model, transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


def test_there_and_back_again_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, 211, 2, 4, 64, activation='gelu_tanh'))
    hf.to_transformers(model.config, model.state_dict()).save_pretrained(tmp_path)
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_dropout_is_the_one_thing_that_can_be_chosen(tmp_path):
    reference_gpt2().save_pretrained(tmp_path)
    assert GPT.from_pretrained(str(tmp_path), {'dropout': 0.25}).config.dropout == 0.25
    with pytest.raises(UserError, match='set n_layer; only dropout can be given'):
        GPT.from_pretrained('gpt2', {'n_layer': 3})


@pytest.mark.parametrize('changes, words', [
    (dict(n_inner=100), 'n_inner'), (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn'),
    (dict(activation_function='relu'), 'activation_function')])
def test_a_variant_that_is_not_gpt2_is_refused(tmp_path, changes, words):
    reference_gpt2(**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('content', [None, '{', '{"model_type": "llama"}', '{}'])
def test_a_folder_without_gpt2_is_refused(tmp_path, content):
    if content:
        (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=f'{re.escape(str(tmp_path))} cannot be used as GPT-2 weights'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('source', ['gpt5', 'gpt3', '', 'nowhere/at all'])
def test_an_unknown_source_is_refused(source):
    with pytest.raises(UserError, match=f'init_from={source!r} should be scratch, resume, auto, gpt2'):
        GPT.from_pretrained(source)


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    reference_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['transformer.h.1.ln_2.bias']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(UserError, match='ln_2.bias'):
        GPT.from_pretrained(str(tmp_path))


def test_an_unreachable_hub_is_one_plain_failure(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError('no route to the hub')
    monkeypatch.setattr(transformers.PretrainedConfig, 'get_config_dict', unreachable)
    with pytest.raises(RunError, match='gpt2-xl could not be downloaded.*no route'):
        GPT.from_pretrained('gpt2-xl')
