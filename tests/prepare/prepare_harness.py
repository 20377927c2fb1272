"""What several files of tests about the prepare scripts are made of."""

import hashlib
import importlib.util
import json
import os
import random
import subprocess
import sys

import numpy as np
import pytest

import configurator

# what GPT-2's pattern treats specially: contractions, runs of whitespace, kinds of space, scripts
WORDS = [
    "it's", "we'll", "'", "''re", 'word', ' ', '  ', '\n', '\n\n  ', ' \n', '\t', '\r\n',
    '\u00a0', '\u3000', '\x1c', '12', '3.5', '...', '<|endoftext|>', 'naïve', '日本語。', '🙂',
    'e\u0301', '\u200b', '\u2028', '-', 'I']


def run(data, name, *arguments, **environment):
    """Run data/NAME/prepare.py as a person does, from another folder."""
    command = [sys.executable, str(data / name / 'prepare.py'), *map(str, arguments)]
    return subprocess.run(command, cwd=data.parents[1], env={**os.environ, **environment},
                          capture_output=True, text=True, encoding='utf-8')


def load(data, name, monkeypatch, /, *arguments, **settings):
    """The script as a module, configured. Its main() runs in this process, with its engine."""
    monkeypatch.setattr(sys, 'path', list(sys.path))
    for known in [known for known in sys.modules if known.split('.')[0] == 'data']:
        monkeypatch.delitem(sys.modules, known)         # it imports those of its own copy
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', data / name / 'prepare.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    configurator.configure(vars(script), arguments)
    for key, value in settings.items():
        assert hasattr(script, key)
        setattr(script, key, value)
    return script


def tokens(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2')


def meta(folder):
    return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def random_text(length, seed):
    choose = random.Random(seed).choice
    return ''.join(choose(WORDS) for _ in range(length))


def write_jsonl(path, documents):
    lines = [json.dumps({'text': text}) + '\n' for text in documents]
    path.write_text(''.join(lines), encoding='utf-8')
    return path


def write_parquet(path, documents):
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    table = pa.table({'id': list(range(len(documents))), 'text': documents})
    pq.write_table(table, path, row_group_size=7)
    return path
