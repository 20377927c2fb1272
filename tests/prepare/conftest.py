"""Fixtures for the tests of the prepare scripts and of engine/prepare."""

import os
import shutil
from pathlib import Path

import pytest
from harness import ROOT


@pytest.fixture(scope='module')
def gpt2():
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:
        pytest.skip(f"tiktoken cannot fetch GPT-2's encoding: {type(error).__name__}")


@pytest.fixture(scope='module')
def shakespeare():
    path = os.environ.get('SHAKESPEARE')
    if not path:
        pytest.skip('the environment variable SHAKESPEARE names no file with tiny Shakespeare')
    return Path(path)


@pytest.fixture
def data(tmp_path):
    """The folder data/ in a copy of the scripts, so that their output goes to a temporary one."""
    for pattern in ('configurator.py', 'console.py', 'engine/**/*.py', 'data/*/prepare.py'):
        for path in ROOT.glob(pattern):
            copy = tmp_path / 'repo' / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    return tmp_path / 'repo' / 'data'


@pytest.fixture
def no_fsync(monkeypatch):
    """A cut between two calls finds the same files without it, and sooner."""
    monkeypatch.setattr(os, 'fsync', lambda handle: None)
