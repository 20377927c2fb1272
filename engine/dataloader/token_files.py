"""The token files of a split, one or many, as one stream of tokens.

A split is one file, train.bin, or numbered shards: train_000001.bin, or PREFIX_train_000001.bin.
Files of others may be called PREFIX_train.bin, and end in .npy. engine.dataloader.file_formats says
how a file holds its ids.
"""

import hashlib
import json
import math
import mmap
import os
import re
import shlex
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from engine.atomic_files import atomic_write
from engine.dataloader.file_formats import (
    DTYPES,
    START_BYTES,
    FileFormat,
    explain_large_ids,
    find_width,
    parse_format,
    read_format,
)
from engine.errors import RunError, UserError

SPLITS = ('train', 'val')
TOKEN_DTYPES = ('uint16', 'uint32')
SHARD = re.compile(r'((?:.+_)?)(train|val)_(\d+)\.bin')
REPLACING = 'replacing.json'        # exists while prepare.py replaces the shards of a folder

# The names of token files: prefix, split, number of a shard
NAME = re.compile(r'((?:.+_)?)(train|val)(?:_(\d+))?\.(?:bin|npy)')
# The first of these layouts that a folder has counts, so what lies beside train.bin never does.
LAYOUTS = (
    re.compile(rf'(?:train|val)\.bin|{SHARD.pattern}'),
    re.compile(r'.+_(?:train|val)\.bin'),
    re.compile(r'(?:.+_)?(?:train|val)(?:_\d+)?\.npy'),
)

OPEN_SHARDS = 4096          # most memory maps of one stream; each takes a file descriptor
SAMPLED_BLOCKS = 64         # blocks of a sharded split that are read at the start
SAMPLED_TOKENS = 1024       # tokens in each such block
SCANNED_BYTES = 1 << 24     # bytes of a file that are checked at once


class TokenFile(NamedTuple):
    """A token file as it was found in its folder."""

    name: str
    bytes: int
    inode: int = 0          # 0 where the system has none


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

    entries = list(os.scandir(folder))
    for layout in LAYOUTS:
        for entry in entries:
            if layout.fullmatch(entry.name):
                found[split_of(entry.name)].append(token_file(entry))
        if any(found.values()):
            break

    for files in found.values():
        files.sort(key=lambda file: (name_parts(file.name), file.name))
        check_one_dataset(folder, files)
    return found


def token_file(entry):
    """The TokenFile of an entry of os.scandir. UserError where it is not a regular file."""
    if not entry.is_file():
        raise UserError(f'{entry.path} is not a file; remove it, or prepare the dataset again')
    stat = entry.stat()
    return TokenFile(entry.name, stat.st_size, stat.st_ino)


class NameParts(NamedTuple):
    """What the name of a token file says. Shards are in the order of these."""

    prefix: str
    split: str
    number: int             # of a shard; -1 for the only file of a split


def name_parts(name: str) -> NameParts:
    """The parts of a token file's name, whatever its layout."""
    prefix, split, number = NAME.fullmatch(name).groups()
    if number is None:
        number = -1
    return NameParts(prefix, split, int(number))


def split_of(name: str) -> str:
    """The split of a token file with this name."""
    return name_parts(name).split


def is_shard(name):
    """True for the name of a numbered token file."""
    found = NAME.fullmatch(name)
    return found is not None and found[3] is not None


def check_one_dataset(folder, files):
    """UserError where the sorted `files` of a split are of different kinds or prefixes."""
    if len(files) < 2:
        return

    first = name_parts(files[0].name)
    last = name_parts(files[-1].name)
    is_one_file = min(first.number, last.number) < 0
    if is_one_file or first.prefix != last.prefix:
        first = files[0].name
        last = files[-1].name
        raise UserError(f'{folder} holds {first} and {last}, which are not of one dataset; move '
                        f'one of them away')


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
            if parse_format(path, content[:START_BYTES], len(content), dtype) != file_format:
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

    folder: where the files lie. files: at least one, in order. dtype: a key of DTYPES, which counts
    where the files have no header. Only the first file is opened at the start.
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
        length = min(len(self), SAMPLED_TOKENS)
        return starts, self.windows(starts, length, self.dtype)


# Checks

def check_split(stream: TokenStream, split: str, vocab_size: int, expected: dict) -> str:
    """Check the ids of a split, and return its digest.

    expected: {name: sha256} of meta.json. Raises UserError for an id beyond the vocabulary, and
    where meta.json describes other files.
    """
    contents = read_split(stream, split, expected)
    if contents.largest >= vocab_size:
        cure = vocabulary_cure(stream, contents)
        raise UserError(f'{contents.path}: token {contents.position:,} has id {contents.largest}, '
                        f'beyond the vocabulary of {vocab_size}; {cure}')
    return contents.digest


def vocabulary_cure(stream, contents):
    """What to do about an id beyond the vocabulary, of the Contents of a split."""
    folder = stream.folder
    if any((folder / name).exists() for name in ('meta.json', 'meta.pkl')):
        return 'prepare the dataset again'

    # Without either file, it was taken for a dataset of GPT-2's tokens.
    largest = contents.largest
    meta = {}
    if not stream.format.header_bytes:
        wider = explain_large_ids(contents.path, stream.format.dtype)
        if wider:
            meta['dtype'] = wider.dtype
            largest = wider.largest
    meta = {'vocab_size': 64 * math.ceil((largest + 1) / 64)} | meta
    return (f'no meta.json says whose ids they are; name their tokenizer with: python '
            f'data/text/prepare.py --token_files={shlex.quote(str(folder))} --tokenizer=FOLDER, or '
            f'write {json.dumps(meta)} to {folder / "meta.json"}, with the size of their '
            f'vocabulary')


def find_dtype(folder: Path, files: Sequence[TokenFile], dtype: str) -> str:
    """The type that the ids of a split's first file seem to have, where nothing names it.

    dtype: the type of the vocabulary, which a file with a header has.
    """
    path = folder / files[0].name
    if read_format(path, dtype).header_bytes:
        return dtype
    return find_width(path, dtype) or dtype


def check_width(folder: Path, files: Sequence[TokenFile], dtype: str) -> None:
    """UserError where the ids of a split seem to be wider than those of `dtype`.

    The arguments are those of find_dtype.
    """
    wider = find_dtype(folder, files, dtype)
    if wider == dtype:
        return

    file = files[0]
    width = DTYPES[wider].itemsize
    parts = width // DTYPES[dtype].itemsize
    text = (f'{folder / file.name} looks like {wider}: as {dtype}, {1 - 1 / parts:.0%} of its '
            f'numbers are 0')
    if file.bytes % width:
        raise UserError(f'{text}, and its {file.bytes:,} bytes are no multiple of {width}; copy it '
                        f'again, whole')

    meta = folder / 'meta.json'
    if meta.exists():
        raise UserError(f'{text}; add "dtype": "{wider}" to {meta}, or "dtype": "{dtype}" if the '
                        f'zeros are ids')
    raise UserError(f'{text}; write {{"dtype": "{wider}"}} to {meta}, or {{"dtype": "{dtype}"}} if '
                    f'the zeros are ids')


def read_split(stream: TokenStream, split: str, expected: dict) -> Contents:
    """The Contents of a split.

    One file is read as a whole. Of shards, which may be too many to read, evenly spaced blocks are.
    expected: {name: sha256} of meta.json. Raises UserError where meta.json describes other files.
    """
    if len(stream.names) == 1 and not is_shard(stream.names[0]):
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
    shards = {name for name in expected if is_shard(name)}
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
