"""Compared with transformers, whose GPT-2 is an implementation of its own."""

import json
import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT

from engine.errors import RunError, UserError
from engine.hf import weights as hf_weights
from model import GPT, NANOGPT_ARGS, GPTConfig

transformers = pytest.importorskip('transformers')


def reference_gpt2(**changes):
    torch.manual_seed(0)
    shape = dict(
        n_layer=3,
        n_head=4,
        n_embd=64,
        n_positions=48,
        vocab_size=211,
        resid_pdrop=0,
        embd_pdrop=0,
        attn_pdrop=0,
    )
    config = transformers.GPT2Config(**{**shape, **changes})
    reference = transformers.GPT2LMHeadModel(config).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, std=0.1)               # biases and norms that are not 0 and 1
    return reference


def export_to(folder, model):
    hf_weights.to_transformers(model.config, model.state_dict()).save_pretrained(folder)


def assert_same_weights(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


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
        expected = grads[name]
        if name.endswith(hf_weights.TRANSPOSED):
            expected = expected.t()
        assert (p.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_imported_weights_give_the_same_logits_loss_and_gradients(tmp_path, activation):
    reference = reference_gpt2(activation_function=activation)
    reference.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    assert model.config.activation == {'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}[activation]
    assert model.to_checkpoint()['model_args'].keys() == set(NANOGPT_ARGS)
    assert_same_function(model, reference)


@pytest.mark.parametrize('changes', [
    dict(n_layer=6),
    dict(activation_function='gelu', n_inner=256, n_positions=64, reorder_and_upcast_attn=False),
    dict(n_inner=100, layer_norm_epsilon=1e-3),
    dict(tie_word_embeddings=False),
], ids=['distilgpt2', 'Cerebras-GPT', 'another width', 'untied'])
def test_other_shapes_of_gpt2_give_the_same(tmp_path, changes):
    reference = reference_gpt2(**changes)
    reference.save_pretrained(tmp_path)
    model = GPT.from_pretrained(str(tmp_path))
    assert_same_function(model, reference)
    export_to(tmp_path / 'again', model)
    assert GPT.from_pretrained(str(tmp_path / 'again')).config == model.config


@pytest.mark.parametrize('bias', [True, False])
def test_exported_weights_give_the_same_logits_loss_and_gradients(tmp_path, bias):
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, 211, 3, 4, 64, bias=bias))
    export_to(tmp_path, model)
    assert_same_function(model, transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


def test_there_and_back_again_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(48, 211, 2, 4, 64, activation='gelu_tanh'))
    export_to(tmp_path, model)
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == model.config
    assert_same_weights(model.state_dict(), again.state_dict())


def test_dropout_is_the_one_thing_that_can_be_chosen(tmp_path):
    reference_gpt2().save_pretrained(tmp_path)
    assert GPT.from_pretrained(str(tmp_path), {'dropout': 0.25}).config.dropout == 0.25
    with pytest.raises(UserError, match='set n_layer; only dropout can be given'):
        GPT.from_pretrained('gpt2', {'n_layer': 3})


@pytest.mark.parametrize('changes, words', [
    (dict(scale_attn_weights=False), 'scale_attn_weights=False is a variant of gpt2'),
    (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn_by_inverse'),
    (dict(activation_function='relu'), "activation_function='relu'")])
def test_a_variant_that_is_not_gpt2_is_refused(tmp_path, changes, words):
    reference_gpt2(**changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('content', [None, '{', '{"model_type": "bert"}', '{}'])
def test_a_folder_without_weights_for_gpt_is_refused(tmp_path, content):
    if content:
        (tmp_path / 'config.json').write_text(content)
    with pytest.raises(UserError, match=f'{re.escape(str(tmp_path))} cannot be used as weights'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('source', [
    'gpt5', 'gpt3', 'scrath', '', 'nowhere/at all', 'a/b/c', '../weights', './weights'])
def test_an_unknown_source_is_refused(source):
    words = (f'{source!r} is neither a folder nor a hub model .gpt2, '
             f'.*--help lists what else --init_from takes')
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(source)


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    reference_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['transformer.h.1.ln_2.bias']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(UserError, match='ln_2.bias'):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('source', ['gpt2-xl', 'distilgpt2', 'HuggingFaceTB/SmolLM2-135M'])
def test_an_unreachable_hub_is_one_plain_failure(monkeypatch, source):
    def unreachable(*args, **kwargs):
        raise OSError('no route to the hub')
    monkeypatch.setattr(transformers.PretrainedConfig, 'get_config_dict', unreachable)
    with pytest.raises(RunError, match=f'{source} could not be downloaded.*no route'):
        GPT.from_pretrained(source)


def test_a_name_that_the_hub_does_not_know_is_a_mistake(monkeypatch):
    httpx = pytest.importorskip('httpx')
    from huggingface_hub.errors import RepositoryNotFoundError

    def unknown(*args, **kwargs):
        response = httpx.Response(404, request=httpx.Request('GET', 'https://hub'))
        cause = RepositoryNotFoundError('404', response=response)
        raise OSError('no such repository') from cause
    monkeypatch.setattr(transformers.PretrainedConfig, 'get_config_dict', unknown)
    words = 'nobody/nothing is neither a folder here nor a model that the hub shows'
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained('nobody/nothing')


# The modern shapes

def reference_model(kind, **changes):
    torch.manual_seed(0)
    shape = dict(
        vocab_size=211,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=48,
        attention_dropout=0.0,
        pad_token_id=None,
    )
    config_class, model_class = (getattr(transformers, name) for name in hf_weights.CLASSES[kind])
    if kind == 'qwen3':
        shape['head_dim'] = 16

    reference = model_class(config_class(**{**shape, **changes})).eval()
    for p in reference.parameters():
        torch.nn.init.normal_(p, mean=float(p.dim() == 1), std=0.15)
    return reference


SLOW_ROPE = dict(rope_type='default', rope_theta=5e5)
NANOCHAT_CHANGES = dict(
    num_key_value_heads=None, final_logit_softcapping=None, tie_word_embeddings=True)
KINDS = [
    ('nanochat', {}),
    ('nanochat', NANOCHAT_CHANGES),
    ('llama', {}),
    ('llama', dict(tie_word_embeddings=True, rope_parameters=SLOW_ROPE)),
    ('qwen3', {}),
    ('qwen3', dict(rms_norm_eps=1e-3)),
]


@pytest.mark.parametrize('kind, changes', KINDS)
def test_weights_of_the_modern_shapes_give_the_same_there_and_back(tmp_path, kind, changes):
    """The logits, and again those of the export, whose weights are the same to the bit."""
    reference = reference_model(kind, **changes)
    reference.save_pretrained(tmp_path / 'saved')

    model = GPT.from_pretrained(str(tmp_path / 'saved')).eval()
    idx = torch.randint(211, (3, 48))
    expected = reference(idx).logits
    torch.testing.assert_close(model(idx, idx)[0], expected, rtol=1e-4, atol=1e-4)

    export_to(tmp_path / 'again', model)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'again').eval()
    assert type(again) is type(reference)
    assert_same_weights(reference.state_dict(), again.state_dict())
    torch.testing.assert_close(again(idx).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('n_kv_head', [0, 2])
@pytest.mark.parametrize('name, changes', [
    ('model_nanochat', {}),
    ('model_llama', {}),
    ('model_llama', dict(qk_norm=True)),
    ('model_llama', dict(tied=False, n_inner=80)),
])
def test_a_config_exports_without_code_of_its_own(tmp_path, name, changes, n_kv_head):
    """Trained a little, so that nothing is zero. Greedy text is the same, cache included."""
    config_file = runpy.run_path(str(ROOT / 'config' / f'{name}.py'))
    options = {key: value for key, value in config_file.items() if key[0] != '_'}
    shape = dict(block_size=48, vocab_size=211, n_layer=3, n_head=4, n_embd=64)
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**shape, 'n_kv_head': n_kv_head, **options, **changes}))
    idx = torch.randint(211, (3, 48))
    optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95))
    for _ in range(5):
        model(idx, idx.roll(-1, 1))[1].backward()
        optimizer.step()
    model.eval()

    export_to(tmp_path, model)
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(reference(idx).logits, model(idx, idx)[0], rtol=1e-4, atol=1e-4)

    prompt = idx[:1, :5]
    found = reference.generate(prompt, max_new_tokens=30, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
    assert torch.equal(found, model.generate(prompt, 30, temperature=0))

    again = GPT.from_pretrained(str(tmp_path))
    assert_same_weights(model.state_dict(), again.state_dict())
    assert again.config.mlp_width == model.config.mlp_width


def test_the_saved_config_has_what_other_readers_want(tmp_path):
    model = GPT(GPTConfig(48, 211, 2, 4, 64))
    export_to(tmp_path, model)
    saved = json.loads((tmp_path / 'config.json').read_text(encoding='utf-8'))
    expected = dict(
        n_ctx=48,
        n_positions=48,
        n_inner=256,
        dtype='float32',
        architectures=['GPT2LMHeadModel'],
        model_type='gpt2',
        activation_function='gelu',
        tie_word_embeddings=True,
    )
    assert saved.items() >= expected.items()


@pytest.mark.parametrize('kind, changes, words', [
    ('llama', dict(attention_bias=True), 'attention_bias=True is a variant of llama'),
    ('llama', dict(mlp_bias=True), 'mlp_bias=True'),
    ('llama', dict(hidden_act='gelu'), "hidden_act='gelu'"),
    ('llama', dict(head_dim=32), 'head_dim=32'),
    ('nanochat', dict(attention_bias=True), 'attention_bias=True is a variant of nanochat'),
    ('llama', dict(rope_parameters=dict(rope_type='linear', rope_theta=1e4, factor=2.0)),
     "rope_parameters={.*'linear'} is a variant"),
    ('qwen3', dict(use_sliding_window=True, sliding_window=16, max_window_layers=1),
     'sliding_window=16'),
    ('qwen3', dict(attention_bias=True), 'attention_bias=True is a variant of qwen3'),
])
def test_a_variant_of_the_modern_shapes_is_refused_by_name(tmp_path, kind, changes, words):
    reference_model(kind, **changes).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path))


@pytest.mark.parametrize('options, words', [
    (dict(position='alibi'), "position='alibi' is not an option of transformers' GPT-2"),
    (dict(softcap=15.0), 'softcap=15.0'),
    (dict(n_kv_head=2), 'n_kv_head=2 is not an option'),
    (dict(activation='swiglu', bias=False), "activation='swiglu'"),
    (dict(position='rotary', norm='rmsnorm', activation='swiglu', bias=False),
     "norm='rmsnorm' is not an option of transformers' Llama"),
    (dict(position='rotary', norm='rmsnorm', activation='relu2', qk_norm=True, bias=False),
     "embedding_norm=False is not an option of transformers' NanoChat"),
])
def test_what_no_kind_has_is_not_exported(options, words):
    model = GPT(GPTConfig(block_size=16, vocab_size=50, n_layer=1, n_head=4, n_embd=32, **options))
    with pytest.raises(UserError, match=words):
        hf_weights.to_transformers(model.config, model.state_dict())
