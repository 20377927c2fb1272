"""Source code of Python's standard library as characters: a dataset that needs no download.

    python data/stdlib_char/prepare.py

The text is that of the Python that runs this script, so another version gives another text.
"""

import hashlib
import re
import sys
import sysconfig
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
import configurator
import tokenfiles

max_bytes = 2_000_000   # of source to take
val_fraction = 0.1      # of those bytes, in whole files, held out

# Others' packages, tests, and code that a program wrote: tables that differ little from file to
# file would make the held-out loss look better than it is.
LEFT_OUT = re.compile(r'(^|/)(site-packages|dist-packages|tests?|idlelib|turtledemo|lib2to3|ensurepip|'
                      r'encodings|pydoc_data|_sysconfigdata[^/]*|config-[^/]*)(/|$)')


def sources(root):
    """The ASCII source files below `root`, in an order that is fixed and mixes the packages, so that
    the held-out files, the last ones, are of the same kinds as the others."""
    names = [path.relative_to(root).as_posix() for path in root.rglob('*.py')]
    names = [name for name in names if not LEFT_OUT.search(name)]
    for name in sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest()):
        data = (root / name).read_bytes().replace(b'\r\n', b'\n')
        if data.strip() and data.isascii() and b'\0' not in data:
            yield data.decode('ascii')


def main():
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} should be between 0 and 1, such as 0.1')
    root, texts, size = Path(sysconfig.get_path('stdlib')), [], 0
    for text in sources(root):
        if size + len(text) > max_bytes:
            break
        texts.append(text)
        size += len(text)
    first, held = len(texts), 0             # texts[first:] are held out
    while first and held < val_fraction * size:
        first -= 1
        held += len(texts[first])
    if not first:
        raise ValueError(f'{len(texts)} source files from {root}, {size:,} bytes, cannot be divided; '
                         f'try a larger --max_bytes, such as the default, 2_000_000')
    tokenizer = tokenfiles.char_tokenizer(set(''.join(texts)))
    with tokenfiles.new_dataset(FOLDER, tokenizer) as dataset:
        dataset.write([('train', ''.join(texts[:first]), False), ('val', ''.join(texts[first:]), False)],
                      tokenfiles.encoder(tokenizer), size)
    print(f'{first} files to train on, {len(texts) - first} held out; Python {sys.version.split()[0]}')


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
