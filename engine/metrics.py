"""The numbers of a run: the log line, metrics.jsonl, wandb."""

import datetime
import json
import math
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from engine.device import is_asynchronous, peak_flops, read_async
from engine.distributed import signal_number
from engine.errors import RunError
from engine.files import atomic_write

FILE = 'metrics.jsonl'


class FinishedStep(NamedTuple):
    iteration: int
    names: list             # of the numbers that the device computed
    read: Callable          # waits for those, summed over the ranks, and for the stop flags: a list of floats
    tokens: int             # of training so far
    host_numbers: dict


class StepLog:
    """Reads the numbers of finished steps, checks them, and logs them.

    On a GPU it reads a step while the next one runs, so the host never waits for the newest.
    env: distributed.Environment. writer: MetricsWriter, or None. print_line: prints one line.
    tokens: of training so far. flops_per_token: of one token's forward and backward pass. health: a HealthMonitor.
    """

    def __init__(self, env, writer, print_line, *, tokens, flops_per_token, log_interval, max_iters, advice='',
                 before_error=lambda: None, health=None):
        self.env, self.writer, self.print_line = env, writer, print_line
        self.tokens, self.flops_per_token = tokens, flops_per_token
        self.log_interval, self.max_iters, self.health = log_interval, max_iters, health
        self.advice, self.before_error = advice, before_error
        self.stop_signal = 0                            # number of a signal that reached any rank
        self.pending = deque()                          # FinishedSteps, the oldest first
        self.seconds_per_iter = None                    # smoothed, for the time that is left
        self.lines = self.skipped_steps = 0
        self.peak = None
        self.restart_clock()

    def restart_clock(self):
        """Leave out the time since the last line, and measure a CPU's peak again: a busy one shows less."""
        peak = peak_flops(self.env.device, self.env.dtype)
        self.peak = peak and max(peak, self.peak or 0)
        self.start_interval()

    def start_interval(self):
        self.began, self.steps, self.tokens_before = time.perf_counter(), 0, self.tokens

    def push(self, iteration, numbers, tokens, **host_numbers):
        """Take the numbers of a step, and read the step before it. True when a stop signal reached any rank.

        numbers: {name: scalar tensor on the device}, with at least loss and grad_norm; the log has their
        mean over the ranks. tokens: of training so far, this step's included. host_numbers: numbers to log
        as they are. A collective: every rank calls it.
        """
        values = torch.cat([torch.stack(list(numbers.values())), self.env.stop_flags()])
        read = read_async(self.env.all_reduce(values))
        self.pending.append(FinishedStep(iteration, list(numbers), read, tokens, host_numbers))
        return self.flush(leave=1 if is_asynchronous(self.env.device) else 0)

    def flush(self, leave=0):
        """Read all steps but the newest `leave`. Raises RunError where a loss is not finite."""
        while len(self.pending) > leave:
            step = self.pending.popleft()
            values, self.tokens = step.read(), step.tokens
            self.stop_signal = self.stop_signal or signal_number(values[len(step.names):])
            numbers = {name: value / self.env.world_size for name, value in zip(step.names, values)}
            self.check(step.iteration, **numbers)
            self.steps += 1
            if step.iteration % self.log_interval == 0:
                self.log(step.iteration, {**numbers, **step.host_numbers})
            if self.health:
                self.health.report(step.iteration, numbers['grad_norm'])
        return bool(self.stop_signal)

    def check(self, iteration, loss, grad_norm, **_):
        # float16 overflows while its loss scale settles, and the scaler skips those steps.
        self.skipped_steps = 0 if math.isfinite(grad_norm) else self.skipped_steps + 1
        if not math.isfinite(loss) or self.skipped_steps > (20 if self.env.dtype == 'float16' else 0):
            self.before_error()                         # such as waiting for the save that is being written
            raise RunError(f'iteration {iteration}: loss {loss}, gradient norm {grad_norm}; the run ends before that '
                           f'update. {self.advice}')

    def log(self, iteration, numbers):
        elapsed = time.perf_counter() - self.began
        seconds, tokens_per_second = elapsed / self.steps, (self.tokens - self.tokens_before) / elapsed
        self.start_interval()
        self.lines += 1                                 # the first line may contain a minute of compilation
        self.seconds_per_iter = seconds if self.lines < 3 else 0.9 * self.seconds_per_iter + 0.1 * seconds
        mfu = tokens_per_second / self.env.world_size * self.flops_per_token / self.peak if self.peak else None
        numbers.update(ms=seconds * 1000, tokens_per_second=tokens_per_second, mfu=mfu, tokens=self.tokens)
        left = datetime.timedelta(seconds=round(self.seconds_per_iter * (self.max_iters - iteration - 1)))
        self.print_line(f'iter {iteration}: loss {numbers["loss"]:.4f}, {short_number(self.tokens)} tokens, {numbers["ms"]:.1f} ms, '
                        f'{numbers["tokens_per_second"]:,.0f} tok/s, mfu {"n/a" if mfu is None else f"{mfu:.1%}"}, '
                        f'grad {numbers["grad_norm"]:.2f}, lr {numbers["lr"]:.1e}, eta {left}')
        if self.writer:
            self.writer.write(iteration, **numbers)


def short_number(count):
    """1234567 as '1.23M'."""
    for limit, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if count >= 0.9995 * limit:                     # what rounds to 1000 of a unit is 1 of the next
            return f'{count / limit:.3g}{unit}'
    return str(count)


class MetricsWriter:
    """Writes numbers to metrics.jsonl and wandb. A failure of either warns once and never stops training.

    iter_num, evaluated: where the run starts or resumes, and whether it was evaluated there already.
    print_line: prints one line. wandb_run: keyword arguments of wandb.init, or None.
    wandb_id: of the run so far, kept for a later resume where this one does not use wandb.
    """

    def __init__(self, out_dir, iter_num, evaluated, print_line, wandb_run=None, wandb_id=None):
        self.print_line, self.file, self.wandb, self.wandb_id = print_line, None, None, wandb_id
        self.seconds = 0.0                              # that the run took before this process
        try:
            self.seconds = drop_records_from(Path(out_dir) / FILE, iter_num, evaluated)
            self.file = open(Path(out_dir) / FILE, 'a', encoding='utf-8')
        except OSError as error:
            print_line(f'{FILE} cannot be written ({error.strerror}); training goes on without it')
        if wandb_run:
            terminal, sys.stdin = sys.stdin, open(os.devnull, encoding='utf-8')
            try:                                        # without a terminal, wandb does not ask to log in
                import wandb
                self.wandb = wandb.init(id=wandb_id, **wandb_run)
                self.wandb_id = self.wandb.id
            except Exception as error:                  # missing, not logged in, no network, ...
                print_line(f'wandb is off ({one_line(error)}); training goes on without it')
            finally:
                sys.stdin.close()
                sys.stdin = terminal
        self.began = time.perf_counter()

    def write(self, iter_num, **numbers):
        """numbers: floats. One that is not finite is written as null. The file also gets `seconds`,
        the time that the run took so far, without its pauses."""
        numbers = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        if self.file:
            try:
                seconds = self.seconds
                if seconds is not None:
                    seconds = round(seconds + time.perf_counter() - self.began, 3)
                self.file.write(json.dumps(dict(iter=iter_num, seconds=seconds, **numbers)) + '\n')
                self.file.flush()
            except OSError as error:
                self.print_line(f'{FILE} cannot be written ({error.strerror}); training goes on without it')
                with suppress(OSError):                 # closing writes what is left, to the same disk
                    self.file.close()
                self.file = None
        if self.wandb:
            try:
                self.wandb.log(numbers, step=iter_num)
            except Exception as error:
                self.print_line(f'wandb is off ({one_line(error)}); training goes on without it')
                self.wandb = None

    def elapsed(self):
        """'12 min 5 s': what the run took so far without its pauses, or '' where that is not known."""
        if self.seconds is None:
            return ''
        minutes, seconds = divmod(round(self.seconds + time.perf_counter() - self.began), 60)
        return f'{minutes:,} min {seconds} s'

    def close(self):
        for close in (self.file and self.file.close, self.wandb and self.wandb.finish):
            try:
                if close:
                    close()
            except Exception as error:
                self.print_line(f'closing the metrics failed ({one_line(error)}); the run itself is saved')


def write_run_json(out_dir, command, settings, env):
    """Write run.json: what was started, when, with which settings, versions and device. For people;
    nothing reads it."""
    content = dict(command=command, started=datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
                   device=env.summary, ranks=env.world_size, python=sys.version.split()[0], torch=torch.__version__,
                   commit=git_commit(Path(__file__).resolve().parent.parent), settings=settings)
    with suppress(OSError), atomic_write(Path(out_dir) / 'run.json') as file:
        json.dump(content, file, indent=2)


def git_commit(folder):
    """The commit that is checked out in the repository `folder`, or None where git finds none."""
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(folder.parent))      # no repository around the folder counts
    with suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(['git', 'rev-parse', '--verify', 'HEAD'], cwd=folder, env=environment,
                                       stderr=subprocess.DEVNULL, text=True, timeout=5).strip()


def one_line(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:120]}'


def read_metrics(path):
    """The records of a metrics file, without lines that a crash or damage made unreadable.
    A path without a regular file has no records."""
    records = []
    if not Path(path).is_file():
        return records
    for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
            if type(record['iter']) is int:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


def read_losses(out_dir):
    """[(iteration, train loss, val loss)] of the evaluations of the run in out_dir."""
    found = [(record['iter'], record.get('train_loss'), record.get('val_loss'))
             for record in read_metrics(Path(out_dir) / FILE)]
    return [row for row in found if all(is_number(value) for value in row)]


def drop_records_from(path, iter_num, evaluated):
    """Drop the records that a run resumed at iter_num will write again. Returns the seconds that
    the run took until then, or None if its records have none. OSError where `path` is not a regular file."""
    if not path.exists():
        return 0.0
    if not path.is_file():
        raise OSError(0, 'it is not a regular file')
    kept = [record for record in read_metrics(path) if record['iter'] < iter_num
            or evaluated and record['iter'] == iter_num and 'val_loss' in record]
    with atomic_write(path) as file:
        file.write(''.join(json.dumps(record) + '\n' for record in kept))
    last = kept[-1].get('seconds') if kept else 0.0
    return last if is_number(last) else None


def is_number(value):
    """True for a usable number. A damaged file may also hold True, 10**400 and NaN, which are not usable."""
    return type(value) in (int, float) and abs(value) < 1e15
