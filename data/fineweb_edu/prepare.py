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
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from engine.errors import RunError, UserError
from engine.hf.tokenizer_json import document_tokenizer
from engine.prepare import text_files
from engine.prepare.encode import document_pieces
from engine.prepare.shard_writer import DocumentPiece, ShardWriter
from engine.prepare.text_files import Position

input = ''                      # .parquet or .jsonl with a field `text`, .txt as one document, or a
                                # folder of them; '' downloads FineWeb-Edu from the Hugging Face hub
sample = 'sample-10BT'          # sample-10BT, sample-100BT, sample-350BT, a crawl such as
                                # CC-MAIN-2024-10, or all
tokenizer = 'gpt2'              # gpt2, a folder with a tokenizer, such as one that export.py wrote,
                                # or a hub name
shard_tokens = 100_000_000      # how many tokens a shard has; the last one may be shorter
part = '0/1'                    # i/n does one of n equal parts of the work, and the last part to
                                # finish publishes
num_proc = 0                    # how many cores encode, 0 for all; the result is the same

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


def download():
    """The hub's parquet files of `sample`. They stay in the hub's cache, where an interrupted
    download continues. HF_ENDPOINT names another server."""
    pattern = hub_pattern()
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download('HuggingFaceFW/fineweb-edu', repo_type='dataset',
                                   allow_patterns=[pattern])
        files = text_files.find_files(folder, ('.parquet',))
        # the cache may hold other samples too
        files = [path for path in files if path.relative_to(folder).match(pattern)]
    except Exception as error:      # the client raises errors of many libraries
        raise RunError(f'cannot download FineWeb-Edu ({type(error).__name__}: '
                       f'{str(error)[:200]}); if you have the parquet files, use '
                       f'--input=FOLDER') from None

    # without a network the client returns what its cache has
    if sample == 'sample-10BT':
        rows = sum(text_files.open_parquet(path).metadata.num_rows for path in files)
        if rows < 0.99 * DOCUMENTS:
            raise RunError(f'the download has {rows:,} of about {DOCUMENTS:,} documents; go online '
                           f'and run again, or use it as it is: --input={files[0].parent}')
    return files


def identify(files):
    """A text that changes with the files.

    Downloads have the same on every machine: names in the hub's cache are links to files that are
    named by their content.
    """
    if input:
        return text_files.fingerprint(files)
    return str([(path.name, path.resolve().name, path.stat().st_size) for path in files])


def read_pieces(files, begin, end, encoder):
    """The DocumentPieces of the documents from the Position `begin` on, up to `end`."""
    for number in range(begin.file, min(end.file + 1, len(files))):
        start = begin.position if number == begin.file else 0
        for document in text_files.read_documents(files[number], start):
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
    encoder = document_tokenizer(tokenizer)

    # the documents of this part
    if input:
        files = text_files.find_files(input, text_files.DOCUMENT_ENDINGS, log_skipped=True)
    else:
        files = download()
    key = identify(files)
    begin = text_files.split_position(files, number, parts)
    end = text_files.split_position(files, number + 1, parts)

    def read(document):
        """What is left of this part, from `document` on, or all of it for None."""
        yield from read_pieces(files, document or begin, end, encoder)
        if identify(files) != key:
            raise UserError(f'{input} changed while it was read; run again when nothing writes to '
                            f'it')

    started = time.monotonic()
    writer = ShardWriter(FOLDER, encoder.spec, key, shard_tokens, number, parts)
    complete = writer.write(read, encoder.encode_to_numpy, num_proc)

    if writer.text_bytes:
        seconds = time.monotonic() - started
        megabytes = writer.text_bytes / 1e6
        print0(f'{megabytes:,.0f} MB of text in {seconds:,.0f} s, {megabytes / seconds:.2f} MB/s'
               f'{peak_memory()}')
    if complete:
        print0('next: python train.py config/train_gpt2.py --dataset=fineweb_edu')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
