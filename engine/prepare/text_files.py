"""Reading text for the prepare scripts: UTF-8, JSON lines and parquet files, in pieces."""

import codecs
import hashlib
import http.client
import json
import os
import re
import urllib.request
from pathlib import Path

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError

BLOCK = 1 << 18             # bytes read at once
DOCUMENT_ENDINGS = ('.parquet', '.jsonl', '.txt')       # files that read_documents() can read
SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def input_path(path):
    """`path` as a Path, if it is a file or a folder. Raises UserError otherwise."""
    path = Path(os.path.expanduser(path))
    if path.is_file() or path.is_dir():
        return path
    if path.exists():
        raise UserError(f'{path} is a pipe or a device; save the text in a file and pass that with --input=')
    raise UserError(f'there is no file or folder {path}; --input= takes a path to text')


def find_files(path, endings=(), print_line=None):
    """The file `path`, or all files below the folder `path`, sorted by path, without hidden ones.

    endings: the file name endings to accept, such as ('.txt',); () accepts every file.
    print_line: called with a line that counts the files that were skipped.
    """
    path = input_path(path)
    if path.is_file():
        if endings and path.suffix.lower() not in endings:
            raise UserError(f'{path} does not end in {" or ".join(endings)}; --input= takes such a '
                            f'file, or a folder of them')
        return [path]
    entries = [entry for entry in path.rglob('*') if entry.is_symlink() or not entry.is_dir()]
    names = sorted(entry.relative_to(path).as_posix() for entry in entries)
    accepted = [name for name in names if not re.search(r'(^|/)\.', name) and (path / name).is_file()
                and (not endings or Path(name).suffix.lower() in endings)]
    if not accepted:
        raise UserError(f'the folder {path} holds no {" or ".join(endings) or "file"}; --input= '
                        f'takes a folder that does')
    if print_line and len(accepted) < len(names):
        print_line(f'{path}: reading {len(accepted):,} files, skipping {len(names) - len(accepted):,} that are '
            f'hidden or of another type')
    return [path / name for name in accepted]


def fingerprint(files):
    """A hash that changes when any of the files does: their paths, sizes and times of change."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    facts = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def read_text(path):
    """The text of a UTF-8 file, unchanged, in pieces. UserError names the byte that is not text."""
    rest, offset = b'', 0
    with open(path, 'rb') as file:
        while True:
            block = file.read(BLOCK)
            data = rest + block
            if b'\0' in data:
                raise UserError(f'{path} is binary: byte {offset + data.index(0):,} is NUL; --input= '
                                f'takes UTF-8 text')
            try:
                text, used = codecs.utf_8_decode(data, 'strict', not block)
            except UnicodeDecodeError as error:
                raise UserError(f'{path} is not UTF-8 at byte {offset + error.start:,}; '
                                f'convert it first, as in: iconv -f latin1 -t utf-8 OLD > NEW') from None
            if text:
                yield text
            if not block:
                return
            rest, offset = data[used:], offset + used


def text_of_record(record, where):
    """The string under `text` in a parquet row or JSON line. where: the place to name in an error."""
    text = record.get('text') if isinstance(record, dict) else None
    if type(text) is not str:
        raise UserError(f'{where} has no string under `text`: {str(record)[:60]}; correct or remove it')
    return text


def open_parquet(path):
    """The parquet file at `path`. Raises UserError if it is damaged or has no column `text`."""
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f'{path} is not a parquet file: {error}') from None
    if 'text' not in file.schema_arrow.names:
        raise UserError(f'{path} has no column `text`, only {", ".join(file.schema_arrow.names)}')
    return file


def read_parquet(path, start=0):
    """(row, text) of a parquet file's rows, from row number `start` on."""
    file, first, groups = open_parquet(path), 0, []
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if groups or first + rows > start:
            groups.append(number)
        else:
            first += rows                   # the row group ends before `start`
    batches = file.iter_batches(batch_size=256, row_groups=groups, columns=['text'])
    records = (record for batch in batches for record in batch.to_pylist())
    try:
        for row, record in enumerate(records, first):
            if row >= start:
                yield row, text_of_record(record, f'{path}, row {row + 1:,}')
    except OSError as error:                # pyarrow raises it for a damaged page
        raise UserError(f'{path} is damaged: {error}; download it again') from None


def read_jsonl(path, start=0):
    """(byte, text) of a file of JSON lines: where each line begins. `start` is such a byte."""
    with open(path, 'rb') as file:
        file.seek(start)
        end = start
        for number, line in enumerate(file, 1):
            byte, end = end, end + len(line)
            where = f'{path}, byte {byte:,}' if start else f'{path}, line {number:,}'
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode('utf-8'))
            except UnicodeDecodeError as error:
                raise UserError(f'{where} is not UTF-8 at byte {byte + error.start:,} of the file; convert the file '
                                f'first') from None
            except (ValueError, RecursionError) as error:
                raise UserError(f'{where} is not JSON ({error}); it should be an object such '
                                f'as {{"text": "..."}}') from None
            yield byte, text_of_record(record, where)


def read_documents(path, start=0):
    """(position, document) of each document of a file, from position `start` on. A document is an iterable of pieces
    of its text. Positions are bytes of .jsonl, rows of .parquet, and 0 in .txt, which is one document."""
    if path.suffix.lower() == '.txt':
        yield from [(0, read_text(path))] if start == 0 else []
    else:
        reader = read_parquet if path.suffix.lower() == '.parquet' else read_jsonl
        yield from ((position, [text]) for position, text in reader(path, start))


def split_position(files, part, parts):
    """(number of a file, position in it) where part number `part` of `parts` begins: a share of the files' bytes.

    The same files give the same positions everywhere, and only metadata and one line are read.
    """
    sizes = [path.stat().st_size for path in files]
    byte = sum(sizes) * part // parts
    for number, (path, size) in enumerate(zip(files, sizes)):
        if byte < size:
            return number, document_position(path, byte, size) if byte else 0
        byte -= size
    return len(files), 0


def document_position(path, byte, size):
    """The position of the first document of a file that begins at `byte` of its `size` or later."""
    if path.suffix.lower() == '.parquet':           # as if all rows had the same size
        return -(-open_parquet(path).metadata.num_rows * byte // size)
    if path.suffix.lower() == '.txt':
        return 1                                    # after its only document
    with open(path, 'rb') as file:
        file.seek(byte - 1)
        file.readline()
        return file.tell()


def count_documents(path, bar):
    """The number of documents in a file. Only parquet stores it; other files are read through,
    which also checks them. bar: a progress bar in documents."""
    if path.suffix.lower() == '.parquet':
        return open_parquet(path).metadata.num_rows
    number, characters = 0, 0
    for number, (_, document) in enumerate(read_documents(path), 1):
        characters += sum(len(text) for text in document)
        bar.update()
    if not characters:
        raise UserError(f'{path} is empty; --input= takes documents')
    return number


def read_shakespeare(path, folder):
    """The text of the file `path`. '' reads input.txt in `folder`, and downloads it if it is missing."""
    if not path:
        path = folder / 'input.txt'
        if not path.exists():
            download_shakespeare(path)
    if input_path(path).is_dir():
        raise UserError(f'{path} is a folder; --input= takes one text file here')
    text = ''.join(read_text(find_files(path)[0]))
    if not text:
        raise UserError(f'{path} is empty; --input= takes a text file')
    return text


def download_shakespeare(path):
    """Download tiny Shakespeare to `path`, if what arrives is tiny Shakespeare."""
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:   # raises for status 400 and up
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f'cannot download {SHAKESPEARE_URL} ({error}); if you have the file, use '
                       f'--input=FILE') from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise RunError(f'{SHAKESPEARE_URL} sent {len(data):,} bytes that are not tiny Shakespeare; '
                       f'if you have the file, use --input=FILE')
    with atomic_write(path, 'wb') as file:
        file.write(data)
