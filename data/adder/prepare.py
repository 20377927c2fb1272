"""Sums of two numbers below 100, one token per character: a dataset on which a small GPT learns to add.

    python data/adder/prepare.py

Each record is a line such as `12+34=640`: both numbers with two digits, their sum with three digits and the ones
first. A model that writes the ones first has the carry when it needs it, and learns faster.
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

held_out = 500      # of the 10,000 sums, for validation; the others are for training
seed = 0            # of the order of the sums


def make_sums():
    """[(prompt, answer)] of all pairs of numbers, in a seeded order."""
    sums = [(f'{a:02}+{b:02}=', f'{a + b:03}'[::-1]) for a in range(100) for b in range(100)]
    random.Random(seed).shuffle(sums)
    return sums


def write_task(name, pairs):
    """Write NAME.jsonl, which `evaluate.py --tasks=NAME` scores."""
    with atomic_write(FOLDER / f'{name}.jsonl') as file:
        file.writelines(json.dumps(dict(prompt=prompt, answer=answer)) + '\n' for prompt, answer in pairs)


def main():
    sums = make_sums()
    if not 0 < held_out < len(sums):
        raise UserError(f'held_out={held_out} should be from 1 to {len(sums) - 1}')
    (prompt, answer), train, val = sums[0], sums[held_out:], sums[:held_out]
    record = dict(length=len(prompt + answer) + 1, prompt=len(prompt))
    train_text, val_text = (''.join(f'{prompt}{answer}\n' for prompt, answer in pairs) for pairs in (train, val))
    spec = dict(char_spec(set(train_text + val_text)), record=record)       # engine.dataloader masks the prompts
    with dataset_writer(FOLDER, spec, print0) as writer:
        writer.write([('train', train_text, False), ('val', val_text, False)], Tokenizer(spec).encode_to_numpy,
                     len(train_text + val_text))
    write_task('exact', sums)
    write_task('held_out', val)
    print0('exact.jsonl has all sums, held_out.jsonl those that are not trained on\n'
           'next: python train.py config/train_adder.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
