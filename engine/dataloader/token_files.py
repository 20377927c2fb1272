"""The token files of a split, one or many, as one stream of tokens.

A split is one file, train.bin, or numbered shards: train_000001.bin, or PREFIX_train_000001.bin.
A file holds ids, little-endian uint16 or uint32. llm.c's files begin with a header of 1,024 bytes,
as int32: a magic number, a version, and the number of tokens.
"""

import hashlib
import json
import mmap
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError

SPLITS = ('train', 'val')
TOKEN_DTYPES = ('uint16', 'uint32')
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4'),
          'uint8': np.dtype('u1')}                  # of engine.dataloader.masks
SHARD = re.compile(r'((?:.+_)?)(train|val)_(\d+)\.bin')
REPLACING = 'replacing.json'        # exists while prepare.py replaces the shards of a folder

# llm.c's files: the type of ids that each (magic number, version) stands for
HEADER_BYTES = 1024
PUBLISHED = {(20240520, 1): 'uint16', (20240801, 7): 'uint32'}

OPEN_SHARDS = 4096          # most memory maps of one stream; each takes a file descriptor
SAMPLED_BLOCKS = 64         # blocks of a sharded split that are read at the start
SAMPLED_TOKENS = 1024       # tokens in each such block
SCANNED_BYTES = 1 << 24     # bytes of a file that are checked at once


class TokenFile(NamedTuple):
    """A token file as it was found in its folder."""

    name: str
    bytes: int
    inode: int = 0          # 0 where the system has none


class FileFormat(NamedTuple):
    """How a token file holds its ids."""

    dtype: str              # a key of DTYPES
    header_bytes: int       # bytes before the first token


class Contents(NamedTuple):
    """What reading a split found."""

    digest: str             # SHA-256, as hexadecimal digits
    largest: int            # the largest id
    path: Path              # the file that holds this id
    position: int           # the id's position among the tokens of that file


def token_dtype(vocab_size: int) -> str:
    """The name of the type of ids in a file: 'uint16', or 'uint32' for more than 65,536 ids."""
    if vocab_size <= 1 << 16:
        return 'uint16'
    return 'uint32'


# Finding files

def find_token_files(folder: Path) -> dict[str, list[TokenFile]]:
    """{'train': [TokenFile], 'val': ...} of `folder`, with shards in the order of their numbers.

    A split without files has an empty list. Raises UserError for a split that is both one file and
    shards, for shards of several prefixes, and for a name that is not a regular file.
    """
    found = {split: [] for split in SPLITS}
    if not folder.is_dir():
        return found

    for entry in os.scandir(folder):
        if entry.name not in ('train.bin', 'val.bin') and not SHARD.fullmatch(entry.name):
            continue

        if not entry.is_file():
            raise UserError(f'{entry.path} is not a file; remove it, or prepare the dataset again')

        stat = entry.stat()
        file = TokenFile(entry.name, stat.st_size, stat.st_ino)
        found[split_of(entry.name)].append(file)

    for files in found.values():
        files.sort(key=lambda file: (shard_order(file.name), file.name))
        check_one_dataset(folder, files)
    return found


def split_of(name):
    """The split of a token file with this name."""
    shard = SHARD.fullmatch(name)
    if shard:
        return shard[2]
    return name.removesuffix('.bin')


def shard_order(name):
    """(prefix, number) of a shard's name; () for the name of a split's only file."""
    shard = SHARD.fullmatch(name)
    if shard:
        return shard[1], int(shard[3])
    return ()


def check_one_dataset(folder, files):
    """UserError where the sorted `files` of a split are of different kinds or prefixes."""
    if len(files) < 2:
        return

    first = files[0].name
    last = files[-1].name
    if shard_order(first)[:1] != shard_order(last)[:1]:
        raise UserError(f'{folder} holds {first} and {last}, which are not of one dataset; move '
                        f'one of them away')


# The header

def read_format(path, dtype):
    """The FileFormat of a file: its header's, or `dtype` where it has none."""
    with open(path, 'rb') as file:
        return parse_format(path, file.read(12), os.fstat(file.fileno()).st_size, dtype)


def parse_format(path, start, size, dtype):
    """The FileFormat of a file of `size` bytes that begins with the bytes `start`.

    Raises UserError where the size does not fit the number of tokens in the header.
    """
    magic, version, tokens = np.frombuffer(start.ljust(12, b'\0'), '<i4').tolist()
    if (magic, version) not in PUBLISHED:
        return FileFormat(dtype, 0)

    dtype = PUBLISHED[magic, version]
    if size != HEADER_BYTES + tokens * DTYPES[dtype].itemsize:
        raise UserError(f'{path} has {size:,} bytes, which do not fit the {tokens:,} tokens of its '
                        f'header; download it again')
    return FileFormat(dtype, HEADER_BYTES)


# Opening files

def shard_opener(
    folder: Path, files: Sequence[TokenFile], counts: Sequence[int], file_format: FileFormat,
) -> Callable[[int], np.ndarray]:
    """A function that returns the tokens of file number `number`, as an array over a memory map.

    It keeps the latest maps open. It raises RunError for a file that is no longer the same, or of
    another format than the first.
    """
    def open_shard(number):
        path = folder / files[number].name
        dtype = file_format.dtype
        try:
            content = map_file(path, files[number].inode)
            if parse_format(path, content[:12], len(content), dtype) != file_format:
                raise UserError(f'it has another format than {files[0].name}')
            # np.memmap is ten times slower.
            return np.frombuffer(content, DTYPES[dtype], counts[number], file_format.header_bytes)
        except (OSError, ValueError) as error:
            raise RunError(f'{path} cannot be read: {error}; restore it, and go on with '
                           f'--init_from=resume') from None

    return lru_cache(maxsize=min(OPEN_SHARDS, open_files_limit() // 8))(open_shard)


def map_file(path, inode):
    """A memory map of the file. Raises UserError where it is not the file that had this inode."""
    with open(path, 'rb') as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if inode not in (0, os.fstat(file.fileno()).st_ino):
            raise UserError('it was replaced')
    return content


def open_files_limit():
    """How many files this process may open: often 1,024, and 256 on macOS."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:                 # Windows
        return 512

    limit = getrlimit(RLIMIT_NOFILE)[0]
    if limit < 0:                       # no limit
        return 8 * OPEN_SHARDS
    return limit


# The stream

class TokenStream:
    """The tokens of several files, one after the other. `len` and slices are those of an array.

    folder: where the files lie. files: at least one, in order. dtype: 'uint16' or 'uint32', which
    counts where the files have no header. Only the first file is opened at the start.
    Raises UserError for files that cannot be tokens.
    """

    def __init__(self, folder: Path, files: Sequence[TokenFile], dtype: str):
        self.folder = folder
        self.names = [file.name for file in files]
        self.format = read_format(folder / self.names[0], dtype)
        self.dtype = DTYPES[self.format.dtype]

        # Where each file begins and ends in the stream
        counts = self.count_tokens(files)
        self.ends = np.cumsum(counts)
        self.begins = (self.ends - counts).tolist()

        # The cache holds no reference to the stream, so dropping the stream closes its files at
        # once.
        self.open = shard_opener(folder, files, counts.tolist(), self.format)
        if len(files) == 1:
            self.open(0)            # for good: the map stays the same if the file is replaced

    def count_tokens(self, files):
        """The number of tokens in each file, an int64 array. UserError where a size cannot be."""
        sizes = np.array([file.bytes for file in files], np.int64) - self.format.header_bytes
        wrong = np.flatnonzero((sizes <= 0) | (sizes % self.dtype.itemsize != 0))
        if len(wrong):
            file = files[wrong[0]]
            raise UserError(f'{self.folder / file.name} has {file.bytes:,} bytes, and a token '
                            f'takes {self.dtype.itemsize}; prepare the dataset again')

        return sizes // self.dtype.itemsize

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        start, stop, step = part.indices(len(self))
        if len(self.names) == 1:
            return self.open(0)[start:stop:step]

        window = self.windows(np.array([start]), max(stop - start, 0), self.dtype)[0]
        return window[::step]

    def windows(self, starts: np.ndarray, length: int, dtype: type = np.int64) -> np.ndarray:
        """`length` tokens from each of `starts` on, over the ends of files.

        Returns an array of shape (len(starts), length).
        """
        if len(self.names) == 1:                    # a quarter faster than the loop
            tokens = self.open(0)
            shape = (len(tokens) - length + 1, length)
            # numpy's sliding_window_view makes the same view, in twenty times as long
            windows = np.ndarray(shape, tokens.dtype, tokens, strides=2 * tokens.strides)
            return windows[starts].astype(dtype, copy=False)

        windows = np.empty((len(starts), length), dtype)
        numbers = np.searchsorted(self.ends, starts, 'right').tolist()
        for window, start, number in zip(windows, starts.tolist(), numbers):
            self.read_into(window, start, number)
        return windows

    def read_into(self, window, start, number):
        """Fill the array `window` with the tokens from `start` on, which lies in file `number`."""
        while len(window):
            begin = start - self.begins[number]
            part = self.open(number)[begin:begin + len(window)]
            window[:len(part)] = part

            # What is left of the window lies in the next file.
            window = window[len(part):]
            start += len(part)
            number += 1

    def locate(self, position: int) -> tuple[Path, int]:
        """(path, position in that file) of a token of the stream."""
        number = int(np.searchsorted(self.ends, position, 'right'))
        return self.folder / self.names[number], int(position) - self.begins[number]

    def find(self, token: int, start: int, stop: int) -> int | None:
        """The position of the first `token` in stream[start:stop], or None."""
        length = 1024
        while start < stop:
            found = np.flatnonzero(self[start:min(start + length, stop)] == token)
            if len(found):
                return start + int(found[0])

            # Each step looks further, as long searches are faster in large pieces.
            start += length
            length = min(2 * length, 1 << 16)
        return None

    def sample(self) -> tuple[np.ndarray, np.ndarray]:
        """(positions, ids) of evenly spaced blocks of tokens: (blocks,) and (blocks, tokens)."""
        last = max(0, len(self) - SAMPLED_TOKENS)
        starts = np.arange(SAMPLED_BLOCKS) * last // (SAMPLED_BLOCKS - 1)
        return starts, self.windows(starts, min(len(self), SAMPLED_TOKENS))


# Checks

def check_split(stream: TokenStream, split: str, vocab_size: int, expected: dict) -> str:
    """Check the ids of a split, and return its digest.

    expected: {name: sha256} of meta.json. Raises UserError for an id beyond the vocabulary, and
    where meta.json describes other files.
    """
    contents = read_split(stream, split, expected)
    if contents.largest >= vocab_size:
        raise UserError(f'{contents.path}: token {contents.position:,} has id {contents.largest}, '
                        f'beyond the vocabulary of {vocab_size}; prepare the dataset again')
    return contents.digest


def read_split(stream: TokenStream, split: str, expected: dict) -> Contents:
    """The Contents of a split.

    One file is read as a whole. Of shards, which may be too many to read, evenly spaced blocks are.
    expected: {name: sha256} of meta.json. Raises UserError where meta.json describes other files.
    """
    if len(stream.names) == 1 and not SHARD.fullmatch(stream.names[0]):
        return check_file(stream, expected)
    return check_shards(stream, split, expected)


def check_file(stream, expected):
    """The Contents of a split of one file. Its digest is the file's SHA-256."""
    path = stream.folder / stream.names[0]
    contents = scan(path, stream.format)
    if expected.get(path.name, contents.digest) != contents.digest:
        raise UserError(f'{path} is not the file that meta.json describes; prepare the dataset '
                        f'again')
    return contents


def check_shards(stream, split, expected):
    """The Contents of a sample of a split's shards.

    Its digest is that of the sampled ids, of the number of tokens and, where meta.json has them, of
    the shards' digests.
    """
    shards = {name for name in expected if SHARD.fullmatch(name)}
    described = {name for name in shards if split_of(name) == split}
    if described and described != set(stream.names):
        raise UserError(f'{stream.folder} has {len(stream.names):,} shards of {split}, which are '
                        f'not the {len(described):,} that meta.json describes; prepare the dataset '
                        f'again')

    starts, ids = stream.sample()
    facts = [len(stream), [str(expected[name]) for name in stream.names if name in expected]]
    digest = hashlib.sha256(json.dumps(facts).encode() + ids.astype('<u4').tobytes()).hexdigest()

    block, place = np.unravel_index(ids.argmax(), ids.shape)
    path, position = stream.locate(starts[block] + place)
    return Contents(digest, int(ids[block, place]), path, position)


def scan(path, file_format):
    """The Contents of a token file, which is read as a whole.

    The result is cached in NAME.checked.json beside the file. The cache's key is the file's inode,
    size and times of change: a file that was replaced or written to is read again.
    """
    stat = path.stat()
    key = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if file_format != FileFormat('uint16', 0):      # meta.json may change what the bytes mean
        key += [DTYPES[file_format.dtype].itemsize, file_format.header_bytes]

    cache = path.with_name(path.name.removesuffix('.bin') + '.checked.json')
    contents = read_cache(cache, key, path)
    if contents is None:
        contents = read_contents(path, file_format)
        write_cache(cache, key, contents)
    return contents


def read_cache(cache, key, path):
    """The Contents of the token file `path` that the file `cache` has for this key, or None."""
    try:
        if not cache.is_file():
            return None
        cached = json.loads(cache.read_text(encoding='utf-8'))
        digest = cached['sha256']
        largest = cached['largest']
        position = cached['position']
        is_of_file = cached['key'] == key
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None                                 # a damaged cache is no cache

    has_types = [type(value) for value in (digest, largest, position)] == [str, int, int]
    if is_of_file and has_types and len(digest) == 64:
        return Contents(digest, largest, path, position)
    return None


def write_cache(cache, key, contents):
    """Note the Contents for `read_cache`. A folder that cannot be written is read each time."""
    values = dict(key=key, sha256=contents.digest, largest=contents.largest,
                  position=contents.position)
    try:
        with atomic_write(cache) as file:
            json.dump(values, file)
    except OSError:
        pass


def read_contents(path, file_format):
    """The Contents of a token file, read from its first byte to its last."""
    digest = hashlib.sha256()

    # The largest id, and where it is
    largest = -1
    position = -1
    done = 0                                        # tokens read so far

    with open(path, 'rb') as file:
        digest.update(file.read(file_format.header_bytes))
        while chunk := file.read(SCANNED_BYTES):
            digest.update(chunk)
            ids = np.frombuffer(chunk, DTYPES[file_format.dtype])

            if ids.max() > largest:
                largest = int(ids.max())
                position = done + int(ids.argmax())
            done += len(ids)
    return Contents(digest.hexdigest(), largest, path, position)
