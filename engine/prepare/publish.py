"""What a prepare run leaves in a dataset's folder before it is finished, and how the next run uses it.

The files have names ending in .part until all are written. unfinished.json is the journal: how
much of them is on disk, with a SHA-256 of it. Once they are whole, the journal also holds the
tokenizer's spec, and the .part files replace the earlier dataset.
"""

import errno
import hashlib
import json
import os
import re
import signal
import sys
from contextlib import contextmanager, suppress

from filelock import FileLock, Timeout
from tqdm import tqdm

from engine.atomic_files import atomic_write
from engine.dataloader.token_files import (
    DTYPES,
    REPLACING,
    SHARD,
    SPLITS,
    find_token_files,
)
from engine.errors import RunError, UserError

FILES = ('meta.json', 'meta.pkl', 'val.bin', 'train.bin')   # in the order in which they are replaced


def hash_start(path, size, sha256=None):
    """The hash object of a file's first `size` bytes, or None if the file is shorter or their digest is not `sha256`."""
    digest, done = hashlib.sha256(), 0
    with (suppress(FileNotFoundError), open(path, 'rb') as file,
          tqdm(desc=f'checking {path.name}', total=size, unit='B', unit_scale=True, delay=1, disable=None) as bar):
        while block := file.read(min(1 << 20, size - done)):
            digest.update(block)
            done += len(block)
            bar.update(len(block))
    return digest if done == size and sha256 in (None, digest.hexdigest()) else None


def ready_folder(folder, key):
    """Where the shards made for `key` lie before they replace the dataset in `folder`."""
    return folder / 'unfinished' / key[:16]


def replace_with_shards(folder, meta):
    """Rename the shards that `meta` names over the dataset in `folder`, and write meta.json last.

    replacing.json, which holds `meta` meanwhile, makes engine.dataloader refuse the folder. After a kill,
    complete_shards() goes on from it.
    """
    with atomic_write(folder / REPLACING) as file:
        json.dump(meta, file)
    for name in FILES:
        (folder / name).unlink(missing_ok=True)
    for files in find_token_files(folder).values():
        for name in (file.name for file in files):
            if not SHARD.fullmatch(name)[1] and name not in meta['sha256']:
                (folder / name).unlink()                # of an earlier dataset that had more shards
    for name in meta['sha256']:
        if (ready_folder(folder, meta['source']) / name).exists():
            os.replace(ready_folder(folder, meta['source']) / name, folder / name)
    with atomic_write(folder / 'meta.json') as file:    # syncs the folder
        json.dump(meta, file)
    (folder / REPLACING).unlink()


def complete_shards(folder, key):
    """Complete the replacement that a killed run began. True where the folder then holds the shards made for `key`.
    Without all of its shards, replacing.json stays, and so the folder is refused, until another dataset is whole."""
    meta = read_shards_meta(folder / REPLACING)
    if meta:
        places = {name: ready_folder(folder, meta['source']) / name for name in meta['sha256']}
        places = {name: path if path.exists() else folder / name for name, path in places.items()}
        if all(path.is_file() and hash_start(path, path.stat().st_size, meta['sha256'][name])
               for name, path in places.items()):
            replace_with_shards(folder, meta)
    meta = read_shards_meta(folder / 'meta.json')
    if not meta or meta['source'] != key or (folder / REPLACING).exists():
        return False
    files = [file for files in find_token_files(folder).values() for file in files]
    return ({file.name for file in files} == set(meta['sha256']) and sum(file.bytes for file in files)
            == sum(meta['tokens'][split] for split in SPLITS) * DTYPES[meta['dtype']].itemsize)


def read_shards_meta(path):
    """The content of meta.json of our own shards, or None."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        meta = json.loads(path.read_text(encoding='utf-8'))
        counts_are_numbers = all(type(meta['tokens'][split]) is int for split in SPLITS)
        if (re.fullmatch('[0-9a-f]{64}', meta['source']) and DTYPES[meta['dtype']] and counts_are_numbers
                and all(SHARD.fullmatch(name) for name in meta['sha256'])):
            return meta
    return None


@contextmanager
def write_lock(path, wait=False):
    """Hold the lock file `path` while the block writes to its folder. SIGTERM ends the block with SystemExit.

    Raises UserError where another process holds the lock, unless `wait`, and RunError for a full disk.
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
        raise RunError(f'{path.parent} cannot hold the dataset ({error.strerror}). It takes 2 bytes per token, or 4 for '
                       f'more than 65,536 ids, and an earlier one stays until it is whole; free some space and run '
                       f'again') from None
    finally:
        signal.signal(signal.SIGTERM, before)
        if not wait:                                    # those who wait hold the file open, and need it to stay
            with suppress(OSError):
                path.unlink()                           # while it is held; on Windows filelock removes it
        lock.release()
