"""Weights that training leaves as they are."""

import re
from collections.abc import Iterator

from torch import nn

from engine.checkpoint.load_model import new_tokens
from engine.distributed import Environment
from engine.errors import UserError
from engine.log import log


def freeze_layers(model: nn.Module, names: str, env: Environment) -> None:
    """Exclude the weights of some layers from training. Every rank calls it.

    names: layers of GPT.transformer, and lm_head, with commas between them; a part of one, such as
    h.0.attn; or a range of blocks, such as h.0-5. An empty text freezes nothing.
    A tied weight is frozen by either of its names.
    Raises UserError, on all ranks, for a name that no layer has, and where nothing is left to
    train.
    """
    with env.raise_on_all_ranks():
        freeze(model, names)

    n_new = len(new_tokens(model))
    if n_new and not model.transformer.wte.weight.requires_grad:
        log.info(f'note: freeze={names} leaves the rows of {n_new} new tokens as they begin, which '
                 f'is as the mean of the others; without wte in it they are trained')


def freeze(model: nn.Module, names: str) -> None:
    """Exclude the weights of layers from training, as freeze_layers does, on this rank alone."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in filter(None, (part.strip() for part in names.split(','))):
        for layer in expand_range(name):
            prefixes = (f'transformer.{layer}.', f'{layer}.')
            found = [p for full_name, p in parameters.items() if full_name.startswith(prefixes)]
            if not found:
                raise no_such_layer(layer, model)
            for parameter in found:
                parameter.requires_grad_(False)

    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f'freeze={names} leaves nothing to train; name fewer layers')


def expand_range(name: str) -> Iterator[str]:
    """The names that a name stands for: h.0-2.attn is h.0.attn, h.1.attn and h.2.attn."""
    found = re.fullmatch(r'h\.(\d{1,4})-(\d{1,4})(\..+)?', name)
    if not found:
        yield name
        return
    first, last, rest = found.groups()
    if int(first) > int(last):
        raise UserError(f'freeze has {name}, a range that ends before it begins; '
                        f'try h.{last}-{first}')
    for i in range(int(first), int(last) + 1):
        yield f'h.{i}{rest or ""}'


def no_such_layer(name, model):
    """The UserError about a name that freezes nothing."""
    layers = [own for own, layer in model.transformer.named_children()
              if own != 'h' and any(True for _ in layer.parameters())]
    last = model.config.n_layer - 1
    return UserError(f'freeze has {name}, and no layer with weights is called so; '
                     f'there are {", ".join(layers)}, lm_head, and h.0 to h.{last}, '
                     f'as in --freeze=wte,h.0-{last // 2}')
