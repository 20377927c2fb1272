"""Figures of several commands as one Markdown table: each command runs in a process of its own, so that
peak memory is its own too."""

import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from engine.atomic_files import atomic_write
from engine.device import DTYPES


def run(command, read_figures, timeout=1200):
    """The figures of a command, {name: number}, or {'failed': the reason}. read_figures: bench_figures or train_figures."""
    began = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, timeout=timeout, encoding='utf-8', errors='replace')
    except subprocess.TimeoutExpired:
        return {'failed': f'over {timeout // 60:.0f} minutes'}
    figures = read_figures(done.stdout, time.perf_counter() - began) if done.returncode == 0 else None
    return figures or {'failed': (done.stderr.strip().splitlines() or ['no figures'])[-1][:200]}


def bench_figures(output, seconds):
    """What the last line of bench.py has as JSON, or None."""
    try:
        figures = json.loads(output.splitlines()[-1])
        return figures if isinstance(figures, dict) else None
    except (ValueError, IndexError):
        return None


def train_figures(output, seconds):
    """The best loss that train.py prints and the minutes of the whole process, or None."""
    loss = re.search(r'best val loss ([\d.]+)', output)
    return loss and dict(best_val_loss=float(loss[1]), minutes=seconds / 60)


def format_figures(figures):
    """{'mfu': 0.5, 'ms': 12.3} as 'mfu 50.0%, 12.30 ms'."""
    formats = dict(ms='{:,.2f} ms', tokens_per_second='{:,.0f} tokens/s', mfu='mfu {:.1%}', peak_tflops='of {:,.2f} TFLOP/s',
                   memory_gib='{:.2f} GiB', bandwidth_share='{:.0%} of the memory bandwidth', mb_per_second='{:,.1f} MB/s',
                   best_val_loss='best val loss {:.4f}', minutes='{:.1f} min', failed='failed: {}')
    return ', '.join(text.format(figures[name]) for name, text in formats.items() if figures.get(name) is not None)


def rows(folder, device, on_cpu, out_dir):
    """[(what, command, function that reads its figures)] of everything that a report times. folder: of the scripts.
    out_dir: of a run for the while."""
    common = [str(folder / 'bench.py'), f'--device={device}', '--figures=True', '--compile=auto']
    step = '--batch_size=4 --block_size=256 --warmup_steps=1 --steps=5'.split() if on_cpu else []
    smaller = ('--eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 '
               '--lr_decay_iters=2000 --dropout=0.0').split() if on_cpu else []
    steps = [(f'training step of GPT-2 124M, {name}', step + [f'--dtype={name}'])
             for name in DTYPES if not (on_cpu and name == 'float16')]        # which takes minutes a step
    steps += [('the same, eager', step + ['--compile=False']),
              ('the same, eager, activations recomputed', step + ['--compile=False', '--recompute=True'])]
    samples = [(f'generation, 124M, one sequence, {name}', ['--bench=sample', '--steps=8', f'--dtype={name}'])
               for name in DTYPES]
    encoding = [("encoding with GPT-2's tokens", ['--bench=data'])]
    training = [str(folder / 'train.py'), 'train_shakespeare_char', f'--device={device}', f'--out_dir={out_dir}',
                '--sample_tokens=0', *smaller]
    return [*((what, common + flags, bench_figures) for what, flags in steps + samples + encoding),
            ('config/train_shakespeare_char.py to its end', training, train_figures)]


def write(path, title, rows, print_line):
    """Write the table to `path`. rows: those of rows(). print_line: prints a line, here one before each row."""
    lines = [f'# {title}', '',
             f'{datetime.date.today()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}, '
             f'PyTorch {torch.__version__}, NumPy {np.__version__}.', '',
             '| what | figures | command |', '|---|---|---|']
    for what, command, read_figures in rows:
        print_line(f'{what} ...')
        figures = format_figures(run(command, read_figures))
        typed = [Path(command[0]).name] + [flag for flag in command[1:] if not flag.startswith('--out_dir=')]
        lines.append(f'| {what} | {figures} | `python {shlex.join(typed)}` |')
    with atomic_write(path) as file:
        file.write('\n'.join(lines) + '\n')
