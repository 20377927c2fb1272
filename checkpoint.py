"""Saving and loading a run: the only place that knows the file format.

`ckpt.pt` is the model for people, in the format of the family. `state.pt` is the run, with
everything that the next step depends on; the one before it is kept as `state.prev.pt`.
A file is replaced only by a complete one that has reached the disk, and is read only after
its own checksums agree, by a reader that runs no code.
"""

import os
import re
import zipfile
from dataclasses import asdict, replace
from pathlib import Path

import filelock
import torch

from model import GPT, GPTConfig

MODEL, STATE, PREVIOUS, ASIDE = 'ckpt.pt', 'state.pt', 'state.prev.pt', 'state.damaged.pt'


# Files

def write(path, payload, keep_as=None):
    """Put `payload` at `path`, whole or not at all; the file that stood there moves to keep_as."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as file:
            torch.save(payload, file)
            file.flush()
            os.fsync(file.fileno())
        if keep_as and path.exists():
            # Between these two lines there is no state.pt, but a whole state.prev.pt, which is read then.
            os.replace(path, path.with_name(keep_as))
        os.replace(temporary, path)
        if os.name == 'posix':                          # the names must reach the disk too
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, RuntimeError)):  # PyTorch's writer wraps the system's error
            cause = error.__context__ if isinstance(error.__context__, OSError) else error
            raise RuntimeError(f'{path} could not be written ({str(cause).splitlines()[0]}); '
                               f'the files already in {path.parent} are whole, make room and go on '
                               f'with --init_from=auto') from None
        raise


def read(path):
    """What `write` put at `path`, with tensors mapped from the file rather than read.

    Raises ValueError with the fault for a file that is missing, damaged, not a checkpoint,
    or that asks for code to be run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            # PyTorch stores without compression, so a small file cannot unpack to a large one
            if any(e.compress_type != zipfile.ZIP_STORED for e in entries) or (
                    sum(e.file_size for e in entries) > os.path.getsize(path)):
                raise ValueError('it is larger inside than outside, no checkpoint of PyTorch')
            damaged = archive.testzip()
            if damaged:
                raise ValueError(f'its part {damaged} fails its checksum')
        payload = torch.load(path, weights_only=True, mmap=True, map_location='cpu')
        # a tied weight is stored once and counted twice; a hostile one repeats a number a trillion times
        if count_bytes(payload) > 2 * os.path.getsize(path):
            raise ValueError('its tensors are larger than the file')
    except FileNotFoundError:
        raise ValueError(f'{path} does not exist') from None
    except Exception as error:                          # a damaged file can provoke anything
        text = ' '.join(str(error).split())
        code = re.search(r'(?:GLOBAL|[Uu]nsupported class) ([\w.]+)', text)
        text = text.rpartition('WeightsUnpickler error: ')[2]
        if code:
            text = f'it asks to run {code[1]}, which no checkpoint needs'
        elif isinstance(error, zipfile.BadZipFile):
            text = f'not a checkpoint of PyTorch, or truncated ({text})'
        raise ValueError(f'{path} cannot be read: {text[:200] or type(error).__name__}') from None
    if not isinstance(payload, dict):
        raise ValueError(f'{path} holds a {type(payload).__name__}, not a checkpoint')
    return payload


def count_bytes(payload):
    """Bytes that all tensors in nested dicts, lists and tuples would take in memory of their own.
    ValueError for a tensor that is more than numbers in order (sparse, of no device, ...)."""
    waiting, seen, total = [payload], set(), 0
    while waiting:
        item = waiting.pop()
        if isinstance(item, torch.Tensor):
            if item.layout != torch.strided or item.device.type != 'cpu' or item.is_quantized or item.is_nested:
                raise ValueError('it holds a tensor of a kind that no checkpoint needs')
            total += item.numel() * item.element_size()
        elif isinstance(item, (dict, list, tuple)) and id(item) not in seen:
            seen.add(id(item))                          # each once: containers can hold one another
            waiting.extend(item.values() if isinstance(item, dict) else item)
    return total


# Contents

def save_model(out_dir, model, **rest):
    """Write ckpt.pt: the weights, and `rest` (iter_num, best_val_loss, config, tokenizer)."""
    write(Path(out_dir) / MODEL, {**describe(model), **rest})


def save_state(out_dir, model, optimizer, scaler, **rest):
    """Write state.pt, keeping the one before: what `load_state` gives back."""
    write(Path(out_dir) / STATE, {**describe(model), 'optimizer': optimizer.state_dict(),
                                  'scaler': scaler.state_dict(), **rest}, keep_as=PREVIOUS)


def describe(model):
    # Tools of the family build their model from exactly these arguments, so the one that they
    # do not know goes beside. Without it the activation is their exact GELU.
    arguments = asdict(model.config)
    return dict(activation=arguments.pop('activation'), model_args=arguments, model=model.state_dict())


def holds_run(out_dir):
    return any((Path(out_dir) / name).exists() for name in (STATE, PREVIOUS, MODEL))


def load_state(out_dir):
    """The newest state in out_dir that can be read, and a list of what was wrong before it.

    A ckpt.pt alone will do: one of the family has its optimizer inside, another leaves the
    optimizer to start afresh. Raises ValueError that names each file and its fault.
    """
    out_dir, faults = Path(out_dir), []
    for name in (STATE, PREVIOUS):
        try:
            if (out_dir / name).exists():
                state = check(read(out_dir / name), out_dir / name, ('optimizer', 'scaler'))
                return dict(state, fell_back=bool(faults)), faults
            if name == STATE and (out_dir / PREVIOUS).exists():
                faults.append(f'{out_dir / STATE} is missing')
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError(f'no state to resume: {"; ".join(faults)}; restore one, move them away to go on '
                         f'from a {MODEL}, or start over with --init_from=scratch --overwrite=True')
    if not (out_dir / MODEL).exists():
        raise ValueError(f'{out_dir} holds no run to resume (no {STATE}, no {MODEL}); '
                         f'check --out_dir, or start one with --init_from=scratch')
    state = load_model(out_dir)
    faults.append(f'{out_dir / MODEL} alone, ' + ('with the optimizer inside it' if 'optimizer' in state
                  else 'without optimizer state, which starts afresh'))
    return state, faults


def load_model(out_dir):
    """The contents of out_dir's ckpt.pt."""
    path = Path(out_dir) / MODEL
    if not path.exists():
        raise ValueError(f'{path} does not exist; train first, or check --out_dir')
    return check(read(path), path, ())


def check(payload, path, needed):
    """`payload` with what every reader relies on, in our types, or ValueError."""
    missing = [key for key in ('model', 'model_args', 'iter_num', 'best_val_loss', *needed)
               if key not in payload]
    if missing:
        raise ValueError(f'{path} lacks {", ".join(missing)}; it is no checkpoint of a training run')
    weights = payload['model']
    if not isinstance(weights, dict) or not all(
            isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items()):
        raise ValueError(f'{path}: its model is not a table of named weights')
    for name, kind in dict(config=dict, tokenizer=dict, optimizer=dict, scaler=dict, fingerprint=str,
                           wandb_id=str, evaluated=int).items():
        if payload.get(name) is not None and not isinstance(payload[name], kind):
            raise ValueError(f'{path}: its {name} is a {type(payload[name]).__name__}, not a {kind.__name__}')
    try:
        # torch.compile and DDP prefix the names; old models of the family carry attention masks
        weights = {re.sub(r'^(_orig_mod\.|module\.)+', '', name): value
                   for name, value in weights.items() if not name.endswith('.attn.bias')}
        config = GPTConfig(**payload['model_args'], activation=payload.get('activation') or 'gelu')
        iter_num, best_val_loss = int(payload['iter_num']), float(payload['best_val_loss'])
        if not 0 <= iter_num < 2 ** 63 or best_val_loss != best_val_loss:
            raise ValueError(f'iter_num={iter_num}, best_val_loss={best_val_loss} cannot be')
        return {**payload, 'model': weights, 'gpt_config': config, 'iter_num': iter_num,
                'best_val_loss': best_val_loss}
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f'{path}: {error}') from None


def build_model(payload, dropout=None):
    """The GPT of a loaded file, in float32 and in memory of its own: the file may be replaced."""
    config = payload['gpt_config']
    if dropout is not None:
        config = replace(config, dropout=dropout)
    weights = own(payload['model'], torch.float32)
    try:
        return GPT.from_weights(config, weights)
    except RuntimeError as error:                       # sizes beyond what a tensor can have
        raise ValueError(f'no model has such model_args ({str(error).splitlines()[0][:100]})') from None


def own(value, dtype=None):
    """A copy of nested dicts and lists whose tensors no longer hang on the mapped file."""
    if isinstance(value, torch.Tensor):
        return value.to(dtype or value.dtype, copy=True).contiguous()
    if isinstance(value, dict):
        return {key: own(item, dtype) for key, item in value.items()}
    return value


def restore_optimizer(optimizer, scaler, saved):
    """Put a loaded state's moments into `optimizer`, whose learning rate, betas and decay stay
    as they are, and its loss scale into `scaler`.

    Raises ValueError where the moments do not belong to these parameters.
    """
    if 'optimizer' not in saved:
        return
    fresh, moments = optimizer.state_dict(), {}
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    try:
        if scaler.is_enabled() and saved.get('scaler'):
            scaler.load_state_dict(saved['scaler'])
        orders = [[group['params'] for group in state['param_groups']] for state in (saved['optimizer'], fresh)]
        fits = orders[0] == orders[1]
        for index, moment in saved['optimizer']['state'].items():
            moments[index] = {'step': torch.tensor(float(moment['step']))}
            for name in ('exp_avg', 'exp_avg_sq'):
                rows = len(parameters[index])           # fewer where block_size was lowered meanwhile
                moments[index][name] = moment[name][:rows].clone()
                fits = fits and moments[index][name].shape == parameters[index].shape
        fits = fits and len(moments) in (0, len(parameters))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        raise ValueError(f'the optimizer state is not one of AdamW ({type(error).__name__}: {error})') from None
    if not fits:
        raise ValueError('the optimizer state belongs to a model of another shape')
    optimizer.load_state_dict({'state': moments, 'param_groups': fresh['param_groups']})


def lock(out_dir, state):
    """Hold out_dir for this process until it ends, or ValueError if another one has it.

    state: what the run goes on from. If None, the files of a run that stood there are dropped, as a
    new one is about to replace them. If it is the previous one, because the newest was damaged, that
    is moved aside, as the next save would else keep it in place of the one that is whole.
    """
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        held = filelock.FileLock(Path(out_dir) / '.lock')
        held.acquire(blocking=False)
        leftovers = [f'{MODEL}.tmp', f'{STATE}.tmp']    # of a process that was killed in a save
        for name in leftovers if state else [*leftovers, MODEL, PREVIOUS, STATE]:
            (Path(out_dir) / name).unlink(missing_ok=True)
        if state and state.get('fell_back') and (Path(out_dir) / STATE).exists():
            os.replace(Path(out_dir) / STATE, Path(out_dir) / ASIDE)
        return held
    except filelock.Timeout:
        raise ValueError(f'{out_dir} is in use by another training process; '
                         f'wait for it, or choose another --out_dir') from None
    except OSError as error:
        raise ValueError(f'{out_dir} cannot be written ({error.strerror}); choose another --out_dir') from None
