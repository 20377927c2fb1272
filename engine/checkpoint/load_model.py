"""A model and its tokenizer, from a run or from Hugging Face weights; tokens that are new to it."""

import math
import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from engine.chat_layout import ChatLayout
from engine.checkpoint import run_folder
from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.gathered import MODEL
from engine.checkpoint.kept import NAME
from engine.dataloader.batches import dataset_tokenizer
from engine.errors import UserError
from engine.hf.tokenizer_json import (
    download_pretrained,
    extends,
    pretrained_chat,
    pretrained_spec,
    tokens_from,
)
from engine.log import log
from engine.tokenizer import GPT2, TokenizerSpec, same_tokens


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
    """The model of a run, or that of Hugging Face weights.

    GPT: the class of the model, which this module cannot import.
    init_from: 'resume' for the run in out_dir, else the folder of a run, the name of a hub model or
        a folder of weights.
    out_dir: the folder of a run, or one file of it, such as ckpt_001000.pt.
    Raises UserError where the weights or the tokenizer cannot be used.
    """
    if init_from == 'resume':
        return load_run(GPT, out_dir)
    run = run_folder.find_run(init_from)
    if run:
        return load_run(GPT, run)
    return load_pretrained(GPT, init_from)


def load_run(GPT, out_dir):
    saved = run_folder.newest_checkpoint(out_dir)
    model = GPT.from_checkpoint(saved)
    spec = checkpoint_spec(saved)

    dataset = (saved.config or {}).get('dataset')
    advice = f'restore the dataset that the model was trained on: dataset={dataset!r:.200}'
    if dataset is None:
        advice = ("the file names no dataset, so GPT-2's tokens are assumed; save it again with "
                  "config={'dataset': 'NAME'} in it, a folder in data/ with its meta.pkl")
    check_vocabulary(model, spec, out_dir, advice)
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
                     'put its own tokenizer.json beside the weights, or give them rows for these, '
                     f'as train.py --init_from={shlex.quote(source)} does, or '
                     f'resize_token_embeddings({spec.vocab_size}) of transformers')
    return LoadedModel(model, spec, None, pretrained_chat(source))


def check_vocabulary(model, spec, source, advice):
    """UserError where the tokenizer has ids that the model lacks."""
    size = model.config.vocab_size
    if spec.vocab_size <= size:
        return

    beyond = ''
    if spec.tokenizer_json:
        beyond = f': {" ".join(tokens_from(spec, size))[:100]} beyond them'
    raise UserError(f'{source} has {size} tokens, and its tokenizer '
                    f'{spec.vocab_size}{beyond}; {advice}')


def run_spec(run: Path) -> TokenizerSpec:
    """The tokenizer spec of the run in the folder `run`. Raises UserError as checkpoint_spec."""
    return checkpoint_spec(run_folder.newest_checkpoint(run))


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


# Weights to train further, on a dataset

def download_source(init_from: str) -> None:
    """Download what --init_from of train.py names on the hub, if it names a hub model.

    Raises UserError and RunError as download_pretrained.
    """
    if not run_folder.find_run(init_from):
        download_pretrained(init_from)


def load_to_train(GPT: type, source: str, dataset: str, spec: TokenizerSpec,
                  dropout: float) -> nn.Module:
    """The model of a run's folder, a hub model, or a folder of weights, to train on a dataset.

    dataset, spec: the setting that names the dataset, and the spec of its tokenizer. If the dataset
    has more tokens than the weights were trained with, the model gets rows for them.
    Raises UserError where the weights cannot be used, or were trained on other tokens.
    """
    run = run_folder.find_run(source)
    if run:
        saved = run_folder.newest_checkpoint(run)
        model = GPT.from_checkpoint(saved, dropout)
        known = checkpoint_spec(saved)
    else:
        model = GPT.from_pretrained(source, {'dropout': dropout})
        known = pretrained_spec(source)

    size = model.config.vocab_size
    check_same_tokens(source, known, size, dataset, spec)
    n_trained = size
    if known:
        n_trained = min(size, known.vocab_size)
    if spec.vocab_size > n_trained:
        grow_embedding(model, n_trained, spec.vocab_size)
        tokens = ' '.join(map(repr, tokens_from(spec, n_trained)))
        log.info(f'note: new tokens {tokens[:100]}: their rows of the embedding begin as the mean '
                 f'of the others; it has {model.config.vocab_size:,} rows')
    return model


def check_same_tokens(source, known, size, dataset, spec):
    """UserError where weights were trained on other tokens than a dataset has.

    known: the spec of the weights' tokenizer. Without one, it is None, and only a vocabulary of
    characters can be told apart. size: how many tokens the weights have.
    """
    if known:
        fits = same_tokens(known, spec) or extends(spec, known)
    elif spec.kind == 'char':
        fits = spec.vocab_size == size
    else:
        fits = spec.vocab_size <= size or extends(spec, GPT2)
    if fits:
        return

    suggestion = source
    if known is None or known.kind == 'gpt2':
        suggestion = 'gpt2'
    raise UserError(f'the tokens of {dataset} are not those of {source}; prepare its text with '
                    f'data/text/prepare.py --tokenizer={shlex.quote(suggestion)}')


def grow_embedding(model: nn.Module, n_trained: int, n_tokens: int) -> None:
    """Give a GPT's embedding and head rows for n_tokens tokens, of which n_trained were trained.

    The rows from n_trained on become the mean of those before. Some may be there already, as
    padding. new_tokens(model) then gives their ids.
    """
    size = model.config.vocab_size
    n_rows = max(size, n_tokens)

    def grown(weight):
        rows = weight.new_empty(n_rows, weight.size(1))
        rows[:size] = weight
        rows[n_trained:n_tokens] = weight[:n_trained].mean(dim=0)
        return nn.Parameter(rows)

    with torch.no_grad():
        model.transformer.wte.weight = grown(model.transformer.wte.weight)
        if model.config.tied:
            model.lm_head.weight = model.transformer.wte.weight
        else:
            model.lm_head.weight = grown(model.lm_head.weight)
    model.transformer.wte.num_embeddings = n_rows
    model.lm_head.out_features = n_rows
    model.config.vocab_size = n_rows
    model.transformer.wte.new_tokens = range(n_trained, n_tokens)


def new_tokens(model: nn.Module) -> range:
    """The ids of the tokens for which grow_embedding gave a GPT rows, in this process."""
    return getattr(model.transformer.wte, 'new_tokens', range(0))
