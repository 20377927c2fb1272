import json
import pickle

import numpy as np
import pytest
import torch

import dataloader
from dataloader import Dataset, Tokenizer, prefetch


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    (tmp_path / 'toy').mkdir()
    np.arange(1000, dtype='<u2').tofile(tmp_path / 'toy' / 'train.bin')
    np.arange(500, 700, dtype='<u2').tofile(tmp_path / 'toy' / 'val.bin')
    return tmp_path / 'toy'


def cut(block_size):
    data = Dataset('toy')
    data.cut(block_size)
    return data


def test_a_batch_is_windows_of_the_file_and_their_successors(folder):
    x, y = cut(8).batch(1, 'train', 3, 50)
    assert x.shape == y.shape == (50, 8) and x.dtype == torch.int64
    assert torch.equal(x, x[:, :1] + torch.arange(8)) and torch.equal(y, x + 1)     # token i of the file is i
    x, _ = cut(8).batch(1, 'eval val', 3, 50)
    assert x.min() >= 500


def test_every_window_is_drawn_and_none_beyond_the_end(folder):
    starts = cut(8).batch(1, 'train', 0, 50000)[0][:, 0]
    assert set(starts.tolist()) == set(range(1000 - 8))


def test_a_sequence_depends_on_seed_stream_and_number_only(folder):
    data = cut(8)
    whole = data.batch(7, 'train', 60, 12)[0]
    for first, count in ((0, 4), (4, 4), (8, 4), (5, 1)):       # as other ranks and micro-batches ask
        assert torch.equal(cut(8).batch(7, 'train', 60 + first, count)[0], whole[first:first + count])
    others = [(8, 'train', 60), (7, 'eval train', 60), (7, 'train', 72), (7, 'train', 60 + 2 ** 40)]
    assert all(not torch.equal(data.batch(*other, 12)[0], whole) for other in others)
    assert torch.equal(data.batch(7, 'eval val', 5, 12)[0], data.batch(8, 'eval val', 5, 12)[0])   # no seed in judging


@pytest.mark.parametrize('first', [0, 777, 10 ** 9])
@pytest.mark.parametrize('count', [12, 124, 992])
def test_windows_spread_evenly(folder, first, count):
    """Any successive windows: no gap is much wider than the mean one, and 992 of the 992 starts
    are hit by four in five draws at least, where independent ones hit two in three."""
    starts = np.sort(cut(8).batch(3, 'train', first, count)[0][:, 0].numpy())
    gaps = np.diff(np.append(starts, starts[0] + 992))
    assert gaps.max() <= 2.7 * 992 / count
    assert count < 992 or len(set(starts)) >= 0.8 * 992


def test_prefetch_keeps_the_order_and_closes_early():
    made = []

    def make(i):
        made.append(i)
        return torch.tensor(i), torch.tensor(-i)

    assert [x.item() for x, _ in prefetch(make, ((i,) for i in range(5)), torch.device('cpu'))] == list(range(5))
    batches = prefetch(make, ((i,) for i in range(10 ** 9)), torch.device('cpu'))
    assert [next(batches)[0].item() for _ in range(3)] == [0, 1, 2]
    batches.close()
    assert len(made) <= 5 + 5                                   # one ahead, not all


def test_prefetch_passes_a_failure_on():
    def fail(i):
        raise OSError('the disk is gone')
    with pytest.raises(OSError, match='the disk is gone'):
        next(prefetch(fail, [(1,), (2,)], torch.device('cpu')))


def test_the_fingerprint_changes_with_any_token(folder):
    before = Dataset('toy').fingerprint
    assert Dataset('toy').fingerprint == before                 # from the cache
    tokens = np.fromfile(folder / 'val.bin', dtype='<u2')
    tokens[77] += 1
    tokens.tofile(folder / 'val.bin')
    assert Dataset('toy').fingerprint != before


def test_a_damaged_cache_is_read_again(folder):
    before = Dataset('toy').fingerprint
    for damage in ('', '{', '[]', '{"key": 3}', 'null'):
        (folder / 'train.checked.json').write_text(damage)
        assert Dataset('toy').fingerprint == before


@pytest.mark.parametrize('name', ['', '..', '../toy', 'toy/', '/etc', 'a/b', '.hidden', 'a\\b'])
def test_a_name_that_leaves_the_folder_is_refused(folder, name):
    with pytest.raises(ValueError, match='dataset='):
        Dataset(name)


def test_an_id_beyond_the_vocabulary_is_named(folder):
    (folder / 'meta.json').write_text(json.dumps(dict(tokenizer='char', vocab_size=3, chars='abc')))
    with pytest.raises(ValueError, match='train.bin: token 999 has id 999'):
        Dataset('toy')


@pytest.mark.parametrize('content, words', [(b'', '0 bytes'), (b'abc', '3 bytes'), (b'ab' * 8, 'has 8 tokens')])
def test_a_file_that_cannot_be_tokens_is_refused(folder, content, words):
    (folder / 'val.bin').write_bytes(content)
    with pytest.raises(ValueError, match=words):
        cut(8)


def test_the_familys_meta_pkl_is_read_without_running_it(folder, tmp_path):
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(
        vocab_size=1000, itos={i: chr(1000 + i) for i in range(1000)}, stoi={chr(1000 + i): i for i in range(1000)})))
    assert Dataset('toy').tokenizer == dict(tokenizer='char', vocab_size=1000, chars=''.join(map(chr, range(1000, 2000))))

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / 'ran'), 'w')
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=Evil())))
    with pytest.raises(ValueError, match='open'):
        Dataset('toy')
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('meta', ['', '[]', '{"tokenizer": "char"}', '{"tokenizer": "char", "vocab_size": 2, "chars": "aa"}',
                                  '{"tokenizer": "gpt2", "vocab_size": -1}', '{"tokenizer": "x", "vocab_size": 5}'])
def test_a_damaged_meta_is_refused(folder, meta):
    (folder / 'meta.json').write_text(meta)
    with pytest.raises(ValueError, match='meta.json cannot be used'):
        Dataset('toy')


def test_characters_come_back_and_strangers_are_named():
    tokenizer = Tokenizer(dict(tokenizer='char', vocab_size=4, chars='\nabé'))
    assert tokenizer.encode('aé\nb') == [1, 3, 0, 2] and tokenizer.decode([1, 3, 0, 2]) == 'aé\nb'
    assert tokenizer.decode_bytes([3]) == 'é'.encode()
    with pytest.raises(ValueError, match="never saw the character 'z'"):
        tokenizer.encode('abz')


def test_gpt2_tokens_come_back_and_may_end_within_a_character():
    try:
        tokenizer = Tokenizer()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert tokenizer.encode('Hello world<|endoftext|>') == [15496, 995, 50256]
    text = 'naïve 漢字 🙂'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b''.join(tokenizer.decode_bytes([i]) for i in ids).decode() == text
