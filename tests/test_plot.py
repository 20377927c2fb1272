import matplotlib.pyplot as plt
import pytest

import plot
from engine.errors import UserError
from harness import script_settings


def write_records(folder, *records):
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text('\n'.join(records))
    return str(folder)


def test_curves_are_the_records(tmp_path, monkeypatch):
    """By iterations, tokens and minutes, of two runs."""
    drawn = []
    monkeypatch.setattr(plt.Figure, 'savefig', lambda figure, path, **options: drawn.append((figure, path)))
    runs = {'a': [dict(iter=0, seconds=0, val_loss=3.0), dict(iter=0, seconds=6, loss=2.5, tokens=2e6),
                  dict(iter=1, seconds=12, loss=2.0, tokens=4e6)],
            'b': [dict(iter=0, seconds=None, loss=2.25)]}
    with script_settings(plot, '--smooth=0'):
        plot.draw(runs, 'x.png')
    (figure, path), = drawn
    by_iteration, by_token, by_minute = ({line.get_label(): line.get_xydata().tolist() for line in axes.lines} for axes in figure.axes)
    assert path == 'x.png' and by_iteration == {'a train': [[0, 2.5], [1, 2.0]], 'a val': [[0, 3.0]], 'b train': [[0, 2.25]]}
    assert by_token == {'a train': [[0, 2.5], [2, 2.0]], 'a val': [[0, 3.0]]}
    assert by_minute == {'a train': [[0.1, 2.5], [0.2, 2.0]], 'a val': [[0, 3.0]]}


def test_smoothing_averages_what_came_before():
    assert plot.smoothed([4.0] * 5, 0.9) == pytest.approx([4.0] * 5)
    assert plot.smoothed([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])
    assert plot.smoothed([1.0, 3.0, 2.0], 0) == [1.0, 3.0, 2.0]


def test_a_picture_is_written(trained):
    result = trained.run('plot.py', 'out-toy')
    picture = (trained.folder / 'out-toy' / 'loss.png').read_bytes()
    assert picture[:8] == b'\x89PNG\r\n\x1a\n' and len(picture) > 10000
    assert 'loss.png' in result.stdout and not result.stderr


def test_damaged_records_are_drawn_as_far_as_they_go(tmp_path, capsys):
    folder = write_records(tmp_path / 'run', '{"iter": 0, "loss": 2.0}', '[' * 100000, '7', '{"iter": 1, "loss": NaN}',
                           '{"iter": 2, "loss": 1e999, "seconds": true}', '{"iter": 1' + '0' * 400 + ', "loss": 2}',
                           '{"iter": 3')
    with script_settings(plot, f'--picture={tmp_path / "compare.png"}'):
        plot.main([folder])
    assert (tmp_path / 'compare.png').stat().st_size > 10000
    assert 'run has no times, so only its iterations are drawn' in capsys.readouterr().out


@pytest.mark.parametrize('folders, words', [([], 'name the folders of the runs'),
                                            (['nowhere'], 'nowhere holds no metrics.jsonl'),
                                            (['empty'], 'empty holds no metrics.jsonl with records')])
def test_what_holds_no_run_is_refused(tmp_path, monkeypatch, folders, words):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / 'empty')
    with pytest.raises(UserError, match=words):
        plot.main(folders)
