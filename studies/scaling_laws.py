"""Scaling laws: how the loss depends on a model's size, N parameters, and its data, D tokens.

Sources: Kaplan et al. 2020 (arXiv:2001.08361), Hoffmann et al. 2022 (arXiv:2203.15556), Besiroglu
et al. 2024 (arXiv:2404.10102). Losses are in nats per token, C in floating point operations.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import torch

from engine.errors import UserError


class LossLaw(NamedTuple):
    """L(N, D) = E + A / N**alpha + B / D**beta."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float

    def loss(self, N, D):
        """The loss in nats per token, of numbers or arrays."""
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def optimum(self, C, flops_per_parameter=6):
        """(N, D) of the lowest loss for C = flops_per_parameter * N * D.

        Source: Hoffmann et al., equation 4.
        """
        exponents = self.alpha + self.beta
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / exponents)
        ND = C / flops_per_parameter
        N = G * ND ** (self.beta / exponents)
        return N, ND / N


# arXiv:2203.15556, appendix D.3
HOFFMANN = LossLaw(E=1.69, A=406.4, B=410.7, alpha=0.34, beta=0.28)
# arXiv:2404.10102, the same runs fitted anew
BESIROGLU = LossLaw(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)


def count_parameters(n_layer, n_embd, vocab_size, block_size):
    """The parameters of a GPT without biases, by group.

    Returns {'token', 'position', 'block', 'norm', 'total', 'non_embedding'}. The total is
    Hoffmann's N. non_embedding is Kaplan's N, which leaves out both embeddings.
    """
    groups = dict(
        token=vocab_size * n_embd,
        position=block_size * n_embd,
        block=n_layer * (12 * n_embd ** 2 + 2 * n_embd),
        norm=n_embd,
    )
    total = sum(groups.values())
    return dict(groups, total=total, non_embedding=groups['block'] + groups['norm'])


# Approach 2 of Hoffmann et al.: the best size for each budget

class Parabola(NamedTuple):
    """A parabola of the loss over log N, for the runs of one budget."""
    N: float                    # size at its lowest point
    loss: float                 # loss at its lowest point
    at_edge: bool               # True where the best N is not inside the sizes that were tried,
                                # or there is no lowest point
    coefficients: np.ndarray    # of log N squared, of log N, and the constant


def fit_parabola(N, losses):
    """The Parabola through at least three runs of one budget."""
    x = np.log(np.asarray(N, float))
    y = np.asarray(losses, float)
    if len(set(x)) < 3:
        raise UserError('a parabola needs runs of three sizes for each budget; try more --sizes')

    # its lowest point, or the best run where it opens downward
    a, b, c = np.polyfit(x, y, 2)
    best = x[y.argmin()]
    if a > 0:
        best = -b / (2 * a)

    is_inside = x.min() < best < x.max()
    best_run_is_last = y.argmin() in (x.argmin(), x.argmax())
    at_edge = a <= 0 or not is_inside or best_run_is_last

    # Outside the sizes that were tried, the parabola is no more than a guess.
    best = min(max(best, x.min()), x.max())
    loss = np.polyval((a, b, c), best)
    return Parabola(math.exp(best), loss, bool(at_edge), np.array([a, b, c]))


def fit_power_law(x, y):
    """(factor, exponent) of y = factor * x**exponent, by least squares of the logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), 1)
    return math.exp(log_factor), exponent


def exponents_of(budgets, losses):
    """The exponents a and b of N ~ C**a and D ~ C**b, for best sizes by a parabola a budget.

    budgets: {C: (N, D, ...)}, arrays over the runs of that budget. losses: {C: one loss a run}.
    """
    C = np.array(sorted(budgets), float)
    best_n = []
    best_d = []
    for c in C:
        N, D = budgets[c][:2]
        best = fit_parabola(N, losses[c]).N
        # D falls with N a little faster than 1/N, as attention takes more of the operations in a
        # small model. So it is read between the runs of this budget.
        log_d = np.interp(math.log(best), np.log(N), np.log(D))
        best_n.append(best)
        best_d.append(np.exp(log_d))

    _, a = fit_power_law(C, np.array(best_n))
    _, b = fit_power_law(C, best_d)
    return a, b


def fit_exponents(budgets, resamples=1000, seed=0):
    """The exponents a and b of N ~ C**a and D ~ C**b, with intervals.

    budgets: {C: (N, D, losses)}, arrays over the runs of that budget. Returns {'N': (exponent,
    low, high), 'D': the same}, with the 10th and the 90th percentile of a bootstrap that
    resamples the parabolas' residuals.
    """
    if len(budgets) < 2:
        raise UserError('exponents need two budgets or more')

    # what the parabolas leave over
    measured = {}
    fitted = {}
    residuals = {}
    for c, (N, _, losses) in budgets.items():
        measured[c] = losses
        fitted[c] = np.polyval(fit_parabola(N, losses).coefficients, np.log(N))
        residual = np.asarray(losses) - fitted[c]
        # Three coefficients take three degrees of freedom, so the residuals are too small.
        runs = len(residual)
        residuals[c] = residual * math.sqrt(runs / max(1, runs - 3))

    # the exponents, had those residuals fallen otherwise
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        resampled = {c: fitted[c] + generator.choice(residuals[c], len(residuals[c]))
                     for c in budgets}
        samples.append(exponents_of(budgets, resampled))

    low, high = np.percentile(samples, (10, 90), axis=0)
    values = exponents_of(budgets, measured)
    return {name: (values[i], low[i], high[i]) for i, name in enumerate('ND')}


# Approach 3 of Hoffmann et al.: one law for all runs

def fit_loss_law(N, D, losses, delta=1e-3, starts=None):
    """The LossLaw with the least Huber loss of log L, from several starts.

    N, D, losses: one number a run, for at least six runs.
    delta: where the Huber loss turns from squares to distances.
    starts: tuples (log A, log B, log E, alpha, beta) to begin with.
    """
    if len(N) < 6:
        raise UserError(f'{len(N)} runs are too few for five coefficients; six or more are needed')

    log_n = torch.tensor(np.log(np.asarray(N, float)))
    log_d = torch.tensor(np.log(np.asarray(D, float)))
    log_loss = torch.tensor(np.log(np.asarray(losses, float)))
    lowest = log_loss.min().item()
    if starts is None:
        starts = itertools.product((3.0, 8.0), (3.0, 8.0), (lowest - 0.7, lowest - 0.1), (0.3,),
                                   (0.3, 0.6))

    def objective(p):
        log_a, log_b, log_e, alpha, beta = p
        terms = [log_a - alpha * log_n, log_b - beta * log_d, log_e.expand(len(log_n))]
        predicted = torch.logsumexp(torch.stack(terms), dim=0)
        huber = torch.nn.functional.huber_loss(predicted, log_loss, delta=delta, reduction='sum')
        return huber / delta

    best = None
    best_value = math.inf
    for start in starts:
        coefficients, value = minimize(objective, start)
        # Where the runs do not determine them, the exponents run away, or turn negative.
        if value < best_value and min(coefficients[3:]) > 0:
            best = coefficients
            best_value = value
    if best is None:
        raise UserError('no scaling law fits these runs; more sizes and budgets may help')

    log_a, log_b, log_e, alpha, beta = best
    return LossLaw(math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta)


def minimize(objective, start):
    """(where, its value) of a minimum of `objective` near `start`, by L-BFGS."""
    p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [p], max_iter=300, history_size=20, line_search_fn='strong_wolfe', tolerance_grad=1e-9,
        tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        value = objective(p)
        value.backward()
        return value

    optimizer.step(closure)
    return p.detach().tolist(), objective(p).item()
