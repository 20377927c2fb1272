"""Whether a configuration can be built, and whether weights fit a model. Both may come from a file of somebody else's."""

import torch

from engine.errors import UserError

RANGES = dict(block_size=(1, 2 ** 24), vocab_size=(1, 2 ** 24), n_layer=(1, 1000), n_head=(1, 2 ** 17), n_embd=(1, 2 ** 17),
              n_kv_head=(0, 2 ** 17), n_inner=(0, 2 ** 20), rope_theta=(1, 1e9), norm_eps=(0, 1), softcap=(0, 1e6),
              init_std=(1e-6, 1))
CHOICES = dict(activation=('gelu', 'gelu_tanh', 'relu2', 'swiglu'), position=('learned', 'rotary', 'alibi'),
               norm=('layernorm', 'rmsnorm', 'rmsnorm_gain'),
               **dict.fromkeys(('qk_norm', 'embedding_norm', 'tied', 'zero_init'), (True, False)))


def check_config(config):
    """UserError for a GPTConfig that cannot be built."""
    for name, (low, high) in RANGES.items():
        value, whole = getattr(config, name), type(getattr(type(config), name)) is int      # the class holds the default
        if type(value) not in ((int,) if whole else (int, float)) or not low <= value <= high:
            raise UserError(f'{name}={value!r} should be a {"whole " if whole else ""}number from {low} to {high:,}')
    for name, values in CHOICES.items():
        value = getattr(config, name)
        if type(value) is not type(values[0]) or value not in values:
            raise UserError(f'{name}={value!r} should be one of {", ".join(map(repr, values))}')
    if not 0 <= config.dropout < 1:
        raise UserError(f'dropout={config.dropout} should be at least 0 and below 1')
    if config.n_embd % config.n_head:
        nearest = max(1, round(config.n_embd / config.n_head)) * config.n_head
        raise UserError(f'n_embd={config.n_embd} does not divide over n_head={config.n_head}; try --n_embd={nearest}')
    if config.n_head % config.kv_heads:
        divisor = max(n for n in range(1, config.n_head + 1) if config.n_head % n == 0 and n <= config.kv_heads)
        raise UserError(f'n_head={config.n_head} does not divide over n_kv_head={config.kv_heads}; try --n_kv_head={divisor}')
    if config.position == 'rotary' and config.head_size % 2:
        raise UserError(f'rotary positions need an even head size, and n_embd={config.n_embd} over n_head={config.n_head} is '
                        f'{config.head_size}; try --n_embd={2 * config.n_embd}')


def check_weights(model, weights):
    """UserError where a name or shape in `weights`, {name: tensor}, is missing, unknown or not that of `model`."""
    layers = {name.split('.')[2] for name in weights if name.startswith('transformer.h.')}
    if len(layers) != model.config.n_layer:
        raise UserError(f'the weights have {len(layers)} layers, the settings {model.config.n_layer}')
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(f'weight {name}: {found.get(name, "missing")} in the file, '
                            f'{expected.get(name, "no such name")} in the model')
    if model.config.tied and not torch.equal(weights['lm_head.weight'], weights['transformer.wte.weight']):
        raise UserError('lm_head.weight differs from transformer.wte.weight, and here they are tied')
