"""Makes the tables and the picture of studies/finetuning.md.

It needs data/shakespeare, and Linux or macOS.

    python studies/finetuning.py

It trains with train.py itself: a small GPT-2 on the source code of Python's standard library, then
every run of RUNS, which finetunes that model on the plays. A finished run is not trained again, so
a stopped study goes on where it was. Delete out-finetuning to begin anew.
"""

import contextlib
import math
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from console import print0, report_errors

import torch

import configurator
from engine.errors import RunError, UserError, check_range
from engine.metrics.metrics_file import FILE, read_metrics
from engine.training import optim

seed = 1337             # seed of the first run of each variant
seeds = 3               # runs of each kind, each with the next seed
names = ''              # names of the runs to train, separated by semicolons; '' trains all
picture = 'pictures/finetuning.png'

OUT = ROOT / 'out-finetuning'
MACHINE = ['--device=cpu', '--compile=False', '--dtype=bfloat16']
SHAPE = '''
    --n_layer=4 --n_head=4 --n_embd=128 --block_size=128 --bias=True --activation=gelu_tanh
'''.split()
PRETRAIN = [*MACHINE, *SHAPE, *'''
    --init_from=auto --dataset=stdlib --batch_size=16 --gradient_accumulation_steps=1
    --max_iters=300 --lr_decay_iters=300 --warmup_iters=80 --learning_rate=2e-3 --min_lr=2e-4
    --eval_interval=100 --eval_iters=8
'''.split()]

# The published recipe with 1/32 of the tokens: 20 iterations of 8 x 128 tokens, 2.2 passes over
# the text.
SHARE = 32
BASE = [*MACHINE, *'''
    --dataset=shakespeare_part --batch_size=8 --gradient_accumulation_steps=1 --max_iters=20
    --eval_interval=20 --eval_iters=4 --log_interval=1 --decay_lr=False --dropout=0
    --overwrite=True
'''.split()]
RATES = ('3e-4', '1e-3', '3e-3', '1e-2')
RATE = '1e-3'           # the best of them
LONG = '--max_iters=60 --eval_interval=5'
DECAY = '--decay_lr=True --lr_decay_iters=20 --min_lr=0 --warmup_iters=0'
WARM_UP = '--decay_lr=True --lr_schedule=wsd --warmup_iters=4 --lr_decay_iters=1000000'
SCRATCH = f'--init_from=scratch {" ".join(SHAPE)}'

# name of a run: its flags beside BASE
RUNS = {
    **{f'constant, {rate}': f'--learning_rate={rate}' for rate in RATES},
    'warm-up over 4': WARM_UP,                  # then constant
    'linear to 0': f'{DECAY} --lr_schedule=linear',
    'cosine to 0': f'{DECAY} --lr_schedule=cosine',
    'linear to 0, twice the rate':
        f'{DECAY} --lr_schedule=linear --learning_rate={2 * float(RATE)}',
    'dropout 0.1': '--dropout=0.1',
    'dropout 0.2': '--dropout=0.2',
    'layer-wise decay 0.9': '--layer_decay=0.9',
    'layer-wise decay 0.7': '--layer_decay=0.7',
    'from scratch': SCRATCH,
    'from scratch, 3e-3': f'{SCRATCH} --learning_rate=3e-3',
    '60 iterations': LONG,
    '60 iterations, dropout 0.2': f'{LONG} --dropout=0.2',
}
LAYER_DECAY = '--layer_decay='  # a flag of this study; train.py has no such setting


# Runs of train.py

def layer_of(name, n_layer):
    """The layer of a parameter by its name: 0 to n_layer - 1, or -1 for the embeddings."""
    if '.h.' in name:
        return int(name.split('.')[2])
    if 'ln_f' in name:
        return n_layer - 1
    return -1


def adamw_by_layer(decay, model, learning_rate, weight_decay, betas):
    """AdamW whose learning rate is multiplied by `decay` once for each layer below the last one.

    The embeddings lie below the first layer. With a tied head that is the head's rate too.
    Source: Howard and Ruder 2018, arXiv:1801.06146.
    """
    n_layer = model.config.n_layer
    groups = []
    for name, p in model.named_parameters():
        scale = decay ** (n_layer - 1 - layer_of(name, n_layer))
        groups.append(dict(
            params=[p],
            lr_scale=scale,
            lr=learning_rate * scale,
            weight_decay=weight_decay * (p.dim() >= 2),
        ))
    return torch.optim.AdamW(groups, betas=betas, fused=True)


def train(arguments, layer_decay=1.0):
    """Run train.py with these arguments in this process, which ends with it."""
    if layer_decay < 1:
        optim.adamw = partial(adamw_by_layer, layer_decay)      # set_lr keeps each group's lr_scale
    sys.argv = ['train.py', *arguments]
    with open(os.devnull, 'w', encoding='utf-8') as nowhere:
        with contextlib.redirect_stdout(nowhere):
            runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')


def run(arguments, layer_decay=1.0):
    """Run train.py in a process of its own."""
    method = 'spawn'
    if sys.platform == 'linux':
        method = 'fork'                                         # does not import PyTorch again
    context = multiprocessing.get_context(method)
    process = context.Process(target=train, args=(arguments, layer_decay))
    process.start()
    process.join()
    if process.exitcode:
        raise RunError(f'train.py {" ".join(arguments)} failed')


def call(*command):
    """Run another script of the project."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    if done.returncode:
        raise RunError(f'{" ".join(command)} failed')


# The text and the pretrained model

def prepare_pretraining():
    """Make data/stdlib: Python's standard library as GPT-2's tokens, one document a source file."""
    if (ROOT / 'data/stdlib/meta.json').exists():
        return
    script = runpy.run_path(str(ROOT / 'data/stdlib_char/prepare.py'))
    texts = OUT / 'stdlib'
    texts.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(script['read_sources'](Path(sysconfig.get_path('stdlib')))):
        (texts / f'{i:04}.py').write_text(text, encoding='utf-8')
    call('data/text/prepare.py', f'--input={texts}', '--name=stdlib')


def prepare_finetuning():
    """Make data/shakespeare_part: the first tokens of data/shakespeare, and all of its val."""
    whole = ROOT / 'data/shakespeare'
    part = ROOT / 'data/shakespeare_part'
    if not (whole / 'train.bin').exists():
        raise UserError('data/shakespeare has no tokens; run python data/shakespeare/prepare.py '
                        'first')
    part.mkdir(exist_ok=True)
    tokens = np.fromfile(whole / 'train.bin', '<u2')
    tokens[:len(tokens) // SHARE].tofile(part / 'train.bin')    # without a meta.json: GPT-2's
    shutil.copyfile(whole / 'val.bin', part / 'val.bin')


def pretrain():
    """The folder of Hugging Face weights that the finetuning starts from, made once."""
    folder = OUT / 'weights'
    if not folder.exists():
        run([*PRETRAIN, f'--out_dir={OUT / "pretrained"}'])
        call('export.py', str(OUT / 'pretrained'), str(folder))
    return folder


# The finetuning

def flags_of(name):
    """(flags for train.py, the decay of the learning rate from layer to layer) of a run."""
    flags = []
    layer_decay = 1.0
    for flag in RUNS[name].split():
        if flag.startswith(LAYER_DECAY):
            layer_decay = float(flag.removeprefix(LAYER_DECAY))
        else:
            flags.append(flag)
    return flags, layer_decay


def val_losses(name, n, weights):
    """{iteration: val loss} of the run `name` with seed n, which is trained unless it is done."""
    folder = OUT / f'{name.replace(", ", "-").replace(" ", "-")}-{n}'
    if not (folder / 'finished').exists():
        flags, layer_decay = flags_of(name)
        run([
            *BASE,
            f'--init_from={weights}',
            f'--learning_rate={RATE}',
            *flags,
            f'--out_dir={folder}',
            f'--seed={n}',
        ], layer_decay)
        for path in folder.glob('*.pt'):                        # 120 MB
            path.unlink()
        (folder / 'finished').touch()

    records = read_metrics(folder / FILE)
    losses = {record['iter']: record['val_loss'] for record in records if 'val_loss' in record}
    best = min(losses, key=losses.get)
    print0(f'{name}, seed {n}: val loss {losses[best]:.4f} at iteration {best}')
    return losses


def stopped(losses, patience):
    """Where train.py with --patience ends a run that has these losses, {iteration: val loss}.

    Returns (iteration, best loss by then).
    """
    best = math.inf
    without_progress = 0
    for iteration, loss in losses.items():
        if loss < best:
            best = loss
            without_progress = 0
        else:
            without_progress += 1
        if without_progress == patience:
            return iteration, best
    return max(losses), best


# Tables and the picture

def mean_and_spread(values, form='.3f'):
    """Mean and standard deviation over the seeds, as text."""
    text = f'{mean(values):{form}}'
    if len(values) > 1:
        text += f' ± {stdev(values):.3f}'
    return text


def spread(values):
    """The standard deviation over the seeds, 0 for one seed."""
    if len(values) > 1:
        return stdev(values)
    return 0


def minus(values, others):
    return [value - other for value, other in zip(values, others)]


def last_losses(losses):
    """{name: the last val loss of each seed}."""
    return {name: [list(run.values())[-1] for run in runs] for name, runs in losses.items()}


def print_tables(losses):
    """Print both tables. losses: {name: [{iteration: val loss} of each seed]}."""
    print_last_losses(losses)
    print_patience({name: runs for name, runs in losses.items() if name.startswith('60')})


def print_last_losses(losses):
    last = last_losses(losses)
    base = last.get(f'constant, {RATE}')
    print0('| run | val loss at the end | minus the base, same seed | lowest |\n'
           '|---|---|---|---|')
    for name, values in last.items():
        difference = ''
        if base:
            difference = mean_and_spread(minus(values, base), '+.3f')
        lowest = [min(run.values()) for run in losses[name]]
        print0(f'| {name} | {mean_and_spread(values)} | {difference} | {mean_and_spread(lowest)} |')


def print_patience(losses):
    print0('| run | patience | ends after | best loss by then | minus the best of the whole run |\n'
           '|---|---|---|---|---|')
    for name, runs in losses.items():
        lowest = [min(run.values()) for run in runs]
        for patience in (1, 2, 3):
            ends, bests = zip(*(stopped(run, patience) for run in runs))
            missed = minus(bests, lowest)
            print0(f'| {name} | {patience} | {", ".join(map(str, ends))} '
                   f'| {mean_and_spread(bests)} | {mean_and_spread(missed)} |')


def draw(losses):
    """Draw the learning rates, the other settings, and the long runs, from left to right."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.2), layout='constrained')
    last = last_losses(losses)
    draw_rates(left, last)
    draw_differences(middle, last)
    draw_curves(right, {name: runs for name, runs in losses.items() if name.startswith('60')})
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / picture, dpi=100)


def draw_rates(axes, last):
    """Draw the loss over the constant learning rate."""
    rates = [rate for rate in RATES if f'constant, {rate}' in last]
    values = [last[f'constant, {rate}'] for rate in rates]
    axes.errorbar([float(rate) for rate in rates], [mean(v) for v in values],
                  [spread(v) for v in values], marker='o', capsize=3)
    axes.set(xscale='log', xlabel='constant learning rate', ylabel='val loss, nats per token',
             title='20 iterations')


def draw_differences(axes, last):
    """Draw how far each other setting is from the base, with the same seeds."""
    others = [name for name in last if not name.startswith(('constant', '60', 'from'))]
    base = last[f'constant, {RATE}']
    for i, name in enumerate(others):
        differences = minus(last[name], base)
        axes.errorbar(mean(differences), i, xerr=spread(differences), marker='o', capsize=3,
                      color='C0')
    axes.axvline(0, color='gray', lw=1)
    axes.set(yticks=range(len(others)), yticklabels=others,
             xlabel=f'val loss minus that of constant {RATE}', title='other settings')
    axes.invert_yaxis()


def draw_curves(axes, losses):
    """Draw the loss over the iterations, a line for each seed."""
    for i, (name, runs) in enumerate(losses.items()):
        for n, run in enumerate(runs):
            label = name
            if n > 0:                           # one label for all seeds
                label = None
            axes.plot(list(run), list(run.values()), color=f'C{i}', lw=1, marker='.', label=label)
    axes.set(xlabel='iteration', ylabel='val loss, nats per token',
             title='60 iterations, a line for each seed')
    axes.legend()


def main():
    # settings
    check_range(globals(), 'seeds', 1, 10 ** 6)
    chosen = list(RUNS)
    if names:
        chosen = [name.strip() for name in names.split(';')]
    if not set(chosen) <= set(RUNS):
        raise UserError(f'names={names!r} should be some of {"; ".join(RUNS)}')

    # what the runs start from
    os.chdir(ROOT)
    prepare_pretraining()
    prepare_finetuning()
    weights = pretrain()

    # the runs
    losses = {name: [] for name in chosen}
    for n in range(seed, seed + seeds):
        for name in chosen:
            losses[name].append(val_losses(name, n, weights))

    # what came of them
    print_tables(losses)
    if not names:
        draw(losses)
        print0(f'wrote {picture}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
