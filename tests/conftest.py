"""Fixtures that several files of tests use. What they are made of is in harness.py."""

import os
import sys

# Prepare scripts are imported from the folders that the tests compare.
sys.dont_write_bytecode = True
# Tests run side by side, and threads that wait for one another are slower than one.
os.environ.setdefault('OMP_NUM_THREADS', '1')
import pytest  # noqa: E402
from harness import CAN_FORK, Workspace, write_toy_dataset  # it puts the project on sys.path

from engine.dataloader import batches as dataloader


def pytest_xdist_make_scheduler(config, log):
    """Each worker takes its tests in their order, so the fixtures of most files are made once.

    A worker that has none left takes half of another's.
    """
    from xdist.scheduler import WorkStealingScheduling
    return WorkStealingScheduling(config, log)


@pytest.fixture(scope='session')
def workspace(tmp_path_factory):
    workspace = Workspace(tmp_path_factory.mktemp('workspace'))
    yield workspace
    workspace.close()


@pytest.fixture(scope='session')
def trained(workspace):
    """The workspace with a finished run in out-toy."""
    workspace.train('out-toy')
    return workspace


@pytest.fixture(scope='session')
def lab(tmp_path_factory):
    """A chaos.Lab of one rank."""
    yield from start_lab(tmp_path_factory, 1)


@pytest.fixture(scope='session')
def two_rank_lab(tmp_path_factory):
    yield from start_lab(tmp_path_factory, 2)


def start_lab(tmp_path_factory, ranks):
    if not CAN_FORK:
        pytest.skip('faults are injected with fork and /proc')
    import chaos

    lab = chaos.Lab(tmp_path_factory.mktemp('lab') / f'{ranks}-ranks', ranks)
    yield lab
    lab.close()


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """The folder of a toy dataset. In this process engine.dataloader finds it by the name 'toy'."""
    monkeypatch.setattr(dataloader, 'DATA', tmp_path / 'data')
    write_toy_dataset(tmp_path / 'data' / 'toy')
    return tmp_path / 'data' / 'toy'


@pytest.fixture(autouse=True)
def log_as_before():
    """Undo what a script did that ran in this process: some send the log to stderr."""
    from console import log_to
    log_to('stdout')
