"""Injected faults, a few of each kind. `python tests/chaos.py` runs as many as are asked for."""

import os
import signal
import subprocess
import sys
import time

import pytest

if sys.platform != 'linux':
    pytest.skip('faults are injected with fork and /proc', allow_module_level=True)

import chaos
from harness import TESTS, is_walk, read_records, script_settings

from engine.checkpoint import gathered, run_folder
from engine.errors import UserError


@pytest.mark.parametrize('fault, trials', [
    ('kill', 4),
    ('term', 1),
    ('int', 1),
    ('hup', 1),
    ('usr1', 1),
    ('full', 2),
    ('flip', 4),
    ('nan', 2),
    ('weights', 1),
    ('pipe', 2),
    ('cache', 2),
])
def test_a_fault_loses_nothing(lab, fault, trials):
    for i in range(trials):
        chaos.run_trial(lab, lab.launcher, fault, f'{fault} {i}')


@pytest.mark.parametrize('fault', ['kill', 'term', 'full', 'nan'])
def test_a_fault_on_one_of_two_ranks_loses_nothing(two_rank_lab, fault):
    chaos.run_trial(two_rank_lab, two_rank_lab.launcher, fault, fault)


@pytest.mark.parametrize('step', chaos.SAVE_STEPS)
def test_a_kill_at_each_step_of_a_save_loses_nothing(lab, step):
    out_dir = lab.new_out_dir()
    fault = dict(kind='signal', number=signal.SIGKILL, save=4, step=step, offset=100_000)
    result = lab.resume(lab.launcher, out_dir, fault=fault)
    assert result.codes == [-signal.SIGKILL]

    state, _ = run_folder.load_state(out_dir)
    is_renamed = step in ('sync folder', 'done')
    assert state.iter_num == (10 if is_renamed else 5)
    assert gathered.read_ckpt(out_dir).iter_num == 10
    lab.finish(lab.launcher, out_dir)


@pytest.mark.slow
def test_a_lost_rank_is_started_again_by_torchrun(two_rank_lab):
    out_dir = two_rank_lab.new_out_dir()
    fault = dict(kind='signal', number=signal.SIGKILL, rank=1, iteration=7, micro_steps=1)
    code, stderr, _ = chaos.run_torchrun(two_rank_lab, out_dir, fault, '--max-restarts=1',
                                         timeout=20)
    assert code == 0, stderr[:3000]
    two_rank_lab.compare(out_dir)


def test_a_frozen_rank_ends_the_other(two_rank_lab):
    lab = two_rank_lab
    launcher = lab.launcher
    out_dir = lab.new_out_dir()
    fault = dict(kind='signal', number=signal.SIGSTOP, rank=1, iteration=7, micro_steps=1)
    flags = lab.flags(out_dir, rank_timeout=3)
    pids = launcher.start('train.py', *flags, ranks=2, fault=fault)
    while chaos.is_running(pids[0]):
        time.sleep(0.1)
    os.kill(pids[1], signal.SIGKILL)
    result = launcher.wait()

    assert result.codes == [1, -signal.SIGKILL] and not result.timed_out
    assert result.stderr.count('\n') == 1
    assert 'another rank did not answer within --rank_timeout' in result.stderr
    lab.finish(launcher, out_dir)


def test_the_command_counts_its_trials(lab, monkeypatch, capsys):
    """And exits with 1 if any of them failed."""
    class SharedLab:                            # the command makes and closes labs of its own
        def __init__(self, folder, ranks):
            self.new_out_dir = lab.new_out_dir
            self.resume = lab.resume
            self.finish = lab.finish
            self.stopped = lab.stopped
            self.micro_steps = lab.micro_steps
            self.ranks = lab.ranks

        def new_launcher(self):
            return lab.launcher

        def close(self):
            pass
    def run_two_trials():
        with script_settings(chaos, '--trials=2', '--fault=nan', '--workers=1'):
            with pytest.raises(SystemExit) as end:
                chaos.main()
        return end.value.code, capsys.readouterr().out

    def fail(*arguments):
        chaos.expect(False, 'two lines')

    monkeypatch.setattr(chaos, 'Lab', SharedLab)
    code, shown = run_two_trials()
    assert code == 0 and '2 trials, 0 failures' in shown

    monkeypatch.setattr(chaos, 'expect_one_line', fail)
    code, shown = run_two_trials()
    assert code == 1 and '2 trials, 2 failures' in shown


@pytest.mark.parametrize('flag, words', [
    ('--fault=fire', "fault='fire' is unknown"),
    ('--ranks=5', 'ranks=5 should be'),
    ('--trials=0', 'trials=0 should be'),
])
def test_the_command_refuses_settings_that_it_does_not_have(flag, words):
    with script_settings(chaos, flag), pytest.raises(UserError, match=words):
        chaos.main()


# What else must not stop a run

def test_training_goes_on_without_its_metrics(lab):
    out_dir = lab.new_out_dir()
    (out_dir / 'metrics.jsonl').mkdir(parents=True)
    result = lab.train(out_dir)
    assert result.stdout.count('metrics.jsonl cannot be written') == 1
    for name in ('state.pt', 'ckpt.pt'):
        found = gathered.read(out_dir / name)
        expected = gathered.read(lab.reference / name)
        assert not chaos.compare_values(found, expected, name)


WANDB = '''
import sys
def init(**options):
    if sys.stdin.isatty():
        raise AssertionError('it could have asked')
    {init}
class Run:
    id = 'abc'
    def define_metric(self, name, step_metric):
        pass
    def log(self, numbers):
        if numbers['iter'] >= 7:
            raise OSError('no network')
    def finish(self):
        pass
'''


@pytest.mark.parametrize('init, warning', [
    ("raise RuntimeError('not logged in')", 'wandb is off (RuntimeError: not logged in)'),
    ("return Run()", 'wandb is off (OSError: no network)')])
def test_training_goes_on_without_wandb(lab, init, warning):
    stub = lab.folder / 'wandb.py'
    out_dir = lab.new_out_dir()
    stub.write_text(WANDB.replace('{init}', init), encoding='utf-8')
    result = lab.train(out_dir, '--wandb_log=True')
    stub.unlink()
    assert result.stdout.count(warning) == 1 and not result.stderr
    assert read_records(out_dir) == read_records(lab.reference)


def test_a_stopped_run_can_be_sampled(lab):
    """One that was killed before its first ckpt.pt too."""
    out_dir = lab.new_out_dir(lab.stopped)
    (out_dir / 'ckpt.pt').unlink()
    result = lab.run('sample.py', f'--out_dir={out_dir}', '--device=cpu', '--start=abc',
                     '--num_samples=1', '--temperature=0')
    assert is_walk(result.stdout.split('\n---')[0])


# Resuming with other settings

def read_loss_curve(out_dir):
    return {record['iter']: record['loss'] for record in read_records(out_dir) if 'loss' in record}


@pytest.mark.parametrize('flag, same', [
    ('--eval_interval=4', True),
    ('--n_layer=2', True),
    ('--learning_rate=0.02', False),
    ('--lr_decay_iters=30', False),
    ('--weight_decay=0.5', False),
    ('--beta1=0.5', False),
    ('--beta2=0.99', False),
    ('--dropout=0.0', False),
    ('--batch_size=4', False),
    ('--gradient_accumulation_steps=4', False),
    ('--block_size=16', False),
])
def test_a_setting_that_is_named_anew_takes_effect(lab, flag, same):
    out_dir = lab.new_out_dir(lab.stopped)
    result = lab.run('train.py', f'--out_dir={out_dir}', '--init_from=resume', '--device=cpu', flag)
    losses = read_loss_curve(out_dir)
    expected = read_loss_curve(lab.reference)
    assert (losses == expected) == same
    assert all(losses[i] == expected[i] for i in range(10))

    notes = [line for line in result.stdout.splitlines() if line.startswith('note:')]
    changes = [line for line in notes if ' -> ' in line]
    assert len(changes) == (flag != '--n_layer=2')


def test_the_shape_comes_from_the_checkpoint_and_a_conflict_is_printed(lab):
    out_dir = lab.new_out_dir(lab.stopped)
    result = lab.train(out_dir, '--init_from=resume', '--n_layer=3', '--bias=True')
    assert 'note: n_layer=3 has no effect, the weights have n_layer=2' in result.stdout
    assert 'note: bias=True has no effect, the weights have bias=False' in result.stdout

    found = gathered.read(out_dir / 'state.pt')['model']
    expected = gathered.read(lab.reference / 'state.pt')['model']
    assert not chaos.compare_values(found, expected, 'model')


def test_the_number_of_ranks_may_change(lab):
    """The same global batch on one rank or two, and losses that agree to rounding (no dropout)."""
    curves = []
    for ranks in (1, 2):
        out_dir = lab.new_out_dir(lab.stopped)
        lab.train(out_dir, '--init_from=resume', '--dropout=0.0', ranks=ranks)
        curve = read_loss_curve(out_dir)
        curves.append([loss for iteration, loss in curve.items() if iteration >= 10])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_chaos_starts_as_a_command():
    """From anywhere, without what pytest puts on sys.path."""
    command = [sys.executable, str(TESTS / 'chaos.py'), '--help']
    done = subprocess.run(command, cwd='/', text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert '--trials=26' in done.stdout
