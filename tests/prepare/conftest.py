"""Fixtures for the tests of the prepare scripts and of engine/prepare."""

import os
import shutil
from pathlib import Path

import pytest
from harness import ROOT

from engine.errors import RunError
from engine.tokenizer import load_gpt2_encoding


@pytest.fixture(scope='module')
def gpt2():
    """tiktoken's Encoding of GPT-2."""
    try:
        return load_gpt2_encoding()
    except RunError as error:
        pytest.skip(str(error))


@pytest.fixture(scope='module')
def shakespeare():
    path = os.environ.get('SHAKESPEARE')
    if not path:
        pytest.skip('the environment variable SHAKESPEARE names no file with tiny Shakespeare')
    return Path(path)


@pytest.fixture
def data(tmp_path):
    """The folder data/ in a copy of the scripts, so that their output goes to a temporary one."""
    for pattern in ('configurator.py', 'console.py', 'engine/**/*.py', 'data/**/*.py'):
        for path in ROOT.glob(pattern):
            copy = tmp_path / 'repo' / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path / 'repo' / 'data'


@pytest.fixture
def no_fsync(monkeypatch):
    """A cut between two calls finds the same files without it, and sooner."""
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
