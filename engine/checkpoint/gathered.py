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
from engine.checkpoint.contents import Checkpoint, find_not_finite, tensors_in
from engine.errors import RunError, UserError

MODEL = 'ckpt.pt'
STATE = 'state.pt'
PREVIOUS = 'state.prev.pt'


# Writing

def write(path: str | Path, payload: dict, keep_as: str | None = None) -> None:
    """Put `payload` at `path`, whole or not at all.

    payload: the dict of Checkpoint.to_payload, or a part of it.
    keep_as: the name under which the present file stays in the folder.
    Raises RunError where a weight or a moment is not finite, or where the disk fails; every file
    is then as it was.
    """
    path = Path(path)
    not_finite = find_not_finite(payload.get('model'), payload.get('optimizer'))
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


# Reading

def read_ckpt(out_dir: str | Path) -> Checkpoint:
    """The contents of out_dir's ckpt.pt. UserError where it is missing or cannot be used."""
    path = Path(out_dir) / MODEL
    if not path.exists():
        raise UserError(f'{path} does not exist; train first, or check --out_dir')
    return Checkpoint.from_payload(read(path), path)


def read(path: str | Path) -> dict:
    """What `write` put at `path`, with tensors mapped from the file rather than read.

    Checkpoint.from_payload checks what it holds.

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
