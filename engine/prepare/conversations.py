"""Rows with prompts and answers as documents, of which only the answers count in the loss.

choose_row_layout says how rows become documents: by two templates, or by what the columns suggest.
The values of a row come from files of others. So a template takes each value as text, and reads no
attribute of it.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.chat_layout import ChatLayout, Segment, Turn
from engine.errors import UserError, shorten
from engine.prepare.row_layout import RowLayout, first_values, text_layout

# The roles of a conversation, by the names that datasets have for them.
ROLES = dict(
    system='system', developer='system',
    user='user', human='user', prompter='user',
    assistant='assistant', gpt='assistant', chatgpt='assistant', bot='assistant',
    model='assistant',
)
TURNS_COLUMNS = ('messages', 'conversations', 'conversation')
# The columns of a question, of what it is about, and of its answer.
PAIR_COLUMNS = (
    ('instruction', 'input', 'output'),
    ('instruction', 'context', 'response'),
    ('question', None, 'answer'),
)
# Columns whose texts are joined as they are, since the prompts already have their markers.
JOINED_COLUMNS = (('prompt', 'completion'), ('prompt', 'response'))

CHAT = ChatLayout()
ESCAPES = {'\\n': '\n', '\\t': '\t', '\\\\': '\\'}


@dataclass
class RowSettings:
    """What a person says of the rows. None stands for what is not said."""
    field: str | None = None        # the column that has the text
    prompt: str | None = None       # a template of what comes before the answer
    answer: str | None = None       # a template of the answer
    count_all: bool = False         # prompts count in the loss too

    def check(self) -> None:
        """UserError where the settings exclude each other, or one needs another."""
        if self.prompt is not None and self.answer is None:
            raise UserError("--prompt needs an answer after it; add --answer='{COLUMN}'")
        if self.field is not None and self.answer is not None:
            raise UserError(f'--field={self.field} and --answer both say what is read; leave out '
                            f'one of them')
        for template in (self.prompt, self.answer):
            parse_template(template or '')


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


def check_columns(name: str, setting: str, parts: list[Part], known: Iterable[str]) -> None:
    """UserError where the template of a setting names a column that the file `name` lacks."""
    for column, is_column in parts:
        if is_column and column not in known:
            raise UserError(f'--{setting} names a column {shorten(column)}, and the columns of '
                            f'{name} are {", ".join(known)[:300]}')


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


# Layouts

def choose_row_layout(name: str, rows: list[dict], settings: RowSettings) -> RowLayout:
    """The layout of rows, as the settings say, or else as the columns suggest.

    name: the file, for messages. rows: its first rows.

    Templates come first, then the column that `field` names. Without both, a column `text` is the
    text, and rows without one may be conversations, or pairs of a question and an answer.
    Raises UserError where the settings do not fit the rows, and where no column is known.
    """
    if settings.answer is not None:
        return template_layout(name, rows, settings)
    if settings.field is None:
        layout = recognized_layout(rows, settings.count_all)
        if layout:
            return layout
    return text_layout(name, rows, settings.field)


def template_layout(name: str, rows: list[dict], settings: RowSettings) -> RowLayout:
    """The layout of --prompt and --answer. Without a prompt, the whole document counts.

    A row that lacks a value for a template is left out. Raises UserError for a template that cannot
    be read, or that names no column of the first rows.
    """
    known = list(first_values(rows))
    prompt = parse_template(settings.prompt or '')
    answer = parse_template(settings.answer)
    check_columns(name, 'prompt', prompt, known)
    check_columns(name, 'answer', answer, known)

    description = f'the answer is {as_typed(settings.answer)}'
    if prompt:
        description = f'the prompt is {as_typed(settings.prompt)}, {description}'
    columns = [part.text for part in prompt + answer if part.is_column]
    return joined_layout(prompt, answer, columns, description, settings.count_all)


def as_typed(template):
    r"""A template in quotes, in which \n is a newline, cut to 100 characters."""
    return shorten(template).replace('\\\\', '\\')


def joined_layout(prompt, answer, columns, description, count_all):
    """The layout of documents that are a prompt and its answer, of two lists of Parts."""
    def make(values):
        before = fill_template(prompt, values)
        text = fill_template(answer, values)
        if before is None or text is None or not text.strip():
            return []
        segments = [Segment(before, False), Segment(text)]
        return [segment for segment in segments if segment.text]

    return masked_layout(make, description, columns, count_all or not prompt)


def masked_layout(make, description, columns, count_all, chat=None):
    """A RowLayout whose segments count as they say, or all of them count."""
    def make_all(values):
        return [Segment(text) for text, _ in make(values)]

    counted = make
    what = 'only answers count in the loss'
    if count_all:
        counted = make_all
        what = 'all of it counts in the loss'
    return RowLayout(counted, f'{description}; {what}', columns, in_segments=True,
                     has_masks=not count_all, chat=chat)


def recognized_layout(rows: list[dict], count_all: bool = False) -> RowLayout | None:
    """The layout that the columns of the first rows suggest, or None.

    A column of a pair has to hold a text: an answer that is a number may be that of a choice.
    """
    first = first_values(rows)
    if 'text' in first:
        return None
    for column in TURNS_COLUMNS:
        if is_list_of_dicts(first.get(column)):
            return turns_layout(column, count_all)

    for question, about, answer in PAIR_COLUMNS:
        if isinstance(first.get(question), str) and isinstance(first.get(answer), str):
            if about not in first:
                about = None
            return pair_layout(question, about, answer, count_all)

    for prompt, answer in JOINED_COLUMNS:
        if isinstance(first.get(prompt), str) and isinstance(first.get(answer), str):
            description = (f'the columns `{prompt}` and `{answer}` are joined as they are, and the '
                           f'second is the answer')
            return joined_layout([Part(prompt, True)], [Part(answer, True)], [prompt, answer],
                                 description, count_all)
    return None


def turns_layout(column, count_all):
    """The layout of rows with a column that holds a list of turns."""
    def make(values):
        return chat_segments(read_turns(column, values.get(column)))

    description = (f'the column `{column}` has conversations, and what the assistant says is the '
                   f'answer')
    return masked_layout(make, description, [column], count_all, CHAT)


def pair_layout(question, about, answer, count_all):
    """The layout of rows with a question, a column on what it is about or None, and an answer."""
    def make(values):
        asked = text_of(values.get(question))
        answered = text_of(values.get(answer))
        if asked is None or answered is None:
            return []
        subject = None
        if about:
            subject = text_of(values.get(about))
        if subject:
            asked += f'\n\n{subject}'
        return chat_segments([Turn('user', asked), Turn('assistant', answered)])

    columns = [column for column in (question, about, answer) if column]
    asks = ' and '.join(f'`{column}`' for column in columns[:-1])
    description = f'the user says what {asks} has, and `{answer}` is the answer'
    if about:
        description = f'the user says what {asks} have, and `{answer}` is the answer'
    return masked_layout(make, description, columns, count_all, CHAT)


def chat_segments(turns):
    """The segments of a conversation up to its last answer; [] without an answer."""
    while turns and turns[-1].role != 'assistant':
        turns.pop()
    if not any(turn.role == 'assistant' and turn.text.strip() for turn in turns):
        return []
    return [segment for segment in CHAT.segments(turns) if segment.text]


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
    value. ValueError, with what follows the name of the row, for one that is none."""
    if value is None:
        return []
    found = read_json_text(value)
    if not isinstance(found, list):
        raise ValueError(f'has no list of turns under `{column}`: {shorten(value)}')
    return [read_turn(column, number, turn) for number, turn in enumerate(found, 1)]


def read_turn(column, number, turn):
    where = f'in turn {number} of `{column}`'
    if not isinstance(turn, dict):
        raise ValueError(f'has no `role` and `content` {where}: {shorten(turn)}')

    # the role
    name = turn.get('role')
    if name is None:
        name = turn.get('from')
    role = None
    if isinstance(name, str):
        role = ROLES.get(name.lower())
    if role is None:
        raise ValueError(f'has the role {shorten(name)} {where}, and the roles are system, user '
                         f'and assistant')

    # the text
    content = turn.get('content')
    if content is None:
        content = turn.get('value')
    if isinstance(content, list):                   # of parts, as in OpenAI's files
        content = join_text_parts(content)
    if content is None:
        content = ''
    if not isinstance(content, str):
        raise ValueError(f'has no text {where}: {shorten(turn)}')
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
