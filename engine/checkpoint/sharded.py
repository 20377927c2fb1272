"""A state whose tensors each rank writes itself, for models that are too large for one rank.

The folder `state/` has a safetensors file per rank, checksums.json, and run.pt with all the rest.
The previous state stays as `state.prev/`. torch.distributed.checkpoint writes the tensors while the
training goes on, and reads them into any number of ranks. Their names in the files:

    model.NAME                      a weight, by its name in the model
    optimizer.INDEX.NAME            a moment of the parameter INDEX of the optimizer
"""

import json
import os
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from engine import distributed
from engine.atomic_files import advice_on, atomic_write, remove, sync_folder
from engine.checkpoint.contents import (
    STATE_NEEDS,
    Checkpoint,
    check_finite,
    find_not_finite,
)
from engine.checkpoint.gathered import first_cause, read, write_unchecked
from engine.errors import RunError, UserError

STATE = 'state'
PREVIOUS = 'state.prev'
REST = 'run.pt'
CHECKSUMS = 'checksums.json'
CHECKSUMS_LIMIT = 1 << 24           # bytes; the file of a thousand ranks has some 60 kB
BLOCK = 1 << 24                     # bytes read at a time for a checksum


class TensorName(NamedTuple):
    """The name of a tensor in the files, in parts."""
    weight: str | None              # name of a weight, or None
    index: int | None               # of the parameter that a moment belongs to, or None
    moment: str | None              # name of a moment, or None


def parse_name(name):
    """The TensorName of `name`. All its parts are None where it is no name of ours."""
    kind, _, rest = name.partition('.')
    if kind == 'model':
        return TensorName(rest, None, None)
    index, _, moment = rest.partition('.')
    if kind == 'optimizer' and index.isdecimal() and len(index) < 10:
        return TensorName(None, int(index), moment)
    return TensorName(None, None, None)


def name_weights(model):
    """{name in the files: parameter} of a model, whose parameters may be shards."""
    return {f'model.{name}': parameter.detach() for name, parameter in model.named_parameters()}


# Saving

class ShardedSaver:
    """Writes state/ in the background. Every rank makes one, and calls its methods in one order."""

    def __init__(self, out_dir: str | Path, env: distributed.Environment):
        self.out_dir = Path(out_dir)
        self.env = env
        self.thread = ThreadPoolExecutor(1, 'save')
        self.pending: Future | None = None
        # The collectives of a save have a group of their own, since the training's go on meanwhile.
        self.group = None
        if env.world_size > 1:
            self.group = dist.new_group(backend='gloo')

    def save(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Begin to write state/, and return once the tensors are copied to CPU memory.

        model: the model, whose parameters may be shards.
        checkpoint: all else, with an optimizer whose moments may be shards. Its own `model` is not
        read.
        Raises RunError where a tensor is not finite; state/ is then as it was. If the previous save
        failed, this one is waited for, and raises RunError if it fails too.
        """
        last_failed = self.settle() is not None
        scalars, moments = split_moments(checkpoint.optimizer['state'])
        tensors = {**name_weights(model), **moments}

        not_finite = find_not_finite_anywhere(tensors, self.env)
        if not_finite:
            raise RunError(f'{self.out_dir / STATE} was not written, '
                           f'as {not_finite} is not finite; '
                           f'go on from the state before it with --init_from=resume '
                           f'and a lower --learning_rate')

        rest = replace(checkpoint, model=None, optimizer=None).to_payload()
        rest['optimizer'] = dict(checkpoint.optimizer, state=scalars)

        folder = self.begin_folder(rest)
        writing = start_writing(tensors, folder, self.group)
        self.pending = self.thread.submit(self.complete, writing, folder)
        if last_failed:
            self.wait()

    def begin_folder(self, rest):
        """The temporary folder, which rank 0 makes with `rest` in it, as run.pt."""
        folder = self.out_dir / f'{STATE}.tmp'
        if self.env.is_main:
            try:
                remove(folder)
                folder.mkdir()
                write_unchecked(folder / REST, rest)
            except (OSError, RuntimeError) as error:
                raise self.failed_save(error) from None
        self.env.barrier()
        return folder

    def complete(self, writing: Future, folder: Path) -> None:
        """Wait for every rank's file. Rank 0 then adds the checksums and renames the folder."""
        writing.result()
        checksums = self.gather_checksums(folder)
        if not self.env.is_main:
            return

        with atomic_write(folder / CHECKSUMS) as file:
            json.dump(checksums, file)

        # A crash on any line here leaves state/ or state.prev/ whole. Where one of them is a link,
        # the folder that it points to stays.
        if os.path.lexists(self.out_dir / STATE):
            remove(self.out_dir / PREVIOUS)
            os.replace(self.out_dir / STATE, self.out_dir / PREVIOUS)
        os.replace(folder, self.out_dir / STATE)
        sync_folder(self.out_dir)

    def gather_checksums(self, folder):
        """{name of a file: CRC-32} of all ranks' files. Each rank reads its own. A collective."""
        own = folder.glob(f'shard-{self.env.rank + 1:05d}-*.safetensors')
        parts = [{path.name: checksum(path) for path in sorted(own)}]
        if self.group:
            own_part = parts[0]
            parts = [None] * self.env.world_size
            dist.all_gather_object(parts, own_part, group=self.group)

        checksums = {}
        for part in parts:
            checksums.update(part)
        return checksums

    def settle(self) -> BaseException | None:
        """Wait until the last save is on disk. Returns the error where it failed."""
        if self.pending is None:
            return None
        pending = self.pending
        self.pending = None
        return pending.exception()

    def wait(self) -> None:
        """Wait until the last save is on disk. RunError where it failed."""
        error = self.settle()
        if error is not None:
            raise self.failed_save(error) from None

    def failed_save(self, error):
        """The RunError that says why state/ could not be written, and what to do."""
        cause = first_cause(error)
        lines = str(cause).strip().splitlines() or [type(cause).__name__]
        if any((self.out_dir / name).exists() for name in (STATE, PREVIOUS)):
            advice = 'go on from the state before it with --init_from=auto'
        else:
            advice = 'start again'
        return RunError(f'{self.out_dir / STATE} could not be written ({lines[-1][:200]}); '
                        f'{advice_on(cause)}, and {advice}')


def split_moments(state):
    """An optimizer's state, {index: {name: tensor}}, as its scalars, which go to run.pt, and the
    rest by their names in the files."""
    scalars = {}
    moments = {}
    for index, values in state.items():
        scalars[index] = {name: value for name, value in values.items() if not value.dim()}
        for name, value in values.items():
            if value.dim():
                moments[f'optimizer.{index}.{name}'] = value
    return scalars, moments


def start_writing(tensors: dict[str, torch.Tensor], folder: Path,
                  group: dist.ProcessGroup | None) -> Future:
    """Copy {name: tensor} to CPU memory, and return a future of their being written."""
    from torch.distributed.checkpoint import async_save  # an import of half a second
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    # PyTorch warns that only one process writes, in a thread that catch_warnings may not reach.
    warnings.filterwarnings('ignore', 'torch.distributed is disabled')

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    return async_save(tensors, storage_writer=writer, process_group=group, no_dist=group is None)


def find_not_finite_anywhere(tensors, env):
    """The name of a tensor of which any rank's part is not finite, or None. A collective."""
    parts = {name: distributed.local_part(tensor) for name, tensor in tensors.items()}
    own = find_not_finite(parts)
    for name in env.all_gather(own):
        if name:
            return name
    return None


def checksum(path):
    """The CRC-32 of a file."""
    value = 0
    with open(path, 'rb') as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


# Loading

def verify(folder: Path) -> None:
    """UserError where a file of shards is missing, unknown, or not as it was written, and where the
    pieces of a tensor do not join.

    It reads every file whole, so one rank does it for all.
    """
    try:
        checksums = read_checksums(folder)
        names = sorted(path.name for path in folder.glob('*.safetensors'))
        if sorted(checksums) != names:
            raise UserError(f'its files are not those that {CHECKSUMS} names')

        # In threads, as the files together can have terabytes. zlib lets the threads run at once.
        with ThreadPoolExecutor() as threads:
            found = list(threads.map(checksum_of_file, [folder / name for name in names]))
        for name, value in zip(names, found):
            if value != checksums[name]:
                raise UserError(f'{name} fails its checksum')
    except (OSError, ValueError, RecursionError) as error:      # UserError is a ValueError
        raise UserError(f'{folder} cannot be read: {error}') from None
    read_sizes(folder)


def checksum_of_file(path):
    """The CRC-32 of a file. UserError for anything else: reading a FIFO would wait without end."""
    if not path.is_file():
        raise UserError(f'{path.name} fails its checksum')
    return checksum(path)


def read_checksums(folder):
    path = folder / CHECKSUMS
    if not path.is_file() or path.stat().st_size > CHECKSUMS_LIMIT:
        raise UserError(f'it has no {CHECKSUMS}')
    checksums = json.loads(path.read_text(encoding='utf-8'))
    if not isinstance(checksums, dict):
        raise UserError(f'its files are not those that {CHECKSUMS} names')
    return checksums


def load_rest(folder: Path) -> Checkpoint:
    """What a state folder holds beside its tensors, which `load` and `load_whole` read.

    Raises UserError where run.pt is damaged. The tensors' files are for `verify`.
    """
    payload = read(folder / REST)
    # The checks of a checkpoint want weights, which are elsewhere.
    rest = Checkpoint.from_payload(dict(payload, model={}), folder, STATE_NEEDS)

    state = rest.optimizer.get('state')
    if not isinstance(state, dict) or not all(isinstance(v, dict) for v in state.values()):
        raise UserError(f'{folder / REST} cannot be used: its optimizer is of another form')
    return replace(rest, model=None, shards_folder=str(folder))


def read_sizes(folder):
    """(a reader of the folder, {name: size} of its tensors). UserError for what no save writes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    reader = HuggingFaceStorageReader(str(folder))
    try:
        tensors = reader.read_metadata().state_dict_metadata
    except Exception as error:                      # a hostile header can raise anything
        text = ' '.join(str(error).split())
        raise UserError(f'{folder} cannot be read: its files do not say which part of which '
                        f'tensor they hold ({type(error).__name__}: {text[:100]})') from None

    sizes = {}
    for name, tensor in tensors.items():
        pieces = [(tuple(piece.offsets), tuple(piece.sizes)) for piece in tensor.chunks]
        sizes[name] = joined_size(pieces)
        if sizes[name] is None:
            raise UserError(f'{folder} cannot be read: the pieces of {name[:100]} do not join to '
                            f'a whole; a file is missing, or was changed')
    return reader, sizes


def joined_size(pieces):
    """The size of the tensor that the pieces make up, or None where they leave a hole or overlap.

    pieces: [(offsets, size)], in any order. A save divides a tensor by its rows alone.
    """
    rows = 0
    width = None                                    # the size of a row
    for offsets, size in sorted(pieces):
        if not size:                                # one number, which is never divided
            return size if pieces == [((), ())] else None
        if size[0] == 0:                            # of a rank that has no rows of this tensor
            continue

        is_next = offsets == (rows, *[0] * (len(size) - 1))
        if not is_next or width not in (None, size[1:]):
            return None
        rows += size[0]
        width = size[1:]
    if width is None:
        return None
    return (rows, *width)


def read_tensors(tensors, reader, alone):
    """Read {name: tensor} in place. A collective, unless `alone`."""
    from torch.distributed.checkpoint import CheckpointException, load
    try:
        with warnings.catch_warnings(action='ignore'):  # PyTorch warns that only one process reads
            load(tensors, storage_reader=reader, no_dist=alone)
    except CheckpointException as error:
        text = ' '.join(str(first_cause(error)).split())
        raise UserError(f'{reader.path} cannot be read: {text[:200]}') from None


def load(saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer,
         env: distributed.Environment) -> Checkpoint:
    """Read the weights into `model`. A collective.

    Returns `saved` with the moments for optim.load_state_dict, sharded as the parameters are.
    Raises UserError where the shapes differ, and for what is not finite. The caller has checked
    that the optimizers are of one kind and train equally many parameters.
    """
    folder = saved.shards_folder
    reader, sizes = read_sizes(folder)

    # Tensors of this model and its optimizer, to be read in place.
    moments = allocate_moments(sizes, optimizer)
    tensors = name_weights(model)
    for index, values in moments.items():
        tensors.update({f'optimizer.{index}.{name}': value for name, value in values.items()})

    check_sizes(tensors, sizes, folder)
    read_tensors(tensors, reader, alone=not dist.is_initialized())

    not_finite = find_not_finite_anywhere(tensors, env)
    if not_finite:
        raise UserError(f'{folder} cannot be used: {not_finite} is not finite; '
                        f'move it away, and {PREVIOUS} is read')
    return with_moments(saved, moments)


def allocate_moments(sizes, optimizer):
    """{index: {name: zeros}} for the moments that the files have, as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    moments = {}
    for name in sizes:
        parts = parse_name(name)
        if parts.index is not None and parts.index < len(parameters):
            zeros = torch.zeros_like(parameters[parts.index].detach())
            moments.setdefault(parts.index, {})[parts.moment] = zeros
    return moments


def check_sizes(tensors, sizes, folder):
    """UserError unless the files have the tensors that are to be read, of the same shapes, and no
    others."""
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name in sorted(expected.keys() | sizes.keys()):
        found = sizes.get(name, 'missing')
        wanted = expected.get(name, 'missing')
        if found == wanted:
            continue
        raise UserError(f'{folder} cannot be used: {name[:100]} is {found} in its files and '
                        f'{wanted} in the model; move it away, and the state before it is read')


def with_moments(saved, moments):
    """`saved` with `moments`, {index: {name: tensor}}, added to its optimizer's state."""
    state = {index: {**scalars, **moments.get(index, {})}
             for index, scalars in saved.optimizer['state'].items()}
    return replace(saved, optimizer=dict(saved.optimizer, state=state))


def load_whole(saved: Checkpoint, moments_too: bool = False) -> Checkpoint:
    """`saved` with `model`: all weights whole, in this process's memory, as a ckpt.pt has them.

    moments_too: read those of the optimizer as well, as a state.pt has them.
    Raises UserError for what is not finite.
    """
    reader, sizes = read_sizes(saved.shards_folder)
    tensors = {name: torch.empty(size) for name, size in sizes.items()
               if moments_too or parse_name(name).weight is not None}
    read_tensors(tensors, reader, alone=True)

    weights = {}
    moments = {}
    for name, tensor in tensors.items():
        parts = parse_name(name)
        if parts.weight is not None:
            weights[parts.weight] = tensor
        elif parts.index is not None:
            moments.setdefault(parts.index, {})[parts.moment] = tensor

    if 'lm_head.weight' not in weights and 'transformer.wte.weight' in weights:
        weights['lm_head.weight'] = weights['transformer.wte.weight']   # tied: saved once

    # its tensors are here now, so it is sharded no longer
    whole = replace(with_moments(saved, moments), model=weights, shards_folder=None)
    check_finite(whole, saved.shards_folder)
    return whole
