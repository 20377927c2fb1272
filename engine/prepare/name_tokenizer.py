"""A meta.json for token files that exist already, such as shards of llm.c."""

import json
from pathlib import Path

from engine.atomic_files import atomic_write
from engine.dataloader.token_files import (
    SPLITS,
    TokenStream,
    find_dtype,
    find_token_files,
    read_split,
    token_dtype,
)
from engine.errors import UserError
from engine.tokenizer import DatasetMeta, TokenizerSpec


def name_tokenizer(folder: Path, spec: TokenizerSpec) -> DatasetMeta:
    """Write the meta.json that names the tokenizer of the token files in `folder`.

    The ids of a file without a header have the type that an earlier meta.json says, or else the
    one that they seem to have. Raises UserError where files are missing or damaged, where an id is
    beyond the tokenizer's, and where a meta.json names a tokenizer already.
    """
    files = find_token_files(folder)
    if not files['train'] or not files['val']:
        raise UserError(f'{folder} has no token files of train and val, such as train.bin and '
                        f'val.bin, or NAME_train_000001.bin and NAME_val_000000.bin')
    check_names_none(folder)

    dtype = DatasetMeta.read(folder).dtype
    if dtype is None:
        dtype = find_dtype(folder, files['train'], token_dtype(spec.vocab_size))
    tokens = {}
    formats = []
    for split in SPLITS:
        stream = TokenStream(folder, files[split], dtype)
        formats.append(stream.format)
        contents = read_split(stream, split, {})
        if contents.largest >= spec.vocab_size:
            raise UserError(f'{contents.path}: token {contents.position:,} has id '
                            f'{contents.largest}, and {spec.label} has {spec.vocab_size:,} tokens; '
                            f'name the --tokenizer= that made them')
        tokens[split] = len(stream)

    if all(file_format.header_bytes for file_format in formats):
        dtype = formats[0].dtype            # for people alone: the headers have it
    meta = DatasetMeta(spec, dtype=dtype, tokens=tokens)
    with atomic_write(folder / 'meta.json') as file:
        json.dump(meta.to_dict(), file)
    return meta


def check_names_none(folder):
    """UserError where the meta.json of a folder names a tokenizer, or is damaged."""
    path = folder / 'meta.json'
    if not path.exists():
        return
    DatasetMeta.read(folder)
    if 'tokenizer' in json.loads(path.read_text(encoding='utf-8-sig')):
        raise UserError(f'{path} names a tokenizer already; remove that file to name another one')
