"""Break training runs on purpose, and compare what is left with an uninterrupted run.

    python tests/chaos.py --trials=100
    python tests/chaos.py --trials=50 --fault=kill --ranks=2

Each trial trains a small model on the CPU with dropout, saving every 5 iterations. It injects one
fault, starts the run again with --init_from=auto, and compares every tensor of state.pt and ckpt.pt
and every logged number with the uninterrupted run. The exit code is 1 if any trial lost or changed
anything. The processes and the signals are real.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import console

import torch
from harness import (
    ACCUMULATION,
    INTERVAL,
    ITERATIONS,
    TESTS,
    Workspace,
    read_records,
    torchrun_options,
)
from launcher import SAVE_STEPS, script_environment
from safetensors.torch import load_file
from tqdm import tqdm

import configurator
from engine.checkpoint import gathered, run_folder
from engine.errors import UserError

# trials
trials = 26             # in all; a mix takes the faults in turn
fault = 'mix'           # kill, term, int, hup, usr1, full, flip, nan, weights, pipe, cache, freeze, lost, or mix
ranks = 1               # processes of a run; freeze and lost always take 2, under torchrun
strategy = 'ddp'        # of several ranks: ddp, fsdp or hsdp
sharded = False         # True saves with --checkpoint=sharded, and leaves out the faults of single files
seed = 0                # of where the faults strike
workers = 2             # trials at a time

STOP = 12               # iteration in which the stopped run was killed
FILES = (gathered.MODEL, gathered.STATE, gathered.PREVIOUS)
FAULTS = ('kill', 'term', 'int', 'hup', 'usr1', 'full', 'flip', 'nan', 'weights', 'pipe', 'cache', 'freeze', 'lost')
ON_TWO_RANKS = ('freeze', 'lost')
OF_SINGLE_FILES = ('full', 'flip', 'weights')


class Failure(Exception):
    """A trial lost or changed something, or printed the wrong thing."""


class FaultMissed(Exception):
    """The fault came too late, or at a step that this save did not take. The trial does not count."""


def expect(condition, message, result=None):
    """Raise Failure with `message` unless the condition holds."""
    if not condition:
        raise Failure(message + (f'; codes {result.codes}, stderr: {result.stderr[-1500:]}' if result else ''))


class Lab(Workspace):
    """A workspace with two runs to compare with and to begin from.

    reference: the out_dir of an uninterrupted run. stopped: of a run that was killed in iteration
    STOP. Its state.pt holds iteration 10, and its state.prev.pt iteration 5.
    """

    def __init__(self, folder, ranks=1):
        super().__init__(folder)
        self.ranks, self.micro_steps = ranks, ACCUMULATION // ranks
        self.reference, self.stopped = self.folder / 'reference', self.folder / 'stopped'
        self.seconds = self.run('train.py', *self.flags(self.reference), ranks=ranks).seconds
        result = self.launcher.run('train.py', *self.flags(self.stopped), ranks=ranks, fault=dict(
            kind='signal', number=signal.SIGKILL, iteration=STOP, micro_steps=self.micro_steps))
        expect(result.codes[0] == -signal.SIGKILL, 'the run to be stopped was not', result)

    def flags(self, out_dir, **changes):
        return super().flags(out_dir, strategy=strategy, checkpoint='sharded' if sharded else 'gathered', **changes)

    def new_out_dir(self, start=None):
        """A folder for a trial: one that does not exist yet, or a copy of `start`."""
        out_dir = Path(tempfile.mkdtemp(prefix='out-', dir=self.folder))
        if start:
            shutil.copytree(start, out_dir, dirs_exist_ok=True)
        else:
            out_dir.rmdir()
        return out_dir

    def resume(self, launcher, out_dir, *flags, **options):
        """Start or resume the run in out_dir, with --init_from=auto. Returns the Result."""
        return launcher.run('train.py', *self.flags(out_dir, init_from='auto'), *flags, ranks=self.ranks, **options)

    def finish(self, launcher, out_dir, *flags):
        """Resume the run to its end, and compare it with the reference. Returns the Result."""
        result = self.resume(launcher, out_dir, *flags)
        expect(set(result.codes) == {0} and not result.stderr, 'the restart failed', result)
        self.compare(out_dir)
        return result

    def compare(self, out_dir):
        different = differences(out_dir, self.reference)
        expect(not different, f'not as without the fault: {"; ".join(different[:4])}')


# What is compared

def differences(out_dir, reference):
    """Where two finished runs differ, as a list of lines: in tensors and numbers of state.pt and
    ckpt.pt, and in lines of metrics.jsonl but for their clock fields."""
    found = []
    for path in sorted((Path(reference) / 'state').glob('*.safetensors')):      # with --checkpoint=sharded
        found += compare_values(*(load_file(folder / path.name) for folder in (Path(out_dir) / 'state', path.parent)), path.name)
    for name in ('state/run.pt',) if sharded else (gathered.STATE, gathered.MODEL):
        found += compare_values(*(gathered.read(Path(folder) / name) for folder in (out_dir, reference)), name)
    records, expected = read_records(out_dir), read_records(reference)
    if records != expected:
        line = next((i for i, (a, b) in enumerate(zip(records, expected)) if a != b), 'the end')
        found.append(f'metrics.jsonl from line {line} on')
    return found


def compare_values(a, b, where):
    if type(a) is not type(b):
        return [f'{where}: {type(a).__name__}, {type(b).__name__}']
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        # Two runs may differ in their folder, the name of their dataset, in how they began, and in the
        # learning rate that was set last: each step sets it anew.
        names = [name for name in {**a, **b} if name not in ('out_dir', 'dataset', 'init_from', 'lr')]
        return [line for name in names for line in (
            compare_values(a[name], b[name], f'{where} {name}') if name in a and name in b else [f'{where}: {name}'])]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b)) for line in compare_values(*pair, f'{where} {i}')]
    return [] if a == b else [f'{where}: {a!r}, {b!r}']


def read_files(folder, names=FILES):
    paths = [folder / name for name in names] + sorted((folder / 'state').glob('*'))
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def expect_one_line(result, *words):
    """Every rank failed with exit code 1, and together they printed one line, which contains `words`."""
    expect(set(result.codes) == {1} and not result.timed_out, 'it should exit 1 on every rank', result)
    expect(result.stderr.count('\n') == 1 and all(word in result.stderr for word in words), f'one line with {words}', result)


def expect_no_temporary_files(out_dir):
    left = [path.name for path in out_dir.glob('*.tmp')]
    expect(not left, f'left behind: {left}')


# Trials. Each takes a Lab, a Launcher and a random.Random, and returns notes for the table.

def random_save_step(rng, size):
    """A save, a step of it and an offset at which the fault strikes. Saves 0, 2, 4... are of state.pt."""
    step = rng.choice(SAVE_STEPS)
    save = rng.choice((2, 4, 6, 8)) if step == 'rename previous' else rng.randrange(9)
    return dict(save=save, step=step, offset=rng.randrange(size))


def run_into_signal(lab, launcher, out_dir, rng, number, in_save, **options):
    """Run until a signal strikes, in a save or at any time. Returns the Result."""
    rank = 0 if in_save else rng.randrange(lab.ranks)
    fault = dict(kind='signal', number=number, rank=rank, **options)
    if in_save:
        size = (lab.reference / ('state/run.pt' if sharded else gathered.STATE)).stat().st_size
        return lab.resume(launcher, out_dir, fault=dict(fault, **random_save_step(rng, size)))
    if rng.random() < 0.5 or number != signal.SIGKILL:      # in a step, perhaps between its micro-batches
        return lab.resume(launcher, out_dir, fault=dict(fault, iteration=rng.randrange(ITERATIONS),
                                                        micro_steps=lab.micro_steps, delay=rng.uniform(0, 0.01)))
    pids = launcher.start('train.py', *lab.flags(out_dir, init_from='auto'), ranks=lab.ranks)
    time.sleep(rng.uniform(0, lab.seconds))                 # from outside, so perhaps during start-up
    try:
        os.kill(pids[rank], number)
    except ProcessLookupError:
        pass                                                # it has finished
    return launcher.wait()


def kill(lab, launcher, rng):
    out_dir, in_save = lab.new_out_dir(), rng.random() < 0.5
    for _ in range(1 + (rng.random() < 0.3)):               # the restart may be killed as well
        result = run_into_signal(lab, launcher, out_dir, rng, signal.SIGKILL, in_save)
        if -signal.SIGKILL not in result.codes:
            raise FaultMissed
        expect(0 not in result.codes and not result.timed_out, 'the other rank should fail too', result)
    lab.finish(launcher, out_dir)
    expect_no_temporary_files(out_dir)
    return ['in save'] if in_save else []


def stop(number):
    """The trial of a signal that saves the state and ends the run."""
    def trial(lab, launcher, rng):
        out_dir, in_save = lab.new_out_dir(), rng.random() < 0.3
        result = run_into_signal(lab, launcher, out_dir, rng, number, in_save, times=rng.choice((1, 2)))
        if set(result.codes) == {0}:
            raise FaultMissed
        expect(set(result.codes) == {128 + number} and not result.stderr, f'it should exit {128 + number}', result)
        iter_num = run_folder.load_state(out_dir)[0]['iter_num']
        expect(f'saved at iteration {iter_num};' in result.stdout, 'it should print where it saved', result)
        lab.finish(launcher, out_dir)
        return ['in save'] if in_save else []
    return trial


def full(lab, launcher, rng):
    out_dir, save = lab.new_out_dir(lab.stopped), rng.randrange(4)      # ckpt.pt and state.pt, twice each
    before, name = read_files(out_dir), FILES[save % 2]
    offset = rng.randrange((lab.reference / name).stat().st_size)
    result = lab.resume(launcher, out_dir, fault=dict(kind='full disk', save=save, offset=offset))
    expect_one_line(result, name, 'could not be written')
    expect_no_temporary_files(out_dir)
    if save == 0:
        expect(read_files(out_dir) == before, 'files changed')
    gathered.load_model(out_dir)
    expect(run_folder.load_state(out_dir)[1] == [], 'the state before should load')
    lab.finish(launcher, out_dir)
    return ['in save']


def damage(path, rng):
    """Flip a bit, cut the file, or set a part of it to zero. Returns what was done."""
    data, position = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
    kind = rng.choice(('flip', 'flip', 'cut', 'zero'))
    if kind == 'flip':
        data[position] ^= 1 << rng.randrange(8)
    elif kind == 'cut':
        del data[position:]
    else:
        end = min(len(data), position + rng.choice((1, 512, 4096, len(data))))
        data[position:end] = bytes(end - position)
    path.write_bytes(data)
    return f'{kind} at {position}'


def loads(path):
    try:
        return bool(gathered.validate(gathered.read(path), path))
    except UserError:
        return False


def flip(lab, launcher, rng):
    out_dir, both, then_kill = lab.new_out_dir(lab.stopped), rng.random() < 0.25, rng.random() < 0.25
    damaged = [out_dir / name for name in (gathered.STATE, gathered.PREVIOUS)[:1 + both]]
    what = [damage(path, rng) for path in damaged]
    still_loads = [path for path in damaged if loads(path)]     # the damage hit bytes that nothing reads
    if both and not still_loads:
        before = read_files(out_dir)
        result = lab.resume(launcher, out_dir)
        expect(set(result.codes) == {2} and result.stderr.count('\n') == 1, f'exit 2, one line ({what})', result)
        expect(all(str(path) in result.stderr for path in damaged), f'both files named ({what})', result)
        expect(read_files(out_dir) == before, f'nothing changed ({what})')
        return ['both damaged']
    if then_kill:                       # the save after the fall-back must not keep the damaged file
        lab.resume(launcher, out_dir, fault=dict(kind='signal', number=signal.SIGKILL, save=rng.randrange(4),
                                                 step=rng.choice(SAVE_STEPS), offset=0))
    result = lab.finish(launcher, out_dir)
    if not then_kill:
        is_named = f'note: {damaged[0]} ' in result.stdout
        expect(is_named == (damaged[0] not in still_loads), f'the damaged file named ({what})', result)
    return ['unread bytes'] if still_loads else []


def nan(lab, launcher, rng):
    out_dir, iteration = lab.new_out_dir(lab.stopped), rng.randrange(INTERVAL)
    before = read_files(out_dir)
    result = lab.resume(launcher, out_dir, fault=dict(
        kind='not finite', what=rng.choice(('loss', 'gradient')), iteration=iteration, micro_steps=lab.micro_steps,
        rank=rng.randrange(lab.ranks)))
    expect_one_line(result, f'iteration {10 + iteration}:')
    expect(read_files(out_dir) == before, 'files changed')
    lab.finish(launcher, out_dir)
    return []


def weights(lab, launcher, rng):
    """The weights become NaN, and SIGTERM asks for a save before any loss shows it."""
    out_dir = lab.new_out_dir(lab.stopped)
    before = read_files(out_dir)
    result = lab.resume(launcher, out_dir, fault=dict(kind='not finite', what='weights', iteration=rng.randrange(INTERVAL)))
    expect_one_line(result, 'state.pt was not written', 'is not finite')
    expect(read_files(out_dir) == before, 'files changed')
    lab.finish(launcher, out_dir)
    return ['in save']


def pipe(lab, launcher, rng):
    """The reader of stdout ends, as `tee` does of Ctrl-C or `head` of having read enough."""
    out_dir, number = lab.new_out_dir(), rng.choice((0, signal.SIGINT))
    result = lab.resume(launcher, out_dir, fault=dict(kind='no reader', number=number, iteration=rng.randrange(ITERATIONS - 1),
                                                      micro_steps=lab.micro_steps))
    expect(set(result.codes) == {128 + number if number else 0} and not result.stderr, 'it should run on, or save', result)
    if number:
        expect(run_folder.load_state(out_dir)[1] == [], 'the state should load')
        lab.finish(launcher, out_dir)
    else:
        lab.compare(out_dir)
    return ['in save'] if number else []


def cache(lab, launcher, rng):
    """train.bin gets other tokens, but the same size and time of change as the cached check of it has."""
    out_dir = lab.new_out_dir()
    folder = lab.folder / 'data' / out_dir.name
    shutil.copytree(lab.folder / 'data' / 'toy', folder)
    flags = [f'--dataset={folder.name}']
    result = launcher.run('train.py', *lab.flags(out_dir, max_iters=10), *flags, ranks=lab.ranks)
    expect(set(result.codes) == {0}, 'the first half failed', result)
    path, beyond = folder / 'train.bin', rng.random() < 0.5
    tokens, stat = path.read_bytes(), path.stat()
    at = 2 * rng.randrange(len(tokens) // 2)
    path.write_bytes(tokens[:at] + bytes([200 if beyond else (tokens[at] + 1) % 17, 0]) + tokens[at + 2:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = lab.resume(launcher, out_dir, *flags)
    expect(set(result.codes) == {2} and result.stderr.count('\n') == 1 and
           ('beyond the vocabulary' if beyond else 'is not what the run was trained on') in result.stderr,
           'it should notice', result)
    path.write_bytes(tokens)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    lab.finish(launcher, out_dir, *flags)
    return []


# Trials under torchrun, on 2 ranks

def run_torchrun(lab, out_dir, fault, *options, timeout):
    """(exit code, stderr, seconds from the fault to the end of the other rank)."""
    report = lab.folder / f'{out_dir.name}.time'
    command = [sys.executable, *torchrun_options(2), *options, str(TESTS / 'launcher.py'), 'train.py',
               *lab.flags(out_dir, init_from='auto', rank_timeout=timeout)]
    pid_of_other, ended, errors = Path(f'{report}.pid{1 - fault["rank"]}'), time.time(), out_dir.with_suffix('.err')
    environment = script_environment(FAULT=json.dumps(dict(fault, report=str(report))))
    with open(errors, 'w', encoding='utf-8') as file, subprocess.Popen(
            command, cwd=lab.folder, stdout=subprocess.DEVNULL, stderr=file, env=environment) as agent:
        while agent.poll() is None:
            if not pid_of_other.exists() or is_running(pid_of_other.read_text(encoding='utf-8') or '0'):
                ended = time.time()
            time.sleep(0.05)
    stderr = errors.read_text(encoding='utf-8')
    expect(report.exists(), f'the fault did not strike: {stderr[-1500:]}')
    return agent.returncode, stderr, ended - float(report.read_text(encoding='utf-8'))


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def random_moment(lab, rng, number):
    return dict(kind='signal', number=number, rank=rng.randrange(2), iteration=rng.randrange(ITERATIONS - 2),
                micro_steps=lab.micro_steps, delay=rng.uniform(0, 0.005))


def expect_lost_rank(code, stderr, seconds, limit):
    """The other rank ended within `limit` seconds, and printed one line."""
    lines = [line for line in stderr.splitlines() if line.startswith('train.py:')]
    expect(code != 0 and seconds < limit, f'exit {code} after {seconds:.1f} s, limit {limit}')
    expect(len(lines) == 1 and 'another rank' in lines[0], f'one line about the lost rank: {stderr[:2500]}')


def freeze(lab, launcher, rng):
    out_dir, timeout = lab.new_out_dir(), 5
    result = run_torchrun(lab, out_dir, random_moment(lab, rng, signal.SIGSTOP), timeout=timeout)
    expect_lost_rank(*result, timeout + 30)             # torchrun kills the frozen rank 30 s later
    lab.finish(launcher, out_dir)
    return []


def lost(lab, launcher, rng):
    out_dir, restarts = lab.new_out_dir(), rng.random() < 0.5
    code, stderr, seconds = run_torchrun(lab, out_dir, random_moment(lab, rng, signal.SIGKILL),
                                         *(['--max-restarts=1'] if restarts else []), timeout=20)
    if restarts:
        expect(code == 0, f'torchrun should start it again: {stderr[:2500]}')
        lab.compare(out_dir)
        return ['restarted']
    expect_lost_rank(code, stderr, seconds, 30)
    lab.finish(launcher, out_dir)
    return []


TRIALS = dict(kill=kill, term=stop(signal.SIGTERM), int=stop(signal.SIGINT), hup=stop(signal.SIGHUP),
              usr1=stop(signal.SIGUSR1), full=full, flip=flip, nan=nan, weights=weights, pipe=pipe, cache=cache,
              freeze=freeze, lost=lost)


def run_trial(lab, launcher, name, key):
    """Run the trial again until its fault strikes. Returns notes for the table, or raises Failure."""
    for attempt in range(20):
        try:
            return TRIALS[name](lab, launcher, random.Random(f'{key} {attempt}'))
        except FaultMissed:
            continue
    raise Failure('the fault never struck')


def main():
    if fault not in (*FAULTS, 'mix'):
        raise UserError(f'fault={fault!r} is unknown; try {", ".join(FAULTS)} or mix')
    configurator.check_range(globals(), 'trials workers', 1)
    configurator.check_range(globals(), 'ranks', 1, 2)
    mix = [name for name in FAULTS if not (sharded and name in OF_SINGLE_FILES)]
    plan = [(name, i) for i in range(trials) for name in (mix if fault == 'mix' else [fault])][:trials]

    def ranks_of(name):
        return 2 if name in ON_TWO_RANKS else ranks

    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='chaos-'))
        labs = {n: Lab(Path(folder) / f'{n}-ranks', n) for n in sorted({ranks_of(name) for name, _ in plan})}
        for lab in labs.values():
            stack.callback(lab.close)
        tally, bar = Counter(), tqdm(total=len(plan), disable=None)
        free_launchers = [{n: lab.new_launcher() for n, lab in labs.items()} for _ in range(workers)]

        def work(job):
            name, i = job
            n, launchers, began = ranks_of(name), free_launchers.pop(), time.monotonic()
            try:
                for note in run_trial(labs[n], launchers[n], name, f'{seed} {name} {i}'):
                    tally[name, note] += 1
            except Failure as failure:
                tally[name, 'failures'] += 1
                bar.write(f'{name} {i} failed: {failure}')
            finally:
                free_launchers.append(launchers)
            tally[name, 'trials'] += 1
            tally[name, 'seconds'] += time.monotonic() - began
            bar.update()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, plan))
        bar.close()
    columns = ('trials', 'in save', 'both damaged', 'unread bytes', 'restarted', 'failures')
    print(f'{"fault":<8}' + ''.join(f'{column:>14}' for column in columns) + '   seconds each')
    for name in FAULTS:
        if tally[name, 'trials']:
            print(f'{name:<8}' + ''.join(f'{tally[name, column]:>14}' for column in columns)
                  + f'{tally[name, "seconds"] / tally[name, "trials"]:>15.1f}')
    failures = sum(tally[name, 'failures'] for name in FAULTS)
    print(f'{len(plan)} trials, {failures} failures')
    raise SystemExit(1 if failures else 0)


if __name__ == '__main__':
    with console.report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
