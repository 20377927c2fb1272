import json
import sys
import types

import metrics


def log(folder, start, evaluated, stop, said=None, **options):
    run = metrics.Metrics(folder, start, evaluated, (said if said is not None else []).append, **options)
    for i in range(start, stop):
        if i % 5 == 0 and not (evaluated and i == start):
            run.log(i, val_loss=float(i))
        run.log(i, loss=float(i))
    run.close()
    return run


def test_a_resumed_log_is_that_of_a_run_that_never_stopped(tmp_path):
    (tmp_path / 'a').mkdir(), (tmp_path / 'b').mkdir()
    log(tmp_path / 'a', 0, False, 20)
    log(tmp_path / 'b', 0, False, 13)                   # stopped at 13, with its state of 10
    with open(tmp_path / 'b' / 'metrics.jsonl', 'a') as file:
        file.write('{"iter": 13, "lo')                  # torn off by a crash
    log(tmp_path / 'b', 10, True, 20)
    straight, resumed = (metrics.read_metrics(tmp_path / name / 'metrics.jsonl') for name in 'ab')
    assert [{**r, 'seconds': 0} for r in straight] == [{**r, 'seconds': 0} for r in resumed]


def test_seconds_go_on_where_the_run_stopped(tmp_path, monkeypatch):
    """One a record here; those between the last state and the stop are lost, and the stop itself is not counted."""
    clock = iter(range(100, 10 ** 6))
    monkeypatch.setattr(metrics.time, 'perf_counter', lambda: next(clock))
    log(tmp_path, 1, False, 4)                          # iterations 1 to 3 at 1, 2, 3 seconds
    for _ in range(1000):
        next(clock)
    log(tmp_path, 3, False, 5)                          # 3 and 4 once more
    log(tmp_path, 5, True, 6)
    assert [(r['iter'], r['seconds']) for r in metrics.read_metrics(tmp_path / 'metrics.jsonl')] == [
        (1, 1), (2, 2), (3, 3), (4, 4), (5, 5)]


def test_records_of_any_kind_leave_a_run_able_to_go_on(tmp_path):
    """A clock that earlier versions did not write, or that a damaged file has, is no clock."""
    for seconds in ('', ', "seconds": 1' + '0' * 400, ', "seconds": NaN', ', "seconds": "x"', ', "seconds": 1e300', ', "seconds": true'):
        (tmp_path / 'metrics.jsonl').write_text('{"iter": 0, "loss": 2.0%s}\n%s\n7\n' % (seconds, '[' * 100000))
        log(tmp_path, 1, False, 3)
        records = metrics.read_metrics(tmp_path / 'metrics.jsonl')
        assert [r['iter'] for r in records] == [0, 1, 2] and [r['seconds'] for r in records[1:]] == [None, None]
        assert metrics.draw([tmp_path], tmp_path / 'loss.png') == [tmp_path]


def test_what_is_not_finite_stays_json(tmp_path):
    run = metrics.Metrics(tmp_path, 0, False, print)
    run.log(0, loss=float('inf'), mfu=None)
    run.close()
    record = json.loads((tmp_path / 'metrics.jsonl').read_text())
    assert 0 <= record.pop('seconds') < 1 and record == {'iter': 0, 'loss': None, 'mfu': None}


def test_a_file_that_cannot_be_written_is_said_once(tmp_path):
    (tmp_path / 'metrics.jsonl').mkdir()
    said = []
    log(tmp_path, 0, False, 3, said)
    assert len(said) == 1 and 'metrics.jsonl cannot be written' in said[0]


def fake_wandb(monkeypatch, fail_at=None):
    """A stand-in for wandb that records calls, and fails from call number fail_at on."""
    calls = []

    class Run:
        id = 'run1'

        def log(self, numbers, step):
            calls.append((step, numbers))
            if fail_at is not None and len(calls) > fail_at:
                raise ConnectionError('the network is gone')

        def finish(self):
            calls.append('finish')

    def init(**arguments):
        calls.append(arguments)
        if fail_at == 0:
            raise RuntimeError('not logged in')
        return Run()
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=init))
    monkeypatch.setenv('WANDB_API_KEY', 'x' * 40)
    return calls


def test_wandb_gets_the_same_numbers_and_its_faults_end_nothing(tmp_path, monkeypatch):
    calls = fake_wandb(monkeypatch)
    run = log(tmp_path, 0, False, 3, wandb_run=dict(project='p', id='run1', resume='allow'))
    assert calls[0]['id'] == 'run1' and calls[1:] == [(0, {'val_loss': 0.0}), (0, {'loss': 0.0}), (1, {'loss': 1.0}),
                                                      (2, {'loss': 2.0}), 'finish']
    assert run.wandb_id == 'run1'
    for fail_at in (0, 2):
        said = []
        fake_wandb(monkeypatch, fail_at)
        log(tmp_path, 0, False, 8, said, wandb_run=dict(project='p'))
        assert len(said) == 1 and 'wandb is off' in said[0]
    assert len(metrics.read_metrics(tmp_path / 'metrics.jsonl')) == 10


def test_curves_are_drawn(trained):
    trained.run('metrics.py', 'out-toy')
    picture = (trained.folder / 'out-toy' / 'loss.png').read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n' and len(picture) > 10000
    assert 'nowhere holds no metrics.jsonl' in trained.run('metrics.py', 'nowhere', code=2).stderr
