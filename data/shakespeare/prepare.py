"""Tiny Shakespeare, a megabyte of plays, as GPT-2 tokens: a dataset to finetune on.

    python data/shakespeare/prepare.py                          # downloads the text once
    python data/shakespeare/prepare.py --input=FILE             # reads a file of your own
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parents[1]))
from console import print0, report_errors

import configurator
from engine.prepare import text_files
from engine.prepare.dataset_writer import dataset_writer
from engine.tokenizer import GPT2, Tokenizer

input = ''          # a UTF-8 text file; '' downloads tiny Shakespeare and keeps it as input.txt


def main():
    text = text_files.read_shakespeare(input, FOLDER)

    # the first 90% of the characters to train on, the rest to validate; no document ends there
    cut = int(len(text) * 0.9)
    pieces = [('train', text[:cut], False), ('val', text[cut:], False)]

    encode = Tokenizer(GPT2).encode_to_numpy
    with dataset_writer(FOLDER, GPT2) as writer:
        writer.write(pieces, encode, total=len(text))
    print0('next: python train.py config/finetune_shakespeare.py')


if __name__ == '__main__':
    with report_errors():
        configurator.configure(globals(), sys.argv[1:], path_setting='input')
        main()
