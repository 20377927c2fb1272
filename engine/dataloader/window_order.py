"""Where training windows start: two orders, functions of the seed and of a sequence's number.

`weyl_starts` spreads windows evenly over the text. `epoch_starts` reads every window once before
any comes again.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt

import numpy as np

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)    # 2**64 divided by the golden ratio, odd
CHUNK = 8192                                    # sequences whose starts are computed together

# Each round permutes rows and then columns. Four such halves suffice (Luby and Rackoff 1988).
ROUNDS = 2


def weyl_starts(first: int, count: int, n_starts: int, seed: int | None = None) -> np.ndarray:
    """`count` starts below n_starts, of the sequences from number `first` on. (count,) int64.

    The starts follow a golden-ratio (Weyl) sequence, so consecutive windows cover the text evenly;
    independent draws would leave a third of an epoch unseen. The seed sets where the sequence
    begins; without one it begins at 0.
    """
    offset = 0
    if seed is not None:
        offset = weyl_offset(seed)

    numbers = np.arange(first, first + count, dtype=np.uint64)
    fractions = numbers * GOLDEN_RATIO + np.uint64(offset)      # of 2**64, wrapping around
    return ((fractions >> np.uint64(11)) * (2.0 ** -53 * n_starts)).astype(np.int64)


@lru_cache(maxsize=16)
def weyl_offset(seed):
    """Where the sequence of a seed begins: a number below 2**64, stable over NumPy versions."""
    return np.random.Philox(key=seed).random_raw()


# Epochs

def windows_per_epoch(tokens: int, block_size: int) -> int:
    """The number of windows that an epoch of `tokens` has, wherever its first window starts."""
    return max(1, tokens // block_size - 1)


def epoch_starts(first: int, count: int, tokens: int, block_size: int, seed: int) -> np.ndarray:
    """`count` starts of the sequences from number `first` on, in epochs. (count,) int64.

    An epoch cuts the text into windows of block_size, from a seeded offset below block_size on,
    and reads each window once, in a seeded order. It leaves out up to two blocks at the ends of
    the text, different ones each time.
    """
    first_chunk = first // CHUNK
    last_chunk = (first + count - 1) // CHUNK
    chunks = [epoch_chunk(number, tokens, block_size, seed)
              for number in range(first_chunk, last_chunk + 1)]
    return np.concatenate(chunks)[first % CHUNK:][:count]


@lru_cache(maxsize=16)
def epoch_chunk(number: int, tokens: int, block_size: int, seed: int) -> np.ndarray:
    """The starts of CHUNK sequences. The cache saves time: many small batches share a chunk."""
    n_windows = windows_per_epoch(tokens, block_size)
    first = number * CHUNK
    end = first + CHUNK

    parts = []
    while first < end:                              # each pass covers what lies in one epoch
        epoch, index = divmod(first, n_windows)
        count = min(n_windows - index, end - first)

        # Keys of Philox below 2**64 belong to the seeds of weyl_starts.
        random = np.random.Philox(key=seed + ((epoch + 1) << 64))
        offset, *keys = random.random_raw(1 + 2 * ROUNDS)

        places = permute(np.arange(index, index + count, dtype=np.uint64), n_windows, keys)
        # in a text of under two blocks, the window has to fit
        offset = int(offset) % min(block_size, tokens - block_size)
        parts.append(places.astype(np.int64) * block_size + offset)
        first += count
    return np.concatenate(parts)


# A permutation of any size, without a table

def permute(index: np.ndarray, size: int, keys: Sequence[int]) -> np.ndarray:
    """The places of `index` in a permutation of 0 to size - 1 that `keys` choose.

    index: uint64 numbers below `size`. The permutation is a Feistel network over rows x columns,
    the smallest such rectangle that is nearly square. A place beyond `size` is permuted again until
    it is below. Memory does not grow with `size`, as there is no table.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    rows = isqrt(size - 1) + 1
    columns = (size - 1) // rows + 1

    place = feistel(index, rows, columns, keys)
    while len(beyond := np.flatnonzero(place >= size)):
        place[beyond] = feistel(place[beyond], rows, columns, keys)
    return place


def feistel(index, rows, columns, keys):
    """A permutation of 0 to rows * columns - 1, of uint64 arrays."""
    rows = np.uint64(rows)
    columns = np.uint64(columns)
    row, column = np.divmod(index, columns)

    # Subtracting where a sum is too large is faster than a remainder.
    for row_key, column_key in zip(keys[::2], keys[1::2]):
        row = row + hash_below(column + row_key, rows)
        row -= rows * (row >= rows)
        column = column + hash_below(row + column_key, columns)
        column -= columns * (column >= columns)
    return row * columns + column


def hash_below(x, limit):
    """Hashes of uint64 numbers, each below `limit`, which is below 2**32.

    Source: the finalizer of SplitMix64, Steele et al. 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(32)) * limit >> np.uint64(32)
