"""Makes the tables and the picture of studies/initialisation.md.

It needs data/shakespeare_char, or another --dataset.

    python studies/initialisation.py
    python studies/initialisation.py --variants="GPT-2; GPT-2, by width" --depths=4 --picture=''

Each finished run is a line of RESULTS, and the script does not train it again: a stopped study
goes on where it was.
"""

import json
import math
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from console import print0, report_errors

import torch

import configurator
from engine.dataloader.batches import TokenDataset
from engine.errors import UserError, check_range
from engine.training import optim
from engine.training.cpu import keep_freed_memory
from model import GPT, GPTConfig

dataset = 'shakespeare_char'
variants = ''           # names in VARIANTS, separated by semicolons, GPT-2 among them; '' takes all
depths = '4,12,24'      # numbers of layers
seeds = 3               # how many seeds; each draws initial weights and batches of its own
iters = 200             # optimizer steps of a run
n_embd = 64
block_size = 64
batch_size = 4
learning_rate = 2e-3    # the highest rate, reached after a tenth of iters
picture = 'pictures/initialisation.png'     # '' draws none

RESULTS = ROOT / 'out-initialisation' / 'results.jsonl'
WIDE = 768              # channels of GPT-2 124M, for what the initial weights do


# The variants. Each is a pair of functions:
#   the std of the residual projections of one layer, in units of the other weights' std
#   the std of the other weights, for a number of channels

def scale_of_gpt2(layer, n_layer):
    return 1 / math.sqrt(2 * n_layer)


def scale_by_layer(layer, n_layer):         # Zhang et al. 2019, arXiv:1908.11365
    return 1 / math.sqrt(2 * layer)


def no_scale(layer, n_layer):
    return 1.0


def zero(layer, n_layer):
    return 0.0


def std_of_gpt2(width):
    return 0.02


def std_by_width(width):
    return 0.02 * math.sqrt(768 / width)


VARIANTS = {
    'GPT-2': (scale_of_gpt2, std_of_gpt2),
    'not scaled': (no_scale, std_of_gpt2),
    'by layer': (scale_by_layer, std_of_gpt2),
    'zero': (zero, std_of_gpt2),
    'GPT-2, by width': (scale_of_gpt2, std_by_width),
    'zero, by width': (zero, std_by_width),
}


@torch.no_grad()
def build(variant, n_layer, seed, width, vocab_size):
    """A GPT-2 of n_layer layers, initialized by a variant.

    The variants of one seed differ by factors only.
    """
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, 2, width, bias=False))

    # The model has GPT-2's weights now; these factors make them those of the variant.
    scale, std = VARIANTS[variant]
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.mul_(std(width) / 0.02)
    for number, block in enumerate(model.transformer.h, 1):
        factor = scale(number, n_layer) * math.sqrt(2 * n_layer)
        block.attn.c_proj.weight.mul_(factor)
        block.mlp.c_proj.weight.mul_(factor)
    return model


@torch.no_grad()
def stream_variances(model, idx):
    """Mean square of the residual stream: what the first block reads, then what each block writes.

    idx: (B, T) token ids.
    """
    squares = []

    def record_input(_, inputs):
        squares.append(inputs[0].square().mean().item())

    def record_output(_, inputs, x):
        squares.append(x.square().mean().item())

    blocks = model.transformer.h
    hooks = [blocks[0].register_forward_pre_hook(record_input)]
    for block in blocks:
        hooks.append(block.register_forward_hook(record_output))
    model(idx)
    for hook in hooks:
        hook.remove()
    return squares


def train(model, data, seed):
    """The validation loss after `iters` iterations, in nats per token."""
    keep_freed_memory()
    model.keep_logits = False
    optimizer = optim.adamw(model, learning_rate, 0.1, (0.9, 0.99))

    for i in range(iters):
        warmup = min(1, (i + 1) / (0.1 * iters))
        optim.set_lr(optimizer, learning_rate * warmup * (1 - i / iters))
        x, y = data.batch(seed, 'train', i * batch_size, batch_size)
        loss = model(x, y)[1]
        loss.backward()
        optim.clip_grad_norm(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with torch.no_grad():
        x, y = data.batch(0, 'eval val', 0, 512)
        return model(x, y)[1].item()


def read_results():
    """The finished runs: a list of dicts with the settings of a run and its loss."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def train_or_read(known, name, n_layer, seed, data):
    """The validation loss of one run, which is trained unless `known` has it."""
    run = dict(
        name=name,
        n_layer=n_layer,
        seed=seed,
        dataset=data.fingerprint,
        iters=iters,
        n_embd=n_embd,
        block_size=block_size,
        batch_size=batch_size,
        learning_rate=learning_rate,
    )
    for result in known:
        if result == dict(run, loss=result['loss']):
            return result['loss']

    loss = train(build(name, n_layer, seed, n_embd, data.vocab_size), data, seed)
    with RESULTS.open('a') as file:
        file.write(json.dumps(dict(run, loss=loss)) + '\n')
    print0(f'{name}, {n_layer} layers, seed {seed}: val loss {loss:.4f}')
    return loss


def train_all(data, names, layers):
    """{(variant, layers): the validation loss of each seed}."""
    RESULTS.parent.mkdir(exist_ok=True)
    known = read_results()
    losses = {(name, n_layer): [] for name in names for n_layer in layers}
    for seed in range(seeds):
        for name, n_layer in losses:
            losses[name, n_layer].append(train_or_read(known, name, n_layer, seed, data))
    return losses


# Tables and the picture

def mean_and_spread(values, form='.3f'):
    """Mean and standard deviation over the seeds, as text."""
    text = f'{mean(values):{form}}'
    if len(values) > 1:
        text += f' ± {stdev(values):.3f}'
    return text


def print_table(head, rows):
    for cells in (head, ['---'] * len(head), *rows):
        print0('| ' + ' | '.join(cells) + ' |')


def print_variances(variances, names, layers):
    """Print the mean squares after the last block: a row a variant, a column a depth."""
    rows = []
    for name in names:
        cells = [f'{variances[name, n_layer][-1]:.5f}' for n_layer in layers]
        rows.append([name, *cells])
    print_table(['mean square after the last block', *map(str, layers)], rows)


def print_losses(losses, names, layers):
    """Print the losses, and how far they are from GPT-2's of the same seed."""
    rows = []
    for name in names:
        cells = [mean_and_spread(losses[name, n_layer]) for n_layer in layers]
        rows.append([name, *cells])
    print_table(['val loss', *map(str, layers)], rows)

    rows = []
    for name in names:
        if name == 'GPT-2':
            continue
        cells = []
        for n_layer in layers:
            pairs = zip(losses[name, n_layer], losses['GPT-2', n_layer])
            cells.append(mean_and_spread([loss - reference for loss, reference in pairs], '+.3f'))
        rows.append([name, *cells])
    print_table(["minus GPT-2's of the same seed", *map(str, layers)], rows)


def draw(variances, losses, names, layers):
    """Draw the residual stream before training on the left, the losses after it on the right."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    for i, name in enumerate(names):
        color = f'C{i}'
        if (name, layers[-1]) in variances:
            left.semilogy(variances[name, layers[-1]], color, label=name)

        values = [losses[name, n_layer] for n_layer in layers]
        spreads = [stdev(v) if len(v) > 1 else 0 for v in values]
        # side by side, so that no error bar hides another
        places = [n + (i - 2.5) * 0.04 for n in range(len(layers))]
        right.errorbar(places, [mean(v) for v in values], spreads, color=color, marker='o', ms=4,
                       capsize=3, label=name)

    left.set(xlabel='block', ylabel='mean square of the residual stream',
             title=f'Before training: {layers[-1]} layers of {WIDE}')
    right.set(xticks=range(len(layers)), xticklabels=layers, xlabel='layers',
              ylabel='val loss, nats per character',
              title=f'After {iters} iterations: {n_embd} channels, {seeds} seeds')
    for axes in (left, right):
        axes.grid(alpha=0.3)

    figure.legend(*right.get_legend_handles_labels(), loc='outside lower center',
                  ncols=len(names))
    figure.savefig(ROOT / picture, dpi=100)


def main():
    # settings
    check_range(globals(), 'seeds iters', 1, 10 ** 6)
    names = list(VARIANTS)
    if variants:
        names = [name.strip() for name in variants.split(';')]
    if not {'GPT-2'} <= set(names) <= set(VARIANTS):
        known = '; '.join(VARIANTS)
        raise UserError(f'variants={variants!r} should be GPT-2 and others of {known}')
    layers = [int(number) for number in depths.split(',')]

    # the text
    torch.set_num_threads(1)
    data = TokenDataset(dataset)
    data.set_block_size(block_size)

    # the residual stream before training, at the width where "by width" changes nothing
    idx, _ = data.batch(0, 'eval val', 0, 4)
    wide_names = [name for name in names if not name.endswith('by width')]
    variances = {}
    for n_layer in layers:
        for name in wide_names:
            model = build(name, n_layer, 0, WIDE, data.vocab_size)
            variances[name, n_layer] = stream_variances(model, idx)
    print0(f'mean square of what the first block reads: {variances["GPT-2", layers[0]][0]:.5f}')
    print_variances(variances, wide_names, layers)

    # the losses after training
    losses = train_all(data, names, layers)
    print_losses(losses, names, layers)

    if picture:
        draw(variances, losses, names, layers)
        print0(f'wrote {picture}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
