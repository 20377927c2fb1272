"""Datasets, their checks, and the batches that they give."""

import json
import os

import numpy as np
import pytest
import torch

from engine.dataloader import batches as dataloader
from engine.dataloader.batches import Batch, TokenDataset, prefetch
from engine.dataloader.open_dataset import check_same_dataset
from engine.errors import RunError, UserError

CPU = torch.device('cpu')


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset in which token i of train.bin is i, and val.bin begins at 500."""
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    (tmp_path / 'toy').mkdir()
    np.arange(1000, dtype='<u2').tofile(tmp_path / 'toy' / 'train.bin')
    np.arange(500, 700, dtype='<u2').tofile(tmp_path / 'toy' / 'val.bin')
    return tmp_path / 'toy'


def rewrite(path, tokens):
    """Write `tokens` to the file, at a time that the file system tells from the write before."""
    before = path.stat().st_ctime_ns
    while path.stat().st_ctime_ns == before:
        tokens.tofile(path)


def open_dataset(block_size=8):
    data = TokenDataset('toy')
    data.set_block_size(block_size)
    return data


# Batches

def test_a_batch_is_windows_of_the_file_and_their_successors(folder):
    x, y = open_dataset().batch(1, 'train', 3, 50)
    assert x.shape == y.shape == (50, 8)
    assert x.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(8))
    assert torch.equal(y, x + 1)

    x, _ = open_dataset().batch(1, 'eval val', 3, 50)
    assert x.min() >= 500


def test_every_window_is_drawn_and_none_beyond_the_end(folder):
    starts = open_dataset().batch(1, 'train', 0, 50000).x[:, 0]
    assert set(starts.tolist()) == set(range(1000 - 8))


def test_a_sequence_depends_on_seed_stream_and_number_only(folder):
    data = open_dataset()
    whole = data.batch(7, 'train', 60, 12).x

    # as other ranks and micro-batches ask
    for first, count in ((0, 4), (4, 4), (8, 4), (5, 1)):
        part = open_dataset().batch(7, 'train', 60 + first, count).x
        assert torch.equal(part, whole[first:first + count])

    others = [(8, 'train', 60), (7, 'eval train', 60), (7, 'train', 72), (7, 'train', 60 + 2 ** 40)]
    for other in others:
        assert not torch.equal(data.batch(*other, 12).x, whole)

    # runs of all seeds are judged by the same text
    assert torch.equal(data.batch(7, 'eval val', 5, 12).x, data.batch(8, 'eval val', 5, 12).x)


@pytest.mark.parametrize('first', [0, 777, 10 ** 9])
@pytest.mark.parametrize('count', [12, 124, 992])
def test_windows_spread_evenly(folder, first, count):
    """For any successive windows: no gap is much wider than the mean one, and 992 windows hit at
    least four in five of the 992 starts, where independent ones hit two in three."""
    starts = np.sort(open_dataset().batch(3, 'train', first, count).x[:, 0].numpy())
    gaps = np.diff(np.append(starts, starts[0] + 992))
    assert gaps.max() <= 2.7 * 992 / count
    assert count < 992 or len(set(starts)) >= 0.8 * 992


# Prefetching

def test_prefetch_keeps_the_order_and_closes_early():
    made = []

    def make_batch(i):
        made.append(i)
        return Batch(torch.tensor(i), torch.tensor(-i))

    batches = prefetch(make_batch, ((i,) for i in range(5)), CPU)
    assert [x.item() for x, _ in batches] == list(range(5))

    batches = prefetch(make_batch, ((i,) for i in range(10 ** 9)), CPU)
    assert [next(batches)[0].item() for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert len(made) <= 5 + 5                                   # one ahead, not all


def test_prefetch_passes_a_failure_on():
    def fail(i):
        raise OSError('the disk is gone')

    with pytest.raises(OSError, match='the disk is gone'):
        next(prefetch(fail, [(1,), (2,)], CPU))


# Checks

def test_the_fingerprint_changes_with_any_token(folder):
    before = TokenDataset('toy').fingerprint
    assert TokenDataset('toy').fingerprint == before            # from the cache

    tokens = np.fromfile(folder / 'val.bin', dtype='<u2')
    tokens[77] += 1
    rewrite(folder / 'val.bin', tokens)
    assert TokenDataset('toy').fingerprint != before


def test_a_damaged_cache_is_read_again(folder):
    before = TokenDataset('toy').fingerprint
    for damage in ('', '{', '[]', '{"key": 3}', 'null', '[' * 100_000):
        (folder / 'train.checked.json').write_text(damage)
        assert TokenDataset('toy').fingerprint == before


def test_a_cache_that_is_not_of_these_files_does_not_count(folder):
    """An id beyond the vocabulary cannot hide behind a forged cache of another file."""
    TokenDataset('toy')
    cache = json.loads((folder / 'val.checked.json').read_text())

    # another file of the size and mtime of before
    tokens = np.fromfile(folder / 'val.bin', dtype='<u2')
    tokens[3] = 60000
    stat = (folder / 'val.bin').stat()
    rewrite(folder / 'val.bin', tokens)
    os.utime(folder / 'val.bin', ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / 'val.bin').stat().st_size == cache['key'][0]

    with pytest.raises(UserError, match='val.bin: token 3 has id 60000'):
        TokenDataset('toy')


def test_an_id_beyond_the_vocabulary_is_named(folder):
    meta = dict(tokenizer='char', vocab_size=3, chars='abc')
    (folder / 'meta.json').write_text(json.dumps(meta))
    words = 'train.bin: token 999 has id 999, beyond the vocabulary of 3'
    with pytest.raises(UserError, match=words):
        TokenDataset('toy')


def test_a_file_that_changes_under_a_run_ends_it(folder):
    data = open_dataset()
    with open(folder / 'train.bin', 'r+b') as file:
        file.write(b'\xff\xff' * 1000)
    with pytest.raises(RunError, match='changed while it was read: id 65535'):
        data.batch(1, 'train', 0, 4)


@pytest.mark.parametrize('content, words', [
    (b'', 'val.bin has 0 bytes'),
    (b'abc', 'val.bin has 3 bytes, and a token takes 2'),
    (b'ab' * 8, 'val.bin has 8 tokens, and a block takes 9; try --block_size=7'),
])
def test_a_file_that_cannot_be_tokens_is_refused(folder, content, words):
    (folder / 'val.bin').write_bytes(content)
    with pytest.raises(UserError, match=words):
        open_dataset()


@pytest.mark.parametrize('split', ['train', 'val'])
def test_a_missing_file_names_the_command_that_makes_it(folder, split):
    (folder / f'{split}.bin').unlink()
    with pytest.raises(UserError, match="dataset 'toy' has no train.bin and val.bin .* --name=toy"):
        TokenDataset('toy')

    (folder / 'prepare.py').write_text('')
    with pytest.raises(UserError, match='run: python data/toy/prepare.py'):
        TokenDataset('toy')


def test_an_unknown_dataset_is_told_the_known_ones(folder):
    with pytest.raises(UserError, match="dataset 'nowhere' has no .*; prepared datasets: toy;"):
        TokenDataset('nowhere')

    words = r'several datasets have shares, .*; one has none: try --dataset=toy\)?$'
    with pytest.raises(UserError, match=words):
        TokenDataset('toy:0.5')

    # a line holds a few of many
    for number in range(12):
        (folder.parent / f'set{number:02}').mkdir()
        (folder.parent / f'set{number:02}' / 'train.bin').touch()
    with pytest.raises(UserError, match='prepared datasets: set00, .*, set09 and 3 more; for'):
        TokenDataset('nowhere')


@pytest.mark.parametrize('order, words', [
    (dict(sampling='random'), "sampling='random' is unknown; try 'windows' or 'epoch'"),
    (dict(documents=True), "documents=True is unknown; try 'any' or 'whole'"),
    (dict(sampling='epoch', documents='whole'), 'try --sampling=windows or --documents=any'),
])
def test_an_unknown_order_is_refused(folder, order, words):
    with pytest.raises(UserError, match=words) as refused:
        TokenDataset('toy', **order)
    assert '\n' not in str(refused.value)


def test_a_path_names_a_dataset_from_data_on(folder, monkeypatch):
    expected = TokenDataset('toy').fingerprint
    parent = folder.parent.name
    for name in ('./toy', f'../{parent}/toy', 'toy/', str(folder)):
        data = TokenDataset(name)
        assert (data.fingerprint, data.name) == (expected, 'toy')

    # the folder that a shell would complete is another one, and the advice names it
    monkeypatch.chdir(folder.parents[1])
    with pytest.raises(UserError, match='a relative path begins at') as refused:
        TokenDataset(f'{parent}/toy')
    advised = str(refused.value).rpartition('--dataset=')[2]
    assert TokenDataset(advised).fingerprint == expected


@pytest.mark.parametrize('name', ['', 'a\0b', 'a' * 300, 'a/' * 2000, 7, None])
def test_a_name_that_can_be_no_path_is_refused(folder, name):
    with pytest.raises(UserError, match='dataset='):
        TokenDataset(name)


@pytest.mark.parametrize('change', ['none', 'vocabulary', 'text'])
def test_a_run_resumes_on_its_own_dataset_only(folder, change):
    data = TokenDataset('toy')
    saved = (data.tokenizer.to_dict(), data.fingerprint)

    if change == 'vocabulary':
        meta = dict(tokenizer='char', vocab_size=1000, chars=''.join(map(chr, range(1000))))
        (folder / 'meta.json').write_text(json.dumps(meta))
    elif change == 'text':
        rewrite(folder / 'train.bin', np.fromfile(folder / 'train.bin', '<u2')[::-1])

    data = TokenDataset('toy')
    check_same_dataset(data, None, None, accept_change=False)    # a file of nanoGPT says neither
    if change == 'none':
        check_same_dataset(data, *saved, accept_change=False)
    elif change == 'vocabulary':
        with pytest.raises(UserError, match='another vocabulary'):
            check_same_dataset(data, *saved, accept_change=True)
    else:
        check_same_dataset(data, *saved, accept_change=True)
        words = 'is not what the run was trained on.*--accept_dataset_change=True'
        with pytest.raises(UserError, match=words):
            check_same_dataset(data, *saved, accept_change=False)


@pytest.mark.parametrize('forged', [
    '{"key": Infinity, "sha256": "x", "largest": 0, "position": 0}',
    '[' * 200_000,
    '{"key": [2000], "sha256": 7, "largest": -1, "position": 0}',
    None,
])
def test_a_forged_cache_is_ignored(toy, forged):
    before = TokenDataset('toy').fingerprint
    cache = toy / 'train.checked.json'
    cache.unlink()
    if forged:
        cache.write_text(forged)
    else:
        cache.mkdir()
    assert TokenDataset('toy').fingerprint == before
