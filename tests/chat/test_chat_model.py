"""Answers, and the caches that are kept between them."""

import json

import pytest
import torch
from chat_harness import SETTINGS, SPEC, make_chat_model, make_model

from engine.chat.answer_queue import AnswerQueue
from engine.chat.conversation import Conversation
from engine.chat_layout import ChatLayout, Turn, encode_prompt
from engine.errors import RunError, UserError
from engine.generation.kv_cache import TextCache
from engine.prepare.conversations import read_turns
from engine.tokenizer import Tokenizer
from model import GPT

TOKENIZER = Tokenizer(SPEC)


def count_read(monkeypatch):
    """A list that gets the number of tokens of each pass of a model."""
    counts = []
    hidden = GPT.hidden

    def counting(self, idx, *arguments):
        counts.append(idx.size(1))
        return hidden(self, idx, *arguments)

    monkeypatch.setattr(GPT, 'hidden', counting)
    return counts


def answer_from_nothing(chat_model, turns, settings=SETTINGS):
    """The answer with an empty cache."""
    prompt = chat_model.prompt(turns, settings.max_new_tokens)
    return ''.join(chat_model.answer(prompt, settings, TextCache(chat_model.model)))


@pytest.mark.parametrize('options', [
    dict(), dict(position='rotary', n_kv_head=1), dict(position='alibi')])
@pytest.mark.parametrize('layout', [ChatLayout(), None])
def test_kept_caches_give_the_answers_of_empty_ones(options, layout):
    model = make_model(**options)
    conversation = Conversation(make_chat_model(model, layout), SETTINGS)
    reference = make_chat_model(model, layout)
    turns = []
    for text in ('Hello', 'And now?', 'Bye'):
        turns.append(Turn('user', text))
        turns.append(Turn('assistant', answer_from_nothing(reference, turns)))
        assert ''.join(conversation.ask(text)) == turns[-1].text
    assert conversation.turns == turns
    again = answer_from_nothing(reference, turns[:-1])
    assert ''.join(conversation.retry()) == again != turns[-1].text


def test_a_turn_reads_only_what_is_new(monkeypatch):
    counts = count_read(monkeypatch)
    chat_model = make_chat_model()
    conversation = Conversation(chat_model, SETTINGS)
    first = ''.join(conversation.ask('Hello'))
    n_prompt = len('_<|user|>Hello<|end|><|assistant|>')        # _ is the end-of-text token
    assert counts == [n_prompt] + [1] * 19

    # The last character of the answer was sampled, and not yet read.
    counts.clear()
    list(conversation.ask('Bye'))
    n_new = len(first[-1] + '<|end|><|user|>Bye<|end|><|assistant|>')
    assert len(first) == 20 and counts == [n_new] + [1] * 19

    # Another answer to the same prompt needs only the prediction after it.
    counts.clear()
    list(conversation.retry())
    assert counts == [1] * 20


@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize('pass_number', [1, 2, 9])
def test_an_interrupt_within_a_pass_leaves_a_cache_that_is_right(layer, pass_number):
    model = make_model()
    conversation = Conversation(make_chat_model(model), SETTINGS)
    reference = make_chat_model(model)
    passes = []

    def interrupt(*arguments):
        passes.append(None)
        if len(passes) == pass_number:
            raise KeyboardInterrupt

    hook = model.transformer.h[layer].mlp.register_forward_pre_hook(interrupt)
    parts = []
    with pytest.raises(KeyboardInterrupt):
        parts.extend(conversation.ask('Hello'))
    hook.remove()
    next(reference.numbers)
    turns = list(conversation.turns)
    assert turns[0] == Turn('user', 'Hello') and len(turns[1].text) == pass_number - 1

    turns.append(Turn('user', 'Go on'))
    assert ''.join(conversation.ask('Go on')) == answer_from_nothing(reference, turns)


def test_an_answer_beyond_the_context_goes_on_as_without_a_kept_cache():
    model = make_model(block_size=48)
    settings = SETTINGS.changed(dict(max_new_tokens=70))
    conversation = Conversation(make_chat_model(model), settings)
    reference = make_chat_model(model)
    for text in ('Hi', 'Ho'):
        expected = answer_from_nothing(reference, [Turn('user', text)], settings)
        conversation.turns = []
        assert ''.join(conversation.ask(text)) == expected and len(expected) == 70


def test_the_oldest_turns_are_dropped_whole():
    """Compared with the slow way: the first beginning from which everything fits."""
    conversation = Conversation(make_chat_model(), SETTINGS)
    n_dropped = []
    for i in range(9):
        list(conversation.ask('Hello ' * (i % 3 + 1)))
        turns = conversation.turns[:-1]
        prompt = conversation.chat_model.prompt(turns, SETTINGS.max_new_tokens)
        fitting = (n for n in range(0, len(turns), 2)
                   if len(encode_prompt(TOKENIZER, ChatLayout().prompt(turns[n:]))) <= 256 - 20)
        first = next(fitting)
        assert prompt.n_dropped == first
        assert prompt.ids == encode_prompt(TOKENIZER, ChatLayout().prompt(turns[first:]))
        n_dropped.append(first)
    assert n_dropped[0] == 0 < n_dropped[-1] < 18
    assert len(conversation.turns) == 18


def test_the_note_on_dropped_turns_comes_once(monkeypatch):
    lines = []
    monkeypatch.setattr('engine.chat.conversation.log.info', lines.append)
    conversation = Conversation(make_chat_model(), SETTINGS)
    for _ in range(6):
        list(conversation.ask('Hello'))
    assert len(lines) == 1 and 'reads 256 tokens at most' in lines[0]
    conversation.begin_anew()
    for _ in range(5):
        list(conversation.ask('Hello'))
    assert len(lines) == 2


def test_a_message_that_cannot_be_read_changes_nothing():
    conversation = Conversation(make_chat_model(), SETTINGS)
    list(conversation.ask('Hello'))
    before = list(conversation.turns)
    for text, words in (('x' * 300, '315 tokens'), ('☺', "the character '☺' is not in")):
        with pytest.raises(UserError, match=words):
            list(conversation.ask(text))
        assert conversation.turns == before


class Script:
    """Stands for a model that writes a given text."""

    def __init__(self, text):
        self.ids = TOKENIZER.encode(text)
        self.config = make_model().config
        self.transformer = make_model().transformer

    def stream(self, idx, max_new_tokens, **options):
        for i in self.ids[:max_new_tokens]:
            yield torch.tensor([i])


@pytest.mark.parametrize('written, shown', [
    ('Hi there.<|end|><|user|>x', 'Hi there.'), ('Hi <|en<|endoftext|>x', 'Hi <|en'),
    ('a<|e' * 9, ('a<|e' * 9)[:20]), ('<|end|>', '')])
def test_an_answer_ends_at_its_marker_or_at_the_end_of_the_text(written, shown):
    chat_model = make_chat_model(Script(written))
    prompt = chat_model.prompt([Turn('user', 'Hi')], 20)
    assert ''.join(chat_model.answer(prompt, SETTINGS, None)) == shown


def test_without_a_layout_the_text_goes_on():
    chat_model = make_chat_model(layout=None)
    turns = [Turn('user', 'Once'), Turn('assistant', ' upon a time.'), Turn('user', 'Then')]
    assert chat_model.prompt(turns, 20).ids == TOKENIZER.encode('Once upon a time.\nThen')


def test_a_saved_conversation_is_read_by_the_preparation(tmp_path):
    conversation = Conversation(make_chat_model(), SETTINGS)
    path = tmp_path / 'talk.jsonl'
    with pytest.raises(UserError, match='nothing to save'):
        conversation.save(str(path))
    list(conversation.ask('Is "é" < z?\\'))
    conversation.save(str(path))
    list(conversation.ask('Yes'))
    conversation.save(str(path))                        # its own file, again
    (row,) = [json.loads(line) for line in path.read_text(encoding='utf-8').splitlines()]
    assert read_turns('messages', row['messages']) == conversation.turns

    path.write_text('mine')
    conversation.begin_anew()
    list(conversation.ask('Hi'))
    for name, words in ((path, 'there already'), (tmp_path / 'a.txt', 'end in .jsonl'),
                        (tmp_path / 'no' / 'a.jsonl', 'was not written'),
                        ('~no-such-user/a.jsonl', 'was not written'),
                        (tmp_path / 'a\0.jsonl', 'was not written')):
        with pytest.raises(UserError, match=words):
            conversation.save(str(name))
    assert path.read_text() == 'mine'


@pytest.mark.parametrize('values', [
    dict(temperature='hot'), dict(temperature=True), dict(temperature=float('nan')),
    dict(temperature=-1), dict(top_k=1.5), dict(top_k=10 ** 400), dict(temperature=10 ** 400),
    dict(top_p=0), dict(max_new_tokens=0), dict(max_new_tokens=1 << 20), dict(seed=1),
    dict(min_p=None), dict(repetition_penalty=[1])])
def test_a_setting_of_an_answer_is_checked(values):
    with pytest.raises(UserError):
        SETTINGS.changed(values)


# Several answers at once

def whole_text(answer):
    parts = []
    while (text := answer.new_text(5)) is not None:
        parts.append(text)
    return ''.join(parts)


def test_answers_in_turns_are_those_of_one_after_the_other():
    settings = SETTINGS.changed(dict(temperature=0))
    chat_model = make_chat_model()
    answers = AnswerQueue(chat_model, 3)
    conversations = [[Turn('user', name)] for name in ('Ann', 'Bob', 'Eve')]
    for _ in range(2):
        prompts = [chat_model.prompt(turns, 20) for turns in conversations]
        expected = [answer_from_nothing(chat_model, turns, settings) for turns in conversations]
        under_way = [answers.submit(prompt, settings) for prompt in prompts]
        assert answers.submit(prompts[0], settings) is None         # no place is free
        found = [whole_text(answer) for answer in under_way]
        assert found == expected and len(set(found)) == 3
        for turns, text in zip(conversations, found):
            turns += [Turn('assistant', text), Turn('user', 'More')]
    answers.close()


def test_a_conversation_that_goes_on_finds_its_cache(monkeypatch):
    chat_model = make_chat_model()
    answers = AnswerQueue(chat_model, 2)
    conversations = [[Turn('user', 'a' * 50)], [Turn('user', 'b' * 50)]]
    counts = count_read(monkeypatch)
    n_first = []                                        # tokens that were read before the answer
    for _ in range(2):
        for turns in conversations:
            counts.clear()
            answer = answers.submit(chat_model.prompt(turns, 20), SETTINGS)
            turns += [Turn('assistant', whole_text(answer)), Turn('user', 'c')]
            n_first.append(counts[0])
    n_prompt = len('_<|user|><|end|><|assistant|>') + 50
    n_new = len('x<|end|><|user|>c<|end|><|assistant|>')
    assert n_first == [n_prompt, n_prompt, n_new, n_new]
    assert answers.n_caches == 2
    answers.close()


def test_a_failure_ends_one_answer_and_not_the_queue(monkeypatch):
    chat_model = make_chat_model()
    answers = AnswerQueue(chat_model, 1)
    prompt = chat_model.prompt([Turn('user', 'Hi')], 20)
    with monkeypatch.context() as patch:
        patch.setattr(chat_model, 'answer', lambda *arguments: iter([1 / 0 for _ in 'a']))
        with pytest.raises(RunError, match='the answer failed: ZeroDivisionError'):
            answers.submit(prompt, SETTINGS).new_text(5)
    assert len(whole_text(answers.submit(prompt, SETTINGS))) == 20
    answers.close()


def test_closing_ends_the_answers_under_way():
    chat_model = make_chat_model()
    answers = AnswerQueue(chat_model, 2)
    prompt = chat_model.prompt([Turn('user', 'Hi')], 20)
    endless = SETTINGS.changed(dict(max_new_tokens=60000))
    under_way = [answers.submit(prompt, endless) for _ in range(2)]
    assert all(answer.new_text(5) for answer in under_way)
    answers.close()
    for answer in under_way:
        with pytest.raises(RunError, match='the server has ended'):
            whole_text(answer)
    assert not answers.thread.is_alive() and answers.submit(prompt, SETTINGS) is None
