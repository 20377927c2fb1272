"""Sums of two numbers below 100, one token per character: a dataset on which a small GPT learns to
add.

    python data/adder/prepare.py

Each record is a line such as `12+34=640`: both numbers with two digits, their sum with three digits
and the ones first. A model that writes the ones first has the carry when it needs it, and learns
faster.
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

held_out = 500      # how many of the 10,000 sums are for validation; the others are for training
seed = 0            # seed of the order of the sums


def make_sums():
    """[(prompt, answer)] of all pairs of numbers, in a seeded order."""
    sums = []
    for a in range(100):
        for b in range(100):
            ones_first = f'{a + b:03}'[::-1]
            sums.append((f'{a:02}+{b:02}=', ones_first))
    random.Random(seed).shuffle(sums)
    return sums


def read_pieces(split, sums):
    """The pieces of some sums, as the writer takes them: the prompts do not count in the loss."""
    for prompt, answer in sums:
        yield split, prompt, False, False
        yield split, f'{answer}\n', False, True


def write_task(name, sums):
    """Write NAME.jsonl, which `evaluate.py --tasks=NAME` scores."""
    with atomic_write(FOLDER / f'{name}.jsonl') as file:
        for prompt, answer in sums:
            file.write(json.dumps(dict(prompt=prompt, answer=answer)) + '\n')


def main():
    sums = make_sums()
    if not 0 < held_out < len(sums):
        raise UserError(f'held_out={held_out} should be from 1 to {len(sums) - 1}')
    val = sums[:held_out]
    train = sums[held_out:]

    # training begins each sequence at a record
    record_length = len(''.join(sums[0])) + 1
    spec = char_spec('0123456789+=\n')
    pieces = [*read_pieces('train', train), *read_pieces('val', val)]
    with dataset_writer(FOLDER, spec, has_masks=True, record_length=record_length) as writer:
        writer.write(pieces, Tokenizer(spec).encode_to_numpy, total=record_length * len(sums))

    write_task('exact', sums)
    write_task('held_out', val)
    print0('exact.jsonl has all sums, held_out.jsonl those that are not trained on')
    print0('next: python train.py config/train_adder.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
