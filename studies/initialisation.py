"""Makes the tables and the picture of studies/initialisation.md. It needs data/shakespeare_char, or another --dataset.

    python studies/initialisation.py
    python studies/initialisation.py --variants="GPT-2; GPT-2, by width" --depths=4 --iters=1000 --picture=''

Each finished run is a line of RESULTS, and the script does not train it again: a stopped study goes on where it was.
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
from engine.training.cpu import optimize_for_training
from model import GPT, GPTConfig

dataset = 'shakespeare_char'
variants = ''           # names in VARIANTS, separated by semicolons, GPT-2 among them; '' takes all
depths = '4,12,24'      # layers
seeds = 3               # of the initial weights and the batches
iters = 200             # optimizer steps of a run
n_embd = 64
block_size = 64
batch_size = 4
learning_rate = 2e-3    # after a tenth of iters
picture = 'pictures/initialisation.png'     # '' draws none

RESULTS = ROOT / 'out-initialisation' / 'results.jsonl'
WIDE = 768              # channels of GPT-2 124M, for what the initial weights do

# name: (std of the residual projections of layer l of L, in units of the other weights' std; that std for C channels)
VARIANTS = {'GPT-2': (lambda l, L: 1 / math.sqrt(2 * L), lambda C: 0.02),
            'not scaled': (lambda l, L: 1.0, lambda C: 0.02),
            'by layer': (lambda l, L: 1 / math.sqrt(2 * l), lambda C: 0.02),        # Zhang et al. 2019, arXiv:1908.11365
            'zero': (lambda l, L: 0.0, lambda C: 0.02),
            'GPT-2, by width': (lambda l, L: 1 / math.sqrt(2 * L), lambda C: 0.02 * math.sqrt(768 / C)),
            'zero, by width': (lambda l, L: 0.0, lambda C: 0.02 * math.sqrt(768 / C))}


@torch.no_grad()
def build(variant, n_layer, seed, width, vocab_size):
    """A GPT-2 of n_layer layers, initialized by a variant. The variants of one seed differ by factors only."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(block_size, vocab_size, n_layer, 2, width, bias=False))
    scale, std = VARIANTS[variant]
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.mul_(std(width) / 0.02)
    for l, block in enumerate(model.transformer.h, 1):
        for layer in (block.attn.c_proj, block.mlp.c_proj):
            layer.weight.mul_(scale(l, n_layer) * math.sqrt(2 * n_layer))
    return model


@torch.no_grad()
def stream_variances(model, idx):
    """Mean square of the residual stream: of what the first block reads, and of what each block writes."""
    squares = []
    hooks = [model.transformer.h[0].register_forward_pre_hook(lambda _, inputs: squares.append(inputs[0].square().mean().item()))]
    hooks += [block.register_forward_hook(lambda _, inputs, x: squares.append(x.square().mean().item()))
              for block in model.transformer.h]
    model(idx)
    for hook in hooks:
        hook.remove()
    return squares


def train(model, data, seed):
    """The validation loss after `iters` iterations."""
    optimize_for_training(model)
    optimizer, scaler = optim.adamw(model, learning_rate, 0.1, (0.9, 0.99)), torch.amp.GradScaler('cpu', enabled=False)
    for i in range(iters):
        optim.set_lr(optimizer, learning_rate * min(1, (i + 1) / (0.1 * iters)) * (1 - i / iters))
        loss = model(*data.batch(seed, 'train', i * batch_size, batch_size))[1]
        loss.backward()
        optim.step(optimizer, scaler, loss, grad_clip=1.0)
    with torch.no_grad():
        return model(*data.batch(0, 'eval val', 0, 512))[1].item()


def train_all(data, names, layers):
    """{(variant, layers): the validation loss of each seed}. Reads what RESULTS has, and trains the rest."""
    RESULTS.parent.mkdir(exist_ok=True)
    known = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    losses = {(name, n_layer): [] for name in names for n_layer in layers}
    for seed in range(seeds):
        for name, n_layer in losses:
            run = dict(name=name, n_layer=n_layer, seed=seed, dataset=data.fingerprint, iters=iters, n_embd=n_embd,
                       block_size=block_size, batch_size=batch_size, learning_rate=learning_rate)
            loss = next((r['loss'] for r in known if r == {**run, 'loss': r['loss']}), None)
            if loss is None:
                loss = train(build(name, n_layer, seed, n_embd, data.vocab_size), data, seed)
                with RESULTS.open('a') as file:
                    file.write(json.dumps({**run, 'loss': loss}) + '\n')
                print0(f'{name}, {n_layer} layers, seed {seed}: val loss {loss:.4f}')
            losses[name, n_layer].append(loss)
    return losses


def mean_and_spread(values, form='.3f'):
    """Mean and standard deviation over the seeds, as text."""
    return f'{mean(values):{form}} ± {stdev(values):.3f}' if len(values) > 1 else f'{values[0]:{form}}'


def print_table(head, rows):
    for cells in (head, ['---'] * len(head), *rows):
        print0('| ' + ' | '.join(cells) + ' |')


def draw(variances, losses, names, layers):
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout='constrained')
    for i, name in enumerate(names):
        if (name, layers[-1]) in variances:
            left.semilogy(variances[name, layers[-1]], f'C{i}', label=name)
        values = [losses[name, n_layer] for n_layer in layers]
        places = [n + (i - 2.5) * 0.04 for n in range(len(layers))]     # side by side, so that no error bar hides another
        right.errorbar(places, [mean(v) for v in values], [stdev(v) if len(v) > 1 else 0 for v in values],
                       color=f'C{i}', marker='o', ms=4, capsize=3, label=name)
    left.set(xlabel='block', ylabel='mean square of the residual stream', title=f'Before training: {layers[-1]} layers of {WIDE}')
    right.set(xticks=range(len(layers)), xticklabels=layers, xlabel='layers', ylabel='val loss, nats per character',
              title=f'After {iters} iterations: {n_embd} channels, {seeds} seeds')
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc='outside lower center', ncols=len(names))
    figure.savefig(ROOT / picture, dpi=100)


def main():
    check_range(globals(), 'seeds iters', 1, 10 ** 6)
    names = [name.strip() for name in variants.split(';')] if variants else list(VARIANTS)
    if not {'GPT-2'} <= set(names) <= set(VARIANTS):
        raise UserError(f'variants={variants!r} should be GPT-2 and others of {"; ".join(VARIANTS)}')
    torch.set_num_threads(1)
    data, layers = TokenDataset(dataset), [int(count) for count in depths.split(',')]
    data.set_block_size(block_size)
    idx = data.batch(0, 'eval val', 0, 4)[0]
    same_at_768 = [name for name in names if not name.endswith('by width')]
    variances = {(name, n_layer): stream_variances(build(name, n_layer, 0, WIDE, data.vocab_size), idx)
                 for n_layer in layers for name in same_at_768}
    print0(f'mean square of what the first block reads: {variances["GPT-2", layers[0]][0]:.5f}')
    print_table(['mean square after the last block', *map(str, layers)],
                [[name, *(f'{variances[name, n][-1]:.5f}' for n in layers)] for name in same_at_768])
    losses = train_all(data, names, layers)
    print_table(['val loss', *map(str, layers)],
                [[name, *(mean_and_spread(losses[name, n]) for n in layers)] for name in names])
    print_table(["minus GPT-2's of the same seed", *map(str, layers)],
                [[name, *(mean_and_spread([a - b for a, b in zip(losses[name, n], losses['GPT-2', n])], '+.3f') for n in layers)]
                 for name in names if name != 'GPT-2'])
    if picture:
        draw(variances, losses, names, layers)
        print0(f'wrote {picture}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
