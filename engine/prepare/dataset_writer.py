"""Writing token files for the prepare scripts: text is encoded on every core, and the finished
files replace an earlier dataset together.

train.bin and val.bin hold token ids, little-endian uint16, or uint32 for more than 65,536 ids, documents
joined. meta.json holds the tokenizer, the token counts and a SHA-256 of both files. meta.pkl is nanoGPT's
form of a character vocabulary. engine.prepare.shard_writer writes shards.
"""

import hashlib
import json
import os
import pickle
import time
from contextlib import closing, contextmanager, suppress

import numpy as np
from tqdm import tqdm

from engine.atomic_files import atomic_write, sync, sync_folder
from engine.dataloader.token_files import DTYPES, token_dtype
from engine.errors import UserError
from engine.prepare.encode import batch_pieces, in_order
from engine.prepare.publish import FILES, SPLITS, hash_start, write_lock
from engine.tokenizer import check_spec, end_of_text

SAVE_SECONDS = 30           # a killed run that can be continued loses at most this much work
JOURNAL = 'unfinished.json'


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


def read_journal(folder):
    """The journal of a killed run, if there is one and its numbers are possible; else None."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        journal = json.loads((folder / JOURNAL).read_text(encoding='utf-8'))
        sizes = [journal['bytes'][split] for split in SPLITS]
        numbers_are_possible = all(type(n) is int and n >= 0 for n in (journal['documents'], *sizes))
        fields_are_there = 'key' in journal and all(split in journal['sha256'] for split in SPLITS)
        if numbers_are_possible and fields_are_there and not any(size % 2 for size in sizes):
            return journal
    return None


def describe_dataset(journal):
    """The content of meta.json for the dataset that a journal with a tokenizer describes."""
    dtype = token_dtype(journal['tokenizer']['vocab_size'])
    return dict(journal['tokenizer'], dtype=dtype,
                tokens={split: journal['bytes'][split] // DTYPES[dtype].itemsize for split in SPLITS},
                sha256={f'{split}.bin': journal['sha256'][split] for split in SPLITS})


def write_meta_parts(folder, meta):
    """Write meta.json.part, and meta.pkl.part for a character vocabulary."""
    with atomic_write(folder / 'meta.json.part') as file:
        json.dump(meta, file)
    if meta['tokenizer'] == 'char':
        itos = dict(enumerate(meta['chars']))
        stoi = {char: i for i, char in itos.items()}
        with atomic_write(folder / 'meta.pkl.part', 'wb') as file:
            pickle.dump(dict(vocab_size=len(itos), itos=itos, stoi=stoi), file, protocol=2)
    else:
        (folder / 'meta.pkl.part').unlink(missing_ok=True)


def replace_dataset(folder):
    """Rename the .part files over the earlier dataset. Calling it again completes it after a kill.

    train.bin is removed first and renamed last, so whoever finds one finds the val.bin and meta.json
    of the same run beside it.
    """
    if (folder / 'train.bin.part').exists():
        (folder / 'train.bin').unlink(missing_ok=True)
        if not (folder / 'meta.pkl.part').exists():
            (folder / 'meta.pkl').unlink(missing_ok=True)       # of an earlier character dataset
    for name in FILES:
        if (folder / f'{name}.part').exists():
            os.replace(folder / f'{name}.part', folder / name)
    sync_folder(folder)                 # before the journal goes: without it nothing completes the rest
    (folder / JOURNAL).unlink(missing_ok=True)


def complete_replacement(folder):
    """Complete the replacement that a killed run began, and return its journal; else None.
    A replacement whose files are damaged is not completed."""
    journal = read_journal(folder)
    if not journal or 'tokenizer' not in journal:
        return None
    for split in SPLITS:
        part, final = folder / f'{split}.bin.part', folder / f'{split}.bin'
        path = part if part.exists() else final
        if not hash_start(path, journal['bytes'][split], journal['sha256'][split]):
            return None
    try:
        check_spec(journal['tokenizer'])
    except UserError:
        return None
    write_meta_parts(folder, describe_dataset(journal))
    replace_dataset(folder)
    return journal


def remove_unfinished(folder):
    """Remove the journal, and then the files that it describes."""
    for name in (JOURNAL, *(f'{file}.part' for file in FILES)):
        for path in (folder / f'{name}.tmp', folder / name):
            path.unlink(missing_ok=True)
