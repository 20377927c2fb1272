"""Finds files for the prepare scripts, and reads the text of one in pieces."""

import codecs
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError
from engine.log import log
from engine.prepare.text_encoding import LONGEST_MARK, excerpt, find_mark, guess_encoding
from engine.prepare.web_file import download_file

BLOCK = 1 << 18             # bytes read at once
UTF8_MARK = codecs.BOM_UTF8

# How to read a text in another encoding, for scripts without and with the setting
CONVERT = 'convert it first, as in: iconv -f {} -t utf-8 OLD > NEW'
NAME_ENCODING = 'add --encoding={}'
SHAKESPEARE_URL = (
    'https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt')
SHAKESPEARE_SHA256 = '86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed'


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

    if endings and not path.name.lower().endswith(endings):
        raise UserError(f'{path} does not end in {" or ".join(endings)}; --input= takes such a '
                        f'file, or a folder of them')
    return [path]


def find_files_below(folder, endings, log_skipped):
    """The files of a folder, as find_files returns them."""
    def is_accepted(name):
        if re.search(r'(^|/)\.', name):                 # the file or a folder above it is hidden
            return False
        if endings and not name.lower().endswith(endings):
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
    """The text of a UTF-8 file in pieces, as read_source. It may have a byte order mark."""
    with open(path, 'rb') as file:
        yield from decode_file(file, str(path), 'utf-8', CONVERT)


def read_source(source) -> Iterator[str]:
    """Yield the text of a Source (kinds.py), unchanged, in pieces.

    A byte order mark decides which encoding the text has, and is left out of the text. Raises
    UserError for a byte that is not text.
    """
    with source.open() as file:
        yield from decode_file(file, str(source), source.encoding, NAME_ENCODING)


def decode_file(file, name, encoding, advice):
    """The text of an open file in pieces. advice: a text that says how to read `encoding`."""
    head = file.read(LONGEST_MARK)
    mark, marked = find_mark(head)
    if marked:
        encoding = marked
    decoder = codecs.getincrementaldecoder(encoding)()
    may_have_nul = encoding != 'utf-8'      # until it is decoded
    data = head[len(mark):] + file.read(BLOCK)
    offset = len(mark)          # where `data` begins in the file

    while True:
        if not may_have_nul and b'\0' in data:
            raise UserError(f'{name} is binary: byte {offset + data.index(0):,} is NUL; '
                            f'--input= takes text')

        cut = len(decoder.getstate()[0])    # bytes of a character that the last block cut
        is_end = not data
        try:
            text = decoder.decode(data, is_end)
        except UnicodeDecodeError as error:
            byte = offset - cut + error.start
            raise wrong_encoding(name, encoding, byte, error.object, advice) from None

        if '\0' in text:
            raise UserError(f'{name} is binary: it has the character NUL; --input= takes text')
        if text:
            yield text
        if is_end:
            return
        offset += len(data)
        data = file.read(BLOCK)


def wrong_encoding(name, encoding, byte, sample, advice):
    """The UserError for a text that is not in its encoding. sample: bytes of the text."""
    if encoding == 'utf-8':
        encoding = 'UTF-8'
    found = guess_encoding(sample[sample.find(b'\n') + 1:]) or guess_encoding(sample)
    if found:
        return UserError(f'{name} is not {encoding} at byte {byte:,}, but {found}, in which it '
                         f'reads "{excerpt(sample, found)}"; {advice.format(found)}')
    return UserError(f'{name} is not {encoding} at byte {byte:,}, and its encoding is unknown; '
                     f'{advice.format("ENCODING")}')


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
