"""Adapters of low rank beside the frozen Linears of the blocks (LoRA), and how a run saves them.

    y = W x + b + (alpha / r) B A x             W (out, in), A (r, in), B (out, r)

Only A and B are trained. B begins as zeros, so the model begins as its base, the weights that it
was loaded with. A begins with orthonormal rows. So the first step of gradient descent changes the
merged matrix W + (alpha / r) B A by -lr (alpha / r)^2 G A^T A, where G is the gradient of W: that
is the step of full finetuning, projected on r directions.
Source: Hu et al. 2021 (arXiv:2106.09685), where A begins with normal numbers.

A dataset may have tokens that the base does not know. Their rows of the embedding and of the head
are trained too: frozen, they would all stay the mean of the others.
"""

import hashlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn

from engine.checkpoint.contents import Checkpoint
from engine.checkpoint.gathered import gather, gather_weights
from engine.checkpoint.load_model import new_tokens
from engine.device import derive_seed
from engine.distributed import Environment
from engine.errors import UserError
from engine.log import log

# The names of what is trained, in its layer: A and B, and the rows of new tokens
ADAPTERS = ('lora_a', 'lora_b', 'lora_rows')
TOKEN_LAYERS = ('transformer.wte', 'lm_head')   # they have a row for each token
# A run may change these weights of its base: it cuts or stretches them to block_size.
NOT_IN_FINGERPRINT = 'transformer.wpe.weight'


# The layers

class FrozenLinear(nn.Module):
    """An nn.Linear that is not trained, in a precision that may be lower than that of its input."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.weight = frozen(linear.weight, dtype)                  # (out, in)
        self.bias = None
        if linear.bias is not None:
            self.bias = frozen(linear.bias, dtype)                  # (out,)

    def forward(self, x):                                           # (..., in)
        weight = self.weight
        bias = self.bias

        # Autocast casts what a product reads. Without it, all have to be of one type.
        if not torch.is_autocast_enabled(x.device.type):
            weight = weight.to(x.dtype)
            if bias is not None:
                bias = bias.to(x.dtype)
        return F.linear(x, weight, bias)                            # (..., out)

    def merged_weight(self) -> torch.Tensor:
        """The matrix, (out, in), in float32, of an nn.Linear that computes the same."""
        return self.weight.float()


class LoRALinear(FrozenLinear):
    """A frozen Linear, and an adapter of low rank, in float32, whose output is added to its own."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, rank: int, alpha: float,
                 dropout: float, generator: torch.Generator):
        super().__init__(linear, dtype)
        self.scale = alpha / rank
        self.dropout = nn.Dropout(dropout)
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.orthogonal_(self.lora_a, generator=generator)

    def forward(self, x):                                           # (..., in)
        h = F.linear(self.dropout(x), self.lora_a)                  # (..., r)
        return super().forward(x) + F.linear(self.scale * h, self.lora_b)

    def merged_weight(self):
        return self.weight.float() + self.scale * (self.lora_b @ self.lora_a)


class GrownEmbedding(nn.Module):
    """An nn.Embedding of which only the rows of new tokens are trained.

    tokens: the ids of the new tokens, a range.
    """

    def __init__(self, weight: torch.Tensor, tokens: range):        # (V, C)
        super().__init__()
        self.new_tokens = tokens
        self.old = frozen(weight, weight.dtype)                     # (V, C)
        rows = weight[tokens.start:tokens.stop].detach().clone()
        self.lora_rows = nn.Parameter(rows)                         # (n, C)

    @property
    def weight(self) -> torch.Tensor:
        """The whole matrix, (V, C), a copy. Gradients flow into the new rows."""
        before = self.old[:self.new_tokens.start]
        after = self.old[self.new_tokens.stop:]
        return torch.cat([before, self.lora_rows, after])

    def forward(self, idx):                                         # (B, T)
        # It does not read `weight`, whose gradient would be a whole matrix.
        n_new = len(self.new_tokens)
        index = idx - self.new_tokens.start
        is_new = (index >= 0) & (index < n_new)
        new = F.embedding(index.clamp(0, n_new - 1), self.lora_rows)
        return torch.where(is_new[..., None], new, F.embedding(idx, self.old))     # (B, T, C)


class GrownHead(nn.Module):
    """The head over the rows of a GrownEmbedding, which may be that of the model, or its own."""

    def __init__(self, rows: GrownEmbedding):
        super().__init__()
        self.rows = rows

    @property
    def weight(self) -> torch.Tensor:
        return self.rows.weight

    def forward(self, x):                                           # (..., C)
        return F.linear(x, self.weight)                             # (..., V)


def frozen(parameter, dtype):
    return nn.Parameter(parameter.detach().to(dtype), requires_grad=False)


# A model with adapters

def replace_linears(model: nn.Module, settings: dict, saved: Checkpoint | None,
                    env: Environment) -> dict | None:
    """Freeze `model` and put a LoRALinear in the place of each Linear that lora_targets names.

    The other Linears of the blocks become FrozenLinears. A step in bfloat16 keeps the matrices of
    both in bfloat16, since its products read them so anyway.
    settings: train.py's, {name: value}. With lora_rank=0 the model stays as it is.
    saved: the state that the run goes on from, whose adapters the model takes over, or None.
    Returns what a checkpoint says of the base, {'source': where its weights come from,
    'fingerprint': their hash, which only rank 0 knows}, or None with lora_rank=0.
    Raises UserError, on all ranks, where the settings, the state and the base do not fit together.
    """
    with env.raise_on_all_ranks():
        check_that_they_fit(settings, saved)
        if not settings['lora_rank']:
            return None

        base = dict(source=settings['init_from'], fingerprint=None)
        if saved:
            base['source'] = saved.base['source']
        if env.is_main:
            base['fingerprint'] = fingerprint(model)
            check_same_base(base, saved)

        adapt(model, settings, env.dtype)
        if saved:
            load_adapters(model, saved)
    return base


def adapt(model: nn.Module, settings: dict, precision: str) -> None:
    """Freeze a GPT and replace the Linears of its blocks, as replace_linears says.

    precision: that of the step, such as 'bfloat16'.
    Raises UserError for a target that no Linear has as its name.
    """
    model.requires_grad_(False)
    train_new_rows(model)
    dtype = torch.float32
    if precision == 'bfloat16':
        dtype = torch.bfloat16

    targets = [name.strip() for name in settings['lora_targets'].split(',')]
    linears = dict(linears_of_blocks(model))
    for target in targets:
        if not any(is_target(name, [target]) for name in linears):
            known = sorted({name.rpartition('.')[2] for name in linears})
            raise UserError(f'lora_targets has {target!r}, and the Linears of the blocks are '
                            f'{", ".join(known)}; try --lora_targets={",".join(known)}')

    generator = torch.Generator().manual_seed(derive_seed(settings['seed'], 'lora'))
    for name in list(linears):
        linear = linears.pop(name)              # so that its memory is free once it is replaced
        if is_target(name, targets):
            layer = LoRALinear(linear, dtype, settings['lora_rank'], settings['lora_alpha'],
                               settings['lora_dropout'], generator)
        else:
            layer = FrozenLinear(linear, dtype)
        parent, _, own_name = name.rpartition('.')
        setattr(model.get_submodule(parent), own_name, layer)


def train_new_rows(model):
    """Let the rows of tokens that the base does not know be trained, if there are any."""
    tokens = new_tokens(model)
    if not tokens:
        return
    embedding = GrownEmbedding(model.transformer.wte.weight, tokens)
    head = embedding
    if not model.config.tied:
        head = GrownEmbedding(model.lm_head.weight, tokens)
    model.transformer.wte = embedding
    model.lm_head = GrownHead(head)
    log.info('note: the rows of new tokens are trained beside the adapters')


def linears_of_blocks(model) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of each Linear in the blocks, such as transformer.h.0.attn.c_attn."""
    for name, layer in model.named_modules():
        if name.startswith('transformer.h.') and isinstance(layer, nn.Linear):
            yield name, layer


def is_target(name, targets):
    """True where a name ends with one of the targets, as peft reads its target_modules."""
    return any(name == target or name.endswith(f'.{target}') for target in targets)


# What a checkpoint holds

def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's weights, in the order of their names.

    It leaves out learned positions, which block_size changes, and the rows of new tokens: these
    begin as a mean, which another machine may round differently.
    """
    tokens = new_tokens(model)
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        if name == NOT_IN_FINGERPRINT:
            continue
        digest.update(name.encode())
        parts = [weight]
        if name.removesuffix('.weight') in TOKEN_LAYERS:
            parts = [weight[:tokens.start], weight[tokens.stop:]]
        for part in parts:
            digest.update(part.detach().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def adapters(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: matrix} of the adapters of a model, on the CPU."""
    return {name: parameter.detach().cpu() for name, parameter in named_adapters(model)}


def named_adapters(model):
    for name, parameter in model.named_parameters():
        if name.endswith(ADAPTERS):
            yield name, parameter


@torch.no_grad()
def merged_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """{name: weight} of a GPT without adapters that computes the same.

    They are on the CPU on rank 0, and None on the others. The matrices of the blocks are float32.
    Where the model keeps its base in bfloat16, it is that rounded base which the adapters join.
    """
    weights = gather_weights(model)

    # the blocks
    for name, layer in model.named_modules():
        if not isinstance(layer, FrozenLinear):
            continue
        weights[f'{name}.weight'] = gather(layer.merged_weight())
        if layer.bias is not None:
            weights[f'{name}.bias'] = gather(layer.bias.float())
        for adapter in ADAPTERS:
            weights.pop(f'{name}.{adapter}', None)

    # the embedding and the head, where they have new rows
    embedding = model.transformer.wte
    if not isinstance(embedding, GrownEmbedding):
        return weights
    prefixes = tuple(f'{name}.' for name in TOKEN_LAYERS)
    weights = {name: weight for name, weight in weights.items() if not name.startswith(prefixes)}
    weights['transformer.wte.weight'] = gather(embedding.weight)
    weights['lm_head.weight'] = weights['transformer.wte.weight']
    if not model.config.tied:
        weights['lm_head.weight'] = gather(model.lm_head.weight)
    return weights


def load_adapters(model, saved):
    """Copy the adapters of a checkpoint into a model. UserError where they do not fit."""
    own = dict(named_adapters(model))
    shapes = {name: parameter.shape for name, parameter in own.items()}
    if shapes != {name: value.shape for name, value in saved.adapters.items()}:
        raise UserError(f'{saved.path} has adapters of another rank, or for other Linears or '
                        f'other new tokens; go on without --lora_rank and --lora_targets, which '
                        f'keeps its own')
    for name, parameter in own.items():
        parameter.data.copy_(saved.adapters[name])


# Checks

def check_that_they_fit(settings, saved):
    """UserError where a run with adapters goes on without them, or where adapters have no base."""
    rank = settings['lora_rank']
    if saved and saved.base and not rank:
        raise UserError(f'{saved.path} has adapters, which lora_rank=0 leaves out; go on without '
                        f'--lora_rank, or train the whole merged model as a new run, by '
                        f'--init_from={settings["out_dir"]} and another --out_dir')
    if saved and not saved.base and rank:
        raise UserError(f'{saved.path} has no adapters, so it cannot go on with lora_rank={rank}; '
                        f'begin a new run with its model as the base, by '
                        f'--init_from={settings["out_dir"]} and another --out_dir')
    if not saved and rank and settings['init_from'] in ('scratch', 'auto'):
        raise UserError(f'lora_rank={rank} adapts weights that were trained before, and '
                        f'init_from={settings["init_from"]} has none; try --init_from=gpt2')


def check_same_base(base, saved):
    """UserError where the weights are not those that the adapters of `saved` were trained on."""
    if saved and saved.base['fingerprint'] != base['fingerprint']:
        raise UserError(f'{base["source"]} has other weights than those that the adapters of '
                        f'{saved.path} were trained on; put those back to go on. sample.py and '
                        f'export.py do not need them')
