"""Masks: which tokens of a dataset count in the loss.

A mask lies beside a token file: train.mask beside train.bin, train_000001.mask beside
train_000001.bin. It has one byte for each token: 1 where the token counts as a target, and 0 where
it does not. Either every token file of a dataset has a mask, or none has; without masks every token
counts.
"""

from pathlib import Path

from engine.dataloader.token_files import SPLITS, TokenFile, TokenStream, read_split
from engine.errors import UserError


def mask_name(token_file: str) -> str:
    """The name of the mask beside a token file."""
    return token_file.removesuffix('.bin') + '.mask'


def open_masks(
    folder: Path, tokens: dict[str, TokenStream], expected: dict,
) -> tuple[dict[str, TokenStream], list[str]]:
    """({'train': the mask of train as a stream of bytes, 'val': ...}, the digests of both).

    Both are empty where no token file has a mask.
    tokens: the TokenStream of each split. expected: {name: sha256} of meta.json.
    Raises UserError where only some token files have a mask, where a mask has another length than
    its token file or holds anything but 0 and 1 or no 1, and where meta.json describes other masks.
    """
    names = [mask_name(name) for split in SPLITS for name in tokens[split].names]
    described = [name for name in expected if name.endswith('.mask')]
    missing = [name for name in names if not (folder / name).exists()]
    if len(missing) == len(names) and not described:
        return {}, []

    if missing:
        raise UserError(f'{folder / missing[0]} is missing, and other token files here have a '
                        f'mask; prepare the dataset again')

    masks = {}
    digests = []
    for split in SPLITS:
        masks[split] = open_mask(tokens[split])
        contents = read_split(masks[split], split, expected)
        if contents.largest > 1:
            raise UserError(f'{contents.path}: byte {contents.position:,} is {contents.largest}, '
                            f'and a mask holds 0 and 1; prepare the dataset again')
        is_whole = len(masks[split].names) == 1        # of shards, only a sample is read
        if contents.largest == 0 and is_whole:
            raise UserError(f'{contents.path} counts no token, so there is nothing to learn; '
                            f'prepare the dataset again')
        digests.append(contents.digest)
    return masks, digests


def open_mask(tokens):
    """The TokenStream of the masks beside the files of `tokens`, which has one byte a token."""
    # how many tokens each file has
    ends = [*tokens.begins[1:], len(tokens)]
    counts = [end - begin for begin, end in zip(tokens.begins, ends)]

    files = []
    for name, count in zip(tokens.names, counts):
        path = tokens.folder / mask_name(name)
        if not path.is_file():
            raise UserError(f'{path} is not a file; remove it, or prepare the dataset again')

        stat = path.stat()
        if stat.st_size != count:
            raise UserError(f'{path} has {stat.st_size:,} bytes, and {name} {count:,} tokens; '
                            f'prepare the dataset again')
        files.append(TokenFile(path.name, stat.st_size, stat.st_ino))
    return TokenStream(tokens.folder, files, 'uint8')
