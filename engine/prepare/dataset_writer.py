"""Writes the token files of a dataset: text is encoded on every core, and the finished files
replace an earlier dataset together.

train.bin and val.bin hold token ids, little-endian uint16, or uint32 for more than 65,536 ids,
documents joined. train.mask and val.mask, which few datasets have, hold one byte for each token: 1
where it counts in the loss, else 0. meta.json holds the tokenizer, the token counts and a SHA-256
of each file.
meta.pkl is nanoGPT's form of a character vocabulary. engine.prepare.shard_writer writes shards.

The files have names that end in .part until all are written. unfinished.json is the journal: how
much of them is on disk. engine.prepare.publish says how they replace an earlier dataset.
"""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from engine.atomic_files import sync
from engine.dataloader.token_files import DTYPES, SPLITS, token_dtype
from engine.errors import UserError
from engine.log import log
from engine.prepare.encode import batch_pieces, in_order
from engine.prepare.publish import (
    JOURNAL,
    Replacement,
    hash_start,
    read_json,
    write_json,
    write_lock,
)
from engine.tokenizer import DatasetMeta, TokenizerSpec

SAVE_SECONDS = 30           # a killed run that can be continued loses at most this much work


class Piece(NamedTuple):
    """A text to encode, which may be a part of a document."""
    split: str              # 'train' or 'val'
    text: str
    ends_document: bool     # the end-of-text token follows it
    counts: bool = True     # its tokens count in the loss, and so does its end-of-text token


class EncodedBatch(NamedTuple):
    """Some pieces and their tokens."""
    pieces: list[Piece]
    content: dict[str, np.ndarray]      # what each file that grows gets: ids, or 0s and 1s


@dataclass
class Journal:
    """The content of unfinished.json: how much of train.bin.part and the others is written."""
    key: str                        # as in dataset_writer()
    documents: int                  # how many documents are written
    bytes: dict[str, int]           # the size of each file, by its name
    sha256: dict[str, str]          # the digest of those bytes

    # What meta.json says of the tokenizer and the records. Its presence says that both files are
    # whole.
    tokenizer: dict | None = None

    def describe_dataset(self) -> DatasetMeta:
        """The content of meta.json, once both files are whole.

        Raises UserError where `tokenizer` describes none.
        """
        meta = DatasetMeta.from_dict(self.tokenizer)
        meta.dtype = token_dtype(meta.spec.vocab_size)
        itemsize = DTYPES[meta.dtype].itemsize
        meta.tokens = {split: self.bytes[f'{split}.bin'] // itemsize for split in SPLITS}
        meta.sha256 = dict(self.sha256)
        return meta


def check_journal(content):
    """The Journal that `content` is, if its numbers are possible.

    Raises ValueError, KeyError or TypeError otherwise.
    """
    journal = Journal(**content)

    names = list(journal.bytes)
    if names not in (file_names(False), file_names(True)) or names != list(journal.sha256):
        raise ValueError('the files are others')

    numbers = [journal.documents, *journal.bytes.values()]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError('a number is impossible')

    if any(journal.bytes[f'{split}.bin'] % 2 for split in SPLITS):
        raise ValueError('half a token is written')

    if not all(type(digest) is str for digest in journal.sha256.values()):
        raise ValueError('a digest is no text')
    return journal


def file_names(has_masks: bool) -> list[str]:
    """The names of the files that the writer encodes to."""
    names = [f'{split}.bin' for split in SPLITS]
    if has_masks:
        names += [f'{split}.mask' for split in SPLITS]
    return names


class UnfinishedFile:
    """An open file NAME.part, and the hash of what is in it."""

    def __init__(self, file, digest):
        self.file = file
        self.digest = digest

    def write(self, ids):
        self.file.write(ids)
        self.digest.update(ids)

    def size(self):
        return self.file.tell()

    def sync(self):
        sync(self.file)

    def close(self):
        self.file.close()


class DatasetWriter:
    """The files of a dataset while they are written; see dataset_writer().

    documents: how many documents are written, including those of an earlier run with the same key.
    tokens: how many tokens each split has, {'train': n, 'val': n}, once the dataset is whole.
    """

    def __init__(self, folder: Path, meta: DatasetMeta, key: str, has_masks: bool):
        self.folder = folder
        self.meta = meta                        # what is known before the text is encoded
        self.key = key
        self.has_masks = has_masks
        self.dtype = DTYPES[token_dtype(meta.spec.vocab_size)]
        self.end_of_text = meta.spec.end_of_text
        self.documents = 0
        self.tokens = None
        self.saved_at = time.monotonic()
        self.files = {}                         # {file name: UnfinishedFile}
        self.finished = None                    # the journal, if nothing is left to write

        completed = complete_replacement(folder)
        if completed:
            log.info(f'{folder}: the last run stopped while it replaced the dataset; '
                     f'the replacement is now complete')

            # if the same command runs again, all of its work is done
            if key and completed.key == key:
                self.finished = completed
                self.documents = completed.documents
                return

        if not self.continue_files():
            self.create_files()

    def continue_files(self):
        """Open the .part files after the progress that a run with the same key saved.

        False if there is none.
        """
        journal = read_json(self.folder / JOURNAL, check_journal)
        if not journal or not self.key or journal.key != self.key:
            return False
        if list(journal.bytes) != file_names(self.has_masks):
            return False

        digests = {name: hash_start(self.unfinished_path(name), size, journal.sha256[name])
                   for name, size in journal.bytes.items()}
        if not all(digests.values()):
            log.info(f'{self.folder}: the saved progress is damaged; starting from the beginning')
            return False

        for name, digest in digests.items():
            file = open(self.unfinished_path(name), 'r+b')
            self.files[name] = UnfinishedFile(file, digest)
            file.seek(journal.bytes[name])
            file.truncate()                     # what was written after the progress was saved
        self.documents = journal.documents
        return True

    def create_files(self):
        remove_unfinished(self.folder)
        for name in file_names(self.has_masks):
            file = open(self.unfinished_path(name), 'xb')
            self.files[name] = UnfinishedFile(file, hashlib.sha256())

    def unfinished_path(self, name):
        return self.folder / f'{name}.part'

    def write(self, pieces: Iterable[Piece | tuple], encode: Callable, total: int,
              unit: str = 'characters', cores: int = 0):
        """Append the tokens of `pieces`, of which each is a Piece or a tuple of its values.

        encode: turns a text into an array of ids.
        total: how many `unit` there are, 'characters' or 'documents', for the progress bar.
        cores: how many threads encode; 0 takes one per core.

        Raises UserError if a piece ends a document and the vocabulary has no end-of-text token.
        """
        def encode_batch(batch):
            return self.encode_batch(batch, encode)

        batches = batch_pieces(Piece(*piece) for piece in pieces)
        bar = tqdm(desc='encoding', total=total, initial=self.documents, unit=f' {unit}',
                   unit_scale=True, delay=1, mininterval=1, disable=None)
        with bar, closing(in_order(encode_batch, batches, cores)) as results:
            for batch in results:
                for name, content in batch.content.items():
                    self.files[name].write(content)

                ended = sum(piece.ends_document for piece in batch.pieces)
                self.documents += ended
                if unit == 'documents':
                    bar.update(ended)
                else:
                    bar.update(sum(len(piece.text) for piece in batch.pieces))

                # progress is a number of documents, so it is saved between two of them
                is_due = time.monotonic() >= self.saved_at + SAVE_SECONDS
                if self.key and is_due and batch.pieces[-1].ends_document:
                    self.save_progress()

    def encode_batch(self, pieces, encode):
        """The EncodedBatch of a list of pieces."""
        ids = {}                                # {split: the arrays to join}
        masks = {}                              # the same with 1 for a token that counts
        for piece in pieces:
            piece_ids = encode(piece.text)
            if piece.ends_document:
                if self.end_of_text is None:
                    raise UserError(f'{self.folder}: the vocabulary has no end-of-text token; '
                                    f'leave ends_document False')
                piece_ids = np.append(piece_ids, self.end_of_text)
            ids.setdefault(piece.split, []).append(piece_ids)
            if self.has_masks:
                mask = np.full(len(piece_ids), piece.counts, np.uint8)
                masks.setdefault(piece.split, []).append(mask)

        content = {}
        for split, arrays in ids.items():
            content[f'{split}.bin'] = np.concatenate(arrays, dtype=self.dtype, casting='unsafe')
        for split, arrays in masks.items():
            content[f'{split}.mask'] = np.concatenate(arrays)
        return EncodedBatch(pieces, content)

    def progress(self, is_whole=False):
        """The journal of what is written. is_whole: nothing is left to write."""
        sizes = {name: file.size() for name, file in self.files.items()}
        digests = {name: file.digest.hexdigest() for name, file in self.files.items()}
        journal = Journal(self.key, self.documents, sizes, digests)
        if is_whole:
            journal.tokenizer = self.meta.to_dict()
        return journal

    def save_progress(self, is_whole=False):
        """Put the .part files on disk, and then the journal, for a later run to continue."""
        for file in self.files.values():
            file.sync()

        content = asdict(self.progress(is_whole))
        if not is_whole:
            del content['tokenizer']
        write_json(self.folder / JOURNAL, content)
        self.saved_at = time.monotonic()

    def finish(self):
        """Replace the earlier dataset."""
        journal = self.finished or self.publish()
        meta = journal.describe_dataset()
        self.tokens = meta.tokens
        log.info(f'{self.folder}: train.bin has {meta.tokens["train"]:,} tokens, '
                 f'val.bin {meta.tokens["val"]:,}; '
                 f'vocabulary {meta.spec.vocab_size:,} ({meta.spec.label})')

    def publish(self):
        """Replace the earlier dataset with what is written, and return its journal."""
        journal = self.progress(is_whole=True)
        for name, size in journal.bytes.items():
            if not size:
                raise UserError(f'{name} would be empty; --input= takes a longer text')

        replacement = Replacement(self.folder, journal.describe_dataset())
        replacement.write_meta()

        # With the tokenizer in the journal, the new dataset is whole: if this run is killed from
        # here on, the next one completes the replacement.
        self.save_progress(is_whole=True)
        for file in self.files.values():
            file.close()

        replacement.rename_files()
        return journal

    def clean_up(self, error):
        """Close and remove the .part files, or leave them if the same command can continue."""
        for file in self.files.values():
            with suppress(OSError):             # closing flushes, and the disk may be full
                file.close()

        journal = self.folder / JOURNAL
        if journal.exists() and not isinstance(error, UserError):
            log.info(f'{journal}: the work so far is kept; the same command continues it')
        else:
            remove_unfinished(self.folder)


@contextmanager
def dataset_writer(
    folder: Path, spec: TokenizerSpec, key: str = '', has_masks: bool = False,
    record_length: int | None = None,
) -> Iterator[DatasetWriter]:
    """Yield a DatasetWriter. When the block ends without an exception, its files replace the
    dataset in `folder`.

    Until then, and after a failure or a signal, an earlier dataset stays whole. If a run was killed
    while it replaced the dataset, the replacement is completed here first.

    spec: the spec of the tokenizer.
    key: names the input. With a key, progress is saved every SAVE_SECONDS, and a later writer with
        the same key continues: its `documents` is the number of documents to skip. With '', all
        work is removed after a failure.
    has_masks: some pieces do not count in the loss, so masks are written.
    record_length: how many tokens each record has, if the text consists of records of one length;
        training then begins each sequence at a record.
    """
    record = None
    if record_length:
        record = dict(length=record_length)
    created = not folder.exists()
    folder.mkdir(exist_ok=True)
    try:
        with write_lock(folder / 'prepare.lock'):
            writer = DatasetWriter(folder, DatasetMeta(spec, record), key, has_masks)
            try:
                yield writer
                writer.finish()
            except BaseException as error:
                writer.clean_up(error)
                raise
    finally:
        if created:
            with suppress(OSError):
                folder.rmdir()                          # succeeds only if a failure left it empty


def complete_replacement(folder):
    """Complete the replacement that a killed run began, and return its journal.

    None if there is none, or if its files are damaged.
    """
    journal = read_json(folder / JOURNAL, check_journal)
    if not journal or journal.tokenizer is None:
        return None
    try:
        replacement = Replacement(folder, journal.describe_dataset())
    except UserError:
        return None

    if not replacement.complete():
        return None
    return journal


def remove_unfinished(folder):
    """Remove the journal, and then the files that it describes."""
    names = ['meta.json', 'meta.pkl', *reversed(file_names(True))]
    parts = [f'{name}.part' for name in names]
    for name in (JOURNAL, *parts):
        for path in (folder / f'{name}.tmp', folder / name):
            path.unlink(missing_ok=True)
