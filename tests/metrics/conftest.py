"""What the tests of the metrics share."""

import logging

import pytest
from harness import ROOT  # noqa: F401, puts the project on sys.path

from engine.log import log


@pytest.fixture
def logged(monkeypatch):
    """The lines that engine/ logs during the test, the oldest first."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    monkeypatch.setattr(log, 'handlers', [handler])
    monkeypatch.setattr(log, 'level', logging.INFO)
    return lines
