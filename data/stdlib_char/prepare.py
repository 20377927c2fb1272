"""The source code of Python's standard library as characters: a dataset that needs no download.

    python data/stdlib_char/prepare.py

The text comes from the Python that runs this script, so another version gives another text.
"""

import hashlib
import re
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from engine.errors import UserError
from engine.prepare.dataset_writer import dataset_writer
from engine.tokenizer import Tokenizer, char_spec

max_bytes = 2_000_000   # bytes of source code to use
val_fraction = 0.1      # share of those bytes that is held out, as whole files

# Packages of others, tests, and generated code: its tables differ little from file to file, and
# would make the validation loss look better than it is.
EXCLUDED = re.compile(r'(^|/)(site-packages|dist-packages|tests?|idlelib|turtledemo|lib2to3|'
                      r'ensurepip|encodings|pydoc_data|_sysconfigdata[^/]*|config-[^/]*)(/|$)')


def read_sources(root):
    """The text of each ASCII source file below `root`.

    The order is fixed and mixes the packages, so the last files, which are held out, resemble the
    others.
    """
    names = [path.relative_to(root).as_posix() for path in root.rglob('*.py')]
    names = [name for name in names if not EXCLUDED.search(name)]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        data = (root / name).read_bytes().replace(b'\r\n', b'\n')
        if data.strip() and data.isascii() and b'\0' not in data:
            yield data.decode('ascii')


def take_sources(root):
    """The texts of the first source files below `root`, at most max_bytes together."""
    texts = []
    size = 0
    for text in read_sources(root):
        size += len(text)
        if size > max_bytes:
            break
        texts.append(text)
    return texts


def count_train_files(texts):
    """How many of `texts` are to train on: all but the last ones, which have val_fraction of the
    bytes or a little more."""
    size = sum(len(text) for text in texts)
    train_files = len(texts)
    val_size = 0
    while train_files and val_size < val_fraction * size:
        train_files -= 1
        val_size += len(texts[train_files])
    return train_files


def main():
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} should be between 0 and 1, such as 0.1')
    root = Path(sysconfig.get_path('stdlib'))
    texts = take_sources(root)
    size = sum(len(text) for text in texts)

    train_files = count_train_files(texts)
    if not train_files:
        raise UserError(f'{len(texts)} source files from {root}, {size:,} bytes, are too few for '
                        f'train and val; try a larger --max_bytes, such as the default, 2_000_000')
    train = ''.join(texts[:train_files])
    val = ''.join(texts[train_files:])

    spec = char_spec(set(train + val))
    pieces = [('train', train, False), ('val', val, False)]
    with dataset_writer(FOLDER, spec) as writer:
        writer.write(pieces, Tokenizer(spec).encode_to_numpy, total=size)
    print0(f'{train_files} files to train on, {len(texts) - train_files} held out; '
           f'Python {sys.version.split()[0]}')
    print0('next: python train.py config/train_stdlib_char.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
