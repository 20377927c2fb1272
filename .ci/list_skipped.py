"""A plugin of pytest that writes the ids of the skipped tests to the file SKIPPED_TESTS, one a
line."""

import os
from pathlib import Path


def pytest_terminal_summary(terminalreporter):
    ids = {report.nodeid for report in terminalreporter.getreports('skipped')}
    lines = ''.join(f'{nodeid}\n' for nodeid in sorted(ids))
    Path(os.environ['SKIPPED_TESTS']).write_text(lines, encoding='utf-8')
