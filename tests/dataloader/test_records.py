"""Datasets of records, and the demos that are made of them.

Windows start at records, and prompts are no targets.
"""

import json
import sys
import urllib.request
import zipfile
from importlib import util

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import ROOT, copy_project, script_settings

import configurator
import train
from engine.dataloader import batches as dataloader
from engine.dataloader.batches import TokenDataset
from engine.distributed import Environment
from engine.errors import RunError, UserError
from engine.tokenizer import Tokenizer, read_meta
from engine.training import parallel
from model import GPT, GPTConfig

CHARACTERS = 'abcdefghij'


def write_records(folder, record, prompt=4, n_train=60, n_val=12, length=7):
    """Each record's first tokens are the digits of its number, which tell where a window starts.

    prompt: how many tokens of each record do not count in the loss; None writes no masks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for split, first, count in (('train', 0, n_train), ('val', 500, n_val)):
        rows = []
        for n in range(first, first + count):
            digits = [n // 100, n // 10 % 10, n % 10]
            rows.append(digits + [(n + i) % 10 for i in range(length - 3)])
        np.array(rows, '<u2').tofile(folder / f'{split}.bin')
        if prompt is not None:
            mask = np.arange(count * length) % length >= prompt
            mask.astype('u1').tofile(folder / f'{split}.mask')

    meta = dict(tokenizer='char', vocab_size=10, chars=CHARACTERS, record=record)
    (folder / 'meta.json').write_text(json.dumps(meta))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(dataloader, 'DATA', tmp_path)
    return tmp_path / 'rows'


def number_of(tokens):
    """The number of the record that begins with these tokens."""
    return int(''.join(map(str, tokens[:3])))


def rows_of(data, stream, first, count, block_size):
    """The numbers of the records that windows start at. Every target is compared with the file."""
    data.set_block_size(block_size)
    x, y = data.batch(1, stream, first, count)
    split, first_number = ('val', 500) if stream == 'eval val' else ('train', 0)
    tokens = np.fromfile(data.folder / f'{split}.bin', '<u2').astype(int)

    numbers = []
    for inputs, targets in zip(x.tolist(), y.tolist()):
        number = number_of(inputs)
        start = (number - first_number) * 7
        assert inputs == tokens[start:start + block_size].tolist()
        for i, target in enumerate(targets, start + 1):
            assert target == (-1 if i % 7 < 4 else tokens[i])
        numbers.append(number)
    return numbers


@pytest.mark.parametrize('block_size', [3, 6, 10, 20])
@pytest.mark.parametrize('stream', ['train', 'eval train', 'eval val'])
def test_windows_start_at_records_and_prompts_are_no_targets(folder, stream, block_size):
    write_records(folder, dict(length=7))
    numbers = rows_of(TokenDataset('rows'), stream, 0, 200, block_size)
    assert len(set(numbers)) > (5 if stream == 'eval val' else 45)


def test_an_epoch_reads_each_record_once(folder):
    write_records(folder, dict(length=7))
    data = TokenDataset('rows', sampling='epoch')
    first = rows_of(data, 'train', 0, 60, 6)
    second = rows_of(data, 'train', 60, 60, 6)
    assert sorted(first) == sorted(second) == list(range(60))
    assert first != second


def test_the_record_is_part_of_what_a_run_was_trained_on(folder):
    fingerprints = set()
    for record, prompt in ((None, 4), (None, None), (dict(length=7), 4), (dict(length=7), 3)):
        for path in folder.glob('*.mask'):
            path.unlink()
        write_records(folder, record, prompt)
        fingerprints.add(TokenDataset('rows').fingerprint)
    assert len(fingerprints) == 4


def test_the_loss_is_that_of_the_answers_alone(folder):
    """With the loss of the training step, against the mean of log-probabilities picked by hand."""
    write_records(folder, dict(length=7))
    data = TokenDataset('rows')
    data.set_block_size(6)
    x, y = data.batch(1, 'train', 0, 5)

    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=6, vocab_size=10, n_layer=1, n_head=2, n_embd=16))
    with torch.no_grad():
        logprobs = F.log_softmax(model.logits(model.hidden(x)), dim=-1)

    rows = np.fromfile(folder / 'train.bin', '<u2').reshape(-1, 7)
    rows = rows[[number_of(window) for window in x.tolist()]]
    picked = [logprobs[b, t - 1, int(rows[b, t])].item() for b in range(5) for t in range(4, 7)]

    parallel.wrap(model, Environment(torch.device('cpu'), 'float32', False, 0, 0, 1, ''))
    assert model(x, y)[1].item() == pytest.approx(-sum(picked) / len(picked), rel=1e-5)


@pytest.mark.parametrize('record', [
    7, 'x', [], [7], {}, dict(prompt=4), dict(length=7, prompt=4), dict(length='7'),
    dict(length=7.0), dict(length=True), dict(length=0), dict(length=-7), dict(length=1),
    dict(length=10 ** 400), dict(length=5), dict(length=-5), ['x' * 10 ** 6],
])
def test_a_record_that_cannot_be_is_refused_in_a_line(folder, record):
    write_records(folder, record)
    with pytest.raises(UserError, match='record.*prepare the dataset again') as refused:
        TokenDataset('rows')
    assert len(str(refused.value)) < 1000
    assert '\n' not in str(refused.value)


def test_documents_do_not_fit_records(folder):
    write_records(folder, dict(length=7))
    with pytest.raises(UserError, match='windows of rows start at its records; leave --documents'):
        TokenDataset('rows', documents='whole').set_block_size(6)


# The demos

@pytest.fixture
def demos(tmp_path, monkeypatch):
    """A function that runs data/NAME/prepare.py in a copy of the project. It returns the folder."""
    copy_project(tmp_path)
    monkeypatch.setattr(dataloader, 'DATA', tmp_path / 'data')

    def prepare(name, *flags):
        path = tmp_path / 'data' / name / 'prepare.py'
        monkeypatch.setattr(sys, 'path', list(sys.path))
        spec = util.spec_from_file_location(f'prepare_{name}', path)
        script = util.module_from_spec(spec)
        spec.loader.exec_module(script)
        configurator.configure(vars(script), list(flags))
        script.main()
        return path.parent
    return prepare


def read_tokenizer(folder):
    return Tokenizer(read_meta(folder))


def read_lines(folder, split):
    ids = np.fromfile(folder / f'{split}.bin', '<u2')
    return read_tokenizer(folder).decode(ids.tolist()).splitlines()


def read_task(folder, name):
    records = map(json.loads, (folder / f'{name}.jsonl').open())
    return [(record['prompt'], record['answer']) for record in records]


def check_config(name, folder):
    """The config that goes with a demo fits its records, and its dataset is accepted."""
    with script_settings(train, ROOT / 'config' / f'train_{name}.py'):
        data = TokenDataset(train.dataset, train.sampling)
        data.set_block_size(train.block_size)

    # the targets that count are the ends of lines
    _, y = data.batch(0, 'train', 0, 3)
    lines = read_lines(folder, 'train')
    tokenizer = Tokenizer(data.tokenizer)
    for row in y.tolist():
        answer = tokenizer.decode([target for target in row if target >= 0])
        assert answer.endswith('\n')
        assert any((line + '\n').endswith(answer) for line in lines)


def test_the_adder_has_all_sums(demos, capsys):
    folder = demos('adder')
    train_lines = read_lines(folder, 'train')
    val_lines = read_lines(folder, 'val')
    assert len(train_lines) == 9500
    assert len(val_lines) == 500
    assert len(set(train_lines + val_lines)) == 10000

    for line in train_lines + val_lines:
        assert len(line) == 9
        assert line[2] + line[5] == '+='
        assert int(line[:2]) + int(line[3:5]) == int(line[6:][::-1])

    exact = [prompt + answer for prompt, answer in read_task(folder, 'exact')]
    held_out = [prompt + answer for prompt, answer in read_task(folder, 'held_out')]
    assert sorted(exact) == sorted(train_lines + val_lines)
    assert held_out == val_lines
    check_config('adder', folder)

    with pytest.raises(UserError, match='held_out=10000 should be from 1 to 9999'):
        demos('adder', '--held_out=10000')


def test_sort_holds_out_what_is_not_trained_on(demos):
    folder = demos('sort', '--train_records=3000', '--held_out=200')
    train_lines = read_lines(folder, 'train')
    val_lines = read_lines(folder, 'val')
    assert len(set(train_lines + val_lines)) == 3200
    assert len(val_lines) == 200

    for line in train_lines + val_lines:
        assert len(line) == 13
        assert line[6] == '='
        assert sorted(line[:6]) == list(line[7:])

    assert [prompt + answer for prompt, answer in read_task(folder, 'exact')] == val_lines
    check_config('sort', folder)

    words = 'at most the 100 records that digits=2 makes possible'
    with pytest.raises(UserError, match=words):
        demos('sort', '--digits=2')


# enwik8

def test_bytes_are_tokens_in_the_published_order(demos, tmp_path, capsys):
    data = bytes(np.random.default_rng(0).integers(0, 256, 2000, dtype=np.uint8))
    (tmp_path / 'wiki').write_bytes(data)
    folder = demos('enwik8', f'--input={tmp_path / "wiki"}')
    assert np.fromfile(folder / 'train.bin', '<u2').tolist() == list(data[:1800])
    assert np.fromfile(folder / 'val.bin', '<u2').tolist() == list(data[1800:1900])
    assert 'is not the published enwik8; it is split 90:5:5' in capsys.readouterr().out

    # from a zip archive, with the test part as val
    with zipfile.ZipFile(tmp_path / 'wiki.zip', 'w') as archive:
        archive.writestr('wiki', data)
    folder = demos('enwik8', f'--input={tmp_path / "wiki.zip"}', '--name=text8', '--val=test')
    assert folder.name == 'enwik8'
    val = np.fromfile(folder.parent / 'text8' / 'val.bin', '<u2')
    assert val.tolist() == list(data[1900:])

    tokenizer = read_tokenizer(folder)
    assert tokenizer.vocab_size == 256
    assert tokenizer.decode(list('\xe9a'.encode('latin-1'))) == '\xe9a'


@pytest.mark.parametrize('content, words', [
    (b'PK\3\4 and nothing more', 'is not a zip archive of one file .*; unzip it yourself'),
    (b'', 'would be empty'),
])
def test_a_damaged_archive_is_refused_in_a_line(demos, tmp_path, content, words):
    (tmp_path / 'wiki.zip').write_bytes(content)
    with pytest.raises(UserError, match=words):
        demos('enwik8', f'--input={tmp_path / "wiki.zip"}')


@pytest.mark.parametrize('sent', [b'not a zip', b'PK\3\4damaged'])
def test_a_download_that_is_something_else_is_not_kept(demos, tmp_path, monkeypatch, sent):
    (tmp_path / 'sent').write_bytes(sent)
    response = urllib.request.urlopen((tmp_path / 'sent').as_uri())
    monkeypatch.setattr(urllib.request, 'urlopen', lambda request, timeout: response)
    with pytest.raises((RunError, UserError), match='that are not enwik8|is not a zip archive'):
        demos('enwik8')
    left = {path.name for path in (dataloader.DATA / 'enwik8').iterdir()}
    assert left == {'prepare.py', 'readme.md'}
