"""Evaluation tasks: what is scored, and how. docs/evaluation.md states each protocol with its source.

A task is a file of JSON lines in the format of llm-foundry's in-context tasks, or a text:

    multiple_choice        {"query", "choices", "gold"}: the likeliest choice should be number `gold`
    schema                 {"context_options", "continuation", "gold"}: the same for contexts
    language_modelling     {"context", "continuation"}: every token of the continuation should be the likeliest
    exact                  {"prompt", "answer"}: the same, without a space between the two
    perplexity             a text file
"""

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.errors import UserError
from engine.evaluation import task_files
from engine.evaluation.scoring import Option, common_prefix

ROOT = Path(__file__).resolve().parents[2]


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
    kind, records = task_files.read_records(path)
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
    protocol = task_files.text_protocol(name)
    documents = protocol.documents(task_files.read_text(path))[:limit or None]
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
            found, missing = task_files.find_core(folder)
            tasks += [load_examples(core.name, path, encoder, limit, progress, core) for core, path in found]
        else:
            path = task_files.find_task(folder, name)
            tasks.append(load_text(name, path, encoder, limit) if path.suffix == '.txt' else
                         load_examples(name, path, encoder, limit, progress))
    return tasks, missing


# Metrics


class Unreadable(Exception):
    """An example that a model cannot read, with the reason."""


class Encoder:
    """Text to the Options of one model."""

    def __init__(self, tokenizer, block_size):
        self.tokenizer, self.block_size = tokenizer, block_size
        self.known = set(tokenizer.chars) if tokenizer.chars else None
        self.first = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]      # what a document begins after

    def encode(self, text):
        unknown = sorted(set(text) - self.known) if self.known is not None else ()
        if unknown:
            raise Unreadable(f'the character {unknown[0]!r} is not in the vocabulary of this model')
        return self.tokenizer.encode_to_numpy(text)

    def option(self, tokens, start):
        """An Option that fits block_size: what is too long loses its beginning. One token more than block_size
        is kept, as the last one is only predicted."""
        if not 0 < start < len(tokens):
            raise Unreadable('a text is empty')
        if len(tokens) - start > self.block_size:
            raise Unreadable(f'its {len(tokens) - start} tokens to score are more than block_size={self.block_size}')
        cut = max(0, len(tokens) - self.block_size - 1)
        return Option(tokens[cut:], start - cut)

    def pair(self, context, continuation):
        """(tokens, start) of a continuation given its context. The two are encoded together, and white space at
        the end of the context belongs to the continuation, as in lm-evaluation-harness."""
        stripped = context.rstrip()
        tokens, start = self.encode(stripped + context[len(stripped):] + continuation), len(self.encode(stripped))
        if not start:
            tokens, start = self.prefixed(tokens), len(self.first)
        return tokens, start

    def prefixed(self, tokens):
        return np.concatenate([np.array(self.first, tokens.dtype), tokens])

    def exact(self, prompt, answer):
        prompt = self.encode(prompt) if prompt else self.prefixed(self.encode(prompt))
        return self.option(np.concatenate([prompt, self.encode(answer)]), len(prompt))


def windows(tokens, size, stride, fill_last=False):
    """Options that score each token but the first once, in windows of `size` tokens that begin `stride` apart.
    fill_last: begin the last one earlier, so that it too has `size` tokens; it scores no more of them."""
    end = 0
    for begin in range(0, len(tokens), stride):
        scored, end = max(begin + 1, end), min(begin + size, len(tokens))
        if scored < end:
            first = max(0, end - size) if fill_last else begin
            yield Option(tokens[first:end], scored - first)
        if end == len(tokens):
            return
