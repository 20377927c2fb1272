"""Token files of others: numpy's, llm.c's, and ids of another width than two bytes."""

import json
import pickle
import re
import struct

import numpy as np
import pytest

from engine.dataloader import batches as dataloader
from engine.dataloader import file_formats
from engine.dataloader.batches import TokenDataset
from engine.dataloader.token_files import find_token_files
from engine.errors import RunError, UserError

RANDOM = np.random.default_rng(0)
WORDS = np.minimum(RANDOM.zipf(1.3, 4000) * 13, 50256)          # as GPT-2's ids of a text
LETTERS = RANDOM.integers(0, 65, 4000)
LARGE = RANDOM.integers(0, 67_000, 4000)


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    return tmp_path


def write_bins(folder, ids, dtype='<u2', extra=b''):
    """train.bin and val.bin, of the same ids."""
    folder.mkdir(exist_ok=True)
    for split in ('train', 'val'):
        content = np.asarray(ids).astype(dtype).tobytes() + extra
        (folder / f'{split}.bin').write_bytes(content)


def refusal(name):
    with pytest.raises(UserError) as refused:
        TokenDataset(name)
    assert '\n' not in str(refused.value)
    return str(refused.value)


def all_tokens(name):
    return TokenDataset(name).tokens['train'][:]


# The width of ids

@pytest.mark.parametrize('dtype', ['int32', 'int64'])
@pytest.mark.parametrize('ids', [WORDS, LETTERS, WORDS[:50]], ids=['words', 'letters', 'few'])
def test_ids_of_another_width_are_refused_with_a_cure_that_works(data, ids, dtype):
    write_bins(data / 'wide', ids, dtype)
    line = refusal('wide')
    assert f'train.bin looks like {dtype}: as uint16, ' in line
    meta, path = re.search(r'write (\{.*?\}) to (.*?), or ', line).groups()
    assert path == str(data / 'wide' / 'meta.json')

    (data / 'wide' / 'meta.json').write_text(meta)
    assert all_tokens('wide').tolist() == ids.tolist()
    dataset = TokenDataset('wide')
    dataset.set_block_size(8)
    write_bins(data / 'narrow', ids)
    narrow = TokenDataset('narrow')
    narrow.set_block_size(8)
    assert dataset.batch(1, 'train', 0, 30).x.equal(narrow.batch(1, 'train', 0, 30).x)


@pytest.mark.parametrize('dtype', ['uint32', 'int64'])
def test_large_ids_of_another_width_are_refused_with_a_cure_that_works(data, dtype):
    write_bins(data / 'wide', LARGE, dtype)
    line = refusal('wide')
    assert 'beyond the vocabulary of 50257' in line
    meta = re.search(r'write (\{.*?\}) to ', line)[1]
    assert json.loads(meta)['dtype'] == dtype

    (data / 'wide' / 'meta.json').write_text(meta)
    assert all_tokens('wide').tolist() == LARGE.tolist()


def test_a_wide_file_beside_a_meta_is_told_what_to_add(data):
    write_bins(data / 'wide', WORDS, 'int64')
    (data / 'wide' / 'meta.json').write_text('{"tokenizer": "gpt2", "vocab_size": 50257}')
    assert 'add "dtype": "int64" to ' in refusal('wide')


def spaced(ids):
    """The ids with a 0 after each, as letters with spaces between them have."""
    return np.stack([ids, np.zeros_like(ids)], axis=1).reshape(-1)


NARROW = dict(
    words=WORDS,
    letters=LETTERS,
    few_letters=RANDOM.integers(0, 3, 4000),
    mostly_zeros=RANDOM.integers(1, 65, 20_000) * (RANDOM.random(20_000) < 0.05),
    zeros=np.zeros(4000, int),
    tiny=np.array([0, 1, 0]),
    spaced_letters=spaced(RANDOM.integers(1, 27, 4000)),
    pairs_with_a_small_one=np.stack([WORDS, RANDOM.integers(0, 3, 4000)], axis=1).reshape(-1),
    records_of_three=np.concatenate([[i, 0, 0] for i in WORDS[:1000]]),
    bits=RANDOM.integers(0, 2, 4000),
)


@pytest.mark.parametrize('kind', NARROW)
def test_ids_of_two_bytes_are_read_however_many_are_zero(data, kind):
    write_bins(data / 'narrow', NARROW[kind])
    assert all_tokens('narrow').tolist() == NARROW[kind].tolist()


def test_the_dtype_of_a_meta_counts_whatever_the_ids_look_like(data):
    write_bins(data / 'sure', spaced(WORDS))
    assert 'looks like int32' in refusal('sure')
    (data / 'sure' / 'meta.json').write_text('{"dtype": "uint16"}')
    assert len(all_tokens('sure')) == 8000


def test_a_wide_file_that_is_cut_is_named_as_such(data):
    write_bins(data / 'wide', WORDS, 'int64', extra=b'abc')
    assert 'looks like int64' in refusal('wide')
    assert 'its 32,003 bytes are no multiple of 8' in refusal('wide')
    write_bins(data / 'odd', WORDS, extra=b'a')
    assert 'has 8,001 bytes, and a token takes 2' in refusal('odd')


def test_only_a_sample_of_a_large_file_is_read(data, monkeypatch):
    write_bins(data / 'wide', np.tile(WORDS, 100), 'int64')
    path = data / 'wide' / 'train.bin'
    low, high = file_formats.sample_parts(path, 'uint16', 8)
    assert len(low) == file_formats.SAMPLED_BLOCKS * file_formats.BLOCK_BYTES // 8
    assert file_formats.find_width(path, 'uint16') == 'int64'

    # what breaks the pattern may be anywhere
    content = np.fromfile(path, '<u2')
    content[-1] = 1
    content.tofile(path)
    assert file_formats.find_width(path, 'uint16') is None


def test_a_negative_id_is_beyond_every_vocabulary(data):
    ids = WORDS.copy()
    ids[300] = -100
    write_bins(data / 'wide', ids, 'int64')
    (data / 'wide' / 'meta.json').write_text('{"dtype": "int64"}')
    assert 'token 300 has id 18446744073709551516' in refusal('wide')

    # written after the check
    write_bins(data / 'wide', WORDS, 'int64')
    dataset = TokenDataset('wide')
    dataset.set_block_size(8)
    with open(data / 'wide' / 'train.bin', 'r+b') as file:
        np.full(4000, -1, '<i8').tofile(file)
    with pytest.raises(RunError, match='is damaged, or changed'):
        dataset.batch(1, 'train', 0, 5)


# numpy's files

def write_npy(folder, train, val, ids, version=None):
    folder.mkdir(exist_ok=True)
    for name in (train, val):
        with open(folder / name, 'wb') as file:
            np.lib.format.write_array(file, ids, version)


@pytest.mark.parametrize('dtype', ['<u2', '<i4', '<u4', '<i8', '<u8'])
@pytest.mark.parametrize('train, val', [
    ('edufineweb_train_000001.npy', 'edufineweb_val_000000.npy'),
    ('train.npy', 'val.npy'),
    ('mine_train.npy', 'mine_val.npy'),
    ('train.bin', 'val.bin'),
    ('a_train_1.bin', 'a_val_0.bin'),
])
def test_numpys_files_are_read_as_their_header_says(data, train, val, dtype):
    write_npy(data / 'set', train, val, WORDS.astype(dtype))
    dataset = TokenDataset('set')
    assert dataset.tokens['train'][:].tolist() == WORDS.tolist()
    assert dataset.tokens['val'].find(int(WORDS[7]), 7, 8) == 7


@pytest.mark.parametrize('version', [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_numpys_header_is_read(data, version):
    write_npy(data / 'set', 'train.npy', 'val.npy', WORDS.astype('<u2'), version)
    assert all_tokens('set').tolist() == WORDS.tolist()


def test_many_files_of_numpy_are_one_stream(data):
    (data / 'set').mkdir()
    for i in range(12):
        np.save(data / 'set' / f'x_train_{i}.npy', WORDS[i * 100:(i + 1) * 100].astype('<u2'))
    np.save(data / 'set' / 'x_val_0.npy', WORDS[:50].astype('<u2'))
    assert all_tokens('set').tolist() == WORDS[:1200].tolist()


class Evil:
    """Unpickling it would end the tests."""

    def __reduce__(self):
        return exit, ()


HEADER = b'\x93NUMPY\x01\x00'


@pytest.mark.parametrize('content, words', [
    (WORDS.astype('<u2').reshape(2, -1), 'holds an array of 2 dimensions'),
    (np.asfortranarray(WORDS.astype('<u2').reshape(2, -1)), 'holds an array of 2 dimensions'),
    (np.array(7, '<u2'), 'holds an array of 0 dimensions'),
    (WORDS.astype('<f4'), 'holds float32, and ids are uint8, uint16'),
    (WORDS.astype('>u2'), 'holds >u2, and ids are'),
    (np.zeros(9, [('a', '<u2'), ('b', '<u2')]), 'holds .*, and ids are'),
    (np.array([Evil()], object), 'holds object, and ids are'),
    (b'\x93NUMPY', 'damaged header'),
    (HEADER + b'\xff\xff{', 'damaged header'),
    (HEADER + struct.pack('<H', 30) + b'__import__("os").system("ls")', 'damaged header'),
    (HEADER + struct.pack('<H', 60_000) + b'[' * 60_000, 'damaged header'),
])
def test_other_files_of_numpy_are_refused(data, content, words):
    (data / 'set').mkdir()
    for name in ('train.npy', 'val.npy'):
        if isinstance(content, bytes):
            (data / 'set' / name).write_bytes(content)
        else:
            np.save(data / 'set' / name, content)
    assert re.search(words, refusal('set'))


@pytest.mark.parametrize('name', ['train.npy', 'train.bin'])
@pytest.mark.parametrize('cut', [1, 2, 700])
def test_a_file_of_numpy_that_is_cut_is_refused(data, name, cut):
    write_npy(data / 'set', name, name.replace('train', 'val'), WORDS.astype('<u2'))
    path = data / 'set' / name
    path.write_bytes(path.read_bytes()[:-cut])
    assert 'do not fit the 4,000 tokens of its header' in refusal('set')


# llm.c's files

def write_llmc(folder, names, magic=20240520, version=1, dtype='<u2', ids=WORDS):
    folder.mkdir(exist_ok=True)
    header = struct.pack('<256i', magic, version, len(ids), *[0] * 253)
    for name in names:
        (folder / name).write_bytes(header + ids.astype(dtype).tobytes())


SINGLE = ('tiny_shakespeare_train.bin', 'tiny_shakespeare_val.bin')


def test_llmcs_single_files_are_read(data):
    write_llmc(data / 'set', SINGLE)
    assert all_tokens('set').tolist() == WORDS.tolist()


def test_llmcs_large_vocabularies_want_a_size_or_a_tokenizer(data):
    write_llmc(data / 'set', SINGLE, 20240801, 7, '<u4', LARGE)
    line = refusal('set')
    assert '--token_files=' in line
    meta, path = re.search(r'write (\{.*?\}) to (\S+),', line).groups()
    (data / 'set' / 'meta.json').write_text(meta)
    assert path == str(data / 'set' / 'meta.json')
    assert all_tokens('set').tolist() == LARGE.tolist()


@pytest.mark.parametrize('magic, version, words', [
    (20240520, 2, 'a header of llm.c with version 2, which is unknown here; it should be 1'),
    (20240801, 1, 'a header of llm.c with version 1, which is unknown here; it should be 7'),
    (20240522, 1, 'a header of llm.c with the magic number 20240522, and token files have'),
])
def test_an_unknown_header_of_llmc_is_named(data, magic, version, words):
    write_llmc(data / 'set', SINGLE, magic, version)
    assert words in refusal('set')


# Names

@pytest.mark.parametrize('names, train', [
    (['train.bin', 'val.bin', 'old_train.bin', 'x_train_0.npy'], ['train.bin']),
    (['train_1.bin', 'val_0.bin', 'old_train.bin'], ['train_1.bin']),
    (['a_train.bin', 'a_val.bin', 'b_train.npy'], ['a_train.bin']),
    (['a_train_10.npy', 'a_train_9.npy', 'a_val_0.npy'], ['a_train_9.npy', 'a_train_10.npy']),
])
def test_what_lies_beside_a_dataset_is_left_alone(tmp_path, names, train):
    for name in names:
        (tmp_path / name).write_bytes(b'')
    assert [file.name for file in find_token_files(tmp_path)['train']] == train


@pytest.mark.parametrize('names', [
    ['a_train.bin', 'b_train.bin'],
    ['train.npy', 'train_0.npy'],
    ['a_train_0.npy', 'b_train_1.npy'],
])
def test_files_of_two_datasets_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).write_bytes(b'')
    with pytest.raises(UserError, match='which are not of one dataset'):
        find_token_files(tmp_path)


# Training

def test_words_are_trained_on_and_sampled(workspace):
    """A default prompt, which is a newline, begins with the first word where there is none."""
    folder = workspace.folder / 'data' / 'words'
    write_bins(folder, LETTERS % 20)
    words = [f'w{i}' for i in range(20)]
    (folder / 'meta.pkl').write_bytes(pickle.dumps(dict(vocab_size=20, itos=words)))

    flags = workspace.flags('out-words', dataset='words', max_iters=2, lr_decay_iters=2,
                            warmup_iters=1, eval_interval=2, sample_tokens=3)
    workspace.run('train.py', *flags)
    sampled = workspace.run('sample.py', '--out_dir=out-words', '--device=cpu', '--num_samples=1',
                            '--max_new_tokens=5')
    found = sampled.stdout.split()[:6]
    assert found[0] == 'w0'
    assert set(found) <= set(words)
