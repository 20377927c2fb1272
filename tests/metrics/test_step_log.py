import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import pytest
import torch

from engine import distributed
from engine.checkpoint import run_folder
from engine.errors import RunError
from engine.metrics import step_log
from engine.metrics.metrics_file import MetricsWriter, read_metrics
from engine.metrics.step_log import StepLog


def write_run(folder, start, evaluated, stop, **options):
    """The records of iterations start to stop: an evaluation every 5, and every step."""
    writer = MetricsWriter(folder, start, evaluated, **options)
    for i in range(start, stop):
        if i % 5 == 0 and not (evaluated and i == start):
            writer.write(i, val_loss=float(i))
        writer.write(i, loss=float(i))
    writer.close()
    return writer


# metrics.jsonl

def test_a_resumed_log_is_that_of_an_uninterrupted_run(tmp_path):
    (tmp_path / 'a').mkdir()
    (tmp_path / 'b').mkdir()
    write_run(tmp_path / 'a', 0, False, 20)
    write_run(tmp_path / 'b', 0, False, 13)             # stopped at 13, with its state of 10
    with open(tmp_path / 'b' / 'metrics.jsonl', 'a') as file:
        file.write('{"iter": 13, "lo')                  # torn off by a crash
    write_run(tmp_path / 'b', 10, True, 20)

    straight, resumed = (read_metrics(tmp_path / name / 'metrics.jsonl') for name in 'ab')
    assert [{**r, 'seconds': 0} for r in straight] == [{**r, 'seconds': 0} for r in resumed]


def test_seconds_go_on_where_the_run_stopped(tmp_path, monkeypatch):
    """One per record here. Those between the last state and the stop are lost, and the pause is not
    counted."""
    clock = iter(range(100, 10 ** 6))
    monkeypatch.setattr(step_log.time, 'perf_counter', lambda: next(clock))
    write_run(tmp_path, 1, False, 4)                    # iterations 1 to 3 at 1, 2, 3 seconds
    for _ in range(1000):
        next(clock)
    write_run(tmp_path, 3, False, 5)                    # 3 and 4 once more
    write_run(tmp_path, 5, True, 6)

    records = read_metrics(tmp_path / 'metrics.jsonl')
    assert [(r['iter'], r['seconds']) for r in records] == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]


@pytest.mark.parametrize('seconds', [
    '', ', "seconds": 1' + '0' * 400, ', "seconds": NaN', ', "seconds": "x"', ', "seconds": 1e300',
    ', "seconds": true'])
def test_records_of_any_kind_leave_a_run_able_to_go_on(tmp_path, seconds):
    """A damaged clock, or one that earlier versions did not write, is not a clock."""
    lines = ['{"iter": 0, "loss": 2.0' + seconds + '}', '[' * 100000, '7']
    (tmp_path / 'metrics.jsonl').write_text('\n'.join(lines) + '\n')
    write_run(tmp_path, 1, False, 3)
    records = read_metrics(tmp_path / 'metrics.jsonl')
    assert [r['iter'] for r in records] == [0, 1, 2]
    assert [r['seconds'] for r in records[1:]] == [None, None]


def test_what_is_not_finite_stays_json(tmp_path):
    writer = MetricsWriter(tmp_path, 0, False)
    writer.write(0, loss=float('inf'), mfu=None)
    writer.close()
    record = json.loads((tmp_path / 'metrics.jsonl').read_text())
    assert record.pop('seconds') >= 0
    assert record == {'iter': 0, 'loss': None, 'mfu': None}


def test_a_file_that_cannot_be_written_warns_once(tmp_path, logged):
    (tmp_path / 'metrics.jsonl').mkdir()
    write_run(tmp_path, 0, False, 3)
    assert len(logged) == 1 and 'metrics.jsonl cannot be written' in logged[0]


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no FIFOs')
def test_a_fifo_in_the_place_of_the_metrics_warns_and_is_not_waited_for(tmp_path, logged):
    os.mkfifo(tmp_path / 'metrics.jsonl')
    write_run(tmp_path, 0, False, 3)
    assert len(logged) == 1 and 'it is not a regular file' in logged[0]


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='this system has no /dev/full')
def test_a_disk_that_fills_warns_once_and_stops_nothing(tmp_path, logged):
    writer = MetricsWriter(tmp_path, 0, False)
    writer.file.close()
    writer.file = open('/dev/full', 'w')
    for i in range(3):
        writer.write(i, loss=1.0)
    writer.close()
    assert len(logged) == 1 and 'metrics.jsonl cannot be written (No space left' in logged[0]


# wandb

def fake_wandb(monkeypatch, fail_at=None):
    """A stand-in for wandb that records calls, and fails from call number fail_at on."""
    calls = []

    class Run:
        id = 'run1'

        def define_metric(self, name, step_metric):
            assert (name, step_metric) == ('*', 'iter')

        def log(self, numbers):
            calls.append(numbers)
            if fail_at is not None and len(calls) > fail_at:
                raise ConnectionError('the network is gone')

        def finish(self):
            calls.append('finish')

    def init(**arguments):
        calls.append(arguments)
        assert not sys.stdin.isatty() and sys.stdin.read() == '', 'wandb could ask a question'
        if fail_at == 0:
            raise RuntimeError('not logged in')
        return Run()

    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    return calls


def test_wandb_gets_the_same_numbers(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    terminal = sys.stdin
    options = dict(wandb_arguments=dict(project='p', resume='allow'), wandb_id='run1')
    writer = write_run(tmp_path, 0, False, 3, **options)
    assert calls[0]['id'] == 'run1'
    assert calls[1:] == [{'iter': 0, 'val/loss': 0.0}, {'iter': 0, 'loss': 0.0},
                         {'iter': 1, 'loss': 1.0}, {'iter': 2, 'loss': 2.0}, 'finish']
    assert writer.wandb_id == 'run1' and sys.stdin is terminal


def test_wandb_gets_the_names_and_units_of_nanogpt(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    writer = MetricsWriter(tmp_path, 0, False, wandb_arguments=dict(project='p'))
    writer.write(0, train_loss=4.0, val_loss=4.5)
    writer.write(0, loss=4.1, mfu=0.25, lr=0.1)
    writer.write(1, loss=4.0, mfu=None)
    assert calls[1:] == [{'iter': 0, 'train/loss': 4.0, 'val/loss': 4.5},
                         {'iter': 0, 'loss': 4.1, 'mfu': 25.0, 'lr': 0.1},
                         {'iter': 1, 'loss': 4.0, 'mfu': None}]
    writer.close()


@pytest.mark.parametrize('fail_at, words', [(0, 'not logged in'), (2, 'the network is gone')])
def test_a_failure_of_wandb_warns_once_and_stops_nothing(
        tmp_path, monkeypatch, logged, fail_at, words):
    fake_wandb(monkeypatch, fail_at)
    write_run(tmp_path, 0, False, 8, wandb_arguments=dict(project='p'))
    assert len(logged) == 1 and 'wandb is off' in logged[0] and words in logged[0]
    assert len(read_metrics(tmp_path / 'metrics.jsonl')) == 10


# The log of steps

class Writer:
    def __init__(self):
        self.records = []

    def write(self, iter_num, **numbers):
        self.records.append((iter_num, numbers))


def new_log(world_size=1, dtype='float32', **options):
    """A StepLog whose environment has world_size equal ranks, and the records that it writes."""
    env = distributed.start_environment(device='cpu')
    env.dtype = dtype
    env.world_size = world_size
    env.all_reduce = lambda tensor: tensor * world_size
    writer = Writer()
    defaults = dict(tokens=0, flops_per_token=1e4, log_interval=1, max_iters=10, advice='Help.')
    log = StepLog(env, writer, **{**defaults, **options})
    return log, writer.records


def step(loss, grad_norm=1.0):
    return {'loss': torch.tensor(loss), 'grad_norm': torch.tensor(grad_norm)}


@pytest.mark.parametrize('world_size', [1, 4])
def test_a_log_has_the_mean_over_the_ranks_at_its_interval(world_size, logged):
    log, records = new_log(world_size, log_interval=2)
    for i in range(5):
        assert log.push(i, step(2.0 + i, 0.5), 100 * (i + 1), lr=1e-3) is False

    assert [i for i, _ in records] == [0, 2, 4] and len(logged) == 3
    assert [record['tokens'] for _, record in records] == [100, 300, 500]
    for i, record in records:
        assert record['loss'] == 2.0 + i
        assert record['grad_norm'] == 0.5 and record['lr'] == 1e-3
        assert record['tokens_per_second'] == pytest.approx(100 / record['ms'] * 1000)
    for (_, record), line in zip(records, logged):
        rate = step_log.short_number(round(record['tokens_per_second']))
        assert (f'loss {record["loss"]:.4f}, grad {record["grad_norm"]:.2f}, lr 1.0e-3, '
                f'{rate} tok/s, mfu ') in line


@pytest.mark.parametrize('iteration, loss, grad_norm, seconds', [
    (599_000, 2.8512, 0.32, 86_000), (0, 10.9512, 23.45, 350_000), (1500, 1.2736, 0.92, 95)])
def test_a_log_line_fits_80_columns(iteration, loss, grad_norm, seconds):
    numbers = dict(loss=loss, grad_norm=grad_norm, lr=6e-4, tokens_per_second=1_963_221, mfu=0.55)
    line = step_log.format_line(iteration, numbers, seconds)
    assert len(line) <= 80
    assert line.startswith(f'iter {iteration}: loss {loss}, grad {grad_norm}, lr 6.0e-4, 1.96M ')


@pytest.mark.parametrize('seconds, text', [
    (0.4, '0s'), (59.6, '1m0s'), (95, '1m35s'), (3600, '1h0m'), (86_399, '23h59m'),
    (295_200, '3d10h')])
def test_the_time_that_is_left_has_two_units(seconds, text):
    assert step_log.short_time(seconds) == text


def test_on_a_gpu_a_step_is_read_while_the_next_one_runs(monkeypatch):
    monkeypatch.setattr(step_log, 'is_asynchronous', lambda device: True)
    log, records = new_log()
    for i in range(3):
        log.push(i, step(2.0), 100 * (i + 1), lr=1e-3)
    assert [i for i, _ in records] == [0, 1]
    log.flush()
    assert [i for i, _ in records] == [0, 1, 2]


@pytest.mark.parametrize('numbers', [step(math.nan), step(math.inf), step(2.0, math.inf)])
def test_a_step_that_is_not_finite_ends_the_run(numbers):
    log, records = new_log()
    log.push(0, step(2.0), 100, lr=1e-3)
    words = 'iteration 1: loss .*; the run ends, and that update is not saved. Help.'
    with pytest.raises(RunError, match=words):
        log.push(1, numbers, 200, lr=1e-3)
    assert [i for i, _ in records] == [0]


def test_float16_may_overflow_while_its_loss_scale_settles():
    log, _ = new_log(dtype='float16')
    for i in range(20):
        log.push(i, step(2.0, math.inf), 100 * (i + 1), lr=1e-3)
    log.push(20, step(2.0), 2100, lr=1e-3)
    for i in range(21, 41):
        log.push(i, step(2.0, math.nan), 100 * (i + 1), lr=1e-3)
    with pytest.raises(RunError, match='iteration 41'):
        log.push(41, step(2.0, math.nan), 4200, lr=1e-3)

    log, _ = new_log(dtype='float16')
    with pytest.raises(RunError, match='loss nan'):
        log.push(0, step(math.nan), 100, lr=1e-3)


def test_a_signal_of_any_rank_is_told_with_the_step():
    log, _ = new_log(world_size=2)
    assert log.push(0, step(2.0), 100, lr=1e-3) is False
    log.env.received_signal = signal.SIGTERM
    assert log.push(1, step(2.0), 200, lr=1e-3) is True
    assert log.stop_signal == signal.SIGTERM


@pytest.mark.parametrize('count, text', [
    (999, '999'), (1000, '1k'), (9990, '9.99k'), (999_400, '999k'), (999_936, '1M'),
    (1_234_567, '1.23M'), (3_840_000_000, '3.84B')])
def test_large_counts_have_three_digits_and_a_unit(count, text):
    assert step_log.short_number(count) == text


# The commit that run.json names

def git(folder, *arguments):
    identity = ['-c', 'user.name=a', '-c', 'user.email=a@b.c', '-c', 'commit.gpgsign=false']
    command = ['git', *identity, *arguments]
    output = subprocess.check_output(command, cwd=folder, text=True, stderr=subprocess.DEVNULL)
    return output.strip()


@pytest.mark.skipif(not shutil.which('git'), reason='git is not installed')
def test_the_commit_is_known_with_packed_refs_and_in_a_worktree(tmp_path):
    project = tmp_path / 'project'
    project.mkdir()
    git(project, 'init')
    git(project, 'commit', '--allow-empty', '-m', 'one')
    commit = re.fullmatch('[0-9a-f]{40}', git(project, 'log', '-1', '--format=%H'))[0]
    assert run_folder.git_commit(project) == commit

    git(project, 'pack-refs', '--all')                  # as git gc does
    git(project, 'worktree', 'add', '--detach', '../worktree')
    assert run_folder.git_commit(project) == commit
    assert run_folder.git_commit(tmp_path / 'worktree') == commit


def test_no_commit_is_known_without_git_or_a_repository(tmp_path, monkeypatch):
    inside = tmp_path / 'inside'
    inside.mkdir()
    if shutil.which('git'):
        git(tmp_path, 'init')
        git(tmp_path, 'commit', '--allow-empty', '-m', 'of another project')
    assert run_folder.git_commit(inside) is None
    monkeypatch.setenv('PATH', str(inside))
    assert run_folder.git_commit(tmp_path) is None
