"""Injected faults, a few of each kind. `python tests/chaos.py` runs as many as are asked for."""

import os
import signal
import sys
import time

import pytest

if sys.platform != 'linux':
    pytest.skip('faults are injected with fork and /proc', allow_module_level=True)

import chaos
from harness import is_walk, read_records, script_settings

from engine.checkpoint import gathered, run_folder
from engine.errors import UserError


@pytest.mark.parametrize('fault, trials', [('kill', 4), ('term', 1), ('int', 1), ('hup', 1), ('usr1', 1), ('full', 2),
                                           ('flip', 4), ('nan', 2), ('weights', 1), ('pipe', 2), ('cache', 2)])
def test_a_fault_loses_nothing(lab, fault, trials):
    for i in range(trials):
        chaos.run_trial(lab, lab.launcher, fault, f'{fault} {i}')


@pytest.mark.parametrize('fault', ['kill', 'term', 'full', 'nan'])
def test_a_fault_on_one_of_two_ranks_loses_nothing(two_rank_lab, fault):
    chaos.run_trial(two_rank_lab, two_rank_lab.launcher, fault, fault)


@pytest.mark.parametrize('step', chaos.SAVE_STEPS)
def test_a_kill_at_each_step_of_a_save_loses_nothing(lab, step):
    out_dir = lab.new_out_dir()
    result = lab.resume(lab.launcher, out_dir, fault=dict(
        kind='signal', number=signal.SIGKILL, save=4, step=step, offset=100_000))
    assert result.codes == [-signal.SIGKILL]
    iterations = [run_folder.load_state(out_dir)[0]['iter_num'], gathered.load_model(out_dir)['iter_num']]
    assert iterations == [10 if step in ('sync folder', 'done') else 5, 10]
    lab.finish(lab.launcher, out_dir)


def test_a_lost_rank_is_started_again_by_torchrun(two_rank_lab):
    out_dir = two_rank_lab.new_out_dir()
    fault = dict(kind='signal', number=signal.SIGKILL, rank=1, iteration=7, micro_steps=1)
    code, stderr, _ = chaos.run_torchrun(two_rank_lab, out_dir, fault, '--max-restarts=1', timeout=20)
    assert code == 0, stderr[:3000]
    two_rank_lab.compare(out_dir)


def test_a_frozen_rank_ends_the_other(two_rank_lab):
    lab, launcher, out_dir = two_rank_lab, two_rank_lab.launcher, two_rank_lab.new_out_dir()
    pids = launcher.start('train.py', *lab.flags(out_dir, rank_timeout=3), ranks=2, fault=dict(
        kind='signal', number=signal.SIGSTOP, rank=1, iteration=7, micro_steps=1))
    while chaos.is_running(pids[0]):
        time.sleep(0.1)
    os.kill(pids[1], signal.SIGKILL)
    result = launcher.wait()
    assert result.codes == [1, -signal.SIGKILL] and not result.timed_out
    assert result.stderr.count('\n') == 1 and 'another rank did not answer within --rank_timeout' in result.stderr
    lab.finish(launcher, out_dir)


def test_the_command_counts_its_trials(lab, monkeypatch, capsys):
    """And exits with 1 if any of them failed."""
    class SharedLab:                                    # the command makes and closes labs of its own
        def __init__(self, folder, ranks):
            self.new_out_dir, self.resume, self.finish = lab.new_out_dir, lab.resume, lab.finish
            self.stopped, self.micro_steps, self.ranks = lab.stopped, lab.micro_steps, lab.ranks

        def new_launcher(self):
            return lab.launcher

        def close(self):
            pass
    monkeypatch.setattr(chaos, 'Lab', SharedLab)
    for failing, code in ((False, 0), (True, 1)):
        if failing:
            monkeypatch.setattr(chaos, 'expect_one_line', lambda *arguments: chaos.expect(False, 'two lines'))
        with script_settings(chaos, '--trials=2', '--fault=nan', '--workers=1'), pytest.raises(SystemExit) as end:
            chaos.main()
        shown = capsys.readouterr().out
        assert end.value.code == code and f'2 trials, {2 * failing} failures' in shown
    for flag, words in (('--fault=fire', "fault='fire' is unknown"), ('--ranks=3', 'ranks=3 should be'),
                        ('--trials=0', 'trials=0 should be')):
        with script_settings(chaos, flag), pytest.raises(UserError, match=words):
            chaos.main()


# What else must not stop a run

def test_training_goes_on_without_its_metrics(lab):
    out_dir = lab.new_out_dir()
    (out_dir / 'metrics.jsonl').mkdir(parents=True)
    result = lab.train(out_dir)
    assert result.stdout.count('metrics.jsonl cannot be written') == 1
    for name in ('state.pt', 'ckpt.pt'):
        assert not chaos.compare_values(gathered.read(out_dir / name), gathered.read(lab.reference / name), name)


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


@pytest.mark.parametrize('init, warning', [
    ("raise RuntimeError('not logged in')", 'wandb is off (RuntimeError: not logged in)'),
    ("return Run()", 'wandb is off (OSError: no network)')])
def test_training_goes_on_without_wandb(lab, init, warning):
    stub, out_dir = lab.folder / 'wandb.py', lab.new_out_dir()
    stub.write_text(WANDB.replace('{init}', init), encoding='utf-8')
    result = lab.train(out_dir, '--wandb_log=True')
    stub.unlink()
    assert result.stdout.count(warning) == 1 and not result.stderr
    assert read_records(out_dir) == read_records(lab.reference)


def test_a_stopped_run_can_be_sampled(lab):
    """One that was killed before its first ckpt.pt too."""
    out_dir = lab.new_out_dir(lab.stopped)
    (out_dir / 'ckpt.pt').unlink()
    result = lab.run('sample.py', f'--out_dir={out_dir}', '--device=cpu', '--start=abc', '--num_samples=1',
                     '--temperature=0')
    assert is_walk(result.stdout.split('\n---')[0])


# Resuming with other settings

@pytest.mark.parametrize('flags, same', [
    (['--eval_interval=4'], True), (['--n_layer=2'], True),
    (['--learning_rate=0.02'], False), (['--lr_decay_iters=30'], False), (['--weight_decay=0.5'], False),
    (['--beta1=0.5'], False), (['--beta2=0.99'], False), (['--dropout=0.0'], False), (['--batch_size=4'], False),
    (['--gradient_accumulation_steps=4'], False), (['--block_size=16'], False)])
def test_a_setting_that_is_named_anew_takes_effect(lab, flags, same):
    out_dir = lab.new_out_dir(lab.stopped)
    result = lab.run('train.py', f'--out_dir={out_dir}', '--init_from=resume', '--device=cpu', *flags)
    losses = {record['iter']: record['loss'] for record in read_records(out_dir) if 'loss' in record}
    expected = {record['iter']: record['loss'] for record in read_records(lab.reference) if 'loss' in record}
    assert (losses == expected) == same
    assert all(losses[i] == expected[i] for i in range(10))
    changes = [line for line in result.stdout.splitlines() if line.startswith('note:') and ' -> ' in line]
    assert len(changes) == (flags != ['--n_layer=2'])


def test_the_shape_comes_from_the_checkpoint_and_a_conflict_is_printed(lab):
    out_dir = lab.new_out_dir(lab.stopped)
    result = lab.train(out_dir, '--init_from=resume', '--n_layer=3', '--bias=True')
    for name, typed, kept in (('n_layer', 3, 2), ('bias', True, False)):
        assert f'note: {name}={typed} has no effect, the weights have {name}={kept}' in result.stdout
    assert not chaos.compare_values(
        *(gathered.read(folder / 'state.pt')['model'] for folder in (out_dir, lab.reference)), 'model')


def test_the_number_of_ranks_may_change(lab):
    """The same global batch on one rank or two, and losses that agree to rounding (no dropout)."""
    curves = []
    for ranks in (1, 2):
        out_dir = lab.new_out_dir(lab.stopped)
        lab.train(out_dir, '--init_from=resume', '--dropout=0.0', ranks=ranks)
        curves.append([record['loss'] for record in read_records(out_dir) if record['iter'] >= 10 and 'loss' in record])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
