"""Tokenizers of Hugging Face: encoded, decoded token by token, trained, recognized, written."""

import codecs
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from harness import ROOT
from hub_stand_in import Hub, commit_of

from engine.errors import RunError, UserError
from engine.hf.tokenizer_json import (
    GPT2_FINGERPRINT,
    add_tokens,
    bounded_words,
    extends,
    gpt2_files,
    hf_spec,
    known_spec,
    last_merge,
    named_spec,
    pretrained_spec,
    tokenizer_files,
    train_bpe,
)
from engine.meta_pkl import Vocabulary
from engine.prepare import encode
from engine.tokenizer import (
    GPT2,
    Tokenizer,
    TokenizerJson,
    add_characters,
    byte_letters,
    char_spec,
    read_meta,
    same_tokens,
    vocabulary_spec,
)

tokenizers = pytest.importorskip('tokenizers')
transformers = pytest.importorskip('transformers')

# what patterns and decoders treat specially
WORDS = ["it's", "we'll", "'", 'word', ' the', ' ', '  ', '\n', '\n\n  ', ' \n', '\t', '\r\n',
         '\u00a0', '\u3000', '\x1c', '12', '3.5', '...', '<|endoftext|>', 'naïve', '日本語。', '🙂',
         '👩\u200d👧', 'e\u0301', '\u2028', '-', 'I', '</s>']


def random_text(seed, length=200):
    choose = random.Random(seed).choice
    return ''.join(choose(WORDS) for _ in range(length))


TEXT = ''.join(random_text(seed) for seed in range(10))
PATTERN = r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"


def byte_level_bpe(*steps, use_regex=True, special=('<|endoftext|>',)):
    """A BPE tokenizer on bytes.

    `steps` split the text, and then GPT-2's pattern unless use_regex is False.
    """
    pre = tokenizers.pre_tokenizers
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    last = pre.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre.Sequence([*steps, last])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), show_progress=False,
        initial_alphabet=pre.ByteLevel.alphabet())
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


def with_digits():
    """As SmolLM2 splits."""
    return byte_level_bpe(tokenizers.pre_tokenizers.Digits(individual_digits=True))


def with_a_pattern_of_its_own():
    """As Llama 3 and Qwen split."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(PATTERN), 'isolated')
    return byte_level_bpe(split, use_regex=False)


def of_sentencepiece():
    """As Llama 2's: spaces are letters, bytes have names, <s> begins a text."""
    model = tokenizers.models.BPE(byte_fallback=True, unk_token='<unk>', fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme='first')
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace('▁', ' '), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(' ', 1, 0)])

    byte_names = [f'<0x{byte:02X}>' for byte in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=330, special_tokens=['<unk>', '<s>', '</s>', *byte_names], show_progress=False)
    tokenizer.train_from_iterator(['it is naive to say that it was, that it is'], trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A', special_tokens=[('<s>', 1)])
    return tokenizer


def write(folder, tokenizer, **config):
    """The files of a tokenizer as a hub has them."""
    folder.mkdir()
    (folder / 'tokenizer.json').write_text(tokenizer.to_str(), encoding='utf-8')
    (folder / 'tokenizer_config.json').write_text(
        json.dumps(dict(config, tokenizer_class='PreTrainedTokenizerFast')), encoding='utf-8')
    return str(folder)


@pytest.fixture(scope='module')
def gpt2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('gpt2')
    try:
        files = gpt2_files()
    except RunError as error:
        pytest.skip(str(error))
    for name, text in files.items():
        (folder / name).write_text(text, encoding='utf-8', newline='\n')
    return folder


# Encoding and decoding

@pytest.mark.parametrize('make, end', [
    (byte_level_bpe, '<|endoftext|>'),
    (with_digits, '<|endoftext|>'),
    (with_a_pattern_of_its_own, '<|endoftext|>'),
    (of_sentencepiece, '</s>'),
])
def test_a_folders_tokenizer_does_what_transformers_does(tmp_path, make, end):
    source = write(tmp_path / 'source', make(), eos_token=end)
    reference = transformers.AutoTokenizer.from_pretrained(source)
    spec = named_spec(source)
    tokenizer = Tokenizer(spec)
    assert tokenizer.vocab_size == len(reference)
    assert tokenizer.end_of_text == spec.end_of_text == reference.eos_token_id

    for text in ['', 'it is', random_text(1), f'a{end}b']:
        ids = tokenizer.encode(text)
        assert ids == reference(text).input_ids

        # token by token, as sample.py shows it
        decoder = codecs.getincrementaldecoder('utf-8')('replace')
        parts = [decoder.decode(tokenizer.decode_bytes([i])) for i in ids]
        parts.append(decoder.decode(b'', final=True))
        assert tokenizer.decode(ids) == ''.join(parts)

        # behind a first word, since decoders drop a space before that
        start = reference('it', add_special_tokens=False).input_ids
        expected = reference.decode(start + ids, clean_up_tokenization_spaces=False)
        assert 'it' + ''.join(parts) == expected


def test_a_documents_text_cannot_end_it(tmp_path):
    """Special tokens that a text spells are text. The document ends with one of the tokenizer's."""
    source = write(tmp_path / 'a', of_sentencepiece(), eos_token='</s>')
    tokenizer = Tokenizer(named_spec(source))
    encode = tokenizer.encode_to_numpy
    assert tokenizer.encode('a</s>b')[0] == 1
    assert 2 in tokenizer.encode('a</s>b')

    ids = encode('a</s>b').tolist()
    assert not {1, 2} & set(ids)
    assert tokenizer.decode(ids).strip() == 'a</s>b'
    assert encode('a</s>b', as_document=True).tolist() == [1, *ids, 2]
    assert encode('\ud83d a').tolist() == encode('\ufffd a').tolist()    # half a surrogate pair


@pytest.mark.parametrize('make, may_be_cut', [
    (byte_level_bpe, True),
    (with_digits, True),
    (with_a_pattern_of_its_own, False),
    (of_sentencepiece, False),
])
def test_documents_are_cut_only_where_the_tokens_stay_the_same(
        tmp_path, monkeypatch, make, may_be_cut):
    tokenizer = Tokenizer(named_spec(write(tmp_path / 'a', make())))
    assert tokenizer.splits_like_gpt2 == may_be_cut

    monkeypatch.setattr(encode, 'PIECE', 3)
    unchanged = True
    for seed in range(100):
        text = random_text(seed, 50)
        pieces = [piece for piece, _ in encode.safe_pieces([text])]
        assert len(pieces) > 1
        ids = [i for piece in pieces for i in tokenizer.encode_to_numpy(piece).tolist()]
        unchanged &= ids == tokenizer.encode_to_numpy(text).tolist()
    assert unchanged == may_be_cut                  # the others show that the test can fail


ADDED = dict(id=0, content='x y', special=False, single_word=False, lstrip=False, rstrip=False,
             normalized=False)
WITH_PREFIX = dict(type='ByteLevel', add_prefix_space=True, trim_offsets=True, use_regex=True)


@pytest.mark.parametrize('change', [
    dict(pre_tokenizer=WITH_PREFIX),
    dict(normalizer=dict(type='NFC')),
    dict(pre_tokenizer=None),
    dict(added_tokens=[ADDED]),
])
def test_a_tokenizer_that_looks_across_a_cut_is_not_cut(change):
    parts = json.loads(byte_level_bpe().to_str())
    parts['model']['vocab']['x y'] = parts['model']['vocab'].pop('<|endoftext|>')
    if 'added_tokens' not in change:
        parts['added_tokens'] = []
    assert TokenizerJson(json.dumps(dict(parts, added_tokens=[]))).splits_like_gpt2
    assert not TokenizerJson(json.dumps(dict(parts, **change))).splits_like_gpt2


def test_truncation_and_padding_of_a_tokenizer_json_are_ignored():
    tokenizer = byte_level_bpe()
    expected = tokenizer.encode(TEXT).ids
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=10)
    assert TokenizerJson(tokenizer.to_str()).encode(TEXT) == expected


def test_ids_over_65535_take_four_bytes(tmp_path):
    vocabulary = {f'w{i}': i for i in range(70_000)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token='w0')
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    ids = Tokenizer(named_spec(write(tmp_path / 'a', tokenizer))).encode_to_numpy('w69999 w1')
    assert ids.dtype == '<u4'
    assert ids.tolist() == [69999, 1]
    assert Tokenizer(char_spec(set('ab'))).encode_to_numpy('ab').dtype == '<u2'


# Training

def slow_bpe(text, vocab_size):
    """Merges of byte-level BPE as the paper has them.

    Count all pairs, merge the most frequent one, begin again. Of equal pairs, merge the one of
    smaller ids.
    """
    regex = pytest.importorskip('regex')
    letters = byte_letters()
    ids = {letter: i for i, letter in enumerate(['<|endoftext|>', *sorted(letters)])}
    pattern = (r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+"
               r'|\s+(?!\S)|\s+')
    words = [[letters[byte] for byte in word.encode()] for word in regex.findall(pattern, text)]

    merges = []
    while len(ids) < vocab_size:
        pairs = Counter(pair for word in words for pair in pairwise(word))
        highest = max(pairs.values())
        most_frequent = [pair for pair, count in pairs.items() if count == highest]
        a, b = min(most_frequent, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
        merges.append([a, b])
        ids[a + b] = len(ids)

        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i] == a and word[i + 1] == b:
                    word[i:i + 2] = [a + b]
                i += 1
    return ids, merges


def test_training_merges_the_most_frequent_pairs():
    spec = train_bpe([TEXT[:3000], TEXT[3000:6000]], 300)
    model = json.loads(spec.tokenizer_json)['model']
    ids, merges = slow_bpe(TEXT[:6000], 300)
    assert model['vocab'] == ids
    assert model['merges'] == merges
    assert spec.vocab_size == 300

    tokenizer = Tokenizer(spec)
    for text in (random_text(99), 'unseen: ÿ 漢字'):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.splits_like_gpt2
    assert tokenizer.encode('<|endoftext|>') == [tokenizer.end_of_text]


def test_training_gives_the_same_tokenizer_with_one_thread_and_with_several():
    code = ('from engine.hf.tokenizer_json import train_bpe; import sys; '
            'print(train_bpe([sys.argv[1]] * 9, 380).tokenizer_sha256)')
    found = set()
    for threads in ('1', '3'):
        variables = dict(os.environ, RAYON_NUM_THREADS=threads, PYTHONHASHSEED=threads)
        done = subprocess.run([sys.executable, '-c', code, TEXT], cwd=ROOT, text=True,
                              capture_output=True, check=True, env=variables)
        found.add(done.stdout.strip())
    assert found == {train_bpe([TEXT] * 9, 380).tokenizer_sha256}


def test_a_short_text_gives_fewer_tokens():
    spec = train_bpe(['abab'], 4096)
    tokenizer = Tokenizer(spec)
    assert 257 < spec.vocab_size < 262
    assert tokenizer.decode(tokenizer.encode('abab')) == 'abab'


@pytest.mark.parametrize('text, lengths', [
    ('word ' * 1000, [5000]),
    ('A' * 2500, [1000, 1000, 500]),
    ('a b' + '\n' * 1500 + 'c', [1003, 501]),
    ('漢' * 1000, [1000]),
    ('', [])])
def test_a_word_is_bounded_only_where_it_is_long(text, lengths):
    pieces = list(bounded_words([text]))
    assert ''.join(pieces) == text
    assert list(map(len, pieces)) == lengths


# GPT-2 and characters as files

@pytest.mark.parametrize('without', [(), ('tokenizer.json',), ('vocab.json', 'merges.txt')])
def test_gpt2s_files_give_tiktokens_ids(gpt2_folder, tmp_path, without):
    """Readers take either tokenizer.json or vocab.json and merges.txt."""
    import tiktoken
    for path in gpt2_folder.iterdir():
        if path.name not in without:
            (tmp_path / path.name).write_bytes(path.read_bytes())

    reference = tiktoken.get_encoding('gpt2')
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer).__name__ == 'GPT2Tokenizer'
    assert len(tokenizer) == 50257
    assert tokenizer.eos_token_id == 50256

    for text in [TEXT, 'x' * 300, ''.join(map(chr, range(32, 0x3000, 7))), '🙂🏳️‍🌈 👩‍👩‍👧‍👦',
                 '<|endoftext|>a<|endoftext|>']:
        ids = reference.encode(text, allowed_special='all')
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert pretrained_spec(str(tmp_path)) == GPT2


def test_gpt2s_tokenizer_is_recognized_however_it_is_written(gpt2_folder, tmp_path):
    transformers.AutoTokenizer.from_pretrained(gpt2_folder).save_pretrained(tmp_path)
    text = (tmp_path / 'tokenizer.json').read_text(encoding='utf-8')
    assert text != (gpt2_folder / 'tokenizer.json').read_text(encoding='utf-8')
    assert TokenizerJson(text).fingerprint == GPT2_FINGERPRINT
    assert known_spec(text) == GPT2

    # two merges in another order
    parts = json.loads(text)
    parts['model']['merges'][100:102] = parts['model']['merges'][101:99:-1]
    assert known_spec(json.dumps(parts)) is None


def test_tokens_that_are_added_to_gpt2s_follow_its_own(gpt2_folder):
    import tiktoken
    plain = tiktoken.get_encoding('gpt2')
    markers = {'<|user|>': 50257, '<|bot|>': 50258}
    reference = tiktoken.Encoding(
        'with markers', pat_str=plain._pat_str, mergeable_ranks=plain._mergeable_ranks,
        special_tokens={'<|endoftext|>': 50256, **markers})

    spec = add_tokens(GPT2, list(markers))
    tokenizer = Tokenizer(spec)
    text = TEXT + '<|user|>  a <|bot|>\n\n' + TEXT
    assert spec.vocab_size == 50259
    assert spec.end_of_text == 50256
    assert tokenizer.encode(text) == reference.encode(text, allowed_special='all')
    assert tokenizer.encode_to_numpy(text).tolist() == plain.encode_ordinary(text)

    # cut where a long text is cut, the tokens stay the same
    counted = Tokenizer(replace(spec, special_tokens=True))
    assert counted.splits_like_gpt2
    pieces = [piece for piece, _ in encode.document_pieces([text] * 300, counted)]
    assert len(pieces) > 1
    ids = [i for piece in pieces for i in counted.encode_to_numpy(piece).tolist()]
    assert ids == reference.encode(text * 300, allowed_special='all')

    # a space within a token might be such a place
    spaced = add_tokens(GPT2, ['<|a user|>'])
    assert Tokenizer(spaced).splits_like_gpt2
    assert not Tokenizer(replace(spaced, special_tokens=True)).splits_like_gpt2


@pytest.mark.parametrize('start', ['gpt2', 'char', 'bpe'])
def test_a_vocabulary_with_more_tokens_is_told_from_another(start, request):
    if start == 'gpt2':
        request.getfixturevalue('gpt2_folder')
        known = GPT2
    elif start == 'char':
        known = char_spec('abc')
    else:
        known = train_bpe([TEXT], 300)

    larger = add_tokens(known, ['<|user|>'])
    assert extends(larger, known)
    assert extends(add_tokens(larger, ['<|bot|>']), larger)
    assert not extends(known, known)
    assert not extends(known, larger)
    assert not extends(larger, char_spec('abd'))
    assert not extends(larger, train_bpe(['abd'], 258))
    assert same_tokens(larger, add_tokens(known, ['<|user|>']))


def test_characters_are_added_behind_the_others():
    known = char_spec('bd')
    larger = add_characters(known, 'ca')
    assert larger.chars == 'bdac'
    assert extends(larger, known)
    assert not extends(char_spec('bcd'), known)


def test_the_last_merge_of_a_token_is_found():
    """A token of four bytes that two orders of merging would make in different ways."""
    tokens = [b'a', b'b', b'c', b'd', b'bc', b'ab', b'abc', b'cd', b'abcd']
    ranks = {token: i for i, token in enumerate(tokens)}
    assert last_merge(b'ab', ranks) == [b'a', b'b']
    assert last_merge(b'abc', ranks) == [b'a', b'bc']
    assert last_merge(b'abcd', ranks) == [b'abc', b'd']


def test_characters_as_files_come_back(tmp_path):
    spec = char_spec(set(' \n\tabcé漢🙂"\\▁#'))
    for name, text in tokenizer_files(spec).items():
        (tmp_path / name).write_text(text, encoding='utf-8', newline='\n')

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = ' a\n\n  bé\t漢🙂 "\\▁# c '
    assert tokenizer(text).input_ids == Tokenizer(spec).encode(text)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.eos_token is None
    assert pretrained_spec(str(tmp_path)) == spec

    with pytest.raises(Exception, match='UNK'):
        tokenizer('z')
    with pytest.raises(UserError, match='half a surrogate pair'):
        tokenizer_files(char_spec({'a', '\ud83d'}))


def test_other_tokenizers_are_written_as_they_were(tmp_path):
    source = write(tmp_path / 'a', of_sentencepiece(), eos_token='</s>', pad_token='<unk>')
    spec = named_spec(source)
    (tmp_path / 'b').mkdir()
    for name, text in tokenizer_files(spec).items():
        (tmp_path / 'b' / name).write_text(text, encoding='utf-8')
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / 'b').pad_token == '<unk>'

    again = named_spec(str(tmp_path / 'b'))
    assert same_tokens(spec, again)
    assert spec.tokenizer_name != again.tokenizer_name


# What cannot be used

def test_no_code_of_a_folder_is_run(tmp_path):
    auto_map = {'AutoTokenizer': ['evil.Evil', 'evil.Evil']}
    source = write(tmp_path / 'a', byte_level_bpe(), auto_map=auto_map)
    code = f'open({str(tmp_path / "ran")!r}, "w")\nclass Evil: pass'
    (tmp_path / 'a' / 'evil.py').write_text(code, encoding='utf-8')

    spec = named_spec(source)
    assert not (tmp_path / 'ran').exists()
    assert 'evil' not in spec.tokenizer_config


LARGE_ID = ('{"version": "1.0", "added_tokens": [], "model": '
            '{"type": "BPE", "vocab": {"a": 4294967295}, "merges": []}}')


@pytest.mark.parametrize('files, words', [
    ({}, 'holds no tokenizer'),
    ({'config.json': '{"model_type": "gpt2"}'}, 'holds no tokenizer'),
    ({'tokenizer.json': '{'}, 'cannot be used'),
    ({'tokenizer.json': '[]'}, 'cannot be used'),
    ({'tokenizer.json': ''}, 'cannot be used'),
    ({'vocab.json': '7', 'merges.txt': ''}, 'cannot be used'),
    ({'tokenizer.json': LARGE_ID}, 'has the id 4,294,967,295'),
    ({'meta.json': '{"tokenizer": "hf"}'}, 'vocab_size is None'),
])
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, files, words):
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    with pytest.raises(UserError, match=words) as caught:
        named_spec(str(tmp_path))
    assert '\n' not in str(caught.value)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no named pipes here')
def test_a_pipe_in_a_folder_is_refused(tmp_path):
    source = write(tmp_path / 'a', byte_level_bpe())
    (tmp_path / 'a' / 'tokenizer_config.json').unlink()
    os.mkfifo(tmp_path / 'a' / 'tokenizer_config.json')
    with pytest.raises(UserError, match='tokenizer_config.json is not a regular file'):
        named_spec(source)


def test_names_that_are_no_tokenizers_are_refused():
    for name in ('word', 'gpt-2', '', 'a/b/c'):
        with pytest.raises(UserError, match='is unknown; try --tokenizer=gpt2'):
            named_spec(name)


@pytest.mark.parametrize('source', ['some/name', 'some/name@v1'])
def test_a_hub_name_is_stored_with_its_revision(tmp_path, monkeypatch, source):
    """By the real client."""
    write(tmp_path / 'a', byte_level_bpe())
    files = {path.name: path.read_bytes() for path in (tmp_path / 'a').iterdir()}
    older = {**files, 'readme.md': b'older'}
    hub = Hub({'some/name': files}, {'some/name': {'v1': older}})
    hub.reach(monkeypatch, tmp_path)

    spec = named_spec(source)
    hub.close()
    expected = commit_of(older if '@' in source else files)
    assert spec.tokenizer_name == 'some/name'
    assert spec.tokenizer_revision == expected
    assert re.fullmatch('[0-9a-f]{64}', spec.tokenizer_sha256)

    with pytest.raises(RunError, match='the tokenizer of other/name could not be downloaded: no c'):
        named_spec('other/name')


def test_a_sentencepiece_file_alone_asks_for_its_package(tmp_path, monkeypatch):
    import transformers.utils
    monkeypatch.setattr(transformers.utils, 'is_sentencepiece_available', lambda: False)
    (tmp_path / 'tokenizer.model').write_bytes(b'\x0e')
    with pytest.raises(UserError, match='tokenizer.model is .*; pip install sentencepiece'):
        named_spec(str(tmp_path))


@pytest.mark.parametrize('beside', [None, {'model_type': 'gpt2'}])
def test_byte_pairs_alone_are_enough(tmp_path, beside):
    """vocab.json and merges.txt, as their library saves them, perhaps beside weights."""
    library = tokenizers.ByteLevelBPETokenizer()
    library.train_from_iterator([TEXT], vocab_size=400, special_tokens=['<s>', '</s>'])
    library.save_model(str(tmp_path))
    if beside:
        (tmp_path / 'config.json').write_text(json.dumps(beside))

    spec = pretrained_spec(str(tmp_path))
    assert spec == named_spec(str(tmp_path))
    tokenizer = Tokenizer(spec)
    assert (spec.vocab_size, spec.end_of_text) == (400, 1)
    assert tokenizer.encode(TEXT) == library.encode(TEXT).ids
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT


@pytest.mark.parametrize('texts', [['<eos>', 'the', 'cat'], ['a', '\n', '<|endoftext|>', '</s>']])
def test_the_table_of_a_dataset_comes_back_from_an_export(tmp_path, texts):
    spec = vocabulary_spec(Vocabulary(len(texts), dict(enumerate(texts)), are_numbers=False))
    for name, text in tokenizer_files(spec).items():
        (tmp_path / name).write_text(text, encoding='utf-8')
    assert same_tokens(named_spec(str(tmp_path)), spec)
    assert named_spec(str(tmp_path)).end_of_text == spec.end_of_text


def test_byte_pairs_alone_may_be_gpt2s(gpt2_folder, tmp_path):
    for name in ('vocab.json', 'merges.txt'):
        shutil.copy(gpt2_folder / name, tmp_path)
    assert named_spec(str(tmp_path)) == GPT2


def test_pairs_of_characters_alone_are_refused(tmp_path):
    library = tokenizers.CharBPETokenizer()
    library.train_from_iterator([TEXT], vocab_size=100)
    library.save_model(str(tmp_path))
    with pytest.raises(UserError, match='lacks tokens for some bytes.*save it as a tokenizer.json'):
        named_spec(str(tmp_path))


def test_a_damaged_spec_is_refused_when_it_is_used():
    spec = train_bpe([TEXT], 300)
    other = train_bpe(['another text'], 270)
    changes = [
        (dict(tokenizer_json='{'), 'cannot be used'),
        (dict(tokenizer_json=other.tokenizer_json), 'is damaged'),
        (dict(vocab_size=299), 'is damaged'),
        (dict(vocab_size=301), 'is damaged'),
    ]
    for change, words in changes:
        with pytest.raises(UserError, match=words):
            Tokenizer(replace(spec, **change))


def test_a_spec_goes_through_meta_json(tmp_path):
    spec = train_bpe([TEXT], 300)
    meta = dict(spec.to_dict(), tokens={'train': 1}, sha256={}, dtype='uint16')
    (tmp_path / 'meta.json').write_text(json.dumps(meta), encoding='utf-8')
    again = read_meta(tmp_path)
    assert again == spec == named_spec(str(tmp_path))
    expected = Tokenizer(spec).encode_to_numpy(TEXT)
    assert np.array_equal(Tokenizer(again).encode_to_numpy(TEXT), expected)


@pytest.mark.parametrize('name, content', [
    ('tokenizer.json', dict(model=dict(type='WordLevel', vocab={'a': 2 ** 31}, unk_token=''))),
    ('tokenizer.json', dict(added_tokens=[dict(id=2 ** 31, content='a')], model=dict(vocab=[]))),
    ('vocab.json', {'a': 2 ** 31}),
    ('added_tokens.json', {'a': 2 ** 31}),
    ('tokenizer_config.json', dict(added_tokens_decoder={str(2 ** 31): dict(content='a')})),
])
def test_a_huge_id_is_refused_before_the_library_counts_to_it(tmp_path, name, content):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({'a': 0}))
    (tmp_path / 'tokenizer.json').write_text(tokenizer.to_str())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=f'the {name} has the id 2,147,483,648, and ids should be'):
        named_spec(str(tmp_path))
    if name == 'tokenizer.json':
        with pytest.raises(UserError, match='the tokenizer.json has the id 2,147,483,648'):
            TokenizerJson(json.dumps(content))


@pytest.mark.parametrize('template, before, after', [
    ('[CLS] $A [SEP]', ['[CLS]'], ['[SEP]']),
    ('$A [SEP]', [], ['[SEP]']),
    ('[CLS] $A', ['[CLS]'], []),
    ('$A', [], []),
])
@pytest.mark.parametrize('text', ['a b a', '', 'b [SEP]'])
def test_a_prompt_ends_where_its_text_does(template, before, after, text):
    """What a tokenizer puts after a text would end the text that a model should go on with."""
    vocabulary = {token: i for i, token in enumerate(['a', 'b', '[CLS]', '[SEP]'])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary))
    tokenizer.add_special_tokens(['[CLS]', '[SEP]'])
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=template, special_tokens=[(t, vocabulary[t]) for t in ('[CLS]', '[SEP]')])

    file = TokenizerJson(tokenizer.to_str())
    assert file.encode(text) == [vocabulary[token] for token in before + text.split()]
    if '[SEP]' not in text:
        document = [vocabulary[token] for token in before + text.split() + after]
        assert file.encode_data(text, as_document=True) == document


# Characters without a token

def plain_bpe(characters, **options):
    vocabulary = {character: i for i, character in enumerate(characters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], **options))
    return Tokenizer(hf_spec(tokenizer.to_str(), '{}', None, 'plain'))


def test_characters_without_a_token_are_counted(monkeypatch):
    logged = []
    monkeypatch.setattr(encode.log, 'info', logged.append)
    counting = encode.CountingEncoder(plain_bpe('abc '))
    text = 'a b c\n' * 1000 + 'xx' + 'y'
    assert len(counting.encode(text)) == 5 * 1000
    counting.finish()
    assert logged == [f"note: the tokenizer has no token for 3 of {len(text):,} characters "
                      f"(0.05%), such as 'x'; these are left out"]


def test_too_many_characters_without_a_token_are_refused():
    counting = encode.CountingEncoder(plain_bpe('abc'))
    counting.encode('abc' * 300 + 'x')
    with pytest.raises(UserError, match=r"no token for 1 of 901 characters \(0.11%\), such as 'x'"):
        counting.finish()

    # a long text need not be read to its end
    with pytest.raises(UserError, match="no token for 201 of 1,101 .* name another --tokenizer="):
        counting.encode('x' * 200)


@pytest.mark.parametrize('options', [
    dict(characters=byte_letters() + ['<0x41>']),
    dict(characters=['?', 'a'], unk_token='?'),
    dict(characters=[f'<0x{byte:02X}>' for byte in range(256)], byte_fallback=True),
])
def test_a_tokenizer_that_drops_nothing_costs_no_time(options):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(
        {token: i for i, token in enumerate(options.pop('characters'))}, [], **options))
    is_byte_level = not options
    if is_byte_level:
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert not TokenizerJson(tokenizer.to_str()).drops_characters
    assert len(TokenizerJson(tokenizer.to_str()).encode_data('é')) > 0

    # one byte is missing
    if is_byte_level:
        parts = json.loads(tokenizer.to_str())
        del parts['model']['vocab']['A']
        assert TokenizerJson(json.dumps(parts)).drops_characters
