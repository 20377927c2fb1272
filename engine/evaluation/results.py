"""Scores to metrics: what is computed from them, and the results of a list of tasks."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from engine.evaluation.scoring import score
from engine.evaluation.tasks import load_tasks
from engine.tokenizer import Tokenizer

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


def measure(task, i, scores):
    """{metric: number} of example i: 0 or 1 for an accuracy."""
    values = np.array([s.loglikelihood for s in scores])
    per_token = values / [s.tokens for s in scores]
    if task.kind in ('multiple_choice', 'schema'):
        if task.baseline is not None:
            return dict(acc=per_token.argmax() == task.gold[i])
        found = dict(acc=values.argmax() == task.gold[i])
        if task.kind == 'multiple_choice':
            found.update(acc_norm=(values / task.characters[i]).argmax() == task.gold[i],
                         acc_tok=per_token.argmax() == task.gold[i])
        return found
    found = dict(acc=scores[0].greedy)
    if task.kind == 'language_modelling' and task.baseline is None:
        found.update(perplexity=-values[0], acc_last_token=scores[0].last_greedy)
    return found


def mean_and_stderr(values):
    """The mean of independent values and its standard error, nan for a single one."""
    values = np.asarray(values, float)
    return values.mean(), values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def result(task, metric, value, stderr, protocol):
    """One entry of eval.json. A stderr that is not known is None."""
    found = dict(task=task.name, metric=metric, value=float(value), stderr=float(stderr) if math.isfinite(stderr) else None,
                 examples=len(task.examples), protocol=protocol)
    return dict(found, skipped=task.skipped) if task.skipped else found


def summarize(task, scores):
    """The results of a task: a list of dicts."""
    if task.kind == 'perplexity':
        nll, tokens = np.array([(-s.loglikelihood, s.tokens) for s, in scores]).T
        # of the sum over windows, each around the share that its number of tokens would have of it
        _, stderr = mean_and_stderr(nll - tokens * nll.sum() / tokens.sum())
        found = []
        for metric, units in task.units.items():
            value, error = nll.sum() / units, stderr * len(nll) / units
            if metric.startswith('bits'):
                value, error = value / math.log(2), error / math.log(2)
            else:
                value = math.exp(min(value, 700))
                error *= value
            found.append(result(task, metric, value, error, task.protocol))
        return found
    rows, found = [measure(task, i, s) for i, s in enumerate(scores)], []
    for metric in rows[0]:
        value, stderr = mean_and_stderr([row[metric] for row in rows])
        if metric == 'perplexity':
            value = math.exp(min(value, 700))
            stderr *= value
        protocol = task.protocol or PROTOCOLS[task.kind, metric]
        found.append(result(task, metric, value, stderr, protocol))
        if task.baseline is not None:                   # 0 by chance, 1 where all are right
            scale = 1 - task.baseline
            found.append(result(task, 'centered', (value - task.baseline) / scale, stderr / scale, protocol))
    return found


def summarize_core(results, missing):
    """The CORE metric: the mean of the centered accuracies in `results`, or [] where there are none."""
    centered = [r for r in results if r['metric'] == 'centered']
    if not centered:
        return []
    stderr = math.sqrt(sum((r['stderr'] or 0) ** 2 for r in centered)) / len(centered)
    protocol = f'mean of {len(centered)} centered accuracies' + (f'; without {", ".join(missing)}' if missing else '')
    return [dict(task='core', metric='centered', value=sum(r['value'] for r in centered) / len(centered), stderr=stderr,
                 examples=sum(r['examples'] for r in centered), protocol=protocol)]


def evaluate_tasks(model, tasks, env, batch_size=32, missing=(), progress=lambda text, items, total: items,
                   should_stop=lambda: False, on_scores=None):
    """The results of `tasks`, a list of dicts: task, metric, value, stderr, examples, protocol.

    Every rank calls it and gets the same. tasks, missing: of load_tasks. on_scores: called with each task and
    its scores, lists of engine.evaluation.scoring.Score. None where should_stop was true; see scoring.score.
    """
    results = []
    for task in tasks:
        scores = score(model, task.examples, env, batch_size, partial(progress, task.name), should_stop)
        if scores is None:
            return None
        if on_scores:
            on_scores(task, scores)
        results += summarize(task, scores)
    return results + summarize_core(results, missing)


class TaskScorer:
    """The tasks of evaluate.py, scored between steps. It moves no random numbers and leaves the model in evaluation mode.

    names, folder, limit: of load_tasks. tokenizer: a spec. progress: wraps (text, items, total), as tqdm does.
    print_line: for a note on what is left out. Raises UserError for what cannot be scored.
    """

    def __init__(self, names, folder, limit, tokenizer, model, progress, print_line):
        self.progress = progress
        self.tasks, self.missing = load_tasks(names, Path(folder), Tokenizer(tokenizer), model.config.block_size,
                                                    limit, progress)
        for task in self.tasks:
            if task.skipped:
                print_line(f'note: {task.name}: {task.skipped:,} examples are left out, as this model cannot read them: {task.reason}')

    def __call__(self, model, env):
        """{'hellaswag_acc': 0.29, ...} over all ranks, or None if a signal reached any rank."""
        results = evaluate_tasks(model, self.tasks, env, 32, self.missing, self.progress, env.stop_signal)
        return results and {f'{r["task"]}_{r["metric"]}': r['value'] for r in results}
