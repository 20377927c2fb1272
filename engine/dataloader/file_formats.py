"""How a token file holds its ids: plain, or after a header of llm.c or of numpy.

A plain file does not tell how wide its ids are; find_width guesses that. All files are
little-endian. llm.c's files begin with a header of 1,024 bytes, as int32: a magic number, a
version, and the number of tokens. numpy's .npy files begin with a header that has the type.
"""

import io
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.errors import UserError

# The types of ids that are read. A negative int then is an id beyond every vocabulary.
DTYPES = {
    'uint8': np.dtype('u1'),
    'uint16': np.dtype('<u2'),
    'uint32': np.dtype('<u4'),
    'int32': np.dtype('<u4'),
    'int64': np.dtype('<u8'),
}

INTEGERS = {1: 'uint8', 2: 'uint16', 4: 'uint32', 8: 'int64'}      # by their bytes

# llm.c's files: the type of ids that each (magic number, version) stands for
HEADER_BYTES = 1024
PUBLISHED = {(20240520, 1): 'uint16', (20240801, 7): 'uint32'}
MAGICS = range(20240101, 20400101)  # its magic numbers are dates
MOST_VERSIONS = 1000

NUMPY_MAGIC = b'\x93NUMPY'
NUMPY_HEADER_BYTES = 1 << 12        # no header of a one-dimensional array is longer
START_BYTES = NUMPY_HEADER_BYTES    # how much of a file tells its format

# A file that nothing describes is sampled, to see how wide its ids are
SAMPLED_BLOCKS = 64
BLOCK_BYTES = 2048                  # a multiple of the widest id
FEWEST_IDS = 32                     # that are not 0; fewer show no pattern
SMALL_ID = 256                      # GPT-2's ids up to here are single bytes
LARGEST_HIGH = 15                   # the upper two bytes of an id of at most a million


class FileFormat(NamedTuple):
    """How a token file holds its ids."""

    dtype: str              # a key of DTYPES
    header_bytes: int       # bytes before the first token


# The header

def read_format(path: Path, dtype: str) -> FileFormat:
    """The FileFormat of a file: its header's, or `dtype` where it has none."""
    with open(path, 'rb') as file:
        return parse_format(path, file.read(START_BYTES), os.fstat(file.fileno()).st_size, dtype)


def parse_format(path: Path, start: bytes, size: int, dtype: str) -> FileFormat:
    """The FileFormat of a file of `size` bytes that begins with the START_BYTES `start`.

    Raises UserError for an unknown header, and where the size does not fit the number of tokens in
    it.
    """
    if start.startswith(NUMPY_MAGIC):
        file_format, tokens = parse_numpy_header(path, start)
    else:
        numbers = np.frombuffer(start[:HEADER_BYTES].ljust(HEADER_BYTES, b'\0'), '<i4')
        magic, version, tokens = numbers[:3].tolist()
        if (magic, version) not in PUBLISHED:
            if is_of_llmc(start, numbers):
                raise UserError(f'{path} has a header of llm.c with '
                                f'{describe_magic(magic, version)}')
            return FileFormat(dtype, 0)
        file_format = FileFormat(PUBLISHED[magic, version], HEADER_BYTES)

    if size != file_format.header_bytes + tokens * DTYPES[file_format.dtype].itemsize:
        raise UserError(f'{path} has {size:,} bytes, which do not fit the {tokens:,} tokens of its '
                        f'header; download it again')
    return file_format


def is_of_llmc(start, numbers):
    """True where a file that begins with `start` has a header of llm.c, perhaps an unknown one.

    numbers: those of the header. Ids of text do not look like one: the magic numbers of token files
    are ids beyond GPT-2's, and other headers end with zeros.
    """
    magic, version = numbers[:2].tolist()
    if magic in [known for known, _ in PUBLISHED]:
        return 0 <= version <= MOST_VERSIONS
    return magic in MAGICS and len(start) >= HEADER_BYTES and not numbers[3:].any()


def describe_magic(magic, version):
    """What is wrong with a header of llm.c that has this magic number and version."""
    for known, known_version in PUBLISHED:
        if magic == known:
            return (f'version {version}, which is unknown here; it should be {known_version}; '
                    f'write the tokens again in that version')
    known = ' or '.join(str(known) for known, _ in PUBLISHED)
    return (f'the magic number {magic}, and token files have {known}; this is another kind of '
            f'file, so move it away')


def parse_numpy_header(path, start):
    """(FileFormat, number of tokens) of a .npy file. numpy reads a header as a literal, so nothing
    in it runs."""
    file = io.BytesIO(start)
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read_header = np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file, max_header_size=NUMPY_HEADER_BYTES)
    except Exception:                   # a hostile header can raise anything
        raise UserError(f'{path} has the damaged header of a .npy file; save it again') from None

    is_little_endian = dtype.newbyteorder('<') == dtype
    if dtype.kind not in 'ui' or not is_little_endian:
        raise UserError(f'{path} holds {str(dtype)[:40]}, and ids are {", ".join(DTYPES)}; save '
                        f'it again, as in numpy.save(name, ids.astype(numpy.uint16))')
    if len(shape) != 1:
        raise UserError(f'{path} holds an array of {len(shape)} dimensions, and a token file has '
                        f'one; save it again, as in numpy.save(name, ids.reshape(-1))')
    return FileFormat(INTEGERS[dtype.itemsize], file.tell()), shape[0]


# The width of ids in a plain file

def find_width(path: Path, dtype: str) -> str | None:
    """The type that the ids of a file without a header seem to have, where they are wider.

    dtype: the type that they should have, 'uint16' or 'uint32'. None where they seem to have it. A
    sample of at most SAMPLED_BLOCKS is read. Read as `dtype`, wider ids show a 0 at every second
    number, or at three of four. A text of ids that have this type hardly does.
    """
    low, high = sample_parts(path, dtype, 8)
    if np.count_nonzero(low) >= FEWEST_IDS and not high.any():
        if dtype == 'uint16' or has_ids_of_text(low):
            return 'int64'

    if dtype == 'uint16':
        low, high = sample_parts(path, dtype, 4)
        if np.count_nonzero(low) >= FEWEST_IDS and not high.any() and has_ids_of_text(low):
            return 'int32'
    return None


def has_ids_of_text(ids):
    """True for what may be the ids of a text: some are 0, or large.

    Otherwise the zeros between them may be an id, such as that of a space between any two letters.
    """
    return bool((ids == 0).any() or ids.max() >= SMALL_ID)


class LargeIds(NamedTuple):
    """What the ids of a file seem to be, where those of another type are too large."""

    dtype: str
    largest: int            # in the sample that was read


def explain_large_ids(path: Path, dtype: str) -> LargeIds | None:
    """What the ids of a file seem to be, where as ids of `dtype` they are beyond the vocabulary.

    The upper two bytes of wider ids are small. None where they are not.
    """
    if dtype != 'uint16':
        return None
    for wider in ('int64', 'uint32'):
        low, high = sample_parts(path, dtype, DTYPES[wider].itemsize)
        is_wider = np.count_nonzero(low) >= FEWEST_IDS and not high[:, 1:].any()
        if is_wider and high.max() <= LARGEST_HIGH:
            ids = low.astype(np.int64) + (high[:, 0].astype(np.int64) << 16)
            return LargeIds(wider, int(ids.max()))
    return None


def sample_parts(path, dtype, width):
    """The ids of evenly spaced blocks of a file, as if each had `width` bytes.

    Returns (ids,), the lowest part of each, and (ids, parts), the others, in numbers of `dtype`.
    """
    size = path.stat().st_size
    last = max(0, size - BLOCK_BYTES) // width
    parts = []
    with open(path, 'rb') as file:
        for block in range(SAMPLED_BLOCKS):
            file.seek(block * last // (SAMPLED_BLOCKS - 1) * width)
            content = file.read(BLOCK_BYTES)
            content = content[:len(content) // width * width]
            parts.append(np.frombuffer(content, DTYPES[dtype]))
            if size <= BLOCK_BYTES:         # it is read whole
                break
    parts = np.concatenate(parts).reshape(-1, width // DTYPES[dtype].itemsize)
    return parts[:, 0], parts[:, 1:]
