"""Draw the losses of one or several runs against iterations, tokens and time, and their scores of
tasks below. Or draw what one run measured in its layers as heat maps.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --picture=compare.png --smooth=0.9
    python plot.py out-a --health=True
"""

import sys
from pathlib import Path
from typing import NamedTuple

from console import print0, report_errors

import numpy as np

import configurator
from engine.errors import UserError
from engine.metrics.metrics_file import FILE, TITLES, health_by_layer, is_number, read_metrics

picture = ''        # file to write; '' is loss.png, or health.png, in the first run's folder
smooth = 0.9        # of the training loss: share of the average so far in each new point; 0 draws
                    # it as it is
health = False      # True draws the measurements of a run that was trained with --health_interval


# What GPT-2 124M reaches, as docs/evaluation.md has it
GPT2_SCORES = dict(
    hellaswag_acc=0.2892,
    hellaswag_acc_norm=0.3114,
    hellaswag_raw_acc=0.2859,
    hellaswag_raw_acc_tok=0.2955,
    lambada_acc=0.3256,
    lambada_perplexity=40.06,
    wikitext2_word_perplexity=37.37,
    core_centered=0.1139,
)

DOTS = dict(marker='o', ms=3)


class Abscissa(NamedTuple):
    """What a column of panels is drawn against."""
    name: str           # in the records
    unit: float
    label: str


ABSCISSAS = (
    Abscissa('iter', 1, 'iterations'),
    Abscissa('tokens', 1e6, 'million tokens'),
    Abscissa('seconds', 60, 'minutes'),
)


def import_pyplot():
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    return plt


def check_picture(path):
    """UserError where matplotlib cannot write a file of that name."""
    from matplotlib.backend_bases import FigureCanvasBase
    endings = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix('.') not in endings:
        raise UserError(f'picture={picture!r} should end in .{", .".join(sorted(endings))}')


# Curves

def find_scores(runs):
    """The names of the published scores that any run has."""
    records = [record for run_records in runs.values() for record in run_records]
    return [name for name in GPT2_SCORES
            if any(is_number(record.get(name)) for record in records)]


def smoothed(values, share):
    """Exponential moving average of `values`, corrected for its start as in Adam."""
    average = 0.0                               # arXiv:1412.6980
    result = []
    for n, value in enumerate(values, 1):
        average = share * average + (1 - share) * value
        result.append(average / (1 - share ** n))
    return result


def add_tokens(records):
    """The records with `tokens`, how many the run had been trained on before their iteration.

    The records of losses count them after their iteration, and those of evaluations do not count
    them. Where no record counts them, `tokens` is None.
    """
    records = [record for record in records if is_number(record['iter'])]
    counts = {}                                 # {iteration: tokens before it}
    for record in records:
        if is_number(record.get('tokens')):
            counts[record['iter'] + 1] = record['tokens']
    if not counts:
        return [{**record, 'tokens': None} for record in records]

    known, tokens = zip(*sorted({0: 0, **counts}.items()))
    return [{**record, 'tokens': float(np.interp(record['iter'], known, tokens))}
            for record in records]


def draw(runs, path):
    """Write a picture to `path`. One color a run, validation with dots.

    runs: {label: records of read_metrics}.
    """
    plt = import_pyplot()
    scores = find_scores(runs)
    n_rows = 1 + len(scores)
    figure, panels = plt.subplots(n_rows, 3, figsize=(14, 4.5 * n_rows), sharey='row',
                                  layout='constrained', squeeze=False)

    for i, (name, records) in enumerate(runs.items()):
        records = add_tokens(records)
        for column, abscissa in zip(panels.T, ABSCISSAS):
            draw_run(column, abscissa, name, records, scores, color=f'C{i}')

    label_panels(panels, scores)
    figure.savefig(path, dpi=100)


def draw_run(column, abscissa, name, records, scores, color):
    """Draw the curves of one run into a column of panels: its losses, and below them its scores."""
    loss_panel, *score_panels = column

    xs, ys = find_points(records, abscissa, 'loss')
    if xs:
        loss_panel.plot(xs, smoothed(ys, smooth), color=color, label=f'{name} train', lw=0.8,
                        alpha=0.5)

    xs, ys = find_points(records, abscissa, 'val_loss')
    if xs:
        loss_panel.plot(xs, ys, color=color, label=f'{name} val', **DOTS)

    for panel, score in zip(score_panels, scores):
        xs, ys = find_points(records, abscissa, score)
        if xs:
            panel.plot(xs, ys, color=color, label=name, **DOTS)


def find_points(records, abscissa, quantity):
    """(xs, ys) of the records that have both numbers."""
    xs = []
    ys = []
    for record in records:
        x = record.get(abscissa.name)
        y = record.get(quantity)
        if is_number(x) and is_number(y):
            xs.append(x / abscissa.unit)
            ys.append(y)
    return xs, ys


def label_panels(panels, scores):
    """Grids, labels, legends, and what GPT-2 reaches."""
    for panel in panels.flat:
        panel.grid(alpha=0.3)

    for panel, abscissa in zip(panels[-1], ABSCISSAS):
        panel.set(xlabel=abscissa.label)

    panels[0, 0].set(ylabel='loss, nats per token')
    for row, score in zip(panels[1:], scores):
        row[0].set(ylabel=score)
        for panel in row:
            panel.axhline(GPT2_SCORES[score], color='gray', ls='--',
                          label='GPT-2 124M, published')

    for row in panels:
        row[0].legend()


# Heat maps

def draw_health(records, path):
    """Write heat maps to `path`: one for each quantity, with a row for each layer."""
    plt = import_pyplot()
    found = health_by_layer(records)            # {quantity: {layer: {iteration: value}}}
    if not found:
        raise UserError('this run has no measurements of its layers; '
                        'train with --health_interval=100')

    figure, panels = plt.subplots(2, 4, figsize=(20, 9), layout='constrained')
    for panel, (quantity, title) in zip(panels.flat, TITLES.items()):
        panel.set(title=title, xlabel='iterations')
        if quantity in found:
            draw_map(figure, panel, quantity, found[quantity])
    figure.savefig(path, dpi=100)


def draw_map(figure, panel, quantity, layers):
    """Draw the heat map of a quantity. layers: {layer: {iteration: value}}."""
    from matplotlib.colors import LogNorm
    iterations = sorted({iteration for values in layers.values() for iteration in values})
    rows = []
    for values in layers.values():
        rows.append([values.get(iteration, float('nan')) for iteration in iterations])

    # The scale of colors is logarithmic, except for values of 0 and for entropies, which are
    # logarithms themselves.
    norm = LogNorm()
    smallest = min(value for values in layers.values() for value in values.values())
    if quantity == 'attention_entropy' or smallest <= 0:
        norm = None

    image = panel.pcolormesh(iterations, range(len(layers)), rows, norm=norm, shading='nearest')
    panel.set_yticks(range(len(layers)), layers, parse_math=False)
    figure.colorbar(image, ax=panel)


# The runs

def read_runs(folders):
    """{label: records} of the runs in `folders`. A label is the name of a folder, or its whole path
    where an earlier folder has that name."""
    runs = {}
    for folder in folders:
        records = read_metrics(Path(folder) / FILE)
        if not records:
            raise UserError(f'{folder} holds no {FILE} with records; name the out_dir of a run')
        if not health and not any(is_number(record.get('seconds')) for record in records):
            print0(f'note: {folder} has no times, so only its iterations are drawn')

        label = Path(folder).name
        if label in runs:
            label = folder
        runs[label] = records
    return runs


def main(folders):
    """folders: the out_dirs of the runs."""
    configurator.check_range(globals(), 'smooth', 0, below=1)
    if not folders:
        raise UserError('name the folders of the runs, as in: python plot.py out-shakespeare-char')
    if health and len(folders) > 1:
        raise UserError('--health=True draws one run; name one folder')

    default = 'health.png' if health else 'loss.png'
    path = Path(picture or Path(folders[0]) / default)
    check_picture(path)

    runs = read_runs(folders)
    if health:
        records, = runs.values()
        draw_health(records, path)
    else:
        draw(runs, path)
    print0(f'wrote {path}')


if __name__ == '__main__':
    with report_errors():
        run_folders = []
        configurator.configure(globals(), sys.argv[1:], run_folders, usage='RUN ...')
        main(run_folders)
