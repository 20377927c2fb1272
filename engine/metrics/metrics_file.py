"""metrics.jsonl: writing it, wandb beside it, reading it."""

import json
import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from engine.atomic_files import atomic_write

FILE = 'metrics.jsonl'
TITLES = dict(weight_norm='weight norm', grad_norm='gradient norm', update_ratio='update / weight',
              activation_rms='activation rms', activation_max='largest activation', attention_entropy='attention entropy',
              attention_logit='largest logit', dead_units='dead units')
PREFIX, CLIPPED = 'health', 'health/clipped'    # of the names in the log


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


def health_by_layer(records):
    """{quantity: {layer: {iteration: value}}} of the records of metrics.read_metrics."""
    found = {}
    for record in records:
        for name, value in record.items():
            prefix, _, rest = name.partition('/')
            layer, _, quantity = rest.partition('/')
            if prefix == PREFIX and quantity in TITLES and is_number(value) and is_number(record['iter']):
                found.setdefault(quantity, {}).setdefault(layer, {})[record['iter']] = value
    return found
