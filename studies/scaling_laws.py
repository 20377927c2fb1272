"""Scaling laws: how the loss depends on the size of a model, N parameters, and on its data, D tokens.

Sources: Kaplan et al. 2020 (arXiv:2001.08361), Hoffmann et al. 2022 (arXiv:2203.15556), Besiroglu et al.
2024 (arXiv:2404.10102). Losses are in nats per token, C in floating point operations.
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
        return self.E + self.A / N ** self.alpha + self.B / D ** self.beta

    def optimum(self, C, flops_per_parameter=6):
        """(N, D) of the lowest loss for C = flops_per_parameter * N * D. Hoffmann et al., equation 4."""
        G = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        ND = C / flops_per_parameter
        N = G * ND ** (self.beta / (self.alpha + self.beta))
        return N, ND / N


HOFFMANN = LossLaw(1.69, 406.4, 410.7, 0.34, 0.28)                      # arXiv:2203.15556, appendix D.3
BESIROGLU = LossLaw(1.8172, 482.01, 2085.43, 0.3478, 0.3658)            # arXiv:2404.10102, the same runs fitted anew


def count_parameters(n_layer, n_embd, vocab_size, block_size):
    """{'token', 'position', 'block', 'norm', 'total', 'non_embedding'} of a GPT without biases. The total is Hoffmann's N,
    non_embedding is Kaplan's: without both embeddings."""
    groups = dict(token=vocab_size * n_embd, position=block_size * n_embd,
                  block=n_layer * (12 * n_embd ** 2 + 2 * n_embd), norm=n_embd)
    return dict(groups, total=sum(groups.values()), non_embedding=groups['block'] + groups['norm'])


class Parabola(NamedTuple):
    """A parabola of the loss over log N, for the runs of one budget."""
    N: float            # of its lowest point
    loss: float         # there
    at_edge: bool       # True where the best N is not inside the sizes that were tried, or there is no lowest point
    coefficients: np.ndarray


def fit_parabola(N, losses):
    """Approach 2 of Hoffmann et al. N, losses: of at least three runs of one budget. Returns a Parabola."""
    x, y = np.log(np.asarray(N, float)), np.asarray(losses, float)
    if len(set(x)) < 3:
        raise UserError('a parabola needs runs of three sizes for each budget; try more --sizes')
    a, b, c = np.polyfit(x, y, 2)
    best = -b / (2 * a) if a > 0 else x[y.argmin()]
    at_edge = a <= 0 or not x.min() < best < x.max() or y.argmin() in (x.argmin(), x.argmax())
    best = min(max(best, x.min()), x.max())             # outside, the parabola is no more than a guess
    return Parabola(math.exp(best), np.polyval((a, b, c), best), bool(at_edge), np.array([a, b, c]))


def fit_power_law(x, y):
    """(factor, exponent) of y = factor * x**exponent, by least squares of the logarithms."""
    exponent, log_factor = np.polyfit(np.log(x), np.log(y), 1)
    return math.exp(log_factor), exponent


def fit_exponents(budgets, resamples=1000, seed=0):
    """The exponents a and b of N ~ C**a and D ~ C**b, with intervals.

    budgets: {C: (N, D, losses)}, arrays over the runs of that budget. Returns {'N': (exponent, low, high), 'D': the
    same}, with the 10th and the 90th percentile of a bootstrap that resamples the parabolas' residuals. D at the
    best N follows from D * N of that budget's runs.
    """
    if len(budgets) < 2:
        raise UserError('exponents need two budgets or more')
    generator, C = np.random.default_rng(seed), np.array(sorted(budgets), float)

    def exponents(losses):
        best = np.array([fit_parabola(budgets[c][0], losses[c]).N for c in C])
        # D falls with N a little faster than 1/N, as attention takes more of the operations in a small model.
        data = [np.exp(np.interp(math.log(n), np.log(budgets[c][0]), np.log(budgets[c][1]))) for n, c in zip(best, C)]
        return fit_power_law(C, best)[1], fit_power_law(C, data)[1]

    fitted = {c: np.polyval(fit_parabola(N, losses).coefficients, np.log(N)) for c, (N, _, losses) in budgets.items()}
    residuals = {c: np.asarray(budgets[c][2]) - fitted[c] for c in budgets}
    # Three coefficients take three degrees of freedom, so the residuals are too small.
    residuals = {c: r * math.sqrt(len(r) / max(1, len(r) - 3)) for c, r in residuals.items()}
    samples = [exponents({c: fitted[c] + generator.choice(residuals[c], len(residuals[c])) for c in budgets})
               for _ in range(resamples)]
    low, high = np.percentile(samples, (10, 90), axis=0)
    values = exponents({c: budgets[c][2] for c in budgets})
    return {name: (values[i], low[i], high[i]) for i, name in enumerate('ND')}


def fit_loss_law(N, D, losses, delta=1e-3, starts=None):
    """Approach 3 of Hoffmann et al.: the LossLaw with the least Huber loss of log L, from several starts.

    N, D, losses: one number a run, at least six runs. delta: where the Huber loss turns from squares to
    distances. starts: (log A, log B, log E, alpha, beta) each.
    """
    if len(N) < 6:
        raise UserError(f'{len(N)} runs are too few for five coefficients; six or more are needed')
    log_n, log_d, log_loss = (torch.tensor(np.log(np.asarray(v, float))) for v in (N, D, losses))
    lowest = log_loss.min().item()
    if starts is None:
        starts = itertools.product((3.0, 8.0), (3.0, 8.0), (lowest - 0.7, lowest - 0.1), (0.3,), (0.3, 0.6))

    def objective(p):
        log_a, log_b, log_e, alpha, beta = p
        terms = [log_a - alpha * log_n, log_b - beta * log_d, log_e.expand(len(log_n))]
        predicted = torch.logsumexp(torch.stack(terms), dim=0)
        return torch.nn.functional.huber_loss(predicted, log_loss, delta=delta, reduction='sum') / delta

    best, best_value = None, math.inf
    for start in starts:
        p = torch.tensor(start, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([p], max_iter=300, history_size=20, line_search_fn='strong_wolfe',
                                      tolerance_grad=1e-9, tolerance_change=1e-14)

        def closure():
            optimizer.zero_grad()
            value = objective(p)
            value.backward()
            return value
        optimizer.step(closure)
        value = objective(p).item()
        # Where the runs do not determine them, the exponents run away, or turn negative.
        if value < best_value and min(p[3:].tolist()) > 0:
            best, best_value = p.detach().tolist(), value
    if best is None:
        raise UserError('no scaling law fits these runs; more sizes and budgets may help')
    log_a, log_b, log_e, alpha, beta = best
    return LossLaw(math.exp(log_e), math.exp(log_a), math.exp(log_b), alpha, beta)
