"""A model and its tokenizer, from a run or from Hugging Face weights."""

import math
from pathlib import Path
from typing import NamedTuple

from torch import nn

from engine.chat_layout import ChatLayout
from engine.checkpoint import run_folder
from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.gathered import MODEL
from engine.checkpoint.kept import NAME
from engine.dataloader.batches import dataset_tokenizer
from engine.errors import UserError
from engine.hf.tokenizer_json import pretrained_spec
from engine.tokenizer import GPT2, TokenizerJson, TokenizerSpec


class LoadedModel(NamedTuple):
    """A model that can read and write text.

    model: a GPT.
    spec: the spec of its tokenizer.
    iter_num: the iteration of the run, or None for Hugging Face weights.
    chat: the layout of the conversations that it was trained on, or None.
    description: a line for people that says which model of a run it is; None for Hugging Face
        weights.
    """
    model: nn.Module
    spec: TokenizerSpec
    iter_num: int | None
    chat: ChatLayout | None = None
    description: str | None = None


def load_model(GPT: type, init_from: str, out_dir: str | Path) -> LoadedModel:
    """The model of the run in out_dir, or that of Hugging Face weights.

    GPT: the class of the model, which this module cannot import.
    init_from: 'resume' for the run in out_dir, else the name of a hub model or a folder of weights.
    out_dir: the folder of a run, or one file of it, such as ckpt_001000.pt.
    Raises UserError where the weights or the tokenizer cannot be used.
    """
    if init_from == 'resume':
        return load_run(GPT, out_dir)
    return load_pretrained(GPT, init_from)


def load_run(GPT, out_dir):
    saved = run_folder.newest_checkpoint(out_dir)
    model = GPT.from_checkpoint(saved)
    spec = checkpoint_spec(saved)

    check_vocabulary(model, spec, out_dir,
                     'restore the dataset in data/ that the model was trained on')
    return LoadedModel(model, spec, saved.iter_num, checkpoint_chat(saved), describe_model(saved))


def describe_model(saved: Checkpoint) -> str:
    """'out/ckpt.pt: the last model, iteration 2,500, val loss 1.23', for people."""
    name = Path(saved.path).name
    settings = saved.config or {}
    if NAME.fullmatch(name):
        text = f'{saved.path}: a kept model'
    elif name == MODEL and settings.get('always_save_checkpoint') is False:
        text = f'{saved.path}: the best model'
    else:
        text = f'{saved.path}: the last model'

    # nanoGPT's files have the best val loss alone.
    if saved.iter_num is not None:
        text += f', iteration {saved.iter_num:,}'
    if saved.last_val_loss is not None:
        text += f', val loss {saved.last_val_loss:.4f}'
        if saved.last_eval is not None and saved.last_eval != saved.iter_num:
            text += f' at iteration {saved.last_eval:,}'
    is_best = saved.best_iter is not None and saved.best_iter == saved.last_eval
    if saved.best_val_loss is not None and math.isfinite(saved.best_val_loss) and not is_best:
        text += f'; best val loss {saved.best_val_loss:.4f}'
        if saved.best_iter is not None:
            text += f' at iteration {saved.best_iter:,}'
    return text


def load_pretrained(GPT, source):
    model = GPT.from_pretrained(source)
    spec = pretrained_spec(source) or GPT2

    check_vocabulary(model, spec, source,
                     'put its own tokenizer.json beside the weights, or give them rows for these '
                     f'with resize_token_embeddings({spec.vocab_size}) of transformers')
    return LoadedModel(model, spec, None, None)


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
