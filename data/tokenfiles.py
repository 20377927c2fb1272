"""Tokens out: text encoded on every core, and train.bin, val.bin and meta.json written whole or
not at all, for the prepare scripts. It shows their progress and prints their counts.

train.bin and val.bin are token ids, little-endian uint16, documents joined; meta.json says the
tokenizer, the counts and a SHA-256 of each.
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
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from tqdm import tqdm

GPT2 = dict(vocab_size=50257, tokenizer='gpt2')
END_OF_TEXT = np.array([50256], '<u2')
PIECE = 1 << 18             # characters encoded at once: 20 ms of work for a core
MARK_SECONDS = 30           # work that a killed run loses at most, where it can be continued
# Where a text may be cut with GPT-2's tokens unchanged: its pattern matches whitespace as the first
# character of a match or as all of it, and looks ahead from whitespace only. So no match spans the
# place between a non-space and a space or newline, nor depends on what follows that place.
BOUNDARY = re.compile(r'\S[ \n]')


def code_points(text):
    return np.frombuffer(text.encode('utf-32-le'), '<u4')


def char_tokenizer(chars):
    """The tokenizer, as meta.json says it, whose tokens are the characters in `chars`."""
    if len(chars) > 1 << 16:
        raise ValueError(f'{len(chars):,} different characters are over the 65,536 ids of uint16; '
                         f'try --tokenizer=gpt2')
    return dict(vocab_size=len(chars), tokenizer='char', chars=''.join(sorted(chars)))


def encoder(tokenizer):
    """The function from text to a uint16 array of ids that `tokenizer` describes."""
    if tokenizer['tokenizer'] == 'char':
        table = np.zeros(0x110000, '<u2')
        table[code_points(tokenizer['chars'])] = np.arange(tokenizer['vocab_size'])
        return lambda text: table[code_points(text)]
    import tiktoken
    try:
        bpe = tiktoken.get_encoding('gpt2')
    except Exception as error:                          # its download raises what it likes
        raise RuntimeError(f"tiktoken could not fetch GPT-2's encoding ({type(error).__name__}); go "
                           f'online once, or set TIKTOKEN_CACHE_DIR to a folder that holds it') from None

    def encode(text):
        try:                                            # encode_ordinary, without a list of ints
            ids = bpe.encode_to_numpy(text, disallowed_special=())
        except (UnicodeEncodeError, AttributeError):    # half a surrogate pair, from JSON; tiktoken < 0.9
            ids = np.array(bpe.encode_ordinary(text))
        return ids.astype('<u2')
    return encode


def safe_pieces(texts):
    """(piece, whether it is the last) of the document that `texts` make up, cut at BOUNDARY only."""
    rest = ''
    for text in texts:
        rest, start = rest + text, 0
        while match := BOUNDARY.search(rest, start + PIECE):
            yield rest[start:match.start() + 1], False
            start = match.start() + 1
        rest = rest[start:]
    yield rest, True


def batches(pieces):
    batch, length = [], 0
    for piece in pieces:
        batch.append(piece)
        length += len(piece[1]) + 1
        if length >= PIECE:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def in_order(function, items, cores):
    """function(item) of each item, in their order, a few in flight on `cores` threads (0: one per
    core). Threads do, because tiktoken lets go of Python's lock while it encodes."""
    if cores < 0:
        raise ValueError(f'num_proc={cores} should be the number of cores to use, or 0 for all')
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


def sync(file):
    file.flush()
    os.fsync(file.fileno())


def put(path, content):
    """Write `content` as JSON to `path`, whole or not at all."""
    with open(f'{path}.part', 'w', encoding='utf-8') as file:
        json.dump(content, file)
        sync(file)
    os.replace(f'{path}.part', path)


class NewDataset:
    """The files of a dataset while they are written; see new_dataset()."""

    def __init__(self, folder, key):
        self.folder, self.key, self.documents, self.marked = folder, key, 0, time.monotonic()
        self.journal = folder / 'unfinished.json'
        self.parts = {split: folder / f'{split}.bin.part' for split in ('train', 'val')}
        self.files, self.digests, kept = {}, {}, {}
        with suppress(OSError, ValueError, KeyError, TypeError):    # none, or damaged: from the start
            journal = json.loads(self.journal.read_text(encoding='utf-8'))
            sizes = {split: path.stat().st_size for split, path in self.parts.items()}
            if key and journal['key'] == key and all(sizes[s] >= journal['bytes'][s] for s in sizes):
                kept, self.documents = journal['bytes'], journal['documents']
        if not kept:
            self.journal.unlink(missing_ok=True)        # before the files that it speaks of change
        for split, path in self.parts.items():
            self.files[split] = file = open(path, 'r+b' if kept else 'w+b')
            file.truncate(kept.get(split, 0))
            self.digests[split] = hashlib.sha256()
            with tqdm(desc=f'reading {path.name}', total=kept.get(split, 0), unit='B', unit_scale=True,
                      delay=1) as bar:
                while block := file.read(1 << 20):
                    self.digests[split].update(block)
                    bar.update(len(block))

    def write(self, pieces, encode, total, unit='characters', cores=0):
        """Append the tokens of `pieces`, an iterable of (split, text, whether <|endoftext|> follows).
        total: how many `unit`, 'characters' or 'documents', there are in all."""
        def tokens(batch):
            arrays = {split: [] for split in self.files}
            for split, text, ends in batch:
                arrays[split] += [encode(text), END_OF_TEXT] if ends else [encode(text)]
            return batch, {split: np.concatenate(ids) for split, ids in arrays.items() if ids}

        with (tqdm(desc='encoding', total=total, initial=self.documents, unit=f' {unit}',
                   unit_scale=True, delay=1, mininterval=1) as bar,
              closing(in_order(tokens, batches(pieces), cores)) as results):
            for batch, encoded in results:
                for split, ids in encoded.items():
                    self.files[split].write(ids)
                    self.digests[split].update(ids)
                ended = sum(ends for _, _, ends in batch)
                self.documents += ended
                bar.update(ended if unit == 'documents' else sum(len(text) for _, text, _ in batch))
                if self.key and batch[-1][2] and time.monotonic() >= self.marked + MARK_SECONDS:
                    self.mark()

    def mark(self):
        """Note in the journal that all documents so far are on disk, for a later run to go on from."""
        for file in self.files.values():
            sync(file)
        put(self.journal, dict(key=self.key, documents=self.documents,
                               bytes={split: file.tell() for split, file in self.files.items()}))
        self.marked = time.monotonic()

    def finish(self, tokenizer):
        counts = {split: file.tell() // 2 for split, file in self.files.items()}
        for split, file in self.files.items():
            if not counts[split]:
                raise ValueError(f'{split}.bin would be empty; --input= takes a longer text')
            sync(file)
            file.close()
        digests = {f'{split}.bin': digest.hexdigest() for split, digest in self.digests.items()}
        # train.bin leaves first and arrives last: whoever finds one finds the val.bin and meta.json
        # of the same run beside it, even if the power fails between two of these lines.
        (self.folder / 'train.bin').unlink(missing_ok=True)
        put(self.folder / 'meta.json', dict(tokenizer, dtype='uint16', tokens=counts, sha256=digests))
        for split in ('val', 'train'):
            os.replace(self.parts[split], self.folder / f'{split}.bin')
        self.journal.unlink(missing_ok=True)
        if os.name == 'posix':
            handle = os.open(self.folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        print(f'{self.folder}: train.bin has {counts["train"]:,} tokens, val.bin {counts["val"]:,}; '
              f'vocabulary {tokenizer["vocab_size"]:,} ({tokenizer["tokenizer"]})')

    def abandon(self, error):
        """Remove what is unfinished; or leave what is marked, if the same command can go on with it."""
        for file in self.files.values():
            with suppress(OSError):                     # closing writes what is left, to a full disk
                file.close()
        if self.journal.exists() and not isinstance(error, ValueError):
            print(f'{self.journal}: the work so far is kept; the same command goes on')
            return
        for path in (*self.parts.values(), *self.folder.glob('*.json.part'), self.journal):
            path.unlink(missing_ok=True)


@contextmanager
def new_dataset(folder, tokenizer, key=''):
    """A NewDataset to write to. Its files take their places when the block ends well; before that,
    and after a failure or a signal, an earlier dataset is whole.

    key: '' leaves nothing behind on a failure. Otherwise the work is marked every MARK_SECONDS, and
    a later run with the same key finds in `.documents` how many documents need no more writing.
    """
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    lock = FileLock(folder / 'prepare.lock')
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f'another run is writing {folder}; wait for it, or stop it') from None
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    dataset = None
    try:
        dataset = NewDataset(folder, key)
        yield dataset
        dataset.finish(tokenizer)
    except BaseException as error:
        if dataset:
            dataset.abandon(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RuntimeError(f'{folder} cannot hold the dataset ({error.strerror}); it takes 2 bytes a '
                               f'token, beside an earlier one: free some space and run again') from None
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
        lock.release()
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
            if created:
                folder.rmdir()                          # succeeds only where a failure left it empty
