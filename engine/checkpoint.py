"""The files of a run: written whole or not at all, verified when read, never executed.

`ckpt.pt` is the model, in nanoGPT's format. `state.pt` is the run, with everything that the next
step depends on. The state before it stays as `state.prev.pt`.
"""

import os
import re
import zipfile
from pathlib import Path

import filelock
import torch

from engine.errors import RunError, UserError
from engine.files import atomic_write

MODEL, STATE, PREVIOUS, DAMAGED = 'ckpt.pt', 'state.pt', 'state.prev.pt', 'state.damaged.pt'


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
            raise UserError('it is no regular file' if Path(path).exists() else 'it does not exist')
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # PyTorch stores without compression, so a small file cannot unpack to a large one.
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
                    sum(e.file_size for e in entries) > os.path.getsize(path)):
                raise UserError('its contents are larger than the file, so it is no checkpoint of PyTorch')
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
            text = f'not a checkpoint of PyTorch, or truncated ({text})'
        elif not isinstance(error, (UserError, OSError)):   # PyTorch's text advises to run the file's code
            text = 'it is no checkpoint of PyTorch'
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


def holds_run(out_dir):
    """True where out_dir has a file to resume from."""
    try:
        return any((Path(out_dir) / name).exists() for name in (STATE, PREVIOUS, MODEL))
    except OSError as error:
        raise UserError(f'{out_dir!r} cannot be used ({error.strerror}); choose another --out_dir') from None


def load_state(out_dir):
    """The newest state in out_dir that can be read, and a list of notes on what was wrong before it.

    A ckpt.pt alone is enough: nanoGPT's has its optimizer inside, and without one the optimizer
    starts afresh. Raises UserError that names each file and its fault.
    """
    out_dir, notes = Path(out_dir), []
    for name in (STATE, PREVIOUS):
        try:
            if (out_dir / name).exists():
                state = validate(read(out_dir / name), out_dir / name, ('optimizer', 'scaler'))
                return dict(state, fell_back=bool(notes)), notes
            if name == STATE and (out_dir / PREVIOUS).exists():
                notes.append(f'{out_dir / STATE} is missing')
        except UserError as error:
            notes.append(str(error))
    if notes:
        raise UserError(f'no state to resume: {"; ".join(notes)}; restore one, move them away to go on '
                        f'from a {MODEL}, or start over with --init_from=scratch --overwrite=True')
    if not (out_dir / MODEL).exists():
        raise UserError(f'{out_dir} holds no run to resume (no {STATE}, no {MODEL}); '
                        f'check --out_dir, or start one with --init_from=scratch')
    state = load_model(out_dir)
    notes.append(f'{out_dir / MODEL} alone, ' + ('with the optimizer inside it' if 'optimizer' in state
                 else 'without optimizer state, which starts afresh'))
    return state, notes


def load_model(out_dir):
    """The contents of out_dir's ckpt.pt."""
    path = Path(out_dir) / MODEL
    if not path.exists():
        raise UserError(f'{path} does not exist; train first, or check --out_dir')
    return validate(read(path), path)


def load_newest_model(out_dir):
    """The contents of ckpt.pt; of the state, where a run was stopped before its first ckpt.pt."""
    if not (Path(out_dir) / MODEL).exists() and holds_run(out_dir):
        return load_state(out_dir)[0]
    return load_model(out_dir)


def validate(payload, path, also_needed=()):
    """`payload` with the keys and types that every reader relies on, and its `path`; or UserError."""
    missing = [key for key in ('model', 'model_args', 'iter_num', 'best_val_loss', *also_needed) if key not in payload]
    if missing:
        raise UserError(f'{path} lacks {", ".join(missing)}; it is no checkpoint of a training run')
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
    if not_finite := find_not_finite(payload):
        raise UserError(f'{path} cannot be used: {not_finite} is not finite')
    # torch.compile and DDP put prefixes before the names; old models of nanoGPT contain attention masks.
    weights = {re.sub(r'^(_orig_mod\.|module\.)+', '', name): value
               for name, value in weights.items() if not name.endswith('.attn.bias')}
    return {**payload, 'model': weights, 'iter_num': iter_num, 'best_val_loss': best_val_loss, 'path': str(path)}


# The folder of a run

def open_run(out_dir, init_from, overwrite, read_only, env):
    """(state to resume from or None, notes on it, lock). Every rank calls it; rank 0 locks out_dir
    before any rank looks at what it holds. read_only: take no lock, and accept any out_dir.

    Raises UserError where out_dir is in use, where it holds a run that the command does not
    mean to continue or to replace, or where no state can be loaded.
    """
    run_lock = None
    with env.raise_on_all_ranks():
        # Resuming what does not exist should not create a folder.
        if env.is_main and not read_only and (init_from != 'resume' or holds_run(out_dir)):
            run_lock = lock(out_dir)
    with env.raise_on_all_ranks():
        if init_from == 'resume' or init_from == 'auto' and holds_run(out_dir):
            return *load_state(out_dir), run_lock
        if holds_run(out_dir) and not (overwrite or read_only):
            raise UserError(f'{out_dir} already holds a run; go on with --init_from=resume, choose '
                            f'another --out_dir, or replace it with --overwrite=True')
    return None, [], run_lock


def lock(out_dir):
    """Create out_dir and lock it until this process ends. UserError if another process has it."""
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        run_lock = filelock.FileLock(Path(out_dir) / '.lock')
        run_lock.acquire(blocking=False)
        return run_lock
    except filelock.Timeout:
        raise UserError(f'{out_dir} is in use by another training process; '
                        f'wait for it, or choose another --out_dir') from None
    except (OSError, ValueError) as error:                  # ValueError: NUL or half a surrogate pair in the name
        reason = getattr(error, 'strerror', None) or error
        raise UserError(f'{out_dir!r} cannot be written ({reason}); choose another --out_dir') from None


def clean_out_dir(out_dir, state):
    """Make out_dir ready for saves, once the run is sure to start.

    state: what the run goes on from. None removes the files of an earlier run, which a new one
    replaces. If it is the previous state, because the newest was damaged, the damaged file moves
    aside, so that the next save keeps the good one.
    """
    leftovers = [f'{MODEL}.tmp', f'{STATE}.tmp']            # of a process that was killed during a save
    for name in leftovers if state else [*leftovers, MODEL, PREVIOUS, STATE]:
        (Path(out_dir) / name).unlink(missing_ok=True)
    if state and state.get('fell_back') and (Path(out_dir) / STATE).exists():
        os.replace(Path(out_dir) / STATE, Path(out_dir) / DAMAGED)
