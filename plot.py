"""Draw the losses of one or several runs against iterations, tokens and time, and their scores of tasks below.
Or draw what one run measured in its layers as heat maps.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --picture=compare.png --smooth=0.9
    python plot.py out-a --health=True
"""

import sys
from pathlib import Path

from console import print0, report_errors

import numpy as np

import configurator
from engine.errors import UserError
from engine.metrics.metrics_file import FILE, TITLES, health_by_layer, is_number, read_metrics

picture = ''        # file to write; '' is loss.png, or health.png, in the first run's folder
smooth = 0.9        # of the training loss: share of the average so far in each new point; 0 draws it as it is
health = False      # True draws the measurements of a run that was trained with --health_interval


# What GPT-2 124M reaches, as docs/evaluation.md has it
GPT2_SCORES = dict(hellaswag_acc=0.2892, hellaswag_acc_norm=0.3114, hellaswag_raw_acc=0.2859, hellaswag_raw_acc_tok=0.2955,
                   lambada_acc=0.3256, lambada_perplexity=40.06, wikitext2_word_perplexity=37.37, core_centered=0.1139)


def find_scores(runs):
    """The names of the published scores that any run has."""
    return [name for name in GPT2_SCORES if any(is_number(r.get(name)) for records in runs.values() for r in records)]


def smoothed(values, share):
    """Exponential moving average of `values`, corrected for its start as Adam's is (arXiv:1412.6980)."""
    average, result = 0.0, []
    for n, value in enumerate(values, 1):
        average = share * average + (1 - share) * value
        result.append(average / (1 - share ** n))
    return result


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


def add_tokens(records):
    """The records with `tokens`, those of training before their iteration; None where no record counts them. The
    records of losses count them after their iteration, and those of evaluations do not count them."""
    records = [r for r in records if is_number(r['iter'])]
    counts = {r['iter'] + 1: r['tokens'] for r in records if is_number(r.get('tokens'))}
    known = sorted({0: 0, **counts}.items())
    return [{**r, 'tokens': float(np.interp(r['iter'], *zip(*known))) if counts else None} for r in records]


def draw(runs, path):
    """Write a picture to `path`. runs: {label: records of read_metrics}. One color a run, validation with dots."""
    plt = import_pyplot()
    scores = find_scores(runs)
    rows = 1 + len(scores)
    figure, panels = plt.subplots(rows, 3, figsize=(14, 4.5 * rows), sharey='row', layout='constrained', squeeze=False)
    for color, (name, records) in enumerate(runs.items()):
        records = add_tokens(records)
        for column, x, unit in zip(panels.T, ('iter', 'tokens', 'seconds'), (1, 1e6, 60)):
            dots = dict(marker='o', ms=3)
            curves = [(column[0], 'loss', 'train', dict(lw=0.8, alpha=0.5)), (column[0], 'val_loss', 'val', dots)]
            curves += [(axes, score, '', dots) for axes, score in zip(column[1:], scores)]
            for axes, y, split, style in curves:
                points = [(r[x] / unit, r[y]) for r in records if is_number(r.get(x)) and is_number(r.get(y))]
                if points:
                    xs, ys = zip(*points)
                    axes.plot(xs, smoothed(ys, smooth) if y == 'loss' else ys, color=f'C{color}',
                              label=f'{name} {split}'.strip(), **style)
    for axes, label in zip(panels[-1], ('iterations', 'million tokens', 'minutes')):
        axes.set(xlabel=label)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
    for row, score in zip(panels[1:], scores):
        row[0].set(ylabel=score)
        for axes in row:
            axes.axhline(GPT2_SCORES[score], color='gray', ls='--', label='GPT-2 124M, published')
    panels[0, 0].set(ylabel='loss, nats per token')
    for row in panels:
        row[0].legend()
    figure.savefig(path, dpi=100)


def draw_health(records, path):
    """Write heat maps to `path`: a map for each quantity of engine.metrics.health, a row for each layer."""
    plt = import_pyplot()
    from matplotlib.colors import LogNorm
    found = health_by_layer(records)                            # quantity: {layer: {iteration: value}}
    if not found:
        raise UserError('this run has no measurements of its layers; train with --health_interval=100')
    figure, panels = plt.subplots(2, 4, figsize=(20, 9), layout='constrained')
    for axes, (quantity, title) in zip(panels.flat, TITLES.items()):
        layers = found.get(quantity, {})
        iterations = sorted({i for values in layers.values() for i in values})
        values = [[layers[layer].get(i, float('nan')) for i in iterations] for layer in layers]
        axes.set(title=title, xlabel='iterations')
        if layers:
            # a logarithmic scale, but where a value is 0 and for the entropy, itself a logarithm
            is_linear = quantity == 'attention_entropy' or min(v for row in layers.values() for v in row.values()) <= 0
            image = axes.pcolormesh(iterations, range(len(layers)), values, norm=None if is_linear else LogNorm(), shading='nearest')
            axes.set_yticks(range(len(layers)), layers, parse_math=False)
            figure.colorbar(image, ax=axes)
    figure.savefig(path, dpi=100)


def main(folders):
    configurator.check_range(globals(), 'smooth', 0, below=1)
    if not folders:
        raise UserError('name the folders of the runs, as in: python plot.py out-shakespeare-char')
    if health and len(folders) > 1:
        raise UserError('--health=True draws one run; name one folder')
    path = Path(picture or Path(folders[0]) / ('health.png' if health else 'loss.png'))
    check_picture(path)
    runs = {}
    for folder in folders:
        records = read_metrics(Path(folder) / FILE)
        if not records:
            raise UserError(f'{folder} holds no {FILE} with records; name the out_dir of a run')
        if not health and not any(is_number(record.get('seconds')) for record in records):
            print0(f'note: {folder} has no times, so only its iterations are drawn')
        runs[Path(folder).name if Path(folder).name not in runs else folder] = records
    draw_health(records, path) if health else draw(runs, path)
    print0(f'wrote {path}')


if __name__ == '__main__':
    with report_errors():
        run_folders = []
        configurator.configure(globals(), sys.argv[1:], positional=run_folders)
        main(run_folders)
