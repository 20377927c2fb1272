"""What a run says of a text that it reads many times, and of training that did not help."""

import math
from types import SimpleNamespace

import pytest

from engine.training.run import Progress, Run, many_epochs_note


def part(name, share, tokens):
    return SimpleNamespace(name=name, share=share, data=SimpleNamespace(n_train_tokens=tokens))


@pytest.mark.parametrize('parts, note', [
    ([part('mine', 1, 1000)], 'this run reads mine 100 times'),
    ([part('mine', 1, 1001)], None),
    ([part('large', 0.7, 1_000_000), part('small', 0.3, 100)], 'this run reads small 300 times'),
])
def test_a_dataset_that_is_read_a_hundred_times_is_named(parts, note):
    lines = many_epochs_note(SimpleNamespace(parts=parts), 100_000)
    if note is None:
        assert lines == []
    else:
        assert len(lines) == 1 and note in lines[0]


@pytest.mark.parametrize('loss, best_iter, is_told', [
    (2.8, 0, True), (2.8, 10, False), (math.inf, 0, False)])
def test_training_that_did_not_help_is_told_at_the_end(capsys, loss, best_iter, is_told):
    progress = Progress(iter_num=20, tokens=500, best_val_loss=loss, best_iter=best_iter)
    writer = SimpleNamespace(elapsed=lambda: '1 s')
    Run.tell_of_the_end(SimpleNamespace(progress=progress, writer=writer, out_dir='out'), 20)
    assert ('best at iteration 0, before this run trained' in capsys.readouterr().out) == is_told
