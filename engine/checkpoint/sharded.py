"""A state whose tensors each rank writes itself, for models whose whole state is a burden to one rank.

The folder `state/` has a safetensors file per rank, checksums.json, and run.pt with everything else. The previous
state stays as `state.prev/`. torch.distributed.checkpoint writes it beside the training, and reads it into
any number of ranks.
"""

import json
import math
import os
import shutil
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from engine import distributed
from engine.atomic_files import atomic_write, sync_folder
from engine.checkpoint.gathered import find_not_finite, read, validate, write
from engine.errors import RunError, UserError

STATE, PREVIOUS, REST, CHECKSUMS = 'state', 'state.prev', 'run.pt', 'checksums.json'


# Saving

class ShardedSaver:
    """Writes state/ in the background. Every rank makes one, and calls its methods in the same order."""

    def __init__(self, out_dir, env):
        self.out_dir, self.env = Path(out_dir), env
        self.thread, self.pending = ThreadPoolExecutor(1, 'save'), None
        # The collectives of a save have a group of their own, since the training's go on meanwhile.
        self.group = dist.new_group(backend='gloo') if env.world_size > 1 else None

    def save(self, model, optimizer_state, rest):
        """Begin to write state/, and return once the tensors are copied to CPU memory.

        model: whose parameters may be shards. optimizer_state: of optim.state_dict. rest: a dict for run.pt.
        Raises RunError where a tensor is not finite; state/ is then as it was. If the previous save failed,
        this one is waited for, and raises RunError if it fails too.
        """
        failed = self.settle() is not None
        moments = optimizer_state['optimizer']['state']
        tensors = {f'model.{name}': parameter.detach() for name, parameter in model.named_parameters()}
        tensors.update({f'optimizer.{index}.{name}': value for index, moment in moments.items()
                        for name, value in moment.items() if value.dim()})
        if not_finite := find_not_finite_anywhere(tensors, self.env):
            raise RunError(f'{self.out_dir / STATE} was not written, as {not_finite} is not finite; go on from the state '
                           f'before it with --init_from=resume and a lower --learning_rate')
        scalars = {index: {name: value for name, value in moment.items() if not value.dim()}
                   for index, moment in moments.items()}
        rest = dict(rest, scaler=optimizer_state['scaler'], optimizer=dict(optimizer_state['optimizer'], state=scalars))
        folder = self.out_dir / f'{STATE}.tmp'
        if self.env.is_main:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            write(folder / REST, rest)
        self.env.barrier()
        self.pending = self.thread.submit(self.complete, start_writing(tensors, folder, self.group), folder)
        if failed:
            self.wait()

    def complete(self, writing, folder):
        """Wait for every rank's file. Rank 0 then adds the checksums and renames the folder."""
        writing.result()
        files = sorted(folder.glob(f'shard-{self.env.rank + 1:05d}-*.safetensors'))
        checksums = [{path.name: checksum(path) for path in files}]
        if self.group:
            checksums *= self.env.world_size
            dist.all_gather_object(checksums, checksums[0], group=self.group)
        if not self.env.is_main:
            return
        with atomic_write(folder / CHECKSUMS) as file:
            json.dump({name: value for part in checksums for name, value in part.items()}, file)
        # A crash on any line here leaves state/ or state.prev/ whole.
        if (self.out_dir / STATE).exists():
            shutil.rmtree(self.out_dir / PREVIOUS, ignore_errors=True)
            os.replace(self.out_dir / STATE, self.out_dir / PREVIOUS)
        os.replace(folder, self.out_dir / STATE)
        sync_folder(self.out_dir)

    def settle(self):
        """Wait until the last save is on disk. Returns the error where it failed."""
        pending, self.pending = self.pending, None
        return pending and pending.exception()

    def wait(self):
        """Wait until the last save is on disk. RunError where it failed."""
        error = self.settle()
        if error:
            line = (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
            kept = any((self.out_dir / name).exists() for name in (STATE, PREVIOUS))
            raise RunError(f'{self.out_dir / STATE} could not be written ({line}); make room, and '
                           + ('go on from the state before it with --init_from=auto' if kept else 'start again')) from None


def start_writing(tensors, folder, group):
    """Copy {name: tensor} to CPU memory, and return a future of their being written."""
    from torch.distributed.checkpoint import async_save  # an import of half a second
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    # PyTorch warns that only one process writes, in a thread that catch_warnings may not reach.
    warnings.filterwarnings('ignore', 'torch.distributed is disabled')
    return async_save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                      process_group=group, no_dist=group is None)


def find_not_finite_anywhere(tensors, env):
    """The name of a tensor of which any rank's part is not finite, or None. A collective."""
    parts = {name: distributed.local_part(tensor) for name, tensor in tensors.items()}
    return next((name for name in env.all_gather(find_not_finite({'model': parts})) if name), None)


def checksum(path):
    """The CRC-32 of a file."""
    value = 0
    with open(path, 'rb') as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


# Loading

def load_rest(folder):
    """What a state folder holds beside its tensors, with `sharded`: the folder. UserError where any of its files
    is damaged, tensors included."""
    try:
        path = folder / CHECKSUMS
        if not path.is_file() or path.stat().st_size > 1 << 24:
            raise UserError(f'it has no {CHECKSUMS}')
        checksums = json.loads(path.read_text(encoding='utf-8'))
        names = sorted(file.name for file in folder.glob('*.safetensors'))
        if not isinstance(checksums, dict) or sorted(checksums) != names:
            raise UserError(f'its files are not those that {CHECKSUMS} names')
        for name in names:
            if not (folder / name).is_file() or checksum(folder / name) != checksums[name]:
                raise UserError(f'{name} fails its checksum')
    except (OSError, ValueError, RecursionError) as error:          # UserError is a ValueError
        raise UserError(f'{folder} cannot be read: {error}') from None
    rest = validate(dict(read(folder / REST), model={}), folder, ('optimizer', 'scaler'))
    del rest['model']
    moments = rest['optimizer'].get('state')
    if not isinstance(moments, dict) or not all(isinstance(moment, dict) for moment in moments.values()):
        raise UserError(f'{folder / REST} cannot be used: its optimizer is of another form')
    return dict(rest, sharded=str(folder))


def read_sizes(folder):
    """(a reader of the folder, {name: size} of its tensors). UserError for what no save writes."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    reader = HuggingFaceStorageReader(str(folder))
    try:
        sizes = {name: tuple(found.size) for name, found in reader.read_metadata().state_dict_metadata.items()}
        stored = sum(path.stat().st_size for path in Path(folder).glob('*.safetensors'))
        if sum(math.prod(size) for size in sizes.values()) > stored:
            raise UserError('its tensors are larger than its files')
        return reader, sizes
    except Exception as error:                              # a hostile header can raise anything
        raise UserError(f'{folder} cannot be read: {" ".join(str(error).split())[:200]}') from None


def load_tensors(tensors, reader, alone):
    """Read {name: tensor} in place. A collective, unless `alone`."""
    from torch.distributed.checkpoint import load
    with warnings.catch_warnings(action='ignore'):          # PyTorch warns that only one process reads
        load(tensors, storage_reader=reader, no_dist=alone)


def load(saved, model, optimizer, env):
    """Read the weights into `model`, and return `saved` with the moments for optim.load_state_dict, sharded as the
    parameters are. A collective. UserError where the shapes or the optimizers differ, and for what is not finite."""
    reader, sizes = read_sizes(saved['sharded'])
    tensors = {f'model.{name}': parameter.detach() for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    moments = {}
    for name in sizes:
        kind, _, rest = name.partition('.')
        index, _, moment = rest.partition('.')
        if kind == 'optimizer' and index.isdecimal() and int(index) < len(parameters):
            tensors[name] = moments.setdefault(int(index), {})[moment] = torch.zeros_like(parameters[int(index)].detach())
    expected = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    different = {name for name in expected.keys() | sizes.keys() if expected.get(name) != sizes.get(name)}
    if different:
        advice = ('the model has another shape; block_size cannot change with --checkpoint=sharded'
                  if any(name.startswith('model.') for name in different) else 'the run had another --optimizer')
        raise UserError(f'{saved["sharded"]} cannot be used: {advice}')
    load_tensors(tensors, reader, alone=not dist.is_initialized())
    if not_finite := find_not_finite_anywhere(tensors, env):
        raise UserError(f'{saved["sharded"]} cannot be used: {not_finite} is not finite; move it away, and {PREVIOUS} is read')
    return with_moments(saved, moments)


def with_moments(saved, moments):
    """`saved` with the tensors `moments`, {index: {name: tensor}}, added to its optimizer's state."""
    state = {index: {**scalars, **moments.get(index, {})} for index, scalars in saved['optimizer']['state'].items()}
    return dict(saved, optimizer=dict(saved['optimizer'], state=state))


def load_whole(saved, moments_too=False):
    """`saved` with `model`: all weights whole, in this process's memory, as a ckpt.pt has them; with moments_too also
    those of the optimizer, as a state.pt has them."""
    reader, sizes = read_sizes(saved['sharded'])
    tensors = {name: torch.empty(size) for name, size in sizes.items() if moments_too or name.startswith('model.')}
    load_tensors(tensors, reader, alone=True)
    weights, moments = {}, {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition('.')
        index, _, moment = rest.partition('.')
        if kind == 'model':
            weights[rest] = tensor
        elif index.isdecimal():
            moments.setdefault(int(index), {})[moment] = tensor
    weights.setdefault('lm_head.weight', weights.get('transformer.wte.weight'))    # tied: saved once
    return validate(dict(with_moments(saved, moments), model=weights), saved['sharded'])
