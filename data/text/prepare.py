"""A dataset from text of your own: a UTF-8 file, or a folder of them, to data/NAME.

    python data/text/prepare.py book.txt                # to data/book
    python data/text/prepare.py notes --name=diary --tokenizer=char
    python data/text/prepare.py --input=notes --tokenizer=bpe --vocab_size=4096

Except with characters, each file is a document, followed by the tokenizer's end-of-text token.
"""

import shlex
import sys
from decimal import Decimal
from itertools import groupby
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import numpy as np
from tqdm import tqdm

import configurator
from engine.errors import UserError
from engine.hf.tokenizer_json import named_spec, train_bpe
from engine.prepare import text_files
from engine.prepare.dataset_writer import dataset_writer
from engine.prepare.encode import CountingEncoder, safe_pieces
from engine.tokenizer import MAX_VOCAB_SIZE, Tokenizer, char_spec, code_points

input = ''              # the file or folder to read; hidden files in a folder are skipped
name = ''               # name of the dataset, a folder in data/; '' uses the input's name without
                        # its ending
tokenizer = 'gpt2'      # 'gpt2': byte pair encoding, 50,257 tokens; 'char': the characters of the
                        # text; 'bpe': byte pair encoding trained on this text; or a folder with a
                        # tokenizer, a dataset's such as data/notes, or a hub name such as
                        # HuggingFaceTB/SmolLM2-135M
vocab_size = 4096       # how many tokens --tokenizer=bpe trains, at least 257
val_fraction = 0.1      # share of all characters, the last ones, that is held out as val.bin
num_proc = 0            # how many cores encode, 0 for all; the result is the same

LONGEST_NAME = 200      # bytes; a file system takes 255, and endings such as .tmp are added


# Settings

def chosen_spec():
    """The spec of the tokenizer that a setting names; None if it comes from the text."""
    if tokenizer in ('char', 'bpe'):
        return None
    spec = named_spec(tokenizer, '--tokenizer=char, --tokenizer=bpe, ')
    if spec.kind == 'char':
        raise UserError(f'{tokenizer} has a vocabulary of characters, which may lack those of this '
                        f'text; try --tokenizer=char')
    return spec


def check_settings():
    configurator.check_range(globals(), 'vocab_size', 257, MAX_VOCAB_SIZE)
    if not 0 < val_fraction < 1:
        raise UserError(f'val_fraction={val_fraction} should be between 0 and 1; try '
                        f'--val_fraction=0.1')
    if not input:
        raise UserError('no text is named; type python data/text/prepare.py PATH, the path of a '
                        'UTF-8 file or of a folder of them')


def dataset_folder():
    """The folder to write to."""
    chosen = name or text_files.input_path(input).resolve().stem
    folder = FOLDER.parent / chosen
    if not chosen or chosen.startswith('.') or set(chosen) & set('\\/:\0'):
        raise UserError(f'name={chosen!r} should be a plain folder name, such as --name=mytext')
    if len(chosen.encode()) > LONGEST_NAME:
        raise UserError(f'a name of {len(chosen)} letters is too long for a folder, such as '
                        f'--name={chosen[:10]}')
    if (folder / 'prepare.py').exists() or folder.is_file():
        raise UserError(f'name={chosen!r} is taken by {folder}; try --name=my_{chosen}')
    return folder


# Reading: once to count, and once more to encode

def count_characters(files):
    """The number of characters of each file, and with 'char' the set of all characters."""
    counts = []
    seen = np.zeros(0x110000, bool)         # which code points occur
    bar = tqdm(desc='reading', unit=' characters', unit_scale=True, delay=1, disable=None)
    with bar:
        for path in files:
            count = 0
            for text in text_files.read_text(path):
                count += len(text)
                if tokenizer == 'char':
                    seen[code_points(text)] = True
                bar.update(len(text))
            counts.append(count)
    return counts, {chr(code) for code in np.flatnonzero(seen)}


def train_characters(total):
    """How many of all characters train.bin gets."""
    share = 1 - Decimal(str(val_fraction))      # exact: 0.93 of 100 is 93, not 92.99...
    cut = int(total * share)
    if not 0 < cut < total:
        raise UserError(f'{input} has {total:,} characters, and val_fraction={val_fraction} leaves '
                        f'{cut:,} to train on; --input= takes more text')
    return cut


def split_at(texts, cut):
    """(split, text) of a file's pieces: the first `cut` characters are 'train', the rest 'val'."""
    for text in texts:
        if cut > 0:
            yield 'train', text[:cut]
        if len(text) > cut:
            yield 'val', text[max(cut, 0):]
        cut -= len(text)


def read_splits(files, counts, cut):
    """(split, texts of one document) of all files. The first `cut` characters of them all are
    'train'."""
    for path, count in zip(files, counts):
        parts = split_at(text_files.read_text(path), cut)
        for split, group in groupby(parts, key=lambda part: part[0]):
            yield split, (text for _, text in group)
        cut = max(cut - count, 0)


def read_pieces(documents, encoder):
    """(split, text, False) of all documents, as the writer takes them.

    encode() adds the end of a document: to a text that is one, or for an empty text.
    """
    for split, texts in documents:
        if encoder.chars:
            for text in texts:
                yield split, text, False
        elif encoder.splits_like_gpt2:
            for text, _ in safe_pieces(texts):
                if text:
                    yield split, text, False
            yield split, '', False
        else:
            yield split, ''.join(texts), False


def train_tokenizer(documents, total):
    """The spec of a byte-level BPE tokenizer, trained on the text of train.bin: `total` characters
    of `documents`."""
    bar = tqdm(desc='training the tokenizer', total=total, unit=' characters', unit_scale=True,
               delay=1, disable=None)

    def train_texts():
        for split, texts in documents:
            if split == 'train':
                for text, _ in safe_pieces(texts):
                    yield text
                    bar.update(len(text))

    with bar:
        spec = train_bpe(train_texts(), vocab_size)
    if spec.vocab_size < vocab_size:
        print0(f'note: the text has pairs for {spec.vocab_size:,} tokens, not for '
               f'{vocab_size:,}')
    return spec


def next_command(dataset):
    """The command that trains on the dataset, for a shell."""
    options = [f'--dataset={dataset}', f'--out_dir=out-{dataset}']
    if tokenizer == 'char':
        return shlex.join(['python', 'train.py', 'config/train_stdlib_char.py', *options])
    return shlex.join(['python', 'train.py', 'config/train_gpt2.py', *options,
                       '--wandb_log=False'])


def main():
    spec = chosen_spec()            # a name that leads nowhere fails before the text is read
    check_settings()
    folder = dataset_folder()

    # read and count
    files = text_files.find_files(input, log_skipped=True)
    before = text_files.fingerprint(files)
    counts, chars = count_characters(files)
    total = sum(counts)
    cut = train_characters(total)

    # the tokenizer
    if tokenizer == 'bpe':
        spec = train_tokenizer(read_splits(files, counts, cut), cut)
    elif tokenizer == 'char':
        spec = char_spec(chars)
    encoder = Tokenizer(spec)
    counting = CountingEncoder(encoder)

    def encode(text):
        is_end = not text or not encoder.splits_like_gpt2
        return counting.encode(text, as_document=is_end)

    # encode and write
    with dataset_writer(folder, encoder.spec) as writer:
        pieces = read_pieces(read_splits(files, counts, cut), encoder)
        writer.write(pieces, encode, total, cores=num_proc)
        counting.finish()
        if text_files.fingerprint(files) != before:
            raise UserError(f'{input} changed while it was read; run again when nothing writes to '
                            f'it')
    print0(f'files: {len(files):,}, of them empty: {counts.count(0):,}; characters: {total:,}')
    print0(f'next: {next_command(folder.name)}')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
