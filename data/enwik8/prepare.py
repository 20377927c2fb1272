"""enwik8 or text8, 100 million bytes of Wikipedia, one token per byte.

    python data/enwik8/prepare.py                           # downloads enwik8 once
    python data/enwik8/prepare.py --name=text8              # the same for text8, into data/text8
    python data/enwik8/prepare.py --input=FILE              # reads enwik8, or enwik8.zip, or any other file of bytes

The published split: the first 90 million bytes to train on, then 5 million to validate, then 5 million to test.
"""

import hashlib
import http.client
import io
import sys
import urllib.request
import zipfile
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError, check_choice
from engine.prepare.dataset_writer import dataset_writer
from engine.prepare.text_files import find_files
from engine.tokenizer import Tokenizer, char_spec

name = 'enwik8'     # enwik8, or text8 with only lower case letters and spaces
input = ''          # the file, perhaps zipped; '' downloads it and keeps it as input.txt
val = 'val'         # what val.bin holds: val, the published validation text, or test

SIZE, BLOCK = 100_000_000, 1 << 18
URL = 'https://mattmahoney.net/dc/{}.zip'
SHA256 = dict(enwik8='2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8',
              text8='6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7')


def unzip(data, path):
    """The only file in a zip archive, or `data` itself where it is none. `path`: to name in an error."""
    if data[:4] != b'PK\3\4':
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entry, = archive.infolist()
            if entry.file_size > 10 * SIZE:
                raise UserError(f'{path} would unzip to {entry.file_size:,} bytes; --input= takes enwik8 or text8')
            return archive.read(entry)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f'{path} is not a zip archive of one file ({error}); unzip it yourself') from None


def download(path):
    """Download the zip archive of `name` and keep what it holds as `path`."""
    url = URL.format(name)
    try:
        with urllib.request.urlopen(url, timeout=30) as response:       # raises for status 400 and up
            data = unzip(response.read(), url)
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f'cannot download {url} ({error}); if you have the file, use --input=FILE') from None
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise RunError(f'{url} sent {len(data):,} bytes that are not {name}; if you have the file, use --input=FILE')
    path.parent.mkdir(exist_ok=True)
    with atomic_write(path, 'wb') as file:
        file.write(data)


def main():
    check_choice(globals(), 'name', tuple(SHA256))
    check_choice(globals(), 'val', ('val', 'test'))
    folder = FOLDER.parent / name
    if not input and not (folder / 'input.txt').exists():
        download(folder / 'input.txt')
    files = find_files(input or folder / 'input.txt')
    if len(files) > 1:
        raise UserError(f'{input} is a folder; --input= takes one file here')
    data = unzip(files[0].read_bytes(), files[0])
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        print0(f'note: {files[0]} has {len(data):,} bytes and is not the published {name}; it is split 90:5:5')
    ends = [len(data) * share // 100 for share in (90, 95, 100)]
    first, last = (ends[0], ends[1]) if val == 'val' else (ends[1], ends[2])
    # A byte is the character with its number, as in Latin-1. So the tokenizer for characters serves.
    spec = char_spec(set(map(chr, range(256))))
    pieces = [('train', start, min(start + BLOCK, ends[0])) for start in range(0, ends[0], BLOCK)]
    pieces += [('val', start, min(start + BLOCK, last)) for start in range(first, last, BLOCK)]
    with dataset_writer(folder, spec, print0) as writer:
        writer.write(((split, data[start:end].decode('latin-1'), False) for split, start, end in pieces),
                     Tokenizer(spec).encode_to_numpy, ends[0] + last - first)
    print0(f'next: python train.py config/train_enwik8.py --dataset={name} --out_dir=out-{name}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
