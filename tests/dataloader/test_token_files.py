"""Token files of every layout, read as one stream."""

import json
import os
import shutil
import struct

import numpy as np
import pytest

from engine.dataloader import batches as dataloader
from engine.dataloader import token_files
from engine.dataloader.batches import TokenDataset
from engine.errors import RunError, UserError

TRAIN = np.random.default_rng(0).integers(0, 50257, 5000)
VAL = np.random.default_rng(1).integers(0, 50257, 700)
TYPES = {'uint16': ('<u2', 20240520, 1), 'uint32': ('<u4', 20240801, 7)}


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    return tmp_path


def write_plain(folder, dtype='uint16'):
    """The tokens as train.bin and val.bin."""
    folder.mkdir(exist_ok=True)
    for split, tokens in (('train', TRAIN), ('val', VAL)):
        tokens.astype(TYPES[dtype][0]).tofile(folder / f'{split}.bin')


def write_meta(folder, **fields):
    meta = dict(tokenizer='gpt2', vocab_size=50257, **fields)
    (folder / 'meta.json').write_text(json.dumps(meta))


def write_shards(folder, size, dtype='uint16', prefix='', header=False, digits=6):
    """The tokens in shards of `size` tokens.

    With `header` as llm.c publishes them: 256 int32, then the ids.
    """
    folder.mkdir(exist_ok=True)
    kind, magic, version = TYPES[dtype]
    for split, tokens in (('train', TRAIN), ('val', VAL)):
        for number, begin in enumerate(range(0, len(tokens), size)):
            part = tokens[begin:begin + size].astype(kind)
            content = part.tobytes()
            if header:
                content = make_header(len(part), magic, version) + content
            (folder / f'{prefix}{split}_{number:0{digits}}.bin').write_bytes(content)


def make_header(tokens, magic=20240520, version=1):
    return struct.pack('<256i', magic, version, tokens, *[0] * 253)


def open_dataset(name, block_size=64, **options):
    data = TokenDataset(name, **options)
    data.set_block_size(block_size)
    return data


# One stream

@pytest.mark.parametrize('size', [7, 64, 900, 5000])
@pytest.mark.parametrize('layout', [
    dict(),
    dict(dtype='uint32'),
    dict(header=True, prefix='edu_fineweb_'),
    dict(header=True, dtype='uint32', prefix='x_'),
    dict(digits=1),
])
def test_shards_give_the_batches_of_one_file(data, size, layout):
    """Windows run over the ends of shards, and over shards shorter than a window."""
    write_plain(data / 'plain')
    write_shards(data / 'shards', size, **layout)
    if layout == dict(dtype='uint32'):
        write_meta(data / 'shards', dtype='uint32')

    plain = open_dataset('plain')
    sharded = open_dataset('shards')
    assert np.array_equal(sharded.tokens['train'][0:5000], TRAIN)
    assert len(sharded.tokens['val']) == 700
    for stream in ('train', 'eval train', 'eval val'):
        for a, b in zip(plain.batch(5, stream, 30, 200), sharded.batch(5, stream, 30, 200)):
            assert a.equal(b)


@pytest.mark.parametrize('dtype', ['uint16', 'uint32'])
def test_one_file_may_have_32_bits_or_a_header(data, dtype):
    write_plain(data / 'plain')
    write_plain(data / 'wide', 'uint32')
    write_meta(data / 'wide', dtype='uint32')
    write_shards(data / 'published', 5000, dtype, 'p_', header=True)
    for split in ('train', 'val'):
        shard = data / 'published' / f'p_{split}_000000.bin'
        os.rename(shard, data / 'published' / f'{split}.bin')

    expected = open_dataset('plain').batch(1, 'train', 0, 50).y
    for name in ('wide', 'published'):
        dataset = open_dataset(name)
        assert dataset.batch(1, 'train', 0, 50).y.equal(expected)
        assert dataset.tokens['val'][-5:].tolist() == VAL[-5:].tolist()


def test_ids_of_large_vocabularies_take_32_bits():
    for size in (65, 50257, 65536):
        assert token_files.token_dtype(size) == 'uint16'
    for size in (65537, 128256):
        assert token_files.token_dtype(size) == 'uint32'


@pytest.mark.parametrize('start', [0, 1, 999, 4998, 4999, 5000])
def test_slices_and_searches_are_those_of_an_array(data, start):
    write_shards(data / 'shards', 33)
    tokens = TokenDataset('shards').tokens['train']
    assert tokens[start:start + 70].tolist() == TRAIN[start:start + 70].tolist()
    assert tokens[-3:].tolist() == TRAIN[-3:].tolist()
    assert tokens[start:start].tolist() == []

    for stop in (start, min(start + 1, 5000), 3000, 5000):
        for token in (TRAIN[2500], TRAIN[start % 5000], 50256):
            found = [i for i in range(start, stop) if TRAIN[i] == token]
            assert tokens.find(token, start, stop) == (found[0] if found else None)


@pytest.mark.skipif(not os.path.isdir('/proc/self/fd'), reason='only Linux lists the open files')
def test_many_shards_keep_few_files_open(data, monkeypatch):
    monkeypatch.setattr(token_files, 'OPEN_SHARDS', 5)
    write_shards(data / 'shards', 10)
    before = len(os.listdir('/proc/self/fd'))

    dataset = open_dataset('shards')
    for first in range(0, 1000, 50):
        dataset.batch(1, 'train', first, 50)
    assert before < len(os.listdir('/proc/self/fd')) <= before + 2 * 5

    del dataset
    assert len(os.listdir('/proc/self/fd')) == before


# The fingerprint

def test_the_fingerprint_of_shards_is_of_their_content(data):
    write_shards(data / 'a', 100)
    first = TokenDataset('a').fingerprint

    # a copy, of other times
    shutil.copytree(data / 'a', data / 'b')
    os.utime(data / 'b' / 'train_000003.bin', (1, 1))
    assert TokenDataset('b').fingerprint == first

    # another token
    path = data / 'b' / 'val_000000.bin'
    ids = np.fromfile(path, '<u2')
    ids[0] ^= 1
    ids.tofile(path)
    assert TokenDataset('b').fingerprint != first

    # the digests of the shards that prepare.py found
    write_meta(data / 'a', sha256={path.name: 'f' * 64 for path in (data / 'a').glob('*.bin')})
    assert TokenDataset('a').fingerprint != first


# Damage

def test_a_start_opens_few_of_many_shards(data, monkeypatch):
    """An id beyond the vocabulary in a shard that is not sampled ends the run with one line,
    before it is used."""
    monkeypatch.setattr(token_files, 'SAMPLED_BLOCKS', 3)
    monkeypatch.setattr(token_files, 'SAMPLED_TOKENS', 10)
    write_shards(data / 'shards', 100)
    path = data / 'shards' / 'train_000007.bin'
    ids = np.fromfile(path, '<u2')
    ids[31] = 50257
    ids.tofile(path)
    dataset = open_dataset('shards')
    words = 'train_000007.bin is damaged.*id 50257 of token 31 .* vocabulary of 50257'
    with pytest.raises(RunError, match=words):
        dataset.batch(1, 'train', 0, 1000)

    # the last token is always sampled
    path = data / 'shards' / 'val_000006.bin'
    ids = np.fromfile(path, '<u2')
    ids[-1] = 60000
    ids.tofile(path)
    words = 'val_000006.bin: token 99 has id 60000, beyond the vocabulary of 50257'
    with pytest.raises(UserError, match=words):
        TokenDataset('shards')


def write(name, content):
    """A function that writes `content` to the file `name` of a folder."""
    return lambda folder: (folder / name).write_bytes(content)


DAMAGE = [      # what is done to the folder, and a part of the message
    (write('train_000000.bin', b'abc'), 'train_000000.bin has 3 bytes, and a token takes 2'),
    (write('val_000001.bin', b''), 'val_000001.bin has 0 bytes'),
    (write('train.bin', b'ab'), 'holds train.bin and train_000'),
    (write('old_train_000000.bin', b'ab'), 'which are not of one dataset'),
    (lambda folder: (folder / 'train_000099.bin').mkdir(), 'train_000099.bin is not a file'),
    (lambda folder: [path.unlink() for path in folder.glob('val*')],
     'has no train.bin and val.bin'),
    (write('replacing.json', b'{}'), 'is being replaced'),
    (lambda folder: write_meta(folder, dtype='float'), "dtype is 'float'"),
    (lambda folder: write_meta(folder, dtype=[]), 'dtype is'),
    (lambda folder: write_meta(folder, sha256={'train_000000.bin': 'a' * 64}),
     'not the 1 that meta.json describes'),
    (write('train_000000.bin', make_header(900)),
     'train_000000.bin has 1,024 bytes, which do not fit the 900 tokens'),
    (write('train_000000.bin', make_header(-5)), 'do not fit the -5 tokens'),
]


@pytest.mark.parametrize('damage, words', DAMAGE)
def test_damage_that_sizes_and_names_show_is_refused_at_the_start(data, damage, words):
    write_shards(data / 'shards', 100)
    damage(data / 'shards')
    with pytest.raises(UserError, match=words) as error:
        open_dataset('shards')
    assert '\n' not in str(error.value)


def test_a_shard_of_another_format_than_the_first_is_named(data, monkeypatch):
    """A start opens only the shards that it samples."""
    monkeypatch.setattr(token_files, 'SAMPLED_BLOCKS', 2)
    write_shards(data / 'shards', 500, header=True)
    path = data / 'shards' / 'train_000004.bin'

    without_header = TRAIN[:512 + 500].astype('<u2').tobytes()
    of_another_length = make_header(9) + bytes(1000)
    for content in (without_header, of_another_length):
        path.write_bytes(content)
        dataset = open_dataset('shards')
        with pytest.raises(RunError, match='train_000004.bin cannot be read') as error:
            dataset.tokens['train'][2100:2200]
        assert '\n' not in str(error.value)

    path.unlink()
    with pytest.raises(RunError, match='train_000004.bin cannot be read'):
        dataset.tokens['train'][2100:2200]


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no inodes to know a file by')
def test_a_dataset_that_is_replaced_ends_a_run_or_stays_what_it_was(data, monkeypatch):
    """One file stays mapped. Shards that are opened again are other ones, and are refused."""
    monkeypatch.setattr(token_files, 'OPEN_SHARDS', 1)
    write_plain(data / 'plain')
    write_shards(data / 'shards', 100)
    plain = open_dataset('plain')
    sharded = open_dataset('shards')
    expected = plain.batch(1, 'train', 0, 20).x

    for path in [*(data / 'plain').glob('*.bin'), *(data / 'shards').glob('*.bin')]:
        path.with_suffix('.new').write_bytes(bytes(path.stat().st_size))
        os.replace(path.with_suffix('.new'), path)

    assert plain.batch(1, 'train', 0, 20).x.equal(expected)
    with pytest.raises(RunError, match=r'cannot be read: it was replaced; restore it'):
        sharded.batch(1, 'train', 0, 20)


# Training

def test_published_shards_train(workspace):
    """train.py takes llm.c's files as they are, and trains on the same tokens as from one file."""
    write_plain(workspace.folder / 'data' / 'plain')
    write_shards(workspace.folder / 'data' / 'published', 2000, prefix='fineweb_', header=True)

    losses = []
    for name in ('plain', 'published'):
        flags = workspace.flags(f'out-{name}', dataset=name, max_iters=3, lr_decay_iters=3,
                                warmup_iters=1, eval_interval=3)
        workspace.run('train.py', *flags)
        records = workspace.records(f'out-{name}')
        losses.append([record['loss'] for record in records if 'loss' in record])
    assert losses[0] == losses[1]
    assert len(losses[0]) == 3
    assert losses[0][0] > 8
