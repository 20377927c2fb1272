"""Whether a configuration can be built, and whether weights fit a model.

Either may come from a file that somebody else wrote.
"""

import math
from dataclasses import Field, fields
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from engine.errors import UserError

# Lowest and highest values of numbers. What else a field may hold is written in its annotation.
RANGES = dict(
    block_size=(1, 2 ** 24),
    vocab_size=(1, 2 ** 24),
    n_layer=(1, 1000),
    n_head=(1, 2 ** 17),
    n_embd=(1, 2 ** 17),
    rope_theta=(1, 1e9),
    norm_eps=(0, 1),
    n_kv_head=(0, 2 ** 17),
    n_inner=(0, 2 ** 20),
    softcap=(0, 1e6),
    init_std=(1e-6, 1),
)


def allowed_values(field: Field) -> tuple | None:
    """The values among which a field of GPTConfig chooses, by its annotation, or None for a
    number."""
    if field.type is bool:
        return (True, False)
    if get_origin(field.type) is Literal:
        return get_args(field.type)
    return None


def check_config(config) -> None:
    """UserError for a GPTConfig that cannot be built."""
    for field in fields(config):
        value = getattr(config, field.name)
        values = allowed_values(field)
        if values is None:
            check_number(field, value)
        elif type(value) is not type(values[0]) or value not in values:
            choices = ', '.join(map(repr, values))
            raise UserError(f'{field.name}={value!r} should be one of {choices}')

    check_head_sizes(config)


def check_number(field: Field, value: Any) -> None:
    """UserError unless `value` is a number of the field's type and within its range, if it has
    one."""
    if field.name == 'dropout':                         # the only range without its upper end
        if type(value) not in (int, float) or not 0 <= value < 1:
            raise UserError(f'dropout={value!r} should be at least 0 and below 1')
        return

    low, high = RANGES.get(field.name, (-math.inf, math.inf))
    words = 'number'
    types = (int, float)
    if field.type is int:
        words = 'whole number'
        types = (int,)
    if field.name in RANGES:
        words += f' from {low} to {high:,}'
    if type(value) not in types or not low <= value <= high:
        raise UserError(f'{field.name}={value!r} should be a {words}')


def check_head_sizes(config) -> None:
    """UserError where the channels do not divide over the heads, or the heads over those of
    keys."""
    if config.n_embd % config.n_head:
        nearest = max(1, round(config.n_embd / config.n_head)) * config.n_head
        raise UserError(f'n_embd={config.n_embd} does not divide over n_head={config.n_head}; '
                        f'try --n_embd={nearest}')

    if config.n_head % config.kv_heads:
        divisors = [n for n in range(1, config.n_head + 1) if config.n_head % n == 0]
        nearest = max(n for n in divisors if n <= config.kv_heads)
        raise UserError(f'n_head={config.n_head} does not divide over n_kv_head={config.kv_heads}; '
                        f'try --n_kv_head={nearest}')

    if config.position == 'rotary' and config.head_size % 2:
        raise UserError(f'rotary positions need an even head size, and n_embd={config.n_embd} over '
                        f'n_head={config.n_head} is {config.head_size}; '
                        f'try --n_embd={2 * config.n_embd}')


def check_weights(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """UserError where a name or shape in `weights` is missing, unknown or not that of `model`."""
    layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    if len(layers) != model.config.n_layer:
        raise UserError(f'the weights have {len(layers)} layers, '
                        f'the settings {model.config.n_layer}')

    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f'weight {name}: {found.get(name, "missing")} in the file, '
                            f'{expected.get(name, "no such name")} in the model')

    if model.config.tied:
        if not torch.equal(weights['lm_head.weight'], weights['transformer.wte.weight']):
            raise UserError('lm_head.weight differs from transformer.wte.weight, '
                            'and here they are tied')


def check_overrides(overrides: dict | None, source: str) -> dict:
    """`overrides` of GPTConfig's arguments, which may only have dropout, as weights set the rest.

    source: where the weights come from, for the message.
    """
    overrides = overrides or {}
    refused = set(overrides) - {'dropout'}
    if refused:
        names = ', '.join(sorted(refused))
        raise UserError(f'the weights of {source} set {names}; only dropout can be given')
    return overrides
