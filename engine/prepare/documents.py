"""Reads documents: the rows of a file, the parts of a text between separators, or a whole text.

Document and the functions under it serve the scripts whose every document has a position, so that
a stopped run can continue and several machines can share the work. read_segments serves
data/text/prepare.py, which also takes documents of several segments and texts with separators.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import NamedTuple

from engine.errors import UserError
from engine.prepare.kinds import JSON_LINES, PARQUET, TEXT, Source, identify
from engine.prepare.row_layout import RowLayout, Segment, text_layout
from engine.prepare.rows import first_rows, open_parquet, read_rows, row_name
from engine.prepare.text_files import find_files, input_path, read_source

LONGEST_SPACE = 1 << 20         # characters; more white space than this is a text like any other

# Files of a folder that the scripts of large datasets read, of those that they can read
DOCUMENT_ENDINGS = ('.parquet', '.jsonl', '.txt', '.ndjson', '.jsonl.gz', '.txt.gz')


AFTER_ALL = 1 << 62             # a position after all documents of any file


class DocumentFormat(NamedTuple):
    """What a person says about files of documents.

    field: the column of the text.
    encoding: of texts without a byte order mark; None is UTF-8.
    """
    field: str = 'text'
    encoding: str | None = None

    @property
    def key(self) -> str:
        """A text that names what is not the default."""
        if self == PLAIN_FORMAT:
            return ''
        return f', {self.field}, {self.encoding}'


PLAIN_FORMAT = DocumentFormat()


class Document(NamedTuple):
    """A document of a file.

    position: where it lies in the file: the byte of a .jsonl, the row of a .parquet, 0 in a .txt.
    texts: the pieces that its text is made of.
    """
    position: int
    texts: Iterable[str]


class Position(NamedTuple):
    """A document among all documents of a list of files."""
    file: int               # the number of the file
    position: int           # as in Document


# Documents with positions

def find_document_files(path: str | Path) -> list[Path]:
    """The file `path`, or the files of documents below a folder."""
    endings = ()
    if input_path(path).is_dir():
        endings = DOCUMENT_ENDINGS
    return find_files(path, endings, log_skipped=True)

def identify_documents(path: Path, form: DocumentFormat) -> Source:
    """The Source of a file of documents. A .txt is text, whatever it looks like."""
    source = identify(Source(path), form.encoding)
    if source.name.endswith('.txt'):
        source = replace(source, kind=TEXT)
    return source


def read_documents(
    path: Path, start: int = 0, form: DocumentFormat = PLAIN_FORMAT,
) -> Iterator[Document]:
    """The documents of a file, from position `start` on. Rows whose text is null are left out.

    A text is one document.
    """
    source = identify_documents(path, form)
    if source.kind == TEXT:
        if start == 0:
            yield Document(0, read_source(source))
        return

    layout = choose_text_layout(source, form.field)
    if layout is None:
        return
    for row in read_rows(source, start, layout.columns):
        segments = make_document(source, row, layout)
        if segments:
            yield Document(row.position, [segment.text for segment in segments])


def choose_text_layout(source: Source, field: str | None) -> RowLayout | None:
    """The layout of a file's rows that takes the text of a column; None where it has no rows."""
    rows = first_rows(source)
    if not rows:
        return None
    return text_layout(str(source), rows, field)


def make_document(source, row, layout):
    """The segments of a row."""
    try:
        return layout.make(row.values)
    except ValueError as error:
        raise UserError(f'{row_name(source, row)} {error}; correct or remove it') from None


def count_documents(path: Path, bar, form: DocumentFormat = PLAIN_FORMAT) -> int:
    """The number of documents in a file.

    Only parquet stores it; other files are read through, which also checks them.
    bar: a tqdm bar, which counts the documents that are read.
    """
    source = identify_documents(path, form)
    if source.kind == PARQUET:
        documents = count_parquet(source, form)
        if documents is not None:
            return documents

    documents = 0
    characters = 0
    for document in read_documents(path, form=form):
        documents += 1
        characters += sum(len(text) for text in document.texts)
        bar.update()

    if not characters:
        raise UserError(f'{path} is empty; --input= takes documents')
    return documents


def count_rows(path: Path) -> int:
    """The number of rows of a parquet file."""
    with open_parquet(Source(path)) as file:
        return file.metadata.num_rows


def count_parquet(source, form):
    """How many rows of a parquet file have a text; None if the file does not say."""
    layout = choose_text_layout(source, form.field)
    if layout is None:
        return 0
    with open_parquet(source) as file:
        names = [file.schema.column(i).path for i in range(len(file.schema))]
        if layout.columns[0] not in names:
            return None
        column = names.index(layout.columns[0])
        nulls = 0
        for number in range(file.num_row_groups):
            statistics = file.metadata.row_group(number).column(column).statistics
            if statistics is None or not statistics.has_null_count:
                return None
            nulls += statistics.null_count
        return file.metadata.num_rows - nulls


# Dividing documents among parts of the work

def files_of_part(sizes: list[int], part: int, parts: int) -> list[int]:
    """The numbers of the files that part number `part` of `parts` reads, of files of these sizes.

    split_position opens no other file for the beginning of this part and of the next one.
    """
    part_begin = sum(sizes) * part // parts
    part_end = sum(sizes) * (part + 1) // parts

    numbers = []
    file_begin = 0
    for number, size in enumerate(sizes):
        file_end = file_begin + size
        if file_begin < part_end and part_begin < file_end:
            numbers.append(number)
        file_begin = file_end
    return numbers


def split_position(files: list[Path], sizes: list[int], part: int, parts: int) -> Position:
    """Where part number `part` of `parts` begins. Each part is an equal share of the files' bytes.

    sizes: how many bytes each file has. The same files give the same positions everywhere. Only the
    file that the position lies in is opened, and only its metadata or one line is read.
    """
    byte = sum(sizes) * part // parts
    for number, (path, size) in enumerate(zip(files, sizes)):
        if byte < size:
            return Position(number, document_position(path, byte, size))
        byte -= size
    return Position(len(files), 0)


def document_position(path, byte, size):
    """The position of the first document of a file that begins at `byte` of its `size` or later."""
    if byte == 0:
        return 0
    source = identify_documents(path, PLAIN_FORMAT)
    if source.kind == PARQUET:
        # as if all rows had the same size; rounded up with whole numbers, as floats are too short
        return -(-count_rows(path) * byte // size)

    is_plain = source.kind == JSON_LINES and source.encoding == 'utf-8' and not source.is_gzip
    if not is_plain:
        return AFTER_ALL

    # the line after the one that holds the byte before
    with open(path, 'rb') as file:
        file.seek(byte - 1)
        file.readline()
        return file.tell()


# Documents of segments

def read_segments(
    source: Source, layout: RowLayout | None, separator: str | None, keep_separator: bool,
) -> Iterator[Iterable[Segment]]:
    """The documents of a file, each as segments, to be read before the next document.

    layout: of rows; None for a text. separator: what ends a document of a text; None for one
    document. keep_separator: it stays at the end of its document. A document without any text
    comes too, as [].
    """
    if layout:
        for row in read_rows(source, columns=layout.columns):
            segments = make_document(source, row, layout)
            if any(segment.text for segment in segments):
                yield segments
            else:
                yield []
        return

    texts = read_source(source)
    first = next(texts, '')
    if separator and '\r\n' in first:           # the lines of Windows
        separator = separator.replace('\n', '\r\n')
    parts = split_at_separator(chain([first], texts), separator, keep_separator)
    for _, group in groupby(parts, key=lambda part: part.document):
        yield text_segments((part.text for part in group), keep_separator)


class TextPart(NamedTuple):
    """A piece of the text of document number `document`, from 0."""
    document: int
    text: str


def split_at_separator(
    texts: Iterable[str], separator: str | None, keep_separator: bool,
) -> Iterator[TextPart]:
    """The text that `texts` make up in documents, each of which ends at a separator."""
    if separator is None:
        yield from (TextPart(0, text) for text in texts)
        return

    ending = ''
    if keep_separator:
        ending = separator
    document = 0
    rest = ''
    overlap = len(separator) - 1        # characters that may be the beginning of a separator
    for text in texts:
        *whole, rest = (rest + text).split(separator)
        for part in whole:
            yield TextPart(document, part + ending)
            document += 1

        cut = len(rest) - overlap
        if cut > 0:
            yield TextPart(document, rest[:cut])
            rest = rest[cut:]
    if rest:
        yield TextPart(document, rest)


def text_segments(texts, keep_space):
    """The segments of a document with the pieces `texts`; [] where it is white space alone, unless
    that is kept."""
    beginning = ''
    for text in texts:
        beginning += text
        is_space = beginning.isspace() and len(beginning) < LONGEST_SPACE
        if beginning and (keep_space or not is_space):
            return chain([Segment(beginning)], (Segment(text) for text in texts))
    return []
