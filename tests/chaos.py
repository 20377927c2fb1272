"""Break training runs on purpose, and compare what is left with a run that was left alone.

    python tests/chaos.py --trials=100
    python tests/chaos.py --trials=50 --fault=kill --ranks=2

Each trial trains a small model on the CPU with dropout, saving every 5 iterations, injects one
fault, starts again with --init_from=auto, and compares every tensor of state.pt and ckpt.pt and
every logged number with the uninterrupted run. Exit code 1 where any trial lost or changed
anything. The processes are real and so are the signals that they die of.
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

import numpy as np
import torch
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
import checkpoint               # noqa: E402
import configurator             # noqa: E402
from launcher import SAVE_STEPS, Launcher   # noqa: E402

# trials
trials = 18             # in all; a mix takes the faults in turn
fault = 'mix'           # kill, term, int, usr1, full, flip, nan, freeze, lost, or mix
ranks = 1               # processes of a run; freeze and lost always take 2, under torchrun
seed = 0                # of where the faults strike
workers = 2             # trials at a time

ITERATIONS, INTERVAL, STOP, ACCUMULATION = 20, 5, 12, 2
MODEL_FLAGS = dict(dataset='letters', n_layer=2, n_head=2, n_embd=32, block_size=32, batch_size=2, dropout=0.2,
                   gradient_accumulation_steps=ACCUMULATION, max_iters=ITERATIONS, lr_decay_iters=ITERATIONS,
                   warmup_iters=2, eval_interval=INTERVAL, eval_iters=2, learning_rate=1e-2, min_lr=1e-3,
                   device='cpu', rank_timeout=20)
CLOCK = ('seconds', 'ms', 'tokens_per_second', 'mfu')      # what no two runs share
FILES = (checkpoint.MODEL, checkpoint.STATE, checkpoint.PREVIOUS)
FAULTS = ('kill', 'term', 'int', 'usr1', 'full', 'flip', 'nan', 'freeze', 'lost')


class Failure(Exception):
    """What a trial lost, changed or said wrongly."""


class Missed(Exception):
    """The fault came too late, or to a step that this save did not take: no trial."""


def expect(condition, what, ended=None):
    if not condition:
        raise Failure(what + (f'; codes {ended.codes}, stderr: {ended.err[-1500:]}' if ended else ''))


class Lab:
    """A folder with a copy of the project and a small dataset, and the runs to compare with.

    reference: of an uninterrupted run. stopped: of one that was killed in iteration STOP, when
    state.pt holds iteration 10 and state.prev.pt iteration 5.
    """

    def __init__(self, folder, ranks=1):
        self.folder, self.ranks, self.count = Path(folder), ranks, 0
        copy_project(self.folder)
        make_dataset(self.folder / 'data' / MODEL_FLAGS['dataset'])
        self.launchers = []
        first = self.launcher()
        self.reference, self.stopped = self.folder / 'reference', self.folder / 'stopped'
        ended = first.run('train.py', *self.flags(self.reference), ranks=ranks)
        expect(ended.code == 0, 'the uninterrupted run failed', ended)
        self.seconds = ended.seconds
        ended = first.run('train.py', *self.flags(self.stopped), ranks=ranks, fault=dict(
            kind='signal', number=signal.SIGKILL, iteration=STOP, micros=self.micros))
        expect(ended.codes[0] == -signal.SIGKILL, 'the run to be stopped was not', ended)

    @property
    def micros(self):
        return ACCUMULATION // self.ranks

    def launcher(self):
        self.launchers.append(Launcher(self.folder))
        return self.launchers[-1]

    def flags(self, out, **more):
        return [f'--{name}={value}' for name, value in dict(MODEL_FLAGS, out_dir=out, **more).items()]

    def new_out(self, start=None):
        """A folder for a trial: not there yet, or a copy of `start`."""
        out = Path(tempfile.mkdtemp(prefix='out-', dir=self.folder))
        shutil.copytree(start, out, dirs_exist_ok=True) if start else out.rmdir()
        return out

    def finish(self, launcher, out, **options):
        """Go on to the end, and compare."""
        ended = launcher.run('train.py', *self.flags(out, init_from='auto'), ranks=self.ranks, **options)
        expect(set(ended.codes) == {0} and not ended.err, 'the restart failed', ended)
        self.compare(out)
        return ended

    def compare(self, out):
        different = differences(out, self.reference)
        expect(not different, f'not as without the fault: {"; ".join(different[:4])}')

    def close(self):
        for launcher in self.launchers:
            launcher.close()


def copy_project(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / 'config', folder / 'config', dirs_exist_ok=True)


def make_dataset(folder, characters='abcdefghijklmnop\n', tokens=6000):
    folder.mkdir(parents=True)
    walk = np.random.default_rng(0).integers(0, 3, tokens).cumsum() % len(characters)
    walk[:-1000].astype('<u2').tofile(folder / 'train.bin')
    walk[-1000:].astype('<u2').tofile(folder / 'val.bin')
    (folder / 'meta.json').write_text(json.dumps(
        dict(tokenizer='char', vocab_size=len(characters), chars=characters)), encoding='utf-8')


# What is compared

def differences(out, reference):
    """Where two finished runs differ, as a list of lines: tensors and numbers of state.pt and
    ckpt.pt, and every line of metrics.jsonl but for its clock."""
    found = []
    for name in (checkpoint.STATE, checkpoint.MODEL):
        found += compare_values(*(checkpoint.read(Path(folder) / name) for folder in (out, reference)), name)
    ours, theirs = (read_losses(folder) for folder in (out, reference))
    if ours != theirs:
        where = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), 'the end')
        found.append(f'metrics.jsonl from line {where} on')
    return found


def compare_values(a, b, where):
    if type(a) is not type(b):
        return [f'{where}: {type(a).__name__}, {type(b).__name__}']
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [where]
    if isinstance(a, dict):
        # where the runs lie and how they began; and the last step's lr, which each step sets anew
        keys = [key for key in {**a, **b} if key not in ('out_dir', 'init_from', 'lr')]
        return [line for key in keys for line in (
            compare_values(a[key], b[key], f'{where} {key}') if key in a and key in b else [f'{where}: {key}'])]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [line for i, pair in enumerate(zip(a, b)) for line in compare_values(*pair, f'{where} {i}')]
    return [] if a == b else [f'{where}: {a!r}, {b!r}']


def read_losses(folder):
    lines = (Path(folder) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in CLOCK} for line in lines]


def contents(folder, names=FILES):
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def one_line(ended, *words):
    """The run failed as it should: exit 1 on every rank, and one line in all, which has `words`."""
    expect(set(ended.codes) == {1} and not ended.hung, 'it should exit 1 on every rank', ended)
    expect(ended.err.count('\n') == 1 and all(word in ended.err for word in words), f'one line with {words}', ended)


def nothing_half_written(out):
    expect(not list(out.glob('*.tmp')), f'left behind: {[path.name for path in out.glob("*.tmp")]}')


# Trials: each takes a lab, a launcher and a source of chance, and returns notes for the table

def save_and_step(chance, size):
    """A save, a step of it, and an offset to strike at. Saves 0, 2, 4... are of state.pt."""
    step = chance.choice(SAVE_STEPS)
    save = chance.choice((2, 4, 6, 8)) if step == 'replace previous' else chance.randrange(9)
    return dict(save=save, step=step, offset=chance.randrange(size))


def strike(lab, launcher, out, chance, number, in_save, **more):
    """Run into a signal, in a save or at any time; which end it met."""
    rank = 0 if in_save else chance.randrange(lab.ranks)
    common = dict(kind='signal', number=number, rank=rank, **more)
    flags = lab.flags(out, init_from='auto')
    if in_save:
        size = (lab.reference / checkpoint.STATE).stat().st_size
        return launcher.run('train.py', *flags, ranks=lab.ranks, fault=dict(common, **save_and_step(chance, size)))
    if chance.random() < 0.5 or number != signal.SIGKILL:       # in a step, perhaps between its micro-batches
        return launcher.run('train.py', *flags, ranks=lab.ranks, fault=dict(
            common, iteration=chance.randrange(ITERATIONS), micros=lab.micros, delay=chance.uniform(0, 0.01)))
    pids = launcher.start('train.py', *flags, ranks=lab.ranks)  # from outside, start-up included
    time.sleep(chance.uniform(0, lab.seconds))
    try:
        os.kill(pids[rank], number)
    except ProcessLookupError:
        pass                                                    # it has finished
    return launcher.wait()


def kill(lab, launcher, chance):
    out, in_save = lab.new_out(), chance.random() < 0.5
    for _ in range(1 + (chance.random() < 0.3)):                # the restart may be killed as well
        ended = strike(lab, launcher, out, chance, signal.SIGKILL, in_save)
        if -signal.SIGKILL not in ended.codes:
            raise Missed
        expect(0 not in ended.codes and not ended.hung, 'the other rank should fail too', ended)
    lab.finish(launcher, out)
    nothing_half_written(out)
    return ['in save'] if in_save else []


def stop(number):
    def trial(lab, launcher, chance):
        out, in_save = lab.new_out(), chance.random() < 0.3
        ended = strike(lab, launcher, out, chance, number, in_save, times=chance.choice((1, 2)))
        if set(ended.codes) == {0}:
            raise Missed
        expect(set(ended.codes) == {128 + number} and not ended.err, f'it should exit {128 + number}', ended)
        saved = checkpoint.read(out / checkpoint.STATE)['iter_num']
        expect(f'saved at iteration {saved};' in ended.out, 'it should say where it saved', ended)
        lab.finish(launcher, out)
        return ['in save'] if in_save else []
    return trial


def full(lab, launcher, chance):
    out, save = lab.new_out(lab.stopped), chance.randrange(4)   # ckpt.pt and state.pt, twice each
    before, name = contents(out), FILES[save % 2]
    offset = chance.randrange((lab.reference / name).stat().st_size)
    ended = launcher.run('train.py', *lab.flags(out, init_from='auto'), ranks=lab.ranks,
                         fault=dict(kind='full', save=save, offset=offset))
    one_line(ended, name, 'could not be written')
    nothing_half_written(out)
    if save == 0:
        expect(contents(out) == before, 'files changed')
    checkpoint.load_model(out)
    expect(checkpoint.load_state(out)[1] == [], 'the state before should load')
    lab.finish(launcher, out)
    return ['in save']


def damage(path, chance):
    """Flip a bit, cut, or zero a piece."""
    data, at = bytearray(path.read_bytes()), chance.randrange(path.stat().st_size)
    kind = chance.choice(('flip', 'flip', 'cut', 'zero'))
    if kind == 'flip':
        data[at] ^= 1 << chance.randrange(8)
    elif kind == 'cut':
        del data[at:]
    else:
        end = min(len(data), at + chance.choice((1, 512, 4096, len(data))))
        data[at:end] = bytes(end - at)
    path.write_bytes(data)
    return f'{kind} at {at}'


def loads(path):
    try:
        return bool(checkpoint.check(checkpoint.read(path), path, ()))
    except ValueError:
        return False


def flip(lab, launcher, chance):
    out, both, then_kill = lab.new_out(lab.stopped), chance.random() < 0.25, chance.random() < 0.25
    damaged = [out / name for name in (checkpoint.STATE, checkpoint.PREVIOUS)[:1 + both]]
    how = [damage(path, chance) for path in damaged]
    unread = [path for path in damaged if loads(path)]          # it hit bytes that nothing reads
    if both and not unread:
        before = contents(out)
        ended = launcher.run('train.py', *lab.flags(out, init_from='auto'), ranks=lab.ranks)
        expect(set(ended.codes) == {2} and ended.err.count('\n') == 1, f'exit 2, one line ({how})', ended)
        expect(all(str(path) in ended.err for path in damaged), f'both files named ({how})', ended)
        expect(contents(out) == before, f'nothing changed ({how})')
        return ['both damaged']
    if then_kill:                       # the save after the fall-back must not keep the damaged file
        fault = dict(kind='signal', number=signal.SIGKILL, save=chance.randrange(4), step=chance.choice(SAVE_STEPS),
                     offset=0)
        launcher.run('train.py', *lab.flags(out, init_from='auto'), ranks=lab.ranks, fault=fault)
    ended = lab.finish(launcher, out)
    if not then_kill:
        named = f'note: {damaged[0]} ' in ended.out
        expect(named == (damaged[0] not in unread), f'the damaged file named ({how})', ended)
    return ['unread bytes'] if unread else []


def nan(lab, launcher, chance):
    out, iteration = lab.new_out(lab.stopped), chance.randrange(INTERVAL)
    before = contents(out)
    ended = launcher.run('train.py', *lab.flags(out, init_from='auto'), ranks=lab.ranks, fault=dict(
        kind='nan', what=chance.choice(('loss', 'gradient')), iteration=iteration, micros=lab.micros,
        rank=chance.randrange(lab.ranks)))
    one_line(ended, f'iteration {10 + iteration}:')
    expect(contents(out) == before, 'files changed')
    lab.finish(launcher, out)
    return []


# Trials under torchrun, of 2 ranks

def torchrun(lab, out, fault, *options, timeout):
    """(exit code, stderr, seconds from the fault to the end of the other rank)."""
    report = lab.folder / f'{out.name}.time'
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', *options,
               str(HERE / 'launcher.py'), 'train.py', *lab.flags(out, init_from='auto', rank_timeout=timeout)]
    other, ended, errors = Path(f'{report}.pid{1 - fault["rank"]}'), time.time(), out.with_suffix('.err')
    with open(errors, 'w', encoding='utf-8') as file, subprocess.Popen(
            command, cwd=lab.folder, stdout=subprocess.DEVNULL, stderr=file,
            env=dict(os.environ, OMP_NUM_THREADS='1', FAULT=json.dumps(dict(fault, report=str(report))))) as agent:
        while agent.poll() is None:
            if not other.exists() or is_running(other.read_text(encoding='utf-8') or '0'):
                ended = time.time()
            time.sleep(0.05)
    err = errors.read_text(encoding='utf-8')
    expect(report.exists(), f'the fault did not strike: {err[-1500:]}')
    return agent.returncode, err, ended - float(report.read_text(encoding='utf-8'))


def is_running(pid):
    try:
        return Path(f'/proc/{pid}/stat').read_text(encoding='utf-8').rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def random_moment(lab, chance, number):
    return dict(kind='signal', number=number, rank=chance.randrange(2), iteration=chance.randrange(ITERATIONS - 2),
                micros=lab.micros, delay=chance.uniform(0, 0.005))


def lost_line(code, err, seconds, limit):
    """The other rank ended, and said one line."""
    ours = [line for line in err.splitlines() if line.startswith('train.py:')]
    expect(code != 0 and seconds < limit, f'exit {code} after {seconds:.1f} s, limit {limit}')
    expect(len(ours) == 1 and 'another rank' in ours[0], f'one line about the lost rank: {err[:2500]}')


def freeze(lab, launcher, chance):
    out, timeout = lab.new_out(), 5
    code, err, seconds = torchrun(lab, out, random_moment(lab, chance, signal.SIGSTOP), timeout=timeout)
    lost_line(code, err, seconds, timeout + 30)     # torchrun kills the frozen one 30 s later
    lab.finish(launcher, out)
    return []


def lost(lab, launcher, chance):
    out, restarts = lab.new_out(), chance.random() < 0.5
    code, err, seconds = torchrun(lab, out, random_moment(lab, chance, signal.SIGKILL),
                                  *(['--max-restarts=1'] if restarts else []), timeout=20)
    if restarts:
        expect(code == 0, f'torchrun should start it again: {err[:2500]}')
        lab.compare(out)
        return ['restarted']
    lost_line(code, err, seconds, 30)
    lab.finish(launcher, out)
    return []


TRIALS = dict(kill=kill, term=stop(signal.SIGTERM), int=stop(signal.SIGINT), usr1=stop(signal.SIGUSR1), full=full,
              flip=flip, nan=nan, freeze=freeze, lost=lost)


def run_trial(lab, launcher, name, key):
    """Notes for the table, after as many tries as the fault takes to strike; Failure."""
    for attempt in range(20):
        try:
            return TRIALS[name](lab, launcher, random.Random(f'{key} {attempt}'))
        except Missed:
            continue
    raise Failure('the fault never struck')


def main():
    if fault not in (*FAULTS, 'mix'):
        raise ValueError(f'fault={fault!r} is unknown; try {", ".join(FAULTS)} or mix')
    if trials < 1 or ranks not in (1, 2) or workers < 1:
        raise ValueError(f'trials={trials}, ranks={ranks}, workers={workers}: it takes at least 1 trial and worker, '
                         f'and 1 or 2 ranks')
    plan = [(name, i) for i in range(trials) for name in (FAULTS if fault == 'mix' else [fault])][:trials]
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix='chaos-'))
        labs = {n: Lab(Path(folder) / f'{n}-ranks', n) for n in {2 if name in ('freeze', 'lost') else ranks
                                                                for name, _ in plan}}
        for lab in labs.values():
            stack.callback(lab.close)
        tally, bar = Counter(), tqdm(total=len(plan), disable=None)
        free = [{n: lab.launcher() for n, lab in labs.items()} for _ in range(workers)]

        def one(job):
            name, i = job
            n, launchers = 2 if name in ('freeze', 'lost') else ranks, free.pop()
            began = time.monotonic()
            try:
                for note in run_trial(labs[n], launchers[n], name, f'{seed} {name} {i}'):
                    tally[name, note] += 1
            except Failure as failure:
                tally[name, 'failures'] += 1
                bar.write(f'{name} {i} failed: {failure}')
            finally:
                free.append(launchers)
            tally[name, 'trials'] += 1
            tally[name, 'seconds'] += time.monotonic() - began
            bar.update()

        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(one, plan))
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
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
