"""data/chat: the questions that are made by rules, and the dataset of conversations."""

import calendar
import json
import re
from random import Random

import numpy as np
import pytest
from prepare_harness import contents, load, meta, tokens

from data.chat import rules
from engine.errors import UserError
from engine.tokenizer import Tokenizer, read_meta

SMALL = ('--conversations=300', '--held_out=60')


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]


@pytest.fixture(scope='module')
def questions():
    random = Random(1)
    return [rules.ask(random) for _ in range(4000)]


@pytest.fixture
def made(data, monkeypatch):
    """The folder of a small set, without its token files."""
    load(data, 'chat', monkeypatch, *SMALL).make_set(data / 'chat')
    return data / 'chat'


# Questions

def answer_to(question):
    """The answer to a question, computed from its text in another way; None for small talk."""
    text = question.text.lower().rstrip('?. ')
    words = re.findall(r'[a-z0-9]+', text)
    if question.kind == 'sum':
        a, b = (int(word) for word in words if word.isdigit())
        return f'{a} plus {b} is {a + b}.'

    if question.kind.startswith('sort'):
        single = [word for word in words if len(word) == 1]
        return f'In order: {", ".join(sorted(single))}.'

    if question.kind.startswith('spell'):
        common = {'spell', 'the', 'word', 'backwards', 'how', 'do', 'you', 'is', 'spelled', 'can',
                  'please', 'what', 'from', 'its', 'end'}
        (word,) = set(words) - common
        if 'backwards' in words or 'end' in words:
            return f'{word} backwards: {"-".join(word[::-1])}.'
        return f'{word}: {"-".join(word)}.'

    if question.kind == 'calendar':
        return answer_of_calendar(words)
    if question.kind == 'name':
        return f'Nice to meet you, {words[-1].capitalize()}.'
    return None


def answer_of_calendar(words):
    days = list(calendar.day_name)
    months = list(calendar.month_name)[1:]
    name = next((name for name in [*days, *months] if name.lower() in words), None)
    if 'after' in words or 'before' in words:
        names = days if name in days else months
        side = 'after' if 'after' in words else 'before'
        step = 1 if side == 'after' else -1
        return f'{names[(names.index(name) + step) % len(names)]} comes {side} {name}.'
    if name:
        if name == 'February':
            return 'February has 28 days, and 29 in a leap year.'
        return f'{name} has {calendar.monthrange(2023, months.index(name) + 1)[1]} days.'
    places = ('first second third fourth fifth sixth seventh eighth ninth tenth eleventh '
              'twelfth').split()
    place = next(word for word in words if word in places)
    return f'{months[places.index(place)]} is the {place} month.'


def test_answers_are_right(questions):
    kinds = set()
    for question in questions:
        expected = answer_to(question)
        if expected is not None:
            assert question.answer == expected, question.text
            kinds.add(question.kind)
    assert kinds == {'sum', 'sort letters', 'sort numbers', 'spell', 'spell backwards', 'calendar',
                     'name'}


def test_a_question_has_one_answer_and_one_key(questions):
    """So that a text that is held out cannot come with another key."""
    known = {}
    for question in questions:
        text = rules.plain(question.text)
        found = (question.key, question.answer)
        assert known.setdefault(text, found) == found


def test_a_hash_chooses_the_share_that_is_held_out():
    keys = [f'sum {a} {b}' for a in range(100) for b in range(100)]
    chosen = [{key for key in keys if rules.is_held_out(key, 0.1, seed)} for seed in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize('told, answer', [
    ([], rules.NO_NAME),
    (['Ada'], 'Your name is Ada.'),
    (['Ada', 'Bob'], 'Your name is Bob.'),
])
def test_the_answer_about_the_own_name_is_what_was_told(told, answer):
    before = [rules.Question('name', f'name {name}', '', '') for name in told]
    assert rules.ask_for_name(Random(0), before).answer == answer


# The set

def test_the_set_depends_on_the_seed_alone(data, monkeypatch, tmp_path):
    made = []
    for number, seed in enumerate((0, 0, 1)):
        folder = tmp_path / str(number)
        load(data, 'chat', monkeypatch, *SMALL, f'--seed={seed}').make_set(folder)
        made.append(contents(folder))
    assert made[0] == made[1]
    assert all(made[0][name] != made[2][name] for name in made[0])


def test_no_question_that_is_held_out_is_trained_on(made):
    """However it is written."""
    held_out = {rules.plain(row['prompt']) for row in read_rows(made / 'held_out.jsonl')}
    trained = said_by_user(made / 'train.jsonl')
    assert len(held_out) > 40 and len(trained) > 400
    assert not held_out & trained
    assert said_by_user(made / 'val.jsonl') <= held_out


def said_by_user(path):
    return {rules.plain(turn['content']) for row in read_rows(path) for turn in row['messages']
            if turn['role'] == 'user'}


def test_a_sum_is_held_out_in_both_orders_and_all_wordings(made):
    def pairs(texts):
        found = [tuple(sorted(map(int, re.findall(r'\d+', text)))) for text in texts]
        return {pair for pair in found if len(pair) == 2}
    held_out = pairs(row['prompt'] for row in read_rows(made / 'held_out.jsonl'))
    assert len(held_out) > 8
    assert not held_out & pairs(said_by_user(made / 'train.jsonl'))


# The dataset

def test_the_dataset_has_the_conversations_and_counts_the_answers(data, monkeypatch, capsys):
    load(data, 'chat', monkeypatch, *SMALL).main()
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == 'next: python train.py config/train_chat.py'
    folder = data / 'chat'
    spec = read_meta(folder)
    tokenizer = Tokenizer(spec)
    assert spec.vocab_size == 257 + 4           # bytes, the end of a text, markers

    for split in ('train', 'val'):
        expected = ''
        answers = ''
        for row in read_rows(folder / f'{split}.jsonl'):
            for turn in row['messages']:
                expected += f'<|{turn["role"]}|>{turn["content"]}<|end|>'
                if turn['role'] == 'assistant':
                    answers += f'{turn["content"]}<|end|>'
            expected += '<|endoftext|>'
            answers += '<|endoftext|>'
        ids = tokens(folder, split)
        counts = np.fromfile(folder / f'{split}.mask', np.uint8).astype(bool)
        assert tokenizer.decode(ids.tolist()) == expected
        assert tokenizer.decode(ids[counts].tolist()) == answers
    assert meta(folder)['chat']['user'] == '<|user|>'


def test_own_conversations_are_taken_and_other_files_refused(data, monkeypatch, tmp_path, capsys):
    path = tmp_path / 'qa.jsonl'
    rows = [dict(question=f'What is {i}?', answer='A number.') for i in range(20)]
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows), encoding='utf-8')
    script = load(data, 'chat', monkeypatch, f'--input={path}', '--name=mine')
    (data / 'mine').mkdir()
    (data / 'mine' / 'held_out.jsonl').write_text('of an earlier set')
    script.main()
    assert not (data / 'mine' / 'held_out.jsonl').exists()
    assert capsys.readouterr().out.endswith(
        'next: python train.py config/train_chat.py --dataset=mine --out_dir=out-mine\n')
    ids = tokens(data / 'mine', 'train').tolist()
    text = Tokenizer(read_meta(data / 'mine')).decode(ids)
    assert text.startswith('<|user|>What is 0?<|end|><|assistant|>A number.<|end|>')
    assert text.count('<|endoftext|>') == 18

    path.write_text('{"text": "once upon a time"}\n' * 20, encoding='utf-8')
    before = contents(data / 'mine')
    with pytest.raises(UserError, match='has no conversations'):
        script.main()
    assert contents(data / 'mine') == before
