"""Break training runs on purpose, and compare what is left with an uninterrupted run.

    python tests/chaos.py --trials=100
    python tests/chaos.py --trials=50 --fault=kill --ranks=3

Each trial trains a small model on the CPU with dropout, saving every 5 iterations. It injects one
fault, starts the run again with --init_from=auto, and compares every tensor of state.pt and ckpt.pt
and every logged number with the uninterrupted run. The exit code is 1 if any trial lost or changed
anything. The processes and the signals are real.
"""

import json
import math
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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))      # the project's own files
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
    write_masked_dataset,
)
from launcher import SAVE_STEPS, script_environment
from safetensors.torch import load_file
from tqdm import tqdm

import configurator
from engine.checkpoint import gathered, run_folder
from engine.errors import UserError

# trials
trials = 26             # in all; a mix takes the faults in turn
fault = 'mix'           # kill, term, int, hup, usr1, full, flip, nan, weights, pipe, cache, freeze,
                        # lost, or mix
ranks = 1               # processes of a run, up to 4; freeze and lost always take 2, under torchrun
strategy = 'ddp'        # of several ranks: ddp, fsdp or hsdp
mixture = False         # True reads a mixture of two datasets, one of them with masks
sharded = False         # True saves with --checkpoint=sharded, and omits the faults of single files
seed = 0                # of where the faults strike
workers = 2             # trials at a time

STOP = 12               # iteration in which the stopped run was killed
FILES = (gathered.MODEL, gathered.STATE, gathered.PREVIOUS)
FAULTS = ('kill', 'term', 'int', 'hup', 'usr1', 'full', 'flip', 'nan', 'weights', 'pipe', 'cache',
          'freeze', 'lost')
ON_TWO_RANKS = ('freeze', 'lost')
OF_SINGLE_FILES = ('full', 'flip', 'weights')


class Failure(Exception):
    """A trial lost or changed something, or printed the wrong thing."""


class FaultMissed(Exception):
    """The fault came too late, or at a step that this save did not take: no trial that counts."""


def expect(condition, message, result=None):
    """Raise Failure with `message` unless the condition holds."""
    if condition:
        return
    if result:
        message += f'; codes {result.codes}, stderr: {result.stderr[-1500:]}'
    raise Failure(message)


class Lab(Workspace):
    """A workspace with two runs to compare with and to begin from.

    reference: the out_dir of an uninterrupted run. stopped: of a run that was killed in iteration
    STOP. Its state.pt holds iteration 10, and its state.prev.pt iteration 5.
    """

    def __init__(self, folder, ranks=1):
        super().__init__(folder)
        self.ranks = ranks
        # the fewest micro-batches that divide over the ranks
        self.micro_steps = math.ceil(ACCUMULATION / ranks)
        write_masked_dataset(self.folder / 'data' / 'masked')
        self.reference = self.folder / 'reference'
        self.stopped = self.folder / 'stopped'

        finished = self.run('train.py', *self.flags(self.reference), ranks=ranks)
        self.seconds = finished.seconds

        fault = dict(kind='signal', number=signal.SIGKILL, iteration=STOP,
                     micro_steps=self.micro_steps)
        result = self.launcher.run('train.py', *self.flags(self.stopped), ranks=ranks, fault=fault)
        expect(result.codes[0] == -signal.SIGKILL, 'the run to be stopped was not', result)

    def flags(self, out_dir, **changes):
        kind = 'sharded' if sharded else 'gathered'
        micro_batches = self.micro_steps * self.ranks
        return super().flags(out_dir, strategy=strategy, checkpoint=kind, dataset=read_dataset(),
                             gradient_accumulation_steps=micro_batches, **changes)

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
        flags = (*self.flags(out_dir, init_from='auto'), *flags)
        return launcher.run('train.py', *flags, ranks=self.ranks, **options)

    def finish(self, launcher, out_dir, *flags):
        """Resume the run to its end, and compare it with the reference. Returns the Result."""
        result = self.resume(launcher, out_dir, *flags)
        expect(set(result.codes) == {0} and not result.stderr, 'the restart failed', result)
        self.compare(out_dir)
        return result

    def compare(self, out_dir):
        different = differences(out_dir, self.reference)
        expect(not different, f'not as without the fault: {"; ".join(different[:4])}')


def read_dataset(name='toy'):
    """What a trial sets `dataset` to, where `name` is the toy dataset or a copy of it."""
    if mixture:
        return f'{name}:0.7,masked:0.3'
    return name


# What is compared

def differences(out_dir, reference):
    """Where two finished runs differ, as a list of lines: in tensors and numbers of state.pt and
    ckpt.pt, and in lines of metrics.jsonl but for their clock fields."""
    found = []
    for path in sorted((Path(reference) / 'state').glob('*.safetensors')):  # of a sharded state
        tensors = load_file(Path(out_dir) / 'state' / path.name)
        found += compare_values(tensors, load_file(path), path.name)

    names = ('state/run.pt',) if sharded else (gathered.STATE, gathered.MODEL)
    for name in names:
        a = gathered.read(Path(out_dir) / name)
        b = gathered.read(Path(reference) / name)
        found += compare_values(a, b, name)

    # a mixture's records name the dataset, of which a trial may have a copy of its own
    copy = f'val/{Path(out_dir).name}_loss'
    records = [{'val/toy_loss' if name == copy else name: value for name, value in record.items()}
               for record in read_records(out_dir)]
    expected = read_records(reference)
    if records != expected:
        unequal = [i for i, (a, b) in enumerate(zip(records, expected)) if a != b]
        line = unequal[0] if unequal else 'the end'
        found.append(f'metrics.jsonl from line {line} on')
    return found


def compare_values(a, b, where):
    """Where two values differ, as a list of lines."""
    if type(a) is not type(b):
        return [f'{where}: {type(a).__name__}, {type(b).__name__}']
    if isinstance(a, torch.Tensor):
        is_same = a.dtype == b.dtype and torch.equal(a, b)
        return [] if is_same else [where]
    if isinstance(a, dict):
        return compare_dicts(a, b, where)
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        found = []
        for i, (x, y) in enumerate(zip(a, b)):
            found += compare_values(x, y, f'{where} {i}')
        return found
    return [] if a == b else [f'{where}: {a!r}, {b!r}']


def compare_dicts(a, b, where):
    found = []
    for name in {**a, **b}:
        # Two runs may differ in their folder, the name of their dataset, in how they began, and in
        # the learning rate that was set last: each step sets it anew.
        if name in ('out_dir', 'dataset', 'init_from', 'lr'):
            continue
        if name in a and name in b:
            found += compare_values(a[name], b[name], f'{where} {name}')
        else:
            found.append(f'{where}: {name}')
    return found


def read_files(folder, names=FILES):
    paths = [folder / name for name in names] + sorted((folder / 'state').glob('*'))
    return {path.name: path.read_bytes() for path in paths if path.exists()}


def expect_one_line(result, *words):
    """Every rank failed with exit code 1, and together they printed one line with `words`."""
    expect(set(result.codes) == {1} and not result.timed_out,
           'it should exit 1 on every rank', result)
    has_words = all(word in result.stderr for word in words)
    expect(result.stderr.count('\n') == 1 and has_words, f'one line with {words}', result)


def expect_refusal(result, why):
    """Every rank exited 2, and together they printed one line."""
    expect(set(result.codes) == {2} and result.stderr.count('\n') == 1, why, result)


def expect_no_temporary_files(out_dir):
    left = [path.name for path in out_dir.glob('*.tmp')]
    expect(not left, f'left behind: {left}')


# Trials. Each takes a Lab, a Launcher and a random.Random, and returns notes for the table.

def random_save_step(rng, size):
    """A save, a step of it and an offset to strike at. Saves 0, 2, 4... are of state.pt."""
    step = rng.choice(SAVE_STEPS)
    if step == 'rename previous':
        save = rng.choice((2, 4, 6, 8))
    else:
        save = rng.randrange(9)
    return dict(save=save, step=step, offset=rng.randrange(size))


def run_into_signal(lab, launcher, out_dir, rng, number, in_save, **options):
    """Run until a signal strikes, in a save or at any time. Returns the Result."""
    rank = 0 if in_save else rng.randrange(lab.ranks)
    fault = dict(kind='signal', number=number, rank=rank, **options)

    if in_save:
        name = 'state/run.pt' if sharded else gathered.STATE
        size = (lab.reference / name).stat().st_size
        fault.update(random_save_step(rng, size))
        return lab.resume(launcher, out_dir, fault=fault)

    if rng.random() < 0.5 or number != signal.SIGKILL:  # in a step, perhaps between micro-batches
        fault.update(iteration=rng.randrange(ITERATIONS), micro_steps=lab.micro_steps,
                     delay=rng.uniform(0, 0.01))
        return lab.resume(launcher, out_dir, fault=fault)

    # from outside, so perhaps during start-up
    flags = lab.flags(out_dir, init_from='auto')
    pids = launcher.start('train.py', *flags, ranks=lab.ranks)
    time.sleep(rng.uniform(0, lab.seconds))
    try:
        os.kill(pids[rank], number)
    except ProcessLookupError:
        pass                                            # it has finished
    return launcher.wait()


def kill(lab, launcher, rng):
    out_dir = lab.new_out_dir()
    in_save = rng.random() < 0.5
    kills = 1 + (rng.random() < 0.3)                    # the restart may be killed as well
    for _ in range(kills):
        result = run_into_signal(lab, launcher, out_dir, rng, signal.SIGKILL, in_save)
        if -signal.SIGKILL not in result.codes:
            raise FaultMissed
        expect(0 not in result.codes and not result.timed_out,
               'the other rank should fail too', result)

    lab.finish(launcher, out_dir)
    expect_no_temporary_files(out_dir)
    return ['in save'] if in_save else []


def is_quiet(result, number):
    """True where stderr has nothing, but for the answer to Ctrl-C."""
    lines = result.stderr.splitlines()
    if number == signal.SIGINT:
        lines = [line for line in lines if not line.startswith('stopping after this iteration')]
    return not lines


def stop(number):
    """The trial of a signal that saves the state and ends the run."""
    def trial(lab, launcher, rng):
        out_dir = lab.new_out_dir()
        in_save = rng.random() < 0.3
        times = rng.choice((1, 2))
        result = run_into_signal(lab, launcher, out_dir, rng, number, in_save, times=times)
        if set(result.codes) == {0}:
            raise FaultMissed
        expect(set(result.codes) == {128 + number} and is_quiet(result, number),
               f'it should exit {128 + number}', result)

        # a second Ctrl-C ends a single process at once
        if number != signal.SIGINT or times == 1 or lab.ranks > 1:
            state, _ = run_folder.load_state(out_dir)
            expect(f'saved at iteration {state.iter_num};' in result.stdout,
                   'it should print where it saved', result)
        lab.finish(launcher, out_dir)
        return ['in save'] if in_save else []
    return trial


def full(lab, launcher, rng):
    out_dir = lab.new_out_dir(lab.stopped)
    save = rng.randrange(4)                             # ckpt.pt and state.pt, twice each
    name = FILES[save % 2]
    before = read_files(out_dir)
    offset = rng.randrange((lab.reference / name).stat().st_size)

    fault = dict(kind='full disk', save=save, offset=offset)
    result = lab.resume(launcher, out_dir, fault=fault)
    expect_one_line(result, name, 'could not be written')
    expect_no_temporary_files(out_dir)
    if save == 0:
        expect(read_files(out_dir) == before, 'files changed')

    gathered.read_ckpt(out_dir)
    _, notes = run_folder.load_state(out_dir)
    expect(notes == [], 'the state before should load')
    lab.finish(launcher, out_dir)
    return ['in save']


def damage(path, rng):
    """Flip a bit, cut the file, or set a part of it to zero. Returns what was done."""
    data = bytearray(path.read_bytes())
    position = rng.randrange(len(data))
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
        run_folder.read_state(path)
    except UserError:
        return False
    return True


def flip(lab, launcher, rng):
    out_dir = lab.new_out_dir(lab.stopped)
    both = rng.random() < 0.25
    then_kill = rng.random() < 0.25
    damaged = [out_dir / gathered.STATE]
    if both:
        damaged.append(out_dir / gathered.PREVIOUS)
    what = [damage(path, rng) for path in damaged]
    # The damage may have hit bytes that nothing reads.
    still_loads = [path for path in damaged if loads(path)]

    if both and not still_loads:
        before = read_files(out_dir)
        result = lab.resume(launcher, out_dir)
        expect_refusal(result, f'exit 2, one line ({what})')
        are_named = all(str(path) in result.stderr for path in damaged)
        expect(are_named, f'both files named ({what})', result)
        expect(read_files(out_dir) == before, f'nothing changed ({what})')
        return ['both damaged']

    if then_kill:               # the save after the fall-back must not keep the damaged file
        fault = dict(kind='signal', number=signal.SIGKILL, save=rng.randrange(4),
                     step=rng.choice(SAVE_STEPS), offset=0)
        lab.resume(launcher, out_dir, fault=fault)
    result = lab.finish(launcher, out_dir)
    if not then_kill:
        is_named = f'note: {damaged[0]} ' in result.stdout
        should_be = damaged[0] not in still_loads
        expect(is_named == should_be, f'the damaged file named ({what})', result)
    return ['unread bytes'] if still_loads else []


def nan(lab, launcher, rng):
    out_dir = lab.new_out_dir(lab.stopped)
    iteration = rng.randrange(INTERVAL)
    before = read_files(out_dir)
    fault = dict(kind='not finite', what=rng.choice(('loss', 'gradient')), iteration=iteration,
                 micro_steps=lab.micro_steps, rank=rng.randrange(lab.ranks))
    result = lab.resume(launcher, out_dir, fault=fault)
    expect_one_line(result, f'iteration {10 + iteration}:')
    expect(read_files(out_dir) == before, 'files changed')
    lab.finish(launcher, out_dir)
    return []


def weights(lab, launcher, rng):
    """The weights become NaN, and SIGTERM asks for a save before any loss shows it."""
    out_dir = lab.new_out_dir(lab.stopped)
    before = read_files(out_dir)
    fault = dict(kind='not finite', what='weights', iteration=rng.randrange(INTERVAL))
    result = lab.resume(launcher, out_dir, fault=fault)
    expect_one_line(result, 'state.pt was not written', 'is not finite')
    expect(read_files(out_dir) == before, 'files changed')
    lab.finish(launcher, out_dir)
    return ['in save']


def pipe(lab, launcher, rng):
    """The reader of stdout ends, as `tee` does of Ctrl-C or `head` of having read enough."""
    out_dir = lab.new_out_dir()
    number = rng.choice((0, signal.SIGINT))
    fault = dict(kind='no reader', number=number, iteration=rng.randrange(ITERATIONS - 1),
                 micro_steps=lab.micro_steps)
    result = lab.resume(launcher, out_dir, fault=fault)
    code = 128 + number if number else 0
    expect(set(result.codes) == {code} and is_quiet(result, number), 'it should run on, or save',
           result)

    if not number:
        lab.compare(out_dir)
        return []
    _, notes = run_folder.load_state(out_dir)
    expect(notes == [], 'the state should load')
    lab.finish(launcher, out_dir)
    return ['in save']


def cache(lab, launcher, rng):
    """train.bin gets other tokens, but has the size and time of change of its cached check."""
    out_dir = lab.new_out_dir()
    folder = lab.folder / 'data' / out_dir.name
    shutil.copytree(lab.folder / 'data' / 'toy', folder)
    flag = f'--dataset={read_dataset(folder.name)}'
    result = launcher.run('train.py', *lab.flags(out_dir, max_iters=10), flag, ranks=lab.ranks)
    expect(set(result.codes) == {0}, 'the first half failed', result)

    # another token in one place
    path = folder / 'train.bin'
    stat = path.stat()
    tokens = path.read_bytes()
    is_beyond = rng.random() < 0.5
    at = 2 * rng.randrange(len(tokens) // 2)
    token = 200 if is_beyond else (tokens[at] + 1) % 17
    path.write_bytes(tokens[:at] + bytes([token, 0]) + tokens[at + 2:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    result = lab.resume(launcher, out_dir, flag)
    words = 'beyond the vocabulary' if is_beyond else 'is not what the run was trained on'
    expect_refusal(result, 'it should notice')
    expect(words in result.stderr, 'it should notice', result)

    # and back again
    path.write_bytes(tokens)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    lab.finish(launcher, out_dir, flag)
    return []


# Trials under torchrun, on 2 ranks

def run_torchrun(lab, out_dir, fault, *options, timeout):
    """(exit code, stderr, seconds from the fault to the end of the other rank)."""
    report = lab.folder / f'{out_dir.name}.time'
    pid_of_other = Path(f'{report}.pid{1 - fault["rank"]}')
    errors = out_dir.with_suffix('.err')
    command = [sys.executable, *torchrun_options(2), *options, str(TESTS / 'launcher.py'),
               'train.py', *lab.flags(out_dir, init_from='auto', rank_timeout=timeout)]
    environment = script_environment(FAULT=json.dumps(dict(fault, report=str(report))))

    ended = time.time()
    with open(errors, 'w', encoding='utf-8') as file, subprocess.Popen(
            command, cwd=lab.folder, stdout=subprocess.DEVNULL, stderr=file,
            env=environment) as agent:
        while agent.poll() is None:
            has_begun = pid_of_other.exists()
            if not has_begun or is_running(pid_of_other.read_text(encoding='utf-8') or '0'):
                ended = time.time()
            time.sleep(0.05)

    stderr = errors.read_text(encoding='utf-8')
    expect(report.exists(), f'the fault did not strike: {stderr[-1500:]}')
    return agent.returncode, stderr, ended - float(report.read_text(encoding='utf-8'))


def is_running(pid):
    try:
        stat = Path(f'/proc/{pid}/stat').read_text(encoding='utf-8')
    except OSError:
        return False
    return stat.rsplit(')', 1)[1].split()[0] != 'Z'


def random_moment(lab, rng, number):
    return dict(kind='signal', number=number, rank=rng.randrange(2),
                iteration=rng.randrange(ITERATIONS - 2), micro_steps=lab.micro_steps,
                delay=rng.uniform(0, 0.005))


def expect_lost_rank(code, stderr, seconds, limit):
    """The other rank ended within `limit` seconds, and printed one line."""
    lines = [line for line in stderr.splitlines() if line.startswith('train.py:')]
    expect(code != 0 and seconds < limit, f'exit {code} after {seconds:.1f} s, limit {limit}')
    expect(len(lines) == 1 and 'another rank' in lines[0],
           f'one line about the lost rank: {stderr[:2500]}')


def freeze(lab, launcher, rng):
    out_dir = lab.new_out_dir()
    timeout = 5
    fault = random_moment(lab, rng, signal.SIGSTOP)
    result = run_torchrun(lab, out_dir, fault, timeout=timeout)
    expect_lost_rank(*result, timeout + 30)             # torchrun kills the frozen rank 30 s later
    lab.finish(launcher, out_dir)
    return []


def lost(lab, launcher, rng):
    out_dir = lab.new_out_dir()
    restarts = rng.random() < 0.5
    options = ['--max-restarts=1'] if restarts else []
    fault = random_moment(lab, rng, signal.SIGKILL)
    code, stderr, seconds = run_torchrun(lab, out_dir, fault, *options, timeout=20)
    if restarts:
        expect(code == 0, f'torchrun should start it again: {stderr[:2500]}')
        lab.compare(out_dir)
        return ['restarted']
    expect_lost_rank(code, stderr, seconds, 30)
    lab.finish(launcher, out_dir)
    return []


TRIALS = dict(
    kill=kill,
    term=stop(signal.SIGTERM),
    int=stop(signal.SIGINT),
    hup=stop(signal.SIGHUP),
    usr1=stop(signal.SIGUSR1),
    full=full,
    flip=flip,
    nan=nan,
    weights=weights,
    pipe=pipe,
    cache=cache,
    freeze=freeze,
    lost=lost,
)


# The command

def run_trial(lab, launcher, name, key):
    """Run the trial until its fault strikes. Returns notes for the table, or raises Failure."""
    for attempt in range(20):
        try:
            return TRIALS[name](lab, launcher, random.Random(f'{key} {attempt}'))
        except FaultMissed:
            continue
    raise Failure('the fault never struck')


def ranks_of(name):
    return 2 if name in ON_TWO_RANKS else ranks


def plan_trials():
    """[(fault, number of the trial of that fault)]"""
    names = [fault]
    if fault == 'mix':
        names = [name for name in FAULTS if not (sharded and name in OF_SINGLE_FILES)]
    plan = [(name, i) for i in range(trials) for name in names]
    return plan[:trials]


def run_trials(plan):
    """Run the trials, `workers` at a time. Returns {(fault, what): count or seconds}."""
    tally = Counter()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='chaos-'))
        labs = {n: Lab(Path(folder) / f'{n}-ranks', n)
                for n in sorted({ranks_of(name) for name, _ in plan})}
        for lab in labs.values():
            stack.callback(lab.close)
        free_launchers = [{n: lab.new_launcher() for n, lab in labs.items()}
                          for _ in range(workers)]
        bar = tqdm(total=len(plan), disable=None)

        def work(job):
            name, i = job
            n = ranks_of(name)
            launchers = free_launchers.pop()
            began = time.monotonic()
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
    return tally


def print_table(tally):
    columns = ('trials', 'in save', 'both damaged', 'unread bytes', 'restarted', 'failures')
    print(f'{"fault":<8}' + ''.join(f'{column:>14}' for column in columns) + '   seconds each')
    for name in FAULTS:
        if tally[name, 'trials']:
            counts = ''.join(f'{tally[name, column]:>14}' for column in columns)
            seconds = tally[name, 'seconds'] / tally[name, 'trials']
            print(f'{name:<8}{counts}{seconds:>15.1f}')


def main():
    if fault not in (*FAULTS, 'mix'):
        raise UserError(f'fault={fault!r} is unknown; try {", ".join(FAULTS)} or mix')
    configurator.check_range(globals(), 'trials workers', 1)
    configurator.check_range(globals(), 'ranks', 1, 4)

    plan = plan_trials()
    tally = run_trials(plan)
    print_table(tally)
    failures = sum(tally[name, 'failures'] for name in FAULTS)
    print(f'{len(plan)} trials, {failures} failures')
    raise SystemExit(1 if failures else 0)


if __name__ == '__main__':
    with console.report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
