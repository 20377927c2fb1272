"""metrics.jsonl: writing it, wandb beside it, reading it."""

import json
import math
import os
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from engine.atomic_files import atomic_write
from engine.log import log

FILE = 'metrics.jsonl'
WANDB_NAMES = dict(train_loss='train/loss', val_loss='val/loss')       # nanoGPT's

# The quantities that engine.metrics.health measures, with their titles. Each is a number named
# health/LAYER/QUANTITY.
TITLES = dict(
    weight_norm='weight norm',
    grad_norm='gradient norm',
    update_ratio='update / weight',
    activation_rms='activation rms',
    activation_max='largest activation',
    attention_entropy='attention entropy',
    attention_logit='largest logit',
    dead_units='dead units',
)
PREFIX = 'health'
CLIPPED = 'health/clipped'      # share of the last CLIPPED_WINDOW steps whose gradient was clipped
CLIPPED_WINDOW = 100


class Limit(NamedTuple):
    """Above it, a quantity precedes trouble."""
    value: float
    advice: str


LIMITS = dict(
    update_ratio=Limit(0.1, 'a lower --learning_rate or a longer warm-up may help'),
    attention_logit=Limit(50, 'a lower --learning_rate may help, or --qk_norm=True in a new run'),
    clipped=Limit(0.5, 'a lower --learning_rate or a longer warm-up may help'),
)


class MetricsWriter:
    """Writes numbers to metrics.jsonl and wandb, where they have nanoGPT's names.

    If one of them fails, the writer says so once, and training goes on.

    out_dir: the folder of the run.
    iter_num: the iteration at which the run starts or resumes. Later records are dropped.
    evaluated: True where the run was evaluated at that iteration already.
    wandb_arguments: keyword arguments of wandb.init. None does not use wandb.
    wandb_id: the id that wandb gave the run when it began. It is kept for a later resume where this
        process does not use wandb.
    """

    def __init__(self, out_dir: str | Path, iter_num: int, evaluated: bool,
                 wandb_arguments: dict | None = None, wandb_id: str | None = None):
        self.file = None
        self.wandb = None
        self.wandb_id = wandb_id
        self.seconds = 0.0              # that the run took before this process; None: not known

        self.open_file(Path(out_dir) / FILE, iter_num, evaluated)
        if wandb_arguments:
            self.start_wandb(wandb_arguments)

        self.began = time.perf_counter()

    def open_file(self, path, iter_num, evaluated):
        try:
            self.seconds = drop_records_from(path, iter_num, evaluated)
            self.file = open(path, 'a', encoding='utf-8')
        except OSError as error:
            log_lost_file(error)

    def start_wandb(self, arguments):
        try:
            with empty_stdin():
                import wandb
                self.wandb = wandb.init(id=self.wandb_id, **arguments)
                self.wandb_id = self.wandb.id
                self.wandb.define_metric('*', step_metric='iter')
        except Exception as error:      # missing, not logged in, no network, ...
            log_lost_wandb(error)

    def write(self, iter_num: int, **numbers: float | None) -> None:
        """Write the numbers of an iteration. One that is not finite is written as null.

        The file also gets `seconds`, the time that the run took so far, without its pauses.
        """
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                numbers[name] = None

        if self.file:
            self.write_to_file(iter_num, numbers)
        if self.wandb:
            self.write_to_wandb(iter_num, numbers)

    def write_to_file(self, iter_num, numbers):
        seconds = self.elapsed_seconds()
        if seconds is not None:
            seconds = round(seconds, 3)
        record = dict(iter=iter_num, seconds=seconds, **numbers)

        # The file is flushed at each line, so a killed run loses none.
        try:
            self.file.write(json.dumps(record) + '\n')
            self.file.flush()
        except OSError as error:
            log_lost_file(error)
            # Closing writes what is left, to the same disk.
            with suppress(OSError):
                self.file.close()
            self.file = None

    def write_to_wandb(self, iter_num, numbers):
        # Its own step would not do: a resumed run begins at an iteration that wandb knows already,
        # and wandb drops what comes again. nanoGPT logs `iter` too, and mfu in percent.
        row = dict(iter=iter_num)
        for name, value in numbers.items():
            if name == 'mfu' and value is not None:
                value = 100 * value
            row[WANDB_NAMES.get(name, name)] = value

        try:
            self.wandb.log(row)
        except Exception as error:
            log_lost_wandb(error)
            self.wandb = None

    def elapsed_seconds(self):
        """The time that the run took so far, without its pauses, or None where it is not known."""
        if self.seconds is None:
            return None
        return self.seconds + time.perf_counter() - self.began

    def elapsed(self) -> str | None:
        """'12 min 5 s': the time that the run took so far, or None where it is not known."""
        elapsed = self.elapsed_seconds()
        if elapsed is None:
            return None

        minutes, seconds = divmod(round(elapsed), 60)
        return f'{minutes:,} min {seconds} s'

    def close(self) -> None:
        """Close the file, and end the run of wandb."""
        if self.file:
            close_and_log(self.file.close)
        if self.wandb:
            close_and_log(self.wandb.finish)


@contextmanager
def empty_stdin():
    """Without a terminal on stdin, wandb does not ask to log in."""
    terminal = sys.stdin

    with open(os.devnull, encoding='utf-8') as nothing:
        sys.stdin = nothing
        try:
            yield
        finally:
            sys.stdin = terminal


def close_and_log(close):
    try:
        close()
    except Exception as error:
        log.info(f'closing the metrics failed ({one_line(error)}); the run itself is saved')


def log_lost_file(error):
    log.info(f'{FILE} cannot be written ({error.strerror}); training goes on without it')


def log_lost_wandb(error):
    log.info(f'wandb is off ({one_line(error)}); training goes on without it')


def one_line(error):
    text = ' '.join(str(error).split())
    return f'{type(error).__name__}: {text[:120]}'


# Reading

def read_metrics(path: str | Path) -> list[dict]:
    """The records of a metrics file, without the lines that a crash or damage made unreadable.

    A path without a regular file has no records.
    """
    path = Path(path)
    if not path.is_file():
        return []

    records = []
    for line in path.read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)

            # What MetricsWriter wrote has an iteration.
            if type(record['iter']) is int:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


def read_losses(out_dir: str | Path) -> list[tuple[int, float, float]]:
    """The evaluations of the run in out_dir: (iteration, train loss, val loss), both in nats."""
    losses = []
    for record in read_metrics(Path(out_dir) / FILE):
        row = (record['iter'], record.get('train_loss'), record.get('val_loss'))
        if all(is_number(value) for value in row):
            losses.append(row)
    return losses


def drop_records_from(path, iter_num, evaluated):
    """Drop the records that a run which resumes at iter_num will write again.

    Returns the seconds that the run took until then, or None if its records have none. Raises
    OSError where `path` is not a regular file: opening a FIFO would wait for a reader.
    """
    if not path.exists():
        return 0.0
    if not path.is_file():
        raise OSError(0, 'it is not a regular file')

    kept = []
    for record in read_metrics(path):
        is_before = record['iter'] < iter_num
        is_evaluation = evaluated and record['iter'] == iter_num and 'val_loss' in record
        if is_before or is_evaluation:
            kept.append(record)

    with atomic_write(path) as file:
        for record in kept:
            file.write(json.dumps(record) + '\n')

    # The clock goes on where the last of them was written.
    if not kept:
        return 0.0
    seconds = kept[-1].get('seconds')
    if not is_number(seconds):
        return None
    return seconds


def is_number(value: object) -> bool:
    """True for a usable number. A damaged file may also hold True, 10**400 and NaN."""
    return type(value) in (int, float) and abs(value) < 1e15


def health_by_layer(records: list[dict]) -> dict[str, dict[str, dict[int, float]]]:
    """{quantity: {layer: {iteration: value}}}, what the records say of each layer's health."""
    found = {}
    for record in records:
        if not is_number(record['iter']):
            continue

        for name, value in record.items():
            # health/LAYER/QUANTITY
            prefix, _, rest = name.partition('/')
            layer, _, quantity = rest.partition('/')

            if prefix == PREFIX and quantity in TITLES and is_number(value):
                layers = found.setdefault(quantity, {})
                layers.setdefault(layer, {})[record['iter']] = value
    return found
