"""FineWeb-Edu, or documents of your own, as shards of tokens, with an end-of-text token before each
document.

    python data/fineweb_edu/prepare.py                 # sample-10BT: 10 billion tokens, 20 GB
    python data/fineweb_edu/prepare.py --input=docs    # .parquet, .jsonl, .txt, a folder of them
    python data/fineweb_edu/prepare.py --part=0/4      # a quarter of the work; see the readme

The first shard is held out. After a stop, the same command continues at the shard that it was
writing.
"""

import re
import sys
import time
from functools import partial
from pathlib import Path, PurePosixPath
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from engine.downloads import Download, download_files, try_three_times
from engine.errors import RunError, UserError
from engine.hf.tokenizer_json import document_spec
from engine.prepare import text_files
from engine.prepare.documents import (
    DocumentFormat,
    Position,
    count_rows,
    files_of_part,
    find_document_files,
    read_documents,
    split_position,
)
from engine.prepare.encode import CountingEncoder, document_pieces
from engine.prepare.shard_writer import DocumentPiece, ShardWriter
from engine.tokenizer import Tokenizer

input = ''                      # .parquet, .jsonl, .json or .csv with a document in each row, .txt
                                # as one document, or a folder of .parquet, .jsonl and .txt; ''
                                # downloads FineWeb-Edu from the Hugging Face hub
field = 'text'                  # the column of rows that has the text
encoding = ''                   # how texts are encoded, such as cp1252; '' is UTF-8, or what the
                                # byte order mark of a file says
sample = 'sample-10BT'          # sample-10BT, sample-100BT, sample-350BT, a crawl such as
                                # CC-MAIN-2024-10, or all
tokenizer = 'gpt2'              # gpt2, a folder with a tokenizer, such as one that export.py wrote,
                                # or a hub name
shard_tokens = 100_000_000      # how many tokens a shard has; the last one may be shorter
part = '0/1'                    # i/n does one of n equal parts of the work, and the last part to
                                # finish publishes
num_proc = 0                    # how many cores encode, 0 for all; the result is the same

HUB = Download('FineWeb-Edu', 'use --input=FOLDER if you have the parquet files',
               repository='HuggingFaceFW/fineweb-edu', is_dataset=True)
DOCUMENTS = 9_670_000           # in sample-10BT, about: the hub shows 9.67M rows


def parse_part():
    """(number of this part, number of all parts)"""
    match = re.fullmatch(r'(\d{1,6})/(\d{1,6})', part)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f'part={part!r} should be i/n with i from 0 to n - 1, such as --part=0/4')
    return int(match[1]), int(match[2])


# Input

def hub_pattern():
    """The pattern of the hub's files of `sample`."""
    if sample == 'all':
        return 'data/*/*.parquet'
    if re.fullmatch(r'sample-\d+BT', sample):
        return f'{sample.replace("-", "/")}/*.parquet'          # sample/10BT/*.parquet
    if re.fullmatch(r'CC-MAIN-\d{4}-\d\d', sample):
        return f'data/{sample}/*.parquet'
    raise UserError(f'sample={sample!r} is unknown; try sample-10BT, sample-100BT, sample-350BT, a '
                    f'crawl such as CC-MAIN-2024-10, or all')


def document_format():
    """What the settings say about files of documents."""
    return DocumentFormat(field, encoding or None)


def input_key(files):
    """A text that changes with the files and with how they are read."""
    return text_files.fingerprint(files) + document_format().key


class Documents(NamedTuple):
    """The files that all parts read together."""
    files: list[Path]           # those of other parts need not be on this machine
    sizes: list[int]            # in bytes
    key: str                    # changes with the files


def find_documents(pattern, number, parts):
    """The Documents. The files of the hub that part number `number` of `parts` reads are
    downloaded. They stay in the hub's cache."""
    if input:
        files = find_document_files(input)
        sizes = [path.stat().st_size for path in files]
        return Documents(files, sizes, input_key(files))

    try:
        sizes = try_three_times(partial(list_hub, pattern), HUB)
    except RunError:                # no network: download_files finds what the cache has
        folder = download_files(HUB, [pattern])
        sizes = list_cache(folder, pattern)
    else:
        if not sizes:
            raise UserError(f'sample={sample!r} has no files on the hub; {HUB.page} lists those '
                            f'that there are')
        needed = files_of_part(list(sizes.values()), number, parts)
        names = list(sizes)
        folder = download_files(HUB, [names[index] for index in needed])

    # Names and sizes are the same on every machine, however its cache keeps the files.
    files = [folder / name for name in sizes]
    return Documents(files, list(sizes.values()), str(list(sizes.items())))


def list_hub(pattern):
    """{name: bytes} of the hub's files of `sample`. HF_ENDPOINT names another server."""
    from huggingface_hub import HfApi
    api = HfApi()
    # Without a network this fails at once, and the list only after six tries.
    info = api.repo_info(HUB.repository, repo_type=HUB.repo_type)
    tree = api.list_repo_tree(HUB.repository, recursive=True, revision=info.sha,
                              repo_type=HUB.repo_type)
    return {entry.path: entry.size for entry in sorted(tree, key=lambda entry: entry.path)
            if PurePosixPath(entry.path).match(pattern)}


def list_cache(folder, pattern):
    """{name: bytes} of the files of `sample` in a folder of the hub's cache."""
    sizes = {}
    rows = 0
    for path in text_files.find_files(folder, ('.parquet',)):
        name = path.relative_to(folder)
        if name.match(pattern):             # the cache may have other samples too
            sizes[name.as_posix()] = path.stat().st_size
            rows += count_rows(path)

    if sample == 'sample-10BT' and rows < 0.99 * DOCUMENTS:
        place = folder / PurePosixPath(pattern).parent
        raise RunError(f'the download has {rows:,} of about {DOCUMENTS:,} documents; go online '
                       f'and run again, or use it as it is: --input={place}')
    return sizes


def read_pieces(files, begin, end, encoder):
    """The DocumentPieces of the documents from the Position `begin` on, up to `end`."""
    form = document_format()
    for number in range(begin.file, min(end.file + 1, len(files))):
        start = begin.position if number == begin.file else 0
        if Position(number, start) >= end:
            return                  # the file of another part, which need not be here
        for document in read_documents(files[number], start, form):
            position = Position(number, document.position)
            if position >= end:
                return
            is_first = True
            for text, _ in document_pieces(document.texts, encoder):
                yield DocumentPiece(position, text, begins_document=is_first)
                is_first = False


# What is printed

def peak_memory():
    """The most memory that this process had, in a text, where the system tells."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:             # Windows
        return ''
    unit = 2 ** 20 if sys.platform == 'darwin' else 2 ** 10
    return f', peak memory {getrusage(RUSAGE_SELF).ru_maxrss / unit:,.0f} MiB'


def main():
    number, parts = parse_part()
    configurator.check_range(globals(), 'shard_tokens', 1, 2 ** 40)
    pattern = hub_pattern()
    spec = document_spec(tokenizer)

    # the documents of this part
    if not input:
        Tokenizer(spec)     # one that cannot be loaded should fail before hours of downloading
    documents = find_documents(pattern, number, parts)
    begin = split_position(documents.files, documents.sizes, number, parts)
    end = split_position(documents.files, documents.sizes, number + 1, parts)

    def read(document):
        """What is left of this part, from `document` on, or all of it for None."""
        yield from read_pieces(documents.files, document or begin, end, encoder)
        if input and input_key(documents.files) != documents.key:
            raise UserError(f'{input} changed while it was read; run again when nothing writes to '
                            f'it')

    encoder = Tokenizer(spec)
    started = time.monotonic()
    writer = ShardWriter(FOLDER, spec, documents.key, shard_tokens, number, parts)
    counting = CountingEncoder(encoder)
    complete = writer.write(read, counting.encode, num_proc)
    counting.log_dropped()

    if writer.text_bytes:
        seconds = time.monotonic() - started
        megabytes = writer.text_bytes / 1e6
        print0(f'{megabytes:,.0f} MB of text in {seconds:,.0f} s, {megabytes / seconds:.2f} MB/s'
               f'{peak_memory()}')
    if complete:
        print0('next: python train.py config/train_gpt2.py --dataset=fineweb_edu')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
