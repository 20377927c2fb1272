"""Makes the picture of studies/recipe.md, and its tables of whole runs and of the ablation.

It needs data/shakespeare_char, and Linux or macOS.

    python studies/recipe.py --study=laptop        # the laptop recipe, beside nanoGPT's settings
    python studies/recipe.py                       # the other two, and a picture of all three
    python studies/recipe.py --study=ablation      # the fast recipe with each part off

A call that was stopped goes on where it was: runs that are complete, with the same settings, are
not repeated.
"""

import ast
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import mean, median
from time import perf_counter

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from console import print0, report_errors

import configurator
from engine.atomic_files import atomic_write
from engine.errors import RunError, check_choice, check_range
from engine.metrics.metrics_file import FILE, read_metrics
from model import GPT

study = 'compare'       # compare, ablation or laptop
seed = 1337             # seed of the first run of each variant
seeds = 3               # runs of each kind, each with the next seed
stretch = 10.0          # compare: seconds that one run trains while the other waits
iters = 200             # ablation: iterations of a run
steps = 3               # laptop: steps of nanoGPT's settings that a turn times; it has two turns
picture = 'pictures/recipe.png'     # compare: where the curves are drawn

# GPT-2's recipe is the README's command for a CPU.
GPT2 = '''
    config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1
    --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000
    --lr_decay_iters=2000 --dropout=0.0
'''.split()
FAST = ['config/train_shakespeare_fast.py']
RECIPES = {'gpt2': GPT2, 'fast': FAST}
LAPTOP = ['config/train_shakespeare_laptop.py']
# nanoGPT's settings for an A100, on a CPU; its README reports a val loss of 1.4697. We do not know
# at which of its 5,000 iterations; 2,250 is an assumption.
A100 = ['config/train_shakespeare_char.py', '--device=cpu', '--compile=False']
A100_ITERATIONS = 2250

# name of a run: what it changes in the fast recipe
ABLATION = {
    'all parts': '',
    'AdamW for Muon': '--optimizer=adamw --learning_rate=3e-3',
    'learned positions': '--position=learned',
    'no QK-norm': '--qk_norm=False',
    'GELU': '--activation=gelu',
    'tied head': '--tied=True',
    'no softcap': '--softcap=0',
    'no zero_init': '--zero_init=False',
    'constant, then linear over 40%': '--lr_schedule=wsd',
    'four heads': '--n_head=4',
}
DONE = 'recipe.json'    # in the folder of a complete run: its settings, and its CPU seconds
GOAL = 1.88             # val loss, in nats per character; GPT-2 ends just above it


# One run

def folder_of(name, seed):
    return ROOT / 'out-recipe' / f'{name.replace(" ", "-")}-{seed}'


def settings(arguments):
    """The flags of a run and the code of its config file, whose comments do not count."""
    config = ast.parse((ROOT / arguments[0]).read_text(encoding='utf-8'))
    return [*arguments, ast.unparse(config)]


@contextmanager
def training(folder, arguments, seed):
    """The process of a training run. It does not outlive the context."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, 'train.py', *arguments, f'--out_dir={folder}', f'--seed={seed}']
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def train(folder, arguments, seed):
    """Train a run to its end. Returns its CPU seconds."""
    with training(folder, arguments, seed) as process:
        return wait(process)


def train_once(folder, arguments, seed):
    """Train a run to its end, unless its folder has the whole run already."""
    if saved_seconds(folder, arguments) is None:
        save_seconds(folder, arguments, train(folder, arguments, seed))


def save_seconds(folder, arguments, cpu_seconds):
    """Save the CPU seconds of a complete run in its folder."""
    with atomic_write(folder / DONE) as file:
        json.dump([settings(arguments), cpu_seconds], file)


def saved_seconds(folder, arguments):
    """The CPU seconds of a complete run with these settings; None if there is none."""
    path = folder / DONE
    if not path.exists():
        return None
    saved_settings, cpu_seconds = json.loads(path.read_text(encoding='utf-8'))
    if saved_settings != settings(arguments):
        return None
    return cpu_seconds


def wait(process, seconds=None):
    """The CPU seconds that a process took, when it ends; None if it runs on after `seconds`."""
    before = getrusage(RUSAGE_CHILDREN).ru_utime
    try:
        if process.wait(seconds):
            raise RunError(f'{" ".join(process.args)} failed')
    except subprocess.TimeoutExpired:
        return None
    return getrusage(RUSAGE_CHILDREN).ru_utime - before


# Both recipes

def run_in_turn(folders, seed):
    """Run RECIPES, each for `stretch` seconds while the other is stopped.

    folders: {recipe: the folder of its run}. The seconds of metrics.jsonl are afterwards those
    in which the run was not stopped.
    """
    cpu_seconds = {}
    progress = {name: [(0, 0.0)] for name in folders}   # (iteration, seconds so far)
    with ExitStack() as stack:
        runs = {}
        for name, folder in folders.items():
            runs[name] = stack.enter_context(training(folder, RECIPES[name], seed))
            runs[name].send_signal(signal.SIGSTOP)

        # in turn, with a note of the progress after each stretch
        while len(cpu_seconds) < len(runs):
            for name, process in runs.items():
                if name in cpu_seconds:
                    continue
                began = perf_counter()
                process.send_signal(signal.SIGCONT)
                user = wait(process, stretch)
                if user is None:
                    process.send_signal(signal.SIGSTOP)
                else:
                    cpu_seconds[name] = user
                add_progress(progress[name], folders[name], perf_counter() - began)

    for name, folder in folders.items():
        correct_seconds(folder, progress[name])
        save_seconds(folder, RECIPES[name], cpu_seconds[name])


def add_progress(progress, folder, seconds):
    """Append (iteration that a run has reached, seconds so far) after `seconds` more."""
    records = read_metrics(folder / FILE)
    iteration = 0
    if records:
        iteration = records[-1]['iter']
    _, seconds_before = progress[-1]
    progress.append((iteration, seconds_before + seconds))


def correct_seconds(folder, progress):
    """Replace the seconds of metrics.jsonl by those of `progress`, interpolated."""
    iterations, seconds = zip(*progress)
    lines = []
    for record in read_metrics(folder / FILE):
        record['seconds'] = float(np.interp(record['iter'], iterations, seconds))
        lines.append(json.dumps(record) + '\n')
    (folder / FILE).write_text(''.join(lines), encoding='utf-8')


def median_ms(records):
    """The median of the milliseconds per iteration that a run logged."""
    return median(record['ms'] for record in records if 'ms' in record)


def print_recipe(name, folder, seed):
    """Print the row of one run."""
    records = read_metrics(folder / FILE)
    cpu_seconds = saved_seconds(folder, RECIPES[name])
    evaluations = [record for record in records if 'val_loss' in record]

    reached = 'never'
    for record in evaluations:
        if record['val_loss'] <= GOAL:
            reached = f'{record["iter"]} iterations, {record["seconds"]:.0f} s'
            break

    last = evaluations[-1]
    best = min(record['val_loss'] for record in evaluations)
    print0(f'| {seed} | {name} | {last["iter"]} | {last["seconds"]:.0f} | {cpu_seconds:.0f} '
           f'| {best:.4f} | {reached} |')


def compare():
    """Train both recipes with each seed, print a table, and draw the curves of the first seed.

    The picture also has the laptop recipe, where its study has run it with that seed.
    """
    print0(f'| seed | recipe | iterations | seconds | CPU seconds | val loss | {GOAL} after |\n'
           '|---|---|---|---|---|---|---|')
    for n in range(seed, seed + seeds):
        folders = {name: folder_of(name, n) for name in RECIPES}
        if any(saved_seconds(folder, RECIPES[name]) is None for name, folder in folders.items()):
            run_in_turn(folders, n)
        for name, folder in folders.items():
            print_recipe(name, folder, n)

    drawn = [folder_of(name, seed) for name in RECIPES]
    laptop = folder_of('laptop', seed)
    if saved_seconds(laptop, LAPTOP) is not None:
        drawn.append(laptop)
    folders = [folder.relative_to(ROOT) for folder in drawn]
    command = [sys.executable, 'plot.py', *folders, f'--picture={picture}']
    subprocess.run(command, cwd=ROOT, check=True)


# The parts of the fast recipe

def run_part(name, seed):
    """Train the fast recipe as one row of ABLATION changes it, unless it is done.

    Returns the val loss, in nats per character.
    """
    arguments = [
        *FAST,
        '--sample_tokens=0',
        f'--max_iters={iters}',
        f'--lr_decay_iters={iters}',
        f'--eval_interval={iters}',
        f'--cooldown_iters={max(1, iters * 2 // 5)}',
        *ABLATION[name].split(),
    ]
    folder = folder_of(name, seed)
    train_once(folder, arguments, seed)
    records = read_metrics(folder / FILE)
    loss = records[-1]['val_loss']
    print0(f'{name}, seed {seed}: val loss {loss:.4f}, '
           f'{saved_seconds(folder, arguments):.0f} CPU seconds, '
           f'{median_ms(records):.1f} ms per iteration')
    return loss


def ablate():
    """Train the fast recipe with each part off, and print what that costs."""
    losses = {name: [] for name in ABLATION}
    for n in range(seed, seed + seeds):
        for name in ABLATION:
            losses[name].append(run_part(name, n))

    print0('| part | val loss | each seed | worse by |\n|---|---|---|---|')
    whole = mean(losses['all parts'])
    for name, values in losses.items():
        each = ', '.join(f'{value:.4f}' for value in values)
        print0(f'| {name} | {mean(values):.4f} | {each} | {mean(values) - whole:+.4f} |')


# The laptop recipe

def time_steps():
    """{'A100' or 'laptop': median milliseconds of an iteration}, of two turns each."""
    times = {'A100': [], 'laptop': []}
    for name in ('A100', 'laptop', 'laptop', 'A100'):
        recipe = A100
        count = steps                       # these are timed, after a first one
        if name == 'laptop':
            recipe = LAPTOP
            count = 10 * steps              # a step takes much less time
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder, 'run')
            flags = [f'--max_iters={1 + count}', '--eval_iters=1', '--sample_tokens=0',
                     '--log_interval=1']
            train(run, [*recipe, *flags], seed)
            records = [record for record in read_metrics(run / FILE) if 'ms' in record]
        times[name] += [record['ms'] for record in records[1:]]     # the first one warms up
    return {name: median(values) for name, values in times.items()}


@torch.no_grad()
def whole_val_loss(folder):
    """The loss of a run's model, in nats per character, on all of val.bin in disjoint blocks."""
    model = GPT.from_checkpoint(folder).eval()
    block_size = model.config.block_size
    tokens = np.fromfile(ROOT / 'data/shakespeare_char/val.bin', '<u2').astype(np.int64)
    tokens = torch.from_numpy(tokens)[None]                             # (1, T)

    n_targets = tokens.size(1) - 1
    total = 0.0
    for begin in range(0, n_targets, block_size):
        end = min(begin + block_size, n_targets)
        _, loss = model(tokens[:, begin:end], tokens[:, begin + 1:end + 1])
        total += loss.item() * (end - begin)
    return total / n_targets


def train_laptop():
    """Train the laptop recipe with each seed, and print a table beside the time of the A100's."""
    print0('| seed | iterations | minutes | ms, median | val loss | on all of val.bin |\n'
           '|---|---|---|---|---|---|')
    for n in range(seed, seed + seeds):
        folder = folder_of('laptop', n)
        train_once(folder, LAPTOP, n)
        records = read_metrics(folder / FILE)
        last = [record for record in records if 'val_loss' in record][-1]
        print0(f'| {n} | {last["iter"]} | {last["seconds"] / 60:.1f} | {median_ms(records):.0f} '
               f'| {last["val_loss"]:.4f} | {whole_val_loss(folder):.4f} |')
    iterations = last['iter']                           # the same with each seed

    times = time_steps()
    a100_minutes = A100_ITERATIONS * times['A100'] / 60_000
    laptop_minutes = iterations * times['laptop'] / 60_000
    print0(f"A100's settings: {times['A100']:.0f} ms per iteration, so {a100_minutes:.0f} minutes "
           f'for {A100_ITERATIONS:,} iterations')
    print0(f'laptop: {times["laptop"]:.0f} ms per iteration, so {laptop_minutes:.0f} minutes for '
           f'{iterations:,}: {a100_minutes / laptop_minutes:.1f} times as fast')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        check_choice(globals(), 'study', ('compare', 'ablation', 'laptop'))
        check_range(globals(), 'seeds iters steps', 1, 10 ** 6)
        check_range(globals(), 'stretch', 0.1, 10 ** 6)
        if study == 'compare':
            compare()
        elif study == 'ablation':
            ablate()
        else:
            train_laptop()
