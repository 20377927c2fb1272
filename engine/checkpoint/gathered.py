"""Checkpoint files: written whole or not at all, verified when read, never executed.

`ckpt.pt` is the model, in nanoGPT's format. `state.pt` is the run, with everything that the next
step depends on. The state before it stays as `state.prev.pt`.
"""

import os
import re
import zipfile
from pathlib import Path

import torch

from engine.atomic_files import atomic_write
from engine.errors import RunError, UserError

MODEL, STATE, PREVIOUS = 'ckpt.pt', 'state.pt', 'state.prev.pt'


# Files

def write(path, payload, keep_as=None):
    """Put `payload` at `path`, whole or not at all. The present file stays under the name keep_as.

    Raises RunError where a weight or a moment is not finite, or where the disk fails; every file
    is then as it was.
    """
    path = Path(path)
    if not_finite := find_not_finite(payload):
        raise RunError(f'{path} was not written, as {not_finite} is not finite; the files already in {path.parent} '
                       f'are whole, go on with --init_from=resume and a lower --learning_rate')
    try:
        with atomic_write(path, 'wb', keep_as) as file:
            torch.save(payload, file)
    except (OSError, RuntimeError) as error:                # PyTorch's writer wraps the system's error
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        advice = (f'the files already in {path.parent} are whole; make room and go on with --init_from=auto'
                  if path.parent.is_dir() else f'{path.parent} was deleted during the run')
        raise RunError(f'{path} could not be written ({str(cause).splitlines()[0]}); {advice}') from None


def read(path):
    """What `write` put at `path`, with tensors mapped from the file rather than read.

    Raises UserError with the reason for a file that is missing, damaged, not a checkpoint,
    or that asks for code to be run.
    """
    try:
        if not Path(path).is_file():
            raise UserError('it is not a regular file' if Path(path).exists() else 'it does not exist')
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # PyTorch stores without compression, so a small file cannot unpack to a large one.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
                    sum(e.file_size for e in entries) > os.path.getsize(path)):
                raise UserError('its contents are larger than the file, so it is not a PyTorch checkpoint')
            damaged = archive.testzip()
            if damaged:
                raise UserError(f'its part {damaged} fails its checksum')
        payload = torch.load(path, weights_only=True, mmap=True, map_location='cpu')
        # A tied weight is stored once and counted twice. A hostile tensor can repeat one number a trillion times.
        if count_bytes(payload) > 2 * os.path.getsize(path):
            raise UserError('its tensors are larger than the file')
        if not isinstance(payload, dict):
            raise UserError(f'it holds a {type(payload).__name__}, not a checkpoint')
    except Exception as error:                              # a damaged file can raise anything
        text = ' '.join(str(error).split())
        code = re.search(r'(?:GLOBAL|[Uu]nsupported class) ([\w.]+)', text)
        if code:
            text = f'it asks to run {code[1]}, which no checkpoint needs'
        elif isinstance(error, zipfile.BadZipFile):
            text = f'not a PyTorch checkpoint, or truncated ({text})'
        elif not isinstance(error, (UserError, OSError)):   # PyTorch's text advises to run the file's code
            text = 'it is not a PyTorch checkpoint'
        raise UserError(f'{path} cannot be read: {text[:200]}') from None
    return payload


def tensors_in(payload):
    """Every tensor in nested dicts, lists and tuples, with its path: ('model', 'lm_head.weight')."""
    waiting, seen = [((), payload)], set()
    while waiting:
        keys, item = waiting.pop()
        if isinstance(item, torch.Tensor):
            yield keys, item
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))                              # each once: containers can hold one another
            waiting.extend(((*keys, key), value) for key, value in
                           (item.items() if isinstance(item, dict) else enumerate(item)))


def count_bytes(payload):
    """Bytes that the tensors would take in memory of their own. UserError for a tensor that is more
    than numbers in order (sparse, quantized, on no device)."""
    total = 0
    for _, tensor in tensors_in(payload):
        if tensor.layout != torch.strided or tensor.device.type != 'cpu' or tensor.is_quantized or tensor.is_nested:
            raise UserError('it holds a tensor of a type that no checkpoint needs')
        total += tensor.numel() * tensor.element_size()
    return total


def find_not_finite(payload):
    """The name of a weight or optimizer moment that holds infinity or NaN, or None."""
    parts = {name: payload[name] for name in ('model', 'optimizer') if name in payload}
    tensors = [(keys, tensor) for keys, tensor in tensors_in(parts) if tensor.is_floating_point()]
    if tensors and not torch.stack([tensor.isfinite().all() for _, tensor in tensors]).all():
        return ' '.join(str(key) for key in next(keys for keys, tensor in tensors if not tensor.isfinite().all()))
    return None


# Contents

def save_model(out_dir, model, **rest):
    """Write ckpt.pt. model: the dict of GPT.to_checkpoint. rest: iter_num, best_val_loss, config, tokenizer."""
    write(Path(out_dir) / MODEL, {**model, **rest})


def save_state(out_dir, model, **rest):
    """Write state.pt, and keep the state before. rest: also what optim.state_dict returns."""
    write(Path(out_dir) / STATE, {**model, **rest}, keep_as=PREVIOUS)


def load_model(out_dir):
    """The contents of out_dir's ckpt.pt."""
    path = Path(out_dir) / MODEL
    if not path.exists():
        raise UserError(f'{path} does not exist; train first, or check --out_dir')
    return validate(read(path), path)


def validate(payload, path, also_needed=()):
    """`payload` with the keys and types that every reader relies on, and its `path`; or UserError."""
    missing = [key for key in ('model', 'model_args', 'iter_num', 'best_val_loss', *also_needed) if key not in payload]
    if missing:
        raise UserError(f'{path} lacks {", ".join(missing)}; it is not a checkpoint of a training run')
    weights = payload['model']
    if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise UserError(f'{path}: its model is not a dict of named weights')
    for name, kind in dict(model_args=dict, config=dict, tokenizer=dict, optimizer=dict, scaler=dict, fingerprint=str,
                           wandb_id=str, last_eval=int, activation=str).items():
        if payload.get(name) is not None and not isinstance(payload[name], kind):
            raise UserError(f'{path}: its {name} is a {type(payload[name]).__name__}, not a {kind.__name__}')
    try:
        iter_num, best_val_loss = int(payload['iter_num']), float(payload['best_val_loss'])
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise UserError(f'{path}: {error}') from None
    if not 0 <= iter_num < 2 ** 63 or best_val_loss != best_val_loss:
        raise UserError(f'{path}: iter_num={iter_num} and best_val_loss={best_val_loss} are impossible')
    for name in ('sequences', 'tokens', 'best_iter'):
        if not (payload.get(name) is None or type(payload[name]) is int and 0 <= payload[name] < 2 ** 63):
            raise UserError(f'{path}: its {name} is impossible')
    if not_finite := find_not_finite(payload):
        raise UserError(f'{path} cannot be used: {not_finite} is not finite')
    # torch.compile and DDP put prefixes before the names; old models of nanoGPT contain attention masks.
    weights = {re.sub(r'^(_orig_mod\.|module\.)+', '', name): value
               for name, value in weights.items() if not name.endswith('.attn.bias')}
    # Only run_folder and sharded_checkpoint may set these: they name files that are read or moved away.
    payload = {name: value for name, value in payload.items() if name not in ('sharded', 'damaged')}
    return {**payload, 'model': weights, 'iter_num': iter_num, 'best_val_loss': best_val_loss, 'path': str(path)}
