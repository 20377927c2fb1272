"""The ranks of a run: start-up, collectives, errors that end all of them, signals, exits.

`start_environment()` returns one Environment. A single process is one rank and runs the same code.
"""

import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from engine import device as devices
from engine.errors import RunError, UserError

STOP_SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGUSR1')
                if hasattr(signal, name)]

# Seconds that a failed rank waits for the store, which a cut cable may have taken away
STORE_TIMEOUT = 5
# Seconds that the flight recorder gets to write its file
DUMP_SECONDS = 10


# Start-up

def start_environment(
    device: str = 'auto', dtype: str = 'auto', compile: bool | str = False, backend: str = 'auto',
    timeout: float = 600,
) -> 'Environment':
    """Choose what is 'auto', refuse what this machine lacks, and join torchrun's other ranks.

    device, dtype, compile: as the functions of engine.device take them. backend: 'auto', 'nccl' or
    'gloo'. timeout: seconds that a rank waits for another before it gives up.

    Raises UserError for a value that is unknown or that cannot be had here, and RunError where the
    ranks do not meet.
    """
    ranks = read_ranks()
    check_ranks_can_use(backend, device, ranks.world_size)
    if ranks.world_size > 1 and device == 'auto' and not torch.cuda.is_available():
        device = 'cpu'                                  # gloo does not reach a Mac's GPU

    # What this machine can do
    device_choice = devices.choose_device(device, ranks.local_rank)
    device = device_choice.value
    dtype_choice = devices.choose_dtype(dtype, device)
    compile_choice = devices.choose_compile(compile, device)
    summary = summarize(device_choice, dtype_choice, compile_choice)

    # The other ranks
    if ranks.world_size > 1:
        backend = init_process_group(backend, device, timeout)
        summary += f', {ranks.world_size} ranks over {backend}'
        if backend == 'nccl':
            watch_backend(device)

    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32 where float32 is multiplied
    return Environment(device, dtype_choice.value, compile_choice.value, *ranks, summary)


def check_ranks_can_use(backend, device, world_size):
    """UserError for an unknown backend, and for one device where there are several ranks."""
    if backend not in ('auto', 'nccl', 'gloo'):
        raise UserError(f"backend={backend!r} is unknown; try 'auto', 'nccl' or 'gloo'")

    if world_size > 1 and (device == 'mps' or ':' in device):
        raise UserError(f'device={device} is one device, and {world_size} ranks need one each; try '
                        f'--device=auto')


def summarize(device, dtype, compile):
    """One line that says what the three Choices are, and the reasons for them."""
    compiled = 'not compiled'
    if compile.value:
        compiled = 'compiled'

    parts = []
    for text, reason in ((f'device {device.value}', device.reason),
                         (f'dtype {dtype.value}', dtype.reason),
                         (compiled, compile.reason)):
        if reason:
            text += f' ({reason})'
        parts.append(text)
    return ', '.join(parts)


@dataclass(eq=False)
class Environment:
    """Where a process runs: its device, precision and compiler, and its place among the ranks.

    Every rank of a run has one. A single process is rank 0 of 1.
    """

    device: torch.device
    dtype: str                  # the name of the autocast precision
    compile: bool               # whether torch.compile is used

    rank: int                   # among all ranks, as torchrun numbers them
    local_rank: int             # among the ranks of this machine
    world_size: int             # how many ranks there are

    summary: str                # one line that says what was chosen and why

    # The number of the first stop signal that this rank received, or 0
    received_signal: int = 0
    # How many times Ctrl-C was pressed, and what answers it
    interrupts: int = 0
    interrupt_watcher: 'InterruptWatcher | None' = None
    # {number of a signal: its handler before catch_signals}
    replaced_handlers: dict[int, Any] = field(default_factory=dict)

    @property
    def is_main(self) -> bool:
        """True on rank 0, which alone prints and writes."""
        return self.rank == 0

    @property
    def local_world_size(self) -> int:
        """The number of ranks on this machine."""
        text = os.environ.get('LOCAL_WORLD_SIZE', '')           # torchrun sets it
        if text.isdecimal() and 1 <= int(text) <= self.world_size:
            return int(text)
        return self.world_size

    @property
    def launcher(self) -> str:
        """What starts a script with as many ranks as these: 'python' or 'torchrun ...'."""
        if self.world_size == 1:
            return 'python'

        machines = self.world_size // self.local_world_size
        where = '--standalone'
        if machines > 1:
            where = f'--nnodes={machines} ...'
        return f'torchrun --nproc_per_node={self.local_world_size} {where}'

    def autocast(self) -> AbstractContextManager:
        """The context in which forward passes run in the precision of this run."""
        return devices.autocast(self.device, self.dtype)

    # Collectives: every rank calls them

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor`, summed over the ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def all_gather(self, value: Any) -> list:
        """Every rank's `value` in a list, in order of rank. Any picklable value."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """If any rank raises UserError in this block, every rank raises it."""
        message = None
        try:
            yield
        except UserError as error:
            if self.world_size == 1:
                raise
            message = str(error)

        for text in self.all_gather(message):
            if text:
                raise on_all_ranks(UserError(text))

    def assert_same_on_all_ranks(self, values: dict[str, Any]) -> None:
        """UserError, on every rank, unless all ranks have the same {name: value}."""
        everyone = self.all_gather(values)
        for name in values:
            found = [other[name] for other in everyone]
            if any(value != found[0] for value in found):
                raise on_all_ranks(UserError(
                    f'the ranks differ in {name}: {", ".join(map(str, found))}'))

    # Signals

    def catch_signals(self, *names: int) -> None:
        """From now on, note these signals instead of dying of them.

        The first Ctrl-C is answered by a line on stderr, and a second one ends a single process:
        InterruptWatcher. With several ranks a second one is ignored, as torchrun may pass on what
        the terminal has sent already.

        names: numbers of signals; all STOP_SIGNALS by default. SIGHUP stays ignored where it was
        ignored at the start, as under nohup. In a thread this does nothing, as only the main
        thread of a program may handle signals.
        """
        if threading.current_thread() is not threading.main_thread():
            return

        for number in names or STOP_SIGNALS:
            before = signal.getsignal(number)
            if number == getattr(signal, 'SIGHUP', None) and before == signal.SIG_IGN:
                continue
            # None is a handler that C code set, which Python cannot put back.
            self.replaced_handlers.setdefault(number, before or signal.SIG_DFL)
            signal.signal(number, self.note_signal)
            if number == signal.SIGINT and not self.interrupt_watcher:
                self.interrupt_watcher = InterruptWatcher(self.is_main, self.world_size == 1)

    def note_signal(self, number: int, frame: Any) -> None:
        """The handler of signals that are caught."""
        if not self.received_signal:
            self.received_signal = number
        if number == signal.SIGINT:
            self.interrupts += 1
            if self.interrupts > 1 and self.world_size == 1:
                raise KeyboardInterrupt         # InterruptWatcher ends no notebook

    def restore_signals(self) -> None:
        """Put back the handlers that catch_signals replaced, for a program that goes on.

        With several ranks this does nothing: the process ends next, and a SIGTERM of torchrun must
        not change its exit code.
        """
        if self.world_size > 1:
            return
        if self.interrupt_watcher:
            self.interrupt_watcher.close()
            self.interrupt_watcher = None
        for number, handler in self.replaced_handlers.items():
            signal.signal(number, handler)
        self.replaced_handlers.clear()

    def stop_flags(self) -> torch.Tensor:
        """(len(STOP_SIGNALS),) float32 on the device: 1 for the signal that this rank received."""
        if not self.received_signal:
            # Made on the device: a copy would wait for it.
            return torch.zeros(len(STOP_SIGNALS), device=self.device)
        flags = [float(self.received_signal == number) for number in STOP_SIGNALS]
        return torch.tensor(flags, device=self.device)

    def stop_signal(self) -> int:
        """The number of a signal that any rank received, or 0. A collective that waits."""
        if self.world_size == 1:
            return self.received_signal
        return signal_number(self.all_reduce(self.stop_flags()).tolist())


class InterruptWatcher:
    """Answers Ctrl-C at once: the first by a line on stderr, the second by the end of the process.

    Python runs the handler of a signal between two of its own instructions, and a backward pass of
    a minute is one of them. But it passes the signal's number at once to a socket, from which a
    thread reads it here.

    answers: whether this rank prints the line. ends: whether a second Ctrl-C ends the process,
    unless a person types Python in it, as in a notebook.
    """

    def __init__(self, answers: bool, ends: bool):
        self.answers = answers
        self.ends = ends and not hasattr(sys, 'ps1')    # the prompt of interactive sessions
        self.text = 'stopping after this iteration'
        if ends:
            self.text += '; press Ctrl-C again to stop at once'

        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.fd_before = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        """Read the numbers of signals until the socket is closed."""
        interrupts = 0
        with self.reader:
            while number := self.reader.recv(1):
                if number[0] != signal.SIGINT:
                    continue
                interrupts += 1
                if interrupts == 1 and self.answers:
                    self.answer()
                elif interrupts > 1 and self.ends:
                    os._exit(128 + signal.SIGINT)

    def answer(self):
        """Print the line, without Python's streams and their locks, which the run may hold."""
        start = ''
        with suppress(OSError):
            if os.isatty(2):
                start = '\n'                    # after the ^C that the terminal shows
            os.write(2, f'{start}{self.text}\n'.encode())

    def close(self) -> None:
        """Leave Ctrl-C to the handlers that come back."""
        signal.set_wakeup_fd(self.fd_before)
        self.writer.close()                     # which ends the thread


def on_all_ranks(error: UserError) -> UserError:
    """`error`, marked as one that every rank raises, so that only rank 0 prints it."""
    error.on_all_ranks = True
    return error


def signal_number(flags: Sequence[float]) -> int:
    """The signal in stop flags that were summed over the ranks, or 0."""
    for number, flag in zip(STOP_SIGNALS, flags):
        if flag:
            return int(number)
    return 0


# Tensors that ranks share

def is_shard(tensor: torch.Tensor) -> bool:
    """True for a DTensor, whose class takes half a second to import."""
    return hasattr(tensor, 'full_tensor')


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: its shard, or all of it."""
    if is_shard(tensor):
        return tensor.to_local()
    return tensor


# Exits

@contextmanager
def hard_exit() -> Iterator[None]:
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
        if isinstance(error, SystemExit):
            code = error.code or 0
        else:
            code = 1
            traceback.print_exc()

    if dist.is_initialized():
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(code)


@contextmanager
def report_first_failure() -> Iterator[None]:
    """Only the first rank that fails raises its error; the others exit 1.

    PyTorch's errors about a lost rank become a RunError of one line.
    """
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not dist.is_initialized():
            raise

        if not is_first_failure():
            raise SystemExit(1) from None
        if is_about_lost_rank(error):
            timed_out = re.search('time.?d? ?out', str(error), re.IGNORECASE)
            raise lost_rank(timed_out) from None
        raise


def is_about_lost_rank(error):
    """True for an error of PyTorch's that says that another rank is gone."""
    if isinstance(error, (OSError, RunError)):
        return False
    if isinstance(error, dist.DistError):
        return True
    return bool(re.search(r'gloo/|\bNCCL\b|ProcessGroup|Gloo', str(error)))


def lost_rank(timed_out):
    """The RunError of a rank that has lost another one."""
    what = 'ended'
    if timed_out:
        what = 'did not answer within --rank_timeout'
    return RunError(f'another rank {what}, so this one stops; the saved files are whole, go on '
                    f'with --init_from=auto')


def is_first_failure():
    """True for the first rank of this start that asks, and where the store does not answer."""
    answers = []

    def ask():
        # torchrun holds this store, which outlives the ranks. Without torchrun it ends with rank 0.
        with suppress(RuntimeError):
            store = dist.distributed_c10d._get_default_store()
            answers.append(store.add('failed ranks', 1))

    # In a thread: over a cut cable, add() waits without end.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(STORE_TIMEOUT)
    return answers in ([], [1])


def watch_backend(device):
    """Watch this rank's backend, where PyTorch lets it tell its errors."""
    backend = dist.group.WORLD._get_backend(device)
    if hasattr(backend, 'get_error'):
        watch_nccl(backend)


def watch_nccl(backend):
    """Start a thread that ends this rank in one line once NCCL has lost another one.

    The main thread waits in CUDA and gets no exception: PyTorch's watchdog notes the error in
    `backend`, waits a minute for the flight recorder, and aborts the process.
    """
    def watch():
        while backend.get_error().name == 'SUCCESS':
            time.sleep(1)

        if is_first_failure():
            error = lost_rank(timed_out=backend.get_error().name == 'TIMEOUT')
            with suppress(OSError, ValueError):
                sys.stderr.write(f'rank {dist.get_rank()}: {error}\n')
                sys.stderr.flush()
        time.sleep(DUMP_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


# How the ranks meet

class Ranks(NamedTuple):
    """The place of this process among the ranks, as torchrun numbers them."""

    rank: int
    local_rank: int
    world_size: int


def read_ranks():
    """The Ranks from the variables that torchrun sets. UserError where they cannot be."""
    world_size = read_number('WORLD_SIZE', '1', 1, 10 ** 6)
    rank = read_number('RANK', '0', 0, world_size)
    local_rank = read_number('LOCAL_RANK', '0', 0, world_size)

    if world_size > 1:
        read_number('MASTER_PORT', '', 1, 65536)
        if not os.environ.get('MASTER_ADDR'):
            raise UserError(f'WORLD_SIZE={world_size} needs MASTER_ADDR; start the ranks with '
                            f'torchrun')
    return Ranks(rank, local_rank, world_size)


def read_number(name, default, low, end):
    """The environment variable `name` as a number from `low` to below `end`."""
    text = os.environ.get(name, default)
    if not text.isdecimal() or not low <= int(text) < end:
        raise UserError(f'the environment variable {name}={text!r} should be a number from {low} '
                        f'to {end - 1}; start several ranks with torchrun, or type: unset RANK '
                        f'LOCAL_RANK WORLD_SIZE')
    return int(text)


def init_process_group(backend: str, device: torch.device, timeout: float) -> str:
    """Join torchrun's other ranks. Returns the backend's name."""
    can_use_nccl = device.type == 'cuda' and dist.is_nccl_available()
    if backend == 'nccl' and not can_use_nccl:
        raise UserError(f'backend=nccl moves data between NVIDIA GPUs, and this runs on '
                        f'{device.type}; try --backend=gloo')
    if backend == 'auto':
        backend = 'gloo'
        if can_use_nccl:
            backend = 'nccl'

    device_id = None
    if backend == 'nccl':
        device_id = device

    limit = timedelta(seconds=timeout)
    try:
        store, rank, world_size = next(dist.distributed_c10d.rendezvous('env://', timeout=limit))
        store = dist.PrefixStore(agree_on_name(store, rank, world_size, timeout), store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size,
                                timeout=limit, device_id=device_id)
    except RuntimeError as error:
        reason = str(error).splitlines()[0][:150]
        raise RunError(f'the ranks did not meet over {backend} ({reason}); check that all were '
                       f'started, with the same address and port') from None
    return backend


def agree_on_name(store: dist.Store, rank: int, world_size: int, timeout: float) -> str:
    """A name for this start of the ranks, the same for all of them, and new at each start.

    torchrun may keep its store over restarts, with the addresses of ranks that died. Its restart
    count does not tell the starts apart: if one machine fails and another only follows, only one
    counts. So rank 0 invents the name. Each other rank leaves an id under its number, and waits for
    the name under that id. Rank 0 answers every id that it finds, those of dead ranks too, until
    all living ones have come.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        answer_ranks(store, own, world_size, timeout)
        return own

    store.set(f'rank {rank}', own)
    name = store.get(f'answer to {own}').decode()
    store.add(f'answers to {name}', 1)
    return name


def answer_ranks(store, name, world_size, timeout):
    """Give the other ranks the name that rank 0 invented, until all of them have it."""
    keys = [f'rank {i}' for i in range(1, world_size)]
    answered = set()
    deadline = time.monotonic() + timeout

    while store.add(f'answers to {name}', 0) < world_size - 1:
        if time.monotonic() > deadline:
            raise RuntimeError(f'after {timeout} seconds some ranks were missing')
        for other in store.multi_get(keys):
            if other not in answered:
                store.set(f'answer to {other.decode()}', name)
                answered.add(other)
        time.sleep(0.02)
