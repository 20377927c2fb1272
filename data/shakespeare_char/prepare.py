"""Tiny Shakespeare, a megabyte of plays, as characters: the dataset to try things on.

    python data/shakespeare_char/prepare.py                     # downloads the text once
    python data/shakespeare_char/prepare.py --input=FILE        # or takes it from here
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
    tokenizer = tokenfiles.char_tokenizer(set(text))
    cut = int(len(text) * 0.9)
    with tokenfiles.new_dataset(FOLDER, tokenizer) as dataset:
        dataset.write([('train', text[:cut], False), ('val', text[cut:], False)],
                      tokenfiles.encoder(tokenizer), len(text))


if __name__ == '__main__':
    with configurator.plain_errors():
        configurator.configure(globals(), sys.argv[1:])
        main()
