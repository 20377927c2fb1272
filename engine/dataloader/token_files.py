"""The token files of a split, one or many, as one stream of tokens.

A split is one file, train.bin, or numbered shards: train_000001.bin, or PREFIX_train_000001.bin. A file
holds ids, little-endian uint16 or uint32. llm.c's files begin with a header of 1,024 bytes, as int32: a
magic number, a version, and the number of tokens.
"""

import hashlib
import json
import mmap
import os
import re
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError

SPLITS = ('train', 'val')
DTYPES = {'uint16': np.dtype('<u2'), 'uint32': np.dtype('<u4')}
SHARD = re.compile(r'((?:.+_)?)(train|val)_(\d+)\.bin')
REPLACING = 'replacing.json'        # there while prepare.py replaces the shards of a folder
HEADER_BYTES = 1024
PUBLISHED = {(20240520, 1): 'uint16', (20240801, 7): 'uint32'}      # magic and version of llm.c's files
OPEN_SHARDS = 4096          # memory maps that a stream keeps open at most; each takes a file descriptor
SAMPLED_BLOCKS, SAMPLED_TOKENS = 64, 1024       # of a sharded split, read at the start


class TokenFile(NamedTuple):
    name: str
    bytes: int
    inode: int = 0          # 0 where the system has none


def token_dtype(vocab_size):
    """The name of the type that token files have: 'uint16', or 'uint32' for more than 65,536 ids."""
    return 'uint16' if vocab_size <= 1 << 16 else 'uint32'


def find_token_files(folder):
    """{'train': [TokenFile], 'val': ...} of the token files in `folder`, shards in the order of their numbers.

    Raises UserError for a split that is both one file and shards, for shards of several prefixes, and for a name that
    is not a regular file.
    """
    found, keys = {split: [] for split in SPLITS}, {}
    for entry in os.scandir(folder) if folder.is_dir() else ():
        match = SHARD.fullmatch(entry.name)
        split = match[2] if match else entry.name.removesuffix('.bin')
        if not match and entry.name not in ('train.bin', 'val.bin'):
            continue
        if not entry.is_file():
            raise UserError(f'{entry.path} is not a file; remove it, or prepare the dataset again')
        keys[entry.name] = (match[1], int(match[3])) if match else ()
        found[split].append(TokenFile(entry.name, entry.stat().st_size, entry.stat().st_ino))
    for files in found.values():
        files.sort(key=lambda file: (keys[file.name], file.name))
        first, last = (files[0].name, files[-1].name) if files else ('', '')
        if first != last and keys[first][:1] != keys[last][:1]:         # an empty key is a split of one file
            raise UserError(f'{folder} holds {first} and {last}, which are not of one dataset; move one of them away')
    return found


def read_header(path):
    """(dtype, bytes before the tokens) of llm.c's files, else None. UserError where the header gives another size."""
    with open(path, 'rb') as file:
        return parse_header(path, file.read(12), os.fstat(file.fileno()).st_size)


def parse_header(path, start, size):
    """The same, of a file that begins with the bytes `start`."""
    magic, version, tokens = np.frombuffer(start.ljust(12, b'\0'), '<i4').tolist()
    if (magic, version) not in PUBLISHED:
        return None
    dtype = PUBLISHED[magic, version]
    if size != HEADER_BYTES + tokens * DTYPES[dtype].itemsize:
        raise UserError(f'{path} has {size:,} bytes, which do not fit the {tokens:,} tokens of its header; download it '
                        f'again')
    return dtype, HEADER_BYTES


def shard_opener(folder, files, counts, file_format):
    """A function that returns the tokens of file number `number` as an array over a memory map, and keeps the latest maps.
    It raises RunError for a file that is no longer the same, or of another format than the first."""
    def open_shard(number):
        path, (dtype, header_bytes) = folder / files[number].name, file_format
        try:
            with open(path, 'rb') as file:
                tokens = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if files[number].inode not in (0, os.fstat(file.fileno()).st_ino):
                    raise UserError('it was replaced')
            if (parse_header(path, tokens[:12], len(tokens)) or (dtype, 0)) != file_format:
                raise UserError(f'it has another format than {files[0].name}')
            return np.frombuffer(tokens, DTYPES[dtype], counts[number], header_bytes)   # np.memmap is ten times slower
        except (OSError, ValueError) as error:
            raise RunError(f'{path} cannot be read: {error}; restore it, and go on with --init_from=resume') from None
    return lru_cache(maxsize=min(OPEN_SHARDS, open_files_limit() // 8))(open_shard)


def open_files_limit():
    """How many files this process may open: often 1,024, and 256 on macOS."""
    try:
        from resource import RLIMIT_NOFILE, getrlimit
    except ImportError:             # Windows
        return 512
    limit = getrlimit(RLIMIT_NOFILE)[0]
    return limit if limit >= 0 else 8 * OPEN_SHARDS     # negative: no limit


class TokenStream:
    """The tokens of `files`, [TokenFile] in `folder`, one after the other. `len` and slices are those of an array.

    dtype: 'uint16' or 'uint32', where the files have no header. At the start only the first file is
    opened. Raises UserError for files that cannot be tokens.
    """

    def __init__(self, folder, files, dtype):
        self.folder, self.names = folder, [file.name for file in files]
        self.format = read_header(folder / self.names[0]) or (dtype, 0)
        self.dtype, self.header_bytes = DTYPES[self.format[0]], self.format[1]
        sizes = np.array([file.bytes for file in files], np.int64) - self.header_bytes
        for i in np.flatnonzero((sizes <= 0) | (sizes % self.dtype.itemsize != 0))[:1]:
            raise UserError(f'{folder / self.names[i]} has {files[i].bytes:,} bytes, and a token takes '
                            f'{self.dtype.itemsize}; prepare the dataset again')
        counts = sizes // self.dtype.itemsize
        self.ends = np.cumsum(counts)                           # where each file ends in the stream
        self.begins, self.counts = (self.ends - counts).tolist(), counts.tolist()
        # The cache holds no reference to the stream, so dropping the stream closes its files at once.
        self.open = shard_opener(folder, files, self.counts, self.format)
        if len(files) == 1:
            self.open(0)                                        # for good: it stays the same if the file is replaced

    def __len__(self):
        return int(self.ends[-1])

    def __getitem__(self, part):
        start, stop, step = part.indices(len(self))
        if len(self.names) == 1:
            return self.open(0)[start:stop:step]
        return self.windows(np.array([start]), max(stop - start, 0), self.dtype)[0][::step]

    def windows(self, starts, length, dtype=np.int64):
        """`length` tokens from each of `starts` on, over the ends of files. (len(starts), length)"""
        if len(self.names) == 1:                                # a quarter faster than the loop
            return np.lib.stride_tricks.sliding_window_view(self.open(0), length)[starts].astype(dtype)
        windows = np.empty((len(starts), length), dtype)
        numbers = np.searchsorted(self.ends, starts, 'right').tolist()
        for window, start, number in zip(windows, starts.tolist(), numbers):
            while len(window):
                begin = start - self.begins[number]
                part = self.open(number)[begin:begin + len(window)]
                window[:len(part)] = part
                window, start, number = window[len(part):], start + len(part), number + 1
        return windows

    def locate(self, position):
        """(path, position in that file) of a token of the stream."""
        number = int(np.searchsorted(self.ends, position, 'right'))
        return self.folder / self.names[number], int(position) - self.begins[number]

    def find(self, token, start, stop):
        """The position of the first `token` in stream[start:stop], or None."""
        length = 1024
        while start < stop:
            found = np.flatnonzero(self[start:min(start + length, stop)] == token)
            if len(found):
                return start + int(found[0])
            start, length = start + length, min(2 * length, 1 << 16)
        return None

    def sample(self):
        """(positions, ids) of evenly spaced blocks of the stream: (blocks,) and (blocks, tokens)."""
        last = max(0, len(self) - SAMPLED_TOKENS)
        starts = np.arange(SAMPLED_BLOCKS) * last // (SAMPLED_BLOCKS - 1)
        return starts, self.windows(starts, min(len(self), SAMPLED_TOKENS))


def check_split(stream, split, vocab_size, expected):
    """The digest of a split, after its ids were checked.

    One file is read as a whole. Of shards, which may be too many to read, evenly spaced blocks are: the
    digest is that of their ids, the number of tokens and, where meta.json has them, the shards' digests.
    expected: {name: sha256} of meta.json. UserError for an id beyond the vocabulary, and where meta.json
    describes other files.
    """
    if stream.names == [f'{split}.bin']:
        path = stream.folder / stream.names[0]
        digest, largest, position = scan(path, stream.dtype, stream.header_bytes)
        if expected.get(path.name, digest) != digest:
            raise UserError(f'{path} is not the file that meta.json describes; prepare the dataset again')
    else:
        described = [name for name in expected if (match := SHARD.fullmatch(name)) and match[2] == split]
        if described and set(described) != set(stream.names):
            raise UserError(f'{stream.folder} has {len(stream.names):,} shards of {split}, which are not the '
                            f'{len(described):,} that meta.json describes; prepare the dataset again')
        starts, ids = stream.sample()
        facts = [len(stream), [str(expected[name]) for name in stream.names if name in expected]]
        digest = hashlib.sha256(json.dumps(facts).encode() + ids.astype('<u4').tobytes()).hexdigest()
        block, place = np.unravel_index(ids.argmax(), ids.shape)
        largest = int(ids[block, place])
        path, position = stream.locate(starts[block] + place)
    if largest >= vocab_size:
        raise UserError(f'{path}: token {position:,} has id {largest}, beyond the vocabulary of '
                        f'{vocab_size}; prepare the dataset again')
    return digest


def scan(path, dtype, header_bytes):
    """(sha256 of the file, its largest id, the position of that id).

    The result is cached in NAME.checked.json beside the file. The cache's key is the file's inode,
    size and times of change: a file that was replaced or written to is read again.
    """
    stat = path.stat()
    key = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    if dtype.itemsize != 2 or header_bytes:
        key += [dtype.itemsize, header_bytes]       # meta.json may change what the bytes mean
    cache = path.with_suffix('.checked.json')
    try:
        cached = json.loads(cache.read_text(encoding='utf-8')) if cache.is_file() else {}
        values = cached['sha256'], cached['largest'], cached['position']
        if cached['key'] == key and [type(value) for value in values] == [str, int, int] and len(values[0]) == 64:
            return values
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass                                                    # no cache, or a damaged one
    digest, largest, position, done = hashlib.sha256(), -1, -1, 0
    with open(path, 'rb') as file:
        digest.update(file.read(header_bytes))
        while chunk := file.read(1 << 24):
            digest.update(chunk)
            ids = np.frombuffer(chunk, dtype)
            if ids.max() > largest:
                largest, position = int(ids.max()), done + int(ids.argmax())
            done += len(ids)
    values = digest.hexdigest(), largest, position
    try:
        with atomic_write(cache) as file:
            json.dump(dict(zip(('key', 'sha256', 'largest', 'position'), (key, *values))), file)
    except OSError:
        pass                                                    # a folder that cannot be written is read each time
    return values
