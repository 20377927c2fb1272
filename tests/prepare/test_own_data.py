"""data/text/prepare.py with data as people have it: rows, separators, and what val holds."""

import csv
import json
import re

import numpy as np
import pytest
from harness import ROOT
from prepare_harness import load, meta, tokens, write_jsonl

import configurator
from engine.errors import UserError
from engine.prepare import text_files
from engine.prepare.held_out import FileContent, HeldOut
from engine.prepare.next_command import LARGE, MEDIUM, SMALL, next_lines
from engine.prepare.row_layout import RowLayout, Segment, text_layout

STORIES = [f'Story number {i}, which is short.\nAnd its end.' for i in range(60)]


def decode(folder, split):
    chars = meta(folder)['chars']
    return ''.join(chars[i] for i in tokens(folder, split))


def prepare(data, monkeypatch, path, **settings):
    """Run the script; the name of the dataset is mine."""
    script = load(data, 'text', monkeypatch, input=str(path), name='mine', **settings)
    script.main()
    return data / 'mine'


# rows

def write_rows(path, ending):
    """A file with the stories and one row without text, in the column content."""
    table = [dict(id=i, content=text) for i, text in enumerate([*STORIES[:7], None, *STORIES[7:]])]
    path = path / f'a{ending}'
    if ending == '.json':
        path.write_text(json.dumps(table))
    elif ending == '.csv':
        with open(path, 'w', newline='') as file:
            writer = csv.DictWriter(file, ['id', 'content'])
            writer.writeheader()
            writer.writerows(table)
    else:
        path.write_text(''.join(json.dumps(row) + '\n' for row in table))
    return path


@pytest.mark.parametrize('ending', ['.jsonl', '.json', '.csv'])
def test_each_row_is_a_document_and_empty_ones_are_left_out(data, tmp_path, monkeypatch, capsys,
                                                            gpt2, ending):
    folder = prepare(data, monkeypatch, write_rows(tmp_path, ending))
    found = {split: gpt2.decode(tokens(folder, split).tolist()).split('<|endoftext|>')[:-1]
             for split in ('train', 'val')}
    assert len(found['val']) == 6 and len(found['train']) == 54
    assert sorted(found['train'] + found['val']) == sorted(STORIES)
    assert [text for text in STORIES if text in found['train']] == found['train']

    lines = capsys.readouterr().out
    assert 'documents: 60, without 1 that are empty;' in lines
    assert 'the text is in the column content' in lines
    assert 'val.bin holds 6 of 60 documents, spread over all of them' in lines


def test_characters_end_each_row_with_a_newline(data, tmp_path, monkeypatch):
    folder = prepare(data, monkeypatch, write_jsonl(tmp_path / 'a.jsonl', ['one', 'two\n', 'six']),
                     tokenizer='char')
    assert sorted(decode(folder, 'train') + decode(folder, 'val')) == sorted('one\ntwo\nsix\n')


def test_openwebtext_reads_the_rows_that_text_reads(data, tmp_path, monkeypatch, gpt2):
    for ending in ('.jsonl', '.json', '.csv'):
        path = write_rows(tmp_path, ending)
        if ending == '.csv':            # an empty field is text, and only null is left out
            path.write_text(path.read_text().replace('7,\n', ''))
        load(data, 'openwebtext', monkeypatch, '--field=content', input=str(path)).main()
        ids = [*tokens(data / 'openwebtext', 'train'), *tokens(data / 'openwebtext', 'val')]
        assert sorted(gpt2.decode(ids).split('<|endoftext|>')[:-1]) == sorted(STORIES)


# masks: what conversations and prompts are made of

def test_segments_that_do_not_count_are_masked_and_the_end_counts_as_the_last(
        data, tmp_path, monkeypatch, gpt2):
    def question_layout(source, field=None):
        def make(values):
            return [Segment(values['text'], counts=False), Segment(' yes', counts=True)]
        return RowLayout(make, 'questions', in_segments=True, has_masks=True)

    script = load(data, 'text', monkeypatch, name='mine',
                  input=str(write_jsonl(tmp_path / 'a.jsonl', STORIES)))
    monkeypatch.setattr(script, 'choose_layout', question_layout)
    script.main()
    for split, count in (('train', 54), ('val', 6)):
        ids = tokens(data / 'mine', split)
        mask = np.fromfile(data / 'mine' / f'{split}.mask', np.uint8)
        assert gpt2.decode(ids[mask == 1].tolist()) == ' yes<|endoftext|>' * count
        assert gpt2.decode(ids[mask == 0].tolist()) in ''.join(STORIES) or count < 60


# separators

@pytest.mark.parametrize('setting, separator', [
    ('<|endoftext|>', '<|endoftext|>'), ('\\n\\n', '\n\n'), ('---', '---')])
def test_a_separator_ends_documents_within_a_text(data, tmp_path, monkeypatch, gpt2, capsys,
                                                  setting, separator):
    monkeypatch.setattr(text_files, 'BLOCK', 50)
    (tmp_path / 'a.txt').write_text(separator.join(STORIES) + separator)
    folder = prepare(data, monkeypatch, tmp_path / 'a.txt', separator=setting)
    ids = [*tokens(folder, 'train'), *tokens(folder, 'val')]
    assert ids.count(50256) == 60
    assert sorted(gpt2.decode(ids).split('<|endoftext|>')[:-1]) == sorted(STORIES)
    assert f'divided at {separator!r} into 60 documents' in capsys.readouterr().out


def test_characters_keep_the_separator(data, tmp_path, monkeypatch):
    names = [f'{chr(97 + i % 26)}{i}\n' for i in range(100)]
    (tmp_path / 'names.txt').write_text(''.join(names))
    folder = prepare(data, monkeypatch, tmp_path / 'names.txt', tokenizer='char', separator='\\n')
    val = decode(folder, 'val').splitlines(keepends=True)
    train = decode(folder, 'train').splitlines(keepends=True)
    assert len(val) == 10 and sorted(train + val) == sorted(names)


# what val holds

def documents(*counts):
    """FileContents of rows, and their documents, each named by its number."""
    layout = text_layout('a', [dict(text='a')])
    files = [FileContent(layout, count * 10, count) for count in counts]
    numbers = iter(range(sum(counts)))
    return files, [[[Segment(str(next(numbers)))] for _ in range(count)] for count in counts]


@pytest.mark.parametrize('counts', [(2,), (60,), (5, 1000, 17), (3, 3, 3, 3)])
@pytest.mark.parametrize('fraction', [0.1, 0.25, 0.5])
def test_held_out_documents_are_an_exact_share_of_every_stretch(counts, fraction):
    files, contents = documents(*counts)
    held_out = HeldOut(fraction, files)
    found = [split for split, _ in held_out.split(contents)]
    total = sum(counts)
    assert found.count('val') == max(1, int(total * fraction + 0.5)) and len(found) == total

    # in any stretch, the share is off by less than two documents
    marks = np.cumsum([split == 'val' for split in found])
    expected = np.arange(1, total + 1) * marks[-1] / total
    assert abs(marks - expected).max() < 1.5
    assert found == [split for split, _ in HeldOut(fraction, files).split(contents)]


def test_long_texts_give_their_ends_and_short_ones_are_documents():
    files = [FileContent(None, 1000, 1), FileContent(None, 3000, 1)]
    files += [FileContent(None, 10, 1)] * 20
    texts = [[[Segment('a' * 600), Segment('a' * 400)]], [[Segment('b' * 3000)]]]
    texts += [[[Segment('c' * 10)]] for _ in range(20)]
    lengths = {}
    for split, segments in HeldOut(0.1, files).split(texts):
        for text, _ in segments:
            lengths[split, text[0]] = lengths.get((split, text[0]), 0) + len(text)
    assert lengths == {('train', 'a'): 900, ('val', 'a'): 100, ('train', 'b'): 2700,
                       ('val', 'b'): 300, ('train', 'c'): 180, ('val', 'c'): 20}


def test_a_single_row_gives_its_end_and_a_masked_one_is_refused(data, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / 'a.jsonl', ['0123456789' * 10])
    folder = prepare(data, monkeypatch, path, tokenizer='char')
    assert (decode(folder, 'train') + decode(folder, 'val')).startswith('0123456789' * 10)

    script = load(data, 'text', monkeypatch, input=str(path), name='mine')
    layout = text_layout('a', [dict(text='a')])
    layout.in_segments = True
    monkeypatch.setattr(script, 'choose_layout', lambda source: layout)
    with pytest.raises(UserError, match='has a single document'):
        script.main()


# the next command

@pytest.mark.parametrize('recipe', [SMALL, MEDIUM, LARGE])
def test_a_recipe_says_what_its_config_file_has(recipe):
    train = ROOT / 'train.py'
    settings = configurator.read_settings(train)
    values = {name: setting.default for name, setting in settings.items()}
    path = ROOT / 'config' / f'{recipe.config}.py'
    values.update(configurator.run_config(path, settings, values))
    assert recipe.block_size == values['block_size']
    assert recipe.max_iters == values['max_iters'] == values['lr_decay_iters']
    assert recipe.warmup_iters == values['warmup_iters']
    assert recipe.tokens_per_iteration == (
        values['batch_size'] * values['block_size'] * values['gradient_accumulation_steps'])


@pytest.mark.parametrize('train, val, has_characters, gpu, config, epochs', [
    (50, 6, True, False, 'train_stdlib_char', 41),
    (20_000, 2_000, False, False, 'train_stdlib_char', 41),
    (1_000_000, 100_000, True, False, 'train_stdlib_char', 4),
    (5_000_000, 500_000, False, True, 'train_shakespeare_char', 17),
    (10 ** 9, 10 ** 8, False, True, 'train_gpt2', 4.1),
    (10 ** 9, 10 ** 8, False, False, 'train_stdlib_char', 1)])
def test_the_next_command_fits_the_text(train, val, has_characters, gpu, config, epochs):
    line, command = next_lines('mine', dict(train=train, val=val), has_characters, gpu)
    assert f'config/{config}.py' in command
    flags = dict(re.findall(r'--(\w+)=(\S+)', command))
    assert int(flags.get('block_size', 1)) < val
    assert float(re.search(r'tokens, (\S+) epochs', line)[1]) <= epochs


def test_the_next_command_for_answers_keeps_the_last_model():
    """Its val loss is best before it knows the answers."""
    tokens = dict(train=50_000, val=5_000)
    _, command = next_lines('mine', tokens, True, False, answers=True)
    assert {'--documents=whole', '--always_save_checkpoint=True'} <= set(command.split())
    assert '--documents' not in next_lines('mine', tokens, True, False)[1]


def test_a_path_is_no_part_of_an_out_dir():
    _, command = next_lines('/a/b', dict(train=50_000, val=5_000), True, False)
    assert '--dataset=/a/b --out_dir=out-b ' in command


# token files of others

def write_token_files(folder, ids, dtype='<u2'):
    folder.mkdir()
    for name in ('train.bin', 'val.bin'):
        np.array(ids).astype(dtype).tofile(folder / name)


@pytest.fixture
def letters(tmp_path):
    """A folder whose meta.json has a tokenizer of the letters a to e."""
    folder = tmp_path / 'letters'
    folder.mkdir()
    content = dict(tokenizer='char', vocab_size=5, chars='abcde')
    (folder / 'meta.json').write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize('dtype, name', [('<u2', 'uint16'), ('<i4', 'int32'), ('<i8', 'int64')])
def test_a_tokenizer_is_named_for_token_files(data, monkeypatch, letters, dtype, name):
    ids = list(range(5)) * 30
    write_token_files(data / 'own', ids, dtype)
    load(data, 'text', monkeypatch, token_files=str(data / 'own'), tokenizer=str(letters)).main()
    found = meta(data / 'own')
    assert (found['chars'], found['dtype'], found['tokens']['val']) == ('abcde', name, 150)


@pytest.mark.parametrize('split, other', [('train', 'val'), ('val', 'train')])
def test_a_type_is_named_for_the_file_without_a_header(data, monkeypatch, letters, split, other):
    """The other file has a header of llm.c, which says uint32."""
    ids = list(range(5)) * 30
    write_token_files(data / 'own', ids)
    header = np.zeros(256, '<i4')
    header[:3] = 20240801, 7, len(ids)
    content = header.tobytes() + np.array(ids, '<u4').tobytes()
    (data / 'own' / f'{other}.bin').write_bytes(content)
    load(data, 'text', monkeypatch, token_files=str(data / 'own'), tokenizer=str(letters)).main()
    found = meta(data / 'own')
    assert (found['dtype'], found['tokens']) == ('uint16', dict(train=150, val=150))


@pytest.mark.parametrize('settings, words', [
    (dict(tokenizer='LETTERS'), 'token 3 has id 5, and char has 5 tokens; name the --tokenizer='),
    (dict(tokenizer='char'), 'has ids already'),
    (dict(input='a.txt'), 'input and token_files are both named'),
    (dict(token_files='/nowhere'), 'has no token files of train and val'),
])
def test_a_tokenizer_that_does_not_fit_is_refused(data, monkeypatch, letters, settings, words):
    write_token_files(data / 'own', [0, 1, 2, 5])
    settings = {'token_files': str(data / 'own'), **settings}
    if settings.get('tokenizer') == 'LETTERS':
        settings['tokenizer'] = str(letters)
    with pytest.raises(UserError, match=words):
        load(data, 'text', monkeypatch, **settings).main()
    assert not (data / 'own' / 'meta.json').exists()


def test_a_tokenizer_that_is_named_already_stays(data, monkeypatch, letters):
    write_token_files(data / 'own', [0, 1, 2])
    (data / 'own' / 'meta.json').write_text('{"vocab_size": 5, "dtype": "uint16"}')
    script = load(data, 'text', monkeypatch, token_files=str(data / 'own'), tokenizer=str(letters))
    script.main()
    assert meta(data / 'own')['chars'] == 'abcde'
    with pytest.raises(UserError, match='names a tokenizer already'):
        script.main()


def test_a_file_of_its_own_becomes_val(data, monkeypatch, tmp_path, capsys):
    write_jsonl(tmp_path / 'one.jsonl', ['abc', 'bcd'])
    write_jsonl(tmp_path / 'two.jsonl', ['dcb'])
    load(data, 'text', monkeypatch, f'--input={tmp_path / "one.jsonl"}', '--tokenizer=char',
         f'--val_input={tmp_path / "two.jsonl"}').main()
    found = {split: decode(data / 'one', split) for split in ('train', 'val')}
    assert found == dict(train='abc\nbcd\n', val='dcb\n')
    assert 'val.bin holds all documents of its own input, 1' in capsys.readouterr().out


def test_a_file_for_val_without_text_is_refused(data, monkeypatch, tmp_path):
    write_jsonl(tmp_path / 'one.jsonl', ['abc', 'bcd'])
    write_jsonl(tmp_path / 'two.jsonl', [''])
    script = load(data, 'text', monkeypatch, f'--input={tmp_path / "one.jsonl"}',
                  f'--val_input={tmp_path / "two.jsonl"}', '--tokenizer=char')
    with pytest.raises(UserError, match='should both have some text'):
        script.main()
