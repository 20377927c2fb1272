"""Tiny Shakespeare, a megabyte of plays, as GPT-2 tokens: the dataset to finetune on.

    python data/shakespeare/prepare.py                          # downloads the text once
    python data/shakespeare/prepare.py --input=FILE             # or takes it from here
"""

import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parents[1]), str(FOLDER.parent)]
import configurator
import textfiles
import tokenfiles

input = ''          # a UTF-8 text file; '' downloads tiny Shakespeare and keeps it as input.txt


def main():
    text = textfiles.tiny_shakespeare(input, FOLDER)
    cut = int(len(text) * 0.9)
    encode = tokenfiles.encoder(tokenfiles.GPT2)
    with tokenfiles.new_dataset(FOLDER, tokenfiles.GPT2) as dataset:
        dataset.write([('train', text[:cut], False), ('val', text[cut:], False)], encode, len(text))


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
