"""The training step and sampling of this project beside another checkout, in turns.

The other checkout is nanoGPT's, or any that has its two commands. Both sides are used only through
these commands, in separate processes: train.py prints a line `iter N: ...` for each iteration, and
sample.py prints the text. Nothing is written into either checkout.
"""

import os
import pickle
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from engine.errors import RunError
from engine.log import log

# The turns of a pair are neighbours, so a slow hour slows both. Who goes first alternates.
TURNS = ('peer', 'here', 'here', 'peer', 'peer', 'here')
LIMIT = 600                         # seconds after which a process is ended
ITERATION = re.compile(r'iter \d+:')
ROW = '| {:<24} | {:>11} | {:>11} | {:<19} |'    # 78 columns


class Checkout(NamedTuple):
    """A folder with train.py and sample.py."""
    name: str                       # 'peer' or 'here'
    folder: Path


class Shape(NamedTuple):
    """The shape of a GPT, under the names of the settings."""
    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    vocab_size: int


@dataclass(frozen=True)
class Setup:
    """What all turns of a case share."""
    dataset: Path                   # folder of train.bin, val.bin and meta.pkl
    model: Path                     # folder of a ckpt.pt; sampling alone has one
    device: str                     # setting of that name
    compile: bool                   # setting of that name, for training


# What is timed: measure() of a case times a checkout, and format_time() writes that for people.

@dataclass(frozen=True)
class StepCase:
    """A training step."""
    what: str
    shape: Shape
    batch_size: int
    dtype: str
    warmup: int                     # iterations that are not timed
    steps: int                      # iterations that are timed in each turn

    def measure(self, checkout: Checkout, setup: Setup) -> float:
        """The median time of an iteration in seconds, from one line of train.py to the next."""
        n_lines = 1 + self.warmup + self.steps      # start-up and evaluation end before the first
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            settings = self.settings(setup, Path(folder, 'run'), n_lines)
            arrivals = run_script(checkout, 'train.py', settings, partial(read_arrivals, n_lines))
        return statistics.median(np.diff(arrivals)[self.warmup:])

    def settings(self, setup, out_dir, max_iters):
        """The settings of train.py, {name: value}."""
        shape = self.shape._asdict()
        del shape['vocab_size']                     # the dataset has it
        return dict(
            **shape,
            dataset=setup.dataset,
            out_dir=out_dir,
            batch_size=self.batch_size,
            gradient_accumulation_steps=1,
            dropout=0.0,
            bias=False,
            max_iters=max_iters,
            eval_interval=10 ** 6,                  # one evaluation, before the first iteration
            eval_iters=1,
            log_interval=1,
            device=setup.device,
            dtype=self.dtype,
            compile=setup.compile,
        )

    @staticmethod
    def format_time(seconds: float) -> str:
        return f'{seconds * 1000:,.1f} ms'


@dataclass(frozen=True)
class SamplingCase:
    """A token of one sample, from a model with random weights, within its context."""
    what: str
    shape: Shape
    short_tokens: int               # of the shorter of two samples
    long_tokens: int                # of the longer one

    def measure(self, checkout: Checkout, setup: Setup) -> float:
        """The seconds that a token takes: the longer sample's time less the shorter one's, per
        token, so that the start-up cancels."""
        short_seconds, short_characters = self.sample(checkout, setup, self.short_tokens)
        long_seconds, long_characters = self.sample(checkout, setup, self.long_tokens)

        n_tokens = self.long_tokens - self.short_tokens
        n_characters = long_characters - short_characters
        if n_characters < n_tokens:                 # a token of the dataset is a character
            raise RunError(f'{checkout.name}: sample.py printed {n_characters} characters more '
                           f'for {n_tokens} tokens more')
        if long_seconds <= short_seconds:
            raise RunError(f'{checkout.name}: sample.py took no longer for {n_tokens} tokens more; '
                           f'try again on a machine that is less busy')
        return (long_seconds - short_seconds) / n_tokens

    def sample(self, checkout, setup, n_tokens):
        """(seconds, characters printed) of a whole sample.py."""
        began = time.perf_counter()
        text = run_script(checkout, 'sample.py', self.settings(setup, n_tokens), read_to_the_end)
        return time.perf_counter() - began, len(text)

    def settings(self, setup, n_tokens):
        """The settings of sample.py, {name: value}."""
        return dict(
            out_dir=setup.model,
            num_samples=1,
            max_new_tokens=n_tokens,
            device=setup.device,
            dtype='float32',
            compile=False,
        )

    @staticmethod
    def format_time(seconds: float) -> str:
        return f'{1 / seconds:,.1f} tok/s'


# A sample stays within the context: beyond it, the two sides need not compute the same.
CASES = dict(
    shakespeare=StepCase('step of 4 x 128, 12 x 64', Shape(4, 4, 128, 64, 65), batch_size=12,
                         dtype='float32', warmup=50, steps=250),
    step_124m=StepCase('step of 124M, 4 x 256', Shape(12, 12, 768, 256, 50304), batch_size=4,
                       dtype='float32', warmup=1, steps=3),
    step_124m_bfloat16=StepCase('step of 124M, bfloat16', Shape(12, 12, 768, 256, 50304),
                                batch_size=4, dtype='bfloat16', warmup=1, steps=3),
    sample_124m=SamplingCase('sampling, 124M', Shape(12, 12, 768, 1024, 50304),
                             short_tokens=10, long_tokens=310),
    sample_6x384=SamplingCase('sampling, 6 x 384', Shape(6, 6, 384, 512, 65),
                              short_tokens=10, long_tokens=500),
)


# Turns

@dataclass
class Comparison:
    """The times of a case, of each turn."""
    case: StepCase | SamplingCase
    seconds: dict[str, list[float]] | None      # {name of the checkout: times}; None: it failed

    def row(self) -> str:
        """A row of the table: the medians of the turns, and the median and range of the ratios of
        the pairs."""
        if self.seconds is None:
            return ROW.format(self.case.what, '', '', 'failed')

        peer = statistics.median(self.seconds['peer'])
        here = statistics.median(self.seconds['here'])
        ratios = [a / b for a, b in zip(self.seconds['peer'], self.seconds['here'])]
        low = format_ratio(min(ratios))
        high = format_ratio(max(ratios))
        middle = format_ratio(statistics.median(ratios))
        return ROW.format(self.case.what, self.case.format_time(peer),
                          self.case.format_time(here), f'{middle} ({low} to {high})')


def compare(checkouts: list[Checkout], cases: Iterable[StepCase | SamplingCase], device: str,
            compile: bool, write_model: Callable[[Path, Shape, Path], None]) -> list[Comparison]:
    """Time the cases, each in turns of the two checkouts. Logs a line before each case, and one
    where a case fails.

    checkouts: the one with the name 'peer', and the one with the name 'here'.
    device, compile: settings of those names; samples are never compiled.
    write_model: is called with a new folder, the shape and the folder of the dataset, and writes a
    ckpt.pt that both checkouts read.
    """
    by_name = {checkout.name: checkout for checkout in checkouts}
    comparisons = []
    for case in cases:
        log.info(f'{case.what} ...')
        seconds = {name: [] for name in by_name}
        try:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                setup = Setup(Path(folder, 'data'), Path(folder, 'model'), device, compile)
                write_dataset(setup.dataset, case.shape.vocab_size)
                if isinstance(case, SamplingCase):
                    write_model(setup.model, case.shape, setup.dataset)
                for name in TURNS:
                    seconds[name].append(case.measure(by_name[name], setup))
        except RunError as error:
            log.warning(f'failed: {error}')
            seconds = None
        comparisons.append(Comparison(case, seconds))
    return comparisons


def table(comparisons: list[Comparison]) -> list[str]:
    """The comparisons as a Markdown table of at most 80 columns."""
    return [
        ROW.format('what', 'peer', 'here', 'times as fast here'),
        ROW.format('-' * 24, '-' * 10 + ':', '-' * 10 + ':', '-' * 19),
        *(comparison.row() for comparison in comparisons),
    ]


def format_ratio(ratio):
    """A positive ratio in at most four characters."""
    for digits, limit in ((2, 9.995), (1, 99.95)):
        if ratio < limit:
            return f'{ratio:.{digits}f}'
    return f'{ratio:.0f}'


# Processes

def run_script(checkout: Checkout, script: str, settings: dict[str, Any],
               read: Callable[[subprocess.Popen], Any]) -> Any:
    """Start a script of a checkout, and return what `read` makes of the process.

    The process is ended when `read` has enough. RunError, with the last line of stderr, where
    `read` returns None, which says that the script failed.
    """
    if not (checkout.folder / script).is_file():
        raise RunError(f'{checkout.name}: {checkout.folder} has no {script}')

    command = [sys.executable, script, *(f'--{name}={value}' for name, value in settings.items())]
    environment = dict(
        os.environ,
        PYTHONUNBUFFERED='1',           # lines arrive as they are printed
        PYTHONDONTWRITEBYTECODE='1',    # nothing is written into the checkout
        PYTHONUTF8='1',
    )
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=checkout.folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=errors, encoding='utf-8', errors='replace')
        is_late = threading.Event()

        def end_late():
            is_late.set()
            process.kill()

        timer = threading.Timer(LIMIT, end_late)
        timer.start()
        try:
            result = read(process)
            if result is not None:
                return result
            process.wait()
        finally:
            timer.cancel()
            process.kill()
            process.wait()
            process.stdout.close()

        if is_late.is_set():
            reason = f'ended after {LIMIT / 60:.0f} minutes'
        else:
            reason = last_line(errors).removeprefix(f'{script}: ')
        if not reason:
            reason = f'exit code {process.returncode} and no more lines'
    raise RunError(f'{checkout.name}: {script}: {reason}')


def read_arrivals(n_lines, process):
    """When the first n_lines lines `iter N: ...` arrived, in seconds; None where some are missing.
    """
    arrivals = []
    for line in process.stdout:
        if ITERATION.match(line):
            arrivals.append(time.perf_counter())
        if len(arrivals) == n_lines:
            return arrivals
    return None


def read_to_the_end(process):
    """All that a process prints, or None where its exit code is not 0."""
    text = process.stdout.read()
    if process.wait() != 0:
        return None
    return text


def last_line(file):
    """The last line with any text of a binary file, as plain characters; '' without one."""
    file.seek(max(0, file.seek(0, os.SEEK_END) - 2000))
    lines = file.read().decode('utf-8', 'replace').strip().splitlines()
    if not lines:
        return ''
    return ''.join(character for character in lines[-1] if character.isprintable())[:300]


# What the scripts read

def write_dataset(folder: Path, vocab_size: int) -> None:
    """Write random tokens as nanoGPT's data folders have them. Each token is a character, so
    neither side needs a tokenizer."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        tokens = random.integers(vocab_size, size=100_000).astype('<u2')
        tokens.tofile(folder / f'{split}.bin')

    # both sample.py begin with a line break; the others are characters from U+0100 on
    characters = ['\n', *(chr(256 + i) for i in range(vocab_size - 1))]
    meta = dict(
        vocab_size=vocab_size,
        itos=dict(enumerate(characters)),
        stoi={character: i for i, character in enumerate(characters)},
    )
    with open(folder / 'meta.pkl', 'wb') as file:
        pickle.dump(meta, file)
