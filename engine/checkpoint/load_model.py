"""A model and its tokenizer, from a run or from Hugging Face weights."""

from pathlib import Path
from typing import NamedTuple

from torch import nn

from engine.chat_layout import ChatLayout
from engine.checkpoint import run_folder
from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.gathered import MODEL
from engine.dataloader.batches import dataset_tokenizer
from engine.errors import UserError
from engine.hf.tokenizer_json import pretrained_spec
from engine.log import log
from engine.tokenizer import GPT2, TokenizerJson, TokenizerSpec


class LoadedModel(NamedTuple):
    """A model that can read and write text.

    model: a GPT.
    spec: the spec of its tokenizer.
    iter_num: the iteration of the run, or None for Hugging Face weights.
    chat: the layout of the conversations that it was trained on, or None.
    """
    model: nn.Module
    spec: TokenizerSpec
    iter_num: int | None
    chat: ChatLayout | None = None


def load_model(GPT: type, init_from: str, out_dir: str | Path) -> LoadedModel:
    """The model of the run in out_dir, or that of Hugging Face weights.

    GPT: the class of the model, which this module cannot import.
    init_from: 'resume' for the run in out_dir, else the name of a hub model or a folder of weights.
    Raises UserError where the weights or the tokenizer cannot be used.
    """
    if init_from == 'resume':
        return load_run(GPT, out_dir)
    return load_pretrained(GPT, init_from)


def load_run(GPT, out_dir):
    saved = run_folder.newest_checkpoint(out_dir)
    if not (Path(out_dir) / MODEL).exists():
        log.info(f'note: no {MODEL}: the last model of {Path(saved.path).name}, '
                 f'iteration {saved.iter_num}')
    model = GPT.from_checkpoint(saved)
    spec = checkpoint_spec(saved)

    check_vocabulary(model, spec, out_dir,
                     'restore the dataset in data/ that the model was trained on')
    return LoadedModel(model, spec, saved.iter_num, checkpoint_chat(saved))


def load_pretrained(GPT, source):
    model = GPT.from_pretrained(source)
    spec = pretrained_spec(source) or GPT2

    check_vocabulary(model, spec, source,
                     'put its own tokenizer.json beside the weights, or give them rows for these '
                     f'with resize_token_embeddings({spec.vocab_size}) of transformers')
    return LoadedModel(model, spec, None)


def check_vocabulary(model, spec, source, advice):
    """UserError where the tokenizer has ids that the model lacks."""
    size = model.config.vocab_size
    if spec.vocab_size <= size:
        return

    beyond = ''
    if spec.tokenizer_json:
        tokenizer = TokenizerJson(spec.tokenizer_json).tokenizer
        tokens = [str(tokenizer.id_to_token(i)) for i in range(size, spec.vocab_size)]
        beyond = f': {" ".join(tokens)[:100]} beyond them'
    raise UserError(f'{source} has {size} tokens, and its tokenizer '
                    f'{spec.vocab_size}{beyond}; {advice}')


def checkpoint_spec(saved: Checkpoint) -> TokenizerSpec:
    """The tokenizer spec of a checkpoint: its own, else that of its dataset, else GPT-2's.

    Raises UserError where the spec is not one of a tokenizer.
    """
    if not saved.tokenizer:
        # nanoGPT's files have no tokenizer, but they name the dataset.
        config = saved.config or {}
        return dataset_tokenizer(config.get('dataset'))

    try:
        return TokenizerSpec.from_dict(saved.tokenizer)
    except UserError as error:
        raise UserError(f'{saved.path}: {error}') from None


def checkpoint_chat(saved: Checkpoint) -> ChatLayout | None:
    """The layout of conversations that a checkpoint names. UserError where it is none."""
    if saved.chat is None:
        return None
    try:
        return ChatLayout.from_dict(saved.chat)
    except UserError as error:
        raise UserError(f'{saved.path}: {error}') from None
