"""data/fineweb_edu/prepare.py and the shards that it writes: the same, whatever the number of parts, cores and stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from test_prepare import (  # noqa: F401
    contents,
    data,
    gpt2,
    load,
    no_fsync,
    random_text,
    run,
    write_jsonl,
    write_parquet,
)

from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset
from engine.errors import RunError, UserError
from engine.prepare import dataset_writer, encode, publish, shard_writer, text_files
from engine.tokenizer import GPT2, Tokenizer

END = 50256


@pytest.fixture
def documents(tmp_path):
    """200 documents in files of every format, and the folder of them. Some are empty, one is longer than a shard."""
    texts = [random_text(length % 40, length) for length in range(190)] + [random_text(900, 7)] + [' one', 'two', '', 'three'] * 2
    folder = tmp_path / 'in'
    folder.mkdir()
    write_parquet(folder / 'a.parquet', texts[:80])
    write_jsonl(folder / 'b.jsonl', texts[80:191])
    for i, text in enumerate(texts[191:]):
        (folder / f'c{i}.txt').write_bytes(text.encode('utf-8'))
    return texts[:191] + texts[191:], folder


def expected_shards(texts, size, encode):
    """{name: ids}, by the definition: an end-of-text token and then each document, cut at every `size` tokens."""
    ids = [i for text in texts for i in (END, *encode(text))]
    parts = [ids[begin:begin + size] for begin in range(0, len(ids), size)]
    return {f'{"train" if i else "val"}_{i:06}.bin': part for i, part in enumerate(parts)}


def read_shards(folder):
    return {path.name: np.fromfile(path, '<u2').tolist() for path in folder.glob('*_*.bin')}


@pytest.mark.parametrize('order', [(0,), (1, 0), (2, 0, 1), (6, 5, 4, 3, 2, 1, 0)])
@pytest.mark.parametrize('size', [1, 50, 333])
def test_shards_do_not_depend_on_parts_or_cores(data, documents, monkeypatch, gpt2, no_fsync, order, size):      # noqa: F811
    """order: the parts as they run."""
    if size == 1 and len(order) > 2:
        pytest.skip('one size is enough for shards of a single token')
    monkeypatch.setattr(encode, 'PIECE', 60)
    texts, folder = documents
    texts = texts[:20] if size == 1 else texts
    if size == 1:
        folder = write_jsonl(folder.parent / 'few.jsonl', texts)
    for part in order:
        assert not read_shards(data / 'fineweb_edu')            # nothing appears before the whole
        load(data, 'fineweb_edu', monkeypatch, input=str(folder), shard_tokens=size, num_proc=1 + part % 3,
             part=f'{part}/{len(order)}').main()
    expected = expected_shards(texts, size, gpt2.encode_ordinary)
    assert read_shards(data / 'fineweb_edu') == expected
    found = json.loads((data / 'fineweb_edu' / 'meta.json').read_text())
    assert found['tokens'] == {'val': size, 'train': sum(map(len, expected.values())) - size} and set(found['sha256']) == set(expected)
    assert sorted(path.name for path in (data / 'fineweb_edu').iterdir()) == sorted([*expected, 'meta.json', 'prepare.py'])


def test_parts_are_shares_of_the_bytes(documents):
    """Whatever their number, the parts have all documents once, in order; and no part of a large file has many more than others."""
    _, folder = documents
    files = text_files.find_files(folder)
    every = [(number, position) for number, path in enumerate(files) for position, _ in text_files.read_documents(path)]
    for parts in (1, 2, 3, 10, 97):
        borders = [text_files.split_position(files, part, parts) for part in range(parts + 1)]
        shares = [[place for place in every if begin <= place < end] for begin, end in zip(borders, borders[1:])]
        assert [place for share in shares for place in share] == every
    positions = [position for position, _ in text_files.read_documents(files[1])]
    for position in positions[::7]:
        assert [place for place, _ in text_files.read_documents(files[1], position)] == [p for p in positions if p >= position]
    assert not list(text_files.read_documents(files[0], 80))
    rows = [''.join(next(text_files.read_documents(files[0], row))[1]) for row in (0, 6, 7, 8, 79)]
    assert rows == [''.join(document) for row, (_, document) in enumerate(text_files.read_documents(files[0]))
                    if row in (0, 6, 7, 8, 79)]


# stopped runs

class Stoppable:
    """data/fineweb_edu/prepare.py over 120 documents in three parts, stopped while it encodes."""

    def __init__(self, data, path, monkeypatch):
        self.texts = [f'{random_text(20, seed)} number {seed}' for seed in range(120)]
        self.path, self.folder, self.monkeypatch = write_jsonl(path, self.texts), data / 'fineweb_edu', monkeypatch
        self.script = load(data, 'fineweb_edu', monkeypatch, input=str(path), num_proc=1, shard_tokens=300)
        self.encode, self.encoded, self.stop_at = Tokenizer(GPT2).encode_to_numpy, [], None
        self.spec, self.splits_like_gpt2 = GPT2, True
        monkeypatch.setattr(self.script, 'document_tokenizer', lambda name: self)
        monkeypatch.setattr(encode, 'PIECE', 30)

    def encode_to_numpy(self, text):
        self.encoded.append(text)
        if len(self.encoded) == self.stop_at:
            raise KeyboardInterrupt
        return self.encode(text)

    def run(self, stop_at=None, part='0/1'):
        """The text that was encoded."""
        self.stop_at, self.script.part = stop_at, part
        self.encoded.clear()
        with suppress(KeyboardInterrupt):
            self.script.main()
        return ''.join(self.encoded)

    def state(self, part=0, parts=1):
        """{name: (content, time of change)} of the finished chunks."""
        folder = self.folder / 'unfinished' / f'{part}_of_{parts}'
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.glob('*.bin')}


@pytest.fixture
def stoppable(data, tmp_path, monkeypatch, no_fsync, gpt2):     # noqa: F811
    return Stoppable(data, tmp_path / 'docs.jsonl', monkeypatch)


def test_stops_continue_at_the_shard_and_leave_finished_ones_alone(stoppable, gpt2):      # noqa: F811
    before, total = {}, 0
    for stop_at in (30, 41, 17, 35):
        stoppable.run(stop_at)
        state = stoppable.state()
        assert before.items() <= state.items() and not list(stoppable.folder.glob('*.bin'))
        before, total = state, total + len(''.join(stoppable.encoded))
    assert len(before) > 3
    rest, text = stoppable.run(), ''.join(stoppable.texts)
    assert text.endswith(rest) and total + len(rest) < len(text) + 4 * 1500       # a shard and what is in flight, per stop
    assert read_shards(stoppable.folder) == expected_shards(stoppable.texts, 300, gpt2.encode_ordinary)
    for name, (content, changed) in before.items():             # renamed, not written again
        path = stoppable.folder / shard_writer.shard_name(int(name[:6]))
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, changed)
    assert stoppable.run() == ''                                # it is complete, and stays as it is


def test_the_earlier_dataset_stays_until_the_new_one_is_whole(stoppable, gpt2):      # noqa: F811
    stoppable.run()
    first = contents(stoppable.folder)
    texts = [text.upper() for text in stoppable.texts[:60]]
    write_jsonl(stoppable.path, texts)
    stoppable.run(20)
    assert contents(stoppable.folder) == first
    for part in (1, 0):
        assert contents(stoppable.folder) == first
        stoppable.run(part=f'{part}/2')
    assert read_shards(stoppable.folder) == expected_shards(texts, 300, gpt2.encode_ordinary)    # it had more shards


@pytest.mark.parametrize('damage', ['', '{', '[]', 'null', '{"key": 1}', '[' * 100000, 'skip', 'document', 'chunks', 'key', 'size', 'gone'])
def test_damaged_work_starts_from_the_beginning(stoppable, gpt2, damage):      # noqa: F811
    stoppable.run(60)
    journal = stoppable.folder / 'unfinished' / '0_of_1' / 'journal.json'
    fields, chunk = json.loads(journal.read_text()), journal.with_name('000000.bin')
    values = dict(skip=-1, document=[0], chunks=[['7', 'x']], key='other')
    if damage in ('size', 'gone'):
        chunk.write_bytes(chunk.read_bytes()[:-2]) if damage == 'size' else chunk.unlink()
        with pytest.raises(UserError, match='000000.bin is missing or damaged; run --part=0/1 again'):
            stoppable.run()
    else:
        journal.write_text(json.dumps(dict(fields, **{damage: values[damage]})) if damage in values else damage)
    assert stoppable.run() == ''.join(stoppable.texts)
    assert read_shards(stoppable.folder) == expected_shards(stoppable.texts, 300, gpt2.encode_ordinary)


def test_a_power_cut_at_any_rename_leaves_the_old_dataset_or_a_refused_folder(stoppable, monkeypatch, gpt2):      # noqa: F811
    """Over the whole run of the last of three parts. The next run completes the dataset."""
    monkeypatch.setattr(dataloader, 'DATA', stoppable.folder.parent)
    write_jsonl(stoppable.path, stoppable.texts[:12])
    stoppable.script.shard_tokens = 40
    stoppable.run()
    old = contents(stoppable.folder)
    texts = stoppable.texts[:18]
    write_jsonl(stoppable.path, texts)
    expected = expected_shards(texts, 40, gpt2.encode_ordinary)
    assert len(expected) > len(read_shards(stoppable.folder))
    for part in (0, 1):
        stoppable.run(part=f'{part}/3')
    start, outcomes = stoppable.folder.parent / 'start', []
    shutil.copytree(stoppable.folder, start)
    for step in range(1000):
        shutil.rmtree(stoppable.folder)
        shutil.copytree(start, stoppable.folder)
        count, cut = [0], []

        def stand_in(function):
            def call(*arguments, **options):
                if not str(arguments[0]).endswith('.lock'):
                    count[0] += 1
                    if count[0] > step:
                        cut.append(arguments)
                        raise SystemExit('power cut')
                return function(*arguments, **options)
            return call
        with suppress(SystemExit), monkeypatch.context() as patch:
            patch.setattr(os, 'replace', stand_in(os.replace))
            patch.setattr(Path, 'unlink', stand_in(Path.unlink))
            patch.setattr(shutil, 'rmtree', stand_in(shutil.rmtree))
            stoppable.run(part='2/3')
        try:
            TokenDataset('fineweb_edu')
            outcomes.append('new' if read_shards(stoppable.folder) == expected else 'old')
            assert outcomes[-1] == 'new' or {name: content for name, content in contents(stoppable.folder).items() if name in old} == old
        except UserError as error:
            outcomes.append('refused')
            assert 'is being replaced' in str(error) or 'has no train.bin' in str(error)
        stoppable.run(part='2/3')
        assert read_shards(stoppable.folder) == expected and not (stoppable.folder / 'unfinished').exists()
        if not cut:
            break
    assert sorted(set(outcomes), key=outcomes.index) == ['old', 'refused', 'new'] and outcomes[-1] == 'new'


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no SIGKILL')
def test_killed_processes_and_parts_side_by_side(data, tmp_path, gpt2):      # noqa: F811
    """SIGKILL at any time, and then the three parts at once."""
    texts = [random_text(400, seed) for seed in range(150)]
    path = write_jsonl(tmp_path / 'docs.jsonl', texts)
    command = [sys.executable, str(data / 'fineweb_edu' / 'prepare.py'), f'--input={path}', '--shard_tokens=1000', '--num_proc=1']
    for part in (0, 1, 2):
        process = subprocess.Popen([*command, f'--part={part}/3'], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while not list((data / 'fineweb_edu' / 'unfinished').glob(f'{part}_of_3/*.bin')) and time.monotonic() < deadline:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
    processes = [subprocess.Popen([*command, f'--part={part}/3'], stdout=subprocess.PIPE, text=True) for part in (0, 1, 2)]
    output = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0] and any('shards have' in text for text in output)
    assert read_shards(data / 'fineweb_edu') == expected_shards(texts, 1000, gpt2.encode_ordinary)


def test_a_part_is_not_run_twice_at_once(stoppable):
    work = stoppable.folder / 'unfinished' / '0_of_1'
    work.mkdir(parents=True)
    with publish.write_lock(work / 'prepare.lock'), pytest.raises(UserError, match='another run'):
        stoppable.run()


def test_shards_of_others_in_the_folder_are_refused_first(stoppable):
    (stoppable.folder / 'fineweb_train_000001.bin').write_bytes(b'ab')
    with pytest.raises(UserError, match='holds fineweb_train_000001.bin of another dataset'):
        stoppable.run()
    assert not stoppable.encoded


# the hub

def test_another_hub_is_asked_where_hf_endpoint_says(data, tmp_path):      # noqa: F811
    pytest.importorskip('huggingface_hub')
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)
        do_HEAD = do_GET

        def log_message(self, *arguments):
            pass
    server = HTTPServer(('127.0.0.1', 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    result = run(data, 'fineweb_edu', HF_ENDPOINT=f'http://127.0.0.1:{server.server_port}', HF_HOME=str(tmp_path / 'hub'),
                 NO_PROXY='127.0.0.1', no_proxy='127.0.0.1')
    server.shutdown()
    assert any('HuggingFaceFW/fineweb-edu' in path for path in asked)
    assert result.returncode == 1 and result.stderr.count('\n') == 1 and '--input=FOLDER' in result.stderr


def test_a_sample_is_its_files_only(data, tmp_path, monkeypatch, gpt2):      # noqa: F811
    """The hub's cache may hold other samples. Their files are not read."""
    hub = pytest.importorskip('huggingface_hub')
    for name in ('sample/10BT/000.parquet', 'sample/100BT/000.parquet', 'data/CC-MAIN-2024-10/1.parquet'):
        (tmp_path / 'hub' / name).parent.mkdir(parents=True)
        write_parquet(tmp_path / 'hub' / name, [name])
    monkeypatch.setattr(hub, 'snapshot_download', lambda name, **options: str(tmp_path / 'hub'))
    for sample, name in (('sample-100BT', 'sample/100BT/000.parquet'), ('CC-MAIN-2024-10', 'data/CC-MAIN-2024-10/1.parquet'),
                         ('all', 'data/CC-MAIN-2024-10/1.parquet')):
        load(data, 'fineweb_edu', monkeypatch, sample=sample, shard_tokens=2).main()
        assert read_shards(data / 'fineweb_edu') == expected_shards([name], 2, gpt2.encode_ordinary)
    with pytest.raises(RunError, match='1 of about 9,670,000 documents'):
        load(data, 'fineweb_edu', monkeypatch).main()


# large vocabularies

LARGE = dict(tokenizer='hf', vocab_size=70_000, end_of_text=69_999)


def read_large(folder):
    """As read_spec_and_fields does, for a spec without a tokenizer.json."""
    return LARGE, json.loads((folder / 'meta.json').read_text())


def encode_large(text):
    return np.array([60_000 + ord(character) * 80 for character in text], '<u4')


def test_ids_beyond_65535_are_written_and_read_with_32_bits(tmp_path, monkeypatch):
    """By both writers, and read by the loader, which knows the end-of-text token of the vocabulary."""
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    monkeypatch.setattr(dataloader, 'read_spec_and_fields', read_large)
    texts = ['some text', 'and more', 'a third'] * 20
    ids = [[*encode_large(text).tolist(), 69_999] for text in texts]
    with dataset_writer.dataset_writer(tmp_path / 'files', LARGE, lambda line: None) as writer:
        writer.write([(split, text, True) for text in texts for split in ('train', 'val')], encode_large, 1)
    for split in ('train', 'val'):
        assert np.fromfile(tmp_path / 'files' / f'{split}.bin', '<u4').tolist() == sum(ids, [])
    writer = shard_writer.ShardWriter(tmp_path / 'shards', LARGE, 'key', 37, 0, 1, lambda line: None)
    assert writer.write(lambda document: (((0, i), text, True) for i, text in enumerate(texts)), encode_large, 2)
    for name in ('files', 'shards'):
        meta = json.loads((tmp_path / name / 'meta.json').read_text())
        assert meta['dtype'] == 'uint32' and meta['tokens']['train'] == len(sum(ids, [])) - (37 if name == 'shards' else 0)
        dataset = TokenDataset(name, documents='whole')
        dataset.set_block_size(5)
        x, _ = dataset.batch(1, 'train', 0, 30)
        assert (x[:, 0] == 69_999).all() and x.max() < 70_000 and (x[:, 1] > 65_535).any()
    stream = np.concatenate([dataset.tokens['val'][:], dataset.tokens['train'][:]])
    assert stream.tolist() == sum([[69_999, *text[:-1]] for text in ids], [])


CHARACTERS = dict(tokenizer='char', vocab_size=3, chars='abc')
NO_END = dict(tokenizer='hf', vocab_size=300, end_of_text=None)


@pytest.mark.parametrize('spec', [CHARACTERS, NO_END])
def test_a_vocabulary_without_an_end_of_text_token_takes_no_documents(tmp_path, spec):
    """Instead of GPT-2's id in another vocabulary."""
    def encode(text):
        return np.array(['abc'.index(character) for character in text])
    folder = tmp_path / 'files'
    with dataset_writer.dataset_writer(folder, CHARACTERS, lambda line: None) as writer:
        writer.write([('train', 'abc', False), ('val', 'cab', False)], encode, 6)
    with pytest.raises(UserError, match='no end-of-text token; leave ends_document False'):
        with dataset_writer.dataset_writer(folder, spec, lambda line: None) as writer:
            writer.write([('train', 'abc', False), ('val', 'cab', True)], encode, 6)
    assert np.fromfile(folder / 'val.bin', '<u2').tolist() == [2, 0, 1]             # the dataset of before
    with pytest.raises(UserError, match='no end-of-text token, and shards have one before each document'):
        shard_writer.ShardWriter(tmp_path / 'shards', spec, 'key', 37, 0, 1, lambda line: None)
