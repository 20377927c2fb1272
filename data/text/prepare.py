"""A dataset from text of your own: a UTF-8 file, or a folder of them, to data/NAME.

    python data/text/prepare.py --input=book.txt                        # to data/book
    python data/text/prepare.py --input=notes --name=diary --tokenizer=char --val_fraction=0.05

With GPT-2's tokens each file is a document, followed by <|endoftext|>.
"""

import sys
from decimal import Decimal
from itertools import groupby
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
import numpy as np
from tqdm import tqdm

import configurator
import textfiles
import tokenfiles

input = ''              # the file or folder; hidden files in a folder are left out
name = ''               # of the dataset, a folder in data/; '' is the input's own name without its ending
tokenizer = 'gpt2'      # 'gpt2': byte pair encoding, 50,257 tokens; 'char': the characters of the text
val_fraction = 0.1      # of all characters, the last ones, held out as val.bin
num_proc = 0            # cores that encode, 0 for all; the result is the same


def dataset_folder():
    chosen = name or Path(input).resolve().stem
    folder = FOLDER.parent / chosen
    if chosen.startswith('.') or Path(chosen).name != chosen or set(chosen) & set('\\/:\0'):
        raise ValueError(f'name={chosen!r} should be a plain folder name, such as --name=mytext')
    if (folder / 'prepare.py').exists() or folder.is_file():
        raise ValueError(f'name={chosen!r} is taken by {folder}; try --name=my_{chosen}')
    return folder


def survey(files):
    """The number of characters of each file, and all characters in use (none with 'gpt2')."""
    counts, seen = [], np.zeros(0x110000, bool)
    with tqdm(desc='reading', unit=' characters', unit_scale=True, delay=1) as bar:
        for path in files:
            counts.append(0)
            for text in textfiles.read_text(path):
                counts[-1] += len(text)
                if tokenizer == 'char':
                    seen[tokenfiles.code_points(text)] = True
                bar.update(len(text))
    return counts, [chr(code) for code in np.flatnonzero(seen)]


def divide(texts, cut):
    """(split, text) of a file's pieces, of which the first `cut` characters are to train on."""
    for text in texts:
        if cut > 0:
            yield 'train', text[:cut]
        if len(text) > cut:
            yield 'val', text[max(cut, 0):]
        cut -= len(text)


def pieces(files, counts, cut):
    """(split, text, whether <|endoftext|> follows) of all files, divided after `cut` characters."""
    for path, count in zip(files, counts):
        for split, parts in groupby(divide(textfiles.read_text(path), cut), key=lambda part: part[0]):
            texts = (text for _, text in parts)
            if tokenizer == 'gpt2':
                yield from ((split, text, last) for text, last in tokenfiles.safe_pieces(texts))
            else:
                yield from ((split, text, False) for text in texts)
        cut = max(cut - count, 0)


def main():
    if tokenizer not in ('gpt2', 'char'):
        raise ValueError(f'tokenizer={tokenizer!r} is unknown; try --tokenizer=gpt2 or --tokenizer=char')
    if not 0 < val_fraction < 1:
        raise ValueError(f'val_fraction={val_fraction} should be between 0 and 1; try --val_fraction=0.1')
    if not input:
        raise ValueError('which text? type --input=PATH, a UTF-8 file or a folder of them')
    folder = dataset_folder()
    files = textfiles.find_files(input)
    before = textfiles.fingerprint(files)
    counts, chars = survey(files)
    total = sum(counts)
    cut = int(total * (1 - Decimal(str(val_fraction))))     # exact: 0.93 of 100 is 93, not 92.99...
    if not 0 < cut < total:
        raise ValueError(f'{input} has {total:,} characters, and val_fraction={val_fraction} leaves '
                         f'{cut:,} to train on; --input= takes more text')
    described = tokenfiles.char_tokenizer(chars) if tokenizer == 'char' else tokenfiles.GPT2
    encode = tokenfiles.encoder(described)
    with tokenfiles.new_dataset(folder, described) as dataset:
        dataset.write(pieces(files, counts, cut), encode, total, cores=num_proc)
        if textfiles.fingerprint(files) != before:
            raise ValueError(f'{input} changed while it was read; run again once it is at rest')
    empty = counts.count(0)
    print(f'{len(files) - empty:,} files, {total:,} characters'
          + f'; {empty:,} empty files left out' * bool(empty))


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
