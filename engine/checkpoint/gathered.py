"""Checkpoint files: gathered on rank 0, written whole or not at all, verified when read, never
executed.

`ckpt.pt` is the model, in nanoGPT's format. `state.pt` is the run, with everything that the next
step depends on. The state before it stays as `state.prev.pt`.
"""

import os
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from engine.atomic_files import advice_on, atomic_write
from engine.checkpoint.contents import Checkpoint, find_not_finite, tensors_in
from engine.distributed import is_shard
from engine.errors import RunError, UserError
from engine.plain_pickle import NumpyType, numpy_number

# A clone without Git LFS has such texts in place of its large files.
LFS_POINTER = b'version https://git-lfs'

LONGEST_PATH = 200          # characters of a path that a file may hold as an object

MODEL = 'ckpt.pt'
STATE = 'state.pt'
PREVIOUS = 'state.prev.pt'

def path_text(*parts):
    """The text of a path. It stands for the classes of pathlib.

    A longer one is refused, as a file of a few bytes can repeat its parts.
    """
    is_plain = all(type(part) is str for part in parts)
    if not is_plain or len(parts) + sum(map(len, parts)) > LONGEST_PATH:
        raise UserError(f'it holds a path that is no text of at most {LONGEST_PATH} characters')
    return os.path.join('', *parts)


# What stands for the names in a file that plain values may have, such as a best_val_loss of
# numpy.float64, or an out_dir of pathlib.Path
PLAIN_NAMES = [
    (NumpyType, 'numpy.dtype'),
    (numpy_number, 'numpy._core.multiarray.scalar'),
    (numpy_number, 'numpy.core.multiarray.scalar'),             # before numpy 2
    (path_text, 'pathlib.PosixPath'),
    (path_text, 'pathlib.WindowsPath'),
    (path_text, 'pathlib._local.PosixPath'),                    # Python 3.13
    (path_text, 'pathlib._local.WindowsPath'),
]

# A program that saves a ckpt.pt anew whose config is an object of some class. A plain object stands
# for that class, so no code of the file runs. The file may have numbers of numpy beside it.
SAVE_AGAIN = (
    "import os, sys, numpy as np, torch; from types import SimpleNamespace as Plain; "
    "path = sys.argv[1]; scalar = np.float64(0).__reduce__()[0]; "
    "torch.serialization.add_safe_globals([(Plain, '{name}'), np.dtype, "
    "*[(scalar, 'numpy.' + core + '.multiarray.scalar') for core in ('core', '_core')], "
    "*[type(np.dtype(code)) for code in '?bhilqBHILQefd']]); "
    "saved = torch.load(path, 'cpu'); args = vars(saved['config']); saved['config'] = args; "
    "saved.setdefault('model_args', args); torch.save(saved, path + '.new'); "
    "os.replace(path + '.new', path)"
)


# Whole tensors from shards

def gather(value: Any) -> Any:
    """`value` with each tensor in it whole: in CPU memory on rank 0, None on the others.

    value: nested dicts and lists, the same on every rank. A collective, one tensor at a time.
    """
    if isinstance(value, torch.Tensor):
        if is_shard(value):
            value = value.full_tensor()
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        return value.cpu() if is_main else None
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    if isinstance(value, list):
        return [gather(item) for item in value]
    return value


def gather_weights(model: nn.Module) -> dict:
    """model.state_dict() with whole weights, as `gather` has them. Tied weights share memory."""
    parameters = model.state_dict(keep_vars=True)
    whole = {parameter: gather(parameter.detach())
             for parameter in dict.fromkeys(parameters.values())}
    return {name: whole[parameter] for name, parameter in parameters.items()}


# Writing

def write(path: str | Path, payload: dict, keep_as: str | None = None) -> None:
    """Put `payload` at `path`, whole or not at all.

    payload: the dict of Checkpoint.to_payload, or a part of it.
    keep_as: the name under which the present file stays in the folder.
    Raises RunError where a weight or a moment is not finite, or where the disk fails; every file
    is then as it was.
    """
    path = Path(path)
    not_finite = find_not_finite(
        payload.get('model'), payload.get('optimizer'), payload.get('adapters'))
    if not_finite:
        raise RunError(f'{path} was not written, as {not_finite} is not finite; '
                       f'the files already in {path.parent} are whole, '
                       f'go on with --init_from=resume and a lower --learning_rate')

    try:
        write_unchecked(path, payload, keep_as)
    except (OSError, RuntimeError) as error:
        raise RunError(explain_failed_write(path, error)) from None


def write_unchecked(path: Path, payload: dict, keep_as: str | None = None) -> None:
    """What `write` does, without its check of the numbers, and with PyTorch's and the system's own
    errors: RuntimeError and OSError."""
    with atomic_write(path, 'wb', keep_as) as file:
        torch.save(payload, file)


def explain_failed_write(path, error):
    """One line that says why `path` could not be written, and what to do."""
    cause = first_cause(error)
    if path.parent.is_dir():
        advice = (f'the files already in {path.parent} are whole; '
                  f'{advice_on(cause)}, and go on with --init_from=auto')
    else:
        advice = f'{path.parent} was deleted during the run'
    return f'{path} could not be written ({str(cause).splitlines()[0]}); {advice}'


def first_cause(error: BaseException) -> BaseException:
    """The error behind one of PyTorch's: of the first rank that failed, of the system."""
    failures = getattr(error, 'failures', None)     # of a CheckpointException, {rank: (error, ...)}
    if failures:
        error = next(iter(failures.values()))[0]
    if isinstance(error.__context__, OSError):
        return error.__context__
    return error


# Reading

def read_ckpt(out_dir: str | Path, also_needed: tuple[str, ...] = ()) -> Checkpoint:
    """The contents of out_dir's ckpt.pt. UserError where it is missing or cannot be used.

    also_needed: as Checkpoint.from_payload takes it.
    """
    path = Path(out_dir) / MODEL
    if not path.exists():
        raise UserError(f'{path} does not exist; train first, or check --out_dir')
    return Checkpoint.from_payload(read(path), path, also_needed)


def read(path: str | Path) -> dict:
    """What `write` put at `path`, with tensors mapped from the file rather than read.

    Checkpoint.from_payload checks what it holds.

    Raises UserError with the reason for a file that is missing, damaged, not a checkpoint,
    or that asks for code to be run.
    """
    try:
        check_archive(path)
        with torch.serialization.safe_globals(PLAIN_NAMES):
            payload = torch.load(path, weights_only=True, mmap=True, map_location='cpu')

        # A hostile tensor can repeat one number a trillion times. A file may rightly hold half of
        # what its tensors take, as a tied weight is stored once and counted twice.
        if count_bytes(payload) > 2 * os.path.getsize(path):
            raise UserError('its tensors are larger than the file')

        if not isinstance(payload, dict):
            raise UserError(f'it holds a {type(payload).__name__}, not a checkpoint')
    except Exception as error:                      # a damaged file can raise anything
        raise UserError(f'{path} cannot be read: {describe_fault(error, path)}') from None
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


def describe_fault(error, path):
    """Why a file cannot be read, in our words: PyTorch's text advises to run the file's code."""
    text = ' '.join(str(error).split())
    code = re.search(r'(?:GLOBAL|[Uu]nsupported class) ([\w.]+)', text)
    if code:
        return describe_code(code[1][:100], path)
    if isinstance(error, zipfile.BadZipFile):
        with open(path, 'rb') as file:
            start = file.read(len(LFS_POINTER))
        if start == LFS_POINTER:
            return 'it is a pointer of Git LFS; run `git lfs pull` in its folder'
        return f'not a PyTorch checkpoint, or truncated ({text[:150]})'
    if isinstance(error, (UserError, OSError)):
        return text[:200]
    return 'it is not a PyTorch checkpoint'


def describe_code(name, path):
    """Why a file that names the class or function `name` cannot be read."""
    if not re.search('Config|Args|Namespace', name):
        return f'it asks to run {name}, which no checkpoint needs'
    program = SAVE_AGAIN.format(name=name)
    return (f'its config is a {name}, which only code can read; to save it again as plain values, '
            f'type: python -c "{program}" {shlex.quote(str(path))}')
