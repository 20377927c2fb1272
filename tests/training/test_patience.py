"""Early stopping: where it ends a run, and that a stop in between changes nothing."""

import pytest
from harness import CAN_FORK

from engine.checkpoint.contents import Checkpoint
from engine.training.run import Progress

# A learning rate that makes the val loss rise and fall.
SHAKY = ('--learning_rate=1e-1', '--min_lr=1e-1', '--max_iters=200', '--lr_decay_iters=200')
RESUME = ('--init_from=resume', '--device=cpu')


def losses(place, out_dir):
    """[(iteration, val loss)] of a run."""
    return [(r['iter'], r['val_loss']) for r in place.records(out_dir) if 'val_loss' in r]


@pytest.fixture(scope='module')
def stopped(trained):
    """The workspace with a run in out-patient that was stopped early, and what it printed."""
    return trained, trained.train('out-patient', *SHAKY, '--patience=2').stdout


def test_a_run_ends_where_the_last_evaluations_did_not_improve(stopped):
    place, shown = stopped
    values = losses(place, 'out-patient')

    # at each evaluation, how many in a row did not improve
    bad = []
    best = float('inf')
    for _, value in values:
        if value < best:
            best = value
            bad.append(0)
        else:
            bad.append(bad[-1] + 1)
    assert bad[-1] == 2
    assert max(bad[:-1]) < 2
    assert values[-1][0] < 200

    lines = shown.splitlines()
    assert lines[-3] == ('stopped early, as the val loss did not improve; go on with more '
                         '--patience, or with --patience=0')
    assert lines[-2].startswith(f'{values[-1][0]} iterations')
    assert lines[-2].endswith(f'at iteration {values[-3][0]}')


def test_a_run_resumed_on_the_way_ends_at_the_same_evaluation(stopped):
    place, _ = stopped
    end = losses(place, 'out-patient')[-1][0]
    # one evaluation before the end
    place.train('out-halved', *SHAKY, '--patience=2', f'--max_iters={end - 5}')
    shown = place.run('train.py', '--out_dir=out-halved', *RESUME, '--max_iters=200').stdout
    assert place.records('out-halved') == place.records('out-patient')
    assert 'stopped early, as the val loss' in shown


def test_a_run_that_stopped_early_stays_stopped_until_it_is_told_otherwise(stopped):
    place, shown = stopped
    before = place.records('out-patient')
    again = place.run('train.py', '--out_dir=out-patient', *RESUME).stdout
    assert place.records('out-patient') == before
    assert again.splitlines()[-3] == shown.splitlines()[-3]

    end = before[-1]['iter']
    more = place.run('train.py', '--out_dir=out-patient', *RESUME, '--patience=0',
                     f'--max_iters={end + 5}').stdout
    assert losses(place, 'out-patient')[-1][0] == end + 5
    assert 'stopped early' not in more


@pytest.mark.skipif(not CAN_FORK, reason='two ranks are started by fork')
def test_two_ranks_end_together(stopped):
    place, _ = stopped
    place.train('out-patient-pair', *SHAKY, '--patience=1', '--gradient_accumulation_steps=2',
                ranks=2)
    values = [value for _, value in losses(place, 'out-patient-pair')]
    assert values[-1] >= min(values)
    assert all(b < min(values[:i]) for i, b in enumerate(values[1:-1], 1))


def test_a_checkpoint_that_does_not_know_its_best_iteration_gets_all_the_patience():
    """nanoGPT's has best_val_loss only."""
    saved = Checkpoint(model_args={}, iter_num=500, best_val_loss=1.5)
    assert Progress.of(saved, 4, 32).best_iter == 500
