"""Writing token files for the prepare scripts: text is encoded on every core, and the finished
files replace an earlier dataset together.

train.bin and val.bin hold token ids, little-endian uint16, or uint32 for more than 65,536 ids, documents
joined. meta.json holds the tokenizer, the token counts and a SHA-256 of both files. meta.pkl is nanoGPT's
form of a character vocabulary. engine.shardwriter writes shards.
"""

import errno
import hashlib
import json
import os
import re
import signal
import sys
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.errors import RunError, UserError
from engine.files import atomic_write, sync
from engine.journal import (JOURNAL, SPLITS, complete_replacement, describe_dataset, hash_start, read_journal,
                            remove_unfinished, replace_dataset, write_meta_parts)
from engine.shards import DTYPES, token_dtype
from engine.tokenizer import end_of_text

PIECE = 1 << 18             # characters encoded at once: about 20 ms of work for a core
SAVE_SECONDS = 30           # a killed run that can be continued loses at most this much work
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


class DatasetWriter:
    """The files of a dataset while they are written; see dataset_writer()."""

    def __init__(self, folder, spec, key, print_line):
        self.folder, self.key, self.print_line = folder, key, print_line
        self.dtype, self.end_of_text = DTYPES[token_dtype(spec['vocab_size'])], end_of_text(spec)
        self.documents, self.saved_at = 0, time.monotonic()     # documents that are written
        self.files, self.digests = {}, {}                       # one of each per split
        completed = complete_replacement(folder)
        if completed:
            print_line(f'{folder}: the last run stopped while it replaced the dataset; the replacement is now complete')
        # The journal of the finished dataset, if the last run had the same key: nothing is left to write.
        self.finished = completed if completed and key and completed['key'] == key else None
        if self.finished:
            self.documents = completed['documents']
        else:
            self.open_parts()

    def open_parts(self):
        """Open the .part files: after the saved progress of a run with the same key, or empty."""
        journal = read_journal(self.folder)
        paths = {split: self.folder / f'{split}.bin.part' for split in SPLITS}
        if journal and self.key and journal['key'] == self.key:
            self.digests = {split: hash_start(path, journal['bytes'][split], journal['sha256'][split])
                            for split, path in paths.items()}
            if all(self.digests.values()):
                self.documents = journal['documents']
                for split, path in paths.items():
                    self.files[split] = file = open(path, 'r+b')
                    file.seek(journal['bytes'][split])
                    file.truncate()
                return
            self.print_line(f'{self.folder}: the saved progress is damaged; starting from the beginning')
        remove_unfinished(self.folder)
        for split, path in paths.items():
            self.files[split], self.digests[split] = open(path, 'xb'), hashlib.sha256()

    def write(self, pieces, encode, total, unit='characters', cores=0):
        """Append the tokens of `pieces`, an iterable of (split, text, ends_document). `<|endoftext|>`
        follows a text that ends a document.

        encode: text to an array of ids. total: how many `unit` there are, 'characters' or 'documents'.
        """
        def encode_batch(batch):
            arrays = {split: [] for split in SPLITS}
            for split, text, ends in batch:
                if ends and self.end_of_text is None:
                    raise UserError(f'{self.folder}: the vocabulary has no end-of-text token; leave ends_document False')
                arrays[split] += [encode(text), [self.end_of_text]] if ends else [encode(text)]
            return batch, {split: np.concatenate(ids, dtype=self.dtype, casting='unsafe')
                           for split, ids in arrays.items() if ids}

        with (tqdm(desc='encoding', total=total, initial=self.documents, unit=f' {unit}',
                   unit_scale=True, delay=1, mininterval=1, disable=None) as bar,
              closing(in_order(encode_batch, batch_pieces(pieces), cores)) as results):
            for batch, encoded in results:
                for split, ids in encoded.items():
                    self.files[split].write(ids)
                    self.digests[split].update(ids)
                ended = sum(ends for _, _, ends in batch)
                self.documents += ended
                bar.update(ended if unit == 'documents' else sum(len(text) for _, text, _ in batch))
                if self.key and batch[-1][2] and time.monotonic() >= self.saved_at + SAVE_SECONDS:
                    self.save_progress()

    def progress(self):
        """The journal: how much is written."""
        return dict(key=self.key, documents=self.documents,
                    bytes={split: file.tell() for split, file in self.files.items()},
                    sha256={split: digest.hexdigest() for split, digest in self.digests.items()})

    def save_progress(self, **more):
        """Sync the .part files and write the journal, for a later run to continue."""
        for file in self.files.values():
            sync(file)
        with atomic_write(self.folder / JOURNAL) as file:
            json.dump(dict(self.progress(), **more), file)
        self.saved_at = time.monotonic()

    def finish(self, spec):
        """Replace the earlier dataset. spec: the tokenizer."""
        journal = self.finished or dict(self.progress(), tokenizer=spec)
        meta = describe_dataset(journal)
        if not self.finished:
            for split in SPLITS:
                if not meta['tokens'][split]:
                    raise UserError(f'{split}.bin would be empty; --input= takes a longer text')
            write_meta_parts(self.folder, meta)
            # With the tokenizer in the journal, the new dataset is whole: if this run is killed from
            # here on, the next one completes the replacement.
            self.save_progress(tokenizer=spec)
            for file in self.files.values():
                file.close()
            replace_dataset(self.folder)
        self.print_line(f'{self.folder}: train.bin has {meta["tokens"]["train"]:,} tokens, val.bin '
                 f'{meta["tokens"]["val"]:,}; vocabulary {meta["vocab_size"]:,} ({meta["tokenizer"]})')

    def clean_up(self, error):
        """Close and remove the .part files, or leave them if the same command can continue."""
        for file in self.files.values():
            with suppress(OSError):                     # closing flushes, and the disk may be full
                file.close()
        if (self.folder / JOURNAL).exists() and not isinstance(error, UserError):
            self.print_line(f'{self.folder / JOURNAL}: the work so far is kept; the same command continues it')
        else:
            remove_unfinished(self.folder)


@contextmanager
def dataset_writer(folder, spec, print_line, key=''):
    """Yield a DatasetWriter. When the block ends without an exception, its files replace the dataset in `folder`.

    Until then, and after a failure or a signal, an earlier dataset stays whole. A run that was killed
    between two renames is completed here first.

    spec: the tokenizer. print_line: called with lines to print. key: '' removes all work after a failure.
    Otherwise progress is saved every SAVE_SECONDS, and `documents` of a later writer with the same key
    is the number of documents to skip.
    """
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with write_lock(folder / 'prepare.lock'):
            writer = DatasetWriter(folder, spec, key, print_line)
            try:
                yield writer
                writer.finish(spec)
            except BaseException as error:
                writer.clean_up(error)
                raise
    finally:
        if created:
            with suppress(OSError):
                folder.rmdir()                          # succeeds only if a failure left it empty


@contextmanager
def write_lock(path, wait=False):
    """Hold the lock file `path` while the block writes to its folder. SIGTERM ends the block with SystemExit.

    Raises UserError where another process holds the lock, unless `wait`, and RunError for a full disk.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f'another run is writing {path.parent}; wait for it, or stop it') from None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(f'{path.parent} cannot hold the dataset ({error.strerror}). It takes 2 bytes per token, or 4 for '
                       f'more than 65,536 ids, and an earlier one stays until it is whole; free some space and run '
                       f'again') from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if not wait:                                    # those who wait hold the file open, and need it to stay
            with suppress(OSError):
                path.unlink()                           # while it is held; on Windows filelock removes it
        lock.release()
