"""Reads the rows of JSON lines, JSON lists, tables (csv, tsv) and parquet files, one by one.

A row is a dict, {column: value}. Memory is bounded by the longest row, which has MAX_ROW bytes at
most.
"""

import csv
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from engine.errors import UserError, shorten
from engine.prepare import text_files
from engine.prepare.kinds import CSV, JSON, JSON_LINES, PARQUET, Source

MAX_ROW = 1 << 28               # bytes of JSON lines and parquet, characters of others
ROWS_TO_LOOK_AT = 100           # those that decide what the columns are
BYTES_TO_LOOK_AT = 1 << 22      # enough of them, if they are long
LONGEST_WORD = 16               # characters of JSON that mean nothing if the end is missing
LONGEST_COLUMN = 300            # characters of a column's name
BATCH_BYTES = 1 << 26           # of a parquet file's rows that are read at once
OPEN_QUOTE = 'unexpected end of data'       # csv's words for a field in quotes that does not end
DELIMITERS = ',;\t|'
DELIMITER_NAMES = {',': 'commas', ';': 'semicolons', '\t': 'tabs', '|': 'bars'}


class Row(NamedTuple):
    """A row of a file.

    position: where it lies: the byte of a line of JSON lines, the number of another row, from 0.
    number: of the row or line, from 1; None where the rows before it were not read.
    """
    position: int
    number: int | None
    values: dict


def read_rows(source: Source, start: int = 0, columns: list[str] | None = None) -> Iterator[Row]:
    """The rows of a file, from position `start` on.

    columns: those to read of a parquet file; None reads all. UserError names a row that cannot be
    read.
    """
    reader = READERS[source.kind]
    yield from reader(source, start, columns)


def first_rows(source: Source) -> list[dict]:
    """The values of the first rows, by which the layout of all is chosen."""
    rows = []
    size = 0
    for row in read_rows(source):
        rows.append(row.values)
        size += len(str(row.values))
        if len(rows) == ROWS_TO_LOOK_AT or size > BYTES_TO_LOOK_AT:
            break
    return rows


def row_name(source: Source, row: Row) -> str:
    """'mine.jsonl, line 3', for a message."""
    unit = 'row'
    if source.kind == JSON_LINES:
        unit = 'line'
    if row.number is None:
        return f'{source}, byte {row.position:,}'
    return f'{source}, {unit} {row.number:,}'


def check_row(source, row):
    """The row, if it is an object. Raises UserError otherwise."""
    if type(row.values) is not dict:
        raise UserError(f'{row_name(source, row)} has no string under `text`: '
                        f'{shorten(row.values)}; a row should be an object such as '
                        f'{{"text": "..."}}')
    return row


def too_long(source, number):
    return UserError(f'{source}, row {number:,} is longer than {MAX_ROW:,} bytes; divide it, or '
                     f'save its text as a .txt file, which may have any length')


# JSON

def read_json_lines(source, start, columns):
    """The Rows of a file with an object in each line."""
    if source.encoding != 'utf-8':
        yield from read_json_lines_of_text(source, start)
        return

    with source.open() as file:
        file.seek(start)
        end = start
        number = 0
        while line := file.readline(MAX_ROW):
            byte = end
            end += len(line)
            number += 1
            if len(line) == MAX_ROW:
                raise too_long(source, number)
            if byte == 0:
                line = line.removeprefix(text_files.UTF8_MARK)
            if not line.strip():
                continue

            row = Row(byte, None if start else number, None)
            try:
                text = line.decode('utf-8')
            except UnicodeDecodeError as error:
                raise UserError(f'{row_name(source, row)} is not UTF-8 at byte '
                                f'{byte + error.start:,} of the file; convert the file first, or '
                                f'name its encoding with --encoding=') from None
            yield parse_line(source, row, text)


def read_json_lines_of_text(source, start):
    """The same for a file in another encoding than UTF-8. Positions are numbers of lines."""
    for position, line in enumerate(read_lines(source)):
        if position >= start and line.strip():
            yield parse_line(source, Row(position, position + 1, None), line)


def parse_line(source, row, text):
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f'{row_name(source, row)} is not JSON ({error}); it should be an object '
                        f'such as {{"text": "..."}}') from None
    return check_row(source, row._replace(values=values))


def read_lines(source):
    """The lines of a file's text, with their ends. Only newlines end a line."""
    parts = []                  # of a line that is not whole yet
    length = 0
    number = 1
    for text in text_files.read_source(source):
        *whole, rest = text.split('\n')
        for line in whole:
            yield ''.join([*parts, line, '\n'])
            parts = []
            length = 0
            number += 1
        parts.append(rest)
        length += len(rest)
        if length > MAX_ROW:
            raise too_long(source, number)
    if length:
        yield ''.join(parts)


def read_json(source, start, columns):
    """The Rows of a list of objects, or of objects one after the other."""
    decoder = json.JSONDecoder()
    texts = text_files.read_source(source)
    rest = ''
    position = 0
    is_list = False
    wanted = 0                  # characters without which it makes no sense to try again
    for text in chain(texts, [None]):
        is_end = text is None
        if not is_end:
            rest += text
            if len(rest) < wanted:
                continue

        begin = 0
        while True:
            begin = skip_separators(rest, begin, is_list)
            if begin == len(rest):
                break
            if position == 0 and not is_list and rest[begin] == '[':
                is_list = True
                begin += 1
                continue
            if is_list and rest[begin] == ']':
                begin = len(rest)
                is_list = False
                break
            try:
                values, end = decoder.raw_decode(rest, begin)
            except RecursionError as error:
                raise UserError(f'{source}, row {position + 1:,} is not JSON ({error})') from None
            except json.JSONDecodeError as error:
                if is_end or is_mistake(error, rest):
                    raise UserError(f'{source}, row {position + 1:,} is not JSON ({error}); '
                                    f'correct or remove it') from None
                break           # the value may go on in the next text
            if end == len(rest) and not is_end:
                break           # a number may go on
            begin = end
            if position >= start:
                yield check_row(source, Row(position, position + 1, values))
            position += 1

        rest = rest[begin:]
        wanted = 2 * len(rest)
        if len(rest) > MAX_ROW:
            raise too_long(source, position + 1)
    if is_list:
        raise UserError(f'{source} ends within its list, after row {position:,}; copy or download '
                        f'it again')


def is_mistake(error, text):
    """True for an error of JSON that more text cannot mend."""
    is_cut_string = error.msg.startswith(('Unterminated', 'Invalid \\'))
    return not is_cut_string and error.pos < len(text) - LONGEST_WORD


def skip_separators(text, begin, is_list):
    """Where the next value of a JSON text begins, after white space and a comma."""
    while begin < len(text) and (text[begin].isspace() or (is_list and text[begin] == ',')):
        begin += 1
    return begin


# Tables

def read_csv(source, start, columns):
    """The Rows of a table whose first row names the columns."""
    csv.field_size_limit(MAX_ROW)
    delimiter = find_delimiter(source)
    header = None
    position = 0
    # strict: otherwise a quote that is a letter joins rows, and nobody is told
    reader = csv.reader(read_lines(source), delimiter=delimiter,
                        quoting=find_quoting(source, delimiter), strict=True)
    try:
        for fields in reader:
            if fields and header is None:
                check_names(source, fields, delimiter)
                header = name_columns(fields)
            elif fields:
                if len(fields) > len(header):
                    raise csv.Error(f'it has {len(fields)} fields, and the first row {len(header)}')
                if position >= start:
                    fields += [None] * (len(header) - len(fields))
                    yield Row(position, position + 1, dict(zip(header, fields)))
                position += 1
    except csv.Error as error:
        reason = str(error)
        if reason == OPEN_QUOTE:
            reason = 'a field in quotes does not end'
        raise UserError(f'{source}, row {position + 1:,} after the names of the columns cannot be '
                        f'read: {reason}; correct it, and put fields that hold '
                        f'{DELIMITER_NAMES[delimiter]}, quotes or newlines in quotes') from None


def check_names(source, fields, delimiter):
    """UserError where the first row of a table is one of texts, not of names."""
    for number, field in enumerate(fields):
        if len(field) > LONGEST_COLUMN:
            names = [f'column{other}' for other in range(1, len(fields) + 1)]
            names[number] = 'text'
            raise UserError(f'the first row of {source} should name the columns, and it has a text '
                            f'of {len(field):,} characters: {shorten(field)}; put a row of names '
                            f'before it, such as {delimiter.join(names)[:100]}')


def name_columns(fields):
    """The names of the columns; those without a name get a number."""
    return [field.strip() or f'column {number}' for number, field in enumerate(fields, 1)]


def find_delimiter(source: Source) -> str:
    """What stands between the fields of a table: a comma, semicolon, tab or bar.

    It is the one that gives the first rows the most fields, of those that give all as many.
    """
    if source.name.endswith('.tsv'):
        return '\t'

    lines = first_lines(source)
    best = ','
    most = 1
    for delimiter in DELIMITERS:
        try:
            widths = [len(fields) for fields in csv.reader(lines, delimiter=delimiter) if fields]
        except csv.Error:       # read_csv says so, if all of them fail
            continue
        if len(widths) > 1:
            widths.pop()        # the last row may be cut
        if widths and min(widths) == max(widths) and widths[0] > most:
            best = delimiter
            most = widths[0]
    return best


def find_quoting(source, delimiter):
    """csv.QUOTE_NONE for a table with tabs in whose first rows a quote is a letter, as programs
    write them that never put fields in quotes; else csv.QUOTE_MINIMAL."""
    if delimiter != '\t':
        return csv.QUOTE_MINIMAL
    try:
        for _ in csv.reader(first_lines(source), delimiter=delimiter, strict=True):
            pass
    except csv.Error as error:
        if str(error) != OPEN_QUOTE:                # the last row may be cut
            return csv.QUOTE_NONE
    return csv.QUOTE_MINIMAL


def first_lines(source):
    """The lines of a table that decide how it is written."""
    lines = []
    size = 0
    for line in read_lines(source):
        lines.append(line)
        size += len(line)
        if len(lines) == ROWS_TO_LOOK_AT or size > BYTES_TO_LOOK_AT:
            break
    return lines


# Parquet

@contextmanager
def open_parquet(source: Source):
    """The pyarrow.parquet.ParquetFile of a source. Raises UserError where it is damaged."""
    import pyarrow
    import pyarrow.parquet
    with seekable_file(source) as file:
        try:
            parquet = pyarrow.parquet.ParquetFile(file, pre_buffer=False,
                                                  buffer_size=text_files.BLOCK)
            len(parquet.schema_arrow.names)     # decodes them
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(f'{source} is not a parquet file: {error}') from None
        yield parquet


@contextmanager
def seekable_file(source):
    """The path of a file, or an unpacked temporary copy of one in an archive."""
    if source.member is None and not source.is_gzip:
        yield source.path
        return
    with source.open() as packed, tempfile.TemporaryFile() as copy:
        shutil.copyfileobj(packed, copy)
        copy.seek(0)
        yield copy


def read_parquet(source, start, columns):
    """The Rows of a parquet file, from row number `start` on, with these columns or all of them."""
    with open_parquet(source) as file:
        names = file.schema_arrow.names
        for column in columns or []:
            if column not in names:
                raise UserError(f'{source} has no column `{column}`, only {", ".join(names)}')

        # leave out the row groups that end before `start`
        first = 0               # the number of the first row that is read
        groups = []
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            if groups or first + group.num_rows > start:
                groups.append(number)
                if group.total_byte_size > MAX_ROW * max(1, group.num_rows):
                    raise too_long(source, first + 1)
            else:
                first += group.num_rows

        batches = file.iter_batches(batch_size=batch_size(file), row_groups=groups,
                                    columns=columns)
        position = first
        try:
            for batch in batches:
                for values in batch_rows(batch):
                    if position >= start:
                        yield Row(position, position + 1, values)
                    position += 1
        except UnicodeDecodeError as error:     # no writer has to check its strings
            raise UserError(f'{source}, row {position + 1:,} is not UTF-8 at byte '
                            f'{error.start:,} of its text; correct or remove the row') from None
        except OSError as error:                # pyarrow raises it for a damaged page
            raise UserError(f'{source} is damaged: {error}; download it again') from None


def batch_size(file):
    """How many rows to read at once: few where the rows of some group are long."""
    size = 256
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        row_bytes = group.total_byte_size / max(1, group.num_rows)
        size = min(size, int(BATCH_BYTES / max(1, row_bytes)))
    return max(1, size)


def batch_rows(batch):
    """The rows of a pyarrow batch, one by one, so that an error belongs to one of them."""
    names = batch.schema.names
    for values in zip(*batch.columns):
        yield {name: python_value(value) for name, value in zip(names, values)}


def python_value(value):
    """A value of pyarrow as one of Python. Bytes are taken for UTF-8 text."""
    value = value.as_py()
    if type(value) is bytes:
        return value.decode('utf-8')
    return value


READERS = {JSON_LINES: read_json_lines, JSON: read_json, CSV: read_csv, PARQUET: read_parquet}
