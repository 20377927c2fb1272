"""What the tests share: a workspace with a toy dataset, and a way to run the scripts in it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# a GPT that a step takes milliseconds of, with everything on that training can have
TINY = ['--dataset=toy', '--device=cpu', '--compile=False', '--n_layer=2', '--n_head=2', '--n_embd=32',
        '--block_size=32', '--batch_size=4', '--gradient_accumulation_steps=2', '--dropout=0.2', '--eval_iters=2',
        '--max_iters=12', '--eval_interval=5', '--warmup_iters=2', '--lr_decay_iters=12', '--learning_rate=1e-3']


def write_dataset(folder, text):
    """A character dataset, written by other means than the project's own."""
    folder.mkdir(parents=True)
    chars = ''.join(sorted(set(text)))
    ids = np.array([chars.index(c) for c in text], dtype='<u2')
    ids[:-len(ids) // 10].tofile(folder / 'train.bin')
    ids[-len(ids) // 10:].tofile(folder / 'val.bin')
    (folder / 'meta.json').write_text(json.dumps(dict(tokenizer='char', vocab_size=len(chars), chars=chars)))


class Workspace:
    """A copy of the project, whose data/ and output are its own."""

    def __init__(self, folder):
        self.folder = folder
        for path in ROOT.glob('*.py'):
            shutil.copy(path, folder)
        for name in ('config', 'data'):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(
                '*.bin', '*.json', '*.txt', '*.tmp', '*.pkl', '__pycache__'))
        write_dataset(folder / 'data' / 'toy', Path(json.__file__).read_text(encoding='utf-8'))

    def run(self, *arguments, launcher=(sys.executable,), code=0, **environment):
        """Run a script to its end and check its exit code; the CompletedProcess."""
        done = subprocess.run([*launcher, *map(str, arguments)], cwd=self.folder, text=True, capture_output=True,
                              timeout=300, env={**os.environ, 'OMP_NUM_THREADS': '1', **environment})
        assert done.returncode == code, f'exit {done.returncode}\n{done.stdout}\n{done.stderr}'
        return done

    def train(self, out_dir, *arguments, **options):
        return self.run('train.py', *TINY, f'--out_dir={out_dir}', *arguments, **options)

    def records(self, out_dir):
        """The numbers of metrics.jsonl that do not depend on the clock."""
        clock = ('seconds', 'ms', 'tokens_per_second', 'mfu')
        lines = (self.folder / out_dir / 'metrics.jsonl').read_text().splitlines()
        return [{k: v for k, v in json.loads(line).items() if k not in clock} for line in lines]


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    return Workspace(tmp_path_factory.mktemp('workspace'))


@pytest.fixture(scope='session')
def trained(workspace):
    """The workspace with a finished run in out-toy."""
    workspace.train('out-toy')
    return workspace


def torchrun(ranks):
    return [sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={ranks}']
