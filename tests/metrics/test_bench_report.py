import json

import harness  # noqa: F401, puts the project on sys.path

from engine.metrics import bench_report
from engine.metrics.bench_report import Row, bench_figures, train_figures


def test_each_command_becomes_a_row(tmp_path, logged):
    """Figures as JSON, the last line of a run, a failure, and output without figures."""
    figures = json.dumps(dict(ms=12.345, mfu=0.5, peak_tflops=989.4, memory_gib=None))
    run = 'print("20 iterations; best val loss 1.2345 at iteration 20"); print("next: ...")'
    rows = [
        Row('a step', ['-c', f'print("noise"); print({figures!r})'], bench_figures),
        Row('a run', ['-c', run], train_figures),
        Row('a failure', ['-c', 'raise SystemExit("no such GPU")'], bench_figures),
        Row('nothing', ['-c', ''], bench_figures),
        Row('no loss', ['-c', 'print("{}")'], train_figures),
        Row('no dict', ['-c', 'print(7)'], bench_figures),
    ]
    bench_report.write(tmp_path / 'figures.md', 'Figures', rows, lambda: ['another table'])

    lines = (tmp_path / 'figures.md').read_text(encoding='utf-8').splitlines()
    assert lines[0] == '# Figures'
    assert lines[-2:] == ['', 'another table']
    assert logged == ['a step ...', 'a run ...', 'a failure ...', 'nothing ...', 'no loss ...',
                      'no dict ...']

    cells = [[cell.strip() for cell in line.split('|')]
             for line in lines if line.startswith(('| a', '| no'))]
    assert cells[0][2] == '12.35 ms, mfu 50.0%, of 989.40 TFLOP/s'
    assert cells[1][2] == 'best val loss 1.2345, 0.0 min'
    assert cells[2][2] == 'failed: no such GPU'
    assert [row[2] for row in cells[3:]] == 3 * ['failed: no figures']
    assert cells[3][3] == "`python -c ''`"


def test_a_command_that_takes_too_long_is_a_row_too():
    command = ['-c', 'import time; time.sleep(60)']
    figures = bench_report.run(command, bench_figures, timeout=0.1)
    assert figures == {'failed': 'over 0 minutes'}
