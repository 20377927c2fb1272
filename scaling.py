"""Scaling laws: train models of several sizes with several budgets, and say which size is best for
which budget.

    python data/stdlib_char/prepare.py --max_bytes=10_000_000
    python scaling.py                       # 15 small runs; the same command again goes on
    python scaling.py --flops=1e15          # which size and how many tokens for this budget

Each run is a train.py of its own, with a learning rate that falls to a tenth at its end. out_dir
holds runs.csv, one line for each finished run, and scaling.png.
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
out_dir = 'out-scaling'                     # folder of one study; another dataset or batch size
                                            # needs another folder
sizes = '1x16,1x32,2x32,2x48,3x64'          # layers x width; runs of other sizes stay in runs.csv
                                            # and are not fitted
budgets = '2.5e11,5e11,1e12'                # floating point operations of a run
dataset = 'stdlib_char'                     # a folder of data/
head_size = 16                              # channels of an attention head
batch_size = 16                             # sequences per iteration
block_size = 64                             # tokens of context
learning_rate = 4e-3                        # rate at width 64; it falls with the square root of
                                            # the width
eval_iters = 100                            # batches of the final loss
train_flags = ''                            # more flags for train.py, such as
                                            # '--device=cpu --compile=False'
# what to say
flops = 0.0                                 # budget to plan for; 0 plans for ten times the largest
counting = 'total'                          # which N is fitted: total (Hoffmann), or
                                            # non_embedding (Kaplan)

FIELDS = ('budget', 'n_layer', 'n_embd', 'token', 'position', 'block', 'total', 'non_embedding',
          'iterations', 'tokens', 'flops', 'loss', 'bits_per_byte', 'seconds')


# Settings

def parse_list(name, text, read):
    """What `read` makes of each part of a setting with commas. UserError where it cannot."""
    try:
        return [read(part) for part in text.split(',')]
    except UserError:
        raise
    except ValueError:
        example = configurator.read_settings(__file__)[name].default
        raise UserError(f'{name}={text!r} should be a list such as {example}') from None


def parse_size(text):
    """'2x48' as (2, 48)."""
    n_layer, n_embd = map(int, text.split('x'))
    if n_layer < 1 or n_embd < 1 or n_embd % head_size:
        raise UserError(f'sizes: {text} should be layers x width, and the width a multiple of '
                        f'head_size={head_size}')
    return n_layer, n_embd


def parse_budget(text):
    """'1e12' as a number of floating point operations."""
    if not 0 < float(text) < 1e30:
        raise ValueError
    return float(text)


# The runs that are finished

def read_runs(path):
    """The finished runs of a CSV file: a list of {field: number}, empty where there is no file."""
    if not path.exists():
        return []
    if not path.is_file():
        raise UserError(f'{path} is not a regular file; move it away')

    try:
        with open(path, encoding='utf-8', newline='') as file:
            runs = [{name: float(row[name]) for name in FIELDS} for row in csv.DictReader(file)]
        for run in runs:
            if not all(0 < value < math.inf for value in run.values()):
                raise ValueError('a number that is not above 0')
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f'{path} is damaged ({error}); move it away and start again') from None
    return runs


def write_runs(path, runs):
    """Write the CSV file that read_runs reads."""
    with atomic_write(path) as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        for run in runs:
            writer.writerow({name: f'{run[name]:.10g}' for name in FIELDS})


def bytes_per_token(data):
    """Bytes of text in a token, by the first million tokens of val.

    With it, losses can be compared across tokenizers.
    """
    return Tokenizer(data.tokenizer).bytes_per_token(data.tokens['val'][:10 ** 6])


# Training

def train_settings(folder, n_layer, n_embd, iterations):
    """The settings of train.py for one run, {name: value}."""
    # the rate falls with the width, and within a run to a tenth of itself
    rate = learning_rate * math.sqrt(64 / n_embd)
    return dict(
        out_dir=folder,
        init_from='auto',

        # the model, and the batch it reads
        dataset=dataset,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_embd // head_size,
        block_size=block_size,
        batch_size=batch_size,
        gradient_accumulation_steps=1,

        # how long, and how fast
        max_iters=iterations,
        lr_decay_iters=iterations,
        warmup_iters=iterations // 10,
        learning_rate=rate,
        min_lr=rate / 10,

        # one evaluation, at the end
        eval_interval=iterations,
        eval_iters=eval_iters,
        log_interval=max(1, iterations // 20),
        always_save_checkpoint=False,
    )


def run_train(folder, settings):
    """Run train.py in a process of its own. Raises RunError with its last line where it fails."""
    script = Path(__file__).with_name('train.py')
    flags = [f'--{name}={value}' for name, value in settings.items()]
    command = [sys.executable, str(script), *flags, *train_flags.split()]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          encoding='utf-8')

    if done.returncode:
        lines = done.stderr.strip().splitlines() or ['']
        raise RunError(f'{folder}: train.py ended with {done.returncode}: {lines[-1]}')


def last_val_loss(folder):
    """The validation loss at the end of a run, in nats per token."""
    records = read_metrics(folder / 'metrics.jsonl')
    losses = [record['val_loss'] for record in records if record.get('val_loss')]
    if not losses:
        raise RunError(f'{folder} has no validation loss in its metrics.jsonl; remove the folder '
                       'and start again')
    return losses[-1]


def train(budget, n_layer, n_embd, data, bytes_each):
    """Train one model with a budget of floating point operations.

    bytes_each: bytes of text in a token. Returns the run's line of the CSV file, {field: number}.
    """
    # The budget decides the iterations. The operations per token are counted as
    # GPT.flops_per_token does: without the position embedding, with attention.
    vocab_size = padded_vocab_size(data.vocab_size)
    parameters = scaling_laws.count_parameters(n_layer, n_embd, vocab_size, block_size)
    multiplied = parameters['total'] - parameters['position']
    flops_per_token = 6 * multiplied + 12 * n_layer * n_embd * block_size
    iterations = round(budget / flops_per_token / batch_size / block_size)
    if iterations < 20:
        raise UserError(f'{n_layer}x{n_embd} gets only {iterations} iterations of {budget:g} FLOPs;'
                        ' leave it out, or lower --batch_size')

    # train
    folder = Path(out_dir) / f'{budget:g}-{n_layer}x{n_embd}'
    began = time.monotonic()
    run_train(folder, train_settings(folder, n_layer, n_embd, iterations))

    # what came of it
    loss = last_val_loss(folder)
    tokens = iterations * batch_size * block_size
    return dict(
        parameters,
        budget=budget,
        n_layer=n_layer,
        n_embd=n_embd,
        iterations=iterations,
        tokens=tokens,
        flops=tokens * flops_per_token,
        loss=loss,
        bits_per_byte=loss / math.log(2) / bytes_each,
        seconds=time.monotonic() - began,
    )


def train_missing(runs, path, targets, shapes, data):
    """Train each size with each budget, unless `runs` has it.

    Each new run is appended to `runs`, and written to the CSV file at `path`.
    """
    known = {(run['budget'], run['n_layer'], run['n_embd']) for run in runs}
    missing = [(budget, *shape) for budget in targets for shape in shapes
               if (budget, *shape) not in known]

    bytes_each = bytes_per_token(data)
    for budget, n_layer, n_embd in progress_bar('training', missing, len(missing)):
        runs.append(train(budget, n_layer, n_embd, data, bytes_each))
        write_runs(path, runs)


# Fits

def group_by_budget(runs):
    """{budget: (N, D, losses)} with lists in order of N. The budgets rise."""
    grouped = {}
    for run in sorted(runs, key=lambda run: (run['budget'], run[counting])):
        N, D, losses = grouped.setdefault(run['budget'], ([], [], []))
        N.append(run[counting])
        D.append(run['tokens'])
        losses.append(run['loss'])
    return grouped


def print_best_sizes(parabolas):
    """Print the best size for each budget."""
    for budget, best in parabolas.items():
        note = ''
        if best.at_edge:
            note = '   at the edge: add sizes'
        print0(f'{budget:8.2g} FLOPs: loss {best.loss:.4f} with {best.N:,.0f} parameters '
               f'({counting}){note}')


def print_exponents(grouped):
    """Print how the best N and D grow with the budget, which takes two budgets."""
    if len(grouped) < 2:
        return
    for name, (exponent, low, high) in scaling_laws.fit_exponents(grouped).items():
        print0(f'{name} grows with C^{exponent:.2f} ({low:.2f} to {high:.2f}, 80% of a bootstrap)')


def print_plan(grouped):
    """Print the law that fits all runs, and what it advises for the budget `flops`."""
    N, D, losses = [], [], []
    for sizes_of_budget, tokens_of_budget, losses_of_budget in grouped.values():
        N += sizes_of_budget
        D += tokens_of_budget
        losses += losses_of_budget
    law = scaling_laws.fit_loss_law(N, D, losses)
    print0(f'L(N, D) = {law.E:.3f} + {law.A:.4g} / N^{law.alpha:.3f} '
           f'+ {law.B:.4g} / D^{law.beta:.3f}')

    target = flops or 10 * max(grouped)
    best_n, best_d = law.optimum(target)
    print0(f'for {target:.3g} FLOPs train {best_n:,.0f} parameters on {best_d:,.0f} tokens: '
           f'expected loss {law.loss(best_n, best_d):.3f}')


def draw(grouped, parabolas, path):
    """Draw the loss over N, one color a budget, with its parabola and its lowest point."""
    import matplotlib
    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(8, 5), layout='constrained')
    for i, (budget, (N, _, losses)) in enumerate(grouped.items()):
        color = f'C{i}'
        parabola = parabolas[budget]
        x = np.geomspace(N[0], N[-1], 100)
        y = np.polyval(parabola.coefficients, np.log(x))
        axes.plot(N, losses, 'o', color=color, label=f'{budget:g} FLOPs')
        axes.plot(x, y, color=color)
        axes.plot(parabola.N, parabola.loss, 'v', color=color, markersize=10,
                  markerfacecolor='none')

    axes.set(xscale='log', xlabel=f'parameters, {counting.replace("_", "-")}',
             ylabel='validation loss, nats per token')
    axes.legend()
    figure.savefig(path, dpi=120)


def main():
    # settings
    counts = 'batch_size block_size head_size eval_iters'
    configurator.check_range(globals(), counts, 1, 2 ** 20)
    shapes = parse_list('sizes', sizes, parse_size)
    targets = parse_list('budgets', budgets, parse_budget)
    if counting not in ('total', 'non_embedding'):
        raise UserError(f"counting={counting!r} should be 'total' or 'non_embedding'")
    configurator.check_range(globals(), 'learning_rate', above=0, below=math.inf)
    configurator.check_range(globals(), 'flops', 0, below=math.inf)

    # train what runs.csv does not have
    data = TokenDataset(dataset)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    path = Path(out_dir) / 'runs.csv'
    runs = read_runs(path)
    train_missing(runs, path, targets, shapes, data)

    # the best size for each budget, and how it grows
    chosen = [run for run in runs
              if run['budget'] in targets and (run['n_layer'], run['n_embd']) in shapes]
    grouped = group_by_budget(chosen)
    parabolas = {budget: scaling_laws.fit_parabola(N, losses)
                 for budget, (N, _, losses) in grouped.items()}
    print_best_sizes(parabolas)
    print_exponents(grouped)

    # the picture
    picture = Path(out_dir) / 'scaling.png'
    draw(grouped, parabolas, picture)
    print0(f'wrote {path} and {picture}')

    # a law over all budgets, and what it advises
    print_plan(grouped)


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
