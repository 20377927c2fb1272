import json

import harness  # noqa: F401, puts the project on sys.path

from engine.metrics import bench_report


def test_each_command_becomes_a_row(tmp_path):
    """Figures as JSON, the last line of a run, a failure, and output without figures."""
    figures = json.dumps(dict(ms=12.345, mfu=0.5, peak_tflops=989.4, memory_gib=None))
    rows = [('a step', ['-c', f'print("noise"); print({figures!r})'], bench_report.bench_figures),
            ('a run', ['-c', 'print("20 iterations; best val loss 1.2345 at iteration 20"); print("next: ...")'],
             bench_report.train_figures),
            ('a failure', ['-c', 'raise SystemExit("no such GPU")'], bench_report.bench_figures), ('nothing', ['-c', ''], bench_report.bench_figures),
            ('no loss', ['-c', 'print("{}")'], bench_report.train_figures), ('no dict', ['-c', 'print(7)'], bench_report.bench_figures)]
    told = []
    bench_report.write(tmp_path / 'figures.md', 'Figures', rows, told.append)
    lines = (tmp_path / 'figures.md').read_text(encoding='utf-8').splitlines()
    cells = [[cell.strip() for cell in line.split('|')] for line in lines if line.startswith('| a') or line.startswith('| no')]
    assert lines[0] == '# Figures' and told == ['a step ...', 'a run ...', 'a failure ...', 'nothing ...', 'no loss ...', 'no dict ...']
    assert cells[0][2] == '12.35 ms, mfu 50.0%, of 989.40 TFLOP/s'
    assert cells[1][2] == 'best val loss 1.2345, 0.0 min'
    assert cells[2][2] == 'failed: no such GPU' and [row[2] for row in cells[3:]] == 3 * ['failed: no figures']
    assert cells[3][3] == "`python -c ''`"


def test_a_command_that_takes_too_long_is_a_row_too():
    assert bench_report.run(['-c', 'import time; time.sleep(60)'], bench_report.bench_figures, timeout=0.1) == {'failed': 'over 0 minutes'}
