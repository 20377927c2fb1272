"""Six digits and the same digits sorted, one token per character: a dataset on which a small GPT
learns to sort.

    python data/sort/prepare.py

Each record is a line such as `352914=123459`. The held-out lines have digits that, in their order,
are not in the training text.
"""

import json
import random
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from engine.atomic_files import atomic_write
from engine.errors import UserError
from engine.prepare.dataset_writer import dataset_writer
from engine.tokenizer import Tokenizer, char_spec

train_records = 50_000      # how many of the million possible records to train on
held_out = 5_000            # how many others to validate on
digits = 6                  # digits in each record
seed = 0                    # seed of the choice


def check_settings():
    possible = 10 ** digits
    is_possible = (1 <= digits <= 18 and train_records >= 1 and held_out >= 1
                   and train_records + held_out <= possible)
    if not is_possible:
        raise UserError(f'train_records={train_records} and held_out={held_out} should be above 0, '
                        f'and in all at most the {possible:,} records that digits={digits} makes '
                        f'possible')


def make_records():
    """[(prompt, answer)] of different numbers, in a seeded order."""
    numbers = random.Random(seed).sample(range(10 ** digits), train_records + held_out)
    records = []
    for number in numbers:
        text = f'{number:0{digits}}'
        records.append((f'{text}=', ''.join(sorted(text))))
    return records


def read_pieces(split, records):
    """The pieces of some records, as the writer takes them. Prompts do not count in the loss."""
    for prompt, answer in records:
        yield split, prompt, False, False
        yield split, f'{answer}\n', False, True


def main():
    check_settings()
    records = make_records()
    train = records[:train_records]
    val = records[train_records:]

    # training begins each sequence at a record
    record_length = len(''.join(records[0])) + 1
    spec = char_spec('0123456789=\n')
    pieces = [*read_pieces('train', train), *read_pieces('val', val)]
    with dataset_writer(FOLDER, spec, has_masks=True, record_length=record_length) as writer:
        writer.write(pieces, Tokenizer(spec).encode_to_numpy, total=record_length * len(records))

    # a task for evaluate.py
    with atomic_write(FOLDER / 'exact.jsonl') as file:
        for prompt, answer in val:
            file.write(json.dumps(dict(prompt=prompt, answer=answer)) + '\n')
    print0('exact.jsonl has the held-out records, for evaluate.py')
    print0('next: python train.py config/train_sort.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
