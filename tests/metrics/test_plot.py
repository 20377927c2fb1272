import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from harness import script_settings

import plot
from engine.errors import UserError
from engine.metrics.metrics_file import TITLES


def write_records(folder, *records):
    folder.mkdir()
    (folder / 'metrics.jsonl').write_text('\n'.join(records))
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """(figure, path) of each picture that would be written."""
    pictures = []

    def savefig(figure, path, **options):
        pictures.append((figure, path))
    monkeypatch.setattr(plt.Figure, 'savefig', savefig)
    return pictures


# Curves

def test_curves_are_the_records(drawn):
    """By iterations, tokens and minutes, of two runs."""
    runs = {
        'a': [
            dict(iter=0, seconds=0, val_loss=3.0),
            dict(iter=0, seconds=6, loss=2.5, tokens=2e6),
            dict(iter=1, seconds=12, loss=2.0, tokens=4e6),
        ],
        'b': [dict(iter=0, seconds=None, loss=2.25)],
    }
    with script_settings(plot, '--smooth=0'):
        plot.draw(runs, 'x.png')
    (figure, path), = drawn

    by_iteration, by_token, by_minute = (
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in figure.axes)
    assert path == 'x.png'
    assert by_iteration == {'a train': [[0, 2.5], [1, 2.0]], 'a val': [[0, 3.0]],
                            'b train': [[0, 2.25]]}
    assert by_token == {'a train': [[0, 2.5], [2, 2.0]], 'a val': [[0, 3.0]]}
    assert by_minute == {'a train': [[0.1, 2.5], [0.2, 2.0]], 'a val': [[0, 3.0]]}


def test_a_batch_that_grows_moves_the_tokens_of_each_iteration(drawn):
    """The first evaluation lies at no tokens, one between two logged iterations between their
    counts, and a later one at the last count."""
    losses = [
        dict(iter=0, loss=2.0, tokens=1e6),
        dict(iter=1, loss=2.0, tokens=3e6),
        dict(iter=3, loss=2.0, tokens=9e6),
    ]
    evaluations = [dict(iter=i, val_loss=3.0) for i in (0, 1, 2, 3, 4, 50)]
    with script_settings(plot, '--smooth=0'):
        plot.draw({'a': losses + evaluations}, 'x.png')
    (figure, _), = drawn

    train, val = ([float(x) for x in line.get_xdata()] for line in figure.axes[1].lines)
    assert train == [0, 1, 6]                           # million tokens before the iterations
    assert val == [0, 1, 3, 6, 9, 9]


def test_scores_are_drawn_below_with_what_gpt2_reaches(drawn):
    records = [dict(iter=0, seconds=0, val_loss=3.0, lambada_acc=0.1, unknown_acc=0.5),
               dict(iter=5, seconds=60, val_loss=2.0, lambada_acc=0.2)]
    with script_settings(plot):
        plot.draw({'a': records}, 'x.png')
    (figure, _), = drawn

    assert len(figure.axes) == 2 * 3
    by_iteration, _, by_minute = figure.axes[3:]
    assert by_iteration.get_ylabel() == 'lambada_acc'
    curve, published = by_minute.lines
    assert curve.get_label() == 'a' and curve.get_xydata().tolist() == [[0, 0.1], [1, 0.2]]
    assert set(published.get_ydata()) == {plot.GPT2_SCORES['lambada_acc']}


@pytest.mark.parametrize('picture', ['x.xyz', 'x', 'a.b/x'])
def test_a_picture_of_an_unknown_kind_is_refused_before_anything_is_read(picture):
    with pytest.raises(UserError, match=f"picture='{picture}' should end in .*.pdf, .*.png"):
        with script_settings(plot, f'--picture={picture}'):
            plot.main(['nowhere'])


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
    folder = write_records(
        tmp_path / 'run',
        '{"iter": 0, "loss": 2.0}',
        '[' * 100000,
        '7',
        '{"iter": 1, "loss": NaN}',
        '{"iter": 2, "loss": 1e999, "seconds": true}',
        '{"iter": 1' + '0' * 400 + ', "loss": 2}',
        '{"iter": 3')
    with script_settings(plot, f'--picture={tmp_path / "compare.png"}'):
        plot.main([folder])
    assert (tmp_path / 'compare.png').stat().st_size > 10000
    assert 'run has no times, so only its iterations are drawn' in capsys.readouterr().out


@pytest.mark.parametrize('folders, words', [
    ([], 'name the folders of the runs'),
    (['nowhere'], 'nowhere holds no metrics.jsonl'),
    (['empty'], 'empty holds no metrics.jsonl with records')])
def test_what_holds_no_run_is_refused(tmp_path, monkeypatch, folders, words):
    monkeypatch.chdir(tmp_path)
    write_records(tmp_path / 'empty')
    with pytest.raises(UserError, match=words):
        plot.main(folders)


# Heat maps

def health_record(iteration, **numbers):
    numbers = {f'health/{name}': value for name, value in numbers.items()}
    return json.dumps({'iter': iteration, **numbers})


def test_heat_maps_are_the_records(tmp_path, drawn):
    """A row for each layer, a column for each measured iteration, and a gap where a number is
    missing or damaged."""
    folder = write_records(
        tmp_path / 'run',
        health_record(0, **{'wte/weight_norm': 1.5, 'h.0/weight_norm': 2.0,
                            'h.0/dead_units': 0.0, 'clipped': 1.0}),
        '{"iter": 0, "loss": 2.0, "health/": 1, "health/x": 1, "health/wte/unknown": 1, '
        '"other/wte/weight_norm": 1}',
        health_record(10, **{'wte/weight_norm': None, 'h.0/weight_norm': 3.0,
                             'h.0/dead_units': 0.25}),
        health_record(20, **{'wte/weight_norm': 2.5, 'h.0/weight_norm': True,
                             'h.0/dead_units': 0.5}))
    with script_settings(plot, '--health=True', f'--picture={tmp_path / "x.png"}'):
        plot.main([folder])
    (figure, _), = drawn

    maps = {axes.get_title(): axes for axes in figure.axes if axes.get_title()}
    assert list(maps) == list(TITLES.values())
    norms = maps['weight norm']
    assert [label.get_text() for label in norms.get_yticklabels()] == ['wte', 'h.0']
    values = norms.collections[0].get_array().reshape(2, 3)
    np.testing.assert_array_equal(np.ma.filled(values.astype(float), np.nan),
                                  [[1.5, np.nan, 2.5], [2.0, 3.0, np.nan]])
    assert maps['dead units'].collections[0].get_array().ravel().tolist() == [0, 0.25, 0.5]
    assert not maps['largest logit'].collections


def test_a_single_measurement_with_odd_layer_names_is_drawn(tmp_path):
    numbers = {'$\\x/weight_norm': 1.0, 'h.0/weight_norm': -3.0, '/attention_logit': 0}
    folder = write_records(tmp_path / 'run', health_record(0, **numbers))
    with script_settings(plot, '--health=True'):
        plot.main([folder])
    assert (tmp_path / 'run' / 'health.png').stat().st_size > 10000


@pytest.mark.parametrize('folders, words', [
    (['a', 'b'], '--health=True draws one run; name one folder'),
    (['a'], 'no measurements of its layers; train with --health_interval=100')])
def test_what_has_no_heat_map_is_refused(tmp_path, monkeypatch, folders, words):
    monkeypatch.chdir(tmp_path)
    for name in folders:
        write_records(tmp_path / name, '{"iter": 0, "loss": 2.0}')
    with pytest.raises(UserError, match=words):
        with script_settings(plot, '--health=True'):
            plot.main(folders)


def test_a_run_that_measured_its_layers_is_drawn(trained):
    trained.train('out-drawn', '--health_interval=5')
    result = trained.run('plot.py', 'out-drawn', '--health=True')
    assert 'health.png' in result.stdout and not result.stderr
    assert (trained.folder / 'out-drawn' / 'health.png').read_bytes()[:4] == b'\x89PNG'
