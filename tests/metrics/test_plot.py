import json
import math
import sys
import threading
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from harness import script_settings

import plot
from engine.errors import UserError
from engine.metrics.metrics_file import LIMITS, TITLES


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
            dict(iter=1, seconds=6, val_loss=3.0),
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
    assert by_iteration == {'a, training': [[0, 2.5], [1, 2.0]], 'a, validation': [[1, 3.0]],
                            'b, training': [[0, 2.25]]}
    assert by_token == {'a, training': [[0, 2.5], [2, 2.0]], 'a, validation': [[2, 3.0]]}
    assert by_minute == {'a, training': [[0.1, 2.5], [0.2, 2.0]], 'a, validation': [[0.1, 3.0]]}
    assert figure.get_suptitle() == 'Loss of a, b'
    legend, = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(by_iteration)


def test_the_evaluation_before_training_takes_no_axis_and_no_line(drawn):
    """A dot of its own, and the panels begin where the run is after its first iterations."""
    evaluations = [dict(iter=0, val_loss=11.0), dict(iter=50, val_loss=4.0),
                   dict(iter=100, val_loss=3.0)]
    losses = [dict(iter=i, loss=11.0 if i == 0 else 4.0) for i in range(100)]
    with script_settings(plot, '--smooth=0'):
        plot.draw({'a': evaluations + losses}, 'x.png')
    (figure, _), = drawn

    train, val = figure.axes[0].lines
    np.testing.assert_array_equal(val.get_xydata(), [[0, 11], [0, np.nan], [50, 4], [100, 3]])
    bottom, top = figure.axes[0].get_ylim()
    assert 2.9 < bottom < 3 and 4 < top < 4.1
    assert 'begins at up to 11' in figure.axes[0].texts[0].get_text()


def test_a_beginning_that_is_near_the_rest_is_drawn(drawn):
    """As in finetuning, where the first evaluation is that of a trained model."""
    evaluations = [dict(iter=0, val_loss=3.4), dict(iter=50, val_loss=3.2),
                   dict(iter=100, val_loss=3.0)]
    with script_settings(plot):
        plot.draw({'a': evaluations}, 'x.png')
    (figure, _), = drawn
    assert figure.axes[0].get_ylim()[1] > 3.4 and not figure.axes[0].texts


@pytest.mark.parametrize('sizes, unit, losses', [
    ([None], 'loss, nats per token', [2.0]),
    ([1.0, 1.0], 'loss, nats per token', [2.0, 2.0]),
    ([1.0, 4.0], 'loss, bits per byte', [2 / math.log(2), 2 / math.log(2) / 4]),
    ([1.0, None], 'loss, nats per token\n(compare only runs with the same tokenizer)', [2.0, 2.0]),
])
def test_losses_of_different_tokenizers_are_drawn_per_byte_where_it_is_known(
        drawn, sizes, unit, losses):
    runs = {f'run {i}': [dict(iter=0, loss=2.0), dict(iter=5, val_loss=2.0, bytes_per_token=size)]
            for i, size in enumerate(sizes)}
    with script_settings(plot):
        plot.draw(runs, 'x.png')
    (figure, _), = drawn

    assert figure.axes[0].get_ylabel() == unit
    curves = [line.get_ydata()[0] for line in figure.axes[0].lines]
    assert curves == pytest.approx(np.repeat(losses, 2))


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
    assert val == [0, 0, 1, 3, 6, 9, 9]                 # the first twice, before a gap


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


def test_kept_models_have_rings_around_their_val_loss(tmp_path, drawn):
    folder = write_records(
        tmp_path / 'run',
        '{"iter": 0, "val_loss": 4.0}',
        '{"iter": 9, "loss": 3.0, "tokens": 2e6, "seconds": 60}',
        '{"iter": 10, "val_loss": 2.5, "seconds": 60}',
        '{"iter": 20, "val_loss": 2.0, "seconds": 120}')
    for name in ('ckpt.pt', 'ckpt_000010.pt', 'ckpt_000030.pt', 'ckpt_best.pt'):
        (tmp_path / 'run' / name).write_text('')
    with script_settings(plot, f'--picture={tmp_path / "x.png"}'):
        plot.main([folder])
    (figure, _), = drawn

    rings = [[line.get_xydata().tolist() for line in axes.lines
              if line.get_label() == 'run, kept models'] for axes in figure.axes]
    assert rings == [[[[10, 2.5]]], [[[2, 2.5]]], [[[1, 2.5]]]]
    assert 'run, kept models' in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize('picture', ['x.xyz', 'x', 'a.b/x'])
def test_a_picture_of_an_unknown_kind_is_refused_before_anything_is_read(picture):
    with pytest.raises(UserError, match=f"picture='{picture}' should end in .*.pdf, .*.png"):
        with script_settings(plot, f'--picture={picture}'):
            plot.main(['nowhere'])


def slow_mean(iterations, values, share, i):
    """The mean around value i, by its definition."""
    reach = share / 2 * (iterations[-1] - iterations[0])
    reach = min(reach, iterations[i] - iterations[0])
    return np.mean([value for iteration, value in zip(iterations, values)
                    if abs(iteration - iterations[i]) <= reach])


@pytest.mark.parametrize('share', [0, 0.1, 0.5])
def test_smoothing_averages_around_each_iteration(share):
    random = np.random.default_rng(0)
    iterations = np.sort(random.choice(1000, 50, replace=False)).tolist()
    values = random.normal(size=50).tolist()
    expected = [slow_mean(iterations, values, share, i) for i in range(50)]
    assert plot.smoothed(iterations, values, share) == pytest.approx(expected)


def test_smoothing_does_not_depend_on_the_log_interval_and_does_not_lag():
    """A straight line stays itself but at the end, whether it is logged often or not."""
    for interval in (1, 10, 40):
        iterations = list(range(0, 2001, interval))
        line = [5 - iteration / 1000 for iteration in iterations]
        smoothed = plot.smoothed(iterations, line, 0.1)
        inner = [i for i, iteration in enumerate(iterations) if iteration <= 1900]
        assert [smoothed[i] for i in inner] == pytest.approx([line[i] for i in inner])


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
    assert 'run has no times, so nothing of it is drawn against minutes' in capsys.readouterr().out


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

    maps = {axes.get_title().split('\n')[0]: axes for axes in figure.axes if axes.get_title()}
    assert list(maps) == list(TITLES.values())
    norms = maps['weight norm']
    assert [label.get_text() for label in norms.get_yticklabels()] == ['tokens', 'block 0']
    values = norms.collections[0].get_array().reshape(2, 3)
    np.testing.assert_array_equal(np.ma.filled(values.astype(float), np.nan),
                                  [[1.5, np.nan, 2.5], [2.0, 3.0, np.nan]])
    assert maps['dead units'].collections[0].get_array().ravel().tolist() == [0, 0.25, 0.5]
    assert not maps['largest logit'].collections


def test_a_heat_map_says_what_is_bad(tmp_path, drawn):
    """In its title, and in red from the limit on; a layer that began with zeros does not count."""
    limits = {name: limit.value for name, limit in LIMITS.items()}
    folder = write_records(
        tmp_path / 'run',
        health_record(0, clipped=1.0, **{'wte/update_ratio': 1.0, 'h.0/update_ratio': 0.01}),
        health_record(1500, clipped=0.75, **{
            'wte/update_ratio': 0.9, 'h.0/update_ratio': 2 * limits['update_ratio'],
            'h.0/attention_logit': limits['attention_logit']}))
    with script_settings(plot, '--health=True', f'--picture={tmp_path / "x.png"}'):
        plot.main([folder])
    (figure, _), = drawn

    assert figure.get_suptitle().splitlines() == [
        'The layers of run',
        'update / weight is 0.2 in block 0 at iteration 1,500 (limit 0.1)',
        '75% of the 100 steps up to iteration 1,500 were clipped (limit 50%)']
    ratios, = (axes for axes in figure.axes if axes.get_title().startswith('update / weight'))
    image = ratios.collections[0]
    assert image.norm.vmax == limits['update_ratio']
    assert image.to_rgba(2 * limits['update_ratio']) == (1, 0, 0, 1)
    assert image.to_rgba(0.01)[0] < 0.5


def test_a_healthy_run_is_called_so(tmp_path, drawn):
    folder = write_records(tmp_path / 'run', health_record(0, **{'wte/update_ratio': 0.01}))
    with script_settings(plot, '--health=True', f'--picture={tmp_path / "x.png"}'):
        plot.main([folder])
    (figure, _), = drawn
    assert figure.get_suptitle().splitlines()[1:] == ['nothing is over its limit']


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


# In a notebook

class Shown:
    """Stands in for what IPython shows: the last picture, and how many there were."""

    def __init__(self, first):
        self.content = first
        self.count = 0

    def update(self, content):
        self.content = content
        self.count += 1


@pytest.fixture
def notebook(monkeypatch):
    """A list of what is shown in a notebook."""
    shown = []

    def display(first, display_id):
        shown.append(Shown(first))
        return shown[-1]
    module = SimpleNamespace(display=display, Image=lambda content: content)
    monkeypatch.setitem(sys.modules, 'IPython.display', module)
    return shown


def test_a_picture_grows_while_a_run_trains(notebook, tmp_path):
    """The folder does not exist at first, and a line of its file is half written."""
    folder = tmp_path / 'out'
    line = json.dumps(dict(iter=0, loss=2.0))
    second = json.dumps(dict(iter=1, loss=1.5))

    def train():
        wait_for(lambda: notebook and notebook[0].content == 'waiting for the first losses')
        write_records(folder, line, second[:9])
        wait_for(lambda: notebook[0].count == 1)
        (folder / 'metrics.jsonl').write_text(f'{line}\n{second}\n')
        wait_for(lambda: notebook[0].count == 2)
    thread = threading.Thread(target=train, daemon=True)
    thread.start()
    plot.live(folder, thread, seconds=0.01)
    assert not thread.is_alive() and notebook[0].count == 2
    assert notebook[0].content.startswith(b'\x89PNG')


def wait_for(is_true):
    """Wait a minute at most."""
    end = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_the_last_picture_has_what_a_process_wrote_before_its_end(notebook, tmp_path, monkeypatch):
    folder = write_records(tmp_path / 'out', json.dumps(dict(iter=0, loss=2.0)))
    drawn = []
    monkeypatch.setattr(plot, 'draw', lambda runs, path: drawn.append(runs))
    plot.live(folder, SimpleNamespace(poll=lambda: 0))
    assert drawn == [{'out': [dict(iter=0, loss=2.0)]}]


def test_without_ipython_a_line_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, 'IPython.display', None)
    with pytest.raises(UserError, match='needs IPython; elsewhere draw with: python plot.py out-a'):
        plot.live('out-a')
