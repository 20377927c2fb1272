"""The numbers of a run: one JSON line each in metrics.jsonl, the same to wandb.

`python metrics.py OUT_DIR...` draws the loss of one or several runs against iterations and against time.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

FILE = 'metrics.jsonl'


class Metrics:
    """Where the numbers go. Whatever fails here is said once and ends nothing.

    iter_num, evaluated: where the run (re)starts, and whether it was evaluated there already.
    say: takes a line for the person. wandb_run: keyword arguments of wandb.init, or None.
    """

    def __init__(self, out_dir, iter_num, evaluated, say, wandb_run=None):
        self.say, self.file, self.wandb, self.wandb_id = say, None, None, None
        self.seconds = 0.0                              # that the run took before it was stopped
        try:
            self.seconds = keep_before(Path(out_dir) / FILE, iter_num, evaluated)
            self.file = open(Path(out_dir) / FILE, 'a', encoding='utf-8')
        except OSError as error:
            say(f'{FILE} cannot be written ({error.strerror}); training goes on without it')
        if wandb_run is not None:
            terminal, sys.stdin = sys.stdin, open(os.devnull, encoding='utf-8')
            try:                                        # without a terminal it does not ask to log in
                import wandb
                self.wandb = wandb.init(**wandb_run)
                self.wandb_id = self.wandb.id
            except Exception as error:                  # missing, not logged in, no network, ...
                say(f'wandb is off ({one_line(error)}); training goes on without it')
            finally:
                sys.stdin.close()
                sys.stdin = terminal
        self.began = time.perf_counter()

    def log(self, iter_num, **numbers):
        """numbers: floats; one that is not finite is written as null, which JSON has. The file gets
        `seconds` too, of the run so far without its stops; wandb has a clock of its own."""
        numbers = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        if self.file:
            try:
                seconds = self.seconds
                if seconds is not None:
                    seconds = round(seconds + time.perf_counter() - self.began, 3)
                self.file.write(json.dumps(dict(iter=iter_num, seconds=seconds, **numbers)) + '\n')
                self.file.flush()
            except OSError as error:
                self.say(f'{FILE} cannot be written ({error.strerror}); training goes on without it')
                self.file = None
        if self.wandb:
            try:
                self.wandb.log(numbers, step=iter_num)
            except Exception as error:
                self.say(f'wandb is off ({one_line(error)}); training goes on without it')
                self.wandb = None

    def close(self):
        for thing, close in ((self.file, 'close'), (self.wandb, 'finish')):
            try:
                if thing:
                    getattr(thing, close)()
            except Exception as error:
                self.say(f'closing the metrics failed ({one_line(error)}); the run itself is saved')


def one_line(error):
    return f'{type(error).__name__}: {" ".join(str(error).split())[:120]}'


def read_metrics(path):
    """The records of a metrics file, without a last line that a crash tore off."""
    records = []
    for line in Path(path).read_text(encoding='utf-8', errors='replace').splitlines():
        try:
            record = json.loads(line)
            if type(record['iter']) is int:
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
    return records


def keep_before(path, iter_num, evaluated):
    """Drop the records that a run restarted at iter_num is about to write again. Returns the
    seconds that the run took until then, or None if its records have none."""
    if not path.exists():
        return 0.0
    temporary = path.with_suffix('.tmp')
    kept = [record for record in read_metrics(path) if record['iter'] < iter_num
            or evaluated and record['iter'] == iter_num and 'val_loss' in record]
    try:
        with open(temporary, 'w', encoding='utf-8') as file:
            file.write(''.join(json.dumps(record) + '\n' for record in kept))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    last = kept[-1].get('seconds') if kept else 0.0
    return last if is_number(last) else None


def is_number(value):
    """Also of what a damaged file may hold: True, 10**400 and NaN are none."""
    return type(value) in (int, float) and abs(value) < 1e15


def draw(folders, picture):
    """Loss against iterations and against minutes, one colour a run, validation with dots. Returns
    the folders whose records have no times, as earlier versions wrote them."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True, layout='constrained')
    for i, folder in enumerate(folders):
        records = read_metrics(Path(folder) / FILE)
        for axes, x, unit in zip(panels, ('iter', 'seconds'), (1, 60)):
            for key, label, style in (('loss', 'train', dict(lw=0.8, alpha=0.4)),
                                      ('val_loss', 'val', dict(marker='o', ms=3))):
                points = [(r[x] / unit, r[key]) for r in records if is_number(r.get(x)) and is_number(r.get(key))]
                if points:
                    axes.plot(*zip(*points), color=f'C{i}', label=f'{Path(folder).name} {label}', **style)
    for axes, words in zip(panels, ('iterations', 'minutes')):
        axes.set(xlabel=words)
        axes.grid(alpha=0.3)
    panels[0].set(ylabel='loss, nats per token')
    panels[0].legend()
    figure.savefig(picture, dpi=100)
    return [folder for folder in folders if not any(is_number(r.get('seconds')) for r in read_metrics(Path(folder) / FILE))]


if __name__ == '__main__':
    import configurator
    with configurator.plain_errors():
        missing = [folder for folder in sys.argv[1:] if not (Path(folder) / FILE).is_file()]
        if missing or len(sys.argv) < 2:
            raise ValueError(f'{missing[0]} holds no {FILE}' if missing else
                             'name the folders to draw, as in: python metrics.py out-shakespeare-char')
        for folder in draw(sys.argv[1:], Path(sys.argv[1]) / 'loss.png'):
            print(f'note: {folder} has no times, so it is drawn against iterations only')
        print(f'drew {Path(sys.argv[1]) / "loss.png"}')
