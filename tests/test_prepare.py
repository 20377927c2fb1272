"""The prepare scripts: text in, train.bin, val.bin and meta.json out, and nothing half done."""

import contextlib
import errno
import hashlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'data')]
import textfiles
import tokenfiles

SCRIPTS = sorted(path.parent.name for path in (ROOT / 'data').glob('*/prepare.py'))
# what GPT-2's pattern treats specially: contractions, runs of whitespace, kinds of space, scripts
WORDS = ["it's", "we'll", "'", "''re", 'word', ' ', '  ', '\n', '\n\n  ', ' \n', '\t', '\r\n', '\u00a0', '\u3000',
         '\x1c', '12', '3.5', '...', '<|endoftext|>', 'naïve', '日本語。', '🙂', 'e\u0301', '\u200b', '\u2028', '-', 'I']


@pytest.fixture(scope='module')
def gpt2():
    import tiktoken
    try:
        return tiktoken.get_encoding('gpt2')
    except Exception as error:
        pytest.skip(f"tiktoken's gpt2 file cannot be had: {type(error).__name__}")


@pytest.fixture(scope='module')
def shakespeare():
    path = os.environ.get('SHAKESPEARE')
    if not path:
        pytest.skip('the environment variable SHAKESPEARE names no file with tiny Shakespeare')
    return Path(path)


@pytest.fixture
def data(tmp_path):
    """A copy of the scripts, so that their output goes to a temporary folder."""
    scripts = [*(ROOT / 'data').glob('*.py'), *(ROOT / 'data').glob('*/prepare.py')]
    for path in [ROOT / 'configurator.py', *scripts]:
        copy = tmp_path / 'repo' / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    return tmp_path / 'repo' / 'data'


def run(data, name, *arguments, **environment):
    """Run data/NAME/prepare.py as a person does, from some other folder."""
    command = [sys.executable, str(data / name / 'prepare.py'), *map(str, arguments)]
    return subprocess.run(command, cwd=data.parents[1], env={**os.environ, **environment},
                          capture_output=True, text=True, encoding='utf-8')


def load(data, name, monkeypatch, /, **settings):
    """The script as a module with `settings`; its main() then runs in this process."""
    monkeypatch.setattr(sys, 'path', list(sys.path))
    spec = importlib.util.spec_from_file_location(f'prepare_{name}', data / name / 'prepare.py')
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for key, value in settings.items():
        assert hasattr(script, key)
        monkeypatch.setattr(script, key, value)
    return script


def tokens(folder, split):
    return np.fromfile(folder / f'{split}.bin', dtype='<u2')


def meta(folder):
    return json.loads((folder / 'meta.json').read_text(encoding='utf-8'))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def nasty_text(length, seed):
    draw = random.Random(seed)
    return ''.join(draw.choice(WORDS) for _ in range(length))


def jsonl(path, documents):
    path.write_text(''.join(json.dumps({'text': text}) + '\n' for text in documents), encoding='utf-8')
    return path


def parquet(path, documents):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table({'id': list(range(len(documents))), 'text': documents}), path, row_group_size=7)
    return path


# cutting and encoding

def test_whatever_gpt2s_pattern_calls_whitespace_python_does_too():
    regex = pytest.importorskip('regex')
    spaces = regex.findall(r'\p{White_Space}', ''.join(map(chr, range(0x110000))))
    assert len(spaces) > 20 and all(space.isspace() for space in spaces)


@pytest.mark.parametrize('seed', range(20))
def test_a_document_cut_in_pieces_has_the_tokens_of_the_whole(gpt2, monkeypatch, seed):
    monkeypatch.setattr(tokenfiles, 'PIECE', 1 + seed)
    text = nasty_text(500, seed)
    parts = [text[i:i + 13] for i in range(0, len(text), 13)]
    pieces = list(tokenfiles.safe_pieces(parts))
    assert len(pieces) > 20
    assert ''.join(piece for piece, _ in pieces) == text
    assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
    assert [i for piece, _ in pieces for i in gpt2.encode_ordinary(piece)] == gpt2.encode_ordinary(text)


@pytest.mark.parametrize('text', ['', 'a <|endoftext|> b', 'half a pair \ud83d here', nasty_text(300, 99)])
def test_ids_are_those_of_encode_ordinary(gpt2, text):
    assert tokenfiles.encoder(tokenfiles.GPT2)(text).tolist() == gpt2.encode_ordinary(text)


def test_results_keep_their_order_and_few_are_in_flight():
    taken = []
    results = tokenfiles.in_order(lambda i: i * i, (taken.append(i) or i for i in range(100)), 3)
    assert next(results) == 0 and len(taken) <= 8
    assert list(results) == [i * i for i in range(1, 100)]


# reading

@pytest.mark.parametrize('block', [1, 2, 3, 5, 1 << 18])
def test_characters_that_straddle_blocks_are_read_whole(tmp_path, monkeypatch, block):
    monkeypatch.setattr(textfiles, 'BLOCK', block)
    text = nasty_text(100, 5)
    path = tmp_path / 'a.txt'
    path.write_bytes(text.encode('utf-8'))
    assert ''.join(textfiles.read_text(path)) == text


@pytest.mark.parametrize('block', [1, 4, 1 << 18])
@pytest.mark.parametrize('data', [b'abc\xe9def', 'ß🙂'.encode() + b'\xf0\x9f\x99', b'ab\xc3\xc3', b'\xff\xfea',
                                  b'\xed\xa0\x80'])
def test_the_byte_that_is_not_utf8_is_named(tmp_path, monkeypatch, data, block):
    monkeypatch.setattr(textfiles, 'BLOCK', block)
    path = tmp_path / 'a.txt'
    path.write_bytes(data)
    with pytest.raises(UnicodeDecodeError) as whole:
        data.decode('utf-8')
    with pytest.raises(ValueError, match=f'a.txt is not UTF-8: byte {whole.value.start} '):
        list(textfiles.read_text(path))


# tiny Shakespeare

@pytest.mark.parametrize('name, train, val, symbols', [('shakespeare_char', 1003854, 111540, 65),
                                                       ('shakespeare', 301966, 36059, 50257)])
def test_shakespeare_has_the_published_counts(data, shakespeare, request, name, train, val, symbols):
    bpe = request.getfixturevalue('gpt2') if name == 'shakespeare' else None
    result = run(data, name, f'--input={shakespeare}')
    assert result.returncode == 0, result.stderr
    folder, text = data / name, shakespeare.read_text(encoding='utf-8')
    described = meta(folder)
    assert described['tokens'] == {'train': train, 'val': val} and described['vocab_size'] == symbols
    assert described['dtype'] == 'uint16' and described['tokenizer'] == ('gpt2' if bpe else 'char')
    for split in ('train', 'val'):
        file = (folder / f'{split}.bin').read_bytes()
        assert described['sha256'][f'{split}.bin'] == hashlib.sha256(file).hexdigest()
        assert len(file) == 2 * described['tokens'][split]
    ids = [*tokens(folder, 'train').tolist(), *tokens(folder, 'val').tolist()]
    assert (bpe.decode(ids) if bpe else ''.join(described['chars'][i] for i in ids)) == text
    assert f'{train:,}' in result.stdout and f'{val:,}' in result.stdout


@pytest.mark.parametrize('name', ['shakespeare', 'shakespeare_char'])
def test_a_failed_download_is_one_line_that_names_the_way_out(data, name):
    result = run(data, name, https_proxy='http://127.0.0.1:9', HTTPS_PROXY='http://127.0.0.1:9')
    assert result.returncode == 1 and result.stderr.count('\n') == 1 and '--input=FILE' in result.stderr
    assert list(contents(data / name)) == ['prepare.py']


def test_a_download_of_something_else_is_not_kept(data, monkeypatch):
    page = data / 'page.html'
    page.write_text('<html>please log in</html>', encoding='utf-8')
    monkeypatch.setattr(textfiles, 'SHAKESPEARE_URL', page.as_uri())
    with pytest.raises(RuntimeError, match='not tiny Shakespeare'):
        load(data, 'shakespeare_char', monkeypatch).main()
    assert list(contents(data / 'shakespeare_char')) == ['prepare.py']


# the standard library

def test_stdlib_char_holds_out_whole_files_that_training_never_sees(data):
    assert run(data, 'stdlib_char').returncode == 0
    folder = data / 'stdlib_char'
    first = contents(folder)
    assert run(data, 'stdlib_char').returncode == 0
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
    text = nasty_text(3000, 1).replace('\x1c', '')
    (tmp_path / 'my book.txt').write_bytes(text.encode('utf-8'))
    result = run(data, 'text', f'--input={tmp_path / "my book.txt"}', '--tokenizer=char',
                 '--val_fraction=0.07')
    assert result.returncode == 0, result.stderr
    folder = data / 'my book'
    chars = meta(folder)['chars']
    assert chars == ''.join(sorted(set(text))) and meta(folder)['vocab_size'] == len(chars)
    train, val = (''.join(chars[i] for i in tokens(folder, split)) for split in ('train', 'val'))
    assert train + val == text and len(train) == len(text) * 93 // 100
    assert sorted(contents(folder)) == ['meta.json', 'train.bin', 'val.bin']


@pytest.mark.parametrize('cores', [1, 3])
def test_a_folder_is_documents_in_order_divided_at_the_fraction(data, tmp_path, monkeypatch, gpt2, cores):
    monkeypatch.setattr(tokenfiles, 'PIECE', 50)
    monkeypatch.setattr(textfiles, 'BLOCK', 64)
    texts = {'a.txt': nasty_text(400, 1), 'b/c.md': nasty_text(100, 2), 'b/d.txt': '', 'e': nasty_text(300, 3)}
    for name, text in {**texts, '.hidden': 'no', '.git/config': 'no'}.items():
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).write_bytes(text.encode('utf-8'))
    load(data, 'text', monkeypatch, input=str(tmp_path / 'in'), name='mine', val_fraction=0.25,
         num_proc=cores).main()
    cut, expected = sum(map(len, texts.values())) * 3 // 4, {'train': [], 'val': []}
    for text in texts.values():
        for split, part in (('train', text[:max(cut, 0)]), ('val', text[max(cut, 0):])):
            expected[split] += [*gpt2.encode_ordinary(part), 50256] if part else []
        cut -= len(text)
    for split in ('train', 'val'):
        assert tokens(data / 'mine', split).tolist() == expected[split]


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='only Linux tells the peak of one program')
def test_memory_does_not_grow_with_the_text(data, tmp_path):
    peaks = []                                                          # MB
    for megabytes in (4, 64):
        path = tmp_path / f'{megabytes}.txt'
        path.write_bytes(b'To be, or not to be: that is the question.\n' * (megabytes * 1000000 // 43))
        code = (f'import runpy, sys; sys.argv = ["prepare.py", {f"--input={path}"!r}, "--tokenizer=char"]; '
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
    assert load(data, 'openwebtext', monkeypatch).hold_out(total) == set(test['number'])


def test_documents_of_every_format_and_number_of_cores(data, tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(tokenfiles, 'PIECE', 40)
    texts = [nasty_text(length % 60, length) for length in range(60)]       # the first one is empty
    (tmp_path / 'in').mkdir()
    parquet(tmp_path / 'in' / 'a.parquet', texts[:20])
    jsonl(tmp_path / 'in' / 'b.jsonl', texts[20:40])
    for i, text in enumerate(texts[40:]):
        (tmp_path / 'in' / f'c{i:02}.txt').write_bytes(text.encode('utf-8'))
    (tmp_path / 'in' / 'README.md').write_text('not a document', encoding='utf-8')
    for cores, wanted in ((1, 0), (4, 0), (2, 33)):
        script = load(data, 'openwebtext', monkeypatch, input=str(tmp_path / 'in'), num_proc=cores,
                      max_docs=wanted)
        script.main()
        chosen, expected = texts[:wanted or 60], {'train': [], 'val': []}
        for number, text in enumerate(chosen):
            split = 'val' if number in script.hold_out(len(chosen)) else 'train'
            expected[split] += [*gpt2.encode_ordinary(text), 50256]
        for split in ('train', 'val'):
            assert tokens(data / 'openwebtext', split).tolist() == expected[split]
        assert meta(data / 'openwebtext')['tokens'] == {split: len(ids) for split, ids in expected.items()}


def test_a_stopped_run_continues_where_it_stopped_unless_the_input_changed(data, tmp_path, monkeypatch, gpt2):
    monkeypatch.setattr(tokenfiles, 'PIECE', 30)
    texts = [nasty_text(20, seed) + f' number {seed}' for seed in range(200)]
    path, folder = jsonl(tmp_path / 'docs.jsonl', texts), data / 'openwebtext'
    script = load(data, 'openwebtext', monkeypatch, input=str(path), num_proc=1)
    script.main()
    whole = contents(folder)

    encode, seen, stop_at = tokenfiles.encoder(tokenfiles.GPT2), [], None

    def counting(text):
        seen.append(text)
        if len(seen) == stop_at:
            raise KeyboardInterrupt
        return encode(text)

    def stop_after(pieces):
        nonlocal stop_at
        stop_at = pieces
        seen.clear()
        with pytest.raises(KeyboardInterrupt) if pieces else contextlib.nullcontext():
            script.main()
    monkeypatch.setattr(tokenfiles, 'encoder', lambda tokenizer: counting)
    monkeypatch.setattr(tokenfiles, 'MARK_SECONDS', 0)
    for pieces in range(120, 130):                      # at the end of a document, and within one
        stop_after(pieces)
        assert {name: file for name, file in contents(folder).items() if name in whole} == whole
        done = json.loads((folder / 'unfinished.json').read_text())['documents']
        assert 10 < done < 120
        with open(folder / 'train.bin.part', 'ab') as file:
            file.write(b'a part that was not marked')
        stop_after(None)
        assert ''.join(seen) == ''.join(texts[done:]) and contents(folder) == whole

    stop_after(120)
    texts = [text.upper() for text in texts]
    jsonl(path, texts)
    stop_after(None)
    assert ''.join(seen) == ''.join(texts)
    text = gpt2.decode(tokens(folder, 'train').tolist())
    assert 'NUMBER 0' in text and 'number' not in text
    assert sorted(contents(folder)) == ['meta.json', 'prepare.py', 'train.bin', 'val.bin']


def test_openwebtext_comes_from_parquet_and_never_in_part_unasked(data, tmp_path, monkeypatch, gpt2):
    hub = pytest.importorskip('huggingface_hub')
    (tmp_path / 'snapshot' / 'plain_text').mkdir(parents=True)
    parquet(tmp_path / 'snapshot' / 'plain_text' / 'train-00000-of-00080.parquet', ['one', 'two', 'three', 'four'])
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path / 'snapshot')
    monkeypatch.setattr(hub, 'snapshot_download', snapshot_download)
    with pytest.raises(RuntimeError, match='4 documents of the 8,013,769 wanted'):
        load(data, 'openwebtext', monkeypatch).main()
    assert asked['name'] == 'Skylion007/openwebtext' and asked['allow_patterns'] == ['plain_text/train-*.parquet']
    load(data, 'openwebtext', monkeypatch, max_docs=3).main()
    assert asked['allow_patterns'] == ['plain_text/train-00000-*.parquet']
    assert sum(meta(data / 'openwebtext')['tokens'].values()) == len(gpt2.encode_ordinary('one|two|three')) + 1


def test_a_hub_out_of_reach_is_one_line(data, tmp_path):
    pytest.importorskip('huggingface_hub')
    result = run(data, 'openwebtext', HF_HUB_OFFLINE='1', HF_HOME=str(tmp_path / 'none'))
    assert result.returncode == 1 and result.stderr.count('\n') == 1 and '--input=FOLDER' in result.stderr


# mistakes

MANY = ''.join(chr(i) for i in range(0x20, 0x20 + 65537 + 2048) if not 0xd800 <= i < 0xe000)
MISTAKES = [        # script, the input's name and bytes (None: no input), arguments, what the line says
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
    ('text', 'a.txt', b'some text', ['--name=openwebtext'], 'is taken'),
    ('text', 'a.txt', b'some text', ['--num_proc=-1', '--tokenizer=char'], 'num_proc=-1'),
    ('text', 'a.txt', MANY.encode(), ['--tokenizer=char'], '--tokenizer=gpt2'),
    ('openwebtext', 'a.jsonl', None, [], 'no file or folder'),
    ('openwebtext', 'a.csv', b'text\n', [], 'does not end in'),
    ('openwebtext', 'a.jsonl', b'', [], 'is empty'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n\n{"text": a}\n', [], 'line 3 is not JSON'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n{"body": "a"}\n', [], 'line 2 has no string'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n["text"]\n', [], 'line 2 has no string'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n{"text": "\xe9"}\n', [], 'byte 24'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n', [], 'data/text/prepare.py'),
    ('openwebtext', 'a.parquet', b'PAR1 and no more', [], 'not a parquet file'),
    ('openwebtext', 'a.jsonl', b'{"text": "a"}\n', ['--max_docs=-1'], 'max_docs=-1'),
    ('shakespeare', 'a.txt', b'', [], 'is empty'),
    ('shakespeare_char', 'a.txt', b'a\0b', [], 'is binary'),
    ('stdlib_char', None, None, ['--max_bytes=10'], '--max_bytes'),
]


@pytest.mark.parametrize('name, file, given, arguments, says', MISTAKES)
def test_a_mistake_is_one_line_and_leaves_the_earlier_dataset(data, tmp_path, name, file, given, arguments, says):
    folder = data / ('a' if name == 'text' else name)
    folder.mkdir(exist_ok=True)
    for part in ('train.bin', 'val.bin', 'meta.json'):
        (folder / part).write_bytes(b'earlier ' + part.encode())
    before = {path: contents(path) for path in [data, *data.iterdir()] if path.is_dir()}
    if given is not None:
        (tmp_path / file).write_bytes(given)
    result = run(data, name, *([f'--input={tmp_path / file}'] if file else []), *arguments)
    assert result.returncode == 2 and result.stderr.count('\n') == 1 and says in result.stderr, result.stderr
    shutil.rmtree(data / '__pycache__', ignore_errors=True)
    assert {path: contents(path) for path in [data, *data.iterdir()] if path.is_dir()} == before


@pytest.mark.parametrize('column, says', [({'body': ['a', 'b']}, 'no column `text`'),
                                          ({'text': ['a', None, 'c']}, 'row 2 has no string'),
                                          ({'text': [1, 2]}, 'row 1 has no string')])
def test_parquet_without_text_is_refused(data, tmp_path, monkeypatch, gpt2, column, says):
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pq.write_table(pa.table(column), tmp_path / 'a.parquet')
    with pytest.raises(ValueError, match=says):
        load(data, 'openwebtext', monkeypatch, input=str(tmp_path / 'a.parquet')).main()
    assert list(contents(data / 'openwebtext')) == ['prepare.py']


@pytest.mark.parametrize('name', SCRIPTS)
def test_help_lists_the_settings(data, name):
    result = run(data, name, '--help')
    assert result.returncode == 0 and '--' in result.stdout and f'data/{name}/prepare.py' in result.stdout


# whole or not at all

def write_chars(folder, text, encode=None, key=''):
    described = tokenfiles.char_tokenizer(set(text))
    with tokenfiles.new_dataset(folder, described, key) as dataset:
        dataset.write([('train', text, False), ('val', text, False)],
                      encode or tokenfiles.encoder(described), 2 * len(text))


def fail_with(error):
    def encode(text):
        raise error
    return encode


@pytest.mark.parametrize('failure, raised', [(KeyboardInterrupt(), KeyboardInterrupt),
                                             (ValueError('bad row'), ValueError),
                                             (OSError(errno.ENOSPC, 'No space left on device'), RuntimeError)])
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
def test_sigterm_cleans_up_and_exits_with_143(tmp_path):
    write_chars(tmp_path, 'abc')
    before = contents(tmp_path)

    def encode(text):
        os.kill(os.getpid(), signal.SIGTERM)
        return tokenfiles.code_points(text).astype('<u2')
    with pytest.raises(SystemExit) as stopped:
        write_chars(tmp_path, 'xyz', encode)
    assert stopped.value.code == 143 and contents(tmp_path) == before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize('step', range(6))
def test_a_train_bin_always_has_the_val_bin_and_meta_json_of_its_run(tmp_path, monkeypatch, step):
    """A power cut at any rename or removal: what follows it never happens, clean-up included."""
    write_chars(tmp_path, 'abc')
    count = [0]

    def cut(function):
        def stand_in(*arguments, **options):
            if arguments and Path(arguments[0]).name == 'prepare.lock':
                return function(*arguments, **options)
            count[0] += 1
            if count[0] > step:
                raise SystemExit('power cut')
            return function(*arguments, **options)
        return stand_in
    with contextlib.suppress(SystemExit), monkeypatch.context() as patch:
        patch.setattr(os, 'replace', cut(os.replace))
        patch.setattr(Path, 'unlink', cut(Path.unlink))
        write_chars(tmp_path, 'longer')
    if (tmp_path / 'train.bin').exists():
        for name, digest in meta(tmp_path)['sha256'].items():
            assert hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() == digest
    write_chars(tmp_path, 'again')                  # and the next run is none the worse
    assert sorted(contents(tmp_path)) == ['meta.json', 'train.bin', 'val.bin']


def test_two_runs_at_once_are_refused(data, tmp_path):
    (tmp_path / 'a.txt').write_text('some text', encoding='utf-8')
    with tokenfiles.new_dataset(data / 'a', tokenfiles.char_tokenizer({'x'})) as dataset:
        result = run(data, 'text', f'--input={tmp_path / "a.txt"}', '--tokenizer=char')
        dataset.write([('train', 'x', False), ('val', 'x', False)], lambda text: np.zeros(1, '<u2'), 2)
    assert result.returncode == 2 and 'another run' in result.stderr
    assert meta(data / 'a')['tokens'] == {'train': 1, 'val': 1}
