"""Scaling laws: train models of several sizes with several budgets, and say which size is best for which budget.

    python data/stdlib_char/prepare.py --max_bytes=10_000_000
    python scaling.py                                   # 15 small runs; the same command again goes on
    python scaling.py --flops=1e15                      # which size and how many tokens for this budget

Each run is a train.py of its own, with a learning rate that falls to a tenth at its end. out_dir holds runs.csv,
one line for each finished run, and scaling.png.
"""

import csv
import math
import subprocess
import sys
import time
from pathlib import Path

from console import print0, progress_bar, report_errors

import configurator
from engine.atomic_files import atomic_write
from engine.dataloader.batches import TokenDataset
from engine.errors import RunError, UserError
from engine.metrics.metrics_file import read_metrics
from engine.tokenizer import Tokenizer, padded_vocab_size
from studies import scaling_laws

# what to train
out_dir = 'out-scaling'                     # of one study; another dataset or batch size needs another folder
sizes = '1x16,1x32,2x32,2x48,3x64'          # layers x width; runs of other sizes stay in runs.csv and are not fitted
budgets = '2.5e11,5e11,1e12'                # floating point operations of a run
dataset = 'stdlib_char'                     # a folder of data/
head_size = 16                              # channels of an attention head
batch_size = 16                             # sequences per iteration
block_size = 64                             # tokens of context
learning_rate = 4e-3                        # at width 64; falls with the square root of the width
eval_iters = 100                            # batches of the final loss
train_flags = ''                            # more flags for train.py, such as '--device=cpu --compile=False'
# what to say
flops = 0.0                                 # a budget to plan for; 0 plans for ten times the largest
counting = 'total'                          # N of the fits: total (Hoffmann), or non_embedding (Kaplan)

FIELDS = ('budget', 'n_layer', 'n_embd', 'token', 'position', 'block', 'total', 'non_embedding', 'iterations', 'tokens',
          'flops', 'loss', 'bits_per_byte', 'seconds')


def parse_list(name, text, read):
    try:
        return [read(part) for part in text.split(',')]
    except UserError:
        raise
    except ValueError:
        example = configurator.read_settings(__file__)[name].default
        raise UserError(f'{name}={text!r} should be a list such as {example}') from None


def parse_size(text):
    n_layer, n_embd = map(int, text.split('x'))
    if n_layer < 1 or n_embd < 1 or n_embd % head_size:
        raise UserError(f'sizes: {text} should be layers x width, and the width a multiple of head_size={head_size}')
    return n_layer, n_embd


def parse_budget(text):
    if not 0 < float(text) < 1e30:
        raise ValueError
    return float(text)


def read_runs(path):
    """The finished runs of a CSV file, with numbers in them."""
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f'{path} is not a regular file; move it away')
    try:
        with open(path, encoding='utf-8', newline='') as file:
            runs = [{name: float(row[name]) for name in FIELDS} for row in csv.DictReader(file)]
        if not all(0 < value < math.inf for run in runs for value in run.values()):
            raise ValueError('a number that is not above 0')
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f'{path} is damaged ({error}); move it away and start again') from None
    return runs


def write_runs(path, runs):
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows({name: f'{run[name]:.10g}' for name in FIELDS} for run in runs)


def bytes_per_token(data):
    """Of the first million tokens of val, to compare losses across tokenizers."""
    tokens = data.tokens['val'][:10 ** 6].tolist()
    return len(Tokenizer(data.tokenizer).decode(tokens).encode()) / len(tokens)


def train(budget, n_layer, n_embd, data, bytes_each):
    """Train one model in a process of its own. Returns its line of the CSV."""
    vocab_size = padded_vocab_size(data.vocab_size)
    parameters = scaling_laws.count_parameters(n_layer, n_embd, vocab_size, block_size)
    # As GPT.flops_per_token counts them: without the position embedding, with attention.
    flops_per_token = 6 * (parameters['total'] - parameters['position']) + 12 * n_layer * n_embd * block_size
    iterations = round(budget / flops_per_token / batch_size / block_size)
    if iterations < 20:
        raise UserError(f'{n_layer}x{n_embd} gets only {iterations} iterations of {budget:g} FLOPs; leave it out, '
                        f'or lower --batch_size')
    folder, lr = Path(out_dir) / f'{budget:g}-{n_layer}x{n_embd}', learning_rate * math.sqrt(64 / n_embd)
    settings = dict(
        out_dir=folder, init_from='auto', dataset=dataset, n_layer=n_layer, n_embd=n_embd, n_head=n_embd // head_size,
        block_size=block_size, batch_size=batch_size, gradient_accumulation_steps=1, max_iters=iterations,
        lr_decay_iters=iterations, warmup_iters=iterations // 10, learning_rate=lr, min_lr=lr / 10, eval_interval=iterations, eval_iters=eval_iters,
        log_interval=max(1, iterations // 20), always_save_checkpoint=False)
    script = Path(__file__).with_name('train.py')
    command = [sys.executable, str(script), *(f'--{name}={value}' for name, value in settings.items()), *train_flags.split()]
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, encoding='utf-8')
    if done.returncode:
        raise RunError(f'{folder}: train.py ended with {done.returncode}: {(done.stderr.strip().splitlines() or [""])[-1]}')
    losses = [record['val_loss'] for record in read_metrics(folder / 'metrics.jsonl') if record.get('val_loss')]
    if not losses:
        raise RunError(f'{folder} has no validation loss in its metrics.jsonl; remove the folder and start again')
    loss = losses[-1]
    tokens = iterations * batch_size * block_size
    return dict(parameters, budget=budget, n_layer=n_layer, n_embd=n_embd, iterations=iterations, tokens=tokens,
                flops=tokens * flops_per_token, loss=loss, bits_per_byte=loss / math.log(2) / bytes_each,
                seconds=time.monotonic() - began)


def group_by_budget(runs):
    """{budget: (N, D, losses)}, lists in order of N."""
    grouped = {}
    for run in sorted(runs, key=lambda run: run[counting]):
        columns = grouped.setdefault(run['budget'], ([], [], []))
        for column, value in zip(columns, (run[counting], run['tokens'], run['loss'])):
            column.append(value)
    return grouped


def draw(grouped, parabolas, path):
    """The loss over N, one color a budget, with its parabola and its lowest point."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np
    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    for color, (budget, (N, _, losses)) in enumerate(grouped.items()):
        x, parabola = np.geomspace(N[0], N[-1], 100), parabolas[budget]
        axes.plot(N, losses, 'o', color=f'C{color}', label=f'{budget:g} FLOPs')
        axes.plot(x, np.polyval(parabola.coefficients, np.log(x)), color=f'C{color}')
        axes.plot(parabola.N, parabola.loss, 'v', color=f'C{color}', markersize=10, markerfacecolor='none')
    axes.set(xscale='log', xlabel=f'parameters, {counting.replace("_", "-")}', ylabel='validation loss, nats per token')
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    configurator.check_range(globals(), 'batch_size block_size head_size eval_iters', 1, 2 ** 20)
    shapes, targets = parse_list('sizes', sizes, parse_size), parse_list('budgets', budgets, parse_budget)
    if counting not in ('total', 'non_embedding'):
        raise UserError(f"counting={counting!r} should be 'total' or 'non_embedding'")
    configurator.check_range(globals(), 'learning_rate', above=0, below=math.inf)
    configurator.check_range(globals(), 'flops', 0, below=math.inf)
    data = TokenDataset(dataset)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    path, bytes_each = Path(out_dir) / 'runs.csv', bytes_per_token(data)
    runs = read_runs(path)
    missing = [(budget, *shape) for budget in targets for shape in shapes
               if (budget, *shape) not in {(run['budget'], run['n_layer'], run['n_embd']) for run in runs}]
    for job in progress_bar('training', missing, len(missing)):
        runs.append(train(*job, data, bytes_each))
        write_runs(path, runs)

    runs = [run for run in runs if run['budget'] in targets and (run['n_layer'], run['n_embd']) in shapes]
    grouped = group_by_budget(sorted(runs, key=lambda run: run['budget']))
    parabolas = {budget: scaling_laws.fit_parabola(N, losses) for budget, (N, _, losses) in grouped.items()}
    for budget, best in parabolas.items():
        note = '   at the edge: add sizes' if best.at_edge else ''
        print0(f'{budget:8.2g} FLOPs: loss {best.loss:.4f} with {best.N:,.0f} parameters ({counting}){note}')
    if len(grouped) > 1:
        for name, (exponent, low, high) in scaling_laws.fit_exponents(grouped).items():
            print0(f'{name} grows with C^{exponent:.2f} ({low:.2f} to {high:.2f}, 80% of a bootstrap)')
    draw(grouped, parabolas, Path(out_dir) / 'scaling.png')
    print0(f'wrote {path} and {Path(out_dir) / "scaling.png"}')
    N, D, losses = ([value for lists in grouped.values() for value in lists[i]] for i in range(3))
    law = scaling_laws.fit_loss_law(N, D, losses)
    print0(f'L(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} + {law.B:.4g} / D^{law.beta:.3f}')
    target = flops or 10 * max(grouped)
    N, D = law.optimum(target)
    print0(f'for {target:.3g} FLOPs train {N:,.0f} parameters on {D:,.0f} tokens: expected loss {law.loss(N, D):.3f}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
