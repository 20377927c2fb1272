"""What a checkpoint holds, and the checks of what a file claims to hold."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from engine.errors import UserError

# What every checkpoint has; what a run needs beside it to go on; and what a state has.
NEEDED = ('model', 'model_args')
RESUME_NEEDS = ('iter_num', 'best_val_loss')
STATE_NEEDS = (*RESUME_NEEDS, 'optimizer', 'scaler')

TYPES = dict(
    model_args=dict,
    config=dict,
    tokenizer=dict,
    chat=dict,
    optimizer=dict,
    scaler=dict,
    base=dict,
    fingerprint=str,
    dtype=str,
    wandb_id=str,
    last_eval=int,
    last_val_loss=float,
    clipped=list,
    activation=str,
)
# The arguments of nanoGPT's GPTConfig
NANOGPT_ARGS = ('block_size', 'vocab_size', 'n_layer', 'n_head', 'n_embd', 'dropout', 'bias')
COUNTS = ('sequences', 'tokens', 'best_iter')       # whole numbers, where a checkpoint has them
LARGEST_COUNT = 2 ** 63 - 1
OPTIONAL_IN_FILES = ('model', 'adapters', 'base', 'optimizer', 'scaler', 'clipped',
                     'last_val_loss', 'chat')
NOT_IN_FILES = ('path', 'shards_folder', 'stands_in_for')


@dataclass(kw_only=True, eq=False)                  # tensors cannot be compared with ==
class Checkpoint:
    """A run as a checkpoint holds it. A field is None where the file lacks it, as nanoGPT's files
    lack several.

    ckpt.pt, state.pt and the run.pt of a sharded state are each a dict of the fields down to
    `scaler`, in this order. ckpt.pt has no optimizer and no scaler. run.pt has no model, and its
    optimizer, without the moments, is last.
    """
    # the model
    activation: str | None = None       # its GPTConfig.activation; nanoGPT has the exact GELU only
    model_args: dict                    # what nanoGPT passes to its own GPTConfig; an activation
                                        # that is no GELU is in it too
    model: dict[str, torch.Tensor] | None = None    # {name: weight}; None where sharded; empty in
                                        # the state of a run that trains adapters
    adapters: dict[str, torch.Tensor] | None = None     # {name: matrix} of such a run, which are
                                        # merged into the model of its ckpt.pt
    base: dict | None = None            # what they adapt, {'source': as init_from has it,
                                        # 'fingerprint': the hash of the weights}

    # how far the run is, as Progress in engine/training/run.py has it
    iter_num: int | None = None         # optimizer steps
    sequences: int | None = None        # drawn from the training split
    tokens: int | None = None           # in those sequences
    best_val_loss: float | None = None  # nats; infinity before the first evaluation
    best_iter: int | None = None        # iteration of that evaluation
    last_eval: int | None = None        # iteration of the last evaluation, if there was one
    last_val_loss: float | None = None  # nats, at that evaluation
    clipped: list[bool] | None = None   # whether each of the last steps was clipped, the oldest
                                        # first; of a run that measures its health
    wandb_id: str | None = None         # of the run at wandb, if it is there

    # what it was trained with
    config: dict | None = None          # the settings of train.py, {name: value}
    tokenizer: dict | None = None       # the spec of the tokenizer, as in meta.json
    chat: dict | None = None            # the ChatLayout of the dataset, as in meta.json
    fingerprint: str | None = None      # of the dataset; another text has another one
    dtype: str | None = None            # precision of the training, such as 'bfloat16'

    # what the next step depends on
    optimizer: dict | None = None       # the state_dict of the optimizer; of a sharded state that
                                        # is not read yet, it has no moments
    scaler: dict | None = None          # the state_dict of the loss scaler

    # not in the file
    path: str | None = None             # the file or folder that this was read from
    shards_folder: str | None = None    # folder of the shards whose tensors are not read yet
    stands_in_for: str | None = None    # the newer state, damaged or missing, that this replaces

    @classmethod
    def from_payload(cls, payload: dict, path: str | Path,
                     also_needed: tuple[str, ...] = ()) -> 'Checkpoint':
        """The checkpoint that was read from `path`, with the types that every reader relies on.

        payload: the dict in the file, perhaps of nanoGPT or of anybody. Unknown keys are dropped.
        also_needed: keys that it must have beside those of every checkpoint.
        Raises UserError that names `path` and what is wrong with it.
        """
        check_keys(payload, path, also_needed)
        check_types(payload, path)
        iter_num, best_val_loss = read_progress(payload, path)
        check_counts(payload, path)

        # The last fields name files that are read or moved away, so no file may set them.
        values = {name: payload.get(name) for name in names_in_files()}
        values.update(iter_num=iter_num, best_val_loss=best_val_loss)
        checkpoint = cls(**values, path=str(path))

        check_finite(checkpoint, path)
        checkpoint.model = with_plain_names(checkpoint.model)
        return checkpoint

    def gpt_arguments(self, dropout: float) -> dict:
        """The arguments of GPTConfig that build the model, with another dropout."""
        activation = self.activation or 'gelu'
        return {'activation': activation, **self.model_args, 'dropout': dropout}

    def float32_weights(self) -> dict[str, torch.Tensor]:
        """The weights in float32 and in memory of their own.

        They are copies, as the file that the tensors are mapped from may be replaced.
        """
        return {name: value.to(torch.float32, copy=True).contiguous()
                for name, value in self.model.items()}

    def to_payload(self) -> dict:
        """The dict for a file, {name of a field: value}.

        It leaves out the fields of OPTIONAL_IN_FILES that are None.
        """
        payload = {name: getattr(self, name) for name in names_in_files()}
        for name in OPTIONAL_IN_FILES:
            if payload[name] is None:
                del payload[name]
        return payload


def model_arguments(config) -> dict:
    """The model_args of a checkpoint, from a GPTConfig: Checkpoint.gpt_arguments reads them.

    nanoGPT passes them to its own GPTConfig, so a field that it lacks is included only if it
    differs from its default.
    """
    arguments = {name: value for name, value in asdict(config).items()
                 if name in NANOGPT_ARGS or value != getattr(type(config), name)}
    if config.activation.startswith('gelu'):        # nanoGPT's GPTConfig would refuse the field
        arguments.pop('activation', None)
    return arguments


def names_in_files():
    """The names of the fields that files have, in their order."""
    return [field.name for field in fields(Checkpoint) if field.name not in NOT_IN_FILES]


# Checks

def check_keys(payload, path, also_needed):
    missing = [key for key in (*NEEDED, *also_needed) if payload.get(key) is None]
    if not missing:
        return
    if set(missing) <= set(RESUME_NEEDS):
        fault = 'no run can go on from it; sample.py and export.py do without'
    elif payload and all(isinstance(value, torch.Tensor) for value in payload.values()):
        fault = ('it holds weights alone; if they are of transformers, name it pytorch_model.bin, '
                 'put its config.json beside it, and name the folder with --init_from=')
    else:
        fault = 'it is not a checkpoint of a training run'
    raise UserError(f'{path} lacks {", ".join(missing)}; {fault}')


def check_types(payload, path):
    for part in ('model', 'adapters'):
        weights = payload.get(part)
        is_named = isinstance(weights, dict) and all(
            isinstance(name, str) and isinstance(value, torch.Tensor)
            for name, value in weights.items())
        if weights is not None and not is_named:
            raise UserError(f'{path}: its {part} is not a dict of named weights')

    for name, kind in TYPES.items():
        value = payload.get(name)
        if value is not None and not isinstance(value, kind):
            raise UserError(f'{path}: its {name} is a {type(value).__name__}, '
                            f'not a {kind.__name__}')
    check_base(payload, path)


def check_base(payload, path):
    """UserError for adapters without a base, a base without adapters, and one without a name."""
    base = payload.get('base')
    if (base is None) != (payload.get('adapters') is None):
        raise UserError(f'{path} has adapters without their base, or a base without adapters')
    texts = ('source', 'fingerprint')
    if base is not None and not all(isinstance(base.get(name), str) for name in texts):
        raise UserError(f'{path}: its base lacks a source or a fingerprint')


def check_counts(payload, path):
    for name in COUNTS:
        value = payload.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
            raise UserError(f'{path}: its {name} is impossible')


def read_progress(payload, path):
    """(iter_num, best_val_loss) as an int and a float. nanoGPT saves a tensor for the loss.

    Each is None where the file lacks it.
    """
    iter_num = payload.get('iter_num')
    best_val_loss = payload.get('best_val_loss')
    try:
        if iter_num is not None:
            iter_num = int(iter_num)
        if best_val_loss is not None:
            best_val_loss = float(best_val_loss)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f'{path}: {error}') from None

    is_count = iter_num is None or 0 <= iter_num <= LARGEST_COUNT
    is_loss = best_val_loss is None or not math.isnan(best_val_loss)
    if not is_count or not is_loss:
        raise UserError(f'{path}: iter_num={iter_num} and best_val_loss={best_val_loss} '
                        f'are impossible')
    return iter_num, best_val_loss


def check_finite(checkpoint: Checkpoint, path: str | Path) -> None:
    """UserError where a weight or a moment is not finite. path: what the message names."""
    not_finite = find_not_finite(checkpoint.model, checkpoint.optimizer, checkpoint.adapters)
    if not_finite:
        raise UserError(f'{path} cannot be used: {not_finite} is not finite')


def with_plain_names(weights):
    """The weights by GPT's names, without what the files of other programs add."""
    found = {}
    for name, value in weights.items():
        if name.endswith('.attn.bias'):             # the attention masks of old models of nanoGPT
            continue
        # torch.compile and DDP put prefixes before the names.
        found[re.sub(r'^(_orig_mod\.|module\.)+', '', name)] = value
    return found


# Tensors

def tensors_in(payload) -> Iterator[tuple[tuple, torch.Tensor]]:
    """Every tensor in nested dicts, lists and tuples, with its path: ('model', 'lm_head.bias')."""
    waiting = [((), payload)]
    seen = set()
    while waiting:
        keys, item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield keys, item
            continue

        if id(item) in seen:                        # containers can hold one another
            continue
        if isinstance(item, dict):
            children = item.items()
        elif isinstance(item, (list, tuple)):
            children = enumerate(item)
        else:
            continue
        seen.add(id(item))
        waiting.extend(((*keys, key), value) for key, value in children)


def find_not_finite(model: dict | None, optimizer: dict | None = None,
                    adapters: dict | None = None) -> str | None:
    """The name of a weight or an optimizer moment that holds infinity or NaN, or None.

    model, adapters: {name: weight}. optimizer: the state_dict of an optimizer.
    """
    parts = {'model': model, 'optimizer': optimizer, 'adapters': adapters}
    # Each flag is read by itself, as the tensors may lie on several devices.
    for keys, tensor in tensors_in(parts):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            return ' '.join(str(key) for key in keys)
    return None
