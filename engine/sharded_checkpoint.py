"""A state whose tensors each rank writes itself, for models whose whole state is a burden to one rank.

The folder `state/` has a safetensors file per rank, checksums.json, and run.pt with all that is no tensor. The one
before is kept as `state.prev/`. torch.distributed.checkpoint writes it beside the training, and reads it into
any number of ranks.
"""

import json
import math
import os
import shutil
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist

from engine import parallel
from engine.checkpoint import find_not_finite, read, validate, write
from engine.errors import RunError, UserError
from engine.files import atomic_write, sync_folder

STATE, PREVIOUS, REST, CHECKSUMS = 'state', 'state.prev', 'run.pt', 'checksums.json'


# Saving

class ShardedSaver:
    """Writes state/ in the background. Every rank makes one, and calls its methods in the same order.

    timeout: seconds that rank 0 waits for the files of the others.
    """

    def __init__(self, out_dir, env, timeout):
        self.out_dir, self.env, self.timeout = Path(out_dir), env, timeout
        self.thread, self.pending = ThreadPoolExecutor(1, 'save'), None
        # The collectives of a save have a group of their own, since the training's go on meanwhile.
        self.group = dist.new_group(backend='gloo') if env.world_size > 1 else None

    def save(self, model, optimizer_state, rest):
        """Begin to write state/, and return once the tensors are copied to CPU memory.

        model: whose parameters may be shards. optimizer_state: of optim.state_dict. rest: a dict for run.pt.
        Raises RunError where a tensor is not finite, or where the save before failed; state/ is then as it was.
        """
        from torch.distributed.checkpoint import async_save                # an import of half a second
        from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
        self.wait()
        moments = optimizer_state['optimizer']['state']
        tensors = {f'model.{name}': parameter.detach() for name, parameter in model.named_parameters()}
        tensors.update({f'optimizer.{index}.{name}': value for index, moment in moments.items()
                        for name, value in moment.items() if value.dim()})
        local = {name: parallel.local_part(tensor) for name, tensor in tensors.items()}
        not_finite = next((name for name in self.env.all_gather(find_not_finite({'model': local})) if name), None)
        if not_finite:
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
        writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
        upload = async_save(tensors, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        self.pending = self.thread.submit(self.complete, upload, folder)

    def complete(self, upload, folder):
        """Wait for this rank's file, and add its checksum. Rank 0 renames the folder once all ranks have done so."""
        upload.result()
        files = sorted(folder.glob(f'shard-{self.env.rank + 1:05d}-*.safetensors'))
        with atomic_write(folder / f'{self.env.rank}.checksums') as file:
            json.dump({path.name: checksum(path) for path in files}, file)
        if not self.env.is_main:
            return
        parts = [folder / f'{rank}.checksums' for rank in range(self.env.world_size)]
        deadline = time.monotonic() + self.timeout
        while not all(part.exists() for part in parts):
            if time.monotonic() > deadline:
                raise TimeoutError('a rank did not finish its file')
            time.sleep(0.02)
        checksums = {}
        for part in parts:
            checksums.update(json.loads(part.read_text(encoding='utf-8')))
            part.unlink()
        with atomic_write(folder / CHECKSUMS) as file:
            json.dump(checksums, file)
        # A crash on any line here leaves state/ or state.prev/ whole.
        if (self.out_dir / STATE).exists():
            shutil.rmtree(self.out_dir / PREVIOUS, ignore_errors=True)
            os.replace(self.out_dir / STATE, self.out_dir / PREVIOUS)
        os.replace(folder, self.out_dir / STATE)
        sync_folder(self.out_dir)

    def wait(self):
        """Wait until the save before is on disk. RunError where it failed."""
        try:
            if self.pending:
                self.pending.result()
        except Exception as error:                          # PyTorch's writer raises kinds of its own
            line = ' '.join(str(error).split()) or type(error).__name__
            raise RunError(f'{self.out_dir / STATE} could not be written ({line[-200:]}); the state before it is whole; '
                           f'make room and go on with --init_from=auto') from None
        finally:
            self.pending = None


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
            raise UserError(f'{folder} cannot be read: it has no {CHECKSUMS}')
        checksums = json.loads(path.read_text(encoding='utf-8'))
        names = sorted(file.name for file in folder.glob('*.safetensors'))
        if not isinstance(checksums, dict) or sorted(checksums) != names:
            raise UserError(f'{folder} cannot be read: its files are not those that {CHECKSUMS} names')
        for name in names:
            if not (folder / name).is_file() or checksum(folder / name) != checksums[name]:
                raise UserError(f'{folder} cannot be read: {name} fails its checksum')
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f'{folder} cannot be read: {error}') from None
    rest = validate(dict(read(folder / REST), model={}), folder, ('optimizer', 'scaler'))
    del rest['model']
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
    with warnings.catch_warnings(action='ignore'):          # of PyTorch, that one process reads alone
        load(tensors, storage_reader=reader, no_dist=alone)


def load(saved, model, optimizer):
    """Read the weights into `model`, and return `saved` with the moments for optim.load_state_dict, sharded as the
    parameters are. A collective. UserError where the shapes differ."""
    reader, sizes = read_sizes(saved['sharded'])
    tensors = {f'model.{name}': parameter.detach() for name, parameter in model.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
    moments = {}
    for name in sizes:
        kind, _, rest = name.partition('.')
        index, _, moment = rest.partition('.')
        if kind == 'optimizer' and index.isdecimal() and int(index) < len(parameters):
            tensors[name] = moments.setdefault(int(index), {})[moment] = torch.zeros_like(parameters[int(index)].detach())
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != sizes:
        raise UserError(f'{saved["sharded"]} holds a model of another shape; block_size cannot change with '
                        f'--checkpoint=sharded')
    load_tensors(tensors, reader, alone=not dist.is_initialized())
    state = {index: {**scalars, **moments.get(index, {})} for index, scalars in saved['optimizer'].get('state', {}).items()}
    return dict(saved, optimizer=dict(saved['optimizer'], state=state))


def load_whole(saved):
    """`saved` with `model`: all weights whole, in this process's memory, as a ckpt.pt has them."""
    reader, sizes = read_sizes(saved['sharded'])
    tensors = {name: torch.empty(size) for name, size in sizes.items() if name.startswith('model.')}
    load_tensors(tensors, reader, alone=True)
    weights = {name.removeprefix('model.'): tensor for name, tensor in tensors.items()}
    weights.setdefault('lm_head.weight', weights.get('transformer.wte.weight'))    # tied: saved once
    return validate(dict(saved, model=weights), saved['sharded'])
