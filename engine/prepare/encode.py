"""Turns text into tokens on every core, and cuts it where the tokens stay the same."""

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from engine.errors import UserError

PIECE = 1 << 18             # characters encoded at once: about 20 ms of work for a core

# GPT-2's pattern matches whitespace only as the first character of a match or as all of it, and
# looks ahead only from whitespace. So no match crosses the place between a non-space and a space or
# newline, and none depends on what follows. A text that is cut there has the same tokens.
CUT = re.compile(r'\S[ \n]')


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
        rest += text
        start = 0

        while match := CUT.search(rest, start + PIECE):
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
