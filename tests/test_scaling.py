import csv
import math
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from harness import CAN_FORK, ROOT, script_settings

import scaling
from engine.errors import RunError, UserError
from model import GPT, GPTConfig
from studies import scaling_laws
from studies.scaling_laws import BESIROGLU, HOFFMANN, LossLaw


@pytest.mark.parametrize('law, N, D', [(HOFFMANN, 316e6, 11.65e9), (BESIROGLU, 394e6, 9.36e9)])
def test_the_published_laws_give_the_published_optimum_for_2_21e19_flops(law, N, D):
    """The first pair is a point of a published grid: it is near the optimum, and as good."""
    assert 6 * N * D == pytest.approx(2.21e19, rel=0.002)
    best = law.optimum(2.21e19)
    assert best == pytest.approx((N, D), rel=0.035)
    assert law.loss(*best) == pytest.approx(law.loss(N, D), abs=5e-4)


@pytest.mark.parametrize('law', [HOFFMANN, BESIROGLU])
def test_the_optimum_is_the_lowest_of_a_fine_grid(law):
    N = np.geomspace(1e6, 1e12, 200_001)
    D = 1e21 / 6 / N
    best = law.loss(N, D).argmin()
    assert law.optimum(1e21) == pytest.approx((N[best], D[best]), rel=2e-4)


def simulated_runs(law, noise=0.0, budgets=(1e18, 3e18, 1e19, 3e19, 1e20), sizes=9, seed=0):
    """{C: (N, D, losses)} around the best N of each budget."""
    generator = np.random.default_rng(seed)
    runs = {}
    for C in budgets:
        N = law.optimum(C)[0] * np.geomspace(0.3, 3, sizes)
        D = C / 6 / N
        runs[C] = N, D, law.loss(N, D) * np.exp(noise * generator.standard_normal(sizes))
    return runs


def flatten(runs):
    return [np.concatenate([values[i] for values in runs.values()]) for i in range(3)]


# Two of the points that a fit starts from by default; all sixteen take seconds.
FEW_STARTS = [(3.0, 3.0, 0.3, 0.3, 0.3), (8.0, 8.0, 0.3, 0.3, 0.6)]


@pytest.mark.parametrize('law, starts', [(HOFFMANN, None), (BESIROGLU, FEW_STARTS)])
def test_the_fit_recovers_a_law_from_noisy_runs(law, starts):
    """Over budgets wide enough to tell the five coefficients apart."""
    runs = simulated_runs(law, noise=1e-4, budgets=np.geomspace(1e17, 1e22, 8))
    found = scaling_laws.fit_loss_law(*flatten(runs), starts=starts)
    exact = (law.E, law.alpha, law.beta)
    assert (found.E, found.alpha, found.beta) == pytest.approx(exact, rel=0.03)
    assert math.log(found.A) == pytest.approx(math.log(law.A), rel=0.03)
    assert math.log(found.B) == pytest.approx(math.log(law.B), rel=0.03)
    assert found.optimum(2.21e19) == pytest.approx(law.optimum(2.21e19), rel=0.05)


def test_an_outlier_hardly_moves_the_fit():
    """The Huber loss counts its distance, not the square."""
    runs = simulated_runs(HOFFMANN, budgets=np.geomspace(1e17, 1e22, 8))
    N, D, losses = flatten(runs)
    losses[30] *= 1.2
    found = scaling_laws.fit_loss_law(N, D, losses, starts=FEW_STARTS)
    assert found.optimum(1e21) == pytest.approx(HOFFMANN.optimum(1e21), rel=0.05)


def valley(N):
    """Losses that are lowest, 2 nats, at a size of 2e7."""
    return 2 + 0.1 * np.log(N / 2e7) ** 2


def test_a_parabola_finds_its_lowest_point_and_says_when_it_is_at_the_edge():
    N = np.geomspace(1e6, 1e8, 5)
    best = scaling_laws.fit_parabola(N, valley(N))
    assert best.N == pytest.approx(2e7)
    assert best.loss == pytest.approx(2)
    assert not best.at_edge

    for kept in (slice(0, 3), slice(3, 5)):             # all below the best size, or above it
        sizes = np.geomspace(N[kept][0], N[kept][-1], 4)
        assert scaling_laws.fit_parabola(sizes, valley(sizes)).at_edge
    hill = 4 - valley(N)                                # has no lowest point
    assert scaling_laws.fit_parabola(N, hill).at_edge

    with pytest.raises(UserError, match='three sizes'):
        scaling_laws.fit_parabola(N[:2], valley(N[:2]))


def test_exponents_and_their_intervals():
    """For L = E + A/N^alpha + B/D^beta the best N grows with C^(beta / (alpha + beta))."""
    exact = BESIROGLU.beta / (BESIROGLU.alpha + BESIROGLU.beta)
    clean = scaling_laws.fit_exponents(simulated_runs(BESIROGLU), resamples=100)
    assert clean['N'][0] == pytest.approx(exact, abs=0.01)
    assert clean['N'][0] + clean['D'][0] == pytest.approx(1, abs=0.01)

    # more noise, wider intervals
    widths = []
    for noise in (1e-4, 1e-3):
        runs = simulated_runs(BESIROGLU, noise)
        value, low, high = scaling_laws.fit_exponents(runs, resamples=100)['N']
        assert low < value < high
        widths.append(high - low)
    assert widths[1] > 4 * widths[0]

    # the intervals hold the exact value as often as they say
    covered = 0
    for seed in range(20):
        runs = simulated_runs(BESIROGLU, 1e-3, seed=seed)
        _, low, high = scaling_laws.fit_exponents(runs, resamples=60)['N']
        covered += low < exact < high
    assert 11 <= covered <= 20                          # 16 of 20 is what 80% means


def test_parameters_are_counted_as_the_model_has_them():
    config = GPTConfig(block_size=64, vocab_size=96, n_layer=3, n_head=4, n_embd=64, bias=False)
    model = GPT(config)
    counts = scaling_laws.count_parameters(3, 64, 96, 64)
    assert counts['total'] == sum(p.numel() for p in model.parameters())
    embeddings = model.transformer.wte.weight.numel() + model.transformer.wpe.weight.numel()
    assert counts['non_embedding'] == counts['total'] - embeddings


def test_too_few_runs_are_refused():
    with pytest.raises(UserError, match='5 runs are too few'):
        scaling_laws.fit_loss_law([1] * 5, [1] * 5, [1] * 5)
    with pytest.raises(UserError, match='two budgets'):
        scaling_laws.fit_exponents({1.0: ([1, 2, 3], [3, 2, 1], [1, 1, 1])})


@pytest.mark.parametrize('flag, words', [
    ('--sizes=2x30', 'a multiple of head_size=16'),
    ('--sizes=two', "sizes='two' should be a list such as"),
    ('--budgets=-1', "budgets='-1' should be a list"),
    ('--counting=all', "counting='all'"),
    ('--head_size=0', 'head_size=0 should be at least 1'),
])
def test_impossible_settings_are_refused(flag, words):
    with script_settings(scaling, flag), pytest.raises(UserError, match=words):
        scaling.main()


@pytest.fixture
def forked_runs(workspace, toy, monkeypatch):
    """A list of the commands of scaling.py's training runs.

    The runs start by fork, in a workspace with the same toy dataset.
    """
    commands = []

    def run(command, **options):
        assert command[:2] == [sys.executable, str(ROOT / 'train.py')]
        assert 'stderr' in options
        commands.append(command)
        result = workspace.launcher.run('train.py', *command[2:])
        return subprocess.CompletedProcess(command, result.code, None, result.stderr)

    if not CAN_FORK:
        pytest.skip('six runs take too long without fork')
    monkeypatch.setattr(scaling.subprocess, 'run', run)
    return commands


@pytest.mark.slow
def test_a_study_trains_once_and_goes_on_from_its_csv(
        tmp_path, monkeypatch, forked_runs, capsys):
    fit = partial(scaling_laws.fit_loss_law, starts=FEW_STARTS)
    monkeypatch.setattr(scaling_laws, 'fit_loss_law', fit)
    out_dir = tmp_path / 'out-scaling'
    path = out_dir / 'runs.csv'
    flags = [
        f'--out_dir={out_dir}',
        '--dataset=toy',
        '--sizes=1x16,1x32,2x32',
        '--budgets=2.5e8,5e8',
        '--batch_size=2',
        '--block_size=32',
        '--eval_iters=2',
        '--train_flags=--device=cpu --compile=False',
    ]

    def study(*more):
        """Run the study. Returns the rows of runs.csv, without their seconds."""
        with script_settings(scaling, *flags, *more):
            scaling.main()
        with open(path, encoding='utf-8', newline='') as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            del row['seconds']
        return rows

    def read_lines():
        return path.read_text(encoding='utf-8').splitlines(keepends=True)

    rows = study()
    shapes = [(row['n_layer'], row['n_embd']) for row in rows]
    assert shapes == 2 * [('1', '16'), ('1', '32'), ('2', '32')]
    for row in rows:
        assert float(row['flops']) == pytest.approx(float(row['budget']), rel=0.05)
        assert float(row['tokens']) == float(row['iterations']) * 64
        # Every character of the toy dataset is one byte.
        assert float(row['bits_per_byte']) == pytest.approx(float(row['loss']) / math.log(2))
    assert 'FLOPs train' in capsys.readouterr().out
    assert (out_dir / 'scaling.png').stat().st_size > 5000

    # One line is missing: that run alone starts again, and finds itself finished.
    path.write_text(''.join(read_lines()[:-1]), encoding='utf-8')
    assert study('--flops=1e10') == rows
    assert len(forked_runs) == 7
    assert 'for 1e+10 FLOPs train' in capsys.readouterr().out

    # Another size is trained, and sizes that are not asked for are not fitted.
    assert len(study('--sizes=1x16,1x32,2x16')) == 8
    assert len(forked_runs) == 9

    not_finite = ''.join(read_lines()[:2]).replace(rows[0]['loss'], 'nan')
    for damaged in ('budget,loss\n1,two\n', not_finite):
        path.write_text(damaged, encoding='utf-8')
        with pytest.raises(UserError, match='is damaged'):
            study()


def test_a_run_that_fails_ends_the_study_in_one_line(tmp_path, forked_runs):
    flags = [
        f'--out_dir={tmp_path}',
        '--dataset=toy',
        '--budgets=4e8',
        '--block_size=32',
        '--batch_size=2',
        '--sizes=1x16',
        '--train_flags=--device=gpu',
    ]
    with script_settings(scaling, *flags):
        with pytest.raises(RunError, match="device='gpu' is unknown"):
            scaling.main()


def test_a_law_is_the_loss_that_it_says():
    assert LossLaw(1, 2, 3, 1, 2).loss(4, 5) == pytest.approx(1 + 2 / 4 + 3 / 25)
