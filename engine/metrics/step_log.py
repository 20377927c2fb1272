"""The log of training: reads the numbers of each step, checks them, and writes the log line."""

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.device import is_asynchronous, peak_flops, read_async
from engine.distributed import Environment, signal_number
from engine.errors import RunError
from engine.log import log
from engine.metrics.health import HealthMonitor
from engine.metrics.metrics_file import MetricsWriter

# float16 overflows while its loss scale settles, and the scaler skips those steps.
MAX_SKIPPED_IN_A_ROW = 20


@dataclass
class UnreadStep:
    """A step that the device may still compute."""
    iteration: int
    names: list[str]                    # the numbers that the device computes
    read: Callable[[], list[float]]     # waits for them, summed over the ranks, and the stop flags
    tokens: int                         # that the run has been trained on after this step
    host_numbers: dict[str, float]      # what the host already knows


class StepLog:
    """Reads the numbers of finished steps, checks them, and logs them.

    On a GPU it reads a step while the next one runs, so the host never waits for the newest step.

    env: the device and the ranks.
    writer: gets the numbers of each log line as well. None keeps no numbers.
    tokens: how many tokens the run has been trained on.
    flops_per_token: the operations that the forward and backward pass of one token take.
    log_interval: the iterations between log lines.
    max_iters: the iteration at which training ends.
    advice: the end of the message where a loss is not finite.
    before_error: is called before that error is raised, to wait for a save that is being written.
    health: is told of every finished step. None measures nothing.
    """

    def __init__(self, env: Environment, writer: MetricsWriter | None, *, tokens: int,
                 flops_per_token: float, log_interval: int, max_iters: int, advice: str = '',
                 before_error: Callable[[], None] = lambda: None,
                 health: HealthMonitor | None = None):
        self.env = env
        self.writer = writer
        self.tokens = tokens
        self.flops_per_token = flops_per_token
        self.log_interval = log_interval
        self.max_iters = max_iters
        self.advice = advice
        self.before_error = before_error
        self.health = health

        self.stop_signal = 0                # number of a signal that reached any rank
        self.unread = deque()               # UnreadSteps, the oldest first
        self.skipped_steps = 0              # how many of the last steps in a row were skipped
        self.lines = 0                      # how many log lines were written
        self.seconds_per_iter = None        # smoothed
        self.peak = None                    # operations per second that the device is capable of
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out the time since the last log line, which went into an evaluation."""
        # A CPU's peak is measured, and a busy CPU shows less, so the largest measurement counts.
        peak = peak_flops(self.env.device, self.env.dtype)
        if peak and (self.peak is None or peak > self.peak):
            self.peak = peak
        self.start_interval()

    def start_interval(self):
        self.began = time.perf_counter()
        self.steps = 0
        self.tokens_before = self.tokens

    def push(self, iteration: int, numbers: dict[str, torch.Tensor], tokens: int,
             **host_numbers: float) -> bool:
        """Take the numbers of a step, and read the step before it. Every rank calls it.

        Returns True when a stop signal reached any rank.

        numbers: scalar tensors on the device, `loss` and `grad_norm` among them. The log has their
            mean over the ranks.
        tokens: how many tokens the run has been trained on, with this step.
        host_numbers: numbers to log as they are.
        """
        # The numbers and the stop flags share one reduction over the ranks, and one copy.
        values = torch.stack(list(numbers.values()))
        values = torch.cat([values, self.env.stop_flags()])
        read = read_async(self.env.all_reduce(values))
        self.unread.append(UnreadStep(iteration, list(numbers), read, tokens, host_numbers))

        if is_asynchronous(self.env.device):
            return self.flush(leave=1)
        return self.flush()

    def flush(self, leave: int = 0) -> bool:
        """Read all steps but the newest `leave`. Returns True when a stop signal reached any rank.

        Raises RunError where a loss is not finite.
        """
        while len(self.unread) > leave:
            self.read_step(self.unread.popleft())
        return bool(self.stop_signal)

    def read_step(self, step):
        """Read, check and log one step."""
        values = step.read()
        sums = values[:len(step.names)]
        stop_flags = values[len(step.names):]
        numbers = {name: value / self.env.world_size for name, value in zip(step.names, sums)}

        self.tokens = step.tokens
        if not self.stop_signal:
            self.stop_signal = signal_number(stop_flags)
        self.check(step.iteration, numbers['loss'], numbers['grad_norm'])

        self.steps += 1
        if step.iteration % self.log_interval == 0:
            self.write_line(step.iteration, {**numbers, **step.host_numbers})
        if self.health:
            self.health.report(step.iteration, numbers['grad_norm'])

    def check(self, iteration, loss, grad_norm):
        """RunError where the loss, or too many gradients in a row, are not finite."""
        if math.isfinite(grad_norm):
            self.skipped_steps = 0
        else:
            self.skipped_steps += 1

        may_skip = MAX_SKIPPED_IN_A_ROW if self.env.dtype == 'float16' else 0
        if math.isfinite(loss) and self.skipped_steps <= may_skip:
            return

        self.before_error()
        raise RunError(f'iteration {iteration}: loss {loss}, gradient norm {grad_norm}; '
                       f'the run ends, and that update is not saved. {self.advice}')

    def write_line(self, iteration, numbers):
        """Log a line about the steps since the last line, and give the writer its numbers."""
        # Averages since the last line
        elapsed = time.perf_counter() - self.began
        seconds = elapsed / self.steps
        tokens_per_second = (self.tokens - self.tokens_before) / elapsed
        self.start_interval()
        self.count_line(seconds)

        mfu = None
        if self.peak:
            mfu = tokens_per_second / self.env.world_size * self.flops_per_token / self.peak
        numbers.update(ms=seconds * 1000, tokens_per_second=tokens_per_second, mfu=mfu,
                       tokens=self.tokens)

        iterations_left = self.max_iters - iteration - 1
        seconds_left = self.seconds_per_iter * iterations_left
        log.info(format_line(iteration, numbers, seconds_left))

        if self.writer:
            self.writer.write(iteration, **numbers)

    def count_line(self, seconds):
        """Take the seconds per iteration of one more log line into the average."""
        self.lines += 1
        if self.lines < 3:                  # the first line may contain a minute of compilation
            self.seconds_per_iter = seconds
        else:
            self.seconds_per_iter = 0.9 * self.seconds_per_iter + 0.1 * seconds


def format_line(iteration, numbers, seconds_left):
    """The log line. numbers: those that metrics.jsonl gets."""
    mfu = 'n/a'
    if numbers['mfu'] is not None:
        mfu = f'{numbers["mfu"]:.0%}'

    # 80 columns, also after 100,000 iterations of GPT-2
    return ', '.join([
        f'iter {iteration}: loss {numbers["loss"]:.4f}',
        f'grad {numbers["grad_norm"]:.2f}',
        f'lr {numbers["lr"]:.1e}'.replace('e-0', 'e-'),
        f'{short_number(round(numbers["tokens_per_second"]))} tok/s',
        f'mfu {mfu}',
        f'eta {short_time(seconds_left)}',
    ])


def short_time(seconds: float) -> str:
    """5025 seconds as '1h23m': the two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f'{days}d{hours}h'
    if hours:
        return f'{hours}h{minutes}m'
    if minutes:
        return f'{minutes}m{seconds}s'
    return f'{seconds}s'


def short_number(count: int) -> str:
    """1234567 as '1.23M'."""
    for size, unit in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
        if count >= 0.9995 * size:          # what rounds to 1000 of a unit is 1 of the next
            return f'{count / size:.3g}{unit}'
    return str(count)
