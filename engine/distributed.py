"""The ranks of a run: start-up, collectives, errors that end all of them, signals, exits.

`start()` returns one Environment. A single process is one rank and runs the same code.
"""

import os
import re
import signal
import sys
import threading
import time
import traceback
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from engine import device as devices
from engine.errors import RunError, UserError

STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1') if hasattr(signal, name)]
STORE_TIMEOUT = 5       # seconds that a failed rank waits for the store, which a cut cable may have taken away
DUMP_SECONDS = 10       # seconds that the flight recorder gets to write its file


def start(device='auto', dtype='auto', compile=False, backend='auto', timeout=600):
    """Choose what is 'auto', refuse what this machine lacks, and join torchrun's other ranks.

    timeout: seconds that a rank waits for another before it gives up.
    Raises UserError for a value that is unknown or that cannot be had here.
    """
    rank, local_rank, world_size = read_ranks()
    if backend not in ('auto', 'nccl', 'gloo'):
        raise UserError(f"backend={backend!r} is unknown; try 'auto', 'nccl' or 'gloo'")
    if world_size > 1 and (device == 'mps' or ':' in device):
        raise UserError(f'device={device} is one device, and {world_size} ranks need one each; try --device=auto')
    if world_size > 1 and device == 'auto' and not torch.cuda.is_available():
        device = 'cpu'                                  # gloo does not reach a Mac's GPU
    device, why_device = devices.choose_device(device, local_rank)
    dtype, why_dtype = devices.choose_dtype(dtype, device)
    compile, why_compile = devices.choose_compile(compile, device)
    choices = ((f'device {device}', why_device), (f'dtype {dtype}', why_dtype),
               ('compiled' if compile else 'not compiled', why_compile))
    summary = ', '.join(f'{choice} ({reason})' if reason else choice for choice, reason in choices)
    if world_size > 1:
        backend = init_process_group(backend, device, timeout)
        summary += f', {world_size} ranks over {backend}'
        if backend == 'nccl' and hasattr(dist.group.WORLD._get_backend(device), 'get_error'):
            watch_nccl(dist.group.WORLD._get_backend(device))
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32 where float32 is multiplied
    return Environment(device, dtype, compile, rank, local_rank, world_size, summary)


class Environment:
    """Where a process runs: its device, precision and compiler, and its place among the ranks.

    device: torch.device. dtype: name of the autocast precision. compile: bool. rank, local_rank,
    world_size: as torchrun numbers them. summary: one line that says what was chosen and why.
    """

    def __init__(self, device, dtype, compile, rank, local_rank, world_size, summary):
        self.device, self.dtype, self.compile, self.summary = device, dtype, compile, summary
        self.rank, self.local_rank, self.world_size = rank, local_rank, world_size
        self.is_main = rank == 0
        self.received_signal = 0                        # number of the first stop signal that this rank received
        self.replaced_handlers = {}                     # {number of a signal: its handler before catch_signals}

    @property
    def local_world_size(self):
        """The ranks on this machine."""
        text = os.environ.get('LOCAL_WORLD_SIZE', '')           # torchrun sets it
        return int(text) if text.isdecimal() and 1 <= int(text) <= self.world_size else self.world_size

    @property
    def launcher(self):
        """What starts a script with as many ranks as these: 'python' or 'torchrun ...'."""
        if self.world_size == 1:
            return 'python'
        machines = self.world_size // self.local_world_size
        where = f'--nnodes={machines} ...' if machines > 1 else '--standalone'
        return f'torchrun --nproc_per_node={self.local_world_size} {where}'

    def autocast(self):
        return devices.autocast(self.device, self.dtype)

    # Collectives: every rank calls them

    def all_reduce(self, tensor):
        """`tensor`, summed over the ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value):
        """Every rank's `value` in a list, in order of rank. Any picklable value."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self):
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def raise_on_all_ranks(self):
        """If any rank raises UserError in this block, every rank raises it."""
        message = None
        try:
            yield
        except UserError as error:
            if self.world_size == 1:
                raise
            message = str(error)
        first = next((text for text in self.all_gather(message) if text), None)
        if first:
            raise on_all_ranks(UserError(first))

    def assert_same_on_all_ranks(self, values):
        """UserError, on every rank, unless all ranks have the same {name: value}."""
        everyone = self.all_gather(values)
        for name in values:
            found = [other[name] for other in everyone]
            if any(value != found[0] for value in found):
                raise on_all_ranks(UserError(f'the ranks differ in {name}: {", ".join(map(str, found))}'))

    # Signals

    def catch_signals(self, *names):
        """From now on, note these signals (all STOP_SIGNALS by default) instead of dying of them.
        SIGHUP stays ignored where it was ignored at the start, as under nohup."""
        def note(number, frame):
            self.received_signal = self.received_signal or number
        for number in names or STOP_SIGNALS:
            if not (number == getattr(signal, 'SIGHUP', None) and signal.getsignal(number) == signal.SIG_IGN):
                self.replaced_handlers.setdefault(number, signal.getsignal(number) or signal.SIG_DFL)
                signal.signal(number, note)

    def restore_signals(self):
        """Put back the handlers that catch_signals replaced, for a program that goes on after the run. With several
        ranks this does nothing: the process ends next, and a SIGTERM of torchrun must not change its exit code."""
        while self.replaced_handlers and self.world_size == 1:
            signal.signal(*self.replaced_handlers.popitem())

    def stop_flags(self):
        """(len(STOP_SIGNALS),) float32 on the device: 1 for the signal that this rank received."""
        if self.received_signal:
            return torch.tensor([float(self.received_signal == number) for number in STOP_SIGNALS], device=self.device)
        return torch.zeros(len(STOP_SIGNALS), device=self.device)   # made there: a copy would wait for the device

    def stop_signal(self):
        """The number of a signal that any rank received, or 0. A collective that waits for all ranks."""
        if self.world_size == 1:
            return self.received_signal
        return signal_number(self.all_reduce(self.stop_flags()).tolist())


def on_all_ranks(error):
    """`error`, marked as one that every rank raises, so that only rank 0 prints it."""
    error.on_all_ranks = True
    return error


def signal_number(flags):
    """The signal in stop flags that were summed over the ranks, or 0."""
    return next((int(number) for number, flag in zip(STOP_SIGNALS, flags) if flag), 0)


# Exits

@contextmanager
def hard_exit():
    """End a rank with os._exit, which skips the interpreter's clean-up.

    That clean-up can hang in PyTorch 2.13: destroying a DDP model joins gloo's thread, which
    waits for the interpreter lock. A process that never joined other ranks ends as usual.
    """
    code = 0
    try:
        yield
    except BaseException as error:
        if not dist.is_initialized():
            raise
        code = error.code if isinstance(error, SystemExit) else 1
        if not isinstance(error, SystemExit):
            traceback.print_exc()
    if dist.is_initialized():
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code or 0)


@contextmanager
def report_first_failure():
    """Only the first rank that fails raises its error; the others exit 1.
    PyTorch's errors about a lost rank become a RunError of one line."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not dist.is_initialized():
            raise
        if not is_first_failure():
            raise SystemExit(1) from None
        text = str(error)
        lost = isinstance(error, dist.DistError) or re.search(r'gloo/|\bNCCL\b|ProcessGroup|Gloo', text)
        if lost and not isinstance(error, (OSError, RunError)):
            raise lost_rank(timed_out=re.search('time.?d? ?out', text, re.IGNORECASE)) from None
        raise


def lost_rank(timed_out):
    what = 'did not answer within --rank_timeout' if timed_out else 'ended'
    return RunError(f'another rank {what}, so this one stops; the saved files are whole, go on with --init_from=auto')


def is_first_failure():
    """True for the first rank of this start that asks, and where the store does not answer."""
    answers = []

    def ask():
        with suppress(RuntimeError):                    # without torchrun the store ends with rank 0
            # torchrun holds this store, which outlives the ranks.
            answers.append(dist.distributed_c10d._get_default_store().add('failed ranks', 1))
    # In a thread: over a cut cable, add() waits without end.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT)
    return answers in ([], [1])


def watch_nccl(backend):
    """Start a thread that ends this rank in one line once NCCL has lost another one.

    The main thread waits in CUDA and gets no exception: PyTorch's watchdog notes the error in
    `backend`, waits a minute for the flight recorder, and aborts the process.
    """
    def watch():
        while backend.get_error().name == 'SUCCESS':
            time.sleep(1)
        if is_first_failure():
            with suppress(OSError, ValueError):
                sys.stderr.write(f'rank {dist.get_rank()}: {lost_rank(backend.get_error().name == "TIMEOUT")}\n')
                sys.stderr.flush()
        time.sleep(DUMP_SECONDS)
        os._exit(1)
    threading.Thread(target=watch, daemon=True).start()


def is_shard(tensor):
    """True for a DTensor, whose class takes half a second to import."""
    return hasattr(tensor, 'full_tensor')


def local_part(tensor):
    """What this rank holds of a tensor: its shard, or all of it."""
    return tensor.to_local() if is_shard(tensor) else tensor


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
