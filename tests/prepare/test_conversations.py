"""Rows with prompts and answers: what becomes a document, and what of it counts."""

import json

import numpy as np
import pytest
from prepare_harness import load, meta

from engine.chat_layout import ChatLayout
from engine.errors import UserError
from engine.prepare.conversations import RowSettings, choose_row_layout, parse_template
from engine.tokenizer import Tokenizer, read_meta


def layout_of(rows, **settings):
    settings = RowSettings(**settings)
    settings.check()
    return choose_row_layout('mine.jsonl', rows, settings)


def document(row, **settings):
    """(the text of a row's document, the part of it that counts)."""
    segments = layout_of([row], **settings).make(row)
    assert all(segment.text for segment in segments)
    return (''.join(segment.text for segment in segments),
            ''.join(segment.text for segment in segments if segment.counts))


# Templates

@pytest.mark.parametrize('prompt, answer, text, counted', [
    (r'Q: {question}\nA: ', '{answer}', 'Q: Why?\nA: So.', 'So.'),
    (r'{{{question}}}\t\\n', ' {answer}', '{Why?}\t\\n So.', ' So.'),
    ('{n}: ', '{answer} {tags}', '3: So. ["é"]', 'So. ["é"]'),
    (None, r'{question}\n{answer}', 'Why?\nSo.', 'Why?\nSo.'),
    ('{a column}', '{answer}', 'yesSo.', 'So.'),
])
def test_templates_are_filled_with_columns(prompt, answer, text, counted):
    row = {'question': 'Why?', 'answer': 'So.', 'n': 3, 'tags': ['é'], 'a column': 'yes'}
    assert document(row, prompt=prompt, answer=answer) == (text, counted)
    assert document(row, prompt=prompt, answer=answer, count_all=True) == (text, text)


@pytest.mark.parametrize('template', [
    '{question.__class__}', '{question[0]}', '{question!r}', '{question:9999999}', '{}', '{0}',
    '{ }', '{question', 'question}', '{a {question}}'])
def test_a_template_takes_nothing_but_columns(template):
    with pytest.raises(UserError, match='single [{}]|names a column|column is written'):
        layout_of([dict(question='Why?', answer='So.')], prompt=template, answer='{answer}')


def test_what_a_value_spells_is_no_template():
    row = dict(question='{answer} {{ {0.__class__}', answer='{question}')
    assert document(row, prompt='{question} ', answer='{answer}') == (
        '{answer} {{ {0.__class__} {question}', '{question}')


def test_an_unknown_column_is_refused_with_those_there_are():
    with pytest.raises(UserError, match="'reply', and the columns of mine.jsonl are question, an"):
        layout_of([dict(question='Why?'), dict(answer='So.')], prompt='{question}',
                  answer='{reply}')


@pytest.mark.parametrize('row', [
    dict(question='Why?', answer=''), dict(question='Why?', answer=' \n'),
    dict(question='Why?', answer=None), dict(question='Why?'), dict(answer='So.')])
def test_a_row_without_an_answer_is_left_out(row):
    rows = [dict(question='Why?', answer='So.'), row]
    assert layout_of(rows, prompt='{question}', answer='{answer}').make(row) == []
    assert layout_of(rows).make(row) == []


@pytest.mark.parametrize('settings, words', [
    (dict(prompt='{a}'), 'add --answer='),
    (dict(answer='{a}', field='a'), 'leave out one'),
    (dict(answer='{a'), 'single {'),
])
def test_settings_that_do_not_fit_each_other(settings, words):
    with pytest.raises(UserError, match=words):
        RowSettings(**settings).check()


@pytest.mark.parametrize('text', ['', 'plain', '\\', '\\x', 'ü {{}} \\\\ \\n'])
def test_what_is_no_column_is_text(text):
    parts = parse_template(text)
    assert not any(part.is_column for part in parts)
    expected = text.replace('{{}}', '{}').replace('\\n', '\n').replace('\\\\', '\\')
    assert ''.join(part.text for part in parts) == expected


# Rows that are recognized

MESSAGES = [dict(role='system', content='Be brief.'), dict(role='user', content='Hi'),
            dict(role='assistant', content='Hello'), dict(role='user', content='Bye?'),
            dict(role='assistant', content='Bye'), dict(role='user', content='unanswered')]
SHARED = [{'from': 'human', 'value': 'Hi'}, {'from': 'gpt', 'value': 'Hello'}]
PARTS = [dict(role='user', content=[dict(type='text', text='H'), dict(type='text', text='i')]),
         dict(role='assistant', content='Hello')]
HELLO = '<|user|>Hi<|end|><|assistant|>Hello<|end|>'


@pytest.mark.parametrize('row, text, counted', [
    (dict(id=1, messages=MESSAGES),
     '<|system|>Be brief.<|end|>' + HELLO + '<|user|>Bye?<|end|><|assistant|>Bye<|end|>',
     'Hello<|end|>Bye<|end|>'),
    (dict(conversations=SHARED), HELLO, 'Hello<|end|>'),
    (dict(messages=json.dumps(PARTS)), HELLO, 'Hello<|end|>'),
    (dict(question='Hi', answer='Hello'), HELLO, 'Hello<|end|>'),
    (dict(instruction='Hi', input='', output='Hello'), HELLO, 'Hello<|end|>'),
    (dict(instruction='Hi', input=None, output='Hello'), HELLO, 'Hello<|end|>'),
    (dict(instruction='Add', input='1 2', output='3', id=7),
     '<|user|>Add\n\n1 2<|end|><|assistant|>3<|end|>', '3<|end|>'),
    (dict(instruction='Hi', context='there', response='Hello', category='x'),
     '<|user|>Hi\n\nthere<|end|><|assistant|>Hello<|end|>', 'Hello<|end|>'),
    (dict(prompt='2+2=', completion='4'), '2+2=4', '4'),
    (dict(text='all of it', question='Hi', answer='Hello'), 'all of it', 'all of it'),
])
def test_common_rows_are_recognized(row, text, counted):
    layout = layout_of([row])
    assert document(row) == (text, counted)
    assert layout.has_masks == (counted != text)
    assert (layout.chat is not None) == ('<|' in text)
    assert all(f'`{name}`' in layout.description for name in layout.columns) or 'text' in row

    # counting everything
    all_counts = layout_of([row], count_all=True)
    assert not all_counts.has_masks
    assert all(segment.counts for segment in all_counts.make(row))


@pytest.mark.parametrize('row', [
    dict(question='Which?', choices=['a', 'b'], answer=1),      # the number of a choice
    dict(messages=12, body='A text.'),
])
def test_numbers_are_no_answers_and_no_conversations(row):
    assert layout_of([row]).columns == [next(name for name in row if name in ('question', 'body'))]


@pytest.mark.parametrize('messages, words', [
    ([dict(role='tool', content='x')], "has the role 'tool' in turn 1 of `messages`"),
    ([dict(content='x')], 'has the role None in turn 1'),
    ([dict(role='user', content=[dict(type='image_url')])], 'has no text in turn 1'),
    (['hello'], 'has no `role` and `content` in turn 1'),
    ({'role': 'user'}, 'has no list of turns'),
    ('[', 'has no list of turns'),
    ([dict(role={}, content='x')], 'has the role {}'),
])
def test_a_damaged_conversation_is_named(messages, words):
    layout = layout_of([dict(messages=MESSAGES)])
    with pytest.raises(ValueError, match=words) as caught:
        layout.make(dict(messages=messages))
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('messages', [None, [], [dict(role='user', content='Hi')],
                                      [dict(role='assistant', content=None)]])
def test_a_conversation_without_an_answer_is_left_out(messages):
    assert layout_of([dict(messages=MESSAGES)]).make(dict(messages=messages)) == []


# Datasets

PAIRS = [dict(question=f'Is {i} odd?', answer='yes' * (i % 4) + ' or no', about=i)
         for i in range(40)]


def prepared(data, monkeypatch, rows, **settings):
    """(the tokenizer, the tokens and the mask of train.bin and val.bin together) of some rows."""
    path = data.parent / 'qa.jsonl'
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    script = load(data, 'text', monkeypatch, f'--input={path}', **settings)
    script.main()
    tokenizer = Tokenizer(read_meta(data / 'qa'))
    tokens = [np.fromfile(data / 'qa' / f'{split}.bin', '<u2') for split in ('train', 'val')]
    masks = [np.fromfile(path, 'u1') for path in sorted((data / 'qa').glob('*.mask'))]
    return tokenizer, np.concatenate(tokens).tolist(), np.concatenate(masks or [[]]).tolist()


def documents_of(tokens, mask, end):
    """The tokens and the mask of each document, as two tuples. The end belongs to it."""
    documents = set()
    begin = 0
    for i, token in enumerate(tokens, 1):
        if token == end:
            documents.add((tuple(tokens[begin:i]), tuple(mask[begin:i])))
            begin = i
    assert begin == len(tokens)
    return documents


@pytest.mark.parametrize('settings', [
    dict(tokenizer='char'),
    dict(tokenizer='bpe', vocab_size=280),
    dict(tokenizer='bpe', vocab_size=280, num_proc=2),
])
def test_a_dataset_counts_the_answers_and_their_ends(data, monkeypatch, settings):
    templates = dict(prompt=r'Q: {question}\nA: ', answer='{answer}')
    rows = [*PAIRS, dict(question='Unanswered?', answer=None)]
    tokenizer, tokens, mask = prepared(data, monkeypatch, rows, **templates, **settings)

    expected = set()
    for row in PAIRS:
        prompt = tokenizer.encode(f'Q: {row["question"]}\nA: ')
        answer = [*tokenizer.encode(row['answer']), tokenizer.end_of_text]
        expected.add(((*prompt, *answer), (*[0] * len(prompt), *[1] * len(answer))))
    assert documents_of(tokens, mask, tokenizer.end_of_text) == expected
    assert 'chat' not in meta(data / 'qa')


@pytest.mark.parametrize('count_all', [False, True])
def test_conversations_have_their_layout_in_meta_json(data, monkeypatch, count_all):
    """Their tokens are the same whether prompts count or not."""
    turns = [dict(role='user', content='Hi. '), dict(role='assistant', content='Yes?'),
             dict(role='user', content=' Bye'), dict(role='assistant', content='Bye!')]
    rows = [dict(messages=turns[:2] * i + turns) for i in range(12)]
    tokenizer, tokens, mask = prepared(data, monkeypatch, rows, tokenizer='bpe', vocab_size=300,
                                       count_all=count_all)
    layout = ChatLayout.from_dict(meta(data / 'qa')['chat'])
    expected = set()
    for row in rows:
        document = []
        counted = []
        for turn in row['messages']:
            is_answer = turn['role'] == 'assistant'
            for text, counts in [(getattr(layout, turn['role']), False),
                                 (turn['content'], is_answer), (layout.end, is_answer)]:
                ids = tokenizer.encode(text)
                document += ids
                counted += [counts] * len(ids)
        expected.add(((*document, tokenizer.end_of_text), (*counted, True)))

    if count_all:
        assert mask == []
        mask = [1] * len(tokens)
        expected = {(ids, (1,) * len(ids)) for ids, _ in expected}
    assert documents_of(tokens, mask, tokenizer.end_of_text) == expected


def test_a_document_begins_as_the_tokenizer_begins_a_text(data, monkeypatch, tmp_path):
    """A tokenizer that puts <s> before a text puts it before a document, not before a segment."""
    tokenizers = pytest.importorskip('tokenizers')
    alphabet = {letter: i for i, letter in enumerate(['<s>', '</s>', *'abcdefgh'])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, [], fuse_unk=False))
    tokenizer.add_special_tokens(['<s>', '</s>'])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 1)])
    (tmp_path / 'letters').mkdir()
    tokenizer.save(str(tmp_path / 'letters' / 'tokenizer.json'))
    config = dict(tokenizer_class='PreTrainedTokenizerFast', bos_token='<s>', eos_token='</s>')
    (tmp_path / 'letters' / 'tokenizer_config.json').write_text(json.dumps(config))

    rows = [dict(prompt='abc', completion='de')] * 10
    _, tokens, mask = prepared(data, monkeypatch, rows, tokenizer=str(tmp_path / 'letters'))
    assert tokens == [0, 2, 3, 4, 5, 6, 1] * 10
    assert mask == [0, 0, 0, 0, 1, 1, 1] * 10


def test_characters_that_prompts_need_are_in_the_vocabulary(data, monkeypatch):
    rows = [dict(question='a', answer='b')] * 10
    tokenizer, _, _ = prepared(data, monkeypatch, rows, tokenizer='char')
    assert set(tokenizer.chars) == {*'ab\n\x03', *'<|system|><|user|><|assistant|><|end|>'}


def test_the_answer_of_a_text_is_refused(data, monkeypatch, tmp_path):
    (tmp_path / 'plain.txt').write_text('A text. ' * 100)
    script = load(data, 'text', monkeypatch, f'--input={tmp_path / "plain.txt"}',
                  answer='{answer}')
    with pytest.raises(UserError, match='makes documents of rows, and .*plain.txt is a text'):
        script.main()
    assert not (data / 'plain').exists()


def test_a_damaged_row_is_named_by_its_line(data, monkeypatch):
    rows = [dict(messages=MESSAGES), dict(messages=[dict(role='tool', content='x')])]
    with pytest.raises(UserError, match=r"qa.jsonl, line 2 has the role 'tool' in turn 1"):
        prepared(data, monkeypatch, rows, tokenizer='char')
