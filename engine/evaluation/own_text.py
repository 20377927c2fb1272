"""A text of one's own, token by token: its windows, its numbers, and its lines of JSON."""

import codecs
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.distributed import Environment
from engine.errors import UserError
from engine.evaluation.results import Result, summarize
from engine.evaluation.scoring import Option, Score, token_scores
from engine.evaluation.task_files import read_bytes
from engine.evaluation.tasks import Encoder, Example, Task, Unreadable, windows
from engine.tokenizer import Tokenizer


class TokenLine(NamedTuple):
    """What the model says of a token of the text, as the file of tokens has it."""
    token: int                  # id
    text: str                   # the characters that the token completes
    logprob: float | None       # nats; None for the first token, where nothing precedes it
    rank: int | None            # 1 for the likeliest token at that place

    def to_json(self) -> str:
        """The line of JSON."""
        return json.dumps(self._asdict(), ensure_ascii=False) + '\n'


@dataclass
class OwnText:
    """A text in the tokens of a model, ready to be scored.

    A window has one token more than the model reads, as the last one is only predicted. Each window
    scores the tokens that the one before has not scored, so each token is scored once.
    """
    tokenizer: Tokenizer
    tokens: np.ndarray          # (T,) ids
    n_before: int               # of the tokens, how many come before the text: 1 or 0
    windows: list[Option]
    task: Task                  # for `summarize`


def load_own_text(path: str, tokenizer: Tokenizer, block_size: int, stride: int) -> OwnText:
    """The OwnText of a UTF-8 file.

    stride: how many tokens lie between the beginnings of two windows, at most block_size.
    Raises UserError for a file that the model cannot read.
    """
    try:
        text = read_bytes(Path(path)).decode('utf-8')
    except UnicodeDecodeError as error:
        raise UserError(f'{path} is not UTF-8 at byte {error.start:,}; save it as UTF-8') from None

    encoder = Encoder(tokenizer, block_size)
    try:
        tokens = encoder.prefixed(encoder.encode(text))
    except Unreadable as error:
        raise UserError(f'{path}: {error}, so this text has no likelihood') from None
    if len(tokens) < 2:
        raise UserError(f'{path} has too few tokens to be scored')

    options = list(windows(tokens, block_size + 1, stride, fill_last=True))
    units = dict(
        token_perplexity=sum(option.n_scored for option in options),
        bits_per_byte=len(text.encode()),
    )
    protocol = f'{len(tokens):,} tokens in windows of {block_size:,}, {stride:,} apart'
    examples = [Example([option], i) for i, option in enumerate(options)]
    task = Task(Path(path).name, 'perplexity', examples, protocol=protocol, units=units)
    return OwnText(tokenizer, tokens, len(encoder.first), options, task)


class TextScorer:
    """Scores an OwnText. `lines` is iterated first, and gives `results` at its end."""

    def __init__(self, own_text: OwnText, model: torch.nn.Module, env: Environment,
                 batch_size: int):
        self.own_text = own_text
        self.model = model
        self.env = env
        self.batch_size = batch_size
        self.scores = []            # for each window, a list of one Score

    def lines(self) -> Iterator[TokenLine]:
        """Yield a TokenLine for each token of the text, in bounded memory. Every rank iterates."""
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        tokens = self.own_text.tokens

        def line(place, logprob, rank):
            token = int(tokens[place])
            data = self.own_text.tokenizer.decode_bytes([token])
            is_last = place == len(tokens) - 1
            return TokenLine(token, decoder.decode(data, final=is_last), logprob, rank)

        if not self.own_text.n_before:
            yield line(0, None, None)
        place = 1
        found = token_scores(self.model, self.own_text.windows, self.env, self.batch_size,
                             title=self.own_text.task.name)
        for logprobs, ranks in found:
            self.scores.append([sum_up(logprobs, ranks)])
            for logprob, rank in zip(logprobs.tolist(), ranks.tolist()):
                yield line(place, logprob, rank)
                place += 1

    def results(self) -> list[Result]:
        """The perplexity and the bits per byte of the text."""
        return summarize(self.own_text.task, self.scores)


def sum_up(logprobs, ranks):
    """The Score of a window."""
    greedy = ranks == 1
    return Score(math.fsum(logprobs), len(logprobs), bool(greedy.all()), bool(greedy[-1]))
