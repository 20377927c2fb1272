"""Draw the losses of one or several runs against iterations, tokens and time, and their scores of
tasks below. Or draw what one run measured in its layers as heat maps.

    python plot.py out-shakespeare-char
    python plot.py out-a out-b --picture=compare.png --smooth=0.1
    python plot.py out-a --health=True

In a notebook, plot.live(out_dir) draws the losses while a run trains.
Losses are in nats per token. Where runs have different tokenizers, they are in bits per byte.
"""

import math
import sys
import time
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from console import print0, report_errors

import numpy as np

import configurator
from engine.checkpoint.kept import kept_models
from engine.errors import UserError
from engine.metrics.metrics_file import (
    CLIPPED,
    CLIPPED_WINDOW,
    FILE,
    LIMITS,
    TITLES,
    health_by_layer,
    is_number,
    read_metrics,
)

picture = ''        # file to write; '' is loss.png, or health.png, in the first run's folder
smooth = 0.05       # each point of the training loss is a mean over this share of the run's
                    # iterations; 0 draws the loss as it is
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
RINGS = dict(marker='o', ms=9, mfc='none', ls='')       # around the val loss of a kept model
START = 0.05        # share of a run's iterations whose losses may lie above the panel

# What is bad in a heat map. Values over a limit are red.
WARNINGS = dict(
    weight_norm='bad: a layer that grows without end',
    grad_norm='bad: spikes, or a layer far from the others',
    update_ratio=f'bad: over {LIMITS["update_ratio"].value:g}, drawn in red',
    activation_rms='bad: a rise without end',
    activation_max='bad: a rise without end; float16 ends at 65,504',
    attention_entropy='bad: near 0, attention to a single token',
    attention_logit=f'bad: over {LIMITS["attention_logit"].value:g}, drawn in red',
    dead_units='share of the MLP; bad: near 1, where nothing passes',
)
LAYERS = dict(wte='tokens', wpe='positions', ln_f='last norm', lm_head='output')
MAX_TICKS = 16      # names of layers beside a heat map


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


class DrawnRun(NamedTuple):
    """A run, ready to draw."""
    name: str
    records: list[dict]     # with `tokens` and `smoothed_loss`; losses in the unit of the picture
    color: str
    kept: set[int]          # iterations whose models the folder keeps


def new_figure(n_rows, n_columns, size, **options):
    """(an empty figure, its panels).

    pyplot has no part in it: it would keep every figure, and change how a notebook shows others.
    """
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout='constrained')
    return figure, figure.subplots(n_rows, n_columns, **options)


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


def smoothed(iterations, values, share):
    """The mean around each value, over `share` of the iterations from the first to the last.

    Near the first iteration the mean reaches less far, and equally far to both sides, so that it
    follows a steep beginning. iterations: in order.
    """
    iterations = np.array(iterations, float)
    reach = share / 2 * (iterations[-1] - iterations[0])
    reach = np.minimum(reach, iterations - iterations[0])
    begin = np.searchsorted(iterations, iterations - reach, side='left')
    end = np.searchsorted(iterations, iterations + reach, side='right')

    sums = np.concatenate([[0.0], np.cumsum(values)])
    return ((sums[end] - sums[begin]) / (end - begin)).tolist()


def add_tokens(records):
    """The records with `tokens`, how many the run had been trained on before their iteration.

    The records of losses count them after their iteration, and those of evaluations do not count
    them. Where no record counts them, `tokens` is None.
    """
    counts = {}                                 # {iteration: tokens before it}
    for record in records:
        if is_number(record.get('tokens')):
            counts[record['iter'] + 1] = record['tokens']
    if not counts:
        return [{**record, 'tokens': None} for record in records]

    known, tokens = zip(*sorted({0: 0, **counts}.items()))
    iterations = [record['iter'] for record in records]
    tokens = np.interp(iterations, known, tokens).tolist()
    return [{**record, 'tokens': count} for record, count in zip(records, tokens)]


def add_smoothed_loss(records):
    """The records, of which those with a `loss` also have its `smoothed_loss`."""
    losses = [record for record in records if is_number(record.get('loss'))]
    if not losses:
        return records

    iterations = [record['iter'] for record in losses]
    values = iter(smoothed(iterations, [record['loss'] for record in losses], smooth))
    result = []
    for record in records:
        if is_number(record.get('loss')):
            record = {**record, 'smoothed_loss': next(values)}
        result.append(record)
    return result


def choose_unit(runs):
    """(the label of the losses, {label of a run: what its nats per token are multiplied by}).

    runs: {label: records of read_metrics}.
    """
    sizes = {}                                  # bytes per token of each run, or None
    for name, records in runs.items():
        known = [record['bytes_per_token'] for record in records
                 if is_number(record.get('bytes_per_token')) and record['bytes_per_token'] > 0]
        sizes[name] = None
        if known:
            sizes[name] = known[-1]

    if None in sizes.values() and len(runs) > 1:
        label = 'loss, nats per token\n(compare only runs with the same tokenizer)'
    elif len(set(sizes.values())) == 1:
        label = 'loss, nats per token'
    else:
        factors = {name: 1 / math.log(2) / size for name, size in sizes.items()}
        return 'loss, bits per byte', factors
    return label, dict.fromkeys(runs, 1)


def prepare_run(name, records, factor, color, kept=()):
    """The DrawnRun of a run's records. factor: what the losses are multiplied by."""
    records = [record for record in records if is_number(record['iter'])]
    records.sort(key=lambda record: record['iter'])

    drawn = []
    for record in records:
        losses = {quantity: record[quantity] * factor for quantity in ('loss', 'val_loss')
                  if is_number(record.get(quantity))}
        drawn.append({**record, **losses})
    return DrawnRun(name, add_smoothed_loss(add_tokens(drawn)), color, set(kept))


def draw(runs, path, kept=None):
    """Write a picture to `path`, the name of a file or a file that takes a PNG.

    One color is a run. Validation has dots, and kept models have rings.
    runs: {label: records of read_metrics}. kept: {label: iterations whose models are kept}.
    """
    scores = find_scores(runs)
    n_rows = 1 + len(scores)
    figure, panels = new_figure(n_rows, 3, (14, 1 + 4.5 * n_rows), sharey='row', squeeze=False)

    unit, factors = choose_unit(runs)
    kept = kept or {}
    drawn_runs = [prepare_run(name, records, factors[name], f'C{i}', kept.get(name, ()))
                  for i, (name, records) in enumerate(runs.items())]
    for run in drawn_runs:
        for column, abscissa in zip(panels.T, ABSCISSAS):
            draw_run(column, abscissa, run, scores)

    limit_losses(panels[0], drawn_runs)
    label_panels(panels, unit, scores)
    title = f'Loss of {", ".join(runs)}'
    if len(title) > 100:
        title = f'Loss of {len(runs)} runs'
    figure.suptitle(title, fontsize='x-large')
    add_legend(figure, panels)
    figure.savefig(path, dpi=100)


def draw_run(column, abscissa, run, scores):
    """Draw the curves of one run into a column of panels: its losses, and below them its scores."""
    loss_panel, *score_panels = column

    xs, ys = find_points(run.records, abscissa, 'smoothed_loss')
    if xs:
        loss_panel.plot(xs, ys, color=run.color, label=f'{run.name}, training', lw=0.8, alpha=0.6)

    # No line joins the loss of the untrained model to the next one: it would only show a jump.
    start = [record for record in run.records if record['iter'] == 0]
    rest = [record for record in run.records if record['iter'] > 0]
    xs, ys = find_points(rest, abscissa, 'val_loss')
    start_xs, start_ys = find_points(start, abscissa, 'val_loss')
    xs = start_xs + start_xs[-1:] + xs
    ys = start_ys + [math.nan] * len(start_ys[-1:]) + ys
    if xs:
        loss_panel.plot(xs, ys, color=run.color, label=f'{run.name}, validation', **DOTS)

    records_of_kept = [record for record in run.records if record['iter'] in run.kept]
    xs, ys = find_points(records_of_kept, abscissa, 'val_loss')
    if xs:
        loss_panel.plot(xs, ys, color=run.color, label=f'{run.name}, kept models', **RINGS)

    for panel, score in zip(score_panels, scores):
        xs, ys = find_points(run.records, abscissa, score)
        if xs:
            panel.plot(xs, ys, color=run.color, label=run.name, **DOTS)


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


def limit_losses(panels, runs):
    """Let the beginning of the runs leave the panels at the top, where it would take most of them.

    panels: a row, which shares its axis.
    """
    everything = []
    later = []                                  # without the first share, START, of each run
    for run in runs:
        last = run.records[-1]['iter'] if run.records else 0
        for quantity in ('smoothed_loss', 'val_loss'):
            iterations, losses = find_points(run.records, ABSCISSAS[0], quantity)
            everything += losses
            later += [loss for iteration, loss in zip(iterations, losses)
                      if iteration > START * last]
    if not later:
        return

    lowest = min(everything)
    height = max(later) - lowest
    if not 0 < 2 * height < max(everything) - lowest:
        return
    panels[0].set_ylim(lowest - 0.05 * height, max(later) + 0.05 * height)
    panels[0].text(0.97, 0.97, f'begins at up to {max(everything):.3g}, above the picture',
                   transform=panels[0].transAxes, ha='right', va='top', color='gray')


def label_panels(panels, unit, scores):
    """Grids, labels, and what GPT-2 reaches. unit: the label of the losses."""
    for panel in panels.flat:
        panel.grid(alpha=0.3)
        panel.xaxis.set_major_formatter('{x:,.10g}')

    for panel, abscissa in zip(panels[-1], ABSCISSAS):
        panel.set(xlabel=abscissa.label)

    panels[0, 0].set(ylabel=unit)
    for row, score in zip(panels[1:], scores):
        row[0].set(ylabel=score)
        for panel in row:
            panel.axhline(GPT2_SCORES[score], color='gray', ls='--',
                          label='GPT-2 124M, published')


def add_legend(figure, panels):
    """A legend below all panels, where it covers no curve."""
    lines = list(panels[0, 0].lines)
    for panel in panels[1:, 0]:
        lines += [line for line in panel.lines if line.get_label().startswith('GPT-2')][:1]

    entries = {line.get_label(): line for line in lines}
    if entries:
        figure.legend(entries.values(), entries, loc='outside lower center',
                      ncols=min(4, len(entries)))


# Heat maps

def draw_health(name, records, path):
    """Write heat maps to `path`: one for each quantity, with a row for each layer.

    name: of the run.
    """
    found = health_by_layer(records)            # {quantity: {layer: {iteration: value}}}
    if not found:
        raise UserError('this run has no measurements of its layers; '
                        'train with --health_interval=100')

    figure, panels = new_figure(2, 4, (20, 10))
    for panel, (quantity, title) in zip(panels.flat, TITLES.items()):
        panel.set(title=f'{title}\n{WARNINGS[quantity]}', xlabel='iterations')
        if quantity in found:
            draw_map(figure, panel, quantity, found[quantity])
        else:
            panel.text(0.5, 0.5, 'not measured', transform=panel.transAxes, ha='center')

    verdict = find_trouble(found, records)
    color = 'C3'
    if not verdict:
        verdict = ['nothing is over its limit']
        color = 'C2'
    figure.suptitle('\n'.join([f'The layers of {name}', *verdict]), fontsize='xx-large',
                    color=color)
    figure.savefig(path, dpi=100)


def find_trouble(found, records):
    """A line for each quantity that is over its limit, where it is worst.

    found: what health_by_layer(records) returned.
    """
    lines = []
    for quantity in ('update_ratio', 'attention_logit'):
        limit = LIMITS[quantity].value
        values = [(value, layer, iteration)
                  for layer, measured in found.get(quantity, {}).items()
                  for iteration, value in measured.items()
                  if not begins_with_zeros(quantity, measured)]
        value, layer, iteration = max(values, default=(0, '', 0))
        if value > limit:
            lines.append(f'{TITLES[quantity]} is {value:.3g} in {layer_title(layer)} at iteration '
                         f'{iteration:,} (limit {limit:g})')

    clipped = [(record[CLIPPED], record['iter']) for record in records
               if is_number(record.get(CLIPPED)) and CLIPPED_WINDOW <= record['iter'] < 1e15]
    share, iteration = max(clipped, default=(0, 0))
    if share > LIMITS['clipped'].value:
        lines.append(f'{share:.0%} of the {CLIPPED_WINDOW} steps up to iteration {iteration:,} '
                     f'were clipped (limit {LIMITS["clipped"].value:.0%})')
    return lines


def begins_with_zeros(quantity, measured):
    """True where the first step made all of a layer's weights. Its relative steps are large."""
    return quantity == 'update_ratio' and abs(measured.get(0, 0) - 1) < 1e-3


def layer_title(layer):
    """'h.3' as 'block 3'."""
    if layer.startswith('h.'):
        return f'block {layer.removeprefix("h.")}'
    return LAYERS.get(layer, layer)


def draw_map(figure, panel, quantity, layers):
    """Draw the heat map of a quantity. layers: {layer: {iteration: value}}."""
    import matplotlib
    from matplotlib.colors import LogNorm, Normalize
    iterations = sorted({iteration for values in layers.values() for iteration in values})
    rows = []
    for values in layers.values():
        rows.append([values.get(iteration, float('nan')) for iteration in iterations])

    # The colors end at the limit, if there is one, so that what is healthy looks so.
    numbers = [value for values in layers.values() for value in values.values()]
    lowest = min(numbers)
    highest = max(numbers)
    extend = 'neither'
    if quantity in LIMITS:
        highest = LIMITS[quantity].value
        lowest = min(lowest, highest / 10)
        extend = 'max'
    elif quantity == 'dead_units':
        lowest = 0
        highest = 1

    # The scale of colors is logarithmic, except for values of 0 and for entropies, which are
    # logarithms themselves.
    if quantity == 'attention_entropy' or lowest <= 0:
        norm = Normalize(lowest, highest)
        ticks = np.linspace(lowest, highest, 5)
    else:
        norm = LogNorm(lowest, highest)
        ticks = np.geomspace(lowest, highest, 5)
    if quantity == 'attention_entropy':
        norm.vmin = 0                           # where it is bad
        ticks = np.linspace(0, highest, 5)

    colors = matplotlib.colormaps['viridis'].with_extremes(over='red', bad='white')
    image = panel.pcolormesh(iterations, range(len(layers)), rows, norm=norm, cmap=colors,
                             shading='nearest')
    step = math.ceil(len(layers) / MAX_TICKS)
    panel.set_yticks(range(0, len(layers), step),
                     [layer_title(layer) for layer in layers][::step], parse_math=False)
    panel.xaxis.set_major_formatter('{x:,.10g}')
    bar = figure.colorbar(image, ax=panel, ticks=ticks, format='{x:.3g}', extend=extend)
    bar.minorticks_off()


# The runs

def read_runs(folders):
    """{label: records} of the runs in `folders`, and {label: iterations of kept models}.

    A label is the name of a folder, or its whole path where an earlier folder has that name.
    """
    runs = {}
    kept = {}
    for folder in folders:
        records = read_metrics(Path(folder) / FILE)
        if not records:
            raise UserError(f'{folder} holds no {FILE} with records; name the out_dir of a run')
        if not health and not any(is_number(record.get('seconds')) for record in records):
            print0(f'note: {folder} has no times, so nothing of it is drawn against minutes')

        label = Path(folder).name
        if label in runs:
            label = folder
        runs[label] = records
        kept[label] = list(kept_models(folder))
    return runs, kept


# In a notebook

def live(out_dir, run=None, seconds=2.0):
    """Show the losses of a run in a notebook, in a picture that is drawn again while it trains.

    out_dir: the folder of the run, which may not exist yet.
    run: what trains: a threading.Thread or a subprocess.Popen that was started. The picture is the
        last one when it has ended. Without it, stop the cell to end the drawing.
    seconds: how long to wait between two looks at the folder.
    Raises UserError without IPython.
    """
    try:
        from IPython.display import Image, display
    except ImportError:
        raise UserError('plot.live shows its picture in a notebook, which needs IPython; elsewhere '
                        f'draw with: python plot.py {out_dir}') from None

    path = Path(out_dir) / FILE
    shown = display('waiting for the first losses', display_id=True)
    n_drawn = 0                                 # records that the picture has
    with suppress(KeyboardInterrupt):
        while True:
            is_last = run is not None and not is_running(run)
            records = read_metrics(path)
            if len(records) != n_drawn:
                n_drawn = len(records)
                content = BytesIO()
                draw({Path(out_dir).name: records}, content)
                shown.update(Image(content.getvalue()))
            if is_last:
                return
            time.sleep(seconds)


def is_running(run):
    """True while a Thread, or a Popen, has not ended."""
    if hasattr(run, 'poll'):
        return run.poll() is None
    return run.is_alive()


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

    runs, kept = read_runs(folders)
    if health:
        (name, records), = runs.items()
        draw_health(name, records, path)
    else:
        draw(runs, path, kept)
    print0(f'wrote {path}')


if __name__ == '__main__':
    with report_errors():
        run_folders = []
        configurator.configure(globals(), sys.argv[1:], run_folders, usage='RUN ...')
        main(run_folders)
