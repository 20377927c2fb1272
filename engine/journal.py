"""What a prepare run leaves in a dataset's folder before it is finished, and how the next run uses it.

The files have names ending in .part until all are written. unfinished.json is the journal: how
much of them is on disk, with a SHA-256 of it. Once they are whole, the journal also holds the
tokenizer's spec, and the .part files replace the earlier dataset.
"""

import hashlib
import json
import os
import pickle
import re
from contextlib import suppress

from tqdm import tqdm

from engine.errors import UserError
from engine.files import atomic_write, sync_folder
from engine.shards import DTYPES, REPLACING, SHARD, SPLITS, find_token_files, token_dtype
from engine.tokenizer import check_spec

FILES = ('meta.json', 'meta.pkl', 'val.bin', 'train.bin')   # in the order in which they are replaced
JOURNAL = 'unfinished.json'


def read_journal(folder):
    """The journal of a killed run, if there is one and its numbers are possible; else None."""
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        journal = json.loads((folder / JOURNAL).read_text(encoding='utf-8'))
        sizes = [journal['bytes'][split] for split in SPLITS]
        numbers_are_possible = all(type(n) is int and n >= 0 for n in (journal['documents'], *sizes))
        fields_are_there = 'key' in journal and all(split in journal['sha256'] for split in SPLITS)
        if numbers_are_possible and fields_are_there and not any(size % 2 for size in sizes):
            return journal
    return None


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


def describe_dataset(journal):
    """The content of meta.json for the dataset that a journal with a tokenizer describes."""
    dtype = token_dtype(journal['tokenizer']['vocab_size'])
    return dict(journal['tokenizer'], dtype=dtype,
                tokens={split: journal['bytes'][split] // DTYPES[dtype].itemsize for split in SPLITS},
                sha256={f'{split}.bin': journal['sha256'][split] for split in SPLITS})


def write_meta_parts(folder, meta):
    """Write meta.json.part, and meta.pkl.part for a character vocabulary."""
    with atomic_write(folder / 'meta.json.part') as file:
        json.dump(meta, file)
    if meta['tokenizer'] == 'char':
        itos = dict(enumerate(meta['chars']))
        stoi = {char: i for i, char in itos.items()}
        with atomic_write(folder / 'meta.pkl.part', 'wb') as file:
            pickle.dump(dict(vocab_size=len(itos), itos=itos, stoi=stoi), file, protocol=2)
    else:
        (folder / 'meta.pkl.part').unlink(missing_ok=True)


def replace_dataset(folder):
    """Rename the .part files over the earlier dataset. Calling it again completes it after a kill.

    train.bin is removed first and renamed last, so whoever finds one finds the val.bin and meta.json
    of the same run beside it.
    """
    if (folder / 'train.bin.part').exists():
        (folder / 'train.bin').unlink(missing_ok=True)
        if not (folder / 'meta.pkl.part').exists():
            (folder / 'meta.pkl').unlink(missing_ok=True)       # of an earlier character dataset
    for name in FILES:
        if (folder / f'{name}.part').exists():
            os.replace(folder / f'{name}.part', folder / name)
    sync_folder(folder)                 # before the journal goes: without it nothing completes the rest
    (folder / JOURNAL).unlink(missing_ok=True)


def complete_replacement(folder):
    """Complete the replacement that a killed run began, and return its journal; else None.
    A replacement whose files are damaged is not completed."""
    journal = read_journal(folder)
    if not journal or 'tokenizer' not in journal:
        return None
    for split in SPLITS:
        part, final = folder / f'{split}.bin.part', folder / f'{split}.bin'
        path = part if part.exists() else final
        if not hash_start(path, journal['bytes'][split], journal['sha256'][split]):
            return None
    try:
        check_spec(journal['tokenizer'])
    except UserError:
        return None
    write_meta_parts(folder, describe_dataset(journal))
    replace_dataset(folder)
    return journal


def remove_unfinished(folder):
    """Remove the journal, and then the files that it describes."""
    for name in (JOURNAL, *(f'{file}.part' for file in FILES)):
        for path in (folder / f'{name}.tmp', folder / name):
            path.unlink(missing_ok=True)


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
