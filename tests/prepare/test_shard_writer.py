"""data/fineweb_edu/prepare.py and the shards that it writes: the same, whatever the number of
parts, cores and stops."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hub_stand_in import Hub
from prepare_harness import contents, load, random_text, write_jsonl, write_parquet

from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset
from engine.downloads import download_files
from engine.errors import RunError, UserError
from engine.prepare import dataset_writer, encode, publish, shard_writer, text_files
from engine.prepare.documents import files_of_part, read_documents, split_position
from engine.tokenizer import GPT2, Tokenizer, TokenizerSpec, char_spec

END = 50256


@pytest.fixture
def documents(tmp_path):
    """199 documents in files of every format, and the folder of them. Some are empty, one is longer
    than a shard."""
    texts = [random_text(length % 40, length) for length in range(190)]
    texts += [random_text(900, 7)]
    texts += [' one', 'two', '', 'three'] * 2

    folder = tmp_path / 'in'
    folder.mkdir()
    write_parquet(folder / 'a.parquet', texts[:80])
    write_jsonl(folder / 'b.jsonl', texts[80:191])
    for i, text in enumerate(texts[191:]):
        (folder / f'c{i}.txt').write_bytes(text.encode('utf-8'))
    return texts, folder


def expected_shards(texts, size, encode):
    """{name: ids}, by the definition: an end-of-text token and then each document, cut at every
    `size` tokens."""
    ids = [i for text in texts for i in (END, *encode(text))]
    parts = [ids[begin:begin + size] for begin in range(0, len(ids), size)]
    return {f'{"train" if i else "val"}_{i:06}.bin': part for i, part in enumerate(parts)}


def read_shards(folder):
    return {path.name: np.fromfile(path, '<u2').tolist() for path in folder.glob('*_*.bin')}


@pytest.mark.parametrize('order', [(0,), (1, 0), (2, 0, 1), (6, 5, 4, 3, 2, 1, 0)])
@pytest.mark.parametrize('size', [1, 50, 333])
def test_shards_do_not_depend_on_parts_or_cores(data, documents, monkeypatch, gpt2, no_fsync, order,
                                                size):
    """order: the parts as they run."""
    if size == 1 and len(order) > 2:
        pytest.skip('one size is enough for shards of a single token')
    monkeypatch.setattr(encode, 'PIECE', 60)
    texts, path = documents
    if size == 1:
        texts = texts[:20]
        path = write_jsonl(path.parent / 'few.jsonl', texts)
    folder = data / 'fineweb_edu'
    for part in order:
        assert not read_shards(folder)                          # nothing appears before the whole
        load(data, 'fineweb_edu', monkeypatch, input=str(path), shard_tokens=size,
             num_proc=1 + part % 3, part=f'{part}/{len(order)}').main()

    expected = expected_shards(texts, size, gpt2.encode_ordinary)
    assert read_shards(folder) == expected
    meta = json.loads((folder / 'meta.json').read_text())
    assert meta['tokens'] == {'val': size, 'train': sum(map(len, expected.values())) - size}
    assert set(meta['sha256']) == set(expected)
    names = {path.name for path in folder.iterdir()}
    assert names == {*expected, 'meta.json', 'prepare.py'}


def test_parts_are_shares_of_the_bytes(documents):
    """Whatever their number, the parts have all documents once, in order."""
    _, folder = documents
    files = text_files.find_files(folder)
    sizes = [path.stat().st_size for path in files]

    def positions(path, start=0):
        return [document.position for document in read_documents(path, start)]

    every = [(number, position) for number, path in enumerate(files)
             for position in positions(path)]
    for parts in (1, 2, 3, 10, 97):
        borders = [split_position(files, sizes, part, parts)
                   for part in range(parts + 1)]
        found = []
        for part, (begin, end) in enumerate(zip(borders, borders[1:])):
            share = [place for place in every if begin <= place < end]
            needed = files_of_part(sizes, part, parts)
            assert {number for number, _ in share} <= set(needed)
            found += share
        assert found == every

    # reading from a position on: JSON lines, and rows of a parquet file with groups of seven
    lines = positions(files[1])
    for start in lines[::7]:
        assert positions(files[1], start) == [position for position in lines if position >= start]
    assert not positions(files[0], 80)
    rows = [''.join(document.texts) for document in read_documents(files[0])]
    for row in (0, 6, 7, 8, 79):
        document = next(read_documents(files[0], row))
        assert ''.join(document.texts) == rows[row]


# stopped runs

class Stoppable:
    """data/fineweb_edu/prepare.py over 120 documents in three parts, stopped while it encodes."""

    def __init__(self, data, path, monkeypatch):
        self.texts = [f'{random_text(20, seed)} number {seed}' for seed in range(120)]
        self.path = write_jsonl(path, self.texts)
        self.folder = data / 'fineweb_edu'
        self.script = load(data, 'fineweb_edu', monkeypatch, input=str(path), num_proc=1,
                           shard_tokens=300)
        self.encode = Tokenizer(GPT2).encode_to_numpy
        self.encoded = []
        self.stop_at = None

        # this object takes the place of the script's tokenizer
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

    def run(self, stop_at=None, part='0/1'):
        """The text that was encoded."""
        self.stop_at = stop_at
        self.script.part = part
        self.encoded.clear()
        with suppress(KeyboardInterrupt):
            self.script.main()
        return ''.join(self.encoded)

    def state(self, part=0, parts=1):
        """{name: (content, time of change)} of the finished chunks."""
        folder = self.folder / 'unfinished' / f'{part}_of_{parts}'
        return {path.name: (path.read_bytes(), path.stat().st_mtime_ns)
                for path in folder.glob('*.bin')}

    def expected(self):
        """The shards of `texts`."""
        return expected_shards(self.texts, 300, self.encode)


@pytest.fixture
def stoppable(data, tmp_path, monkeypatch, no_fsync, gpt2):     # noqa: F811
    return Stoppable(data, tmp_path / 'docs.jsonl', monkeypatch)


def test_stops_continue_at_the_shard_and_leave_finished_ones_alone(stoppable, gpt2):
    before = {}
    total = 0
    for stop_at in (30, 41, 17, 35):
        stoppable.run(stop_at)
        state = stoppable.state()
        assert before.items() <= state.items() and not list(stoppable.folder.glob('*.bin'))
        before = state
        total += len(''.join(stoppable.encoded))
    assert len(before) > 3

    # each stop loses a shard and what is in flight
    rest = stoppable.run()
    text = ''.join(stoppable.texts)
    assert text.endswith(rest) and total + len(rest) < len(text) + 4 * 1500
    assert read_shards(stoppable.folder) == stoppable.expected()

    for name, (content, changed) in before.items():             # renamed, not written again
        path = stoppable.folder / shard_writer.shard_name(int(name[:6]))
        assert (path.read_bytes(), path.stat().st_mtime_ns) == (content, changed)
    assert stoppable.run() == ''                                # it is complete, and stays as it is


def test_the_earlier_dataset_stays_until_the_new_one_is_whole(stoppable, gpt2):
    stoppable.run()
    first = contents(stoppable.folder)
    texts = [text.upper() for text in stoppable.texts[:60]]
    write_jsonl(stoppable.path, texts)
    stoppable.run(20)
    assert contents(stoppable.folder) == first
    for part in (1, 0):
        assert contents(stoppable.folder) == first
        stoppable.run(part=f'{part}/2')
    # the earlier dataset had more shards
    assert read_shards(stoppable.folder) == expected_shards(texts, 300, gpt2.encode_ordinary)


@pytest.mark.parametrize('damage', [
    '', '{', '[]', 'null', '{"key": 1}', '[' * 100000,      # the whole journal
    'skip', 'document', 'chunks', 'key',                    # a field of it
    'size', 'gone'])                                        # a chunk
def test_damaged_work_starts_from_the_beginning(stoppable, gpt2, damage):
    stoppable.run(60)
    journal = stoppable.folder / 'unfinished' / '0_of_1' / 'journal.json'
    chunk = journal.with_name('000000.bin')
    fields = json.loads(journal.read_text())
    values = dict(skip=-1, document=[0], chunks=[['7', 'x']], key='other')
    if damage in ('size', 'gone'):
        data = chunk.read_bytes()
        chunk.unlink()
        if damage == 'size':
            chunk.write_bytes(data[:-2])
        words = '000000.bin is missing or damaged; run --part=0/1 again'
        with pytest.raises(UserError, match=words):
            stoppable.run()
    elif damage in values:
        journal.write_text(json.dumps(dict(fields, **{damage: values[damage]})))
    else:
        journal.write_text(damage)

    assert stoppable.run() == ''.join(stoppable.texts)
    assert read_shards(stoppable.folder) == stoppable.expected()


@contextmanager
def power_cut(monkeypatch, step):
    """From rename or removal number `step` on, none happens any more.

    Yields a list that tells whether it came to that.
    """
    count = 0
    happened = []

    def cut(function):
        def stand_in(*arguments, **options):
            nonlocal count
            if not str(arguments[0]).endswith('.lock'):
                count += 1
                if count > step:
                    happened.append(arguments)
                    raise SystemExit('power cut')
            return function(*arguments, **options)
        return stand_in

    with suppress(SystemExit), monkeypatch.context() as patch:
        patch.setattr(os, 'replace', cut(os.replace))
        patch.setattr(Path, 'unlink', cut(Path.unlink))
        patch.setattr(shutil, 'rmtree', cut(shutil.rmtree))
        yield happened


def test_a_power_cut_at_any_rename_leaves_the_old_dataset_or_a_refused_folder(
        stoppable, monkeypatch, gpt2):
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

    outcomes = []
    start = stoppable.folder.parent / 'start'
    shutil.copytree(stoppable.folder, start)
    for step in range(1000):
        shutil.rmtree(stoppable.folder)
        shutil.copytree(start, stoppable.folder)
        with power_cut(monkeypatch, step) as happened:
            stoppable.run(part='2/3')

        try:
            TokenDataset('fineweb_edu')
            if read_shards(stoppable.folder) == expected:
                outcomes.append('new')
            else:
                outcomes.append('old')
                found = contents(stoppable.folder)
                assert {name: found[name] for name in old} == old
        except UserError as error:
            outcomes.append('refused')
            assert 'is being replaced' in str(error) or 'has no train.bin' in str(error)

        stoppable.run(part='2/3')
        assert read_shards(stoppable.folder) == expected
        assert not (stoppable.folder / 'unfinished').exists()
        if not happened:
            break

    assert sorted(set(outcomes), key=outcomes.index) == ['old', 'refused', 'new']
    assert outcomes[-1] == 'new'


@pytest.mark.skipif(os.name != 'posix', reason='Windows has no SIGKILL')
def test_killed_processes_and_parts_side_by_side(data, tmp_path, gpt2):
    """SIGKILL at any time, and then the three parts at once."""
    texts = [random_text(400, seed) for seed in range(150)]
    path = write_jsonl(tmp_path / 'docs.jsonl', texts)
    folder = data / 'fineweb_edu'
    command = [sys.executable, str(folder / 'prepare.py'), f'--input={path}',
               '--shard_tokens=1000', '--num_proc=1']

    for part in (0, 1, 2):
        process = subprocess.Popen([*command, f'--part={part}/3'], stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if list((folder / 'unfinished').glob(f'{part}_of_3/*.bin')):
                break
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()

    processes = [
        subprocess.Popen([*command, f'--part={part}/3'], stdout=subprocess.PIPE, text=True)
        for part in (0, 1, 2)]
    output = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert any('shards have' in text for text in output)
    assert read_shards(folder) == expected_shards(texts, 1000, gpt2.encode_ordinary)


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

CRAWL = 'data/CC-MAIN-2024-10/1.parquet'
ENDLESS = [f'sample/350BT/{number:03}.parquet' for number in range(6)]


@pytest.fixture
def fineweb(tmp_path, monkeypatch):
    """A hub that has some files of FineWeb-Edu. The documents of each have its name."""
    pytest.importorskip('huggingface_hub')
    files = {}
    for name in ('sample/10BT/000.parquet', 'sample/100BT/000.parquet', CRAWL, *ENDLESS):
        documents = [f'{name} {number}' for number in range(5)]
        files[name] = write_parquet(tmp_path / 'file.parquet', documents).read_bytes()
    hub = Hub({'datasets/HuggingFaceFW/fineweb-edu': files})
    hub.reach(monkeypatch, tmp_path)
    yield hub
    hub.close()


def documents_of(*names):
    return [f'{name} {number}' for name in names for number in range(5)]


def go_offline(monkeypatch):
    from huggingface_hub import constants
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)


def test_a_sample_is_its_files_only(data, monkeypatch, gpt2, fineweb):
    """The hub and its cache have other samples. Their files are not read."""
    samples = {'sample-100BT': 'sample/100BT/000.parquet', 'CC-MAIN-2024-10': CRAWL, 'all': CRAWL}
    for sample, name in samples.items():
        load(data, 'fineweb_edu', monkeypatch, sample=sample, shard_tokens=2).main()
        expected = expected_shards(documents_of(name), 2, gpt2.encode_ordinary)
        assert read_shards(data / 'fineweb_edu') == expected

    with pytest.raises(UserError, match="'CC-MAIN-2099-99' has no files on the hub"):
        load(data, 'fineweb_edu', monkeypatch, sample='CC-MAIN-2099-99').main()


def test_a_download_that_is_not_whole_is_refused_without_a_network(data, monkeypatch, gpt2,
                                                                   fineweb):
    load(data, 'fineweb_edu', monkeypatch, shard_tokens=2).main()
    go_offline(monkeypatch)
    with pytest.raises(RunError, match='5 of about 9,670,000 documents'):
        load(data, 'fineweb_edu', monkeypatch).main()


def cached_files(folder):
    return {path.name for path in folder.glob('hf/hub/*/snapshots/*/sample/350BT/*')}


def test_each_part_downloads_its_own_files_and_all_parts_join(data, tmp_path, monkeypatch, gpt2,
                                                              fineweb):
    """On machines of their own: one by one, with whole files in the cache, without a network."""
    def prepare(part):
        load(data, 'fineweb_edu', monkeypatch, sample='sample-350BT', shard_tokens=30,
             part=f'{part}/3').main()

    # two parts of their own download
    for part in (2, 0):
        machine = tmp_path / f'machine-{part}'
        fineweb.reach(monkeypatch, machine)
        prepare(part)
        numbers = (2 * part, 2 * part + 1)
        assert cached_files(machine) == {f'{number:03}.parquet' for number in numbers}

    # the third one from a cache that has everything, as files and not as links to blobs
    machine = tmp_path / 'machine-1'
    fineweb.reach(monkeypatch, machine)
    download_files(load(data, 'fineweb_edu', monkeypatch).HUB, ['sample/350BT/*'])
    for path in machine.glob('hf/hub/*/snapshots/*/sample/350BT/*'):
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content)
    go_offline(monkeypatch)
    prepare(1)
    expected = expected_shards(documents_of(*ENDLESS), 30, gpt2.encode_ordinary)
    assert read_shards(data / 'fineweb_edu') == expected


# large vocabularies

LARGE = TokenizerSpec(
    'hf', 70_000, end_of_text=69_999, tokenizer_name='large', tokenizer_sha256='',
    tokenizer_json='', tokenizer_config='')


def encode_large(text):
    return np.array([60_000 + ord(character) * 80 for character in text], '<u4')


def test_ids_beyond_65535_are_written_and_read_with_32_bits(tmp_path, monkeypatch):
    """By both writers, and read by the loader, which knows the vocabulary's end-of-text token."""
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    texts = ['some text', 'and more', 'a third'] * 20
    ids = [[*encode_large(text).tolist(), 69_999] for text in texts]
    all_ids = sum(ids, [])

    # one file a split
    with dataset_writer.dataset_writer(tmp_path / 'files', LARGE) as writer:
        pieces = [(split, text, True) for text in texts for split in ('train', 'val')]
        writer.write(pieces, encode_large, 1)
    for split in ('train', 'val'):
        found = np.fromfile(tmp_path / 'files' / f'{split}.bin', '<u4')
        assert found.tolist() == all_ids

    # shards
    def read_pieces(document):
        return (((0, i), text, True) for i, text in enumerate(texts))

    writer = shard_writer.ShardWriter(tmp_path / 'shards', LARGE, 'key', 37, 0, 1)
    assert writer.write(read_pieces, encode_large, 2)

    # read
    for name, held_out in (('files', 0), ('shards', 37)):
        meta = json.loads((tmp_path / name / 'meta.json').read_text())
        assert meta['dtype'] == 'uint32' and meta['tokens']['train'] == len(all_ids) - held_out
        dataset = TokenDataset(name, documents='whole')
        dataset.set_block_size(5)
        x, _ = dataset.batch(1, 'train', 0, 30)
        assert (x[:, 0] == 69_999).all() and x.max() < 70_000 and (x[:, 1] > 65_535).any()
    stream = np.concatenate([dataset.tokens['val'][:], dataset.tokens['train'][:]])
    assert stream.tolist() == sum([[69_999, *text[:-1]] for text in ids], [])


def test_shards_replace_a_dataset_of_one_file_a_split(tmp_path):
    with dataset_writer.dataset_writer(tmp_path, CHARACTERS) as writer:
        pieces = [('train', 'abc', False), ('val', 'cab', False)]
        writer.write(pieces, lambda text: np.zeros(len(text)), 6)
    assert set(contents(tmp_path)) == {'train.bin', 'val.bin', 'meta.json', 'meta.pkl'}

    def read_pieces(document):
        return [((0, 0), 'some text', True)]

    writer = shard_writer.ShardWriter(tmp_path, LARGE, 'key', 6, 0, 1)
    assert writer.write(read_pieces, encode_large)
    assert set(contents(tmp_path)) == {'val_000000.bin', 'train_000001.bin', 'meta.json'}


CHARACTERS = char_spec('abc')
NO_END = replace(LARGE, vocab_size=300, end_of_text=None)


@pytest.mark.parametrize('spec', [CHARACTERS, NO_END])
def test_a_vocabulary_without_an_end_of_text_token_takes_no_documents(tmp_path, spec):
    """Instead of GPT-2's id in another vocabulary."""
    def encode(text):
        return np.array(['abc'.index(character) for character in text])

    folder = tmp_path / 'files'
    with dataset_writer.dataset_writer(folder, CHARACTERS) as writer:
        writer.write([('train', 'abc', False), ('val', 'cab', False)], encode, 6)

    with pytest.raises(UserError, match='no end-of-text token; leave ends_document False'):
        with dataset_writer.dataset_writer(folder, spec) as writer:
            writer.write([('train', 'abc', False), ('val', 'cab', True)], encode, 6)
    # the dataset of before
    assert np.fromfile(folder / 'val.bin', '<u2').tolist() == [2, 0, 1]

    words = 'no end-of-text token, and shards have one before each document'
    with pytest.raises(UserError, match=words):
        shard_writer.ShardWriter(tmp_path / 'shards', spec, 'key', 37, 0, 1)
