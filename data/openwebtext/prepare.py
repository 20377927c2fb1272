"""OpenWebText, or documents of your own, as GPT-2 tokens, each document followed by <|endoftext|>.

    python data/openwebtext/prepare.py                          # downloads 24 GB, writes 18 GB
    python data/openwebtext/prepare.py --input=docs.jsonl       # or .parquet, .txt, a folder of them

One document in 2,000 is held out. A run that was stopped continues with the same command.
"""

import math
import sys
from itertools import islice
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
import numpy as np
from tqdm import tqdm

import configurator
import textfiles
import tokenfiles

input = ''          # .parquet or .jsonl with a field `text`, .txt as one document, or a folder of
                    # them; '' takes OpenWebText from the Hugging Face hub
max_docs = 0        # documents to take, the first ones; 0 takes all
num_proc = 0        # cores that encode, 0 for all; the result is the same

DOCUMENTS = 8_013_769               # in all of OpenWebText
VAL_FRACTION, VAL_SEED = 0.0005, 2357


def download():
    """The hub's parquet files, as many as max_docs needs. They stay in the hub's own cache, and a
    download that was cut short goes on from there."""
    wanted = [f'{number:05}-*' for number in range(max_docs // 90_000 + 1)] if max_docs else ['*']
    try:                            # 80 files of 100,000 documents each
        from huggingface_hub import snapshot_download
        folder = snapshot_download('Skylion007/openwebtext', repo_type='dataset',
                                   allow_patterns=[f'plain_text/train-{part}.parquet' for part in wanted])
        return textfiles.find_files(folder, ('.parquet',))
    except Exception as error:      # the client raises what it likes
        raise RuntimeError(f'OpenWebText could not be downloaded ({type(error).__name__}: '
                           f'{str(error)[:200]}); with parquet files at hand: --input=FOLDER') from None


def pieces(files, counts, start, stop, held_out):
    """(split, text, whether <|endoftext|> follows) of the documents numbered start to stop."""
    first = 0                               # the number of the file's first document
    for path, length in zip(files, counts):
        if start < first + length and first < stop:
            skip = max(start - first, 0)
            chosen = islice(textfiles.documents(path), skip, stop - first)
            for number, document in enumerate(chosen, first + skip):
                split = 'val' if number in held_out else 'train'
                yield from ((split, text, last) for text, last in tokenfiles.safe_pieces(document))
        first += length


def hold_out(total):
    """The numbers of the documents in val.bin: those that train_test_split of the library `datasets`
    chooses, with test_size=VAL_FRACTION, seed=VAL_SEED and shuffle=True."""
    order = np.random.default_rng(VAL_SEED).permutation(total)
    return set(order[:math.ceil(VAL_FRACTION * total)].tolist())


def main():
    if max_docs < 0 or max_docs == 1:
        raise ValueError(f'max_docs={max_docs} should be at least 2, one for train and one for val, or '
                         f'0 for all')
    files = textfiles.find_files(input, textfiles.DOCUMENTS) if input else download()
    before = textfiles.fingerprint(files)
    with tqdm(desc='counting', unit=' documents', unit_scale=True, delay=1) as bar:
        counts = [textfiles.count_documents(path, bar) for path in files]
    if not input and sum(counts) < min(max_docs or DOCUMENTS, DOCUMENTS):
        raise RuntimeError(f'the download has {sum(counts):,} documents of the {max_docs or DOCUMENTS:,} '
                           f'wanted; go online and run again, or use it as it is: --input={files[0].parent}')
    total = min(sum(counts), max_docs or sum(counts))
    if total < 2:
        raise ValueError(f'{total} document cannot be divided into train and val; for one text there '
                         f'is: python data/text/prepare.py --input={input or "PATH"}')
    held_out, encode = hold_out(total), tokenfiles.encoder(tokenfiles.GPT2)
    with tokenfiles.new_dataset(FOLDER, tokenfiles.GPT2, key=f'{before}, {total} documents') as dataset:
        if dataset.documents:
            print(f'going on after {dataset.documents:,} of {total:,} documents')
        dataset.write(pieces(files, counts, dataset.documents, total, held_out),
                      encode, total, 'documents', num_proc)
        if textfiles.fingerprint(files) != before:
            raise ValueError(f'{input} changed while it was read; run again once it is at rest')
    print(f'{total:,} documents, {len(held_out):,} of them held out')


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
