"""The scripts of studies/: what they compare, at toy size."""

import importlib.util
import json
import math
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CAN_FORK, ROOT

from engine.attention import CausalAttention
from engine.dataloader import batches as dataloader
from engine.errors import RunError
from engine.positions import PositionEncoding
from engine.training import optim
from model import GPT, GPTConfig


def load(path):
    """studies/NAME.py as a module.

    It is not imported under its name, as it may be the copy of a workspace.
    """
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    folders = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = folders                       # the script puts its own project in front
    return module


@pytest.fixture(scope='module')
def initialisation():
    return load(ROOT / 'studies/initialisation.py')


@pytest.fixture(scope='module')
def finetuning():
    return load(ROOT / 'studies/finetuning.py')


# studies/initialisation.py

def built_like_train(seed, **options):
    torch.manual_seed(seed)
    return GPT(GPTConfig(64, 65, 3, 2, 32, bias=False, **options))


@pytest.mark.parametrize('variant, options', [
    ('GPT-2', {}),
    ('zero', dict(zero_init=True)),
    ('GPT-2, by width', dict(init_std=0.02 * math.sqrt(24))),
    ('zero, by width', dict(zero_init=True, init_std=0.02 * math.sqrt(24))),
])
def test_a_variant_that_train_py_has_starts_with_the_weights_that_train_py_draws(
        initialisation, variant, options):
    ours = initialisation.build(variant, 3, 5, 32, 65)
    other = built_like_train(5, **options)
    for (name, a), b in zip(ours.named_parameters(), other.parameters()):
        assert torch.allclose(a, b), name


@pytest.mark.parametrize('variant, others, residual', [
    ('not scaled', 0.02, [0.02] * 3),
    ('by layer', 0.02, [0.02 / math.sqrt(2 * layer) for layer in (1, 2, 3)]),
    ('GPT-2, by width', 0.02 * math.sqrt(3), [0.02 * math.sqrt(3) / math.sqrt(6)] * 3),
    ('zero, by width', 0.02 * math.sqrt(3), [0.0] * 3),
])
def test_the_weights_have_the_std_that_the_table_says(initialisation, variant, others, residual):
    """others: the std of most weights. residual: that of the residual projections, by layer."""
    model = initialisation.build(variant, 3, 0, 256, 65)
    for block, std in zip(model.transformer.h, residual):
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.01)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(others, rel=0.01)
    assert model.transformer.wte.weight.std().item() == pytest.approx(others, rel=0.03)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_stream_is_measured_before_and_after_each_block(initialisation):
    model = initialisation.build('not scaled', 3, 0, 32, 65)
    idx = torch.arange(20)[None]
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(20))
    expected = [x.square().mean().item()]
    for block in model.transformer.h:
        x = x + block.attn(block.ln_1(x), PositionEncoding(), CausalAttention())
        x = x + block.mlp(block.ln_2(x))
        expected.append(x.square().mean().item())
    assert initialisation.stream_variances(model, idx) == pytest.approx(expected)


def test_a_finished_run_of_the_study_is_not_trained_again(
        initialisation, toy, tmp_path, monkeypatch):
    # every variant with two seeds
    monkeypatch.setattr(initialisation, 'RESULTS', tmp_path / 'out' / 'results.jsonl')
    for name, value in dict(seeds=2, iters=2, n_embd=8, block_size=16, batch_size=2).items():
        monkeypatch.setattr(initialisation, name, value)
    data = initialisation.TokenDataset('toy')
    data.set_block_size(16)
    names = list(initialisation.VARIANTS)
    losses = initialisation.train_all(data, names, [1])
    assert {len(values) for values in losses.values()} == {2}
    assert len(losses) == len(names)

    # the first result is lost, and that run is trained again
    lines = initialisation.RESULTS.read_text().splitlines()
    initialisation.RESULTS.write_text('\n'.join(lines[1:]) + '\n')
    trained = []
    train = initialisation.train

    def counted_train(*arguments):
        trained.append(arguments)
        return train(*arguments)
    monkeypatch.setattr(initialisation, 'train', counted_train)
    assert initialisation.train_all(data, names, [1]) == losses
    assert len(trained) == 1

    # other settings are other runs
    monkeypatch.setattr(initialisation, 'iters', 3)
    initialisation.train_all(data, names, [1])
    assert len(trained) == 1 + len(lines)


# studies/finetuning.py

def test_layerwise_decay_scales_each_layers_rate(finetuning):
    model = built_like_train(0)
    optimizer = finetuning.adamw_by_layer(0.5, model, 1e-2, 0.1, (0.9, 0.95))
    optim.set_lr(optimizer, 4e-2)                               # as train.py does before a step
    rates = {}
    for group in optimizer.param_groups:
        for p in group['params']:
            rates[id(p)] = (group['lr'], group['weight_decay'])
    assert len(rates) == len(list(model.parameters()))

    transformer = model.transformer
    first, second, third = transformer.h
    for p, expected in (
            (transformer.wte.weight, (5e-3, 0.1)),
            (transformer.wpe.weight, (5e-3, 0.1)),
            (first.mlp.c_fc.weight, (1e-2, 0.1)),
            (second.attn.c_proj.weight, (2e-2, 0.1)),
            (third.attn.c_attn.weight, (4e-2, 0.1)),
            (first.ln_1.weight, (1e-2, 0)),
            (transformer.ln_f.weight, (4e-2, 0))):
        assert rates[id(p)] == pytest.approx(expected)


def test_without_decay_the_layerwise_optimizer_is_train_pys(finetuning):
    models = []
    for build in (finetuning.adamw_by_layer, lambda decay, *a: optim.adamw(*a)):
        model = built_like_train(0)
        optimizer = build(1.0, model, 1e-2, 0.1, (0.9, 0.95))
        for step in range(3):
            idx = torch.arange(21)[None] * (step + 1) % 65
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        models.append(model)
    for a, b in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize('patience', [1, 2])
def test_patience_is_judged_as_train_py_does_it(finetuning, trained, patience):
    shaky = ('--learning_rate=1e-1', '--min_lr=1e-1', '--lr_decay_iters=100', '--max_iters=100')

    def val_losses(out_dir):
        return {r['iter']: r['val_loss'] for r in trained.records(out_dir) if 'val_loss' in r}

    trained.train('out-studied', *shaky, '--overwrite=True')
    trained.train('out-studied-patient', *shaky, f'--patience={patience}', '--overwrite=True')
    whole = val_losses('out-studied')
    patient = val_losses('out-studied-patient')
    assert len(patient) < len(whole)
    assert finetuning.stopped(whole, patience) == (max(patient), min(patient.values()))


@pytest.mark.slow
@pytest.mark.skipif(not CAN_FORK, reason='a fork of this process has what the test changed')
def test_the_study_finetunes_the_weights_and_repeats_no_run(workspace, monkeypatch, capsys):
    transformers = pytest.importorskip('transformers')

    # the study, of a copy of the project
    (workspace.folder / 'studies').mkdir(exist_ok=True)
    study = load(Path(shutil.copy(ROOT / 'studies/finetuning.py', workspace.folder / 'studies')))
    assert study.ROOT == workspace.folder.resolve()
    monkeypatch.chdir(study.ROOT)
    monkeypatch.setattr(dataloader, 'DATA', study.ROOT / 'data')        # in the fork too

    # what it starts from: a dataset as if it were prepared, tokens, and small weights
    (study.ROOT / 'data/stdlib').mkdir(exist_ok=True)
    (study.ROOT / 'data/stdlib/meta.json').write_text('{}')
    tokens = np.random.default_rng(0).integers(0, 50257, 1600).astype('<u2')
    for split in ('train', 'val'):
        tokens.tofile(study.ROOT / f'data/shakespeare/{split}.bin')
    shape = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16)
    transformers.GPT2LMHeadModel(shape).save_pretrained(study.OUT / 'weights')

    # three small runs with two seeds each
    small = ['--max_iters=2', '--eval_interval=1', '--eval_iters=1', '--batch_size=2']
    chosen = f'constant, {study.RATE}; layer-wise decay 0.7; from scratch'
    shape = '--n_layer=1 --n_head=2 --n_embd=8 --block_size=16'
    monkeypatch.setattr(study, 'BASE', [*study.BASE, *small])
    monkeypatch.setattr(study, 'names', chosen)
    monkeypatch.setattr(study, 'seeds', 2)
    study.RUNS['from scratch'] = f'--init_from=scratch {shape}'
    study.main()
    first = capsys.readouterr().out
    part = np.fromfile(study.ROOT / 'data/shakespeare_part/train.bin', '<u2')
    assert (part == tokens[:50]).all()

    # what they leave
    folders = sorted(path.parent for path in study.OUT.glob('*/finished'))
    assert len(folders) == 6
    assert not list(study.OUT.glob('*/*.pt'))
    settings = {}
    for folder in folders:
        settings[folder.name] = json.loads((folder / 'run.json').read_text())['settings']
    assert {s['seed'] for s in settings.values()} == {study.seed, study.seed + 1}
    assert settings[f'from-scratch-{study.seed}']['n_layer'] == 1
    assert settings[f'constant-{study.RATE}-{study.seed}']['n_layer'] == 2

    # the same command again trains nothing
    monkeypatch.setattr(study, 'train', None)                   # a run would fail
    study.main()
    assert capsys.readouterr().out == first


# studies/recipe.py

STAND_IN = '''
import sys, time
from pathlib import Path
flags = dict(argument[2:].split('=', 1) for argument in sys.argv[2:])
Path(flags['out_dir']).mkdir()
with open('runs.txt', 'a') as file:
    file.write(flags['seed'] + ' ')
time.sleep(float(flags.get('sleep', 0)))
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """The study, with a train.py that notes the seed and sleeps."""
    pytest.importorskip('resource', reason='the study measures CPU seconds, on Linux and macOS')
    module = load(ROOT / 'studies/recipe.py')
    monkeypatch.setattr(module, 'ROOT', tmp_path)
    (tmp_path / 'train.py').write_text(STAND_IN)
    return module


def test_a_whole_run_is_repeated_for_other_settings_and_not_for_other_comments(recipe, tmp_path):
    runs = []
    for config in ('a = 1  # one', '# another comment\na = 1', 'a = 2'):
        (tmp_path / 'config.py').write_text(config)
        recipe.train_once(tmp_path / 'run', ['config.py'], 7)
        runs.append((tmp_path / 'runs.txt').read_text().split())
    assert runs == [['7'], ['7'], ['7', '7']]

    recipe.train_once(tmp_path / 'run', ['config.py', '--sleep=0.01'], 8)
    assert (tmp_path / 'runs.txt').read_text().split() == ['7', '7', '8']


def test_a_failure_leaves_no_stopped_run_behind(recipe, tmp_path):
    with pytest.raises(RunError), recipe.training(tmp_path / 'run', ['', '--sleep=60'], 7) as run:
        run.send_signal(signal.SIGSTOP)
        raise RunError('the other run failed')
    assert run.returncode == -signal.SIGKILL
