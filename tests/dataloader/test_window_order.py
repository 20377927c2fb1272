"""The orders in which training reads the text."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from engine.dataloader import batches as dataloader
from engine.dataloader import window_order
from engine.dataloader.batches import TokenDataset, train_batches
from engine.errors import UserError

END = 50256


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A dataset in which token i of train.bin is i."""
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    (tmp_path / 'toy').mkdir()
    np.arange(1000, dtype='<u2').tofile(tmp_path / 'toy' / 'train.bin')
    np.arange(500, 700, dtype='<u2').tofile(tmp_path / 'toy' / 'val.bin')
    return tmp_path / 'toy'


def open_dataset(block_size=8, **options):
    data = TokenDataset('toy', **options)
    data.set_block_size(block_size)
    return data


# Permutations

@pytest.mark.parametrize('size', [*range(1, 40), 255, 256, 257, 1000, 65537, 1000003])
def test_a_permutation_has_every_number_once_and_depends_on_its_keys(size):
    keys = np.random.default_rng(size).integers(0, 2 ** 63, (2, 6), dtype=np.uint64)
    a, b = (window_order.permute(np.arange(size, dtype=np.uint64), size, key) for key in keys)
    assert np.array_equal(np.sort(a), np.arange(size))
    assert np.array_equal(np.sort(b), np.arange(size))

    if size > 30:
        assert np.mean(a == b) < 0.2
        assert np.mean(a == np.arange(size)) < 0.2
        assert abs(np.corrcoef(a.astype(float), np.arange(size))[0, 1]) < 5 / size ** 0.5


def test_a_permutation_of_ten_billion_stays_below_it():
    size = 10 ** 13
    index = np.arange(10 ** 12, 10 ** 12 + 10 ** 5, dtype=np.uint64)
    places = window_order.permute(index, size, np.arange(6, dtype=np.uint64))
    assert len(np.unique(places)) == 10 ** 5
    assert 0.99 * size < places.max() < size


# Epochs

@pytest.mark.parametrize('ranks', [1, 2, 4])
def test_an_epoch_has_every_window_once_over_all_ranks(folder, ranks):
    """An epoch of 124 windows in batches of 4: the ranks' batches together, for any ranks."""
    data = open_dataset(sampling='epoch')
    starts = []
    for rank in range(ranks):
        env = SimpleNamespace(rank=rank, world_size=ranks, device=torch.device('cpu'))
        iterations = ((4 * i, 4 // ranks, 1) for i in range(93))
        for i, (x, _, _) in enumerate(train_batches(data, 3, iterations, env)):
            starts.append((i, x[:, 0].tolist()))

    by_iteration = sorted((i // (4 // ranks), start) for i, batch in starts for start in batch)
    assert len(by_iteration) == 3 * 124

    # three epochs of 31 iterations
    epochs = [{start for i, start in by_iteration if i // 31 == epoch} for epoch in range(3)]
    offsets = [min(epoch) for epoch in epochs]
    for epoch, offset in zip(epochs, offsets):
        assert offset < 8
        assert sorted(epoch) == list(range(offset, offset + 124 * 8, 8))
    assert len(set(offsets)) > 1                        # another epoch cuts the text elsewhere

    straight = open_dataset(sampling='epoch').batch(3, 'train', 0, 372).x[:, 0]
    assert sorted((i // 4, start) for i, start in enumerate(straight.tolist())) == by_iteration


@pytest.mark.parametrize('chunk', [1, 5, 4096])
def test_a_sequence_of_an_epoch_depends_on_seed_and_number_only(folder, monkeypatch, chunk):
    data = open_dataset(sampling='epoch')
    whole = data.batch(7, 'train', 100, 60).x           # over the end of the first epoch

    monkeypatch.setattr(window_order, 'CHUNK', chunk)
    window_order.epoch_chunk.cache_clear()
    for first, count in ((0, 4), (20, 8), (24, 1), (3, 57)):
        part = data.batch(7, 'train', 100 + first, count).x
        assert torch.equal(part, whole[first:first + count])

    window_order.epoch_chunk.cache_clear()
    assert not torch.equal(data.batch(8, 'train', 100, 60).x, whole)
    assert data.batch(7, 'train', 2 ** 50, 3).x.shape == (3, 8)
    evaluated = open_dataset().batch(7, 'eval train', 5, 9).x
    assert torch.equal(data.batch(7, 'eval train', 5, 9).x, evaluated)


@pytest.mark.parametrize('block_size', [1, 2, 3, 99, 100, 150, 198, 199])
def test_windows_of_an_epoch_fit_into_any_text(folder, block_size):
    np.arange(200, dtype='<u2').tofile(folder / 'train.bin')
    np.arange(200, dtype='<u2').tofile(folder / 'val.bin')
    count = window_order.windows_per_epoch(200, block_size)

    x, y = open_dataset(block_size, sampling='epoch').batch(1, 'train', 0, 3 * count)
    assert torch.equal(y, x + 1)
    assert y.max() < 200
    assert count * block_size > 200 - 2 * block_size            # at most two blocks are left out
    assert set(Counter(x[:count, 0].tolist()).values()) == {1}


# Documents

def write_documents(folder, lengths):
    """Documents of the given lengths, each after an end-of-text token; the other tokens count up.

    Returns the tokens.
    """
    ids = np.concatenate([[END, *range(length)] for length in lengths])
    ids.astype('<u2').tofile(folder / 'train.bin')
    return ids


def test_whole_documents_start_each_training_sequence(folder):
    lengths = np.random.default_rng(0).integers(1, 60, 100)
    ids = write_documents(folder, lengths)
    plain = open_dataset()
    whole = open_dataset(documents='whole')
    x, _ = whole.batch(1, 'train', 0, 300)
    assert (x[:, 0] == END).all()

    ends = np.flatnonzero(ids == END).tolist()
    ring = np.concatenate([ids, ids])                   # the end is followed by the beginning
    drawn = window_order.weyl_starts(0, 300, len(ids), 1)
    for window, start in zip(x.tolist(), drawn.tolist()):
        begin = next((end for end in ends if end >= start), ends[0])
        assert window == ring[begin:begin + 8].tolist()

    assert torch.equal(whole.batch(1, 'train', 100, 7).x, x[100:107])
    evaluated = plain.batch(1, 'eval train', 0, 50).x
    assert torch.equal(whole.batch(1, 'eval train', 0, 50).x, evaluated)


def test_the_search_for_a_document_is_bounded(folder, monkeypatch):
    """From within a document that is longer than the search, a window goes to the first one."""
    write_documents(folder, [30, 5000, 30])
    monkeypatch.setattr(dataloader, 'SEARCHED_TOKENS', 100)
    x, _ = open_dataset(documents='whole').batch(1, 'train', 0, 500)
    assert set(map(tuple, x[:, :2].tolist())) == {(END, 0)}


def test_documents_need_an_end_of_text_token(folder):
    with pytest.raises(UserError, match="no end-of-text token.*--documents=any"):
        open_dataset(documents='whole')


@pytest.mark.parametrize('options, words', [
    (dict(sampling='random'), 'windows'),
    (dict(documents='some'), 'whole'),
    (dict(sampling='epoch', documents='whole'), 'each window once'),
])
def test_unknown_and_contrary_orders_are_refused(folder, options, words):
    with pytest.raises(UserError, match=words):
        TokenDataset('toy', **options)
