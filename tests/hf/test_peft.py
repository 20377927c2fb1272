"""Adapters in the format of peft."""

import json

import pytest
import safetensors.torch
import torch
from harness import script_settings

import export
from engine.checkpoint import gathered
from engine.checkpoint.contents import Checkpoint
from engine.distributed import Environment
from engine.errors import UserError
from engine.hf.weights import to_transformers
from engine.training import lora
from model import GPT, GPTConfig

transformers = pytest.importorskip('transformers')
SHAPE = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
LLAMA = dict(position='rotary', norm='rmsnorm_gain', activation='swiglu', bias=False, n_kv_head=1)
NANOCHAT = dict(position='rotary', norm='rmsnorm', activation='relu2', bias=False, qk_norm=True,
                embedding_norm=True, tied=False)


@pytest.fixture(params=[dict(), LLAMA, NANOCHAT], ids=['gpt2', 'llama', 'nanochat'])
def adapted(request, tmp_path):
    """(the folder of a run with adapters, the model of transformers that they adapt)."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SHAPE, **request.param))
    base = to_transformers(model.config, model.state_dict())
    base.save_pretrained(tmp_path / 'base')

    settings = dict(lora_rank=3, lora_alpha=6.0, lora_targets='c_attn,mlp.c_fc,mlp.c_proj',
                    lora_dropout=0.0, seed=1, init_from=str(tmp_path / 'base'), out_dir='run')
    env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, '')
    origin = lora.replace_linears(model, settings, None, env)
    for name, parameter in model.named_parameters():
        if name.endswith('lora_b'):
            torch.nn.init.normal_(parameter, std=0.2)

    saved = Checkpoint(**dict(model.to_checkpoint(), model=lora.merged_weights(model)),
                       adapters=lora.adapters(model), base=origin, config=settings)
    (tmp_path / 'run').mkdir()
    gathered.write(tmp_path / 'run' / 'ckpt.pt', saved.to_payload())
    return tmp_path / 'run', base


def export_adapter(run, target):
    with script_settings(export, '--to=peft'):
        export.main([str(run), str(target)])


def test_what_peft_adds_to_the_base_gives_the_merged_model(adapted, tmp_path):
    """By its formula: W + (lora_alpha / r) B A, or its transpose with fan_in_fan_out."""
    run, base = adapted
    export_adapter(run, tmp_path / 'adapter')
    settings = json.loads((tmp_path / 'adapter' / 'adapter_config.json').read_text())
    tensors = safetensors.torch.load_file(tmp_path / 'adapter' / 'adapter_model.safetensors')

    weights = base.state_dict()
    layers = {name.removesuffix('.lora_A.weight') for name in tensors if 'lora_A' in name}
    for layer in layers:
        delta = tensors[f'{layer}.lora_B.weight'] @ tensors[f'{layer}.lora_A.weight']
        if settings['fan_in_fan_out']:
            delta = delta.T
        name = layer.removeprefix('base_model.model.')
        weights[f'{name}.weight'] += settings['lora_alpha'] / settings['r'] * delta
        assert name.endswith(tuple(f'.{target}' for target in settings['target_modules']))

    expected = GPT.from_checkpoint(run)
    expected = to_transformers(expected.config, expected.state_dict()).state_dict()
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=0, atol=1e-6, msg=name)


def test_peft_loads_the_adapter_and_computes_the_same(adapted, tmp_path):
    peft = pytest.importorskip('peft')
    run, base = adapted
    export_adapter(run, tmp_path / 'adapter')
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / 'adapter').eval()

    idx = torch.randint(50, (2, 16))
    expected = GPT.from_checkpoint(run).eval()(idx, idx)[0]
    torch.testing.assert_close(loaded(idx).logits, expected, rtol=0, atol=1e-5)


def test_what_has_no_adapter_in_the_format_of_peft_is_refused(adapted, tmp_path):
    run, _ = adapted
    saved = gathered.read_ckpt(run)

    def refused_with(words, **changes):
        payload = {**saved.to_payload(), **changes}
        payload = {name: value for name, value in payload.items() if value is not None}
        gathered.write(run / 'ckpt.pt', payload)            # `saved` is mapped from the one before
        with pytest.raises(UserError, match=words):
            export_adapter(run, tmp_path / 'adapter')
        assert not (tmp_path / 'adapter').exists()

    first = next(name for name in saved.adapters if name.endswith('lora_a'))
    matrix = saved.adapters[first]
    turned = {**saved.adapters, first: matrix.T.contiguous()}
    more = {**saved.adapters, 'transformer.wte.lora_a': matrix}
    rows = {**saved.adapters, 'transformer.wte.lora_rows': matrix}
    refused_with('has no adapters, .*try --to=hf', adapters=None, base=None)
    refused_with('has no adapters', adapters={})
    refused_with('not pairs of matrices', adapters={first: matrix})
    refused_with('not fit its model|of another rank', adapters=turned)
    refused_with('not fit its model', adapters=more)
    refused_with('new tokens, .*--to=hf', adapters=rows)
    refused_with('does not say what lora_alpha', config={})

    # weights with fewer tokens or positions than the run
    path = tmp_path / 'base' / 'config.json'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(dict(config, vocab_size=49)))
    refused_with('vocab_size=50, and .* has 49; .*--to=hf')
    if 'n_positions' in config:
        path.write_text(json.dumps(dict(config, n_positions=8)))
        refused_with('n_positions=16, and .* has 8; .*--to=hf')


def test_a_base_that_has_gone_is_named(adapted, tmp_path):
    run, _ = adapted
    (tmp_path / 'base').rename(tmp_path / 'elsewhere')
    with pytest.raises(UserError, match='run has adapters of .*base, which cannot be .*--to=hf'):
        export_adapter(run, tmp_path / 'adapter')


def test_adapters_of_a_run_say_how_its_weights_are_exported(adapted, tmp_path, capsys):
    run, _ = adapted
    saved = gathered.read_ckpt(run)
    (tmp_path / 'first').mkdir()
    of_a_run = dict(saved.to_payload(), base=dict(saved.base, source=str(tmp_path / 'first')))
    plain = {name: value for name, value in of_a_run.items() if name not in ('adapters', 'base')}
    gathered.write(tmp_path / 'first' / 'ckpt.pt', plain)
    gathered.write(run / 'ckpt.pt', of_a_run)
    export_adapter(run, tmp_path / 'adapter')
    assert f'python export.py {tmp_path / "first"} FOLDER writes it' in capsys.readouterr().err
    assert (tmp_path / 'adapter' / 'adapter_config.json').exists()
