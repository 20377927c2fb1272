"""Chooses what is held out as val.bin: a share of all documents, and the ends of long texts.

A row of a table, a part of a text between separators, and a text file that is short beside the
others are documents. Those that are held out lie evenly over all of them, chosen by a hash. A text
file with LARGE_SHARE of all characters or more gives its end. Where a person names files of their
own for val, these are held out instead.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from itertools import groupby
from typing import NamedTuple

from engine.prepare.row_layout import RowLayout, Segment

SEED = 2357
LARGE_SHARE = 0.01


@dataclass
class FileContent:
    """What was counted in a file.

    layout: of its rows; None for a text. documents: those with text. empty: those without.
    """
    layout: RowLayout | None
    characters: int = 0
    documents: int = 0
    empty: int = 0

    @property
    def is_one_text(self) -> bool:
        """True where the file is a single text, which can be cut."""
        in_segments = self.layout is not None and self.layout.in_segments
        return self.documents == 1 and not in_segments


class SplitDocument(NamedTuple):
    """A document, or a part of one that was cut, and where it goes: 'train' or 'val'."""
    split: str
    segments: Iterable[Segment]


class HeldOut:
    """Which documents and which ends of texts are held out.

    fraction: the share that is held out. files: the contents of all files, in their order.
    """

    def __init__(self, fraction: float, files: list[FileContent]):
        self.train_share = 1 - Decimal(str(fraction))   # exact: 0.93 of 100 is 93, not 92.99...
        self.files = files
        total = sum(file.characters for file in files)
        all_documents = sum(file.documents for file in files)

        self.percent = f'{100 * fraction:g}%'
        self.cuts = []                  # after how many characters each text is cut, or None
        for file in files:
            is_large = file.characters >= LARGE_SHARE * total
            gives_end = file.is_one_text and is_large
            if file.layout and all_documents > 1:
                gives_end = False       # a row stays whole
            cut = None
            if gives_end:
                cut = int(file.characters * self.train_share)
            self.cuts.append(cut)

        # documents that stay whole, and how many of them are held out
        self.documents = sum(file.documents for file, cut in zip(files, self.cuts) if cut is None)
        self.held_out = int(self.documents * (1 - self.train_share) + Decimal('0.5'))
        self.ends = sum(cut is not None for cut in self.cuts)
        if not self.held_out and not self.ends and self.documents > 1:
            self.held_out = 1

    @property
    def has_both_splits(self) -> bool:
        """True where both train and val get some text."""
        trains = self.documents > self.held_out or any(self.cuts)
        holds_out = self.held_out > 0
        for file, cut in zip(self.files, self.cuts):
            if cut is not None and cut < file.characters:
                holds_out = True
        return trains and holds_out

    def is_held_out(self, number: int) -> bool:
        """True if document number `number` of those that stay whole is held out.

        The documents are divided into as many runs as are held out, of the same length; a hash of
        the run's number chooses one document of it.
        """
        if not self.held_out:
            return False
        run = ((number + 1) * self.held_out - 1) // self.documents
        begin = self.documents * run // self.held_out
        end = self.documents * (run + 1) // self.held_out
        digest = hashlib.sha256(f'{SEED}, {run}'.encode()).digest()
        return number == begin + int.from_bytes(digest[:8], 'big') % (end - begin)

    def split(self, files: Iterable[Iterable[Iterable[Segment]]]) -> Iterator[SplitDocument]:
        """The documents of all files, and where they go. Documents without text are left out."""
        number = 0
        for documents, cut in zip(files, self.cuts):
            for segments in documents:
                if segments == []:
                    continue
                if cut is not None:
                    yield from cut_document(segments, cut)
                else:
                    split = 'train'
                    if self.is_held_out(number):
                        split = 'val'
                    yield SplitDocument(split, segments)
                    number += 1

    def describe(self) -> str:
        """What val holds, such as 'the last 10% of 3 texts and 6 of 60 documents'."""
        parts = []
        if self.ends == 1:
            parts.append(f'the last {self.percent} of a text')
        elif self.ends:
            parts.append(f'the last {self.percent} of each of {self.ends:,} texts')
        if self.held_out:
            parts.append(f'{self.held_out:,} of {self.documents:,} documents, spread over all of '
                         f'them')
        return ' and '.join(parts)


class HeldOutFiles:
    """Files of their own that are held out whole, in place of a share of everything.

    n_train: how many files, from the first on, are for training. files: the contents of all.
    """

    def __init__(self, n_train: int, files: list[FileContent]):
        self.n_train = n_train
        self.documents = sum(file.documents for file in files[n_train:])
        self.has_both_splits = (self.documents > 0
                                and any(file.documents for file in files[:n_train]))

    def split(self, files: Iterable[Iterable[Iterable[Segment]]]) -> Iterator[SplitDocument]:
        """The documents of all files, and where they go. Documents without text are left out."""
        for number, documents in enumerate(files):
            split = 'train'
            if number >= self.n_train:
                split = 'val'
            for segments in documents:
                if segments != []:
                    yield SplitDocument(split, segments)

    def describe(self) -> str:
        """What val holds."""
        return f'all documents of its own input, {self.documents:,}'


def cut_document(segments, cut):
    """The SplitDocuments of a document whose first `cut` characters are 'train'."""
    parts = split_at(segments, cut)
    for split, group in groupby(parts, key=lambda part: part[0]):
        yield SplitDocument(split, (segment for _, segment in group))


def split_at(segments, cut):
    """(split, segment) of a document's segments."""
    for text, counts in segments:
        if cut > 0:
            yield 'train', Segment(text[:cut], counts)
        if len(text) > cut:
            yield 'val', Segment(text[max(cut, 0):], counts)
        cut -= len(text)
