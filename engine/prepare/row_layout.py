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

    shown = ' '.join(column.split())[:100]
    return RowLayout(make, f'the text is in the column {shown}', [column])


def choose_column(name, rows, field):
    """The column that has the text."""
    columns = first_values(rows)
    if field is None and 'text' in columns:
        field = 'text'
    if field is not None:
        check_column(name, columns, field)
        return field

    texts = [column for column, value in columns.items() if is_prose(value)]
    if len(texts) == 1 and len(rows) > 1:
        return texts[0]

    check_not_wrapped(name, rows)
    if len(texts) == 1:
        return texts[0]
    if columns and not strings_in(columns):
        raise UserError(f'{name} has no column of text, only {describe_columns(columns)}; the text '
                        f'of a row should be a string')
    raise UserError(f'{name} has no column `text`, only {describe_columns(columns)}; '
                    f'name the column that has the text, as in --field={suggest_column(columns)}')


def check_column(name, columns, field):
    """UserError where the rows of the file `name` have no column `field`, or no text in it."""
    value = columns.get(field)
    if value is not None and type(value) is not str:
        raise UserError(f'the column {field} of {name} holds no text, but {shorten(value)}; '
                        f'the columns are {describe_columns(columns)}')
    if field not in columns:
        raise UserError(f'{name} has no column `{field}`, only {describe_columns(columns)}; '
                        f'name one of these, as in --field={suggest_column(columns, field)}')


def check_not_wrapped(name, rows):
    """UserError where the only row is an object around the list that has the rows."""
    if len(rows) > 1:
        return
    for column, value in first_values(rows).items():
        if isinstance(value, list) and value and isinstance(value[0], dict):
            program = f'import json, sys; json.dump(json.load(sys.stdin)[{column!r}], sys.stdout)'
            raise UserError(f'{name} is one object, and its rows are a list under {column!r:.100}; '
                            f'save that list alone: python -c "{program}" < OLD > NEW.json')


def strings_in(columns):
    """The columns whose value is a string. A number may be one, as in a table."""
    return [column for column, value in columns.items() if type(value) is str]


def suggest_column(columns, wanted=None):
    """The column to name in advice: one that is spelled as `wanted` but for its case, or else the
    first one that has text."""
    for column in columns:
        if wanted is not None and column.lower() == wanted.lower():
            return column
    texts = [column for column, value in columns.items() if is_prose(value)]
    return next(iter([*texts, *strings_in(columns)]), 'NAME')


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
