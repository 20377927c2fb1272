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
        self.began = time.perf_counter()
        try:
            self.began -= keep_before(Path(out_dir) / FILE, iter_num, evaluated)
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

    def log(self, iter_num, **numbers):
        """numbers: floats; one that is not finite is written as null, which JSON has. The file gets
        `seconds` too: of the run so far, stops not counted."""
        numbers = {k: v if v is None or math.isfinite(v) else None for k, v in numbers.items()}
        if self.file:
            try:
                seconds = round(time.perf_counter() - self.began, 3)
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
        except (ValueError, KeyError, TypeError):
            continue
    return records


def keep_before(path, iter_num, evaluated):
    """Drop the records that a run restarted at iter_num is about to write again. Returns the
    seconds that the run took until then."""
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
    return max((record['seconds'] for record in kept if is_number(record.get('seconds'))), default=0.0)


def is_number(value):
    return type(value) in (int, float) and math.isfinite(value)


def draw(folders, picture):
    """Loss against iterations and against minutes: training as a line, validation as dots, one
    colour a run."""
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


if __name__ == '__main__':
    import configurator
    with configurator.plain_errors():
        missing = [folder for folder in sys.argv[1:] if not (Path(folder) / FILE).is_file()]
        if missing or len(sys.argv) < 2:
            raise ValueError(f'{missing[0]} holds no {FILE}' if missing else
                             'name the folders to draw, as in: python metrics.py out-shakespeare-char')
        draw(sys.argv[1:], Path(sys.argv[1]) / 'loss.png')
        print(f'drew {Path(sys.argv[1]) / "loss.png"}')
