"""enwik8 or text8, 100 million bytes of Wikipedia, one token per byte.

    python data/enwik8/prepare.py                   # downloads enwik8 once
    python data/enwik8/prepare.py --name=text8      # the same for text8, into data/text8
    python data/enwik8/prepare.py --input=FILE      # enwik8, or enwik8.zip, or any file of bytes

The published split: the first 90 million bytes to train on, then 5 million to validate, then
5 million to test.
"""

import hashlib
import io
import sys
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
from engine.prepare.web_file import download_file
from engine.tokenizer import Tokenizer, char_spec

name = 'enwik8'     # enwik8, or text8, which has only lower case letters and spaces
input = ''          # the file, perhaps zipped; '' downloads it and keeps it as input.txt
val = 'val'         # what val.bin holds: val, the published validation text, or test

SIZE = 100_000_000          # bytes of either text
BLOCK = 1 << 18             # bytes encoded at once
URL = 'https://mattmahoney.net/dc/{}.zip'
SHA256 = dict(enwik8='2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8',
              text8='6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7')


def unzip(data, path):
    """The only file in a zip archive, or `data` itself if it is none. path: for an error."""
    if data[:4] != b'PK\3\4':
        return data
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entry, = archive.infolist()
            if entry.file_size > 10 * SIZE:
                raise UserError(f'{path} would unzip to {entry.file_size:,} bytes; --input= takes '
                                f'enwik8 or text8')
            return archive.read(entry)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError) as error:
        raise UserError(f'{path} is not a zip archive of one file ({error}); '
                        f'unzip it yourself') from None


def download(path):
    """Download the zip archive of `name` and keep what it holds as `path`."""
    url = URL.format(name)
    part = path.with_name(f'{name}.zip.part')
    download_file(url, part, name)

    # another file is removed, so that the next run does not continue it
    archive = part.read_bytes()
    part.unlink()
    data = unzip(archive, url)
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        raise RunError(f'{url} sent {len(data):,} bytes that are not {name}; run again, or use '
                       f'--input=FILE if you have the file')
    with atomic_write(path, 'wb') as file:
        file.write(data)


def read_input(folder):
    """The bytes of the text."""
    if not input and not (folder / 'input.txt').exists():
        download(folder / 'input.txt')
    files = find_files(input or folder / 'input.txt')
    if len(files) > 1:
        raise UserError(f'{input} is a folder; --input= takes one file here')

    data = unzip(files[0].read_bytes(), files[0])
    if hashlib.sha256(data).hexdigest() != SHA256[name]:
        print0(f'note: {files[0]} has {len(data):,} bytes and is not the published {name}; '
               f'it is split 90:5:5')
    return data


def split_pieces(data, split, begin, end):
    """(split, text, False) of data[begin:end], a block at a time.

    A byte is the character with its number, as in Latin-1. So the tokenizer for characters serves.
    """
    for start in range(begin, end, BLOCK):
        block = data[start:min(start + BLOCK, end)]
        yield split, block.decode('latin-1'), False


def main():
    check_choice(globals(), 'name', tuple(SHA256))
    check_choice(globals(), 'val', ('val', 'test'))
    folder = FOLDER.parent / name
    data = read_input(folder)

    # where the three texts end
    train_end, val_end, test_end = (len(data) * share // 100 for share in (90, 95, 100))
    if val == 'val':
        held_out = (train_end, val_end)
    else:
        held_out = (val_end, test_end)

    def pieces():
        yield from split_pieces(data, 'train', 0, train_end)
        yield from split_pieces(data, 'val', *held_out)

    spec = char_spec(set(map(chr, range(256))))
    total = train_end + held_out[1] - held_out[0]
    with dataset_writer(folder, spec) as writer:
        writer.write(pieces(), Tokenizer(spec).encode_to_numpy, total)
    print0(f'next: python train.py config/train_enwik8.py --dataset={name} --out_dir=out-{name}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
