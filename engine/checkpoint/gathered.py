"""Checkpoint files: written whole or not at all, verified when read, never executed.

`ckpt.pt` is the model, in nanoGPT's format. `state.pt` is the run, with everything that the next
step depends on. The state before it stays as `state.prev.pt`.
"""

import math
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError

MODEL = 'ckpt.pt'
STATE = 'state.pt'
PREVIOUS = 'state.prev.pt'

NEEDED = ('model', 'model_args', 'iter_num', 'best_val_loss')
TYPES = dict(
    model_args=dict,
    config=dict,
    tokenizer=dict,
    optimizer=dict,
    scaler=dict,
    fingerprint=str,
    wandb_id=str,
    last_eval=int,
    activation=str,
)
COUNTS = ('sequences', 'tokens', 'best_iter')       # whole numbers, where a checkpoint has them
LARGEST_COUNT = 2 ** 63 - 1


# Files

def write(path: str | Path, payload: dict, keep_as: str | None = None) -> None:
    """Put `payload` at `path`, whole or not at all.

    keep_as: the name under which the present file stays in the folder.
    Raises RunError where a weight or a moment is not finite, or where the disk fails; every file
    is then as it was.
    """
    path = Path(path)
    not_finite = find_not_finite(payload)
    if not_finite:
        raise RunError(f'{path} was not written, as {not_finite} is not finite; '
                       f'the files already in {path.parent} are whole, '
                       f'go on with --init_from=resume and a lower --learning_rate')

    try:
        with atomic_write(path, 'wb', keep_as) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:
        raise RunError(explain_failed_write(path, error)) from None


def explain_failed_write(path, error):
    """One line that says why `path` could not be written, and what to do."""
    cause = error
    if isinstance(error.__context__, OSError):      # PyTorch's writer wraps the system's error
        cause = error.__context__

    if path.parent.is_dir():
        advice = (f'the files already in {path.parent} are whole; '
                  f'make room and go on with --init_from=auto')
    else:
        advice = f'{path.parent} was deleted during the run'
    return f'{path} could not be written ({str(cause).splitlines()[0]}); {advice}'


def read(path: str | Path) -> dict:
    """What `write` put at `path`, with tensors mapped from the file rather than read.

    Raises UserError with the reason for a file that is missing, damaged, not a checkpoint,
    or that asks for code to be run.
    """
    try:
        check_archive(path)
        payload = torch.load(path, weights_only=True, mmap=True, map_location='cpu')

        # A hostile tensor can repeat one number a trillion times. A file may rightly hold half of
        # what its tensors take, as a tied weight is stored once and counted twice.
        if count_bytes(payload) > 2 * os.path.getsize(path):
            raise UserError('its tensors are larger than the file')

        if not isinstance(payload, dict):
            raise UserError(f'it holds a {type(payload).__name__}, not a checkpoint')
    except Exception as error:                      # a damaged file can raise anything
        raise UserError(f'{path} cannot be read: {describe_fault(error)[:200]}') from None
    return payload


def check_archive(path):
    """UserError unless `path` is a file as PyTorch writes it, with every checksum right."""
    if not Path(path).exists():
        raise UserError('it does not exist')
    if not Path(path).is_file():                    # a FIFO would be waited for
        raise UserError('it is not a regular file')

    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()

        # PyTorch stores without compression, so a small file cannot unpack to a large one.
        is_compressed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        unpacked = sum(entry.file_size for entry in entries)
        if is_compressed or unpacked > os.path.getsize(path):
            raise UserError('its contents are larger than the file, '
                            'so it is not a PyTorch checkpoint')

        damaged = archive.testzip()
        if damaged:
            raise UserError(f'its part {damaged} fails its checksum')


def describe_fault(error):
    """Why a file cannot be read, in our words: PyTorch's text advises to run the file's code."""
    text = ' '.join(str(error).split())
    code = re.search(r'(?:GLOBAL|[Uu]nsupported class) ([\w.]+)', text)
    if code:
        return f'it asks to run {code[1]}, which no checkpoint needs'
    if isinstance(error, zipfile.BadZipFile):
        return f'not a PyTorch checkpoint, or truncated ({text})'
    if isinstance(error, (UserError, OSError)):
        return text
    return 'it is not a PyTorch checkpoint'


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


def count_bytes(payload):
    """Bytes that the tensors would take in memory of their own.

    Raises UserError for a tensor that is more than numbers in order: sparse, quantized, or on no
    device.
    """
    total = 0
    for _, tensor in tensors_in(payload):
        is_plain = tensor.layout == torch.strided and tensor.device.type == 'cpu'
        if not is_plain or tensor.is_quantized or tensor.is_nested:
            raise UserError('it holds a tensor of a type that no checkpoint needs')
        total += tensor.numel() * tensor.element_size()
    return total


def find_not_finite(payload: dict) -> str | None:
    """The name of a weight or optimizer moment that holds infinity or NaN, or None."""
    parts = {name: payload[name] for name in ('model', 'optimizer') if name in payload}
    tensors = [(keys, tensor) for keys, tensor in tensors_in(parts) if tensor.is_floating_point()]
    if not tensors:
        return None

    # A GPU is waited for once, here, and not once for each tensor.
    finite = torch.stack([tensor.isfinite().all() for _, tensor in tensors]).tolist()
    for (keys, _), is_finite in zip(tensors, finite):
        if not is_finite:
            return ' '.join(str(key) for key in keys)
    return None


# Contents

def load_model(out_dir: str | Path) -> dict:
    """The contents of out_dir's ckpt.pt. UserError where it is missing or cannot be used."""
    path = Path(out_dir) / MODEL
    if not path.exists():
        raise UserError(f'{path} does not exist; train first, or check --out_dir')
    return validate(read(path), path)


def validate(payload: dict, path: str | Path, also_needed: tuple[str, ...] = ()) -> dict:
    """`payload` with the keys and types that every reader relies on, and its `path`.

    also_needed: keys that it must have beside those of every checkpoint.
    Raises UserError that names `path` and what is wrong with it.
    """
    check_keys(payload, path, also_needed)
    check_types(payload, path)
    iter_num, best_val_loss = read_progress(payload, path)
    check_counts(payload, path)
    check_finite(payload, path)

    # Only run_folder and sharded may set these two: they name files that are read or moved away.
    payload = {key: value for key, value in payload.items() if key not in ('sharded', 'damaged')}
    return {
        **payload,
        'model': with_plain_names(payload['model']),
        'iter_num': iter_num,
        'best_val_loss': best_val_loss,
        'path': str(path),
    }


def check_keys(payload, path, also_needed):
    missing = [key for key in (*NEEDED, *also_needed) if key not in payload]
    if missing:
        raise UserError(f'{path} lacks {", ".join(missing)}; '
                        f'it is not a checkpoint of a training run')


def check_types(payload, path):
    weights = payload['model']
    is_named = isinstance(weights, dict) and all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in weights.items())
    if not is_named:
        raise UserError(f'{path}: its model is not a dict of named weights')

    for name, kind in TYPES.items():
        value = payload.get(name)
        if value is not None and not isinstance(value, kind):
            raise UserError(f'{path}: its {name} is a {type(value).__name__}, '
                            f'not a {kind.__name__}')


def check_counts(payload, path):
    for name in COUNTS:
        value = payload.get(name)
        if value is None:
            continue
        if type(value) is not int or not 0 <= value <= LARGEST_COUNT:
            raise UserError(f'{path}: its {name} is impossible')


def read_progress(payload, path):
    """(iter_num, best_val_loss) as an int and a float. nanoGPT saves a tensor for the loss."""
    try:
        iter_num = int(payload['iter_num'])
        best_val_loss = float(payload['best_val_loss'])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f'{path}: {error}') from None

    if not 0 <= iter_num <= LARGEST_COUNT or math.isnan(best_val_loss):
        raise UserError(f'{path}: iter_num={iter_num} and best_val_loss={best_val_loss} '
                        f'are impossible')
    return iter_num, best_val_loss


def check_finite(payload: dict, path: str | Path) -> None:
    """UserError where a weight or a moment is not finite."""
    not_finite = find_not_finite(payload)
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
