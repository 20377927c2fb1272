"""Replaces the dataset in a folder with a new one, so that a kill at any moment loses neither.

A writer makes the files of a dataset under other names first. Then it writes a journal, from which
the content of the new meta.json follows. From that moment on the new dataset is whole: Replacement
renames its files over the earlier ones, and if a kill ends it halfway, the next run completes it.

If a split is one file, the new files lie beside the old ones, with names that end in .part. The
journal is unfinished.json. The old train.bin is removed first, and the new one is renamed last, so
whoever finds a train.bin finds the other files of the same run.

If a split is shards, the new files lie in unfinished/. No single name tells a reader that all
shards are there. So engine.dataloader refuses the folder while the journal, replacing.json, is in
it.
"""

import errno
import hashlib
import json
import os
import pickle
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.atomic_files import atomic_write, sync_folder
from engine.dataloader.token_files import (
    DTYPES,
    REPLACING,
    SHARD,
    SPLITS,
    TOKEN_DTYPES,
    find_token_files,
)
from engine.errors import RunError, UserError
from engine.tokenizer import DatasetMeta

JOURNAL = 'unfinished.json'         # of a dataset with one file a split


@dataclass
class Replacement:
    """A new dataset that is whole under other names, and that replaces the one in `folder`.

    write_meta() comes first, then the writer's journal, then rename_files().
    """
    folder: Path
    meta: DatasetMeta       # the content of the new meta.json

    @property
    def has_shards(self) -> bool:
        return 'train.bin' not in self.meta.sha256

    @property
    def journal(self) -> Path:
        """The file that tells the next run of this replacement."""
        return self.folder / (REPLACING if self.has_shards else JOURNAL)

    def staged(self, name: str) -> Path:
        """Where a new file lies until it is renamed to `name`."""
        if self.has_shards:
            return ready_folder(self.folder, self.meta.source) / name
        return self.folder / f'{name}.part'

    def new_names(self) -> list[str]:
        """The names of the new files, in the order of their renaming: train.bin is the last."""
        names = ['meta.json']
        if self.meta.spec.kind == 'char':
            names.append('meta.pkl')
        return names + sorted(self.meta.sha256, reverse=True)

    def obsolete_names(self) -> list[str]:
        """The names of files of an earlier dataset that no new file has."""
        old = ['train.bin', 'val.bin', 'train.mask', 'val.mask', 'meta.pkl']
        if self.has_shards:
            old += own_shards(self.folder)          # the earlier dataset may have had more of them

        new = set(self.new_names())
        return [name for name in old if name not in new]

    def write_meta(self):
        """Write meta.json, and meta.pkl for a character vocabulary, where they wait."""
        path = self.staged('meta.json')
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.meta.to_dict())

        path = self.staged('meta.pkl')
        if self.meta.spec.kind == 'char':
            with atomic_write(path, 'wb') as file:
                pickle.dump(nanogpt_meta(self.meta.spec.chars), file, protocol=2)
        else:
            path.unlink(missing_ok=True)

    def rename_files(self):
        """Rename the new files over the earlier dataset. After a kill, call it again."""
        waiting = [name for name in self.new_names() if self.staged(name).exists()]

        # remove the old files, train.bin before anything else changes
        if 'train.bin' in waiting:
            (self.folder / 'train.bin').unlink(missing_ok=True)
        for name in self.obsolete_names():
            (self.folder / name).unlink(missing_ok=True)

        for name in waiting:
            os.replace(self.staged(name), self.folder / name)

        # Without the journal, nothing completes the rest, so the names are on disk first.
        sync_folder(self.folder)
        self.journal.unlink(missing_ok=True)

    def complete(self) -> bool:
        """Go on after a kill. False if a file of the new dataset is missing or damaged."""
        for name, sha256 in self.meta.sha256.items():
            path = self.staged(name)
            if not path.exists():
                path = self.folder / name           # the killed run has renamed it
            if not path.is_file() or not hash_start(path, path.stat().st_size, sha256):
                return False

        self.write_meta()
        self.rename_files()
        return True


def nanogpt_meta(chars):
    """The content of nanoGPT's meta.pkl for a character vocabulary."""
    itos = dict(enumerate(chars))
    stoi = {char: i for i, char in itos.items()}
    return dict(vocab_size=len(itos), itos=itos, stoi=stoi)


# Shards

def ready_folder(folder: Path, key: str) -> Path:
    """Where the shards made for `key` lie before they replace the dataset in `folder`."""
    return folder / 'unfinished' / key[:16]


def is_own_shard(name: str) -> bool:
    """True for the name of a shard as ShardWriter writes it. Those of others may have a prefix."""
    match = SHARD.fullmatch(name)
    return match is not None and match[1] == ''


def own_shards(folder):
    """The names of the shards in `folder` that have no prefix."""
    return [path.name for path in folder.iterdir() if is_own_shard(path.name)]


def replace_with_shards(folder: Path, meta: DatasetMeta):
    """Replace the dataset in `folder` with the shards that wait in its ready_folder().

    meta: the content of meta.json, which names the shards.
    """
    replacement = Replacement(folder, meta)
    replacement.write_meta()
    write_json(replacement.journal, meta.to_dict())
    replacement.rename_files()


def complete_shards(folder: Path, key: str) -> bool:
    """Complete the replacement that a killed run began.

    Returns True if the folder then has the shards that were made for `key`.
    If a shard is missing, replacing.json stays, and so the folder is refused, until another
    dataset is whole.
    """
    begun = read_json(folder / REPLACING, check_shards_meta)
    if begun:
        Replacement(folder, begun).complete()

    meta = read_json(folder / 'meta.json', check_shards_meta)
    if not meta or meta.source != key or (folder / REPLACING).exists():
        return False

    # no shard is missing or cut
    files = [file for split in find_token_files(folder).values() for file in split]
    tokens = sum(meta.tokens[split] for split in SPLITS)
    size = tokens * DTYPES[meta.dtype].itemsize
    return ({file.name for file in files} == set(meta.sha256)
            and sum(file.bytes for file in files) == size)


def check_shards_meta(content):
    """The DatasetMeta that `content` is, if it can be that of our own shards.

    Raises ValueError, KeyError or TypeError otherwise.
    """
    meta = DatasetMeta.from_dict(content)

    if not re.fullmatch('[0-9a-f]{64}', meta.source) or meta.dtype not in TOKEN_DTYPES:
        raise ValueError('no shards of ours')

    if not all(type(meta.tokens[split]) is int for split in SPLITS):
        raise ValueError('a number of tokens is none')

    if type(meta.sha256) is not dict:
        raise ValueError('there are no digests')
    for name, digest in meta.sha256.items():
        if not is_own_shard(name) or type(digest) is not str:
            raise ValueError('a shard is impossible')

    return meta


# What both writers use

def hash_start(path: Path, size: int, sha256: str | None = None):
    """The hash object of a file's first `size` bytes.

    None if the file is missing or shorter, or if their digest is not `sha256`.
    """
    digest = hashlib.sha256()
    done = 0
    with (suppress(FileNotFoundError), open(path, 'rb') as file,
          tqdm(desc=f'checking {path.name}', total=size, unit='B', unit_scale=True, delay=1,
               disable=None) as bar):
        while block := file.read(min(1 << 20, size - done)):
            digest.update(block)
            done += len(block)
            bar.update(len(block))

    if done != size or sha256 not in (None, digest.hexdigest()):
        return None
    return digest


def read_json(path: Path, check: Callable):
    """check(content) of a JSON file.

    None if the file is missing, is not JSON, or has content for which `check` raises ValueError,
    KeyError or TypeError: the file may be damaged, or somebody else's.
    """
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        return check(json.loads(path.read_text(encoding='utf-8')))
    return None


def write_json(path: Path, content: dict):
    """Write `content` to `path`, which is on disk afterwards."""
    with atomic_write(path) as file:
        json.dump(content, file)


@contextmanager
def write_lock(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while the block writes to its folder.

    SIGTERM ends the block with SystemExit. Raises UserError if another process holds the lock,
    unless `wait`, and RunError for a full disk.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise UserError(f'another run is writing {path.parent}; wait for it, or stop it') from None

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise RunError(
            f'{path.parent} cannot hold the dataset ({error.strerror}). It takes 2 bytes per '
            f'token, or 4 for more than 65,536 ids, and an earlier one stays until it is whole; '
            f'free some space and run again') from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if not wait:                # those who wait hold the file open, and need it to stay
            with suppress(OSError):
                path.unlink()       # while it is held; on Windows filelock removes it
        lock.release()
