"""Reads text for the prepare scripts, in pieces: UTF-8 text, JSON lines and parquet files."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError
from engine.log import log
from engine.prepare.web_file import download_file

BLOCK = 1 << 18             # bytes read at once
DOCUMENT_ENDINGS = ('.parquet', '.jsonl', '.txt')       # files that read_documents() can read
SHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


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


# Finding files

def input_path(path: str | Path) -> Path:
    """`path` as a Path, if it is a file or a folder. Raises UserError otherwise."""
    path = Path(os.path.expanduser(path))
    if path.is_file() or path.is_dir():
        return path

    if path.exists():
        raise UserError(f'{path} is a pipe or a device; save the text in a file and pass that with '
                        f'--input=')
    raise UserError(f'there is no file or folder {path}; --input= takes a path to text')


def find_files(path: str | Path, endings: tuple[str, ...] = (),
               log_skipped: bool = False) -> list[Path]:
    """The file `path`, or all files below the folder `path`, sorted by path, without hidden ones.

    endings: the file name endings to accept, such as ('.txt',); () accepts every file.
    log_skipped: log a line that counts the files of the folder that are left out.
    """
    path = input_path(path)
    if path.is_dir():
        return find_files_below(path, endings, log_skipped)

    if endings and path.suffix.lower() not in endings:
        raise UserError(f'{path} does not end in {" or ".join(endings)}; --input= takes such a '
                        f'file, or a folder of them')
    return [path]


def find_files_below(folder, endings, log_skipped):
    """The files of a folder, as find_files returns them."""
    def is_accepted(name):
        if re.search(r'(^|/)\.', name):                 # the file or a folder above it is hidden
            return False
        if endings and Path(name).suffix.lower() not in endings:
            return False
        return (folder / name).is_file()

    entries = [entry for entry in folder.rglob('*') if entry.is_symlink() or not entry.is_dir()]
    names = sorted(entry.relative_to(folder).as_posix() for entry in entries)
    accepted = [name for name in names if is_accepted(name)]

    if not accepted:
        raise UserError(f'the folder {folder} holds no {" or ".join(endings) or "file"}; --input= '
                        f'takes a folder that does')

    skipped = len(names) - len(accepted)
    if skipped and log_skipped:
        log.info(f'{folder}: reading {len(accepted):,} files, skipping {skipped:,} that are '
                 f'hidden or of another type')
    return [folder / name for name in accepted]


def fingerprint(files: list[Path]) -> str:
    """A hash that changes when any of the files does: their paths, sizes and times of change."""
    facts = []
    for path in files:
        stat = path.stat()
        facts.append((str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


# Reading

def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file, unchanged, in pieces. UserError names the byte that is not text."""
    rest = b''              # the bytes of a character that the last block cut
    offset = 0              # where `rest` begins in the file
    with open(path, 'rb') as file:
        while True:
            block = file.read(BLOCK)
            data = rest + block

            if b'\0' in data:
                raise UserError(f'{path} is binary: byte {offset + data.index(0):,} is NUL; '
                                f'--input= takes UTF-8 text')

            try:
                text, used = codecs.utf_8_decode(data, 'strict', not block)
            except UnicodeDecodeError as error:
                raise UserError(f'{path} is not UTF-8 at byte {offset + error.start:,}; convert it '
                                f'first, as in: iconv -f latin1 -t utf-8 OLD > NEW') from None

            if text:
                yield text
            if not block:
                return

            rest = data[used:]
            offset += used


def text_of_record(record, where):
    """The string under `text` in a parquet row or JSON line.

    where: the place to name in an error.
    """
    text = None
    if isinstance(record, dict):
        text = record.get('text')
    if type(text) is not str:
        raise UserError(f'{where} has no string under `text`: {str(record)[:60]}; correct or '
                        f'remove it')
    return text


def open_parquet(path: Path):
    """The pyarrow.parquet.ParquetFile at `path`.

    Raises UserError if the file is damaged or has no column `text`.
    """
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK)
        names = file.schema_arrow.names
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f'{path} is not a parquet file: {error}') from None

    if 'text' not in names:
        raise UserError(f'{path} has no column `text`, only {", ".join(names)}')
    return file


def read_parquet(path, start=0):
    """(row, text) of a parquet file's rows, from row number `start` on."""
    file = open_parquet(path)

    # leave out the row groups that end before `start`
    first = 0               # the number of the first row that is read
    groups = []
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if groups or first + rows > start:
            groups.append(number)
        else:
            first += rows

    batches = file.iter_batches(batch_size=256, row_groups=groups, columns=['text'])
    values = (value for batch in batches for value in batch.column('text'))
    row = first
    try:
        for row, value in enumerate(values, first):
            if row >= start:
                record = dict(text=value.as_py())
                yield row, text_of_record(record, f'{path}, row {row + 1:,}')
    except UnicodeDecodeError as error:     # no writer has to check its strings
        raise UserError(f'{path}, row {row + 1:,} is not UTF-8 at byte {error.start:,} of its '
                        f'text; correct or remove the row') from None
    except OSError as error:                # pyarrow raises it for a damaged page
        raise UserError(f'{path} is damaged: {error}; download it again') from None


def read_jsonl(path, start=0):
    """(byte, text) of a file of JSON lines: where each line begins. `start` is such a byte."""
    with open(path, 'rb') as file:
        file.seek(start)
        end = start
        for number, line in enumerate(file, 1):
            byte = end
            end += len(line)
            if not line.strip():
                continue

            where = f'{path}, line {number:,}'
            if start:                       # the lines before it are not counted
                where = f'{path}, byte {byte:,}'
            try:
                record = json.loads(line.decode('utf-8'))
            except UnicodeDecodeError as error:
                raise UserError(f'{where} is not UTF-8 at byte {byte + error.start:,} of the file; '
                                f'convert the file first') from None
            except (ValueError, RecursionError) as error:
                raise UserError(f'{where} is not JSON ({error}); it should be an object such '
                                f'as {{"text": "..."}}') from None
            yield byte, text_of_record(record, where)


def read_documents(path: Path, start: int = 0) -> Iterator[Document]:
    """The documents of a .jsonl, .parquet or .txt file, from position `start` on.

    A .txt is one document.
    """
    kind = path.suffix.lower()
    if kind == '.txt':
        if start == 0:
            yield Document(0, read_text(path))
        return

    reader = read_jsonl
    if kind == '.parquet':
        reader = read_parquet
    for position, text in reader(path, start):
        yield Document(position, [text])


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
    kind = path.suffix.lower()
    if kind == '.txt':
        return 1                                    # after its only document

    if kind == '.parquet':
        # as if all rows had the same size; rounded up with whole numbers, as floats are too short
        rows = open_parquet(path).metadata.num_rows
        return -(-rows * byte // size)

    # the line after the one that holds the byte before
    with open(path, 'rb') as file:
        file.seek(byte - 1)
        file.readline()
        return file.tell()


def count_documents(path: Path, bar) -> int:
    """The number of documents in a file.

    Only parquet stores it; other files are read through, which also checks them.
    bar: a tqdm bar, which counts the documents that are read.
    """
    if path.suffix.lower() == '.parquet':
        return open_parquet(path).metadata.num_rows

    documents = 0
    characters = 0
    for document in read_documents(path):
        documents += 1
        characters += sum(len(text) for text in document.texts)
        bar.update()

    if not characters:
        raise UserError(f'{path} is empty; --input= takes documents')
    return documents


# Tiny Shakespeare

def read_shakespeare(path: str, folder: Path) -> str:
    """The text of the file `path`.

    '' reads input.txt in `folder`, and downloads tiny Shakespeare to it if it is missing.
    """
    if not path:
        path = folder / 'input.txt'
        if not path.exists():
            download_shakespeare(path)
    if input_path(path).is_dir():
        raise UserError(f'{path} is a folder; --input= takes one text file here')

    text = ''.join(read_text(input_path(path)))
    if not text:
        raise UserError(f'{path} is empty; --input= takes a text file')
    return text


def download_shakespeare(path):
    """Download tiny Shakespeare to `path`, if what arrives is tiny Shakespeare."""
    part = path.with_name(path.name + '.part')
    download_file(SHAKESPEARE_URL, part, 'tiny Shakespeare')
    data = part.read_bytes()
    part.unlink()
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise RunError(f'{SHAKESPEARE_URL} sent {len(data):,} bytes that are not tiny Shakespeare; '
                       f'run again, or use --input=FILE if you have the file')
    with atomic_write(path, 'wb') as file:
        file.write(data)
