"""Evaluation tasks in the format that evaluate.py reads.

    python data/evals/prepare.py                                # downloads them from the Hugging Face hub
    python data/evals/prepare.py --tasks=hellaswag,lambada
    python data/evals/prepare.py --input=FOLDER                 # from the authors' files in a folder of yours

Each task is written whole; tasks that are there already are written again.
"""

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, progress_bar, report_errors

import configurator
from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError
from engine.prepare import text_files

input = ''          # a folder with the authors' files, which the readme names; '' downloads from the hub
output = ''         # the folder to write to; '' is data/evals
tasks = 'hellaswag,lambada,wikitext2,wikitext103,ptb,piqa,arc_easy,arc_challenge,winogrande'    # '' takes them all


def clean_hellaswag(text):
    """Text without the marks of its source, WikiHow: [title] begins a sentence, other brackets go."""
    text = text.strip().replace(' [title]', '. ')
    return re.sub(r'\[.*?\]', '', text).replace('  ', ' ')


def hellaswag(row):
    """As lm-evaluation-harness: the activity, then the context, whose second half begins with a capital."""
    context = row['ctx']
    if 'activity_label' in row:
        context = f'{row["activity_label"]}: {row["ctx_a"]} {row["ctx_b"].capitalize()}'
    return dict(query=clean_hellaswag(context), choices=[clean_hellaswag(e) for e in row['endings']], gold=int(row['label']))


def hellaswag_raw(row):
    """As llm.c and build-nanogpt: the context and the endings as they are."""
    return dict(query=row['ctx'], choices=row['endings'], gold=int(row['label']))


def lambada(row):
    """The last word is what follows the last space."""
    context, _, word = row['text'].rpartition(' ')
    return dict(context=context, continuation=word)


def piqa(row):
    return dict(query=f'Question: {row["goal"]}\nAnswer:', choices=[row['sol1'], row['sol2']], gold=int(row['label']))


def arc(row):
    """row: of the hub, or of the authors' file, where question and choices are one object."""
    question, choices = row['question'], row.get('choices')
    if isinstance(question, dict):
        question, choices = question['stem'], {key: [c[key] for c in question['choices']] for key in ('text', 'label')}
    return dict(query=f'Question: {question}\nAnswer:', choices=choices['text'], gold=choices['label'].index(row['answerKey']))


def winogrande(row):
    """The sentence up to the gap, with either name in it; what follows the gap is scored (arXiv:1806.02847)."""
    before, _, after = row['sentence'].partition('_')
    return dict(context_options=[before + row['option1'], before + row['option2']], continuation=after.strip(),
                gold=int(row['answer']) - 1)


class Source(NamedTuple):
    """Where a task comes from: arguments of datasets.load_dataset, the authors' files that hold the same, and what
    makes an example of a row. Text tasks take a column instead."""
    hub: dict
    files: tuple
    convert: object


CONVERTED = 'refs/convert/parquet'      # the hub's own conversion of data sets that come as a script
WIKI = dict(path='Salesforce/wikitext', split='test')
SWAG = dict(path='Rowan/hellaswag', split='validation')
SOURCES = {
    'hellaswag': Source(SWAG, ('hellaswag_val.jsonl',), hellaswag),
    'hellaswag_raw': Source(SWAG, ('hellaswag_val.jsonl',), hellaswag_raw),
    'lambada': Source(dict(path='EleutherAI/lambada_openai', name='default', split='test'), ('lambada_test.jsonl',), lambada),
    'wikitext2': Source(dict(WIKI, name='wikitext-2-raw-v1'), ('wikitext2_raw.test.txt', 'wikitext-2-raw/wiki.test.raw'), 'text'),
    'wikitext103': Source(dict(WIKI, name='wikitext-103-raw-v1'), ('wikitext-103-raw/wiki.test.raw',), 'text'),
    'ptb': Source(dict(path='ptb-text-only/ptb_text_only', revision=CONVERTED, split='test'), ('ptb.test.txt',), 'sentence'),
    'piqa': Source(dict(path='ybisk/piqa', revision=CONVERTED, split='validation'), ('valid.jsonl', 'piqa_valid.jsonl'), piqa),
    'arc_easy': Source(dict(path='allenai/ai2_arc', name='ARC-Easy', split='test'), ('ARC-Easy-Test.jsonl',), arc),
    'arc_challenge': Source(dict(path='allenai/ai2_arc', name='ARC-Challenge', split='test'), ('ARC-Challenge-Test.jsonl',), arc),
    'winogrande': Source(dict(path='allenai/winogrande', name='winogrande_xl', split='validation'), ('dev.jsonl',), winogrande)}


def download(source):
    """The rows of a data set of the hub."""
    try:
        from datasets import load_dataset
        return load_dataset(**source.hub)
    except Exception as error:          # the client raises errors of many libraries
        raise RunError(f'cannot download {source.hub["path"]} ({type(error).__name__}: {" ".join(str(error).split())[:200]}); if '
                       f'you have {source.files[0]}, use --input=FOLDER') from None


def read_rows(path):
    """The rows of an authors' .jsonl file, with the labels of PIQA, which lie in a file of their own."""
    try:
        rows = [json.loads(line) for line in ''.join(text_files.read_text(path)).split('\n') if line.strip()]
        labels = path.with_name(f'{path.stem}-labels.lst')
        if labels.is_file():
            labels = ''.join(text_files.read_text(labels)).split()
            rows = [dict(row, label=label) for row, label in zip(rows, labels, strict=True)]
        return rows
    except (json.JSONDecodeError, RecursionError, TypeError) as error:
        raise UserError(f'{path} is not JSON lines ({str(error)[:100]}); fetch it again') from None
    except ValueError as error:
        raise UserError(f'{path}: {error}') from None


def join_rows(name, texts):
    """The text of a set whose lines are rows on the hub: there a blank line lost its space, and PTB its margins."""
    return ''.join(f' {text} \n' if name == 'ptb' else text or ' \n' for text in texts)


def make_task(name, source, path):
    """(file name, text of the task, number of its examples or lines). path: the authors' file, or None for the hub."""
    if isinstance(source.convert, str):
        text = ''.join(text_files.read_text(path)) if path else join_rows(name, download(source)[source.convert])
        return f'{name}.txt', text, text.count('\n')
    rows, lines = read_rows(path) if path else download(source), []
    for number, row in enumerate(progress_bar(name, rows, len(rows)), 1):
        try:
            lines.append(json.dumps(source.convert(row), ensure_ascii=False) + '\n')
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f'{path or source.hub["path"]}, row {number:,} is not an example of {name} '
                            f'({type(error).__name__}: {str(error)[:100]})') from None
    return f'{name}.jsonl', ''.join(lines), len(lines)


def find_input(source):
    """The authors' file in the folder `input`, or None."""
    return next((Path(input) / name for name in source.files if (Path(input) / name).is_file()), None)


def main():
    names = [name.strip() for name in tasks.split(',') if name.strip()] or list(SOURCES)
    if 'hellaswag' in names and 'hellaswag_raw' not in names:
        names.insert(names.index('hellaswag') + 1, 'hellaswag_raw')
    if unknown := [name for name in names if name not in SOURCES]:
        raise UserError(f'there is no task {unknown[0]!r}; --tasks= takes {", ".join(SOURCES)}')
    if input and not Path(input).is_dir():
        raise UserError(f'{input} is not a folder; --input= takes one with the files that data/evals/readme.md names')
    target = Path(output) if output else FOLDER
    written = 0
    for name in names:
        source = SOURCES[name]
        path = find_input(source) if input else None
        if input and not path:
            print0(f'note: {name} is left out: {input} has no {" or ".join(source.files)}', file=sys.stderr)
            continue
        file_name, text, count = make_task(name, source, path)
        data = text.encode('utf-8', 'surrogatepass')
        target.mkdir(parents=True, exist_ok=True)
        with atomic_write(target / file_name, 'wb') as file:
            file.write(data)
        written += 1
        print0(f'{file_name:<20} {count:>7,} {"lines" if file_name.endswith(".txt") else "examples":<8}  '
               f'sha256 {hashlib.sha256(data).hexdigest()}')
    if not written:
        raise UserError(f'{input} has no file of {", ".join(names)}; data/evals/readme.md names them')
    print0('next: python evaluate.py --init_from=gpt2 --tasks=hellaswag,lambada,wikitext2')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
