"""Injected faults, a bounded number of each: `python tests/chaos.py` runs as many as are asked for."""

import itertools
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

if sys.platform != 'linux':
    pytest.skip('faults are injected with fork and /proc', allow_module_level=True)

import chaos
import checkpoint


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    lab = chaos.Lab(tmp_path_factory.mktemp('chaos') / 'one', 1)
    yield lab
    lab.close()


@pytest.fixture(scope='module')
def pair(tmp_path_factory):
    lab = chaos.Lab(tmp_path_factory.mktemp('chaos') / 'two', 2)
    yield lab
    lab.close()


@pytest.mark.parametrize('fault, trials', [('kill', 4), ('term', 1), ('int', 1), ('usr1', 1), ('full', 2),
                                           ('flip', 4), ('nan', 2)])
def test_fault_leaves_nothing_lost(lab, fault, trials):
    for i in range(trials):
        chaos.run_trial(lab, lab.launchers[0], fault, f'{fault} {i}')


@pytest.mark.parametrize('fault', ['kill', 'term', 'full', 'nan'])
def test_fault_on_one_of_two_ranks_leaves_nothing_lost(pair, fault):
    chaos.run_trial(pair, pair.launchers[0], fault, fault)


@pytest.mark.parametrize('step', chaos.SAVE_STEPS)
def test_kill_at_each_step_of_a_save(lab, step):
    out = lab.new_out()
    ended = lab.launchers[0].run('train.py', *lab.flags(out), fault=dict(
        kind='signal', number=signal.SIGKILL, save=4, step=step, offset=100_000))
    assert ended.codes == [-signal.SIGKILL]
    lab.finish(lab.launchers[0], out)


def test_lost_rank_is_started_again_by_torchrun(pair):
    out = pair.new_out()
    fault = dict(kind='signal', number=signal.SIGKILL, rank=1, iteration=7, micros=1)
    code, err, _ = chaos.torchrun(pair, out, fault, '--max-restarts=1', timeout=20)
    assert code == 0, err[:3000]
    pair.compare(out)


def test_frozen_rank_ends_the_other(pair):
    out = pair.new_out()
    launcher = pair.launchers[0]
    pids = launcher.start('train.py', *pair.flags(out, rank_timeout=3), ranks=2, fault=dict(
        kind='signal', number=signal.SIGSTOP, rank=1, iteration=7, micros=1))
    while chaos.is_running(pids[0]):
        time.sleep(0.1)
    os.kill(pids[1], signal.SIGKILL)
    ended = launcher.wait()
    assert ended.codes == [1, -signal.SIGKILL] and ended.seconds < 33
    assert ended.err.count('\n') == 1 and 'another rank did not answer within --rank_timeout' in ended.err
    pair.finish(launcher, out)


# The order of a save, and a loss of power in it

def test_every_file_is_synced_before_it_gets_its_name(lab, tmp_path):
    report = tmp_path / 'order.json'
    ended = lab.launchers[0].run('train.py', *lab.flags(lab.new_out(), max_iters=5),
                                 fault=dict(kind='order', save=-1, report=str(report)))
    assert ended.code == 0, ended.err
    model = ['fsync file', 'replace', 'fsync folder', 'done']
    assert json.loads(report.read_text()) == model + model + ['fsync file', 'replace previous', *model[1:]]


def test_power_loss_at_any_point_of_a_save(tmp_path, monkeypatch):
    """Of the folder only what was synced is sure to survive: any part of the renames since may have
    reached the disk, in their order. Each such folder loads as the state before or the new one."""
    def state(i):
        return dict(model={'w': torch.full((4,), float(i))}, model_args={}, iter_num=i, best_val_loss=1.0,
                    optimizer={}, scaler={})
    monkeypatch.setattr(checkpoint, 'check', lambda payload, path, needed: payload)
    for i in (5, 10):
        checkpoint.write(tmp_path / 'state.pt', state(i), keep_as='state.prev.pt')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    steps = []
    replace = os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: (steps.append((Path(a).name, Path(b).name)), replace(a, b)))
    checkpoint.write(tmp_path / 'state.pt', state(15), keep_as='state.prev.pt')
    new = (tmp_path / 'state.pt').read_bytes()
    assert steps == [('state.pt', 'state.prev.pt'), ('state.pt.tmp', 'state.pt')]
    for done, half in itertools.product(range(len(steps) + 1), (0, len(new) // 2, len(new))):
        if done and half < len(new):
            continue                                    # it was synced before the first rename
        disk = dict(before, **{'state.pt.tmp': new[:half]})
        for old, name in steps[:done]:
            disk[name] = disk.pop(old)
        for path in tmp_path.iterdir():
            path.unlink()
        for name, data in disk.items():
            (tmp_path / name).write_bytes(data)
        loaded, _ = checkpoint.load_state(tmp_path)
        assert loaded['iter_num'] == (15 if done == 2 else 10)


# What else must survive

def test_best_checkpoint_is_kept_and_best_loss_survives(lab):
    """A learning rate that ruins the model: ckpt.pt stays the one of the lowest validation loss."""
    out, launcher = lab.new_out(), lab.launchers[0]
    flags = lab.flags(out, always_save_checkpoint=False, init_from='auto')
    assert launcher.run('train.py', *flags).code == 0
    best = checkpoint.load_model(out)
    ruin = [*flags, '--max_iters=30', '--learning_rate=10', '--decay_lr=False', '--grad_clip=0']
    assert launcher.run('train.py', *ruin).code == 0
    after, state = checkpoint.load_model(out), checkpoint.load_state(out)[0]
    losses = [line['val_loss'] for line in chaos.read_losses(out) if 'val_loss' in line]
    assert losses[-1] > losses[-3] and state['iter_num'] == 30
    assert after['iter_num'] == best['iter_num'] == 20
    assert after['best_val_loss'] == state['best_val_loss'] == min(losses[1:])
    assert all(torch.equal(a, b) for a, b in zip(after['model'].values(), best['model'].values()))


def test_training_goes_on_without_its_metrics(lab):
    out = lab.new_out()
    (out / 'metrics.jsonl').mkdir(parents=True)
    ended = lab.launchers[0].run('train.py', *lab.flags(out))
    assert ended.code == 0 and ended.out.count('metrics.jsonl cannot be written') == 1
    for name in ('state.pt', 'ckpt.pt'):
        assert not chaos.compare_values(checkpoint.read(out / name), checkpoint.read(lab.reference / name), name)


WANDB = '''
import sys
def init(**options):
    if sys.stdin.isatty():
        raise AssertionError('it could have asked')
    {init}
class Run:
    id = 'abc'
    def log(self, numbers, step):
        if step >= 7:
            raise OSError('no network')
    def finish(self):
        pass
'''


@pytest.mark.parametrize('init, says', [
    ("raise RuntimeError('not logged in')", 'wandb is off (RuntimeError: not logged in)'),
    ("return Run()", 'wandb is off (OSError: no network)')])
def test_training_goes_on_without_wandb(lab, init, says):
    stub, out = lab.folder / 'wandb.py', lab.new_out()
    stub.write_text(WANDB.replace('{init}', init), encoding='utf-8')
    ended = lab.launchers[0].run('train.py', *lab.flags(out, wandb_log=True))
    stub.unlink()
    assert ended.code == 0 and ended.out.count(says) == 1 and not ended.err
    assert chaos.read_losses(out) == chaos.read_losses(lab.reference)


# Resuming with other settings

@pytest.mark.parametrize('flags, same', [
    (['--eval_interval=4'], True), (['--n_layer=2'], True),
    (['--learning_rate=0.02'], False), (['--lr_decay_iters=30'], False), (['--weight_decay=0.5'], False),
    (['--beta1=0.5'], False), (['--beta2=0.99'], False), (['--dropout=0.0'], False), (['--batch_size=4'], False),
    (['--gradient_accumulation_steps=4'], False), (['--block_size=16'], False)])
def test_resuming_with_another_setting_takes_effect(lab, flags, same):
    out = lab.new_out(lab.stopped)
    ended = lab.launchers[0].run('train.py', *lab.flags(out, init_from='resume'), *flags)
    assert ended.code == 0, ended.err
    losses = {line['iter']: line['loss'] for line in chaos.read_losses(out) if 'loss' in line}
    without = {line['iter']: line['loss'] for line in chaos.read_losses(lab.reference) if 'loss' in line}
    assert (losses == without) == same
    assert all(losses[i] == without[i] for i in range(10))


def test_the_shape_comes_from_the_checkpoint_and_a_conflict_is_said(lab):
    out = lab.new_out(lab.stopped)
    ended = lab.launchers[0].run('train.py', *lab.flags(out, init_from='resume'), '--n_layer=3', '--bias=True')
    assert ended.code == 0, ended.err
    for name, typed, kept in (('n_layer', 3, 2), ('bias', True, False)):
        assert f'note: {name}={typed} does not count, the weights have {name}={kept}' in ended.out
    assert not chaos.compare_values(
        *(checkpoint.read(folder / 'state.pt')['model'] for folder in (out, lab.reference)), 'model')


def test_number_of_ranks_may_change(lab):
    """The same global batch from one rank or two, and losses that agree to rounding (no dropout)."""
    curves = []
    for ranks in (1, 2):
        out = lab.new_out(lab.stopped)
        ended = lab.launchers[0].run('train.py', *lab.flags(out, init_from='resume', dropout=0.0), ranks=ranks)
        assert set(ended.codes) == {0}, ended.err
        curves.append([line['loss'] for line in chaos.read_losses(out) if line['iter'] >= 10 and 'loss' in line])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
