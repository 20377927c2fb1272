"""Turns text into tokens on every core, and cuts it where the tokens stay the same."""

import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np

from engine.errors import UserError
from engine.log import log
from engine.tokenizer import Tokenizer

PIECE = 1 << 18             # characters encoded at once: about 20 ms of work for a core

# GPT-2's pattern matches whitespace only as the first character of a match or as all of it, and
# looks ahead only from whitespace. So no match crosses the place between a non-space and a space or
# newline, and none depends on what follows. A text that is cut there has the same tokens.
CUT = re.compile(r'\S[ \n]')

MAX_DROPPED = 0.001         # share of a text's characters that a tokenizer may leave out
ENOUGH = 100_000            # characters of a text that is long enough to judge the share early


class TextPiece(NamedTuple):
    """A part of a document that is encoded by itself."""
    text: str
    is_last: bool           # of its document


def safe_pieces(texts: Iterable[str]) -> Iterator[TextPiece]:
    """The document that `texts` make up, in pieces of at least PIECE characters.

    It is cut only where GPT-2's tokens stay the same.
    """
    rest = ''
    for text in texts:
        searched = max(0, len(rest) - 1)        # no cut lies before it
        rest += text
        start = 0

        while match := CUT.search(rest, max(start + PIECE, searched)):
            end = match.start() + 1
            yield TextPiece(rest[start:end], False)
            start = end

        # what is left is too short, or has no place to cut so far
        rest = rest[start:]
    yield TextPiece(rest, True)


def document_pieces(texts: Iterable[str], tokenizer) -> Iterable[TextPiece]:
    """The document that `texts` make up, in pieces that the Tokenizer `tokenizer` may encode one by
    one: safe pieces, or the whole where it might encode those differently."""
    if tokenizer.splits_like_gpt2:
        return safe_pieces(texts)
    return [TextPiece(''.join(texts), True)]


class CountingEncoder:
    """Encodes texts, and counts the characters for which the tokenizer has no token, and the
    special tokens that the texts spell.

    A tokenizer whose `drops_characters` is True leaves these out without a word. White space does
    not count, as many tokenizers only part words at it. Threads may share an encoder.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.has_no_token = {}          # {character: True or False} of the characters so far
        self.characters = 0             # how many were encoded
        self.dropped = Counter()        # how often each one that has no token was there
        self.spelled = Counter()        # how often each special token was there
        self.special = None             # the pattern of any of them
        if tokenizer.special_tokens:
            longest_first = sorted(tokenizer.special_tokens, key=len, reverse=True)
            self.special = re.compile('|'.join(map(re.escape, longest_first)))
        self.lock = Lock()

    def encode(self, text: str, as_document: bool = False) -> np.ndarray:
        """What the tokenizer's encode_to_numpy returns.

        Raises UserError as soon as too many characters have no token, even for ENOUGH characters.
        """
        if self.tokenizer.drops_characters:
            self.count(text)
            self.check_share(max(self.characters, ENOUGH))
        if self.special:
            self.count_special(text)
        return self.tokenizer.encode_to_numpy(text, as_document)

    def count(self, text):
        found = Counter({character: text.count(character) for character in set(text)
                         if self.is_dropped(character)})
        with self.lock:
            self.characters += len(text)
            self.dropped += found

    def count_special(self, text):
        found = Counter(self.special.findall(text))
        if found:
            with self.lock:
                self.spelled += found

    def is_dropped(self, character):
        if character not in self.has_no_token:
            ids = self.tokenizer.encode_to_numpy(character)
            self.has_no_token[character] = not len(ids) and not character.isspace()
        return self.has_no_token[character]

    def check_share(self, characters: int) -> None:
        """UserError where the dropped characters are too many for a text of `characters`."""
        if self.dropped.total() > MAX_DROPPED * characters:
            raise UserError(f'the tokenizer has no token for {self.describe_dropped()}; '
                            f'name another --tokenizer=, such as --tokenizer=gpt2')

    def log_dropped(self) -> None:
        """Say what was left out so far, if anything was, and which special tokens there were."""
        if self.dropped:
            log.info(f'note: the tokenizer has no token for {self.describe_dropped()}; '
                     f'these are left out')
        if self.spelled:
            meaning = 'each is ordinary text (special_tokens=False)'
            if self.tokenizer.special_in_data:
                meaning = 'each becomes that token (special_tokens=True)'
            counts = ', '.join(f'{token} {count:,} times'
                               for token, count in self.spelled.most_common(5))
            log.info(f'the text spells special tokens: {counts}; {meaning}')

    def finish(self) -> None:
        """Say what was left out of the whole text. Raises UserError where it is too much."""
        self.check_share(self.characters)
        self.log_dropped()

    def describe_dropped(self):
        dropped = self.dropped.total()
        (commonest, _), = self.dropped.most_common(1)
        return (f'{dropped:,} of {self.characters:,} characters '
                f'({dropped / self.characters:.2%}), such as {commonest!r}')


def in_order(function: Callable, items: Iterable, cores: int) -> Iterator:
    """function(item) of each item, in their order, computed by `cores` threads (0: one per core).

    Only a few items are in flight. Threads are enough, since tiktoken releases Python's lock.
    """
    if cores < 0:
        raise UserError(f'num_proc={cores} should be the number of cores to use, or 0 for all')
    if not cores:
        cores = usable_cores()

    # `pending` holds the results that are under way, in their order
    pending = deque()
    with ThreadPoolExecutor(cores) as pool:
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > 2 * cores:
                    yield pending.popleft().result()

            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def usable_cores():
    """The number of cores that this process may use."""
    if hasattr(os, 'sched_getaffinity'):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()                               # macOS, Windows


def batch_pieces(pieces: Iterable) -> Iterator[list]:
    """Lists of pieces with about PIECE characters together, so that short texts share one task.

    pieces: named tuples with a field `text`.
    """
    batch = []
    length = 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece.text) + 1       # empty texts count too

        if length >= PIECE:
            yield batch
            batch = []
            length = 0

    if batch:
        yield batch
