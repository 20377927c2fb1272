"""How a row becomes a document: which column has its text, and which parts of it count in the loss.

A row is a dict, {column: value}. A document is a list of Segments.
"""

from collections.abc import Callable
from dataclasses import dataclass

from engine.chat_layout import ChatLayout, Segment
from engine.errors import UserError, shorten


@dataclass
class RowLayout:
    """What makes documents of the rows of a file.

    make: the segments of a row, {column: value}, or [] where its text is null and it is left out.
        Raises ValueError with a reason that follows the name of the row, such as 'has no answer'.
    description: what was taken for what, for a line that is printed.
    columns: the columns that `make` reads, or None for all of them.
    in_segments: each segment is encoded by itself, as a prompt will be, which ends where one does.
    has_masks: some segments do not count in the loss.
    chat: the layout of the conversations that the rows are, or None.
    """
    make: Callable[[dict], list[Segment]]
    description: str
    columns: list[str] | None = None
    in_segments: bool = False
    has_masks: bool = False
    chat: ChatLayout | None = None


def text_layout(name: str, rows: list[dict], field: str | None = None) -> RowLayout:
    """The layout of rows whose document is the text of one column.

    name: the file, for messages. rows: its first rows, by which the column is chosen. field: the
    column; None takes `text`, or else the only column with text.

    Raises UserError, with the columns and a value of each, where there is no such column.
    """
    column = choose_column(name, rows, field)

    def make(values):
        if column not in values:
            raise ValueError(f'has no string under `{column}`: {shorten(values)}')
        text = values[column]
        if text is None:
            return []
        if type(text) is not str:
            raise ValueError(f'has no string under `{column}`: {shorten(text)}')
        return [Segment(text)]

    return RowLayout(make, f'the text is in the column {column}', [column])


def choose_column(name, rows, field):
    """The column that has the text."""
    columns = first_values(rows)
    if field is not None:
        value = columns.get(field)
        if value is not None and type(value) is not str:
            raise UserError(f'the column {field} of {name} holds no text, but {shorten(value)}; '
                            f'the columns are {describe_columns(columns)}')
        if field in columns:
            return field
        raise UserError(f'{name} has no column `{field}`, only {describe_columns(columns)}; '
                        f'name one of these, as in --field={next(iter(columns), "NAME")}')
    if 'text' in columns:
        return 'text'

    texts = [column for column, value in columns.items() if is_prose(value)]
    if len(texts) == 1:
        return texts[0]

    # a number may be a string, as in a table; anything else cannot be the text
    strings = [column for column, value in columns.items() if type(value) is str]
    if columns and not strings:
        raise UserError(f'{name} has no column of text, only {describe_columns(columns)}; the text '
                        f'of a row should be a string')
    named = next(iter([*texts, *strings]), 'NAME')
    raise UserError(f'{name} has no column `text`, only {describe_columns(columns)}; '
                    f'name the column that has the text, as in --field={named}')


def first_values(rows: list[dict]) -> dict:
    """{column: its first value that is not null} of all columns."""
    columns = {}
    for row in rows:
        for column, value in row.items():
            if columns.get(column) is None:
                columns[column] = value
    return columns


def is_prose(value):
    """True for a string that is no number."""
    if type(value) is not str:
        return False
    try:
        float(value)
    except ValueError:
        return True
    return False


def describe_columns(columns):
    """Text such as "id (0), content ('And old...')"."""
    return ', '.join(f'{column} ({shorten(value)})' for column, value in columns.items())
