"""Mixtures: each dataset's share of the sequences, each sequence a function of its number."""

import json
from fractions import Fraction

import numpy as np
import pytest
import torch

from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset, train_batches
from engine.dataloader.mixture import (
    MixedDataset,
    assign,
    assign_range,
    parse_mixture,
    ratios_of,
)
from engine.distributed import Environment
from engine.errors import UserError

T = 8               # block_size
CHARACTERS = ''.join(chr(200 + i) for i in range(1000))


def write_dataset(folder, first, chars=CHARACTERS):
    """400 tokens of train and 100 of val that go up from `first`: no two datasets share one."""
    folder.mkdir()
    for split, count in (('train', 400), ('val', 100)):
        np.arange(first, first + count).astype('<u2').tofile(folder / f'{split}.bin')
    meta = dict(tokenizer='char', vocab_size=len(chars), chars=chars)
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    for name, first in (('a', 0), ('b', 400)):
        write_dataset(tmp_path / name, first)
    return tmp_path


def open_mixture(text='a:0.7,b:0.3', **options):
    data = MixedDataset(text, **options)
    data.set_block_size(T)
    return data


# Shares

@pytest.mark.parametrize('weights', [
    '0.7,0.3', '1,2', '0.5,0.5', '0.001,0.999', '1,1,1', '5,3,2', '0.1,0.2,0.3,0.4', '1/3,2/3',
])
def test_each_dataset_has_its_share_of_any_first_sequences(weights):
    text = ','.join(f'd{i}:{weight}' for i, weight in enumerate(weights.split(',')))
    shares = list(parse_mixture(text).values())
    assert sum(shares) == 1

    numbers = np.arange(10_000)
    part, index = assign(numbers, ratios_of(shares))
    for i, share in enumerate(shares):
        counts = np.cumsum(part == i)
        deviation = np.abs(counts - (numbers + 1) * float(share)).max()
        assert deviation < max(1, len(shares) - 1)

        # the sequences of a dataset are numbered without a gap
        assert index[part == i].tolist() == list(range(counts[-1]))


def test_an_assignment_depends_on_the_number_alone():
    ratios = ratios_of(list(parse_mixture('a:0.61803,b:0.2,c:0.18197').values()))
    whole = assign(np.arange(20_000), ratios)
    for first in (0, 1, 777, 8_185, 16_384):
        part = assign_range(first, 10, ratios)
        assert part.part.tolist() == whole.part[first:first + 10].tolist()
        assert part.index.tolist() == whole.index[first:first + 10].tolist()

    far = assign(np.array([10 ** 15]), [Fraction(7, 10)])
    assert far.index[0] in (7 * 10 ** 14, 3 * 10 ** 14)


@pytest.mark.parametrize('text', [
    'a,b', 'a:0.5,b', 'a:0.5,:0.5', 'a:0,b:1', 'a:-1,b:2', 'a:x,b:1', 'a:nan,b:1', 'a:inf,b:1',
    'a:1e30,b:1', 'a:1/0,b:1', 'a:1,a:2', 'a:1,', ',', 'a:1e-7,b:1',
])
def test_a_mixture_that_is_none_is_refused_in_a_line(text):
    with pytest.raises(UserError, match='^dataset=') as refused:
        parse_mixture(text)
    assert '\n' not in str(refused.value)


# Batches

@pytest.mark.parametrize('options', [dict(), dict(sampling='epoch')])
def test_a_sequence_is_that_of_its_dataset(folders, options):
    """Against the batches of the two datasets by themselves, read one by one."""
    data = open_mixture(**options)
    alone = {}
    for name in ('a', 'b'):
        alone[name] = TokenDataset(name, **options)
        alone[name].set_block_size(T)

    x, y = data.batch(5, 'train', 0, 60)
    taken = dict(a=0, b=0)
    for inputs, targets in zip(x, y):
        name = 'a' if inputs[0] < 400 else 'b'
        expected_x, expected_y = alone[name].batch(5, 'train', taken[name], 1)
        assert torch.equal(inputs, expected_x[0])
        assert torch.equal(targets, expected_y[0])
        taken[name] += 1
    assert taken == dict(a=42, b=18)

    # from any number on, and in any number of ranks
    assert torch.equal(data.batch(5, 'train', 17, 5).x, x[17:22])
    found = []
    for rank in range(3):
        env = Environment(torch.device('cpu'), 'float32', False, rank, rank, 3, '')
        found += [batch.x for batch in train_batches(data, 5, [(0, 4, 5)], env)]
    assert torch.equal(torch.cat(found), x)


def test_masks_of_one_dataset_count(folders):
    for split, count in (('train', 400), ('val', 100)):
        (np.arange(count) % 4 == 0).astype('u1').tofile(folders / 'b' / f'{split}.mask')
    data = open_mixture()
    _, y = data.batch(5, 'train', 0, 40)
    assert data.has_masks
    assert data.count_targets(5, 'train', 0, 40) == (y >= 0).sum() == 28 * T + 12 * T // 4


# What belongs together

def test_the_vocabularies_have_to_be_equal(folders):
    write_dataset(folders / 'c', 0, CHARACTERS[::-1])
    with pytest.raises(UserError, match='tokens of c are not those of a'):
        MixedDataset('a:1,c:1')


def test_another_text_has_another_fingerprint_and_other_shares_have_not(folders):
    before = MixedDataset('a:0.7,b:0.3').fingerprint
    assert MixedDataset('a:0.5,b:0.5').fingerprint == before
    assert MixedDataset('b:0.3,a:0.7').fingerprint != before
    assert TokenDataset('a').fingerprint != before

    np.arange(399, -1, -1).astype('<u2').tofile(folders / 'b' / 'train.bin')
    assert MixedDataset('a:0.7,b:0.3').fingerprint != before
