"""The numbers of a run: the log line, metrics.jsonl, wandb."""

import datetime
import math
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from engine.device import is_asynchronous, peak_flops, read_async
from engine.distributed import signal_number
from engine.errors import RunError


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
