"""What a file is, by its name and its content: text, rows, an archive, or nothing to read text from.

find_sources lists what --input= names as Sources. A Source is a file, or a file within a zip, and
each may be compressed with gzip.
"""

import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from engine.errors import UserError
from engine.log import log
from engine.prepare import text_files

TEXT = 'text'
JSON_LINES = 'JSON lines'           # an object in each line
JSON = 'JSON'                       # a list of objects, or objects one after the other
CSV = 'CSV'                         # also with other delimiters than a comma
PARQUET = 'parquet'

HEAD = 1 << 16                      # bytes that decide what a file is
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

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the bytes of the file, unpacked. Raises UserError where the archive is damaged."""
        with ExitStack() as stack:
            try:
                if self.member is None:
                    file = stack.enter_context(open(self.path, 'rb'))
                else:
                    archive = stack.enter_context(zipfile.ZipFile(self.path))
                    file = stack.enter_context(archive.open(self.member))
                if self.is_gzip:
                    file = stack.enter_context(gzip.GzipFile(fileobj=file))
                yield file
            except DAMAGED as error:
                raise UserError(f'{self} is damaged: {error}; download or pack it again') from None
            except (RuntimeError, NotImplementedError) as error:    # of zipfile, for one member
                raise UserError(f'{self} cannot be unpacked: {error}; {UNPACK}') from None
