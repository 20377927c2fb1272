"""OpenWebText, or documents of your own, as tokens, each document followed by the end-of-text
token.

    python data/openwebtext/prepare.py                      # downloads 24 GB, writes 18 GB
    python data/openwebtext/prepare.py --input=docs.jsonl   # or .parquet, .csv, .txt, a folder

One document in 2,000 is held out. After a stop, the same command continues.
"""

import math
import sys
from itertools import islice
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import numpy as np
from tqdm import tqdm

import configurator
from engine.downloads import Download, download_files
from engine.errors import RunError, UserError
from engine.hf.tokenizer_json import document_spec
from engine.prepare import text_files
from engine.prepare.dataset_writer import Piece, dataset_writer
from engine.prepare.documents import DocumentFormat, find_document_files, read_documents
from engine.prepare.documents import count_documents as count_file
from engine.prepare.encode import CountingEncoder, document_pieces
from engine.tokenizer import Tokenizer

input = ''          # .parquet, .jsonl, .json or .csv with a document in each row, .txt as one
                    # document, or a folder of .parquet, .jsonl and .txt; '' downloads OpenWebText
                    # from the Hugging Face hub
field = 'text'      # the column of rows that has the text
encoding = ''       # how texts are encoded, such as cp1252; '' is UTF-8, or what the
                    # byte order mark of a file says
max_docs = 0        # how many documents to use, from the first on; 0 uses all
tokenizer = 'gpt2'  # gpt2, a folder with a tokenizer, such as one that export.py wrote, or a hub
                    # name
num_proc = 0        # how many cores encode, 0 for all; the result is the same

HUB = Download('OpenWebText', 'use --input=FOLDER if you have the parquet files',
               repository='Skylion007/openwebtext', is_dataset=True)
DOCUMENTS = 8_013_769           # in all of OpenWebText
DOCUMENTS_IN_A_FILE = 90_000    # at least: the hub has 80 files of about 100,000 documents each
VAL_FRACTION = 0.0005           # share of the documents that is held out
VAL_SEED = 2357                 # seed of their choice


def document_format():
    """What the settings say about files of documents."""
    return DocumentFormat(field, encoding or None)


def download():
    """The hub's parquet files, as many as max_docs needs. They stay in the hub's cache. After an
    interruption, only files that were not whole are downloaded again."""
    parts = ['*']
    if max_docs:
        parts = [f'{number:05}-*' for number in range(max_docs // DOCUMENTS_IN_A_FILE + 1)]
    patterns = [f'plain_text/train-{part}.parquet' for part in parts]
    folder = download_files(HUB, patterns)
    return text_files.find_files(folder, ('.parquet',))


def count_documents(files):
    """The number of documents in each file."""
    bar = tqdm(desc='counting', unit=' documents', unit_scale=True, delay=1, disable=None)
    with bar:
        form = document_format()
        counts = [count_file(path, bar, form) for path in files]

    # without a network the hub's client returns what its cache has
    expected = min(max_docs or DOCUMENTS, DOCUMENTS)
    if not input and sum(counts) < expected:
        raise RunError(f'the download has {sum(counts):,} of {expected:,} documents; go online and '
                       f'run again, or use it as it is: --input={files[0].parent}')
    return counts


def choose_val_documents(total):
    """The numbers of the documents in val.bin.

    They are those that train_test_split of `datasets` chooses with test_size=VAL_FRACTION,
    seed=VAL_SEED and shuffle=True.
    """
    order = np.random.default_rng(VAL_SEED).permutation(total)
    return set(order[:math.ceil(VAL_FRACTION * total)].tolist())


def read_pieces(files, counts, start, stop, val_documents, encoder):
    """The Pieces of the documents numbered start to stop. counts: how many each file has."""
    form = document_format()
    first = 0                               # the number of the file's first document
    for path, count in zip(files, counts):
        if start < first + count and first < stop:
            skip = max(start - first, 0)
            documents = islice(read_documents(path, form=form), skip, stop - first)
            for number, document in enumerate(documents, first + skip):
                split = 'val' if number in val_documents else 'train'
                for text, is_last in document_pieces(document.texts, encoder):
                    yield Piece(split, text, ends_document=is_last)
        first += count


def main():
    if max_docs < 0 or max_docs == 1:
        raise UserError(f'max_docs={max_docs} should be at least 2, one for train and one for val, '
                        f'or 0 for all')
    spec = document_spec(tokenizer)

    # the documents
    if input:
        files = find_document_files(input)
    else:
        Tokenizer(spec)     # one that cannot be loaded should fail before hours of downloading
        files = download()
    before = text_files.fingerprint(files)
    counts = count_documents(files)
    total = sum(counts)
    if max_docs:
        total = min(total, max_docs)
    if total < 2:
        raise UserError(f'train and val need a document each, and there is {total}; to split one '
                        f'text, run: python data/text/prepare.py --input={input or "PATH"}')
    val_documents = choose_val_documents(total)
    encoder = Tokenizer(spec)

    # A run that was stopped has written the first documents. It continues only where these three
    # are the same.
    digest = spec.tokenizer_sha256
    if digest is None:
        digest = 'gpt2'
    key = f'{before}, {total} documents, {digest}{document_format().key}'
    with dataset_writer(FOLDER, spec, key) as writer:
        start = writer.documents
        if start:
            print0(f'continuing after {start:,} of {total:,} documents')
        pieces = read_pieces(files, counts, start, total, val_documents, encoder)
        counting = CountingEncoder(encoder)
        writer.write(pieces, counting.encode, total, 'documents', num_proc)
        counting.finish()
        if text_files.fingerprint(files) != before:
            raise UserError(f'{input} changed while it was read; run again when nothing writes to '
                            f'it')
    print0(f'{total:,} documents, {len(val_documents):,} of them held out')
    print0('next: python train.py config/train_gpt2.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
