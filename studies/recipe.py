"""Makes the tables and the picture of studies/recipe.md. For Linux and macOS, and data/shakespeare_char.

    python studies/recipe.py                       # both recipes, and the picture
    python studies/recipe.py --study=ablation      # the fast recipe with each part off

A call that was stopped goes on where it was: runs that are complete, with the same settings, are not repeated.
"""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from resource import RUSAGE_CHILDREN, getrusage
from statistics import mean, median
from time import perf_counter

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from console import print0, report_errors

import configurator
from engine.atomic_files import atomic_write
from engine.errors import RunError, check_choice, check_range
from engine.metrics.metrics_file import FILE, read_metrics

study = 'compare'       # compare or ablation
seed = 1337             # of the first run of each variant
seeds = 3               # runs of each kind, each with the next seed
stretch = 10.0          # compare: seconds that one run trains while the other waits
iters = 200             # ablation: iterations of a run
picture = 'pictures/recipe.png'

GPT2 = '''config/train_shakespeare_char.py --device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12
          --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0'''.split()     # the README's
FAST = ['config/train_shakespeare_fast.py']
RECIPES = {'gpt2': GPT2, 'fast': FAST}
DONE = 'recipe.json'    # in the folder of a complete run: its settings, and its CPU seconds
ABLATION = {'all parts': '', 'AdamW for Muon': '--optimizer=adamw --learning_rate=3e-3', 'learned positions': '--position=learned',
            'no QK-norm': '--qk_norm=False', 'GELU': '--activation=gelu', 'tied head': '--tied=True', 'no softcap': '--softcap=0',
            'no zero_init': '--zero_init=False', 'constant, then linear over 40%': '--lr_schedule=wsd', 'four heads': '--n_head=4'}


def folder_of(name, seed):
    return ROOT / 'out-recipe' / f'{name.replace(" ", "-")}-{seed}'


def settings(arguments):
    """The flags of a run and the text of its config file."""
    return [*arguments, (ROOT / arguments[0]).read_text(encoding='utf-8')]


def start(folder, arguments, seed):
    """A training run as a process."""
    shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, 'train.py', *arguments, f'--out_dir={folder}', f'--seed={seed}']
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def save_seconds(folder, arguments, cpu_seconds):
    """Save the CPU seconds of a complete run in its folder."""
    with atomic_write(folder / DONE) as file:
        json.dump([settings(arguments), cpu_seconds], file)


def saved_seconds(folder, arguments):
    """The CPU seconds of a complete run with these settings; None if there is none."""
    found = json.loads((folder / DONE).read_text(encoding='utf-8')) if (folder / DONE).exists() else [None, None]
    return found[1] if found[0] == settings(arguments) else None


def wait(process, seconds=None):
    """The user seconds of CPU that a process took, when it ends; None if it has not ended after `seconds`."""
    before = getrusage(RUSAGE_CHILDREN).ru_utime
    try:
        if process.wait(seconds):
            raise RunError(f'{" ".join(process.args)} failed')
    except subprocess.TimeoutExpired:
        return None
    return getrusage(RUSAGE_CHILDREN).ru_utime - before


def run_in_turn(folders, seed):
    """Run RECIPES, each for `stretch` seconds while the other is stopped. The seconds of metrics.jsonl are then those in
    which the run was not stopped."""
    runs = {name: start(folder, RECIPES[name], seed) for name, folder in folders.items()}
    cpu_seconds, progress = {}, {name: [(0, 0.0)] for name in runs}        # (iteration, seconds so far)
    for process in runs.values():
        process.send_signal(signal.SIGSTOP)
    while len(cpu_seconds) < len(runs):
        for name, process in runs.items():
            folder = folders[name]
            if name in cpu_seconds:
                continue
            began = perf_counter()
            process.send_signal(signal.SIGCONT)
            user = wait(process, stretch)
            if user is None:
                process.send_signal(signal.SIGSTOP)
            else:
                cpu_seconds[name] = user
            records, seconds = read_metrics(folder / FILE), progress[name][-1][1] + perf_counter() - began
            progress[name].append((records[-1]['iter'] if records else 0, seconds))
    for name, folder in folders.items():
        iters, seconds = zip(*progress[name])
        records = [{**record, 'seconds': float(np.interp(record['iter'], iters, seconds))} for record in read_metrics(folder / FILE)]
        (folder / FILE).write_text(''.join(json.dumps(record) + '\n' for record in records), encoding='utf-8')
        save_seconds(folder, RECIPES[name], cpu_seconds[name])


def compare():
    print0('| seed | recipe | iterations | ms, median | seconds | CPU seconds | val loss | 1.88 after |\n|---|---|---|---|---|---|---|---|')
    for n in range(seed, seed + seeds):
        folders = {name: folder_of(name, n) for name in RECIPES}
        if any(saved_seconds(folder, RECIPES[name]) is None for name, folder in folders.items()):
            run_in_turn(folders, n)
        for name, folder in folders.items():
            records, cpu_seconds = read_metrics(folder / FILE), saved_seconds(folder, RECIPES[name])
            evaluations = [record for record in records if 'val_loss' in record]
            reached = next((f'{r["iter"]} iterations, {r["seconds"]:.0f} s' for r in evaluations if r['val_loss'] <= 1.88), 'never')
            print0(f'| {n} | {name} | {evaluations[-1]["iter"]} | {median(r["ms"] for r in records if "ms" in r):.1f} '
                   f'| {evaluations[-1]["seconds"]:.0f} | {cpu_seconds:.0f} | {min(r["val_loss"] for r in evaluations):.4f} '
                   f'| {reached} |')
    folders = [folder_of(name, seed).relative_to(ROOT) for name in RECIPES]
    subprocess.run([sys.executable, 'plot.py', *folders, f'--picture={picture}'], cwd=ROOT, check=True)


def ablate():
    short = [*FAST, '--sample_tokens=0', f'--max_iters={iters}', f'--lr_decay_iters={iters}', f'--eval_interval={iters}',
             f'--cooldown_iters={max(1, iters * 2 // 5)}']
    losses = {name: [] for name in ABLATION}
    for n in range(seed, seed + seeds):
        for name, flags in ABLATION.items():
            folder, arguments = folder_of(name, n), [*short, *flags.split()]
            if saved_seconds(folder, arguments) is None:
                save_seconds(folder, arguments, wait(start(folder, arguments, n)))
            records = read_metrics(folder / FILE)
            losses[name].append(records[-1]['val_loss'])
            print0(f'{name}, seed {n}: val loss {losses[name][-1]:.4f}, {saved_seconds(folder, arguments):.0f} CPU seconds, '
                   f'{median(r["ms"] for r in records if "ms" in r):.1f} ms per iteration')
    print0('| part | val loss | each seed | worse by |\n|---|---|---|---|')
    for name, values in losses.items():
        print0(f'| {name} | {mean(values):.4f} | {", ".join(f"{value:.4f}" for value in values)} '
               f'| {mean(values) - mean(losses["all parts"]):+.4f} |')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        check_choice(globals(), 'study', ('compare', 'ablation'))
        check_range(globals(), 'seeds iters', 1, 10 ** 6)
        compare() if study == 'compare' else ablate()
