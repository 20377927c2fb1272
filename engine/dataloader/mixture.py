"""Mixtures: training sequences from several datasets, in given shares.

    --dataset=openwebtext:0.7,mine:0.3

The dataset of a sequence, and its number among that dataset's own sequences, are functions of the
sequence's number. So a resumed run and any number of ranks read the same, and among the first N
sequences of two datasets, each has its share of N, rounded up or down.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from engine.dataloader.batches import IGNORED, Batch, Part, TokenDataset
from engine.errors import UserError
from engine.tokenizer import same_tokens

CHUNK = 8192                    # sequences that are assigned together
MAX_DENOMINATOR = 10 ** 6       # shares are rounded to fractions of whole numbers up to this one


class Assignment(NamedTuple):
    """Where some sequences of a mixture come from. Both are int64 arrays of one length."""

    part: np.ndarray            # the number of the dataset
    index: np.ndarray           # the sequence's number among the sequences of that dataset


def is_mixture(name: str) -> bool:
    """True where the setting `dataset` names several datasets."""
    return ',' in name


def parse_mixture(text: str) -> dict[str, Fraction]:
    """{name: share} of a setting such as 'openwebtext:0.7,mine:0.3'. The shares add up to 1.

    Raises UserError for anything else. Shares are divided by their sum.
    """
    weights = {}
    for entry in text.split(','):
        name, _, weight = entry.strip().rpartition(':')
        try:
            number = Fraction(weight)
        except (ValueError, ZeroDivisionError):
            number = Fraction(0)
        if not name or not 0 < number < 10 ** 9:
            raise UserError(f'dataset={text}: {entry.strip()!r} should be a name and its share of '
                            f'the sequences, as in --dataset=openwebtext:0.7,mine:0.3')
        if name in weights:
            raise UserError(f'dataset={text} names {name} twice; add its shares')
        weights[name] = number

    total = sum(weights.values())
    for name, weight in weights.items():
        if weight / total < Fraction(1, MAX_DENOMINATOR):       # ratios_of would make it 0
            raise UserError(f'dataset={text}: the share of {name} is less than a millionth; '
                            f'leave it out')
    return {name: weight / total for name, weight in weights.items()}


def ratios_of(shares: Sequence[Fraction]) -> tuple[Fraction, ...]:
    """The share that each dataset but the last has of what the datasets before it leave."""
    ratios = []
    share_left = Fraction(1)
    for share in shares[:-1]:
        ratios.append((share / share_left).limit_denominator(MAX_DENOMINATOR))
        share_left -= share
    return tuple(ratios)


def assign(numbers: np.ndarray, ratios: Sequence[Fraction]) -> Assignment:
    """The dataset of each sequence.

    numbers: the numbers of the sequences, int64. ratios: those of ratios_of.

    The first dataset takes a sequence wherever its share of the sequences so far, rounded down,
    grows by one. The others divide what is left in the same way.
    """
    part = np.full(len(numbers), len(ratios))
    index = np.zeros(len(numbers), np.int64)
    is_left = np.ones(len(numbers), bool)
    left = numbers                                  # numbers among the sequences that are left

    for i, ratio in enumerate(ratios):
        before = multiply(left, ratio)
        is_taken = is_left & (multiply(left + 1, ratio) > before)
        part[is_taken] = i
        index[is_taken] = before[is_taken]

        is_left &= ~is_taken
        left = left - before

    index[is_left] = left[is_left]
    return Assignment(part, index)


def assign_range(first: int, count: int, ratios: tuple[Fraction, ...]) -> Assignment:
    """The Assignment of `count` sequences from number `first` on."""
    first_chunk = first // CHUNK
    last_chunk = (first + count - 1) // CHUNK
    chunks = [assign_chunk(number, ratios) for number in range(first_chunk, last_chunk + 1)]
    if len(chunks) > 1:
        chunks = [Assignment(*(np.concatenate(arrays) for arrays in zip(*chunks)))]
    begin = first % CHUNK
    return Assignment(*(array[begin:begin + count] for array in chunks[0]))


@lru_cache(maxsize=4)
def assign_chunk(number, ratios):
    """The Assignment of CHUNK sequences. The cache saves time: many small batches share a chunk."""
    first = number * CHUNK
    return assign(np.arange(first, first + CHUNK, dtype=np.int64), ratios)


def multiply(numbers, ratio):
    """numbers * ratio, rounded down, without an overflow of the product."""
    whole, rest = np.divmod(numbers, ratio.denominator)
    return whole * ratio.numerator + rest * ratio.numerator // ratio.denominator


class MixedDataset:
    """Several datasets with the same tokens, of which each sequence is drawn from one.

    text: the setting `dataset`. sampling, documents: as for TokenDataset, for each of them.
    It has the attributes and methods of a TokenDataset that training uses. Changed shares leave the
    fingerprint as it is.

    Raises UserError as parse_mixture and TokenDataset, and where the tokens differ.
    """

    def __init__(self, text: str, sampling: str = 'windows', documents: str = 'any'):
        self.shares = parse_mixture(text)
        self.parts = [Part(name, float(share), TokenDataset(name, sampling, documents))
                      for name, share in self.shares.items()]
        self.ratios = ratios_of(list(self.shares.values()))
        self.name = text

        first = self.parts[0].data
        for part in self.parts[1:]:
            if not same_tokens(part.data.tokenizer, first.tokenizer):
                raise UserError(f'the tokens of {part.name} are not those of '
                                f'{self.parts[0].name}, and a mixture has one vocabulary; prepare '
                                f'one of them again with the tokenizer of the other')

        self.tokenizer = first.tokenizer
        self.vocab_size = first.vocab_size
        self.has_masks = any(part.data.has_masks for part in self.parts)
        self.chat = self.find_chat()
        self.n_train_tokens = sum(part.data.n_train_tokens for part in self.parts)
        facts = [part.data.fingerprint for part in self.parts]
        self.fingerprint = hashlib.sha256(''.join(facts).encode()).hexdigest()[:16]

    def find_chat(self):
        """The layout of the conversations in the datasets, or None. UserError where two differ."""
        layouts = {part.name: part.data.chat for part in self.parts if part.data.chat}
        if not layouts:
            return None
        name, chat = next(iter(layouts.items()))
        for other in layouts:
            if layouts[other] != chat:
                raise UserError(f'{other} and {name} have conversations in different layouts; '
                                f'prepare one of them again')
        return chat

    def set_block_size(self, block_size: int) -> None:
        """As TokenDataset.set_block_size, of each dataset."""
        self.block_size = block_size
        for part in self.parts:
            part.data.set_block_size(block_size)

    def bytes_per_token(self) -> float | None:
        """The mean of what the datasets have, by their shares; None where one has none."""
        mean = 0.0
        for part in self.parts:
            size = part.data.bytes_per_token()
            if size is None:
                return None
            mean += part.share * size
        return mean

    def batch(self, seed: int, stream: str, first: int, count: int) -> Batch:
        """`count` sequences of the stream 'train', from number `first` on.

        Evaluation reads the batches of each of `parts` instead.
        """
        windows = np.empty((count, self.block_size + 1), np.int64)
        counted = np.ones((count, self.block_size), bool)
        for data, rows, first_index in self.divide(first, count):
            starts = data.starts(seed, stream, first_index, len(rows))
            windows[rows] = data.windows('train', starts)
            if data.has_masks:
                counted[rows] = data.counted('train', starts)

        x = torch.from_numpy(windows[:, :-1])
        y = torch.from_numpy(windows[:, 1:])
        if self.has_masks:
            y = y.masked_fill(~torch.from_numpy(counted), IGNORED)
        return Batch(x, y)

    def count_targets(self, seed: int, stream: str, first: int, count: int) -> int:
        """How many targets count in the sequences of `batch` with the same arguments."""
        return sum(data.count_targets(seed, stream, first_index, len(rows))
                   for data, rows, first_index in self.divide(first, count))

    def divide(self, first, count):
        """(data, rows, first index) of each dataset that has some of these sequences.

        rows: which of the sequences are its own. Their numbers in the dataset follow one another.
        """
        parts, indices = assign_range(first, count, self.ratios)
        for i, part in enumerate(self.parts):
            rows = np.flatnonzero(parts == i)
            if len(rows):
                yield part.data, rows, int(indices[rows[0]])
