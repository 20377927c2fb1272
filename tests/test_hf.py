"""Against transformers, which wrote GPT-2 from the paper by itself."""

import pytest
import torch
import torch.nn.functional as F

import hf
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')


def theirs(**changes):
    torch.manual_seed(0)
    shape = dict(n_layer=3, n_head=4, n_embd=64, n_positions=48, vocab_size=211, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**shape, **changes})).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)               # biases and norms that are not 0 and 1
    return model


def assert_equal_to(ours, model):
    """Logits, loss and every gradient, to 1e-5 of their size."""
    idx = torch.randint(211, (3, 48))
    logits, loss = ours(idx, idx.roll(-1, 1))
    expected = model(idx).logits
    expected_loss = F.cross_entropy(expected.flatten(0, 1), idx.roll(-1, 1).flatten())
    assert (logits - expected).norm() <= 1e-5 * expected.norm()
    assert abs(loss - expected_loss) <= 1e-5 * expected_loss
    loss.backward()
    expected_loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    for name, p in ours.named_parameters():
        expected = grads[name].t() if name.endswith(hf.TRANSPOSED) else grads[name]
        assert (p.grad - expected).norm() <= 1e-5 * expected.norm(), name


@pytest.mark.parametrize('activation', ['gelu_new', 'gelu'])
def test_imported_weights_give_the_same_logits_loss_and_gradients(tmp_path, activation):
    model = theirs(activation_function=activation)
    model.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(str(tmp_path), {'dropout': 0.0})
    assert ours.config.activation == {'gelu_new': 'gelu_tanh', 'gelu': 'gelu'}[activation]
    assert_equal_to(ours, model)


@pytest.mark.parametrize('bias', [True, False])
def test_exported_weights_give_the_same_logits_loss_and_gradients(tmp_path, bias):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(48, 211, 3, 4, 64, bias=bias))
    hf.to_transformers(ours).save_pretrained(tmp_path)
    assert_equal_to(ours, transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval())


def test_there_and_back_again_is_the_same_to_the_bit(tmp_path):
    torch.manual_seed(0)
    ours = GPT(GPTConfig(48, 211, 2, 4, 64, activation='gelu_tanh'))
    hf.to_transformers(ours).save_pretrained(tmp_path)
    again = GPT.from_pretrained(str(tmp_path))
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), again.state_dict().values(), strict=True))


def test_the_command_exports_a_run(trained):
    trained.run('hf.py', 'out-toy', 'exported')
    model = transformers.GPT2LMHeadModel.from_pretrained(trained.folder / 'exported')
    saved = torch.load(trained.folder / 'out-toy' / 'ckpt.pt', weights_only=True)['model']
    assert torch.equal(model.transformer.wte.weight, saved['transformer.wte.weight'])


@pytest.mark.parametrize('changes, words', [
    (dict(n_inner=100), 'n_inner'), (dict(scale_attn_by_inverse_layer_idx=True), 'scale_attn'),
    (dict(activation_function='relu'), 'activation_function')])
def test_a_variant_that_is_not_gpt2_is_refused(tmp_path, changes, words):
    theirs(**changes).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=words):
        GPT.from_pretrained(str(tmp_path))


def test_what_is_no_gpt2_is_refused(tmp_path):
    for content in (None, '{', '{"model_type": "llama"}', '{}'):
        if content:
            (tmp_path / 'config.json').write_text(content)
        with pytest.raises(ValueError, match=str(tmp_path)):
            GPT.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match='nor a folder'):
        GPT.from_pretrained('gpt5')
    with pytest.raises(ValueError, match='n_layer'):
        GPT.from_pretrained('gpt2', {'n_layer': 3})


def test_a_missing_weight_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file
    theirs().save_pretrained(tmp_path)
    weights = load_file(tmp_path / 'model.safetensors')
    del weights['transformer.h.1.ln_2.bias']
    save_file(weights, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match='ln_2.bias'):
        GPT.from_pretrained(str(tmp_path))


def test_an_unreachable_hub_is_one_plain_failure(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError('no route to the hub')
    monkeypatch.setattr(transformers.PretrainedConfig, 'get_config_dict', unreachable)
    with pytest.raises(RuntimeError, match='gpt2-xl could not be downloaded.*no route'):
        GPT.from_pretrained('gpt2-xl')
