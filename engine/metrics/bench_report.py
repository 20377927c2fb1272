"""Figures of several commands as one Markdown table.

Each command runs in a process of its own, so that its peak memory is its own too.
"""

import datetime
import json
import multiprocessing
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.atomic_files import atomic_write
from engine.device import DTYPES
from engine.distributed import start_environment
from engine.log import log

FORMATS = dict(
    ms='{:,.2f} ms',
    tokens_per_second='{:,.0f} tokens/s',
    mfu='mfu {:.1%}',
    peak_tflops='of {:,.2f} TFLOP/s',
    memory_gib='{:.2f} GiB',
    bandwidth_share='{:.0%} of the memory bandwidth',
    mb_per_second='{:,.1f} MB/s',
    best_val_loss='best val loss {:.4f}',
    minutes='{:.1f} min',
    failed='failed: {}',
)

# What a CPU takes in place of a GPU's settings, to be done within minutes.
STEPS_ON_CPU = '--batch_size=4 --block_size=256 --warmup_steps=1 --steps=5'
RUN_ON_CPU = ('--eval_iters=20 --block_size=64 --batch_size=12 --n_layer=4 --n_head=4 '
              '--n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0')


class Row(NamedTuple):
    """A row of the report."""
    what: str                   # is timed
    command: list[str]          # what follows `python`
    read_figures: Callable      # (stdout, seconds) to {name: number}, or None where it has none


def describe_machine(*choices: str | bool) -> tuple[str, str]:
    """(a line about the machine, the kind of its device), for arguments of start_environment.

    It is asked in another process: CUDA takes hundreds of megabytes of the GPU in each process that
    uses it, and this one lives as long as the commands. Raises UserError as start_environment does.
    """
    context = multiprocessing.get_context('spawn')
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(start_and_describe, *choices).result()


def start_and_describe(*choices):
    env = start_environment(*choices)
    return env.summary, env.device.type


def rows(folder: Path, device: str, on_cpu: bool, out_dir: str) -> list[Row]:
    """Everything that a report times.

    folder: holds bench.py and train.py.
    device: the setting of that name.
    on_cpu: True takes less work.
    out_dir: a folder for a run, which may be deleted afterwards.
    """
    bench = [str(folder / 'bench.py'), f'--device={device}', '--figures=True', '--compile=auto']
    found = []

    def add(what, *flags):
        found.append(Row(what, [*bench, *flags], bench_figures))

    # The training step
    step_flags = STEPS_ON_CPU.split() if on_cpu else []
    for dtype in DTYPES:
        if on_cpu and dtype == 'float16':       # it takes minutes a step
            continue
        add(f'training step of GPT-2 124M, {dtype}', *step_flags, f'--dtype={dtype}')
    add('the same, eager', *step_flags, '--compile=False')
    add('the same, eager, activations recomputed',
        *step_flags, '--compile=False', '--recompute=True')

    # Generation and encoding
    for dtype in DTYPES:
        add(f'generation, 124M, one sequence, {dtype}',
            '--bench=sample', '--steps=8', f'--dtype={dtype}')
    add("encoding with GPT-2's tokens", '--bench=data')

    # A whole run
    train = [str(folder / 'train.py'), 'train_shakespeare_char', f'--device={device}',
             f'--out_dir={out_dir}', '--sample_tokens=0']
    if on_cpu:
        train += RUN_ON_CPU.split()
    found.append(Row('config/train_shakespeare_char.py to its end', train, train_figures))
    return found


def write(path: str | Path, title: str, rows: list[Row],
          more_lines: Callable[[], list[str]] | None = None) -> None:
    """Run the command of each row, and write the table to `path`. Logs a line before each row.

    more_lines: is called after the last command, and returns the lines of another table.
    """
    lines = [
        f'# {title}',
        '',
        f'{datetime.date.today()}, {platform.system()} {platform.machine()}, '
        f'Python {platform.python_version()}, PyTorch {torch.__version__}, '
        f'NumPy {np.__version__}.',
        '',
        '| what | figures | command |',
        '|---|---|---|',
    ]
    for what, command, read_figures in rows:
        log.info(f'{what} ...')
        figures = format_figures(run(command, read_figures))
        lines.append(f'| {what} | {figures} | `python {format_command(command)}` |')

    if more_lines:
        lines += ['', *more_lines()]
    with atomic_write(path) as file:
        file.write('\n'.join(lines) + '\n')


def run(command, read_figures, timeout=1200):
    """The figures of a command, {name: number}, or {'failed': the reason}. timeout: seconds."""
    began = time.perf_counter()
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, timeout=timeout,
                              encoding='utf-8', errors='replace')
    except subprocess.TimeoutExpired:
        return {'failed': f'over {timeout // 60:.0f} minutes'}

    figures = None
    if done.returncode == 0:
        figures = read_figures(done.stdout, time.perf_counter() - began)
    if figures:
        return figures

    errors = done.stderr.strip().splitlines()
    if not errors:
        return {'failed': 'no figures'}
    return {'failed': errors[-1][:200]}


def bench_figures(output, seconds):
    """What the last line of bench.py has as JSON, or None."""
    try:
        figures = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        return None
    if not isinstance(figures, dict):
        return None
    return figures


def train_figures(output, seconds):
    """The best loss that train.py prints and the minutes of the whole process, or None."""
    loss = re.search(r'best val loss ([\d.]+)', output)
    if not loss:
        return None
    return dict(best_val_loss=float(loss[1]), minutes=seconds / 60)


def format_figures(figures):
    """{'mfu': 0.5, 'ms': 12.3} as '12.30 ms, mfu 50.0%'."""
    parts = []
    for name, template in FORMATS.items():
        value = figures.get(name)
        if value is not None:
            parts.append(template.format(value))
    return ', '.join(parts)


def format_command(command):
    """The command as a person types it: without the folder of the script and that of the run."""
    script, *flags = command
    flags = [flag for flag in flags if not flag.startswith('--out_dir=')]
    return shlex.join([Path(script).name, *flags])
