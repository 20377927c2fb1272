"""Writes shards for the prepare scripts: files of equal length, by one process or by several that
share the work.

Each part of the work encodes its documents into chunks as long as a shard, in the folder
unfinished/PART_of_PARTS/. Its journal there says which chunks are whole and where the next one
begins. The part that finishes last cuts all chunks, in their order, into the shards. A chunk that
is a shard, as all full ones of part 0 are, is renamed; the others are copied. So the shards do not
depend on the number of parts.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.atomic_files import atomic_write
from engine.dataloader.token_files import (
    DTYPES,
    TokenFile,
    TokenStream,
    find_token_files,
    token_dtype,
)
from engine.errors import UserError
from engine.log import log
from engine.prepare.documents import Position
from engine.prepare.encode import batch_pieces, in_order
from engine.prepare.publish import (
    complete_shards,
    hash_start,
    is_own_shard,
    read_json,
    ready_folder,
    replace_with_shards,
    write_json,
    write_lock,
)
from engine.tokenizer import DatasetMeta, TokenizerSpec

COPIED_TOKENS = 1 << 20         # tokens copied at once


class DocumentPiece(NamedTuple):
    """A text to encode, which may be a part of a document."""
    document: Position
    text: str
    begins_document: bool       # the end-of-text token goes before it


class DocumentStart(NamedTuple):
    index: int                  # of the document's first token
    document: Position


class EncodedBatch(NamedTuple):
    """The tokens of some pieces."""
    ids: np.ndarray
    starts: list[DocumentStart]     # of the documents that begin here, with indices in `ids`
    text_bytes: int                 # the size of the text in UTF-8


class Chunk(NamedTuple):
    """A file of tokens that a part of the work has written."""
    tokens: int
    sha256: str


class ChunkFile(NamedTuple):
    """A Chunk and where it lies."""
    path: Path
    tokens: int
    sha256: str


class Shard(NamedTuple):
    """The tokens that a shard has of the stream of all chunks."""
    begin: int
    tokens: int


@dataclass
class PartJournal:
    """What a part of the work has done: the content of its journal.json."""
    key: str                                # as in ShardWriter.key
    chunks: list[Chunk] = field(default_factory=list)       # those that are whole
    document: Position | None = None        # the document in which the next chunk begins
    skip: int = 0                           # how many tokens of it are in the chunks
    finished: bool = False                  # True when no document is left


def shard_name(number: int) -> str:
    """The file name of a shard. The first one is held out."""
    if number == 0:
        return 'val_000000.bin'
    return f'train_{number:06}.bin'


class TokenSource:
    """Gives the tokens of batches in portions, and tells which document a portion ends in."""

    def __init__(self, batches: Iterator[EncodedBatch]):
        self.batches = batches
        self.rest = np.empty(0)         # the tokens that were read and not taken
        self.read = 0                   # how many tokens were read
        self.taken = 0                  # how many tokens were taken
        self.starts = deque()           # the DocumentStarts that are not taken
        self.current = DocumentStart(0, None)       # of the document that was taken last

    def take(self, limit):
        """The next tokens, at most `limit`. None are left if it returns an empty array."""
        if limit and not len(self.rest):
            self.read_batch()

        ids = self.rest[:limit]
        self.rest = self.rest[limit:]
        self.taken += len(ids)

        while self.starts and self.starts[0].index <= self.taken:
            self.current = self.starts.popleft()
        return ids

    def read_batch(self):
        """Read the next batch that has tokens."""
        for batch in self.batches:
            for index, document in batch.starts:
                self.starts.append(DocumentStart(self.read + index, document))
            self.read += len(batch.ids)
            self.rest = batch.ids
            if len(batch.ids):
                return

    def skip(self, count):
        """Leave out `count` tokens."""
        while count:
            skipped = len(self.take(count))
            if not skipped:
                return
            count -= skipped

    def tokens_of_current(self):
        """How many tokens of the present document were taken."""
        return self.taken - self.current.index


class ShardWriter:
    """One part of the work on a sharded dataset.

    folder: the folder of the dataset.
    spec: the spec of the tokenizer.
    key: names the input. A part continues only work of the same key.
    shard_tokens: how many tokens a shard has; the last one may be shorter.
    part, parts: the number of this part, from 0 on, and how many there are; 0 of 1 does all.

    Raises UserError for a vocabulary without an end-of-text token.
    """

    def __init__(self, folder: Path, spec: TokenizerSpec, key: str, shard_tokens: int,
                 part: int, parts: int):
        self.folder = folder
        self.spec = spec
        self.shard_tokens = shard_tokens
        self.part = part
        self.parts = parts

        # where one changes, the work begins anew
        facts = [key, spec.to_dict(), shard_tokens]
        self.key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()
        self.dtype = DTYPES[token_dtype(spec.vocab_size)]
        self.end_of_text = spec.end_of_text
        self.unfinished = folder / 'unfinished'
        self.text_bytes = 0                             # of the text that this process encoded
        if self.end_of_text is None:
            raise UserError(f'{folder}: the vocabulary has no end-of-text token, and shards have '
                            f'one before each document; choose another tokenizer')

    # Files of the work

    def work(self, part):
        """The folder of a part's chunks and journal."""
        return self.unfinished / f'{part}_of_{self.parts}'

    def read_journal(self, part):
        """The journal of a part, if its last run had the same key.

        Otherwise that of a part that has not begun.
        """
        journal = read_json(self.work(part) / 'journal.json', self.check_journal)
        return journal or PartJournal(self.key)

    def check_journal(self, content):
        """The PartJournal that `content` is, if its key is ours and its numbers are possible.

        Raises ValueError, KeyError or TypeError otherwise.
        """
        journal = PartJournal(**content)
        journal.chunks = [Chunk(*chunk) for chunk in journal.chunks]
        if journal.document is not None:
            journal.document = Position(*journal.document)

        if journal.key != self.key or type(journal.finished) is not bool:
            raise ValueError('another key')

        numbers = [journal.skip, *(chunk.tokens for chunk in journal.chunks)]
        if journal.document is not None:
            numbers += journal.document
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError('a number is impossible')

        for chunk in journal.chunks:
            if chunk.tokens > self.shard_tokens or type(chunk.sha256) is not str:
                raise ValueError('a chunk is impossible')

        return journal

    def save(self, journal):
        write_json(self.work(self.part) / 'journal.json', asdict(journal))

    def list_chunks(self, part, journal):
        """The ChunkFiles of the chunks that the journal of a part has."""
        return [ChunkFile(self.work(part) / chunk_name(number), *chunk)
                for number, chunk in enumerate(journal.chunks)]

    # The work

    def write(self, read_pieces: Callable[[Position | None], Iterable[DocumentPiece]],
              encode: Callable, cores: int = 0) -> bool:
        """Encode what is left of this part, and publish the dataset if no other part is left.

        read_pieces: called with the document to begin at, or None for the part's first; yields
            DocumentPieces, or tuples of the same values.
        encode: turns a text into an array of ids. `<|endoftext|>` goes before each document.
        cores: how many threads encode; 0 takes one per core.

        Returns True if the dataset is published.
        """
        self.refuse_shards_of_others()
        self.work(self.part).mkdir(parents=True, exist_ok=True)
        with write_lock(self.work(self.part) / 'prepare.lock'):
            # perhaps nothing is left to do but the renames of a killed run
            with self.finish_lock():
                complete = complete_shards(self.folder, self.key)

            if complete:
                log.info(f'{self.folder} is complete; remove its meta.json to make it again')
            else:
                try:
                    self.write_part(read_pieces, encode, cores)
                except UserError:
                    self.remove_empty_work()
                    raise
                complete = self.publish(cores)

        if complete:
            shutil.rmtree(self.unfinished, ignore_errors=True)
        return complete

    def refuse_shards_of_others(self):
        for files in find_token_files(self.folder).values():
            for file in files:
                if file.name not in ('train.bin', 'val.bin') and not is_own_shard(file.name):
                    raise UserError(f'{self.folder} holds {file.name} of another dataset; move it '
                                    f'to a folder of its own')

    def finish_lock(self):
        """The lock that a part holds while it touches the work of all."""
        return write_lock(self.unfinished / 'finish.lock', wait=True)

    def write_part(self, read_pieces, encode, cores):
        """Encode the documents of this part to chunks, after those of an earlier run."""
        journal = self.read_journal(self.part)
        if journal.finished:
            return

        if journal.chunks:
            check_chunks(self.list_chunks(self.part, journal), self.dtype)
            log.info(f'{self.work(self.part)}: continuing after {len(journal.chunks):,} chunks')

        pieces = (DocumentPiece(*piece) for piece in read_pieces(journal.document))
        with closing(self.encode_pieces(pieces, encode, cores)) as batches:
            source = TokenSource(batches)
            source.skip(journal.skip)

            ids = source.take(self.shard_tokens)
            while len(ids):
                chunk = self.write_chunk(len(journal.chunks), ids, source)
                journal.chunks.append(chunk)
                journal.document = source.current.document
                journal.skip = source.tokens_of_current()
                self.save(journal)

                ids = source.take(self.shard_tokens)

        journal.finished = True
        self.save(journal)

    def remove_empty_work(self):
        """Remove what this part has begun, if it has no whole chunk to continue after."""
        if self.read_journal(self.part).chunks:
            return

        with self.finish_lock():
            shutil.rmtree(self.work(self.part), ignore_errors=True)
            if {path.name for path in self.unfinished.iterdir()} == {'finish.lock'}:
                shutil.rmtree(self.unfinished, ignore_errors=True)      # no other part works there

    def encode_pieces(self, pieces, encode, cores):
        """The EncodedBatches of `pieces`. Counts their text."""
        def encode_batch(batch):
            return self.encode_batch(batch, encode)

        with closing(in_order(encode_batch, batch_pieces(pieces), cores)) as batches:
            for batch in batches:
                self.text_bytes += batch.text_bytes
                yield batch

    def encode_batch(self, pieces, encode):
        """The EncodedBatch of a list of DocumentPieces."""
        arrays = []
        starts = []
        tokens = 0
        text_bytes = 0
        for piece in pieces:
            if piece.begins_document:
                starts.append(DocumentStart(tokens, piece.document))
                arrays.append([self.end_of_text])
                tokens += 1

            ids = encode(piece.text)
            arrays.append(ids)
            tokens += len(ids)
            text_bytes += utf8_length(piece.text)

        ids = np.concatenate(arrays, dtype=self.dtype, casting='unsafe')
        return EncodedBatch(ids, starts, text_bytes)

    def write_chunk(self, number, ids, source):
        """Write a chunk: `ids`, and then what fills it up from `source`. Returns the Chunk."""
        what = f'part {self.part}/{self.parts}, chunk {number}'
        if self.parts == 1:
            what = shard_name(number)
        bar = tqdm(desc=what, total=self.shard_tokens, unit=' tokens', unit_scale=True, delay=1,
                   mininterval=1, disable=None)

        count = 0
        digest = hashlib.sha256()
        with bar, atomic_write(self.work(self.part) / chunk_name(number), 'wb') as file:
            while len(ids):
                file.write(ids)
                digest.update(ids)
                count += len(ids)
                bar.update(len(ids))
                ids = source.take(self.shard_tokens - count)
        return Chunk(count, digest.hexdigest())

    def publish(self, cores):
        """Replace the dataset if all parts are finished. True if any of them has published it."""
        try:
            with self.finish_lock():
                return complete_shards(self.folder, self.key) or self.finish(cores)
        except FileNotFoundError:
            # Another part may just have published the dataset and removed the folder.
            if complete_shards(self.folder, self.key):
                return True
            raise

    def finish(self, cores):
        """Cut the chunks of all parts into shards and replace the dataset.

        False if a part is not finished.
        """
        journals = [self.read_journal(part) for part in range(self.parts)]
        waiting = [f'{part}/{self.parts}' for part, journal in enumerate(journals)
                   if not journal.finished]
        if waiting:
            log.info(f'part {self.part}/{self.parts} is done; the last of '
                     f'--part={", ".join(waiting)} publishes the dataset')
            return False

        # cut
        chunks = []
        for part, journal in enumerate(journals):
            chunks += self.list_chunks(part, journal)
        shards = self.plan_shards(chunks)
        ready = ready_folder(self.folder, self.key)
        digests = cut_shards(shards, chunks, ready, self.dtype, cores)

        # publish
        held_out = self.shard_tokens
        trained = sum(shard.tokens for shard in shards.values()) - held_out
        meta = DatasetMeta(self.spec, dtype=self.dtype.name,
                           tokens=dict(train=trained, val=held_out),
                           sha256=digests, source=self.key)
        replace_with_shards(self.folder, meta)

        log.info(f'{self.folder}: {len(shards) - 1:,} shards have {trained:,} tokens, '
                 f'val_000000.bin {held_out:,}; '
                 f'vocabulary {self.spec.vocab_size:,} ({self.spec.label})')
        return True

    def plan_shards(self, chunks):
        """{name: Shard} that the stream of `chunks` is cut into.

        Raises UserError if the held-out shard leaves nothing to train on.
        """
        total = sum(chunk.tokens for chunk in chunks)
        size = self.shard_tokens
        if total <= size:
            shutil.rmtree(self.unfinished)
            raise UserError(f'{total:,} tokens are not more than one shard, which is held out; try '
                            f'--shard_tokens={max(1, total // 10)}')
        return {shard_name(number): Shard(begin, min(size, total - begin))
                for number, begin in enumerate(range(0, total, size))}


# Chunks to shards

def cut_shards(shards, chunks, ready, dtype, cores):
    """Make the files of `shards`, {name: Shard}, from `chunks` in the folder `ready`.

    Returns {name: sha256}. Shards that a killed run made are not made again.
    """
    ready.mkdir(exist_ok=True)

    # the chunks that are a shard by themselves
    begins = np.cumsum([0, *(chunk.tokens for chunk in chunks)]).tolist()
    chunk_at = {Shard(begin, chunk.tokens): chunk for begin, chunk in zip(begins, chunks)}
    whole = {name: chunk_at[shard] for name, shard in shards.items() if shard in chunk_at}

    copied = {name: shard for name, shard in shards.items() if name not in whole}
    digests = copy_shards(copied, chunks, ready, dtype, cores)

    # only now, as shards were copied from some of these chunks too
    for name, chunk in whole.items():
        if not (ready / name).exists():
            check_chunks([chunk], dtype)
            os.replace(chunk.path, ready / name)
        digests[name] = chunk.sha256
    return {name: digests[name] for name in shards}


def copy_shards(shards, chunks, ready, dtype, cores):
    """Copy `shards` from `chunks` to the folder `ready`, but for those that are there.

    Returns {name: sha256}.
    """
    missing = {name for name in shards if not (ready / name).exists()}
    stream = None
    if missing:
        check_chunks(chunks, dtype)
        stream = open_chunks(chunks, ready.parent, dtype)

    def copy_shard(name):
        shard = shards[name]
        if name in missing:
            end = shard.begin + shard.tokens
            with atomic_write(ready / name, 'wb') as file:
                for start in range(shard.begin, end, COPIED_TOKENS):
                    file.write(stream[start:min(start + COPIED_TOKENS, end)])
        return hash_start(ready / name, shard.tokens * dtype.itemsize).hexdigest()

    with closing(in_order(copy_shard, shards, cores)) as results:
        bar = tqdm(results, 'cutting', len(shards), unit=' shards', delay=1, disable=None)
        return dict(zip(shards, bar))


def open_chunks(chunks, unfinished, dtype):
    """A TokenStream over chunks that lie below the folder `unfinished`."""
    files = [TokenFile(chunk.path.relative_to(unfinished).as_posix(),
                       chunk.tokens * dtype.itemsize) for chunk in chunks]
    return TokenStream(unfinished, files, dtype.name)


def check_chunks(chunks, dtype):
    """UserError if a chunk is missing or damaged. Its part then starts anew."""
    for path, tokens, sha256 in chunks:
        size = tokens * dtype.itemsize
        is_whole = (path.is_file() and path.stat().st_size == size
                    and hash_start(path, size, sha256))

        if not is_whole:
            (path.parent / 'journal.json').unlink(missing_ok=True)
            part = path.parent.name.replace('_of_', '/')
            raise UserError(f'{path} is missing or damaged; run --part={part} again, '
                            f'which starts from the beginning')


def chunk_name(number):
    return f'{number:06}.bin'


def utf8_length(text):
    """The size of a text in UTF-8, in bytes."""
    if text.isascii():
        return len(text)
    return len(text.encode('utf-8', 'surrogatepass'))
