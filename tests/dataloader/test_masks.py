"""Masks: only the targets that a mask counts are in the loss, each with the same share."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset, eval_batches, train_batches
from engine.distributed import Environment
from engine.errors import UserError
from engine.prepare.dataset_writer import dataset_writer
from engine.tokenizer import Tokenizer, char_spec

T = 8               # block_size
N_TOKENS = 200      # of each split
VOCAB_SIZE = 40


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """data/masked: random tokens, of which stretches of random lengths count."""
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    folder = tmp_path / 'masked'
    folder.mkdir()
    random = np.random.default_rng(0)
    for split in ('train', 'val'):
        random.integers(VOCAB_SIZE, size=N_TOKENS).astype('<u2').tofile(folder / f'{split}.bin')
        mask = np.zeros(N_TOKENS, 'u1')
        for start in range(10, N_TOKENS, 35):           # 29 tokens of 35 do not count
            mask[start:start + random.integers(1, 12)] = 1
        mask.tofile(folder / f'{split}.mask')

    chars = ''.join(chr(65 + i) for i in range(VOCAB_SIZE))
    meta = dict(tokenizer='char', vocab_size=VOCAB_SIZE, chars=chars)
    (folder / 'meta.json').write_text(json.dumps(meta))
    return folder


def open_masked(**options):
    data = TokenDataset('masked', **options)
    data.set_block_size(T)
    return data


def environment(rank=0, world_size=1):
    return Environment(torch.device('cpu'), 'float32', False, rank, rank, world_size, '')


# Targets

def as_shards(folder):
    """Cut the files of `folder` into three shards each, tokens and masks alike."""
    for split in ('train', 'val'):
        for ending in ('bin', 'mask'):
            path = folder / f'{split}.{ending}'
            dtype = '<u2' if ending == 'bin' else 'u1'
            for i, part in enumerate(np.array_split(np.fromfile(path, dtype), 3)):
                part.tofile(folder / f'{split}_{i:06}.{ending}')
            path.unlink()


@pytest.mark.parametrize('stream', ['train', 'eval train', 'eval val'])
@pytest.mark.parametrize('options', [dict(), dict(sampling='epoch')])
@pytest.mark.parametrize('sharded', [False, True])
def test_targets_are_the_tokens_that_count(folder, stream, options, sharded):
    split = 'val' if stream == 'eval val' else 'train'
    tokens = np.fromfile(folder / f'{split}.bin', '<u2').astype(int)
    mask = np.fromfile(folder / f'{split}.mask', 'u1')
    if sharded:
        as_shards(folder)

    data = open_masked(**options)
    x, y = data.batch(1, stream, 7, 50)
    all_windows = np.lib.stride_tricks.sliding_window_view(tokens, T)
    counted = 0
    for inputs, targets in zip(x.numpy(), y.tolist()):
        start, = np.flatnonzero((all_windows == inputs).all(axis=1))     # the windows all differ
        for i, target in enumerate(targets, start + 1):
            assert target == (tokens[i] if mask[i] else -1)
            counted += mask[i]
    assert 0 < counted == data.count_targets(1, stream, 7, 50)


# The mean over what counts

def nats(x, y):
    """The negative log-probability of each target under a fixed table, (B, T); 0 where y is -1."""
    table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(3)).double()
    losses = -F.log_softmax(table, dim=-1)[x, y.clamp(min=0)]
    return losses * (y >= 0)


def mean_nats(x, y):
    """The mean over the targets that count, as a model computes it; not finite without any."""
    return nats(x, y).sum().item() / (y >= 0).sum().item()


@pytest.mark.parametrize('world_size', [1, 2, 3])
@pytest.mark.parametrize('micro_steps, size', [(1, 12), (4, 3), (12, 1)])
def test_the_global_batch_has_the_mean_over_its_targets(folder, world_size, micro_steps, size):
    """However it is divided among ranks and micro-steps, many of which have no target."""
    data = open_masked()
    n_sequences = world_size * micro_steps * size
    first = 5 * n_sequences
    x, y = data.batch(1, 'train', first, n_sequences)

    means = []
    for rank in range(world_size):
        env = environment(rank, world_size)
        batches = train_batches(data, 1, [(first, micro_steps, size)], env)
        losses = [mean_nats(batch.x, batch.y) * batch.weight for batch in batches]
        assert len(losses) == micro_steps
        means.append(sum(losses) / micro_steps)             # as train_step divides
    assert sum(means) / world_size == pytest.approx(mean_nats(x, y), rel=1e-12)


def test_an_evaluation_has_the_mean_over_its_targets(folder):
    data = open_masked()
    total = 0
    weights = 0
    for batch in eval_batches(data, 'val', 9, 2, environment()):
        total += mean_nats(batch.x, batch.y) * batch.weight
        weights += batch.weight
    x, y = data.batch(0, 'eval val', 0, 18)
    assert total / weights == pytest.approx(mean_nats(x, y), rel=1e-12)


def test_without_masks_every_weight_is_one(folder):
    for path in folder.glob('*.mask'):
        path.unlink()
    batches = train_batches(open_masked(), 1, [(0, 4, 3)], environment())
    assert [batch.weight for batch in batches] == [1.0] * 4


def test_a_batch_without_a_target_adds_nothing(folder):
    np.zeros(N_TOKENS, 'u1').tofile(folder / 'train.mask')
    np.eye(1, N_TOKENS, N_TOKENS - 1, 'u1').tofile(folder / 'train.mask')      # the last one
    for batch in train_batches(open_masked(), 1, [(0, 4, 3)], environment()):
        assert batch.weight == 0
        assert np.isfinite(mean_nats(batch.x, batch.y))


# Files that do not fit

@pytest.mark.parametrize('damage, words', [
    (lambda folder: (folder / 'val.mask').unlink(), 'val.mask is missing'),
    (lambda folder: (folder / 'train.mask').write_bytes(b'\1' * 199), '199 bytes.*200 tokens'),
    (lambda folder: (folder / 'train.mask').write_bytes(b''), '0 bytes.*200 tokens'),
    (lambda folder: (folder / 'val.mask').write_bytes(b'\1' * 150 + b'\2' + b'\1' * 49),
     'val.mask: byte 150 is 2, and a mask holds 0 and 1'),
    (lambda folder: (folder / 'val.mask').write_bytes(b'\0' * 200), 'val.mask counts no token'),
])
def test_a_mask_that_does_not_fit_is_refused_in_a_line(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words):
        TokenDataset('masked')


def test_a_mask_that_changed_is_not_the_one_of_the_run(folder):
    before = TokenDataset('masked').fingerprint
    mask = np.fromfile(folder / 'train.mask', 'u1')
    mask[0] = 1
    mask.tofile(folder / 'train.mask')
    assert TokenDataset('masked').fingerprint != before


# Writing

def write_dataset(folder, pieces, **options):
    spec = char_spec('ab')
    with dataset_writer(folder, spec, **options) as writer:
        writer.write(pieces, Tokenizer(spec).encode_to_numpy, total=6)


def test_the_writer_counts_what_its_pieces_count(tmp_path):
    pieces = [('train', 'ab', False, False), ('train', 'b', False, True),
              ('val', 'a', False, True), ('val', 'bb', False, False)]
    write_dataset(tmp_path, pieces, has_masks=True)
    assert (tmp_path / 'train.mask').read_bytes() == b'\0\0\1'
    assert (tmp_path / 'val.mask').read_bytes() == b'\1\0\0'
    assert np.fromfile(tmp_path / 'train.bin', '<u2').tolist() == [0, 1, 1]
    meta = json.loads((tmp_path / 'meta.json').read_text())
    assert list(meta['sha256']) == ['train.bin', 'val.bin', 'train.mask', 'val.mask']

    # a dataset without masks takes the place of all files
    write_dataset(tmp_path, [('train', 'ab', False), ('val', 'b', False)])
    assert not list(tmp_path.glob('*.mask*'))
    assert not list(tmp_path.glob('*.part'))


def test_windows_that_reach_no_answer_are_refused_with_a_size_that_reaches_them(folder):
    """Each document has 20 tokens, of which the last four count."""
    end = VOCAB_SIZE - 1
    for split in ('train', 'val'):
        document = np.array([end, *range(19)], '<u2')
        np.tile(document, 10).tofile(folder / f'{split}.bin')
        np.tile(np.arange(20) > 15, 10).astype('u1').tofile(folder / f'{split}.mask')
    meta = json.loads((folder / 'meta.json').read_text())
    (folder / 'meta.json').write_text(json.dumps({**meta, 'end_of_text': end}))

    data = TokenDataset('masked', documents='whole')
    data.set_block_size(16)
    with pytest.raises(UserError, match='no answer begins within them.* try --block_size=32') as no:
        data.set_block_size(15)
    data.set_block_size(int(str(no.value).split('--block_size=')[1].split(',')[0]))
    assert data.count_targets(0, 'train', 0, 5) > 0
