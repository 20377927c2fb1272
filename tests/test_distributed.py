"""Ranks: how they meet, collectives, signals, failures."""

import hashlib
import json
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch
from harness import CAN_FORK
from torch.distributed import HashStore

from engine import distributed
from engine.distributed import agree_on_name
from engine.errors import UserError


@pytest.mark.parametrize('arguments, words', [
    (dict(device='gpu'), "device='gpu' is unknown"),
    (dict(dtype='half'), "dtype='half' is unknown"),
    (dict(compile='yes'), "compile='yes'"),
    (dict(backend='mpi'), "backend='mpi' is unknown; try 'auto', 'nccl' or 'gloo'"),
])
def test_an_unknown_choice_is_refused(arguments, words):
    with pytest.raises(UserError, match=words):
        distributed.start_environment(**{'device': 'cpu', **arguments})


@pytest.mark.skipif(torch.cuda.is_available() or torch.backends.mps.is_available(),
                    reason='this machine has a GPU')
def test_the_summary_says_what_was_chosen_and_why():
    env = distributed.start_environment(compile='auto')
    assert (env.device.type, env.dtype, env.compile) == ('cpu', 'float32', False)
    beginning = 'device cpu (no GPU found), dtype float32 (default on cpu'
    assert env.summary.startswith(beginning)
    assert env.summary.endswith('not compiled (eager starts sooner on cpu)')


def test_one_process_is_one_rank():
    env = distributed.start_environment(device='cpu')
    assert (env.rank, env.local_rank, env.world_size, env.is_main) == (0, 0, 1, True)
    assert env.all_reduce(torch.ones(2)).tolist() == [1, 1]
    assert env.all_gather('a') == ['a']
    env.barrier()
    env.assert_same_on_all_ranks({'seed': 1})
    with pytest.raises(UserError, match='a mistake'):
        with env.raise_on_all_ranks():
            raise UserError('a mistake')


@pytest.mark.parametrize('variables, words', [
    (dict(WORLD_SIZE='two'), "WORLD_SIZE='two' should be a number"),
    (dict(WORLD_SIZE='0'), "WORLD_SIZE='0'"),
    (dict(RANK='1'),
     "RANK='1' should be a number from 0 to 0.*unset RANK LOCAL_RANK WORLD_SIZE"),
    (dict(WORLD_SIZE='2', RANK='2'), "RANK='2'"),
    (dict(WORLD_SIZE='2', LOCAL_RANK='-1'), "LOCAL_RANK='-1'"),
    (dict(WORLD_SIZE='2', MASTER_ADDR='localhost'), "MASTER_PORT=''"),
    (dict(WORLD_SIZE='2', MASTER_PORT='29500'),
     'WORLD_SIZE=2 needs MASTER_ADDR; start the ranks with torchrun'),
])
def test_impossible_variables_are_refused(monkeypatch, variables, words):
    for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.start_environment(device='cpu')


@pytest.mark.parametrize('options, words', [
    (dict(backend='nccl'),
     'backend=nccl moves data between NVIDIA GPUs, and this runs on cpu; try --backend=gloo'),
    (dict(device='cuda:1'),
     'device=cuda:1 is one device, and 2 ranks need one each; try --device=auto'),
])
def test_what_several_ranks_cannot_use_is_refused(monkeypatch, options, words):
    variables = dict(WORLD_SIZE='2', RANK='0', LOCAL_RANK='0', MASTER_ADDR='localhost',
                     MASTER_PORT='29500')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        distributed.start_environment(**{'device': 'cpu', **options})


# How the ranks meet

def make_store(timeout):
    store = HashStore()
    store.set_timeout(timedelta(seconds=timeout))
    return store


def start_ranks(store, world_size, delays):
    """The name that each rank of one start gets, in order of rank. delays: seconds, by rank."""
    names = [None] * world_size

    def run(rank):
        names[rank] = agree_on_name(store, rank, world_size, timeout=10)

    threads = [threading.Timer(delays[rank], run, [rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize('delays', [(0, 0, 0), (0.3, 0, 0), (0, 0, 0.3)])
def test_every_start_over_a_kept_store_gets_one_new_name(delays):
    store = make_store(timeout=10)
    starts = [start_ranks(store, 3, delays) for _ in range(3)]
    for names in starts:
        assert len(set(names)) == 1
        assert names[0]
    assert len({names[0] for names in starts}) == 3


def test_a_rank_that_died_while_the_ranks_met_does_not_hold_up_the_next_start():
    store = make_store(timeout=10)
    store.set('rank 1', 'id of a dead rank')
    store.add('answers to a dead rank 0', 1)
    assert len(set(start_ranks(store, 2, (0, 0.2)))) == 1


@pytest.mark.parametrize('missing', [0, 1])
def test_a_rank_that_never_comes_is_an_error(missing):
    """Also where the store has an id of it from an earlier start."""
    store = make_store(timeout=0.3)
    store.set('rank 1', 'id of a dead rank')
    with pytest.raises(RuntimeError, match='(?i)some ranks were missing|timeout'):
        agree_on_name(store, 1 - missing, 2, timeout=0.3)


def test_the_ranks_see_no_address_of_an_earlier_start(monkeypatch):
    """torchrun's kept store still has the addresses of ranks that died."""
    store = HashStore()
    stores = []
    monkeypatch.setattr(distributed.dist.distributed_c10d, 'rendezvous',
                        lambda url, timeout: iter([(store, 0, 1)]))
    monkeypatch.setattr(distributed.dist, 'init_process_group',
                        lambda backend, store, **options: stores.append(store))
    for _ in range(2):
        cpu = torch.device('cpu')
        assert distributed.init_process_group('gloo', cpu, timeout=5) == 'gloo'
        assert not stores[-1].check(['address of rank 0'])
        stores[-1].set('address of rank 0', '10.0.0.1:1234')


# Signals

def get_handlers():
    return {number: signal.getsignal(number) for number in distributed.STOP_SIGNALS}


@pytest.fixture
def restored_handlers():
    before = get_handlers()
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
def test_the_first_signal_is_noted_and_kills_nothing(restored_handlers):
    env = distributed.start_environment(device='cpu')
    env.catch_signals()
    assert env.stop_signal() == 0
    assert distributed.signal_number(env.stop_flags().tolist()) == 0

    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert env.stop_signal() == signal.SIGUSR1
    assert distributed.signal_number(env.stop_flags().tolist()) == signal.SIGUSR1


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='this system has no SIGHUP')
def test_a_closed_terminal_stops_a_run_but_for_nohup(restored_handlers):
    env = distributed.start_environment(device='cpu')
    signal.signal(signal.SIGHUP, signal.SIG_IGN)        # as nohup starts a program
    env.catch_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert env.stop_signal() == 0

    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    env.catch_signals()
    os.kill(os.getpid(), signal.SIGHUP)
    assert env.stop_signal() == signal.SIGHUP


def wait_for(is_true):
    """Wait until is_true() is, ten seconds at most. Returns whether it is."""
    deadline = time.monotonic() + 10
    while not is_true() and time.monotonic() < deadline:
        time.sleep(0.001)
    return is_true()


def test_ctrl_c_is_answered_while_pytorch_computes(restored_handlers, monkeypatch):
    """A handler of Python's would wait for the end of such a call."""
    answered = []
    monkeypatch.setattr(distributed.InterruptWatcher, 'answer',
                        lambda self: answered.append(time.monotonic()))
    env = distributed.start_environment(device='cpu')
    env.catch_signals()
    timer = threading.Timer(0.02, os.kill, [os.getpid(), signal.SIGINT])
    timer.start()
    hashlib.pbkdf2_hmac('sha256', b'', b'', 500_000)    # one call that runs no handlers
    ended = time.monotonic()
    assert wait_for(lambda: answered and env.received_signal)
    assert answered[0] < ended
    env.restore_signals()


@pytest.mark.parametrize('ranks, text, codes', [
    (1, 'stopping after this iteration; press Ctrl-C again to stop at once\n', [130]),
    (2, 'stopping after this iteration\n', []),         # torchrun may repeat what the terminal sent
])
def test_a_second_ctrl_c_ends_a_single_process(
        restored_handlers, monkeypatch, capfd, ranks, text, codes):
    found = []
    monkeypatch.setattr(distributed.os, '_exit', found.append)
    monkeypatch.delattr(sys, 'ps1', raising=False)
    env = distributed.start_environment(device='cpu')
    env.world_size = ranks
    env.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    shown = []
    assert wait_for(lambda: shown.append(capfd.readouterr().err) or ''.join(shown) == text)
    assert env.received_signal == signal.SIGINT

    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
    assert wait_for(lambda: found == codes)
    env.world_size = 1
    env.restore_signals()


def test_a_second_ctrl_c_in_a_notebook_ends_the_cell_alone(restored_handlers, monkeypatch):
    monkeypatch.setattr(sys, 'ps1', 'In : ', raising=False)
    monkeypatch.setattr(distributed.InterruptWatcher, 'answer', lambda self: None)
    env = distributed.start_environment(device='cpu')
    env.catch_signals()
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    env.restore_signals()


def test_only_the_named_signals_are_caught(restored_handlers):
    before = signal.getsignal(signal.SIGINT)
    distributed.start_environment(device='cpu').catch_signals(signal.SIGTERM)
    assert signal.getsignal(signal.SIGINT) is before
    assert signal.getsignal(signal.SIGTERM) not in (signal.SIG_DFL, signal.SIG_IGN)


def test_the_handlers_of_before_the_run_come_back(restored_handlers):
    received = []
    signal.signal(signal.SIGINT, lambda number, frame: received.append(number))
    before = get_handlers()

    # as in training; SIGTERM keeps the handler of before the first call
    env = distributed.start_environment(device='cpu')
    env.catch_signals(signal.SIGTERM)
    env.catch_signals()
    env.restore_signals()
    assert get_handlers() == before

    os.kill(os.getpid(), signal.SIGINT)
    assert received == [signal.SIGINT]
    assert not env.stop_signal()

    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    env.restore_signals()                               # nothing is left to put back
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN


# NCCL

END = 'so this one stops; the saved files are whole, go on with --init_from=auto\n'


@pytest.mark.parametrize('error, first, line', [
    ('TIMEOUT', True, f'rank 3: another rank did not answer within --rank_timeout, {END}'),
    ('COMM_ERROR', True, f'rank 3: another rank ended, {END}'),
    ('TIMEOUT', False, ''),
])
def test_an_error_that_only_the_watchdog_of_nccl_sees_ends_the_rank_in_one_line(
        monkeypatch, capsys, error, first, line):
    ErrorType = torch._C._distributed_c10d.ErrorType    # what a backend's get_error returns

    class Backend:
        answers = [ErrorType.SUCCESS, ErrorType.SUCCESS]

        def get_error(self):
            return self.answers.pop() if self.answers else getattr(ErrorType, error)

    ended = threading.Event()
    codes = []

    def exit_with(code):
        codes.append(code)
        ended.set()

    monkeypatch.setattr(distributed.time, 'sleep', lambda seconds: None)
    monkeypatch.setattr(distributed.os, '_exit', exit_with)
    monkeypatch.setattr(distributed.dist, 'get_rank', lambda: 3)
    monkeypatch.setattr(distributed, 'is_first_failure', lambda: first)
    distributed.watch_nccl(Backend())
    assert ended.wait(10)
    assert codes == [1]
    assert capsys.readouterr().err == line
    assert not Backend.answers


def test_a_store_that_does_not_answer_makes_a_rank_report_its_failure(monkeypatch):
    class Store:
        def add(self, key, count):
            threading.Event().wait()                    # as behind a cut cable

    monkeypatch.setattr(distributed, 'STORE_TIMEOUT', 0.1)
    monkeypatch.setattr(distributed.dist.distributed_c10d, '_get_default_store', Store)
    assert distributed.is_first_failure()


# Two ranks

PROBE = '''
import json, os, signal, sys
import torch
import console
from engine.distributed import hard_exit, report_first_failure, start_environment
from engine.errors import RunError, UserError

def collectives(env):
    env.barrier()
    found = dict(rank=env.rank, is_main=env.is_main,
                 summed=env.all_reduce(torch.tensor([env.rank + 1.0])).tolist(),
                 gathered=env.all_gather({'rank': env.rank}))
    os.write(1, (json.dumps(found) + '\\n').encode())     # in one piece: the ranks share the file

def mistake(env):
    with env.raise_on_all_ranks():
        if env.rank == 1:
            raise UserError('rank 1 found a mistake')

def different(env):
    env.assert_same_on_all_ranks({'seed': 1, 'batch_size': 8 + env.rank})

def failure(env):
    raise RunError('this rank failed')

def stop(env):
    env.catch_signals()
    if env.rank == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    raise SystemExit(env.stop_signal())

with hard_exit(), console.report_errors(), report_first_failure():
    globals()[sys.argv[1]](start_environment(device='cpu', timeout=20))
'''


@pytest.fixture
def run_probe(workspace):
    if not CAN_FORK:
        pytest.skip('two ranks are started by fork')
    (workspace.folder / 'probe.py').write_text(PROBE, encoding='utf-8')
    return lambda case: workspace.launcher.run('probe.py', case, ranks=2)


def test_collectives_reach_every_rank(run_probe):
    result = run_probe('collectives')
    assert result.codes == [0, 0], result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    gathered = [{'rank': 0}, {'rank': 1}]
    for rank, line in enumerate(sorted(lines, key=lambda line: line['rank'])):
        assert line == dict(rank=rank, is_main=rank == 0, summed=[3.0], gathered=gathered)


@pytest.mark.parametrize('case, line', [
    ('mistake', 'probe.py: rank 1 found a mistake\n'),
    ('different', 'probe.py: the ranks differ in batch_size: 8, 9\n'),
])
def test_a_mistake_of_any_rank_ends_all_in_one_line(run_probe, case, line):
    """torchrun ends the ranks that are still there when the first one exits."""
    result = run_probe(case)
    assert result.codes[0] == 2
    assert set(result.codes) <= {2, -signal.SIGTERM}
    assert result.stderr == line


def test_only_the_first_rank_that_fails_prints_its_error(run_probe):
    result = run_probe('failure')
    assert 1 in result.codes
    assert set(result.codes) <= {1, -signal.SIGTERM}
    assert result.stderr.count('this rank failed') == 1
    assert result.stderr.count('\n') == 1


def test_a_signal_to_one_rank_reaches_all(run_probe):
    assert run_probe('stop').codes == [signal.SIGUSR1, signal.SIGUSR1]
