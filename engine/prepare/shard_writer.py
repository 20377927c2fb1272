"""Writing shards for the prepare scripts: files of equal length, by one process or by several that share the work.

Each part of the work encodes its documents into chunks as long as a shard, in unfinished/PART_of_PARTS/. Its
journal there says which chunks are whole and where the next one begins. The part that finishes last cuts
all chunks, in their order, into the shards. A chunk that is a shard, as all full ones of part 0 are, is renamed;
the others are copied. So the shards do not depend on the number of parts.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from contextlib import closing, suppress
from itertools import chain

import numpy as np
from tqdm import tqdm

from engine.atomic_files import atomic_write
from engine.dataloader.token_files import (
    DTYPES,
    SHARD,
    TokenFile,
    TokenStream,
    find_token_files,
    token_dtype,
)
from engine.errors import UserError
from engine.prepare.encode import batch_pieces, in_order
from engine.prepare.publish import (
    complete_shards,
    hash_start,
    ready_folder,
    replace_with_shards,
    write_lock,
)
from engine.tokenizer import end_of_text

COPIED_TOKENS = 1 << 20         # tokens copied at once


def shard_name(number):
    """The first shard is held out."""
    return f'train_{number:06}.bin' if number else 'val_000000.bin'


class TokenSource:
    """The tokens of documents, taken in portions, and the document that each position belongs to.

    encoded: an iterator of (ids, [(index in ids, document)]), with each document at its first token.
    """

    def __init__(self, encoded):
        self.encoded, self.rest, self.taken, self.read = encoded, np.empty(0), 0, 0
        self.starts, self.current = deque(), (0, None)      # (position, document): the next ones, and the present one

    def take(self, limit):
        """The next tokens, at most `limit`. None are left where it returns none."""
        while limit and not len(self.rest):
            self.rest, starts = next(self.encoded, (None, None))
            if starts is None:
                self.rest = np.empty(0)
                break
            self.starts.extend((self.read + index, document) for index, document in starts)
            self.read += len(self.rest)
        ids, self.rest = self.rest[:limit], self.rest[limit:]
        self.taken += len(ids)
        while self.starts and self.starts[0][0] <= self.taken:
            self.current = self.starts.popleft()
        return ids

    def place(self):
        """Where another source would go on: the present document, and how many of its tokens are taken."""
        position, document = self.current
        return dict(document=document, skip=self.taken - position)

    def skip(self, count):
        while count and (ids := len(self.take(count))):
            count -= ids


class ShardWriter:
    """One part of the work on a sharded dataset.

    folder: of the dataset. spec: its tokenizer. key: changes with the input; a part continues only work of
    the same key. part, parts: 0 of 1 does all. print_line: called with lines to print.
    """

    def __init__(self, folder, spec, key, shard_tokens, part, parts, print_line):
        self.folder, self.spec, self.shard_tokens = folder, spec, shard_tokens
        self.key = hashlib.sha256(json.dumps([key, spec, shard_tokens]).encode()).hexdigest()
        self.part, self.parts, self.print_line, self.text_bytes = part, parts, print_line, 0
        self.dtype, self.end_of_text = DTYPES[token_dtype(spec['vocab_size'])], end_of_text(spec)
        if self.end_of_text is None:
            raise UserError(f'{folder}: the vocabulary has no end-of-text token, and shards have one before each document; '
                            f'choose another tokenizer')
        self.unfinished = folder / 'unfinished'

    def work(self, part):
        """The folder of a part's chunks and journal."""
        return self.unfinished / f'{part}_of_{self.parts}'

    def read_journal(self, part):
        """The journal of a part, if its last run had the same key; else that of a part that has not begun."""
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            journal = json.loads((self.work(part) / 'journal.json').read_text(encoding='utf-8'))
            file, position = journal['document'] or (0, 0)
            numbers = [file, position, journal['skip'], *(tokens for tokens, _ in journal['chunks'])]
            numbers_are_possible = all(type(n) is int and n >= 0 for n in numbers)
            if (journal['key'] == self.key and type(journal['finished']) is bool and numbers_are_possible
                    and all(tokens <= self.shard_tokens and type(sha256) is str for tokens, sha256 in journal['chunks'])):
                return journal
        return dict(key=self.key, chunks=[], document=None, skip=0, finished=False)

    def write(self, read_pieces, encode, cores=0):
        """Encode what is left of this part, and publish the dataset if no other part is left. True if it is published.

        read_pieces: called with the document to begin at, or None for the part's first; yields (document, text,
        begins_document). A document is a pair of numbers. `<|endoftext|>` goes before each document. encode: text
        to an array of ids.
        """
        for file in chain(*find_token_files(self.folder).values()):
            if SHARD.fullmatch(file.name) and SHARD.fullmatch(file.name)[1]:        # with a prefix, so not of this writer
                raise UserError(f'{self.folder} holds {file.name} of another dataset; move it to a folder of its own')
        self.work(self.part).mkdir(parents=True, exist_ok=True)
        with write_lock(self.work(self.part) / 'prepare.lock'):
            with write_lock(self.unfinished / 'finish.lock', wait=True):
                complete = complete_shards(self.folder, self.key)
            if complete:
                self.print_line(f'{self.folder} is complete; remove its meta.json to make it again')
            else:
                self.write_part(read_pieces, encode, cores)
                try:
                    with write_lock(self.unfinished / 'finish.lock', wait=True):
                        complete = complete_shards(self.folder, self.key) or self.finish(cores)
                except FileNotFoundError:               # another part has just published the dataset and removed the folder
                    complete = complete_shards(self.folder, self.key)
                    if not complete:
                        raise
        if complete:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        return complete

    def write_part(self, read_pieces, encode, cores):
        """Encode the documents of this part to chunks, after those of an earlier run."""
        work, journal = self.work(self.part), self.read_journal(self.part)
        if journal['finished']:
            return
        if journal['chunks']:
            self.check_chunks(self.list_chunks(self.part, journal))
            self.print_line(f'{work}: continuing after {len(journal["chunks"]):,} chunks')

        def encode_batch(batch):
            arrays, starts, position, size = [], [], 0, 0
            for document, text, begins in batch:
                ids = encode(text)
                if begins:
                    starts.append((position, document))
                    arrays.append([self.end_of_text])
                arrays.append(ids)
                position += begins + len(ids)
                size += len(text) if text.isascii() else len(text.encode('utf-8', 'surrogatepass'))
            return np.concatenate(arrays, dtype=self.dtype, casting='unsafe'), starts, size

        def read_encoded(results):
            for ids, starts, size in results:
                self.text_bytes += size
                yield ids, starts

        batches = batch_pieces(read_pieces(journal['document'] and tuple(journal['document'])))
        with closing(in_order(encode_batch, batches, cores)) as results:
            source = TokenSource(read_encoded(results))
            source.skip(journal['skip'])
            ids = source.take(self.shard_tokens)
            while len(ids):
                number, count, digest = len(journal['chunks']), 0, hashlib.sha256()
                what = shard_name(number) if self.parts == 1 else f'part {self.part}/{self.parts}, chunk {number}'
                with (tqdm(desc=what, total=self.shard_tokens, unit=' tokens', unit_scale=True, delay=1, mininterval=1,
                           disable=None) as bar, atomic_write(work / chunk_name(number), 'wb') as file):
                    while len(ids):
                        file.write(ids)
                        digest.update(ids)
                        count += len(ids)
                        bar.update(len(ids))
                        ids = source.take(self.shard_tokens - count)
                self.save(journal, chunks=[*journal['chunks'], (count, digest.hexdigest())], **source.place())
                ids = source.take(self.shard_tokens)
        self.save(journal, finished=True)

    def save(self, journal, **changes):
        journal.update(changes)
        with atomic_write(self.work(self.part) / 'journal.json') as file:
            json.dump(journal, file)

    def finish(self, cores):
        """Cut the chunks of all parts into shards and replace the dataset. False where a part is not finished."""
        journals = [self.read_journal(part) for part in range(self.parts)]
        waiting = [f'{part}/{self.parts}' for part, journal in enumerate(journals) if not journal['finished']]
        if waiting:
            self.print_line(f'part {self.part}/{self.parts} is done; the last of --part={", ".join(waiting)} publishes the dataset')
            return False
        chunks = [chunk for part, journal in enumerate(journals) for chunk in self.list_chunks(part, journal)]
        total, size = sum(tokens for _, tokens, _ in chunks), self.shard_tokens
        if total <= size:
            shutil.rmtree(self.unfinished)
            raise UserError(f'{total:,} tokens are not more than one shard, which is held out; try '
                            f'--shard_tokens={max(1, total // 10)}')
        begins = range(0, total, size)
        shards = {shard_name(number): (begin, min(size, total - begin)) for number, begin in enumerate(begins)}
        meta = dict(self.spec, dtype=self.dtype.name, tokens=dict(train=total - size, val=size),
                    sha256=self.cut(shards, chunks, cores), source=self.key)
        replace_with_shards(self.folder, meta)
        self.print_line(f'{self.folder}: {len(shards) - 1:,} shards have {total - size:,} tokens, val_000000.bin {size:,}; '
                 f'vocabulary {meta["vocab_size"]:,} ({meta["tokenizer"]})')
        return True

    def cut(self, shards, chunks, cores):
        """Make the file of each of `shards`, {name: (begin, tokens)} in the stream of `chunks`. Returns {name: sha256}."""
        begins = np.cumsum([0, *(tokens for _, tokens, _ in chunks)]).tolist()
        same = {(begin, chunk[1]): chunk for begin, chunk in zip(begins, chunks)}      # chunks that may be shards
        ready = ready_folder(self.folder, self.key)
        ready.mkdir(exist_ok=True)
        copied = {name: shard for name, shard in shards.items() if shard not in same}
        digests = self.copy(copied, chunks, ready, cores)
        for name, shard in shards.items():          # only now: shards were copied from some of these chunks too
            if shard in same and not (ready / name).exists():
                self.check_chunks([same[shard]])
                os.replace(same[shard][0], ready / name)
        return {name: same[shard][2] if shard in same else digests[name] for name, shard in shards.items()}

    def copy(self, shards, chunks, ready, cores):
        """Copy `shards` to the folder `ready`, except those that a killed run copied. Returns {name: sha256}."""
        missing = {name for name in shards if not (ready / name).exists()}
        if missing:
            self.check_chunks(chunks)
            files = [TokenFile(path.relative_to(self.unfinished).as_posix(), tokens * self.dtype.itemsize)
                     for path, tokens, _ in chunks]
            stream = TokenStream(self.unfinished, files, self.dtype.name)

        def copy_shard(name):
            begin, tokens = shards[name]
            if name in missing:
                with atomic_write(ready / name, 'wb') as file:
                    for start in range(begin, begin + tokens, COPIED_TOKENS):
                        file.write(stream[start:min(start + COPIED_TOKENS, begin + tokens)])
            return hash_start(ready / name, tokens * self.dtype.itemsize).hexdigest()

        with closing(in_order(copy_shard, shards, cores)) as results:
            return dict(zip(shards, tqdm(results, 'cutting', len(shards), unit=' shards', delay=1, disable=None)))

    def list_chunks(self, part, journal):
        """[(path, tokens, sha256)] of the chunks that a journal has."""
        return [(self.work(part) / chunk_name(number), *chunk) for number, chunk in enumerate(journal['chunks'])]

    def check_chunks(self, chunks):
        """UserError where a chunk is missing or damaged. Its part then starts anew."""
        for path, tokens, digest in chunks:
            size = tokens * self.dtype.itemsize
            if not path.is_file() or path.stat().st_size != size or not hash_start(path, size, digest):
                (path.parent / 'journal.json').unlink(missing_ok=True)
                raise UserError(f'{path} is missing or damaged; run --part={path.parent.name.replace("_of_", "/")} again, '
                                f'which starts from the beginning')


def chunk_name(number):
    return f'{number:06}.bin'
