"""Six digits and the same digits sorted, one token per character: a dataset on which a small GPT learns to sort.

    python data/sort/prepare.py

Each record is a line such as `352914=123459`. The held-out lines have digits that, in their order, are not in the
training text.
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

train_records = 50_000      # of the million possible ones
held_out = 5_000            # other ones, for validation
digits = 6                  # in each record
seed = 0                    # of the choice


def main():
    if not 1 <= digits <= 18 or min(train_records, held_out) < 1 or train_records + held_out > 10 ** digits:
        raise UserError(f'train_records={train_records} and held_out={held_out} should be above 0, and in all at most the '
                        f'{10 ** digits:,} records that digits={digits} makes possible')
    numbers = random.Random(seed).sample(range(10 ** digits), train_records + held_out)
    pairs = [(f'{number:0{digits}}=', ''.join(sorted(f'{number:0{digits}}'))) for number in numbers]
    lines = [f'{prompt}{answer}\n' for prompt, answer in pairs]
    train, val = ''.join(lines[:train_records]), ''.join(lines[train_records:])
    # engine.dataloader starts windows at records, and masks the prompts
    spec = dict(char_spec(set(train + val)), record=dict(length=len(lines[0]), prompt=digits + 1))
    with dataset_writer(FOLDER, spec, print0) as writer:
        writer.write([('train', train, False), ('val', val, False)], Tokenizer(spec).encode_to_numpy, len(train + val))
    with atomic_write(FOLDER / 'exact.jsonl') as file:
        file.writelines(json.dumps(dict(prompt=prompt, answer=answer)) + '\n' for prompt, answer in pairs[train_records:])
    print0('exact.jsonl has the held-out records, for evaluate.py\nnext: python train.py config/train_sort.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
