"""Evaluation tasks: what is scored, and how.

docs/evaluation.md states each protocol with its source.

A task is a file of JSON lines in the format of llm-foundry's in-context tasks, or a text:

    multiple_choice     {"query", "choices", "gold"}: the likeliest choice should be number `gold`
    schema              {"context_options", "continuation", "gold"}: the same for contexts
    language_modelling  {"context", "continuation"}: each token of the continuation should be the
                        likeliest
    exact               {"prompt", "answer"}: the same, without a space between the two
    perplexity          a text file
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.chat_layout import ChatLayout, Turn, encode_prompt
from engine.errors import UserError
from engine.evaluation import task_files
from engine.evaluation.scoring import Option, common_prefix
from engine.log import log, progress_bar
from engine.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Example:
    """One question of a task, or one window of a text, as a model reads it."""
    options: list[Option]               # one for each choice; a single one where there is no choice
    number: int                         # of its record in the file, or of the window, from 0
    gold: int | None = None             # number of the right option
    characters: list[int] = field(default_factory=list)     # length of each choice


@dataclass
class Task:
    """Examples that are ready to be scored, for one model's tokenizer and block_size."""
    name: str
    kind: str                           # one of those at the top of this file
    examples: list[Example] = field(default_factory=list)
    skipped: int = 0                    # how many examples this model cannot read
    reason: str | None = None           # why it cannot read the first of those
    baseline: float | None = None       # accuracy by chance, of a task of CORE
    protocol: str | None = None         # of a text, and of a task of CORE
    # Of a text, {metric: how many tokens, words or bytes the log-likelihood is divided by}
    units: dict[str, int] = field(default_factory=dict)


def load_tasks(names: str, folder: Path, tokenizer: Tokenizer, block_size: int, limit: int = 0,
               chat: ChatLayout | None = None) -> tuple[list[Task], list[str]]:
    """The tasks of a comma-separated list of names, and the names of CORE's tasks without a file.

    Tasks that the model cannot read are left out, and named in the log. CORE's are then missing.
    Raises UserError for an unknown task, for a file that is missing, damaged or of another format,
    and where no task is left. Logs how many examples the model cannot read.

    folder: holds NAME.jsonl and NAME.txt. For `core` it is the evaluation bundle.
    limit: how many examples of each task are taken, from the first on; 0 takes all.
    chat: the layout in which a user says the prompts, and an assistant the answers. It is for
        tasks of the kind `exact` alone.
    """
    if not folder.is_dir():
        folder = ROOT / folder          # a relative one may also lie beside the scripts
    encoder = Encoder(tokenizer, block_size, chat)
    files = []                          # (name, path, its CoreTask or None) of each task
    missing = []
    unique_names = dict.fromkeys(name.strip() for name in names.split(','))
    for name in unique_names:
        if name == 'core':
            found, missing = task_files.find_core(folder)
            files += [(core.name, path, core) for core, path in found]
        else:
            files.append((name, task_files.find_task(folder, name), None))

    tasks = []
    reasons = []                        # why tasks are left out
    for name, path, core in files:
        try:
            if path.suffix == '.txt':
                tasks.append(load_text(name, path, encoder, limit))
            else:
                tasks.append(load_examples(name, path, encoder, limit, core))
        except Unreadable as error:
            reasons.append(str(error))
            if core:
                missing = [*missing, name]
    if not tasks:
        raise UserError(reasons[0])

    for reason in reasons:
        log.info(f'note: a task is left out: {reason}')
    for task in tasks:
        if chat and task.kind != 'exact':
            raise UserError(f'{task.name} is no task of prompts and answers, which --chat=True '
                            f'asks for; leave one of them out')
        if task.skipped:
            log.info(f'note: {task.name}: {task.skipped:,} examples are left out, as this model '
                     f'cannot read them: {task.reason}')
    return tasks, missing


# Examples

def load_examples(name, path, encoder, limit, core=None):
    """The Task of a file of JSON lines. core: its task_files.CoreTask, or None."""
    kind, records = task_files.read_records(path)
    task = Task(name, kind)
    order = list(range(len(records)))
    if core:
        task.baseline = core.baseline
        task.protocol = f'CORE, {core.shots}-shot'
        random.Random(1337).shuffle(order)              # the order that nanochat evaluates in

    taken = order[:limit] if limit else order
    for i, number in enumerate(progress_bar(f'reading {name}', taken, len(taken))):
        record = records[number]
        try:
            if core:
                shots = [records[j] for j in draw_shots(taken, i, core.shots)]
                options = core_options(encoder, kind, record, shots, core.delimiter)
            else:
                options = make_options(encoder, kind, record)
        except Unreadable as error:
            task.skipped += 1
            task.reason = task.reason or str(error)
            continue
        characters = [len(choice) for choice in record.get('choices', ())]
        task.examples.append(Example(options, number, record.get('gold'), characters))

    if not task.examples:
        raise Unreadable(f'{path}: this model can read none of the {task.skipped} examples; '
                         f'{task.reason}')
    return task


class Pair(NamedTuple):
    """A text that is scored, given the one before it."""
    context: str
    continuation: str


def text_pairs(kind, record, delimiter=' '):
    """The Pairs of a record, one for each option."""
    if kind == 'multiple_choice':
        context = record['query'] + delimiter
        return [Pair(context, choice) for choice in record['choices']]

    if kind == 'schema':
        continuation = record['continuation']
        return [Pair(context + delimiter, continuation) for context in record['context_options']]

    if kind == 'language_modelling':
        return [Pair(record['context'] + delimiter, record['continuation'])]

    return [Pair(record['prompt'], record['answer'])]


def make_options(encoder, kind, record):
    """The Options of a record."""
    if kind == 'exact':
        return [encoder.exact(record['prompt'], record['answer'])]

    options = []
    for context, continuation in text_pairs(kind, record):
        tokens, start = encoder.pair(context, continuation)
        options.append(encoder.option(tokens, start))
    return options


# CORE

def draw_shots(order, i, count):
    """The numbers of the solved examples that come before the one at place i of `order`.

    They are drawn from the others, by a generator that depends on i alone, as nanochat draws them.
    """
    n_others = len(order) - 1
    places = random.Random(1234 + i).sample(range(n_others), min(count, n_others))
    return [order[place if place < i else place + 1] for place in places]


def core_pairs(kind, record, delimiter):
    """text_pairs as CORE's prompts have them: a context without white space around it."""
    if kind == 'language_modelling':
        record = dict(record, context=record['context'].strip())
    return text_pairs(kind, record, delimiter)


def core_options(encoder, kind, record, shots, delimiter):
    """The Options of an example of CORE, as nanochat defines them.

    The text begins with <|endoftext|> and the solved examples in `shots`. The tokens that are
    scored begin with the first one that differs between the choices. With a schema, they are those
    that all texts end in.
    """
    solved = ''
    for shot in shots:
        right = core_pairs(kind, shot, delimiter)[shot.get('gold', 0)]
        solved += right.context + right.continuation + '\n\n'

    texts = []
    starts = []
    for context, continuation in core_pairs(kind, record, delimiter):
        tokens, start = encoder.pair(solved + context, continuation)
        texts.append(encoder.prefixed(tokens))
        starts.append(start + len(encoder.first))

    if kind == 'multiple_choice':
        shared = common_prefix(texts)
        starts = [min(shared, len(tokens) - 1) for tokens in texts]
    elif kind == 'schema':
        shared = common_prefix([tokens[::-1] for tokens in texts])
        starts = [len(tokens) - shared for tokens in texts]
    return [encoder.option(tokens, start) for tokens, start in zip(texts, starts)]


# Texts

def load_text(name, path, encoder, limit):
    """The Task of a text file. limit: how many documents are read, where the text has several."""
    protocol = task_files.text_protocol(name)
    documents = protocol.documents(task_files.read_text(path))
    if limit:
        documents = documents[:limit]

    try:
        texts = [encoder.encode(protocol.clean(document)) for document in documents]
    except Unreadable as error:
        raise Unreadable(f'{path}: {error}, so this text has no likelihood') from None

    block_size = encoder.block_size
    examples = []
    for tokens in texts:
        if protocol.stride:
            options = windows(tokens, block_size, min(protocol.stride, block_size))
        else:
            # A block has one token of context, and the last block has a full window.
            options = windows(encoder.prefixed(tokens), block_size + 1, block_size, fill_last=True)
        for option in options:
            examples.append(Example([option], len(examples)))
    if not examples:
        raise UserError(f'{path} is too short to be scored')

    counts = dict(
        token=sum(option.n_scored for example in examples for option in example.options),
        word=sum(protocol.count_words(document) for document in documents),
        byte=sum(len(document.encode()) for document in documents),
    )
    units = {metric: counts[unit] for metric, unit in protocol.metrics.items()}
    return Task(name, 'perplexity', examples, protocol=protocol.description, units=units)


def windows(tokens, size, stride, fill_last=False) -> Iterator[Option]:
    """Options that score each token but the first once.

    size: how many tokens a window has.
    stride: how many tokens lie between the beginnings of two windows.
    fill_last: begin the last window earlier, so that it has `size` tokens too. It scores no more
        of them.
    """
    end = 0
    for begin in range(0, len(tokens), stride):
        scored_from = max(begin + 1, end)
        end = min(begin + size, len(tokens))
        if scored_from < end:
            first = begin
            if fill_last:
                first = max(0, end - size)
            yield Option(tokens[first:end], scored_from - first)
        if end == len(tokens):
            return


# Tokens

class Unreadable(Exception):
    """An example or a task that a model cannot read, with the reason."""


class Encoder:
    """Text to the Options of one model."""

    def __init__(self, tokenizer, block_size, chat=None):
        self.tokenizer = tokenizer
        self.block_size = block_size
        self.chat = chat                # the ChatLayout of prompts and answers, or None

        self.characters = None          # that the model knows; None: it reads every text
        if tokenizer.chars:
            self.characters = set(tokenizer.chars)
        self.first = []                 # what a document begins after
        if tokenizer.end_of_text is not None:
            self.first = [tokenizer.end_of_text]

    def encode(self, text):
        """The ids of a text, (T,). Raises Unreadable for a character that the model cannot read."""
        if self.characters is not None:
            unknown = set(text) - self.characters
            if unknown:
                raise Unreadable(f'the character {min(unknown)!r} is not in the vocabulary of this '
                                 f'model')
        return self.tokenizer.encode_to_numpy(text)

    def prefixed(self, tokens):
        """The tokens as a document begins: after <|endoftext|>, where the tokenizer has it."""
        return np.concatenate([np.array(self.first, tokens.dtype), tokens])

    def option(self, tokens, start):
        """An Option that fits block_size: a text that is too long loses its beginning.

        One token more than block_size is kept, as the last one is only predicted.
        """
        if not 0 < start < len(tokens):
            raise Unreadable('a text is empty')
        n_scored = len(tokens) - start
        if n_scored > self.block_size:
            raise Unreadable(f'its {n_scored} tokens to score are more than '
                             f'block_size={self.block_size}')
        cut = max(0, len(tokens) - self.block_size - 1)
        return Option(tokens[cut:], start - cut)

    def pair(self, context, continuation):
        """The tokens of a context with its continuation, and where the continuation starts.

        The two are encoded together, and white space at the end of the context belongs to the
        continuation, as in lm-evaluation-harness.
        """
        tokens = self.encode(context + continuation)
        start = len(self.encode(context.rstrip()))
        if start == 0:
            return self.prefixed(tokens), len(self.first)
        return tokens, start

    def exact(self, prompt, answer):
        """The Option of an answer that is encoded by itself."""
        prompt_tokens = self.encode(prompt)
        answer_tokens = self.encode(answer)
        if self.chat:
            said = self.chat.prompt([Turn('user', prompt)])
            prompt_tokens = np.array(encode_prompt(self.tokenizer, said), prompt_tokens.dtype)
            # the model has to end its answer, too
            answer_tokens = np.concatenate([answer_tokens, self.encode(self.chat.end)])
        elif not prompt:
            prompt_tokens = self.prefixed(prompt_tokens)
        tokens = np.concatenate([prompt_tokens, answer_tokens])
        return self.option(tokens, len(prompt_tokens))
