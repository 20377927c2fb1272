"""How the ranks of a run meet: torchrun's variables, and its store."""

import os
import time
import uuid
from datetime import timedelta

import torch.distributed as dist

from engine.errors import RunError, UserError


def read_ranks():
    """(rank, local_rank, world_size) from the variables that torchrun sets; UserError where they cannot be."""
    def read(name, default, low, high):
        text = os.environ.get(name, default)
        if not text.isdecimal() or not low <= int(text) < high:
            raise UserError(f'the environment variable {name}={text!r} should be a number from {low} to {high - 1}; '
                            f'start several ranks with torchrun, or type: unset RANK LOCAL_RANK WORLD_SIZE')
        return int(text)
    world_size = read('WORLD_SIZE', '1', 1, 10 ** 6)
    rank = read('RANK', '0', 0, world_size)
    local_rank = read('LOCAL_RANK', '0', 0, world_size)
    if world_size > 1:
        read('MASTER_PORT', '', 1, 65536)
        if not os.environ.get('MASTER_ADDR'):
            raise UserError(f'WORLD_SIZE={world_size} needs MASTER_ADDR; start the ranks with torchrun')
    return rank, local_rank, world_size


def init_process_group(backend, device, timeout):
    """Join torchrun's other ranks. Returns the backend's name."""
    if backend == 'auto':
        backend = 'nccl' if device.type == 'cuda' and dist.is_nccl_available() else 'gloo'
    if backend == 'nccl' and (device.type != 'cuda' or not dist.is_nccl_available()):
        raise UserError(f'backend=nccl moves data between NVIDIA GPUs, and this runs on {device.type}; '
                        f'try --backend=gloo')
    limit = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.distributed_c10d.rendezvous('env://', timeout=limit))
        store = dist.PrefixStore(agree_on_name(store, rank, world_size, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=limit,
                                device_id=device if backend == 'nccl' else None)
    except RuntimeError as error:
        raise RunError(f'the ranks did not meet over {backend} ({str(error).splitlines()[0][:150]}); '
                       f'check that all were started, with the same address and port') from None
    return backend


def agree_on_name(store, rank, world_size, timeout):
    """A name for this start of the ranks, the same for all of them, and new at each start.

    torchrun may keep its store over restarts, with the addresses of ranks that died. Its restart count
    does not tell the starts apart: if one machine fails and another only follows, only one counts.
    So rank 0 invents the name. Each other rank leaves an id under its number, and waits for the name under that
    id. Rank 0 answers every id that it finds, those of dead ranks too, until all living ones have come.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f'rank {rank}', own)
        name = store.get(f'answer to {own}').decode()
        store.add(f'answers to {name}', 1)
        return name
    answered, deadline = set(), time.monotonic() + timeout
    while store.add(f'answers to {own}', 0) < world_size - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f'after {timeout} seconds some ranks were missing')
        for other in store.multi_get([f'rank {i}' for i in range(1, world_size)]):
            if other not in answered:
                store.set(f'answer to {other.decode()}', own)
                answered.add(other)
        time.sleep(0.02)
    return own
