"""Scores to metrics: what is computed from them, and the results of a list of tasks."""

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch

from engine.distributed import Environment
from engine.evaluation.scoring import Score, score
from engine.evaluation.tasks import Task, load_tasks
from engine.tokenizer import Tokenizer, TokenizerSpec

LM_EVAL = 'as lm-evaluation-harness'
PROTOCOLS = {       # (kind, metric): how the value is computed
    ('multiple_choice', 'acc'): f'summed log-likelihood, {LM_EVAL}',
    ('multiple_choice', 'acc_norm'): f'log-likelihood per character, {LM_EVAL}',
    ('multiple_choice', 'acc_tok'): 'log-likelihood per token, as llm.c and build-nanogpt',
    ('schema', 'acc'): f'summed log-likelihood of one continuation, {LM_EVAL}',
    ('language_modelling', 'acc'): f'all target tokens greedy, {LM_EVAL}',
    ('language_modelling', 'acc_last_token'): 'the last token alone, given all before it',
    ('language_modelling', 'perplexity'): f'per target, {LM_EVAL}',
    ('exact', 'acc'): 'the greedy continuation equals the answer'}

MAX_EXPONENT = 700              # exp of more is not a finite float


class Result(TypedDict):
    """One entry of eval.json."""
    task: str
    metric: str
    value: float
    stderr: float | None        # the value's standard error; None: not known
    examples: int               # how many were scored
    protocol: str               # how the value is computed
    skipped: NotRequired[int]   # how many examples the model could not read, if any


def evaluate_tasks(model: torch.nn.Module, tasks: list[Task], env: Environment,
                   batch_size: int = 32, missing: Iterable[str] = (),
                   should_stop: Callable[[], bool] = lambda: False,
                   on_scores: Callable[[Task, list[list[Score]]], None] | None = None,
                   ) -> list[Result] | None:
    """The results of `tasks`, or None where should_stop was true.

    Every rank calls it and gets the same.

    batch_size: how many options are read at once.
    missing: the names of CORE's tasks that have no file.
    should_stop: is asked after each batch, as often on every rank.
    on_scores: is called with each task and its scores, a list for each example.
    """
    results = []

    for task in tasks:
        examples = [example.options for example in task.examples]
        scores = score(model, examples, env, batch_size, should_stop, title=task.name)
        if scores is None:
            return None

        if on_scores:
            on_scores(task, scores)
        results += summarize(task, scores)
    return results + summarize_core(results, missing)


def make_result(task, metric, value, stderr, protocol):
    """The Result of a metric. stderr: may be nan."""
    result = Result(task=task.name, metric=metric, value=float(value), stderr=None,
                    examples=len(task.examples), protocol=protocol)

    if math.isfinite(stderr):
        result['stderr'] = float(stderr)
    if task.skipped:
        result['skipped'] = task.skipped
    return result


def summarize(task, scores):
    """The Results of a task. scores: a list of Scores for each example."""
    if task.kind == 'perplexity':
        return summarize_text(task, scores)

    rows = [measure(task, example, options) for example, options in zip(task.examples, scores)]
    results = []
    for metric in rows[0]:
        value, stderr = mean_and_stderr([row[metric] for row in rows])
        if metric == 'perplexity':
            value, stderr = exponential(value, stderr)
        protocol = task.protocol or PROTOCOLS[task.kind, metric]
        results.append(make_result(task, metric, value, stderr, protocol))

        if task.baseline is not None:           # 0 by chance, 1 where all are right
            scale = 1 - task.baseline
            centered = (value - task.baseline) / scale
            results.append(make_result(task, 'centered', centered, stderr / scale, protocol))
    return results


def measure(task, example, scores):
    """{metric: number} of an example, 0 or 1 for an accuracy. scores: of its options."""
    is_core = task.baseline is not None
    if task.kind in ('multiple_choice', 'schema'):
        return measure_choice(task.kind, is_core, example, scores)

    found = dict(acc=scores[0].greedy)
    if task.kind == 'language_modelling' and not is_core:
        found['perplexity'] = -scores[0].loglikelihood
        found['acc_last_token'] = scores[0].last_greedy
    return found


def measure_choice(kind, is_core, example, scores):
    """{metric: True where the right option is the likeliest}."""
    def is_right(values):
        return values.argmax() == example.gold

    loglikelihoods = np.array([score.loglikelihood for score in scores])
    per_token = loglikelihoods / [score.tokens for score in scores]
    if is_core:
        return dict(acc=is_right(per_token))

    if kind == 'schema':
        return dict(acc=is_right(loglikelihoods))

    return dict(
        acc=is_right(loglikelihoods),
        acc_norm=is_right(loglikelihoods / example.characters),
        acc_tok=is_right(per_token),
    )


def summarize_text(task, scores):
    """The Results of a text. scores: of its windows, a list of one Score for each."""
    nll = np.array([-window.loglikelihood for (window,) in scores])
    tokens = np.array([float(window.tokens) for (window,) in scores])

    # The standard error is that of the sum over windows. Each window varies around the share of the
    # sum that its number of tokens would have.
    _, stderr = mean_and_stderr(nll - tokens * nll.sum() / tokens.sum())

    results = []
    for metric, units in task.units.items():
        value = nll.sum() / units
        error = stderr * len(nll) / units
        if metric.startswith('bits'):
            value /= math.log(2)
            error /= math.log(2)
        else:
            value, error = exponential(value, error)
        results.append(make_result(task, metric, value, error, task.protocol))
    return results


def summarize_core(results, missing):
    """[the Result of CORE]: the mean of the centered accuracies. [] where there are none."""
    centered = [result for result in results if result['metric'] == 'centered']
    if not centered:
        return []

    n = len(centered)
    protocol = f'mean of {n} centered accuracies'
    if missing:
        protocol += f'; without {", ".join(missing)}'

    # The tasks are independent, so their variances add up.
    variance = sum((result['stderr'] or 0) ** 2 for result in centered)
    return [Result(
        task='core',
        metric='centered',
        value=sum(result['value'] for result in centered) / n,
        stderr=math.sqrt(variance) / n,
        examples=sum(result['examples'] for result in centered),
        protocol=protocol,
    )]


def mean_and_stderr(values):
    """The mean of independent values and its standard error, nan for a single one."""
    values = np.asarray(values, float)
    if len(values) == 1:
        return values.mean(), math.nan
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values))


def exponential(value, stderr):
    """exp of a value, and its standard error."""
    result = math.exp(min(value, MAX_EXPONENT))
    return result, stderr * result


class TaskScorer:
    """Scores the tasks of evaluate.py while a model trains.

    It moves no random numbers and leaves the model's mode as it is. Raises UserError for what
    cannot be scored.

    names: of tasks, separated by commas.
    folder: where their files lie.
    limit: how many examples of each task are scored, from the first on; 0 scores all.
    tokenizer: the spec of the model's tokenizer.
    """

    def __init__(self, names: str, folder: str, limit: int, tokenizer: TokenizerSpec,
                 model: torch.nn.Module):
        self.tasks, self.missing = load_tasks(names, Path(folder), Tokenizer(tokenizer),
                                              model.config.block_size, limit)

    def __call__(self, model: torch.nn.Module, env: Environment) -> dict[str, float] | None:
        """{'hellaswag_acc': 0.29, ...} over all ranks, or None if a signal reached any rank."""
        results = evaluate_tasks(model, self.tasks, env, missing=self.missing,
                                 should_stop=env.stop_signal)
        if results is None:
            return None
        return {f'{result["task"]}_{result["metric"]}': result['value'] for result in results}
