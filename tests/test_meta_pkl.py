"""The vocabularies in a meta.pkl as people write it, and pickles that would do more than that."""

import builtins
import collections
import pickle
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from engine.errors import UserError
from engine.plain_pickle import load_plain
from engine.tokenizer import GPT2, NUMBERS, DatasetMeta, Tokenizer, TokenizerSpec, read_meta

CHARS = sorted('\n abcdefg')
ITOS = dict(enumerate(CHARS))
STOI = {char: i for i, char in ITOS.items()}


def write_meta(folder, content, protocol=None):
    (folder / 'meta.pkl').write_bytes(pickle.dumps(content, protocol))


def tokenizer_of(folder, content, protocol=None):
    write_meta(folder, content, protocol)
    return Tokenizer(read_meta(folder))


# Vocabularies

@pytest.mark.parametrize('protocol', [0, 1, 2, 4, 5])
@pytest.mark.parametrize('meta', [
    dict(vocab_size=9, itos=ITOS, stoi=STOI),
    dict(itos=ITOS),
    dict(stoi=STOI),
    dict(vocab_size=9, itos=CHARS),
    dict(vocab_size=9, itos=tuple(CHARS), stoi=STOI),
    dict(vocab_size=np.int64(9), itos={np.int32(i): np.str_(char) for i, char in ITOS.items()}),
    dict(vocab_size=9, itos=collections.OrderedDict(ITOS),
         stoi=collections.defaultdict(int, STOI)),
    collections.OrderedDict(vocab_size=9, itos=collections.defaultdict(str, ITOS)),
    dict(vocab_size=9, itos=ITOS, chars=set(CHARS), merges={(1, 2): 3}, loss=np.float64(1)),
], ids=range(9))
def test_characters_are_read_however_their_tables_are_written(tmp_path, meta, protocol):
    write_meta(tmp_path, meta, protocol)
    assert read_meta(tmp_path) == TokenizerSpec('char', 9, chars=''.join(CHARS))


class OrderedDictOfPython2:
    """Is pickled as Python 2 pickles an OrderedDict: a call with a list of its items."""

    def __reduce__(self):
        return collections.OrderedDict, ([[0, 'a'], [1, 'b']],)


def test_an_ordered_dict_of_python_2_is_refused_and_not_read_as_empty(tmp_path):
    write_meta(tmp_path, dict(vocab_size=2, itos=OrderedDictOfPython2()), protocol=2)
    with pytest.raises(UserError, match='an OrderedDict of Python 2; save a plain dict'):
        read_meta(tmp_path)


WORDS = ['the', 'cat', 'sat', 'a', '<eos>']


@pytest.mark.parametrize('itos, text, ids', [
    (WORDS, 'the cat sat <eos>', [0, 1, 2, 4]),
    (['<unk>', *WORDS], 'the dog', [1, 0]),
    (['the', '\n', 'cat'], 'the\ncat the', [0, 1, 2, 0]),
    ([*CHARS, '<eos>'], 'bad\n<eos>a', [3, 2, 5, 0, 9, 2]),
    (['a', 'b', 'ab', 'abc', '.*', ' '], 'abc abba.*', [3, 5, 2, 1, 0, 4]),
    (['▁the', '▁c', 'at', 's'], '▁the▁cats', [0, 1, 2, 3]),
    ({i: 2 * i for i in range(50)}, '14 0 98', [7, 0, 49]),
    (list(range(12)), '3 11', [3, 11]),
    ([b'a', b'\xc3\xa9', b'\xc3'], 'aé<2>', [0, 1, 2]),
    ([1.5, 2.5], '2.5 1.5', [1, 0]),
])
def test_tokens_of_several_characters_encode_prompts_and_are_decoded(tmp_path, itos, text, ids):
    tokenizer = tokenizer_of(tmp_path, dict(itos=itos))
    assert tokenizer.encode(text) == ids
    decoded = tokenizer.decode(ids)
    assert decoded.split() == tokenizer.decode([]).split() + decoded.split()
    if '<unk>' not in itos:
        assert decoded.replace(' ', '') == text.replace(' ', '')
    assert tokenizer.encode_to_numpy(text).tolist() == ids


def test_words_have_a_space_between_them(tmp_path):
    tokenizer = tokenizer_of(tmp_path, dict(itos=WORDS))
    assert tokenizer.decode([0, 1, 2]) == ' the cat sat'
    assert tokenizer.default_prompt() == 'the'
    with pytest.raises(UserError, match="'dog' is none of its 5 tokens, such as 'the' 'cat'"):
        tokenizer.encode('the dog')


def test_an_end_of_text_is_known_by_its_name(tmp_path):
    assert tokenizer_of(tmp_path, dict(itos=WORDS)).end_of_text == 4
    assert tokenizer_of(tmp_path, dict(itos=WORDS[:4])).end_of_text is None


@pytest.mark.parametrize('meta', [
    dict(vocab_size=1500),
    dict(vocab_size=np.int64(1500)),
    dict(vocab_size=1500, itos={}, stoi={}),
])
def test_a_size_alone_has_numbers_for_tokens(tmp_path, meta):
    tokenizer = tokenizer_of(tmp_path, meta)
    assert tokenizer.vocab_size == 1500
    assert tokenizer.encode('17 1499') == [17, 1499]
    assert tokenizer.decode([17, 1499]) == ' 17 1499'
    assert tokenizer.default_prompt() == '0'
    assert tokenizer.spec.tokenizer_name == NUMBERS


def test_ids_without_a_token_are_written_as_such(tmp_path):
    """Sizes are padded, and tables have holes."""
    tokenizer = tokenizer_of(tmp_path, dict(vocab_size=12, itos=ITOS))
    assert tokenizer.vocab_size == 12
    assert tokenizer.encode('bad\n') == [3, 2, 5, 0]
    assert tokenizer.decode([3, 11, 2]) == 'b<11>a'

    tokenizer = tokenizer_of(tmp_path, dict(itos={0: '<1>', 2: 'bc'}))
    assert tokenizer.decode([0, 1, 2]).split() == ['<1>', '<<1>>', 'bc']


def test_a_size_that_leaves_out_ids_grows(tmp_path):
    assert tokenizer_of(tmp_path, dict(vocab_size=3, itos=ITOS)).vocab_size == 9


def test_a_spec_of_words_goes_through_a_checkpoint(tmp_path):
    spec = tokenizer_of(tmp_path, dict(itos=WORDS)).spec
    assert TokenizerSpec.from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize('content, spec, dtype', [
    ('{"dtype": "int64"}', TokenizerSpec('char', 9, chars=''.join(CHARS)), 'int64'),
    ('{"tokenizer": "gpt2", "dtype": "uint32"}', GPT2, 'uint32'),
])
def test_a_meta_json_without_a_tokenizer_leaves_it_to_meta_pkl(tmp_path, content, spec, dtype):
    write_meta(tmp_path, dict(itos=ITOS))
    (tmp_path / 'meta.json').write_text(content)
    assert DatasetMeta.read(tmp_path) == DatasetMeta(spec, dtype=dtype)


def test_a_meta_json_may_have_a_size_alone(tmp_path):
    (tmp_path / 'meta.json').write_text('{"vocab_size": 300}')
    spec = read_meta(tmp_path)
    assert (spec.vocab_size, spec.tokenizer_name) == (300, NUMBERS)


# What no vocabulary has

@pytest.mark.parametrize('meta, words', [
    ([1], 'should be a dict with vocab_size'),
    (dict(chars=CHARS), 'should be a dict with vocab_size'),
    (dict(vocab_size=0), 'from 1 to 1,048,576'),
    (dict(vocab_size=10 ** 12), 'from 1 to 1,048,576'),
    (dict(vocab_size='65'), 'from 1 to 1,048,576'),
    (dict(itos={10 ** 9: 'a'}), 'from 1 to 1,048,576'),
    (dict(itos={-1: 'a'}), 'itos should map ids'),
    (dict(itos={'a': 0}), 'itos should map ids'),
    (dict(itos='abc'), 'itos should map ids'),
    (dict(stoi=['a']), 'stoi should map tokens'),
    (dict(vocab_size=2, stoi={'a': 0, 'b': 1.0}), 'stoi should map tokens to ids, which are whole'),
    (dict(itos=['a', 'bc', 'a']), "ids 0 and 2 are both 'a'"),
])
def test_an_impossible_vocabulary_is_refused(tmp_path, meta, words):
    write_meta(tmp_path, meta)
    with pytest.raises(UserError, match=f'meta.pkl cannot be read: .*{words}') as refused:
        read_meta(tmp_path)
    assert '\n' not in str(refused.value)


def test_a_size_stands_in_for_a_meta_pkl_that_cannot_be_read(tmp_path):
    """As its refusal says."""
    write_meta(tmp_path, {'vocab_size': 65, 'encode': b'x', 'itos': 'abc'})
    with pytest.raises(UserError, match='or write {"vocab_size": SIZE} to .*meta.json, so'):
        read_meta(tmp_path)
    (tmp_path / 'meta.json').write_text('{"vocab_size": 65}')
    assert read_meta(tmp_path).vocab_size == 65


# Pickles that would do more

class Call:
    """Unpickling it calls a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class State:
    """An object of a class, with attributes."""


def nested_tuple(depth):
    """A pickle of a tuple in a tuple ..., as the key of a dict."""
    return b'\x80\x02})' + b'\x85' * depth + b'K\x01s.'


HOSTILE = dict(
    function=pickle.dumps(Call(exec, 'ran = True')),
    getattr=pickle.dumps(Call(getattr, 'a', 'upper')),
    path=pickle.dumps(Path('a')),
    name_of_two_lines=b'\x80\x04\x8c\x03a\nb\x8c\x01c\x93.',
    state=pickle.dumps(State()),
    int_is_not_called=pickle.dumps(Call(int, '9' * 100)),
    dict_is_not_called=pickle.dumps(Call(dict, [(1, 2)])),
    attributes_of_a_function=b'\x80\x02ccollections\nOrderedDict\n}X\x01\x00\x00\x00aK\x01sb.',
    attributes_of_a_class=b'\x80\x02cnumpy\ndtype\n}X\x01\x00\x00\x00aK\x01sb.',
    method_by_dots=b'\x80\x04\x8c\x08builtins\x8c\x08str.join\x93.',
    defaultdict_of_a_function=pickle.dumps(collections.defaultdict(exec)),
    array=pickle.dumps(np.arange(3)),
    complex=pickle.dumps(np.complex128(1)),
    long_text_of_numpy=pickle.dumps(np.str_('a' * 20_000)),
    deep_key=nested_tuple(20_000),
    huge_key=pickle.dumps({2 ** 61: 1}),
    huge_bytearray=b'\x80\x05\x96' + struct.pack('<Q', 1 << 40) + b'.',
    huge_bytes=b'\x80\x04\x8e' + struct.pack('<Q', 1 << 40) + b'.',
    huge_frame=b'\x80\x04\x95' + struct.pack('<Q', 1 << 60) + b'.',
    huge_int=b'\x80\x02\x8b\xff\xff\xff\x7f.',
    decimal=b'I' + b'9' * 100_000 + b'\n.',
    persistent=b'\x80\x02K\x01Q.',
    extension=b'\x80\x02\x82\x01.',
    instance=b'(ios\nsystem\n.',
    unknown_opcode=b'\x80\x04\xf0.',
    nothing=b'',
    cut=pickle.dumps(ITOS)[:-5],
    no_stack=b'.',
)


@pytest.mark.parametrize('kind', HOSTILE)
def test_a_pickle_of_more_than_plain_values_is_refused(kind):
    content = HOSTILE[kind]
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as refused:
            load_plain(content)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert '\n' not in str(refused.value)
    assert peak < 1e6 + 300 * len(content)
    assert not hasattr(builtins, 'ran')


def test_a_memo_of_a_huge_number_takes_no_memory():
    """The unpickler in C takes 16 GB for it."""
    assert load_plain(b'\x80\x04}r\xff\xff\xff\x7f.') == {}


@pytest.mark.parametrize('value', [
    {}, [1, -2, 2.5, None, True, 'é', b'a', 10 ** 30], {'a': {1: [()]}}, (1, (2, 3)), {1, 2},
    list(range(2000)), {i: str(i) for i in range(2000)}, [[]] * 3])
@pytest.mark.parametrize('protocol', range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_those_of_pickle(value, protocol):
    content = pickle.dumps(value, protocol)
    found = load_plain(content)
    if isinstance(value, set):          # which nobody reads
        found = set(found)
    assert found == value
