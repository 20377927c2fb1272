"""The scripts of studies/: what they compare, at toy size."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import CAN_FORK, ROOT

from engine.dataloader import batches as dataloader
from engine.training import optim
from model import GPT, GPTConfig


def load(path):
    """studies/NAME.py as a module, which is not imported under its name: it may be the copy of a workspace."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module, folders = importlib.util.module_from_spec(spec), list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = folders                                       # the script puts its own project in front
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
    ('GPT-2', {}), ('zero', dict(zero_init=True)), ('GPT-2, by width', dict(init_std=0.02 * math.sqrt(24))),
    ('zero, by width', dict(zero_init=True, init_std=0.02 * math.sqrt(24)))])
def test_a_variant_that_train_py_has_starts_with_the_weights_that_train_py_draws(initialisation, variant, options):
    ours, other = initialisation.build(variant, 3, 5, 32, 65), built_like_train(5, **options)
    for (name, a), b in zip(ours.named_parameters(), other.parameters()):
        assert torch.allclose(a, b), name


@pytest.mark.parametrize('variant, others, residual', [
    ('not scaled', 0.02, [0.02] * 3), ('by layer', 0.02, [0.02 / math.sqrt(2 * l) for l in (1, 2, 3)]),
    ('GPT-2, by width', 0.02 * math.sqrt(3), [0.02 * math.sqrt(3) / math.sqrt(6)] * 3), ('zero, by width', 0.02 * math.sqrt(3), [0.0] * 3)])
def test_the_weights_have_the_std_that_the_table_says(initialisation, variant, others, residual):
    model = initialisation.build(variant, 3, 0, 256, 65)
    for block, std in zip(model.transformer.h, residual):
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            assert layer.weight.std().item() == pytest.approx(std, rel=0.01)
        assert block.mlp.c_fc.weight.std().item() == pytest.approx(others, rel=0.01)
    assert model.transformer.wte.weight.std().item() == pytest.approx(others, rel=0.03)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_stream_is_measured_before_and_after_each_block(initialisation):
    model, idx = initialisation.build('not scaled', 3, 0, 32, 65), torch.arange(20)[None]
    x = model.transformer.wte(idx) + model.transformer.wpe(torch.arange(20))
    expected = [x.square().mean().item()]
    for block in model.transformer.h:
        x = x + block.attn(block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
        expected.append(x.square().mean().item())
    assert initialisation.stream_variances(model, idx) == pytest.approx(expected)


def test_a_finished_run_of_the_study_is_not_trained_again(initialisation, toy, tmp_path, monkeypatch):
    monkeypatch.setattr(initialisation, 'RESULTS', tmp_path / 'out' / 'results.jsonl')
    for name, value in dict(seeds=2, iters=2, n_embd=8, block_size=16, batch_size=2).items():
        monkeypatch.setattr(initialisation, name, value)
    data = initialisation.TokenDataset('toy')
    data.set_block_size(16)
    losses = initialisation.train_all(data, list(initialisation.VARIANTS), [1])
    assert {len(values) for values in losses.values()} == {2} and len(losses) == len(initialisation.VARIANTS)
    lines = initialisation.RESULTS.read_text().splitlines()
    initialisation.RESULTS.write_text('\n'.join(lines[1:]) + '\n')      # the first one is lost, and trained again
    trained = []
    real = initialisation.train
    monkeypatch.setattr(initialisation, 'train', lambda *a: trained.append(a) or real(*a))
    assert initialisation.train_all(data, list(initialisation.VARIANTS), [1]) == losses and len(trained) == 1
    monkeypatch.setattr(initialisation, 'iters', 3)                     # other settings are other runs
    initialisation.train_all(data, list(initialisation.VARIANTS), [1])
    assert len(trained) == 1 + len(lines)


# studies/finetuning.py

def test_layerwise_decay_scales_each_layers_rate(finetuning):
    model = built_like_train(0)
    optimizer = finetuning.adamw_by_layer(0.5, model, 1e-2, 0.1, (0.9, 0.95))
    optim.set_lr(optimizer, 4e-2)                               # as train.py does before a step
    rates = {id(p): (group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']}
    assert len(rates) == len(list(model.parameters()))
    h = model.transformer.h
    for p, rate in ((model.transformer.wte.weight, 5e-3), (model.transformer.wpe.weight, 5e-3), (h[0].mlp.c_fc.weight, 1e-2),
                    (h[1].attn.c_proj.weight, 2e-2), (h[2].attn.c_attn.weight, 4e-2)):
        assert rates[id(p)] == pytest.approx((rate, 0.1))
    assert rates[id(h[0].ln_1.weight)] == pytest.approx((1e-2, 0)) and rates[id(model.transformer.ln_f.weight)] == pytest.approx((4e-2, 0))


def test_without_decay_the_layerwise_optimizer_is_train_pys(finetuning):
    models = []
    for build in (finetuning.adamw_by_layer, lambda decay, *a: optim.adamw(*a)):
        model = built_like_train(0)
        optimizer, scaler = build(1.0, model, 1e-2, 0.1, (0.9, 0.95)), torch.amp.GradScaler('cpu', enabled=False)
        for step in range(3):
            idx = torch.arange(21)[None] * (step + 1) % 65
            loss = model(idx[:, :-1], idx[:, 1:])[1]
            loss.backward()
            optim.step(optimizer, scaler, loss, 1.0)
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
    whole, patient = val_losses('out-studied'), val_losses('out-studied-patient')
    assert len(patient) < len(whole)
    assert finetuning.stopped(whole, patience) == (max(patient), min(patient.values()))


@pytest.mark.skipif(not CAN_FORK, reason='a fork of this process has what the test changed')
def test_the_study_finetunes_the_weights_and_repeats_no_run(workspace, monkeypatch, capsys):
    transformers = pytest.importorskip('transformers')
    (workspace.folder / 'studies').mkdir(exist_ok=True)
    study = load(Path(shutil.copy(ROOT / 'studies/finetuning.py', workspace.folder / 'studies')))
    assert study.ROOT == workspace.folder.resolve()
    monkeypatch.chdir(study.ROOT)
    monkeypatch.setattr(dataloader, 'DATA', study.ROOT / 'data')        # of the fork too
    (study.ROOT / 'data/stdlib').mkdir(exist_ok=True)
    (study.ROOT / 'data/stdlib/meta.json').write_text('{}')     # as if it were prepared
    tokens = np.random.default_rng(0).integers(0, 50257, 1600).astype('<u2')
    for split in ('train', 'val'):
        tokens.tofile(study.ROOT / f'data/shakespeare/{split}.bin')
    shape = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=8, n_positions=16)
    transformers.GPT2LMHeadModel(shape).save_pretrained(study.OUT / 'weights')
    small = '--max_iters=2 --eval_interval=1 --eval_iters=1 --batch_size=2 --gradient_accumulation_steps=1'.split()
    monkeypatch.setattr(study, 'BASE', [*study.BASE, *small])
    monkeypatch.setattr(study, 'SHAPE', '--n_layer=1 --n_head=2 --n_embd=8 --block_size=16'.split())
    monkeypatch.setattr(study, 'names', f'constant, {study.RATE}; layer-wise decay 0.7; from scratch')
    monkeypatch.setattr(study, 'seeds', 2)
    study.RUNS['from scratch'] = '--init_from=scratch ' + ' '.join(study.SHAPE)
    study.main()
    first = capsys.readouterr().out
    assert (np.fromfile(study.ROOT / 'data/shakespeare_part/train.bin', '<u2') == tokens[:50]).all()
    folders = sorted(path.parent for path in study.OUT.glob('*/finished'))
    assert len(folders) == 6 and not list(study.OUT.glob('*/*.pt'))
    settings = {folder.name: json.loads((folder / 'run.json').read_text())['settings'] for folder in folders}
    assert {s['seed'] for s in settings.values()} == {study.seed, study.seed + 1}
    assert settings[f'from-scratch-{study.seed}']['n_layer'] == 1 and settings[f'constant-{study.RATE}-{study.seed}']['n_layer'] == 2
    monkeypatch.setattr(study, 'train', None)                   # a run would fail
    study.main()
    assert capsys.readouterr().out == first
