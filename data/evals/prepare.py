"""Evaluation tasks in the format that evaluate.py reads.

    python data/evals/prepare.py                        # downloads them from the Hugging Face hub
    python data/evals/prepare.py --tasks=hellaswag,lambada
    python data/evals/prepare.py --input=FOLDER         # from the authors' files in a folder

Each task is written whole; tasks that are there already are written again.
"""

import hashlib
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, progress_bar, report_errors

from filelock import FileLock

import configurator
from engine.atomic_files import atomic_write
from engine.downloads import Download, try_three_times
from engine.errors import UserError
from engine.prepare import text_files

input = ''          # a folder with the authors' files, which the readme names; '' downloads from
                    # the Hugging Face hub
output = ''         # the folder to write to; '' is data/evals
tasks = ('hellaswag,lambada,wikitext2,wikitext103,ptb,'
         'piqa,arc_easy,arc_challenge,winogrande')          # the tasks to write; '' takes all


# A row of a data set to an example of a task

def clean_hellaswag(text):
    """Text without the marks of its source, WikiHow: [title] begins a sentence, others go."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def hellaswag(row):
    """As lm-evaluation-harness: the activity, then the context, whose second half begins with a
    capital."""
    context = row['ctx']
    if 'activity_label' in row:
        context = f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}'
    return dict(query=clean_hellaswag(context),
                choices=[clean_hellaswag(ending) for ending in row['endings']],
                gold=int(row['label']))


def hellaswag_raw(row):
    """As llm.c and build-nanogpt: the context and the endings as they are."""
    return dict(query=row['ctx'], choices=row['endings'], gold=int(row['label']))


def lambada(row):
    """The last word is what follows the last space."""
    context, _, word = row['text'].rpartition(' ')
    return dict(context=context, continuation=word)


def piqa(row):
    return dict(query=f'Question: {row["goal"]}\nAnswer:',
                choices=[row['sol1'], row['sol2']],
                gold=int(row['label']))


def arc(row):
    """row: of the hub, or of the authors' file, where question and choices are one object."""
    question = row['question']
    if isinstance(question, dict):
        texts = [choice['text'] for choice in question['choices']]
        labels = [choice['label'] for choice in question['choices']]
        question = question['stem']
    else:
        texts = row['choices']['text']
        labels = row['choices']['label']
    return dict(query=f'Question: {question}\nAnswer:',
                choices=texts,
                gold=labels.index(row['answerKey']))


def winogrande(row):
    """The sentence up to the gap, with either name in it; what follows the gap is scored
    (arXiv:1806.02847)."""
    before, _, after = row['sentence'].partition('_')
    return dict(context_options=[before + row['option1'], before + row['option2']],
                continuation=after.strip(),
                gold=int(row['answer']) - 1)


# The tasks

class Source(NamedTuple):
    """Where a task comes from."""
    hub: dict                           # arguments of datasets.load_dataset
    files: tuple[str, ...]              # the authors' files that hold the same, any of them
    convert: Callable | None = None     # makes an example of a row; None for a text
    column: str | None = None           # the column of the hub's rows that has the lines of a text


CONVERTED = 'refs/convert/parquet'      # the hub's conversion of data sets that come as a script
HELLASWAG = dict(path='Rowan/hellaswag', split='validation')
# WikiText-103 has the same test set, and the client would also download its training set.
WIKITEXT = dict(path='Salesforce/wikitext', split='test', name='wikitext-2-raw-v1')

SOURCES = {
    'hellaswag': Source(
        HELLASWAG,
        ('hellaswag_val.jsonl',), hellaswag),
    'hellaswag_raw': Source(
        HELLASWAG,
        ('hellaswag_val.jsonl',), hellaswag_raw),
    'lambada': Source(
        dict(path='EleutherAI/lambada_openai', name='default', split='test'),
        ('lambada_test.jsonl',), lambada),
    'wikitext2': Source(
        WIKITEXT,
        ('wikitext2_raw.test.txt', 'wikitext-2-raw/wiki.test.raw'), column='text'),
    'wikitext103': Source(
        WIKITEXT,
        ('wikitext-103-raw/wiki.test.raw',), column='text'),
    'ptb': Source(
        dict(path='ptb-text-only/ptb_text_only', revision=CONVERTED, split='test'),
        ('ptb.test.txt',), column='sentence'),
    'piqa': Source(
        dict(path='ybisk/piqa', revision=CONVERTED, split='validation'),
        ('valid.jsonl', 'piqa_valid.jsonl'), piqa),
    'arc_easy': Source(
        dict(path='allenai/ai2_arc', name='ARC-Easy', split='test'),
        ('ARC-Easy-Test.jsonl',), arc),
    'arc_challenge': Source(
        dict(path='allenai/ai2_arc', name='ARC-Challenge', split='test'),
        ('ARC-Challenge-Test.jsonl',), arc),
    'winogrande': Source(
        dict(path='allenai/winogrande', name='winogrande_xl', split='validation'),
        ('dev.jsonl',), winogrande),
}


# Reading

def find_input(source):
    """The authors' file in the folder `input`, or None."""
    for name in source.files:
        path = Path(input) / name
        if path.is_file():
            return path
    return None


def download(source):
    """The rows of a data set of the hub."""
    repository = source.hub['path']
    download = Download(repository, f'use --input=FOLDER if you have {source.files[0]}',
                        repository=repository, is_dataset=True, revision=source.hub.get('revision'))
    return try_three_times(partial(load_rows, source.hub), download)


def load_rows(hub):
    """The rows, with the errors of the clients as they are. hub: arguments of load_dataset."""
    from datasets import load_dataset
    from huggingface_hub import HfApi
    try:
        return load_dataset(**hub)
    except Exception:
        # `datasets` drops the cause of its errors. The hub's own client fails with the cause.
        HfApi().repo_info(hub['path'], revision=hub.get('revision'), repo_type='dataset')
        raise


def read_file(path):
    return ''.join(text_files.read_text(path))


def read_rows(path):
    """The rows of an authors' .jsonl file, with the labels of PIQA, which lie in a file of their
    own."""
    try:
        rows = [json.loads(line) for line in read_file(path).split('\n') if line.strip()]
        label_file = path.with_name(f'{path.stem}-labels.lst')
        if label_file.is_file():
            labels = read_file(label_file).split()
            rows = [dict(row, label=label) for row, label in zip(rows, labels, strict=True)]
        return rows
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise UserError(f'{path} is not JSON lines ({str(error)[:100]}); fetch it again') from None
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None


def join_lines(name, lines):
    """A text whose lines are rows on the hub. There a blank line lost its space, and PTB's lines
    their margins."""
    if name == 'ptb':
        return ''.join(f' {line} \n' for line in lines)
    return ''.join(line or ' \n' for line in lines)


# Making tasks

class Task(NamedTuple):
    file: str               # the name of its file
    text: str               # what the file holds
    size: int               # how many examples or lines it has
    unit: str               # 'examples' or 'lines'


def make_task(name, source, path):
    """The Task. path: the authors' file, or None for the hub."""
    if source.convert is None:
        if path:
            text = read_file(path)
        else:
            text = join_lines(name, download(source)[source.column])
        return Task(f'{name}.txt', text, text.count('\n'), 'lines')

    rows = read_rows(path) if path else download(source)
    lines = []
    try:
        for row in progress_bar(name, rows, len(rows)):
            example = source.convert(row)
            lines.append(json.dumps(example, ensure_ascii=False) + '\n')
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f'{path or source.hub["path"]}, row {len(lines) + 1:,} is not an example '
                        f'of {name} ({type(error).__name__}: {str(error)[:100]})') from None
    return Task(f'{name}.jsonl', ''.join(lines), len(lines), 'examples')


def write_task(task):
    """Write the file of a task and print a line about it."""
    data = task.text.encode('utf-8', 'surrogatepass')
    target = Path(output) if output else FOLDER
    target.mkdir(parents=True, exist_ok=True)
    with FileLock(target / 'prepare.lock'), atomic_write(target / task.file, 'wb') as file:
        file.write(data)
    print0(f'{task.file:<20} {task.size:>7,} {task.unit:<8}  '
           f'sha256 {hashlib.sha256(data).hexdigest()}')


def chosen_tasks():
    """The names of the tasks to write."""
    names = [name.strip() for name in tasks.split(',') if name.strip()]
    if not names:
        names = list(SOURCES)
    if 'hellaswag' in names and 'hellaswag_raw' not in names:
        names.insert(names.index('hellaswag') + 1, 'hellaswag_raw')

    for name in names:
        if name not in SOURCES:
            raise UserError(f'there is no task {name!r}; --tasks= takes {", ".join(SOURCES)}')
    return names


def main():
    names = chosen_tasks()
    if input and not Path(input).is_dir():
        raise UserError(f'{input} is not a folder; --input= takes one with the files that '
                        f'data/evals/readme.md names')

    written = 0
    for name in names:
        source = SOURCES[name]
        path = None
        if input:
            path = find_input(source)
            if not path:
                print0(f'note: {name} is left out: {input} has no {" or ".join(source.files)}',
                       file=sys.stderr)
                continue
        write_task(make_task(name, source, path))
        written += 1

    if not written:
        raise UserError(f'{input} has no file of {", ".join(names)}; '
                        f'data/evals/readme.md names them')
    print0('next: python evaluate.py --init_from=gpt2 --tasks=hellaswag,lambada,wikitext2')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
