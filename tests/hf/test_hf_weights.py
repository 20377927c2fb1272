"""Compared with transformers, whose GPT-2 is an implementation of its own."""

import json
import re
import runpy

import pytest
import torch
import torch.nn.functional as F
from harness import ROOT
from hub_stand_in import Fault, Hub

from engine.checkpoint.contents import NANOGPT_ARGS
from engine.errors import UserError
from engine.hf import weights as hf_weights
from engine.hf.tokenizer_json import download_pretrained
from engine.hf.weights import find_weights
from model import GPT, GPTConfig

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


@pytest.mark.parametrize('options, name', [
    (dict(), 'attn_pdrop'),
    (dict(position='rotary', norm='rmsnorm_gain', activation='swiglu', bias=False),
     'attention_dropout'),
])
@pytest.mark.parametrize('attention_dropout, rate', [(True, 0.25), (False, 0.0)])
def test_an_export_has_the_dropout_of_attention(options, name, attention_dropout, rate):
    config = GPTConfig(16, 50, 1, 2, 32, 0.25, attention_dropout=attention_dropout, **options)
    exported = hf_weights.to_transformers(config, GPT(config).state_dict())
    assert getattr(exported.config, name) == rate


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


def test_a_missing_file_of_a_run_is_not_asked_of_the_hub():
    with pytest.raises(UserError, match='there is no file out-toy/ckpt_001000.pt; name'):
        GPT.from_pretrained('out-toy/ckpt_001000.pt')


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    reference_gpt2().save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['transformer.h.1.ln_2.bias']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(UserError, match='ln_2.bias'):
        GPT.from_pretrained(str(tmp_path))


def test_masks_that_were_saved_among_the_weights_are_left_out(tmp_path):
    """transformers did so until 2023; DialoGPT has them."""
    reference = reference_gpt2()
    weights = reference.state_dict()
    for i in range(3):
        weights[f'transformer.h.{i}.attn.bias'] = torch.ones(48, 48).tril().view(1, 1, 48, 48)
        weights[f'transformer.h.{i}.attn.masked_bias'] = torch.tensor(-1e4)
    reference.config.save_pretrained(tmp_path)
    torch.save(weights, tmp_path / 'pytorch_model.bin')
    assert_same_function(GPT.from_pretrained(str(tmp_path)), reference)


@pytest.mark.parametrize('files, words', [
    ({'adapter_config.json': b'{}', 'adapter_model.safetensors': b''}, 'is an adapter of peft'),
    ({'model.gguf': b'GGUF'}, 'holds a .gguf'),
    ({'model.safetensors': b''}, 'has no config.json'),
    ({'config.json': b'{}', 'model.safetensors': b'version https://git-lfs.github.com/spec/v1'},
     'model.safetensors is a pointer of Git LFS; run `git lfs pull`'),
    ({'config.json': b'{}', 'model.safetensors': bytes(100)}, 'model.safetensors is damaged'),
    ({'config.json': b'{}', 'tf_model.h5': b'HDF'}, 'no weights beside it that PyTorch reads'),
])
def test_a_folder_of_something_else_is_refused_by_what_it_is(tmp_path, files, words):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=words):
        GPT.from_pretrained(str(tmp_path))


# The hub, by the real client

@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A stand-in of the hub with a model in one file, and its older revision with pickled weights.

    Attributes: reference is the model of transformers.
    """
    reference = reference_gpt2()
    reference.save_pretrained(tmp_path / 'new')
    reference.config.save_pretrained(tmp_path / 'old')
    torch.save(reference.state_dict(), tmp_path / 'old' / 'pytorch_model.bin')
    new, old = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
                for name in ('new', 'old'))

    hub = Hub({'owner/model': new, 'gpt2': new}, {'owner/model': {'v1': old}})
    hub.reference = reference
    hub.reach(monkeypatch, tmp_path)
    yield hub
    hub.close()


@pytest.mark.parametrize('source', ['owner/model', 'owner/model@v1', 'gpt2'])
def test_weights_of_the_hub_give_the_same(hub, source):
    assert_same_function(GPT.from_pretrained(source), hub.reference)
    assert ('GET /api/models/owner/model/revision/v1' in hub.asked) == source.endswith('@v1')


def test_what_the_hub_lacks_or_hides_is_told(hub):
    with pytest.raises(UserError, match='shows you no model nobody/nothing; check the spelling'):
        GPT.from_pretrained('nobody/nothing')
    hub.faults += [Fault('resolve', 403, {'X-Error-Code': 'GatedRepo'})] * 9
    with pytest.raises(UserError, match='owner/model is gated: accept its terms at'):
        GPT.from_pretrained('owner/model')


def test_a_damaged_file_of_the_cache_is_named_and_its_removal_helps(hub, tmp_path):
    blob = next(path.resolve() for path in find_weights('owner/model').glob('*.safetensors'))
    blob.write_bytes(bytes(1000))
    with pytest.raises(UserError, match=f'remove {re.escape(str(blob))} and run again'):
        GPT.from_pretrained('owner/model')
    blob.unlink()
    assert_same_function(GPT.from_pretrained('owner/model'), hub.reference)


def test_only_rank_0_tells_of_a_failed_download(hub, monkeypatch):
    with pytest.raises(UserError, match='nobody/nothing'):
        download_pretrained('nobody/nothing')
    monkeypatch.setenv('RANK', '1')
    monkeypatch.setenv('WORLD_SIZE', '2')
    download_pretrained('nobody/nothing')


def test_a_download_before_the_ranks_meet_leaves_nothing_to_download(hub):
    for source in ('scratch', 'resume', 'auto'):
        download_pretrained(source)
    assert not hub.asked

    download_pretrained('owner/model@v1')
    hub.asked.clear()
    GPT.from_pretrained('owner/model@v1')
    assert not any('resolve' in request for request in hub.asked)


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
