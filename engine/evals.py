"""Evaluation tasks: what is scored, and how. docs/evaluation.md states each protocol with its source.

A task is a file of JSON lines in the format of llm-foundry's in-context tasks, or a text:

    multiple_choice        {"query", "choices", "gold"}: the likeliest choice should be number `gold`
    schema                 {"context_options", "continuation", "gold"}: the same for contexts
    language_modelling     {"context", "continuation"}: every token of the continuation should be the likeliest
    exact                  {"prompt", "answer"}: the same, without a space between the two
    perplexity             a text file
"""

import math
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from engine import taskfiles
from engine.errors import UserError
from engine.scoring import Encoder, Unreadable, common_prefix, score, windows
from engine.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
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


@dataclass
class Task:
    """Examples that are ready to be scored, for one model's tokenizer and block_size."""
    name: str
    kind: str                           # multiple_choice, schema, language_modelling, exact or perplexity
    examples: list                      # of lists of Options; of a text, one Option a window
    gold: list = field(default_factory=list)            # number of the right option
    characters: list = field(default_factory=list)      # for each example, those of its choices
    numbers: list = field(default_factory=list)         # of the examples in their file, from 0
    skipped: int = 0                    # examples that this model cannot read
    reason: str = ''                    # why not, of the first
    baseline: float | None = None       # of a CORE task: accuracy by chance
    protocol: str = ''                  # of a text, and of a CORE task
    units: dict = field(default_factory=dict)           # of a text: {metric: number of words, bytes, ...}


def text_pairs(kind, record, delimiter=' '):
    """[(context, continuation)] of a record, one for each option."""
    if kind == 'multiple_choice':
        return [(record['query'] + delimiter, choice) for choice in record['choices']]
    if kind == 'schema':
        return [(context + delimiter, record['continuation']) for context in record['context_options']]
    if kind == 'language_modelling':
        return [(record['context'] + delimiter, record['continuation'])]
    return [(record['prompt'], record['answer'])]


def core_pairs(kind, record, delimiter):
    """text_pairs as CORE's prompts have them: a context without white space around it."""
    if kind == 'language_modelling':
        record = dict(record, context=record['context'].strip())
    return text_pairs(kind, record, delimiter)


def core_options(encoder, kind, record, shots, delimiter):
    """The Options of a CORE example, as nanochat defines them. The text begins with <|endoftext|> and the solved
    examples in `shots`. Scored are the tokens from the first that differs between choices, or those that all contexts
    end in."""
    solved = ''.join(''.join(core_pairs(kind, shot, delimiter)[shot.get('gold', 0)]) + '\n\n' for shot in shots)
    pairs = [encoder.pair(solved + context, answer) for context, answer in core_pairs(kind, record, delimiter)]
    tokens = [encoder.prefixed(tokens) for tokens, _ in pairs]
    starts = [start + len(encoder.first) for _, start in pairs]
    if kind == 'multiple_choice':
        starts = [min(common_prefix(tokens), len(t) - 1) for t in tokens]
    elif kind == 'schema':
        starts = [len(t) - common_prefix([t[::-1] for t in tokens]) for t in tokens]
    return [encoder.option(t, start) for t, start in zip(tokens, starts)]


def load_examples(name, path, encoder, limit, progress, core=None):
    """The Task of a file of JSON lines. core: a taskfiles.CoreTask, or None."""
    kind, records = taskfiles.read_records(path)
    order = list(range(len(records)))
    if core:                                            # the order that nanochat evaluates in
        random.Random(1337).shuffle(order)
    task = Task(name, kind, [], **dict(baseline=core.baseline, protocol=f'CORE, {core.shots}-shot') if core else {})
    for i, number in enumerate(progress(f'reading {name}', order[:limit or None], min(limit or len(order), len(order)))):
        record = records[number]
        try:
            if core:
                others = random.Random(1234 + i).sample(range(len(order) - 1), min(core.shots, len(order) - 1))
                shots = [records[order[j + (j >= i)]] for j in others]
                options = core_options(encoder, kind, record, shots, core.delimiter)
            elif kind == 'exact':
                options = [encoder.exact(record['prompt'], record['answer'])]
            else:
                options = [encoder.option(*encoder.pair(*pair)) for pair in text_pairs(kind, record)]
        except Unreadable as error:
            task.skipped, task.reason = task.skipped + 1, task.reason or str(error)
            continue
        task.examples.append(options)
        task.numbers.append(number)
        task.gold.append(record.get('gold'))
        task.characters.append([len(choice) for choice in record.get('choices', ())])
    if not task.examples:
        raise UserError(f'{path}: this model can read none of the {task.skipped} examples; {task.reason}')
    return task


def load_text(name, path, encoder, limit):
    """The Task of a text file. limit: documents to read, where the text has several."""
    protocol = taskfiles.text_protocol(name)
    documents = protocol.documents(taskfiles.read_text(path))[:limit or None]
    try:
        tokens = [encoder.encode(protocol.clean(document)) for document in documents]
    except Unreadable as error:
        raise UserError(f'{path}: {error}, so this text has no likelihood') from None
    if protocol.stride:
        size, stride = encoder.block_size, min(protocol.stride, encoder.block_size)
    else:                                               # a block has one token of context, the last block a full window
        tokens = [encoder.prefixed(array) for array in tokens]
        size, stride = encoder.block_size + 1, encoder.block_size
    examples = [[option] for array in tokens for option in windows(array, size, stride, fill_last=not protocol.stride)]
    if not examples:
        raise UserError(f'{path} is too short to be scored')
    counts = dict(token=sum(len(option.tokens) - option.start for option, in examples),
                  word=sum(map(protocol.count_words, documents)), byte=sum(len(d.encode()) for d in documents))
    return Task(name, 'perplexity', examples, protocol=protocol.description,
                units={metric: counts[unit] for metric, unit in protocol.metrics.items()})


def load_tasks(names, folder, tokenizer, block_size, limit=0, progress=lambda text, items, total: items):
    """[Task] of a comma-separated list of names, and the names of CORE tasks that have no file.

    folder: Path of NAME.jsonl and NAME.txt; for core, of the evaluation bundle. tokenizer: a Tokenizer.
    limit: the first examples of each, 0 for all. progress: wraps (text, items, total), as tqdm does.
    UserError for an unknown task, and for a file that is missing, damaged or of another format.
    """
    folder = folder if folder.is_dir() else ROOT / folder       # a relative one may also lie beside the scripts
    encoder, tasks, missing = Encoder(tokenizer, block_size), [], []
    for name in dict.fromkeys(name.strip() for name in names.split(',')):
        if name == 'core':
            found, missing = taskfiles.find_core(folder)
            tasks += [load_examples(core.name, path, encoder, limit, progress, core) for core, path in found]
        else:
            path = taskfiles.find_task(folder, name)
            tasks.append(load_text(name, path, encoder, limit) if path.suffix == '.txt' else
                         load_examples(name, path, encoder, limit, progress))
    return tasks, missing


# Metrics

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
    its scores, lists of engine.scoring.Score. None where should_stop was true; see scoring.score.
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
