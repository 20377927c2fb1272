"""What a file is, by its name and its content: text, rows, an archive, or something without text.

find_sources lists what --input= names as Sources. A Source is a file, or a file within a zip, and
each may be compressed with gzip.
"""

import codecs
import gzip
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from engine.errors import UserError
from engine.log import log
from engine.prepare import text_files
from engine.prepare.text_encoding import decode_sample, find_mark, guess_wide_encoding

TEXT = 'text'
JSON_LINES = 'JSON lines'           # an object in each line
JSON = 'JSON'                       # a list of objects, or objects one after the other
CSV = 'CSV'                         # also with other delimiters than a comma
PARQUET = 'parquet'

HEAD = 1 << 16                      # bytes that decide what a file is
LINES_TO_LOOK_AT = 20
GZIP = b'\x1f\x8b'
ZIP = b'PK\x03\x04'
EMPTY_ZIP = b'PK\x05\x06'
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, gzip.BadGzipFile)

# Beginnings of files that hold no plain text: what they are, and what to do. A file of a long
# beginning comes before those of its shorter ones.
UNPACK = 'unpack it, and pass the folder with --input='
NO_TEXT = '--input= takes text'
BEGINNINGS = (
    (b'%PDF', 'a PDF', 'pdftotext makes text of it'),
    (b'{\\rtf', 'a text with formatting (RTF)', 'save it as plain text'),
    (b'\xd0\xcf\x11\xe0', 'a Word, Excel or other file of Microsoft Office',
     'save it as plain text, or as .csv'),
    (b'\x89PNG', 'an image', NO_TEXT),
    (b'\xff\xd8\xff', 'an image', NO_TEXT),
    (b'GIF8', 'an image', NO_TEXT),
    (b'II*\0', 'an image', NO_TEXT),
    (b'MM\0*', 'an image', NO_TEXT),
    (b'7z\xbc\xaf\x27\x1c', 'a 7z archive', UNPACK),
    (b'Rar!', 'a rar archive', UNPACK),
    (b'BZh', 'compressed with bzip2', 'bunzip2 unpacks it'),
    (b'\xfd7zXZ', 'compressed with xz', 'unxz unpacks it'),
    (b'\x28\xb5\x2f\xfd', 'compressed with zstd', 'unzstd unpacks it'),
    (b'SQLite format 3', 'an SQLite database', 'export its table as .csv'),
    (b'ARROW1', 'an Arrow file', 'save it as .parquet'),
    (b'\x93NUMPY', "an array of NumPy's", NO_TEXT),
    (b'\x89HDF', 'an HDF5 file', NO_TEXT),
    (b'\x7fELF', 'a program', NO_TEXT),
    (b'ID3', 'sound', NO_TEXT),
    (b'OggS', 'sound', NO_TEXT),
    (b'fLaC', 'sound', NO_TEXT),
)
# The same where the mark is further inside: where it begins, the mark, what the file is
MARKS_INSIDE = (
    (8, b'WEBP', 'an image', NO_TEXT),
    (8, b'WAVE', 'sound', NO_TEXT),
    (4, b'ftyp', 'a video or an image', NO_TEXT),
    (257, b'ustar', 'a tar archive', UNPACK),
)
# Documents that are zips, by a file within them
ZIPPED = (
    ('word/', 'a Word document', 'save it as plain text'),
    ('xl/', 'an Excel table', 'save it as .csv'),
    ('ppt/', 'a PowerPoint presentation', 'save it as plain text'),
    ('META-INF/container.xml', 'an EPUB book', 'convert it to plain text'),
    ('content.xml', 'an OpenDocument file', 'save it as plain text, or as .csv'),
    ('AndroidManifest.xml', 'a program', NO_TEXT),
    ('META-INF/MANIFEST.MF', 'a program', NO_TEXT),
)


class NotText(UserError):
    """A file holds no text. what: what it is, with its article."""

    def __init__(self, name, what, advice):
        super().__init__(f'{name} is {what}; {advice}')
        self.what = what


@dataclass(frozen=True)
class Source:
    """A file to read, or a file within a zip."""
    path: Path
    member: str | None = None       # its name within the zip `path`
    is_gzip: bool = False
    kind: str = TEXT                # TEXT, JSON_LINES, JSON, CSV or PARQUET
    encoding: str = 'utf-8'         # of its characters, a name that Python knows

    def __str__(self):
        """The path for a message."""
        if self.member is None:
            return str(self.path)
        return f'{self.path}/{self.member}'

    @property
    def name(self) -> str:
        """The name of the file alone, in lower case and without .gz, for its ending."""
        name = self.path.name
        if self.member is not None:
            name = PurePosixPath(self.member).name
        return name.lower().removesuffix('.gz')

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the bytes of the file, unpacked. Raises UserError where the archive is damaged."""
        with ExitStack() as stack:
            try:
                file = self.enter(stack)
            except DAMAGED as error:
                raise self.damaged(error) from None
            except (RuntimeError, NotImplementedError) as error:    # of zipfile: a password
                raise UserError(f'{self} cannot be unpacked: {error}; {UNPACK}') from None

            try:
                yield file
            except DAMAGED as error:
                raise self.damaged(error) from None

    def enter(self, stack):
        """The open file. stack: what closes it."""
        if self.member is None:
            file = stack.enter_context(open(self.path, 'rb'))
        else:
            stat = self.path.stat()
            archive = open_zip(self.path, stat.st_size, stat.st_mtime_ns)
            file = stack.enter_context(archive.open(self.member))
        if self.is_gzip:
            file = stack.enter_context(gzip.GzipFile(fileobj=file))
        return file

    def damaged(self, error):
        return UserError(f'{self} is damaged: {error}; download or pack it again')


@lru_cache(maxsize=8)
def open_zip(path, size, changed):
    """The open zipfile.ZipFile at `path`. It is kept open, as it lists its files when it opens.

    size, changed: of the file, so that another file of this name is opened anew.
    """
    return zipfile.ZipFile(path)


# Finding sources

def find_sources(path: str | Path, encoding: str | None = None) -> list[Source]:
    """The files to read at `path`: a file, those below a folder, or those within a zip.

    encoding: that of texts without a byte order mark; None is UTF-8. What holds no text is left out
    of a folder or a zip, in a line that counts. Raises UserError where nothing is left, and for a
    single file that holds no text.
    """
    files = text_files.find_files(path, log_skipped=True)
    is_alone = text_files.input_path(path).is_file()
    sources = []
    left_out = {}                       # {name: what it is}
    for file in files:
        try:
            sources += sources_of_file(file, encoding, left_out)
        except NotText as error:
            if is_alone:
                raise
            left_out[str(file.relative_to(text_files.input_path(path)))] = error.what

    if left_out:
        shown = [f'{name} ({what})' for name, what in list(left_out.items())[:3]]
        more = ', ...' if len(left_out) > len(shown) else ''
        log.info(f'{path}: leaving out {len(left_out):,} files that hold no text: '
                 f'{", ".join(shown)}{more}')
    if not sources:
        raise UserError(f'{path} holds no file with text; --input= takes text, JSON lines, JSON, '
                        f'csv, tsv or parquet')
    return sources


def sources_of_file(path, encoding, left_out):
    """The Sources of a file: itself, or the files within it where it is a zip.

    left_out: {name: what it is}, to which files within a zip that hold no text are added.
    """
    with open(path, 'rb') as file:
        head = file.read(HEAD)
    if not head.startswith((ZIP, EMPTY_ZIP)):
        return [identify(Source(path), encoding)]

    members = zip_members(path)
    sources = []
    for member in members:
        source = Source(path, member)
        with source.open() as file:
            inner = file.read(len(ZIP))
        if inner == ZIP:
            raise UserError(f'{source} is a zip within a zip; {UNPACK}')
        try:
            sources.append(identify(source, encoding))
        except NotText as error:
            left_out[str(source)] = error.what
    return sources


def zip_members(path):
    """The names of the files in a zip, without hidden ones, sorted. NotText for a Word document."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [info.filename for info in archive.infolist() if not info.is_dir()]
    except (*DAMAGED, OSError, ValueError) as error:
        raise UserError(f'{path} is a damaged zip: {error}; download or pack it again') from None

    for mark, what, advice in ZIPPED:
        if any(name.startswith(mark) for name in names):
            raise NotText(path, what, advice)
    # macOS adds a folder with what its file system knows of each file
    return sorted(name for name in names if not any(
        part.startswith(('.', '__MACOSX')) for part in PurePosixPath(name).parts))


def identify(source: Source, encoding: str | None = None) -> Source:
    """The Source with its kind and encoding. Raises NotText where it holds no text."""
    with source.open() as file:
        head = file.read(HEAD)
    if head.startswith(GZIP):
        source = replace(source, is_gzip=True)
        with source.open() as file:
            head = file.read(HEAD)

    if head.startswith((ZIP, EMPTY_ZIP)):
        raise NotText(source, 'a zip archive', UNPACK)
    if head.startswith(b'PAR1'):
        return replace(source, kind=PARQUET)
    check_is_text(source, head)

    mark, marked = find_mark(head)
    if marked:
        encoding = marked
    if encoding is None:
        encoding = 'utf-8'
        wide = guess_wide_encoding(head)
        if wide:
            raise UserError(f'{source} is {wide} without a byte order mark; add --encoding={wide}')
        if b'\0' in head:
            raise NotText(source, f'binary: byte {head.index(0):,} is NUL', NO_TEXT)
    elif not marked and codecs.lookup(encoding).name in ('utf-16', 'utf-32'):
        wide = guess_wide_encoding(head) or f'{encoding}-le'
        raise UserError(f'{source} has no byte order mark, by which {encoding} is read; name the '
                        f'order of its bytes, as in --encoding={wide}')
    elif not marked and decode_sample(head, 'utf-8') and not head.isascii():
        log.info(f'note: {source} is valid UTF-8, and is read as {encoding}')

    text = codecs.getincrementaldecoder(encoding)('replace').decode(head[len(mark):])
    return replace(source, encoding=encoding, kind=text_kind(source.name, text))


def check_is_text(source, head):
    """Raise NotText where the first bytes of a file are those of something else than text."""
    for beginning, what, advice in BEGINNINGS:
        if head.startswith(beginning):
            raise NotText(source, what, advice)
    for begin, mark, what, advice in MARKS_INSIDE:
        if head[begin:begin + len(mark)] == mark:
            raise NotText(source, what, advice)
    if source.name.endswith('.parquet'):
        raise UserError(f'{source} is not a parquet file: it does not begin with PAR1; download '
                        f'it again')


def text_kind(name: str, text: str) -> str:
    """The kind of a file by its name and the beginning of its text."""
    if name.endswith(('.csv', '.tsv')):
        return CSV

    lines = text.split('\n')
    if len(lines) > 1:
        lines.pop()                     # it may be cut
    lines = [line for line in lines[:LINES_TO_LOOK_AT] if line.strip()]
    has_objects = bool(lines) and all(is_object(line) for line in lines)
    is_list = re.match(r'\s*\[\s*[{\]]', text)

    if name.endswith('.json'):
        return JSON_LINES if has_objects and len(lines) > 1 else JSON
    if name.endswith(('.jsonl', '.ndjson')):
        return JSON if is_list else JSON_LINES
    # JSON under another name: several objects, or a list whose first one is whole
    if has_objects and len(lines) > 1:
        return JSON_LINES
    if is_list and begins_with_object(text[is_list.end() - 1:]):
        return JSON
    return TEXT


def is_object(line):
    try:
        return type(json.loads(line)) is dict
    except (ValueError, RecursionError):
        return False


def begins_with_object(text):
    try:
        return type(json.JSONDecoder().raw_decode(text)[0]) is dict
    except (ValueError, RecursionError):
        return False
