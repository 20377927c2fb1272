"""FineWeb-Edu, or documents of your own, as shards of tokens, with an end-of-text token before each document.

    python data/fineweb_edu/prepare.py                          # sample-10BT: 10 billion tokens, 20 GB
    python data/fineweb_edu/prepare.py --input=docs             # .parquet, .jsonl or .txt, or a folder of them
    python data/fineweb_edu/prepare.py --part=0/4               # a quarter of the work; see the readme

The first shard is held out. After a stop, the same command continues at the shard that it was writing.
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
from engine.prepare.shard_writer import ShardWriter

input = ''                      # .parquet or .jsonl with a field `text`, .txt as one document, or a folder
                                # of them; '' downloads FineWeb-Edu from the Hugging Face hub
sample = 'sample-10BT'          # sample-10BT, sample-100BT, sample-350BT, a crawl such as CC-MAIN-2024-10, or all
tokenizer = 'gpt2'              # gpt2, a folder with a tokenizer, such as one that export.py wrote, or a hub name
shard_tokens = 100_000_000      # tokens per shard; the last one may be shorter
part = '0/1'                    # i/n does one of n equal parts of the work, and the last part to finish publishes
num_proc = 0                    # cores that encode, 0 for all; the result is the same

DOCUMENTS = 9_670_000           # in sample-10BT, about: the hub shows 9.67M rows


def download():
    """The hub's parquet files of `sample`. They stay in the hub's cache, where an interrupted download
    continues. HF_ENDPOINT names another server."""
    if sample != 'all' and not re.fullmatch(r'sample-\d+BT|CC-MAIN-\d{4}-\d\d', sample):
        raise UserError(f'sample={sample!r} is unknown; try sample-10BT, sample-100BT, sample-350BT, a crawl such as '
                        f'CC-MAIN-2024-10, or all')
    pattern = 'data/*/*' if sample == 'all' else sample.replace('-', '/', 1) + '/*' if 'BT' in sample else f'data/{sample}/*'
    try:
        from huggingface_hub import snapshot_download
        folder = snapshot_download('HuggingFaceFW/fineweb-edu', repo_type='dataset', allow_patterns=[f'{pattern}.parquet'])
        files = [path for path in text_files.find_files(folder, ('.parquet',))
                 if path.relative_to(folder).match(f'{pattern}.parquet')]      # the cache may hold other samples too
    except Exception as error:      # the client raises errors of many libraries
        raise RunError(f'cannot download FineWeb-Edu ({type(error).__name__}: {str(error)[:200]}); '
                       f'if you have the parquet files, use --input=FOLDER') from None
    rows = sum(text_files.open_parquet(path).metadata.num_rows for path in files) if sample == 'sample-10BT' else DOCUMENTS
    if rows < 0.99 * DOCUMENTS:     # without a network the client returns what its cache has
        raise RunError(f'the download has {rows:,} of about {DOCUMENTS:,} documents; go online and run again, '
                       f'or use it as it is: --input={files[0].parent}')
    return files


def identify(files):
    """A text that changes with the files. Downloads have the same on every machine: names in the hub's
    cache are links to files that are named by their content."""
    if input:
        return text_files.fingerprint(files)
    return str([(path.name, path.resolve().name, path.stat().st_size) for path in files])


def read_pieces(files, begin, end, encoder):
    """(document, text, begins_document) of the documents from `begin` on, up to `end`. A document is the number of
    its file and its position there."""
    for number in range(begin[0], min(end[0] + 1, len(files))):
        for position, document in text_files.read_documents(files[number], begin[1] if number == begin[0] else 0):
            if (number, position) >= end:
                return
            begins = True
            for text, _ in document_pieces(document, encoder):
                yield (number, position), text, begins
                begins = False


def peak_memory():
    """The most memory that this process had, in a text, where the system tells."""
    try:
        from resource import RUSAGE_SELF, getrusage
    except ImportError:             # Windows
        return ''
    return f', peak memory {getrusage(RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == "darwin" else 2 ** 10):,.0f} MiB'


def main():
    match = re.fullmatch(r'(\d{1,6})/(\d{1,6})', part)
    if not match or int(match[1]) >= int(match[2]):
        raise UserError(f'part={part!r} should be i/n with i from 0 to n - 1, such as --part=0/4')
    configurator.check_range(globals(), 'shard_tokens', 1, 2 ** 40)
    number, parts = int(match[1]), int(match[2])
    encoder = document_tokenizer(tokenizer)
    files = text_files.find_files(input, text_files.DOCUMENT_ENDINGS, print0) if input else download()
    key = identify(files)
    begin, end = (text_files.split_position(files, i, parts) for i in (number, number + 1))

    def read(document):
        yield from read_pieces(files, document or begin, end, encoder)
        if identify(files) != key:
            raise UserError(f'{input} changed while it was read; run again when nothing writes to it')

    writer, started = ShardWriter(FOLDER, encoder.spec, key, shard_tokens, number, parts, print0), time.monotonic()
    complete = writer.write(read, encoder.encode_to_numpy, num_proc)
    seconds, megabytes = time.monotonic() - started, writer.text_bytes / 1e6
    if megabytes:
        print0(f'{megabytes:,.0f} MB of text in {seconds:,.0f} s, {megabytes / seconds:.2f} MB/s{peak_memory()}')
    if complete:
        print0('next: python train.py config/train_gpt2.py --dataset=fineweb_edu')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
