"""Text to tokens on every core, cut where the tokens stay the same."""

import os
import re
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from engine.errors import UserError

PIECE = 1 << 18             # characters encoded at once: about 20 ms of work for a core
# GPT-2's pattern matches whitespace only as the first character of a match or as all of it, and looks
# ahead only from whitespace. So no match crosses the place between a non-space and a space or newline,
# and none depends on what follows. A text that is cut there has the same tokens.
CUT = re.compile(r'\S[ \n]')


def safe_pieces(texts):
    """(piece, is_last) of the document that `texts` make up, cut only where GPT-2's tokens stay the same."""
    rest = ''
    for text in texts:
        rest, start = rest + text, 0
        while match := CUT.search(rest, start + PIECE):
            yield rest[start:match.start() + 1], False
            start = match.start() + 1
        rest = rest[start:]
    yield rest, True


def document_pieces(texts, tokenizer):
    """(piece, is_last) of the document that `texts` make up: safe pieces, or all of it where another tokenizer than
    GPT-2's might encode the pieces differently."""
    return safe_pieces(texts) if tokenizer.splits_like_gpt2 else [(''.join(texts), True)]


def in_order(function, items, cores):
    """function(item) of each item, in their order, computed by `cores` threads (0: one per core).

    Only a few items are in flight. Threads are enough, since tiktoken releases Python's lock.
    """
    if cores < 0:
        raise UserError(f'num_proc={cores} should be the number of cores to use, or 0 for all')
    if not cores:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
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


def batch_pieces(pieces):
    """Lists of (split, text, ends_document) of about PIECE characters, so that short texts share one task."""
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[1]) + 1
        if length >= PIECE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
