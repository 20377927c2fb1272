"""The prepare scripts: text in, a whole dataset out, and an earlier one kept until then."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import pickletools
import re
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from harness import ROOT
from hub_stand_in import Fault, Hub
from prepare_harness import (
    contents,
    load,
    meta,
    random_text,
    run,
    sha256,
    tokens,
    write_jsonl,
    write_parquet,
)

import configurator
from engine import downloads
from engine.errors import RunError, UserError
from engine.prepare import dataset_writer, encode, publish, text_files
from engine.tokenizer import GPT2, Tokenizer, char_spec, code_points, read_meta

# all scripts but that of the evaluation tasks, which makes no dataset
SCRIPTS = sorted({path.parent.name for path in ROOT.glob('data/*/prepare.py')} - {'evals'})


# cutting and encoding

def test_python_calls_all_whitespace_of_gpt2s_pattern_whitespace():
    regex = pytest.importorskip('regex')
    spaces = regex.findall(r'\p{White_Space}', ''.join(map(chr, range(0x110000))))
    assert len(spaces) > 20 and all(space.isspace() for space in spaces)


@pytest.mark.parametrize('seed', range(20))
def test_a_document_cut_in_pieces_has_the_tokens_of_the_whole(gpt2, monkeypatch, seed):
    monkeypatch.setattr(encode, 'PIECE', 1 + seed)
    text = random_text(500, seed)
    parts = [text[i:i + 13] for i in range(0, len(text), 13)]
    pieces = list(encode.safe_pieces(parts))
    assert len(pieces) > 20
    assert ''.join(piece for piece, _ in pieces) == text
    assert [is_last for _, is_last in pieces] == [False] * (len(pieces) - 1) + [True]
    ids = [i for piece, _ in pieces for i in gpt2.encode_ordinary(piece)]
    assert ids == gpt2.encode_ordinary(text)


@pytest.mark.parametrize('text', ['', 'a <|endoftext|> b', 'half a pair \ud83d here',
                                  random_text(300, 99)])
def test_ids_equal_encode_ordinary(gpt2, text):
    assert Tokenizer(GPT2).encode_to_numpy(text).tolist() == gpt2.encode_ordinary(text)


def test_results_keep_their_order_and_few_are_in_flight():
    started = []
    results = encode.in_order(lambda i: i * i, (started.append(i) or i for i in range(100)), 3)
    assert next(results) == 0 and len(started) <= 8
    assert list(results) == [i * i for i in range(1, 100)]


# reading

@pytest.mark.parametrize('block', [1, 2, 3, 5, 1 << 18])
def test_characters_that_straddle_blocks_are_read_whole(tmp_path, monkeypatch, block):
    monkeypatch.setattr(text_files, 'BLOCK', block)
    text = random_text(100, 5)
    path = tmp_path / 'a.txt'
    path.write_bytes(text.encode('utf-8'))
    assert ''.join(text_files.read_text(path)) == text


@pytest.mark.parametrize('block', [1, 4, 1 << 18])
@pytest.mark.parametrize('data', [b'abc\xe9def', 'ß🙂'.encode() + b'\xf0\x9f\x99',
                                  b'ab\xc3\xc3', b'\xfe\xfe a', b'\xed\xa0\x80'])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, data, block):
    monkeypatch.setattr(text_files, 'BLOCK', block)
    path = tmp_path / 'a.txt'
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as whole:
        data.decode('utf-8')
    with pytest.raises(UserError, match=rf'a.txt is not UTF-8 at byte {whole.value.start}\b'):
        list(text_files.read_text(path))


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='this system has no pipes with a name')
def test_a_pipe_or_device_is_refused_and_skipped_in_a_folder(tmp_path, capsys):
    os.mkfifo(tmp_path / 'pipe.txt')
    os.symlink('nowhere', tmp_path / 'broken.txt')
    for path in (tmp_path / 'pipe.txt', '/dev/zero'):
        with pytest.raises(UserError, match='is a pipe or a device'):
            text_files.find_files(path, ('.txt',) if path != '/dev/zero' else ())
        with pytest.raises(UserError, match='is a pipe or a device'):
            text_files.read_shakespeare(str(path), tmp_path)
    (tmp_path / 'a.txt').write_text('text')
    capsys.readouterr()
    assert text_files.find_files(tmp_path, ('.txt',), log_skipped=True) == [tmp_path / 'a.txt']
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 and 'skipping 2' in lines[0]
    text_files.find_files(tmp_path, ('.txt',))
    assert not capsys.readouterr().out


# tiny Shakespeare

@pytest.mark.parametrize('name, train, val, symbols', [
    ('shakespeare_char', 1003854, 111540, 65),
    ('shakespeare', 301966, 36059, 50257)])
def test_shakespeare_has_the_published_counts(data, shakespeare, request, name, train, val,
                                              symbols):
    bpe = request.getfixturevalue('gpt2') if name == 'shakespeare' else None
    result = run(data, name, f'--input={shakespeare}')
    assert result.returncode == 0 and result.stderr == '', result.stderr

    folder = data / name
    dataset = meta(folder)
    assert dataset['tokens'] == {'train': train, 'val': val} and dataset['vocab_size'] == symbols
    assert dataset['dtype'] == 'uint16' and dataset['tokenizer'] == ('gpt2' if bpe else 'char')
    for split in ('train', 'val'):
        path = folder / f'{split}.bin'
        assert dataset['sha256'][path.name] == sha256(path)
        assert path.stat().st_size == 2 * dataset['tokens'][split]

    text = shakespeare.read_text(encoding='utf-8')
    ids = [*tokens(folder, 'train').tolist(), *tokens(folder, 'val').tolist()]
    assert (bpe.decode(ids) if bpe else ''.join(dataset['chars'][i] for i in ids)) == text
    assert f'{train:,}' in result.stdout and f'{val:,}' in result.stdout


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_a_failed_download_suggests_input_and_leaves_nothing(data, monkeypatch, name):
    for variable in ('https_proxy', 'HTTPS_PROXY'):
        monkeypatch.setenv(variable, 'http://127.0.0.1:9')
    with pytest.raises(RunError, match='--input=FILE'):
        load(data, name, monkeypatch).main()
    assert list(contents(data / name)) == ['prepare.py']


def test_a_download_of_something_else_is_not_kept(data, monkeypatch):
    page = data / 'page.html'
    page.write_text('<html>please log in</html>', encoding='utf-8')
    monkeypatch.setattr(text_files, 'SHAKESPEARE_URL', page.as_uri())
    with pytest.raises(RunError, match='not tiny Shakespeare'):
        load(data, 'shakespeare_char', monkeypatch).main()
    assert list(contents(data / 'shakespeare_char')) == ['prepare.py']


def test_a_download_is_kept_as_input_txt_and_not_repeated(data, monkeypatch):
    text = 'First Citizen: speak, speak.\n' * 9
    page = data / 'page.txt'
    page.write_bytes(text.encode())
    monkeypatch.setattr(text_files, 'SHAKESPEARE_URL', page.as_uri())
    monkeypatch.setattr(text_files, 'SHAKESPEARE_SHA256', sha256(page))
    script = load(data, 'shakespeare_char', monkeypatch)
    script.main()
    page.unlink()
    script.main()
    assert (data / 'shakespeare_char' / 'input.txt').read_bytes() == text.encode()


# the standard library

def test_stdlib_char_holds_out_whole_files_that_training_never_sees(data, monkeypatch):
    script = load(data, 'stdlib_char', monkeypatch)
    folder = data / 'stdlib_char'
    script.main()
    first = contents(folder)
    script.main()
    assert contents(folder) == first

    chars = meta(folder)['chars']
    train, val = (''.join(chars[i] for i in tokens(folder, split)) for split in ('train', 'val'))
    assert chars.isascii() and 1_500_000 < len(train) + len(val) <= 2_000_000
    assert 0.1 <= len(val) / (len(train) + len(val)) < 0.2

    library = Path(sysconfig.get_path('stdlib'))
    files = [path.read_bytes().replace(b'\r\n', b'\n') for path in library.rglob('*.py')
             if 'site-packages' not in path.parts]
    files = [file.decode() for file in files if len(file) > 200 and file.isascii()]
    held_out = [file for file in files if file in val]
    assert len(held_out) >= 5 and not any(file in train for file in held_out)
    assert sum(map(len, set(held_out))) >= 0.99 * len(val)


# text of one's own

def test_text_as_characters_comes_back(data, tmp_path):
    text = random_text(3000, 1).replace('\x1c', '')
    (tmp_path / 'my book.txt').write_bytes(text.encode('utf-8'))
    result = run(data, 'text', f'--input={tmp_path / "my book.txt"}', '--tokenizer=char',
                 '--val_fraction=0.07', '--separator=')
    assert result.returncode == 0, result.stderr

    folder = data / 'my book'
    chars = meta(folder)['chars']
    assert chars == ''.join(sorted(set(text))) and meta(folder)['vocab_size'] == len(chars)

    train, val = (''.join(chars[i] for i in tokens(folder, split)) for split in ('train', 'val'))
    assert train + val == text and len(train) == len(text) * 93 // 100
    assert sorted(contents(folder)) == ['meta.json', 'meta.pkl', 'train.bin', 'val.bin']
    assert "val.bin holds the last 7% of a text" in result.stdout
    assert result.stdout.splitlines()[-1].startswith(
        "next: python train.py config/train_stdlib_char.py "
        "'--dataset=my book' '--out_dir=out-my book' ")


@pytest.mark.parametrize('cores', [1, 3])
def test_each_file_of_a_folder_gives_its_end_to_val(data, tmp_path, monkeypatch, gpt2, cores):
    monkeypatch.setattr(encode, 'PIECE', 50)
    monkeypatch.setattr(text_files, 'BLOCK', 64)
    texts = {'a.txt': random_text(400, 1), 'b/c.md': random_text(100, 2), 'b/d.txt': '',
             'e': random_text(300, 3)}
    for name, text in {**texts, '.hidden': 'no', '.git/config': 'no'}.items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(text.encode('utf-8'))
    load(data, 'text', monkeypatch, input=str(tmp_path / 'in'), name='mine', val_fraction=0.25,
         separator='', special_tokens=False, num_proc=cores).main()

    expected = {'train': [], 'val': []}
    for text in texts.values():
        cut = len(text) * 3 // 4
        for split, part in (('train', text[:cut]), ('val', text[cut:])):
            expected[split] += [*gpt2.encode_ordinary(part), 50256] if part else []
    for split in ('train', 'val'):
        assert tokens(data / 'mine', split).tolist() == expected[split]


@pytest.mark.skipif(not sys.platform.startswith('linux'),
                    reason='only Linux reports the peak of one program')
def test_memory_does_not_grow_with_the_text(data, tmp_path):
    peaks = []                                                          # MB
    for megabytes in (4, 64):
        path = tmp_path / f'{megabytes}.txt'
        line = b'To be, or not to be: that is the question.\n'
        path.write_bytes(line * (megabytes * 1000000 // len(line)))
        arguments = ['prepare.py', f'--input={path}', '--tokenizer=char']
        code = (f'import runpy, sys; sys.argv = {arguments!r}; '
                f'runpy.run_path({str(data / "text" / "prepare.py")!r}, run_name="__main__"); '
                f'print(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])')
        result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        peaks.append(int(result.stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 20, f'{peaks} MB for 4 and 64 MB of text'


# documents

@pytest.mark.parametrize('total', [2, 3, 1999, 2000, 2001, 12345])
def test_held_out_documents_are_those_of_train_test_split(data, monkeypatch, total):
    datasets = pytest.importorskip('datasets')
    documents = datasets.Dataset.from_dict({'number': range(total)})
    test = documents.train_test_split(test_size=0.0005, seed=2357, shuffle=True)['test']
    assert load(data, 'openwebtext', monkeypatch).choose_val_documents(total) == set(test['number'])


def test_documents_of_every_format_and_number_of_cores(data, tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(encode, 'PIECE', 40)
    texts = [random_text(length % 60, length) for length in range(60)]  # the first one is empty
    (tmp_path / 'in').mkdir()
    write_parquet(tmp_path / 'in' / 'a.parquet', texts[:20])
    write_jsonl(tmp_path / 'in' / 'b.jsonl', texts[20:40])
    for i, text in enumerate(texts[40:]):
        (tmp_path / 'in' / f'c{i:02}.txt').write_bytes(text.encode('utf-8'))
    (tmp_path / 'in' / 'README.md').write_text('not a document', encoding='utf-8')

    for cores, max_docs in ((1, 0), (4, 0), (2, 33)):
        script = load(data, 'openwebtext', monkeypatch, input=str(tmp_path / 'in'), num_proc=cores,
                      max_docs=max_docs)
        script.main()

        chosen = texts[:max_docs or 60]
        expected = {'train': [], 'val': []}
        for number, text in enumerate(chosen):
            split = 'val' if number in script.choose_val_documents(len(chosen)) else 'train'
            expected[split] += [*gpt2.encode_ordinary(text), 50256]
        for split in ('train', 'val'):
            assert tokens(data / 'openwebtext', split).tolist() == expected[split]
        counts = {split: len(ids) for split, ids in expected.items()}
        assert meta(data / 'openwebtext')['tokens'] == counts


@pytest.fixture
def openwebtext_hub(tmp_path, monkeypatch):
    """A hub that has the first and the last file of OpenWebText."""
    files = {}
    for number, documents in ((0, ['one', 'two', 'three', 'four']), (79, ['five', 'six'])):
        path = write_parquet(tmp_path / 'file.parquet', documents)
        files[f'plain_text/train-{number:05}-of-00080.parquet'] = path.read_bytes()
    hub = Hub({'datasets/Skylion007/openwebtext': files})
    hub.reach(monkeypatch, tmp_path)
    yield hub
    hub.close()


def test_openwebtext_comes_from_parquet_and_a_part_only_on_request(data, monkeypatch, gpt2,
                                                                   openwebtext_hub):
    load(data, 'openwebtext', monkeypatch, max_docs=3).main()
    assert not any('00079-of' in request for request in openwebtext_hub.asked)
    with pytest.raises(RunError, match='6 of 8,013,769 documents'):
        load(data, 'openwebtext', monkeypatch).main()

    count = sum(meta(data / 'openwebtext')['tokens'].values())
    assert count == len(gpt2.encode_ordinary('one|two|three')) + 1


def test_a_hub_out_of_reach_is_a_failure_that_names_input(data, tmp_path, monkeypatch):
    constants = pytest.importorskip('huggingface_hub.constants')
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'none'))
    script = load(data, 'openwebtext', monkeypatch)
    monkeypatch.setattr(script, 'Tokenizer', lambda spec: None)     # it encodes nothing
    with pytest.raises(RunError, match='--input=FOLDER'):
        script.main()


def test_a_fault_of_the_hub_during_a_download_is_tried_again(data, monkeypatch, openwebtext_hub):
    monkeypatch.setattr(downloads, 'SECONDS_BETWEEN_TRIES', 0)
    openwebtext_hub.faults += [Fault('resolve/', 503), Fault('cdn/', cut=True)]
    files = load(data, 'openwebtext', monkeypatch).download()
    found = [path.read_bytes() for path in files]
    assert found == list(*(files.values() for files in openwebtext_hub.repositories.values()))


@pytest.mark.parametrize('name', ['openwebtext', 'fineweb_edu'])
def test_a_tokenizer_out_of_reach_fails_before_the_download(data, monkeypatch, name):
    def fail(spec):
        raise RunError('no tokenizer')

    script = load(data, name, monkeypatch)
    monkeypatch.setattr(script, 'Tokenizer', fail)
    monkeypatch.setattr(script, 'download_files', lambda *arguments: pytest.fail('it began'))
    with pytest.raises(RunError, match='no tokenizer'):
        script.main()


# stopped runs

class Stoppable:
    """data/openwebtext/prepare.py over 200 documents, that can be stopped at any piece of text."""

    def __init__(self, data, path, monkeypatch):
        self.texts = [random_text(20, seed) + f' number {seed}' for seed in range(200)]
        self.path = write_jsonl(path, self.texts)
        self.folder = data / 'openwebtext'
        self.script = load(data, 'openwebtext', monkeypatch, input=str(path), num_proc=1)
        self.script.main()
        self.whole = contents(self.folder)
        self.encode = Tokenizer(GPT2).encode_to_numpy
        self.encoded = []
        self.stop_at = None

        # this object takes the place of the script's tokenizer
        self.monkeypatch = monkeypatch
        self.splits_like_gpt2 = True
        self.drops_characters = False
        self.special_tokens = ()
        monkeypatch.setattr(self.script, 'Tokenizer', lambda spec: self)
        monkeypatch.setattr(encode, 'PIECE', 30)

    def encode_to_numpy(self, text, as_document=False):
        self.encoded.append(text)
        if len(self.encoded) == self.stop_at:
            raise KeyboardInterrupt
        return self.encode(text)

    def run(self, stop_at=None, save_seconds=3600):
        self.stop_at = stop_at
        self.encoded.clear()
        with self.monkeypatch.context() as patch:
            patch.setattr(dataset_writer, 'SAVE_SECONDS', save_seconds)
            self.script.main()

    def stop(self, stop_at):
        """Run until the piece of that number, saving progress after each document.

        Returns the journal.
        """
        with pytest.raises(KeyboardInterrupt):
            self.run(stop_at, save_seconds=0)
        found = contents(self.folder)
        assert {name: found[name] for name in self.whole} == self.whole
        return json.loads((self.folder / 'unfinished.json').read_text())

    def finish(self):
        """Run to the end. Returns the text that was encoded for that."""
        self.run()
        return ''.join(self.encoded)


@pytest.fixture
def stoppable(data, tmp_path, monkeypatch, no_fsync, gpt2):
    return Stoppable(data, tmp_path / 'docs.jsonl', monkeypatch)


def test_a_stopped_run_continues_where_it_stopped_unless_the_input_changed(stoppable, gpt2):
    for stop_at in range(120, 130):                     # at the end of a document, and within one
        documents = stoppable.stop(stop_at)['documents']
        assert 10 < documents < 120
        with open(stoppable.folder / 'train.bin.part', 'ab') as file:
            file.write(b'written after the progress was saved')
        assert stoppable.finish() == ''.join(stoppable.texts[documents:])
        assert contents(stoppable.folder) == stoppable.whole

    stoppable.stop(120)
    texts = [text.upper() for text in stoppable.texts]
    write_jsonl(stoppable.path, texts)
    assert stoppable.finish() == ''.join(texts)
    text = gpt2.decode(tokens(stoppable.folder, 'train').tolist())
    assert 'NUMBER 0' in text and 'number' not in text
    assert sorted(contents(stoppable.folder)) == ['meta.json', 'prepare.py', 'train.bin', 'val.bin']


@pytest.mark.parametrize('split, position', [('train', 0), ('train', -1), ('val', 1)])
def test_a_flipped_bit_in_a_part_file_starts_from_the_beginning(stoppable, split, position, capsys):
    stoppable.finish()
    size = stoppable.stop(len(stoppable.encoded) - 5)['bytes'][f'{split}.bin']
    path = stoppable.folder / f'{split}.bin.part'
    data = bytearray(path.read_bytes()[:size])
    data[position] ^= 4
    path.write_bytes(data)
    assert stoppable.finish() == ''.join(stoppable.texts)
    assert contents(stoppable.folder) == stoppable.whole
    assert 'damaged' in capsys.readouterr().out


def damaged_journals(journal, part):
    """Contents of unfinished.json that no run writes."""
    yield from ('', '{', '[]', 'null', '"key"', '{"key": "k"}', '[' * 100000)
    for number in (1.5, '7', -2, True, None, [2]):
        yield json.dumps(dict(journal, documents=number))
        yield json.dumps(dict(journal, bytes=number))
    for number in (1.5, '7', -2, True, None, [2], 7, 2 ** 40, 10 ** 30):
        for split in ('train', 'val'):
            yield json.dumps(dict(journal, bytes=dict(journal['bytes'], **{split: number})))
    digests = dict(journal['sha256'], train=hashlib.sha256(part[:7]).hexdigest())
    yield json.dumps(dict(journal, bytes=dict(journal['bytes'], train=7), sha256=digests))


def test_a_damaged_journal_starts_from_the_beginning(stoppable):
    journal = stoppable.stop(120)
    stopped = contents(stoppable.folder)
    for text in damaged_journals(journal, stopped['train.bin.part']):
        for name, data in stopped.items():
            (stoppable.folder / name).write_bytes(data)
        (stoppable.folder / 'unfinished.json').write_text(text)
        assert stoppable.finish() == ''.join(stoppable.texts), text[:200]
        assert contents(stoppable.folder) == stoppable.whole


# mistakes

MANY = ''.join(chr(i) for i in range(0x20, 0x20 + 65537 + 2048) if not 0xd800 <= i < 0xe000)
# script, the input's name and bytes (None: no such file), arguments, part of the message
MISTAKES = [
    ('text', None, None, [], 'prepare.py PATH'),
    ('text', 'a.txt', None, [], 'no file or folder'),
    ('text', 'a.txt', b'', [], '0 characters'),
    ('text', 'a.txt', b'text\0text', [], 'byte 4 is NUL'),
    ('text', 'a.txt', b'caf\xe9 au lait', [], 'byte 3'),
    ('text', 'a.txt', b'x', [], 'more text'),
    ('text', 'a.txt', b'some text', ['--tokenizer=word'], '--tokenizer=char'),
    ('text', 'a.txt', b'some text', ['--val_fraction=0'], 'between 0 and 1'),
    ('text', 'a.txt', b'some text', ['--val_fraction=1.0'], 'between 0 and 1'),
    ('text', 'a.txt', b'some text', ['--val_fraction=0.9'], 'leaves 0'),
    ('text', 'a.txt', b'some text', ['--name=../other'], 'plain folder name'),
    ('text', 'a.txt', b'some text', ['--name=a\\b'], 'plain folder name'),
    ('text', 'a.txt', b'some text', ['--name=..'], 'plain folder name'),
    ('text', 'a.txt', b'some text', ['--name=' + 'x' * 300], 'is too long for a folder'),
    ('text', '/', None, [], 'plain folder name'),
    ('text', '~no_such_person/a.txt', None, [], 'no file or folder'),
    ('text', 'a.txt', b'some text', ['--name=openwebtext'], 'is taken'),
    ('text', 'a.txt', b'some text', ['--num_proc=-1', '--tokenizer=char'], 'num_proc=-1'),
    ('text', 'a.txt', b'some text', ['--tokeniser=char'], 'did you mean tokenizer'),
    ('text', 'a.txt', MANY.encode(), ['--tokenizer=char'], '--tokenizer=gpt2'),
    ('openwebtext', 'a.jsonl', None, [], 'no file or folder'),
    ('openwebtext', 'a.csv', b'text\n', [], 'is empty'),
    ('openwebtext', 'a.png', b'\x89PNG\r\n\x1a\n\0\0', [], 'is an image'),
    ('openwebtext', 'a.jsonl', b'', [], 'is empty'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n\n{"text": a}\n', [], 'line 3 is not JSON'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n{"body": "a"}\n', [], 'line 2 has no string'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n["text"]\n', [], 'line 2 has no string'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n{"text": "\xe9"}\n', [], 'byte 24'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n', [], 'data/text/prepare.py'),
    ('openwebtext', 'a.parquet', b'PAR1 and no more', [], 'not a parquet file'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n', ['--max_docs=-1'], 'max_docs=-1'),
    ('fineweb_edu', 'a.jsonl', None, [], 'no file or folder'),
    ('fineweb_edu', 'a.jsonl', b'{"text": "a b c"}\n', ['--shard_tokens=0'],
     'shard_tokens=0 should be at least 1'),
    ('fineweb_edu', 'a.jsonl', b'{"text": "a b c"}\n', ['--part=1/1'], "part='1/1' should be i/n"),
    ('fineweb_edu', 'a.jsonl', b'{"text": "a b c"}\n', ['--part=half'],
     "part='half' should be i/n"),
    ('fineweb_edu', None, None, ['--sample=10BT'], "sample='10BT' is unknown; try sample-10BT"),
    ('shakespeare', 'a.txt', b'', [], 'is empty'),
    ('shakespeare', 'data', None, [], 'is a folder'),
    ('shakespeare_char', 'a.txt', b'a\0b', [], 'is binary'),
    ('shakespeare_char', 'a.txt', b'x', [], 'longer text'),
    ('stdlib_char', None, None, ['--max_bytes=10'], '--max_bytes'),
    ('stdlib_char', None, None, ['--val_fraction=1'], 'between 0 and 1'),
]
FOUND_WHILE_ENCODING = [
    ('a.jsonl', b'{"text": "a b c"}\n', [], '4 tokens are not more than one shard'),
    ('a.jsonl', b'', [], '0 tokens are not more than one shard'),
    ('a.jsonl', b'{"text": "a b c"}\n{"text": 7}\n', ['--shard_tokens=2'], 'line 2 has no string'),
    ('a.jsonl', b'{"text": "a b c"}\n', ['--num_proc=-1'], 'num_proc=-1'),
]


def all_contents(data):
    """{path: content} of all files below `data`, and of the folders, where it is None."""
    return {path: path.read_bytes() if path.is_file() else None for path in data.rglob('*')}


def make_mistake(data, tmp_path, name, file, content):
    """The argument --input for a mistake, in a folder with an earlier dataset."""
    folder = data / ('a' if name == 'text' else name)
    folder.mkdir(exist_ok=True)
    for part in ('train.bin', 'val.bin', 'meta.json'):
        (folder / part).write_bytes(b'earlier ' + part.encode())
    if content is not None:
        (tmp_path / file).write_bytes(content)
    if not file:
        return []
    path = tmp_path / file
    if file == 'data':
        path = data
    elif file[0] in '~/':
        path = file
    return [f'--input={path}']


@pytest.mark.parametrize('name, file, content, arguments, message', MISTAKES)
def test_a_mistake_is_one_line_and_leaves_the_earlier_dataset(data, tmp_path, monkeypatch, name,
                                                              file, content, arguments, message):
    arguments = [*make_mistake(data, tmp_path, name, file, content), *arguments]
    before = all_contents(data)
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(data, name, monkeypatch, *arguments).main()
    assert '\n' not in str(error.value) and all_contents(data) == before


@pytest.mark.parametrize('file, content, arguments, message', FOUND_WHILE_ENCODING)
def test_shards_that_are_refused_leave_nothing_either(data, tmp_path, monkeypatch, gpt2, file,
                                                      content, arguments, message):
    test_a_mistake_is_one_line_and_leaves_the_earlier_dataset(
        data, tmp_path, monkeypatch, 'fineweb_edu', file, content, arguments, message)


def test_a_mistake_exits_2_with_one_line_on_stderr(data, tmp_path):
    arguments = make_mistake(data, tmp_path, 'text', 'a.txt', b'text\0text')
    before = all_contents(data)
    result = run(data, 'text', *arguments, '--tokenizer=char')
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    assert 'byte 4 is NUL' in result.stderr
    assert all_contents(data) == before


def not_utf8():
    """A column of strings, of which one is not UTF-8. Parquet's writers do not look at them."""
    pa = pytest.importorskip('pyarrow')
    return pa.array([b'a', b'b', b'caf\xe9 au lait']).view(pa.string())


@pytest.mark.parametrize('column, message', [
    ({'body': ['a', 'b']}, 'no column `text`'),
    ({'text': [1, 2]}, 'column text of .*a.parquet holds no text, but 1'),
    ({'text': not_utf8}, 'row 3 is not UTF-8 at byte 3 of its text')])
def test_parquet_without_text_is_refused(data, tmp_path, monkeypatch, gpt2, column, message):
    pa = pytest.importorskip('pyarrow')
    pq = pytest.importorskip('pyarrow.parquet')
    column = {name: value() if callable(value) else value for name, value in column.items()}
    pq.write_table(pa.table(column), tmp_path / 'a.parquet')
    with pytest.raises(UserError, match=message):
        load(data, 'openwebtext', monkeypatch, input=str(tmp_path / 'a.parquet')).main()
    assert list(contents(data / 'openwebtext')) == ['prepare.py']


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_lists_the_settings_and_the_path_as_typed(data, name, monkeypatch, capsys):
    monkeypatch.chdir(data.parent)
    monkeypatch.setattr(sys, 'argv', [f'data/{name}/prepare.py', '--help'])
    script = load(data, name, monkeypatch)
    with pytest.raises(SystemExit) as stopped:
        configurator.configure(vars(script), sys.argv[1:])
    text = capsys.readouterr().out
    assert stopped.value.code == 0 and f'usage: python data/{name}/prepare.py' in text
    assert all(f'--{setting}=' in text for setting in configurator.read_settings(script.__file__))


@pytest.mark.parametrize('name', SCRIPTS)
def test_the_last_line_is_a_next_command_whose_settings_exist(data, tmp_path, monkeypatch, capsys,
                                                              gpt2, name):
    text = write_jsonl(tmp_path / 'a.jsonl', ['some text'] * 5)
    if name == 'chat':                      # which reads conversations only
        rows = [json.dumps(dict(question=f'Why {i}?', answer='So.')) for i in range(20)]
        text.write_text('\n'.join(rows), encoding='utf-8')
    script = load(data, name, monkeypatch)
    if hasattr(script, 'input'):
        script.input = str(text)
    if hasattr(script, 'shard_tokens'):
        script.shard_tokens = 4
    script.main()

    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith('next: python train.py config/')
    config, *flags = last.split()[3:]
    assert (ROOT / config).is_file()
    settings = configurator.read_settings(ROOT / 'train.py')
    assert all(flag.lstrip('-').partition('=')[0] in settings for flag in flags)


def test_the_prepare_scripts_start_without_torch(data):
    code = ('import runpy, sys; [runpy.run_path(path) for path in sys.argv[1:]]; '
            'assert "torch" not in sys.modules')
    subprocess.run([sys.executable, '-c', code, *map(str, data.glob('*/prepare.py'))], check=True)


# whole or not at all

def write_chars(folder, text, encode=None):
    spec = char_spec(set(text))
    with dataset_writer.dataset_writer(folder, spec) as writer:
        writer.write([('train', text, False), ('val', text, False)],
                     encode or Tokenizer(spec).encode_to_numpy, 2 * len(text))


def fail_with(error):
    def encode(text):
        raise error
    return encode


@pytest.mark.parametrize('failure, raised', [
    (KeyboardInterrupt(), KeyboardInterrupt),
    (UserError('bad row'), UserError),
    (OSError(errno.ENOSPC, 'No space left on device'), RunError)])
@pytest.mark.parametrize('earlier', [True, False])
def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path, failure, raised, earlier):
    folder = tmp_path / 'mine'
    if earlier:
        write_chars(folder, 'abc')
    before = contents(folder) if earlier else None
    with pytest.raises(raised):
        write_chars(folder, 'xyz', fail_with(failure))
    assert (contents(folder) if folder.exists() else None) == before


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no SIGTERM to catch')
def test_sigterm_cleans_up_and_exits_with_143(tmp_path, monkeypatch):
    write_chars(tmp_path, 'abc')
    before = contents(tmp_path)
    monkeypatch.setattr(encode, 'PIECE', 1)

    def pieces():
        for number in range(100):
            if number == 50:
                os.kill(os.getpid(), signal.SIGTERM)
            yield 'train', 'xyz', False

    spec = char_spec('xyz')
    with (pytest.raises(SystemExit) as stopped,
          dataset_writer.dataset_writer(tmp_path, spec) as writer):
        writer.write(pieces(), Tokenizer(spec).encode_to_numpy, 300)
    assert stopped.value.code == 143 and contents(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def read_dataset(folder):
    """The text of a character dataset or the length of another; None without a train.bin.

    Checks that all its files agree.
    """
    if not (folder / 'train.bin').exists():
        return None
    dataset = meta(folder)
    digests = {name: sha256(folder / name) for name in ('train.bin', 'val.bin')}
    assert dataset['sha256'] == digests

    train = tokens(folder, 'train')
    val = tokens(folder, 'val')
    assert train.tolist() == val.tolist()
    if dataset['tokenizer'] == 'gpt2':
        assert not (folder / 'meta.pkl').exists()
        return len(train)
    itos = pickle.loads((folder / 'meta.pkl').read_bytes())['itos']
    assert itos == dict(enumerate(dataset['chars']))
    return ''.join(dataset['chars'][i] for i in train)


@contextlib.contextmanager
def power_cut(monkeypatch, step):
    """From rename or removal number `step` on, none happens any more, not even in the clean-up.

    Yields a list that tells whether it came to that.
    """
    count = 0
    happened = []

    def cut(function):
        def stand_in(*arguments, **options):
            nonlocal count
            if Path(arguments[0]).name != 'prepare.lock':
                count += 1
                if count > step:
                    happened.append(arguments)
                    raise SystemExit('power cut')
            return function(*arguments, **options)
        return stand_in

    with contextlib.suppress(SystemExit), monkeypatch.context() as patch:
        patch.setattr(os, 'replace', cut(os.replace))
        patch.setattr(Path, 'unlink', cut(Path.unlink))
        yield happened


def write_ids(folder, text):
    """A dataset with GPT-2's tokenizer, which has no meta.pkl."""
    with dataset_writer.dataset_writer(folder, GPT2) as writer:
        writer.write([('train', text, False), ('val', text, False)],
                     lambda text: code_points(text).astype('<u2'), 2 * len(text))


@pytest.mark.parametrize('write_old, write_new', [
    (None, write_chars),
    (write_chars, write_chars),
    (write_ids, write_chars),
    (write_chars, write_ids)])
def test_a_power_cut_leaves_the_old_dataset_or_a_new_one_to_complete(
        tmp_path, monkeypatch, no_fsync, write_old, write_new):
    """At every rename and removal. Whoever finds a train.bin finds the other files of its run; and
    the next run, even one that fails, leaves the whole dataset, old or new."""
    outcomes = []
    for step in range(100):
        folder = tmp_path / str(step)
        folder.mkdir()
        if write_old:
            write_old(folder, 'abc')
        old = read_dataset(folder)
        new = 'longer' if write_new is write_chars else 6
        with power_cut(monkeypatch, step) as happened:
            write_new(folder, 'longer')
        found = read_dataset(folder)
        assert found in (old, new, None)

        for again in range(3):                          # the power fails in the next runs, too
            with power_cut(monkeypatch, again):
                write_chars(folder, 'xyz', fail_with(SystemExit()))
            assert read_dataset(folder) in ((new, None) if found == new else (old, new, None))

        with pytest.raises(KeyboardInterrupt):
            write_chars(folder, 'xyz', fail_with(KeyboardInterrupt()))
        outcome = read_dataset(folder)
        outcomes.append(outcome)
        assert outcome in ((new,) if found == new else (old, new))
        assert len(contents(folder)) == {None: 0, str: 4, int: 3}[outcome and type(outcome)]

        write_chars(folder, 'again')
        assert read_dataset(folder) == 'again'
        if not happened:
            break

    assert step >= 9 and outcomes[-1] == new
    assert outcomes == sorted(outcomes, key=lambda outcome: outcome != old)     # never back again


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no inodes to know a file by')
def test_everything_is_on_disk_before_the_earlier_dataset_changes(tmp_path, monkeypatch):
    write_chars(tmp_path, 'abc')
    before = contents(tmp_path)
    synced = set()
    checked = []
    fsync = os.fsync
    unlink = Path.unlink
    parts = ('train.bin.part', 'val.bin.part', 'meta.json.part', 'meta.pkl.part')

    def record(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(path, **options):
        if path.name == 'train.bin':
            found = contents(tmp_path)
            assert {name: found[name] for name in before} == before
            for name in (*parts, 'unfinished.json'):
                assert (tmp_path / name).stat().st_ino in synced
            checked.append(path)
        unlink(path, **options)

    monkeypatch.setattr(os, 'fsync', record)
    monkeypatch.setattr(Path, 'unlink', check)
    write_chars(tmp_path, 'xyz')
    assert checked and contents(tmp_path) != before


@pytest.mark.parametrize('damaged', [False, True])
def test_the_same_command_completes_a_killed_replacement_unless_a_file_is_damaged(
        stoppable, monkeypatch, damaged):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(publish.Replacement, 'rename_files', fail_with(KeyboardInterrupt()))
        stoppable.finish()
    if damaged:
        with open(stoppable.folder / 'train.bin.part', 'r+b') as file:
            file.write(b'\xff')
    encoded = stoppable.finish()
    assert encoded == (''.join(stoppable.texts) if damaged else '')
    assert contents(stoppable.folder) == stoppable.whole


def test_two_runs_at_once_are_refused(data, tmp_path):
    (tmp_path / 'a.txt').write_text('some text', encoding='utf-8')
    with dataset_writer.dataset_writer(data / 'a', char_spec({'x'})) as writer:
        result = run(data, 'text', f'--input={tmp_path / "a.txt"}', '--tokenizer=char')
        pieces = [('train', 'x', False), ('val', 'x', False)]
        writer.write(pieces, lambda text: np.zeros(1, '<u2'), 2)
    assert result.returncode == 2 and 'another run' in result.stderr
    assert meta(data / 'a')['tokens'] == {'train': 1, 'val': 1}


# nanoGPT's meta.pkl

def test_nanogpts_scripts_decode_a_character_dataset(tmp_path):
    text = 'naïve 🙂\n'
    write_chars(tmp_path, text)
    data = (tmp_path / 'meta.pkl').read_bytes()
    operations = {operation.name for operation, _, _ in pickletools.genops(data)}
    assert not {'GLOBAL', 'STACK_GLOBAL', 'REDUCE'} & operations

    loaded = pickle.loads(data)
    ids = tokens(tmp_path, 'train').tolist()
    assert ''.join(loaded['itos'][i] for i in ids) == text
    assert [loaded['stoi'][char] for char in text] == ids
    assert loaded['vocab_size'] == len(set(text))

    spec = read_meta(tmp_path)
    (tmp_path / 'meta.json').unlink()
    assert read_meta(tmp_path) == spec
