"""Tokenizers of characters and of GPT-2, specs, meta files. tests/hf has the others."""

import json
import os
import pickle
import socket
from dataclasses import replace

import pytest

from engine import downloads
from engine.dataloader.batches import dataset_tokenizer
from engine.errors import RunError, UserError
from engine.tokenizer import (
    GPT2,
    DatasetMeta,
    Tokenizer,
    TokenizerSpec,
    char_spec,
    gpt2_is_cached,
    read_meta,
)

THOUSAND = [chr(1000 + i) for i in range(1000)]


class Evil:
    """Unpickling it would create a file."""

    def __reduce__(self):
        return os.system, ('touch ran',)


def test_characters_come_back_and_unknown_ones_are_named():
    tokenizer = Tokenizer(char_spec('\nabé'))
    assert tokenizer.encode('aé\nb') == [1, 3, 0, 2]
    assert tokenizer.decode([1, 3, 0, 2]) == 'aé\nb'
    assert tokenizer.encode_to_numpy('aé\nb').tolist() == [1, 3, 0, 2]
    assert tokenizer.decode_bytes([3]) == 'é'.encode()
    with pytest.raises(UserError, match="the character 'z' is not in the vocabulary of this model"):
        tokenizer.encode('abz')


def test_a_character_spec_is_in_code_point_order():
    assert char_spec(set('bé\na')) == TokenizerSpec('char', 4, chars='\nabé')
    with pytest.raises(UserError, match='65,537 different characters'):
        char_spec(set(map(chr, range(2 ** 16 + 1))))


def test_a_character_vocabulary_may_have_an_end_of_text():
    """A prompt and a sample spell it as with other tokenizers."""
    spec = char_spec('ab<|>endoftx', ends_documents=True)
    tokenizer = Tokenizer(spec)
    end = tokenizer.end_of_text
    assert tokenizer.encode('<|endoftext|>a')[0] == end
    assert tokenizer.decode([end]) == '<|endoftext|>'
    assert end not in tokenizer.encode_to_numpy('<|endoftext|>')
    assert tokenizer.encode_to_numpy('a', as_document=True).tolist()[1:] == [end]
    assert tokenizer.encode('') == []
    with pytest.raises(UserError, match=r"the character '\\x03', which would end each document"):
        char_spec('a\x03', ends_documents=True)
    found = spec.to_dict()
    found['end_of_text'] = 13
    with pytest.raises(UserError, match='end_of_text is 13'):
        TokenizerSpec.from_dict(found)


def test_gpt2_tokens_come_back_and_may_end_within_a_character():
    try:
        tokenizer = Tokenizer()
    except RunError as error:
        pytest.skip(str(error))
    assert tokenizer.encode('Hello world<|endoftext|>') == [15496, 995, 50256]

    text = 'naïve 漢字 🙂'
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert b''.join(tokenizer.decode_bytes([i]) for i in ids).decode() == text
    assert tokenizer.encode_to_numpy(text).tolist() == ids

    # a dataset's text cannot end its document
    assert 50256 not in tokenizer.encode_to_numpy('<|endoftext|>')


@pytest.mark.parametrize('meaning, in_prompt, in_data', [
    (None, True, False), (True, True, True), (False, False, False)])
def test_a_special_token_that_a_text_spells_is_one_where_the_spec_says_so(
        meaning, in_prompt, in_data):
    try:
        tokenizer = Tokenizer(replace(GPT2, special_tokens=meaning))
    except RunError as error:
        pytest.skip(str(error))
    ordinary = tokenizer.bpe.encode_ordinary('a<|endoftext|>b')
    special = [64, 50256, 65]

    def expected(is_special):
        return special if is_special else ordinary

    assert tokenizer.encode('a<|endoftext|>b') == expected(in_prompt)
    assert tokenizer.encode_to_numpy('a<|endoftext|>b').tolist() == expected(in_data)


# Meta files

def test_a_token_has_as_many_bytes_as_its_text_without_those_between_documents():
    tokenizer = Tokenizer(char_spec('aé'))
    text = 'aéaaéa'
    ids = tokenizer.encode_to_numpy(text)
    assert tokenizer.bytes_per_token(ids) == len(text.encode()) / len(text)

    # as if 'a' were the end-of-text token
    tokenizer.end_of_text = 0
    assert tokenizer.bytes_per_token(ids) == len('éé'.encode()) / len(text)


def test_gpt2s_files_are_found_where_tiktoken_reads_them(tmp_path, monkeypatch):
    """Which are those that tiktoken itself puts there."""
    from tiktoken import load
    from tiktoken_ext import openai_public

    def read_addresses(vocab_bpe_file, encoder_json_file, **hashes):
        addresses.extend([vocab_bpe_file, encoder_json_file])

    addresses = []
    monkeypatch.setattr(openai_public, 'data_gym_to_mergeable_bpe_ranks', read_addresses)
    openai_public.gpt2()

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(load, 'read_file', lambda address: b'')
    found = [gpt2_is_cached()]
    for address in addresses:
        load.read_file_cached(address)
        found.append(gpt2_is_cached())
    assert found == [False, False, True]


def test_a_dataset_without_a_meta_file_is_gpt2s(tmp_path):
    assert read_meta(tmp_path) == GPT2
    assert dataset_tokenizer(None) == GPT2


def test_meta_json_is_read(tmp_path):
    content = dict(tokenizer='char', vocab_size=3, chars='aéb', tokens={'train': 5},
                   dtype='uint16', of_somebody_else=7)
    (tmp_path / 'meta.json').write_text(json.dumps(content), encoding='utf-8')
    spec = TokenizerSpec('char', 3, chars='aéb')
    assert read_meta(tmp_path) == spec
    assert DatasetMeta.read(tmp_path) == DatasetMeta(spec, dtype='uint16', tokens={'train': 5})


def test_a_meta_json_of_three_keys_is_read(tmp_path):
    content = dict(tokenizer='char', vocab_size=3, chars='aéb')
    (tmp_path / 'meta.json').write_text(json.dumps(content), encoding='utf-8')
    assert DatasetMeta.read(tmp_path) == DatasetMeta(TokenizerSpec('char', 3, chars='aéb'))


HF = TokenizerSpec('hf', 9, None, 8, 'name', None, 'fingerprint', '{}', '{"a": 1}')


@pytest.mark.parametrize('meta, text', [
    (DatasetMeta(GPT2), '{"tokenizer": "gpt2", "vocab_size": 50257}'),
    (DatasetMeta(char_spec('ba'), record=dict(length=9, prompt=4)),
     '{"vocab_size": 2, "tokenizer": "char", "chars": "ab", "record": {"length": 9, "prompt": 4}}'),
    (DatasetMeta(HF, sha256={'train.bin': 'a'}, source='b'),
     '{"tokenizer": "hf", "vocab_size": 9, "end_of_text": 8, "tokenizer_name": "name", '
     '"tokenizer_revision": null, "tokenizer_sha256": "fingerprint", "tokenizer_json": "{}", '
     '"tokenizer_config": "{\\"a\\": 1}", "sha256": {"train.bin": "a"}, "source": "b"}'),
    (DatasetMeta(replace(GPT2, special_tokens=False)),
     '{"tokenizer": "gpt2", "vocab_size": 50257, "special_tokens": false}'),
    (DatasetMeta(GPT2, dtype='uint16', tokens=dict(train=5, val=2)),
     '{"tokenizer": "gpt2", "vocab_size": 50257, "dtype": "uint16", '
     '"tokens": {"train": 5, "val": 2}}'),
])
def test_what_meta_json_holds_goes_through_the_file(meta, text):
    """The order of the keys is the one in which files have always had them."""
    assert json.dumps(meta.to_dict()) == text
    assert DatasetMeta.from_dict(json.loads(text)) == meta


@pytest.mark.parametrize('spec', [GPT2, char_spec('abc'), char_spec('ab', True), HF])
def test_a_spec_goes_through_a_checkpoint(spec):
    assert TokenizerSpec.from_dict(spec.to_dict()) == spec
    assert list(spec.to_dict())[:2] == ['tokenizer', 'vocab_size']
    assert GPT2.to_dict() == dict(tokenizer='gpt2', vocab_size=50257)


def test_keys_that_a_kind_lacks_are_ignored():
    found = dict(tokenizer='char', vocab_size=1, chars='a', tokenizer_json=7, tokenizer_name=50)
    assert TokenizerSpec.from_dict(found) == char_spec('a')
    assert TokenizerSpec.from_dict(dict(GPT2.to_dict(), chars=7, end_of_text=1)) == GPT2


def test_nanogpts_meta_pkl_is_read(tmp_path):
    itos = dict(enumerate(THOUSAND))
    stoi = {char: i for i, char in enumerate(THOUSAND)}
    content = pickle.dumps(dict(vocab_size=1000, itos=itos, stoi=stoi))
    (tmp_path / 'meta.pkl').write_bytes(content)
    assert read_meta(tmp_path) == char_spec(THOUSAND)


@pytest.mark.parametrize('meta, words', [
    ('', 'JSONDecodeError'),
    ('{"tokenizer": ', 'JSONDecodeError'),
    ('[]', ''),
    ('7', ''),
    ('[' * 100_000, 'RecursionError'),
    ('{"tokenizer": "char"}', 'vocab_size is None'),
    ('{"tokenizer": "char", "vocab_size": 3, "chars": "aab"}',
     'chars should be 3 different characters'),
    ('{"tokenizer": "char", "vocab_size": 3, "chars": 7}',
     'chars should be 3 different characters'),
    ('{"tokenizer": "char", "vocab_size": 70000, "chars": "a"}',
     'chars should be 70000 different characters'),
    ('{"tokenizer": "char", "vocab_size": 16777217, "chars": "a"}', 'vocab_size is 16777217'),
    ('{"tokenizer": "hf", "vocab_size": 300}', 'tokenizer_name should be a text'),
    ('{"tokenizer": "hf", "vocab_size": 300, "end_of_text": 300}', 'end_of_text is 300'),
    ('{"tokenizer": "hf", "vocab_size": 300, "tokenizer_name": "a", "tokenizer_sha256": "a", '
     '"tokenizer_json": ["a"]}', 'tokenizer_json should be a text'),
    ('{"tokenizer": "gpt2", "vocab_size": -1}', 'vocab_size is -1'),
    ('{"tokenizer": "gpt2", "vocab_size": 17}', "unknown tokenizer 'gpt2' of 17"),
    ('{"tokenizer": "../gpt2", "vocab_size": 17}', "unknown tokenizer '../gpt2'"),
    ('\udcff', 'UnicodeDecodeError'),
])
def test_a_damaged_meta_json_is_refused(tmp_path, meta, words):
    (tmp_path / 'meta.json').write_bytes(meta.encode('utf-8', 'surrogateescape'))
    line = f'meta.json cannot be read: .*{words}.*; prepare the dataset again'
    with pytest.raises(UserError, match=line):
        read_meta(tmp_path)


@pytest.mark.parametrize('content, words', [
    (pickle.dumps(Evil()), r'it asks to run \w+.system'),
    (pickle.dumps(dict(vocab_size=Evil())), r'it asks to run \w+.system'),
    (b'', ''),
    (pickle.dumps([1]), ''),
    (pickle.dumps({'vocab_size': 2, 'itos': {0: 'a', 1: 'a'}}), "ids 0 and 1 are both 'a'"),
    (pickle.dumps({'vocab_size': 10 ** 12, 'itos': {0: 'a'}}), ''),
    (b'\x80\x04r\xff\xff\xff\x7f.', ''),
])
def test_a_damaged_or_hostile_meta_pkl_is_refused(tmp_path, monkeypatch, content, words):
    monkeypatch.chdir(tmp_path)                                 # where Evil would create its file
    (tmp_path / 'meta.pkl').write_bytes(content)
    with pytest.raises(UserError, match=f'meta.pkl cannot be read: .*{words}'):
        read_meta(tmp_path)
    assert not (tmp_path / 'ran').exists()


@pytest.mark.parametrize('spec', [
    None,
    ['a'],
    {},
    {'tokenizer': 'char'},
    {'tokenizer': 'char', 'vocab_size': True, 'chars': 'a'},
    {'tokenizer': 'char', 'vocab_size': 17, 'chars': 7},
    {'tokenizer': ['gpt2'], 'vocab_size': 50257},
])
def test_a_damaged_spec_of_a_checkpoint_is_refused(spec):
    with pytest.raises(UserError):
        TokenizerSpec.from_dict(spec)


def test_a_silent_server_ends_the_download_of_gpt2s_encoding(monkeypatch, tmp_path):
    """tiktoken by itself waits without end. Here a proxy takes its request and never answers."""
    import tiktoken.registry
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(downloads, 'SECONDS_OF_SILENCE', 0.1)
    monkeypatch.setattr(downloads, 'SECONDS_BETWEEN_TRIES', 0)

    with socket.create_server(('127.0.0.1', 0)) as silent:
        proxy = f'http://127.0.0.1:{silent.getsockname()[1]}'
        for name in ('https_proxy', 'HTTPS_PROXY'):
            monkeypatch.setenv(name, proxy)
        for name in ('no_proxy', 'NO_PROXY'):
            monkeypatch.delenv(name, raising=False)
        words = 'encoding of GPT-2 could not be downloaded: .*TIKTOKEN_CACHE_DIR to a folder'
        with pytest.raises(RunError, match=words):
            Tokenizer(GPT2)
