"""What the tests and chaos.py share: a copy of the project with a toy dataset, and runs of scripts.

On Linux the scripts run in forks of one server (launcher.py), which start in milliseconds.
Elsewhere each one is a Python of its own.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path[:0] = [str(ROOT), str(TESTS)]
from launcher import Launcher, Result, script_environment  # noqa: E402

import configurator  # noqa: E402
from engine.distributed import STOP_SIGNALS  # noqa: E402

CAN_FORK = sys.platform == 'linux'
# Fields of metrics.jsonl that no two runs share.
CLOCK_FIELDS = ('seconds', 'ms', 'tokens_per_second', 'mfu')
CHARACTERS = 'abcdefghijklmnop\n'
# A GPT that takes milliseconds per step, with everything on that training can have.
ITERATIONS = 20
INTERVAL = 5            # iterations between evaluations
ACCUMULATION = 2
SETTINGS = dict(
    dataset='toy',
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    batch_size=2,
    dropout=0.2,
    gradient_accumulation_steps=ACCUMULATION,
    max_iters=ITERATIONS,
    lr_decay_iters=ITERATIONS,
    warmup_iters=2,
    eval_interval=INTERVAL,
    eval_iters=2,
    learning_rate=1e-2,
    min_lr=1e-3,
    device='cpu',
    compile=False,
    rank_timeout=20,
)
# What copy_project leaves out: prepared datasets, and what preparing leaves behind.
NOT_COPIED = ('*.bin', '*.json', '*.jsonl', '*.txt', '*.pkl', '*.tmp', '*.lock', '*.part', 'shards',
              'unfinished', '__pycache__')


def copy_project(folder):
    """Copy the scripts and what they need to `folder`, without prepared datasets."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob('*.py'):
        shutil.copy(path, folder)
    ignore = shutil.ignore_patterns(*NOT_COPIED)
    for name in ('engine', 'config', 'data', 'studies'):
        shutil.copytree(ROOT / name, Path(folder) / name, dirs_exist_ok=True, ignore=ignore)


def write_toy_dataset(folder, characters=CHARACTERS, tokens=6000):
    """Write a character dataset, without the project's own code.

    It is a walk through the characters, each 0 to 2 places after the one before.
    """
    folder.mkdir(parents=True)
    walk = np.random.default_rng(0).integers(0, 3, tokens).cumsum() % len(characters)
    walk[:-1000].astype('<u2').tofile(folder / 'train.bin')
    walk[-1000:].astype('<u2').tofile(folder / 'val.bin')
    meta = dict(tokenizer='char', vocab_size=len(characters), chars=characters)
    (folder / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')


def write_masked_dataset(folder):
    """The toy dataset with masks: stretches of 5 to 14 tokens count, and as many between do not."""
    write_toy_dataset(folder)
    random = np.random.default_rng(1)
    for split, tokens in (('train', 5000), ('val', 1000)):
        lengths = random.integers(5, 15, tokens)
        mask = np.repeat(np.arange(tokens) % 2, lengths)[:tokens]
        mask.astype('u1').tofile(folder / f'{split}.mask')


def is_walk(text):
    """True where each character is 0 to 2 places after the one before, as in the toy dataset."""
    ids = [CHARACTERS.index(character) for character in text]
    return all((b - a) % len(CHARACTERS) <= 2 for a, b in zip(ids, ids[1:]))


def read_records(out_dir):
    """The records of metrics.jsonl without what depends on the clock."""
    lines = (Path(out_dir) / 'metrics.jsonl').read_text(encoding='utf-8').splitlines()
    records = []
    for line in lines:
        record = json.loads(line)
        records.append({name: value for name, value in record.items() if name not in CLOCK_FIELDS})
    return records


class Workspace:
    """A folder with a copy of the project, whose data/ and outputs are its own."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.launchers = []
        copy_project(self.folder)
        write_toy_dataset(self.folder / 'data' / 'toy')
        self.launcher = None
        if CAN_FORK:
            self.launcher = self.new_launcher()

    def new_launcher(self):
        self.launchers.append(Launcher(self.folder))
        return self.launchers[-1]

    def run(self, script, *arguments, code=0, ranks=1, timeout=120, **environment):
        """Run a script to its end, and check the exit code of every rank. Returns the Result."""
        run = self.run_python
        if self.launcher:
            run = self.launcher.run
        result = run(script, *arguments, ranks=ranks, timeout=timeout, **environment)
        assert set(result.codes) == {code}, f'exit {result.codes}\n{result.stdout}\n{result.stderr}'
        return result

    def run_python(self, script, *arguments, ranks=1, timeout=120, **environment):
        """Run a script in a Python of its own, several ranks by torchrun. Returns the Result."""
        command = [sys.executable, script, *map(str, arguments)]
        if ranks > 1:
            command[1:1] = torchrun_options(ranks)
        began = time.monotonic()
        done = subprocess.run(command, cwd=self.folder, text=True, capture_output=True,
                              timeout=timeout, encoding='utf-8',
                              env=script_environment(**environment))
        seconds = time.monotonic() - began
        return Result([done.returncode], done.stdout, done.stderr, seconds, timed_out=False)

    def flags(self, out_dir, **changes):
        """The flags of train.py for a run with SETTINGS, some of them changed."""
        settings = dict(SETTINGS, out_dir=out_dir, **changes)
        return [f'--{name}={value}' for name, value in settings.items()]

    def train(self, out_dir, *arguments, **options):
        """Train with SETTINGS and further flags to the end. Returns the Result."""
        return self.run('train.py', *self.flags(out_dir), *arguments, **options)

    def records(self, out_dir):
        return read_records(self.folder / out_dir)

    def close(self):
        for launcher in self.launchers:
            launcher.close()


def torchrun_options(ranks):
    return ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']


@contextmanager
def script_settings(script, *flags):
    """Apply `flags` to an imported script, as its command line would. Yields what its main takes.

    At the end, the script's settings and the signal handlers are as before.
    """
    settings = configurator.snapshot(vars(script))
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield configurator.configure(vars(script), [str(flag) for flag in flags])
    finally:
        vars(script).update(settings)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def take_step(optimizer, loss, grad_clip=1.0, scaler=None):
    """The step of train.py over one micro-batch with this loss. Returns the gradient's norm."""
    import torch

    import train
    from engine.distributed import Environment
    progress = SimpleNamespace(iter_num=0)
    run = SimpleNamespace(
        model=SimpleNamespace(config=SimpleNamespace(dropout=0.0)),
        wrapped_model=lambda x, y: (None, loss), micro_steps=1, progress=progress, seed=0,
        optimizer=optimizer, grad_clip=grad_clip,
        scaler=scaler or torch.amp.GradScaler('cpu', enabled=False))
    env = Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, '')
    return train.train_step(run, iter([(None, None, 1.0)]), env)['grad_norm']
