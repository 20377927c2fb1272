"""Rows with prompts and answers as documents, of which only the answers count in the loss.

    template_format(prompt, answer, columns)    is the format that two templates describe
    recognized_format(row)                      is the format that the columns of a row suggest
    RowFormat.segments(row)                     makes a row a document, as a list of segments

A row is a dict of columns. Its values come from files of others. So a template takes each value as
text, and reads no attribute of it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.chat_layout import ChatLayout, Segment, Turn
from engine.errors import UserError, shorten

# The roles of a conversation, by the names that datasets have for them.
ROLES = dict(
    system='system', developer='system',
    user='user', human='user', prompter='user',
    assistant='assistant', gpt='assistant', chatgpt='assistant', bot='assistant',
    model='assistant',
)
TURNS_COLUMNS = ('messages', 'conversations', 'conversation')
# The columns of a question, of what may follow it, and of its answer.
PAIR_COLUMNS = (
    ('instruction', 'input', 'output'),
    ('instruction', 'context', 'response'),
    ('question', None, 'answer'),
)
# Columns whose texts are joined as they are: the markers are in the texts.
JOINED_COLUMNS = (('prompt', 'completion'), ('prompt', 'response'))

ESCAPES = {'\\n': '\n', '\\t': '\t', '\\\\': '\\'}


# Templates

class Part(NamedTuple):
    """A part of a template: a text as it is, or the name of a column."""
    text: str
    is_column: bool


def parse_template(template: str) -> list[Part]:
    r"""The parts of a template such as 'Q: {question}\nA: '.

    {name} is a column, {{ and }} are braces, and \n, \t and \\ are what they are in Python.
    Raises UserError for a brace that is none of these.
    """
    parts = []
    tokens = re.findall(r'\{\{|\}\}|\{[^{}]+\}|\\[nt\\]|[{}]|[^{}\\]+|\\', template)
    for token in tokens:
        if token in ('{', '}'):
            raise UserError(f'{shorten(template)} has a single {token}, and a column is written '
                            f'{{name}}; write {token * 2} for a brace')
        if token in ('{{', '}}'):
            parts.append(Part(token[0], False))
        elif token.startswith('{'):
            parts.append(Part(token[1:-1].strip(), True))
        else:
            parts.append(Part(ESCAPES.get(token, token), False))
    return parts


def check_columns(setting: str, parts: list[Part], columns: Iterable[str]) -> None:
    """UserError where a template names a column that there is not."""
    columns = list(columns)
    for name, is_column in parts:
        if is_column and name not in columns:
            raise UserError(f'--{setting} names the column {shorten(name)}, and the columns are '
                            f'{", ".join(columns)[:300]}')


def fill_template(parts: list[Part], row: dict) -> str | None:
    """The text of a template for a row; None where the row lacks a value that it names."""
    texts = []
    for text, is_column in parts:
        if is_column:
            text = text_of(row.get(text))
        if text is None:
            return None
        texts.append(text)
    return ''.join(texts)


def text_of(value: Any) -> str | None:
    """A value as text: a list or a dict as JSON, and None where there is no value."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, default=str)
    return str(value)


# Formats

class RowFormat:
    """How rows become documents. description says what was taken for what.

    layout: the layout that the documents are written in, or None where they have no turns.
    """

    description: str
    layout: ChatLayout | None = None

    def segments(self, row: dict) -> list[Segment] | None:
        """The segments of a row's document, of which the last one counts. None without an answer.

        Raises UserError for a row of another kind.
        """
        raise NotImplementedError


@dataclass
class TemplateFormat(RowFormat):
    """Rows that two templates make a prompt and an answer of."""
    prompt: list[Part]
    answer: list[Part]
    description: str

    def segments(self, row):
        prompt = fill_template(self.prompt, row)
        answer = fill_template(self.answer, row)
        if prompt is None or answer is None or not answer.strip():
            return None
        return [Segment(prompt, False), Segment(answer, True)]


class ChatFormat(RowFormat):
    """Rows that are conversations."""

    layout = ChatLayout()

    def turns(self, row: dict) -> list[Turn]:
        raise NotImplementedError

    def segments(self, row):
        turns = self.turns(row)
        while turns and turns[-1].role != 'assistant':      # nothing after it is learned
            turns.pop()
        if not any(turn.role == 'assistant' and turn.text.strip() for turn in turns):
            return None
        return self.layout.segments(turns)


@dataclass
class TurnsFormat(ChatFormat):
    """Rows with a column that holds a list of turns."""
    column: str

    @property
    def description(self):
        return (f"rows with `{self.column}`: each is a conversation, and what the assistant says "
                f"is the answer")

    def turns(self, row):
        return read_turns(self.column, row.get(self.column))


@dataclass
class PairFormat(ChatFormat):
    """Rows with a question and an answer, and perhaps a text that the question is about."""
    question: str
    about: str | None
    answer: str

    @property
    def description(self):
        question = f'`{self.question}`'
        if self.about:
            question += f' and `{self.about}`'
        return f'the user says {question}, and `{self.answer}` is the answer'

    def turns(self, row):
        question = text_of(row.get(self.question))
        answer = text_of(row.get(self.answer))
        if question is None or answer is None:
            return []
        about = text_of(row.get(self.about))
        if about:
            question += f'\n\n{about}'
        return [Turn('user', question), Turn('assistant', answer)]


def template_format(prompt: str, answer: str, columns: Iterable[str]) -> TemplateFormat:
    """The format of the settings --prompt and --answer for rows with these columns.

    Raises UserError for a template that cannot be read or names another column.
    """
    parts = dict(prompt=parse_template(prompt), answer=parse_template(answer))
    columns = list(columns)
    for setting in parts:
        check_columns(setting, parts[setting], columns)
    return TemplateFormat(
        parts['prompt'], parts['answer'],
        description=f'the prompt is {shorten(prompt)}, and {shorten(answer)} is the answer')


def recognized_format(row: dict) -> RowFormat | None:
    """The format that the columns of a row suggest, or None.

    A column of a pair has to hold a text: an answer that is a number may be that of a choice.
    """
    for column in TURNS_COLUMNS:
        if is_list_of_dicts(row.get(column)):
            return TurnsFormat(column)

    def has_texts(*columns):
        return all(isinstance(row.get(column), str) for column in columns)

    for question, about, answer in PAIR_COLUMNS:
        if has_texts(question, answer):
            if about not in row:
                about = None
            return PairFormat(question, about, answer)

    for prompt, answer in JOINED_COLUMNS:
        if has_texts(prompt, answer):
            return TemplateFormat(
                [Part(prompt, True)], [Part(answer, True)],
                description=f'`{prompt}` and `{answer}` are joined as they are, and the second is '
                            f'the answer')
    return None


# Lists of turns

def is_list_of_dicts(value):
    """True for a list of turns, which may be spelled as JSON, as in a file of CSV."""
    value = read_json_text(value)
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict)


def read_json_text(value):
    """What a text of JSON says, if `value` is a text that begins as a list; else `value`."""
    if not isinstance(value, str) or not value.lstrip().startswith('['):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def read_turns(column: str, value: Any) -> list[Turn]:
    """The turns of a conversation, in which each is a dict of role and content, or of from and
    value. UserError for one that is none."""
    if value is None:
        return []
    found = read_json_text(value)
    if not isinstance(found, list):
        raise UserError(f'`{column}` is {shorten(value)}, and should be a list of turns')
    return [read_turn(column, number, turn) for number, turn in enumerate(found, 1)]


def read_turn(column, number, turn):
    where = f'turn {number} of `{column}`'
    if not isinstance(turn, dict):
        raise UserError(f'{where} is {shorten(turn)}, and should have `role` and `content`')

    # the role
    name = turn.get('role')
    if name is None:
        name = turn.get('from')
    role = None
    if isinstance(name, str):
        role = ROLES.get(name.lower())
    if role is None:
        raise UserError(f'{where} has the role {shorten(name)}, and the roles are system, user and '
                        f'assistant; correct or remove the row')

    # the text
    content = turn.get('content')
    if content is None:
        content = turn.get('value')
    if isinstance(content, list):                   # of parts, as in OpenAI's files
        content = join_text_parts(content)
    if content is None:
        content = ''
    if not isinstance(content, str):
        raise UserError(f'{where} has no text: {shorten(turn)}; correct or remove the row')
    return Turn(role, content)


def join_text_parts(parts):
    """The text of a list such as [{'type': 'text', 'text': 'Hello'}]; `parts` where it has other
    parts than texts."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get('text'), str):
            return parts
        texts.append(part['text'])
    return ''.join(texts)
