"""Where training windows start: two orders, each a function of the seed and of a sequence's number alone."""

from functools import lru_cache
from math import isqrt

import numpy as np

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)    # 2**64 divided by the golden ratio, odd
ROUNDS = 2      # of the permutation, over rows and columns each: four halves suffice (Luby and Rackoff 1988)
CHUNK = 8192                                    # sequences whose starts are computed together


def weyl_starts(first, count, n_starts, seed=None):
    """`count` starts below n_starts, of the sequences from number `first` on. (count,) int64.

    The starts follow a golden-ratio (Weyl) sequence, so consecutive windows cover the text evenly;
    independent draws would leave a third of an epoch unseen. The seed sets where the sequence
    begins; without one it begins at 0.
    """
    offset = 0 if seed is None else np.random.Philox(key=seed).random_raw()     # stable over NumPy versions
    fractions = np.arange(first, first + count, dtype=np.uint64) * GOLDEN_RATIO + np.uint64(offset)
    return ((fractions >> np.uint64(11)) * (2.0 ** -53 * n_starts)).astype(np.int64)


def windows_per_epoch(tokens, block_size):
    """The number of windows that an epoch of `tokens` has, wherever its first window starts."""
    return max(1, tokens // block_size - 1)


def epoch_starts(first, count, tokens, block_size, seed):
    """`count` starts of the sequences from number `first` on, where each epoch reads every window once. (count,) int64.

    An epoch cuts the text into windows of block_size, from a seeded offset below block_size on, and reads
    them in a seeded order. An epoch leaves out up to two blocks at the ends of the text, different ones each time.
    """
    numbers = range(first // CHUNK, (first + count - 1) // CHUNK + 1)
    return np.concatenate([epoch_chunk(number, tokens, block_size, seed) for number in numbers])[first % CHUNK:][:count]


@lru_cache(maxsize=16)
def epoch_chunk(number, tokens, block_size, seed):
    """The starts of CHUNK sequences. The cache only saves time: many small batches fall into one chunk."""
    size, first, parts = windows_per_epoch(tokens, block_size), number * CHUNK, []
    while first < (number + 1) * CHUNK:
        epoch, index = divmod(first, size)
        count = min(size - index, (number + 1) * CHUNK - first)
        offset, *keys = np.random.Philox(key=seed + (epoch + 1 << 64)).random_raw(1 + 2 * ROUNDS)
        indices = permute(np.arange(index, index + count, dtype=np.uint64), size, keys).astype(np.int64)
        parts.append(indices * block_size + int(offset) % min(block_size, tokens - block_size))
        first += count
    return np.concatenate(parts)


def permute(index, size, keys):
    """The places of `index`, uint64 numbers below `size`, in a permutation of 0 to size - 1 that `keys` choose.

    A Feistel network over rows x columns, the smallest such rectangle that is nearly square. A place
    beyond `size` is permuted again until it is below. No table: memory does not grow with `size`.
    Source: Black and Rogaway 2002, "Ciphers with arbitrary finite domains".
    """
    rows = isqrt(size - 1) + 1
    columns = -(-size // rows)
    place = feistel(index, rows, columns, keys)
    while len(beyond := np.flatnonzero(place >= size)):
        place[beyond] = feistel(place[beyond], rows, columns, keys)
    return place


def feistel(index, rows, columns, keys):
    """A permutation of 0 to rows * columns - 1, of uint64 arrays."""
    rows, columns = np.uint64(rows), np.uint64(columns)
    row, column = np.divmod(index, columns)
    for row_key, column_key in zip(keys[::2], keys[1::2]):
        row = row + hash_below(column + row_key, rows)
        row -= rows * (row >= rows)                 # faster than a remainder
        column = column + hash_below(row + column_key, columns)
        column -= columns * (column >= columns)
    return row * columns + column


def hash_below(x, limit):
    """Hashes of uint64 numbers, each below `limit`, which is below 2**32. Source: the finalizer of
    SplitMix64, Steele et al. 2014."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (x >> np.uint64(32)) * limit >> np.uint64(32)
