"""Text in: the files that a person names, read as UTF-8 in pieces, for the prepare scripts."""

import codecs
import hashlib
import http.client
import json
import os
import re
import urllib.request
from pathlib import Path

BLOCK = 1 << 18             # bytes read at once
DOCUMENTS = ('.parquet', '.jsonl', '.txt')      # endings of the files that documents() reads
SHAKESPEARE_URL = 'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt'
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


def find_files(path, endings=()):
    """The file `path`, or all files below the folder `path`, by name, without hidden ones.
    endings: those to take, such as ('.txt',); () takes every file."""
    path = Path(path).expanduser()
    if path.is_file():
        if endings and path.suffix.lower() not in endings:
            raise ValueError(f'{path} does not end in {" or ".join(endings)}; --input= takes such a '
                             f'file, or a folder of them')
        return [path]
    if not path.is_dir():
        raise ValueError(f'there is no file or folder {path}; --input= takes a path to text')
    names = sorted(file.relative_to(path).as_posix() for file in path.rglob('*') if file.is_file())
    taken = [name for name in names if not re.search(r'(^|/)\.', name)
             and (not endings or Path(name).suffix.lower() in endings)]
    if not taken:
        raise ValueError(f'the folder {path} holds no {" or ".join(endings) or "file"}; --input= '
                         f'takes one that does')
    if len(taken) < len(names):
        print(f'{path}: {len(taken):,} files; {len(names) - len(taken):,} hidden or of another kind left out')
    return [path / name for name in taken]


def fingerprint(files):
    """A hash that changes when any of the files does: their paths, sizes and times of change."""
    stats = [(str(path.resolve()), path.stat()) for path in files]
    known = [(name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def read_text(path):
    """The text of a UTF-8 file, as it stands, in pieces; ValueError names the byte that is not text."""
    rest, offset = b'', 0
    with open(path, 'rb') as file:
        while True:
            block = file.read(BLOCK)
            data = rest + block
            if b'\0' in data:
                raise ValueError(f'{path} is binary: byte {offset + data.index(0):,} is NUL; --input= '
                                 f'takes UTF-8 text')
            try:
                text, used = codecs.utf_8_decode(data, 'strict', not block)
            except UnicodeDecodeError as error:
                raise ValueError(f'{path} is not UTF-8: byte {offset + error.start:,} begins no character; '
                                 f'convert it first, as in: iconv -f latin1 -t utf-8 OLD > NEW') from None
            if text:
                yield text
            if not block:
                return
            rest, offset = data[used:], offset + used


def checked(record, where):
    """The document in a row or line, as the one piece of its text."""
    text = record.get('text') if isinstance(record, dict) else None
    if type(text) is not str:
        raise ValueError(f'{where} has no string under `text`: {str(record)[:60]}; mend it or leave it out')
    return [text]


def open_parquet(path):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=BLOCK)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f'{path} is not a parquet file: {error}') from None
    if 'text' not in file.schema_arrow.names:
        raise ValueError(f'{path} has no column `text`, only {", ".join(file.schema_arrow.names)}')
    return file


def documents(path):
    """Each document of a file, as an iterable of pieces of its text."""
    if path.suffix.lower() == '.txt':
        yield read_text(path)
    elif path.suffix.lower() == '.parquet':
        batches = open_parquet(path).iter_batches(batch_size=256, columns=['text'])
        records = (record for batch in batches for record in batch.to_pylist())
        try:
            for row, record in enumerate(records, 1):
                yield checked(record, f'{path}, row {row:,}')
        except OSError as error:            # what a damaged page raises
            raise ValueError(f'{path} is damaged: {error}; fetch it again') from None
    else:
        with open(path, 'rb') as file:
            for number, line in enumerate(file, 1):
                where = f'{path}, line {number:,}'
                if not line.strip():
                    continue
                try:
                    record = json.loads(line.decode('utf-8'))
                except UnicodeDecodeError as error:
                    byte = file.tell() - len(line) + error.start
                    raise ValueError(f'{where} is not UTF-8: byte {byte:,} of the file begins no '
                                     f'character; convert the file first') from None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f'{where} is not JSON ({error}); it should be an object such '
                                     f'as {{"text": "..."}}') from None
                yield checked(record, where)


def count_documents(path, bar):
    """The number of documents in a file; all but parquet is read through, and checked, for that."""
    if path.suffix.lower() == '.parquet':
        return open_parquet(path).metadata.num_rows
    number, characters = 0, 0
    for number, document in enumerate(documents(path), 1):
        characters += sum(len(text) for text in document)
        bar.update()
    if not characters:
        raise ValueError(f'{path} is empty; --input= takes documents')
    return number


def tiny_shakespeare(given, folder):
    """The text of the file `given`; without one, of input.txt in `folder`, downloaded once."""
    path = Path(given or folder / 'input.txt').expanduser()
    if not (given or path.exists()):
        download_shakespeare(path)
    if path.is_dir():
        raise ValueError(f'{path} is a folder; --input= takes one text file here')
    text = ''.join(read_text(find_files(path)[0]))
    if not text:
        raise ValueError(f'{path} is empty; --input= takes a text file')
    return text


def download_shakespeare(path):
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=30) as response:   # raises on status 400 up
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise RuntimeError(f'{SHAKESPEARE_URL} could not be downloaded ({error}); with the file at '
                           f'hand: --input=FILE') from None
    if hashlib.sha256(data).hexdigest() != SHAKESPEARE_SHA256:
        raise RuntimeError(f'{SHAKESPEARE_URL} sent {len(data):,} bytes that are not tiny '
                           f'Shakespeare; with the file at hand: --input=FILE')
    temporary = path.with_suffix('.part')
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
