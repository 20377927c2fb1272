"""Where a script runs: device, precision, compiler, seeds, ranks, signals.

`start()` yields one small Runtime; a single process is one rank and runs the same code.
"""

import hashlib
import math
import os
import re
import signal
import sys
import time
import traceback
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1') if hasattr(signal, name)]

# Dense tensor-core TFLOP/s of NVIDIA's data sheets: (bfloat16 and float16, float32 as TF32).
# Volta and Turing have no TF32, theirs is plain float32. Matched against the device's name.
PEAKS = {r'B200': (2250, 1125), r'H200 NVL': (835.5, 417.8), r'G?H200': (989.4, 494.7),
         r'H100 PCIe': (756, 378), r'H100 NVL': (835.5, 417.8), r'H100': (989.4, 494.7),
         r'A100': (312, 156), r'A40': (149.7, 74.8), r'A10': (125, 62.5), r'L40S': (362, 183),
         r'L4': (121, 60), r'RTX 4090': (165.2, 82.6), r'RTX 3090': (71, 35.6),
         r'V100-SXM2': (125, 15.7), r'V100-PCIE': (112, 14), r'T4': (65, 8.1)}


def start(device='auto', dtype='auto', compile=False, backend='auto', seed=0, timeout=600):
    """Choose what is 'auto', refuse what this machine lacks, join torchrun's other ranks.

    timeout: seconds that a rank waits for another before it gives up.
    Raises ValueError for a value that is unknown or that cannot be had here.
    """
    world = int(os.environ.get('WORLD_SIZE', 1))
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    if backend not in ('auto', 'nccl', 'gloo'):
        raise ValueError(f"backend={backend!r} is unknown; try 'auto', 'nccl' or 'gloo'")
    if world > 1 and (device == 'mps' or ':' in device):
        raise ValueError(f'device={device} is one device, and {world} ranks take one each; try --device=auto')
    if world > 1 and device == 'auto' and not torch.cuda.is_available():
        device = 'cpu'                                  # gloo does not reach a Mac's GPU
    device, why_device = choose_device(device, local_rank)
    dtype, why_dtype = choose_dtype(dtype, device)
    compile, why_compile = choose_compile(compile, device)
    if world > 1:
        backend = join(backend, device, timeout)
    if device.type == 'cuda':
        torch.set_float32_matmul_precision('high')      # TF32 where float32 is multiplied
    summary = (f'device {device} ({why_device}), dtype {dtype} ({why_dtype}), '
               f'{"compiled" if compile else "not compiled"} ({why_compile})'
               + (f', {world} ranks over {backend}' if world > 1 else ''))
    return Runtime(device, dtype, compile, world, int(os.environ.get('RANK', 0)), local_rank,
                   seed, summary)


class Runtime:
    """device: torch.device. dtype: name of the autocast precision. rank, world: which of how
    many processes. summary: one line that says what was chosen and why."""

    def __init__(self, device, dtype, compile, world, rank, local_rank, seed, summary):
        self.device, self.dtype, self.compile = device, dtype, compile
        self.world, self.rank, self.local_rank = world, rank, local_rank
        self.main = rank == 0
        self.seed, self.summary = seed, summary
        self.received = 0                               # number of the first signal, once it came
        self.fastest = 0.0                              # matmul operations per second seen on a CPU

    # Precision and wrapping

    def autocast(self):
        if self.dtype == 'float32':
            return nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def scaler(self):
        """A GradScaler that does nothing but for float16, whose small gradients vanish without."""
        if self.dtype == 'float16' and self.device.type == 'mps':
            raise ValueError("dtype=float16: a Mac's fused AdamW steps even where gradients overflowed; "
                             'try --dtype=bfloat16 or float32')
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == 'float16')

    def wrap(self, model):
        """The model as the loop calls it: compiled, and averaging gradients over the ranks."""
        if self.compile:
            model = torch.compile(model)
        if self.world > 1:
            devices = [self.device.index] if self.device.type == 'cuda' else None
            model = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices)
        return model

    def without_sync(self, model, skip):
        """Context in which a wrapped model keeps gradients to itself, if `skip`."""
        return model.no_sync() if skip and self.world > 1 else nullcontext()

    # Randomness

    def seed_for(self, *purpose):
        """Seed the global generators as a pure function of the run's seed and `purpose`."""
        torch.manual_seed(derive_seed(self.seed, *purpose))

    # Ranks

    def share_of_batch(self, accumulation, batch_size):
        """(micro-batches, sequences in each) of one rank: an equal share of accumulation x batch_size
        sequences, in micro-batches of at most batch_size."""
        total = accumulation * batch_size
        micros = math.ceil(total / self.world / batch_size)
        if total % (self.world * micros):
            nearest = math.ceil(accumulation / self.world) * self.world
            raise ValueError(f'{accumulation} x {batch_size} sequences do not divide over {self.world} ranks in '
                             f'equal micro-batches; try --gradient_accumulation_steps={nearest}')
        return micros, total // self.world // micros

    def sum(self, tensor):
        """`tensor`, summed over the ranks in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """Every rank's `value`, in order of rank."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    @contextmanager
    def together(self):
        """A mistake that any rank finds in this block ends all of them, told once."""
        found = None
        try:
            yield
        except ValueError as error:
            if self.world == 1:
                raise
            found = str(error)
        first = next((text for text in self.gather(found) if text), None)
        if first:
            raise ValueError(first)

    def check_same(self, values):
        """ValueError, on every rank, unless all ranks have the same {name: value}."""
        everyone = self.gather(values)
        for name in values:
            found = [other[name] for other in everyone]
            if any(value != found[0] for value in found):
                raise ValueError(f'the ranks differ in {name}: {", ".join(map(str, found))}')

    def say(self, line):
        if self.main:
            print(line, flush=True)

    def part(self):
        """Wait for the other ranks before ending, so that one which fails in its last save fails them all."""
        if self.world > 1:
            dist.barrier()

    # Signals

    def catch_signals(self, but=None):
        """Note SIGTERM, SIGINT and SIGUSR1 in `received` instead of dying of them."""
        def note(number, frame):
            self.received = self.received or number
        for number in SIGNALS:
            if number != but:
                signal.signal(number, note)

    def signal_flags(self):
        """(len(SIGNALS),) float32 on the device: 1 for the signal that this rank received."""
        if self.received:
            return torch.tensor([float(self.received == number) for number in SIGNALS], device=self.device)
        return torch.zeros(len(SIGNALS), device=self.device)    # made there: a copy would wait for the device

    def signal_anywhere(self):
        """The number of a signal that reached any rank, or 0; waits for all ranks."""
        return self.signal_from(self.sum(self.signal_flags()).tolist()) if self.world > 1 else self.received

    def signal_from(self, flags):
        """The signal's number in flags summed over ranks, or 0."""
        return next((int(number) for number, flag in zip(SIGNALS, flags) if flag), 0)

    # Time

    @property
    def asynchronous(self):
        """True where the host runs ahead of the device, so that reading a result waits."""
        return self.device.type != 'cpu'

    def read_later(self, tensor):
        """A function that returns `tensor` as a list. The copy starts now, the wait is there."""
        if self.device.type != 'cuda':
            return tensor.tolist
        # only into pinned memory does the copy run behind the host's back
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read():
            copied.synchronize()
            return host.tolist()
        return read

    def peak_memory(self):
        """Bytes: allocated by PyTorch on a GPU, resident in the whole process on a CPU."""
        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        if self.device.type == 'mps':
            return torch.mps.driver_allocated_memory()
        try:
            import resource
        except ImportError:                             # Windows has none
            return math.nan
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

    def peak_flops(self, look=0.05):
        """Operations per second that this device can do in this precision: a data sheet's for a known
        GPU; on a CPU the best seen so far, in `look` seconds a call, as a busy one shows less; else None."""
        if self.device.type == 'cuda':
            name = torch.cuda.get_device_name(self.device)
            for pattern, (half, single) in PEAKS.items():
                # a part of a GPU, and its slower namesakes, are other devices
                if re.search(rf'\b{pattern}\b(?! (?:Laptop|D|Ti|SUPER)\b)', name) and 'MIG' not in name:
                    return (single if self.dtype == 'float32' else half) * 1e12
        if self.device.type == 'cpu':
            self.fastest = max(self.fastest, measure_matmul(DTYPES[self.dtype], look))
            return self.fastest
        return None

    def memory_rate(self, device=None):
        """Bytes per second that this or another device reads, measured on a sum too large for its caches."""
        device = torch.device(device or self.device)
        size = 2 ** (26 if device.type == 'cpu' else 29)        # 256 MiB; 2 GiB take a GPU half a millisecond
        numbers = torch.ones(size, device=device)
        seconds = []
        for _ in range(6):
            began = time.perf_counter()
            numbers.sum().item()
            seconds.append(time.perf_counter() - began)
        return numbers.nbytes / min(seconds)


@contextmanager
def parting():
    """End a rank at once, without the interpreter's clean-up, in which PyTorch 2.13 can wait for ever:
    dropping a DDP model joins gloo's thread, while that thread waits for the lock that Python holds."""
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
        with suppress(OSError):
            sys.stdout.flush()
        os._exit(code or 0)


@contextmanager
def one_voice():
    """Of several ranks that end because something failed on one, the first alone tells why: the
    others only miss it, and end quietly. What PyTorch says of a lost rank becomes one line."""
    try:
        yield
    except (RuntimeError, OSError, MemoryError) as error:
        if not dist.is_initialized():
            raise
        try:
            # torchrun holds this store, which outlives the ranks, and may outlive a restart
            key = f'ranks that failed, start {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}'
            first = dist.distributed_c10d._get_default_store().add(key, 1) == 1
        except RuntimeError:                            # without torchrun it went with rank 0
            first = True
        if not first:
            raise SystemExit(1) from None
        text = str(error)
        lost = isinstance(error, dist.DistError) or re.search(r'gloo/|\bNCCL\b|ProcessGroup|Gloo', text)
        if lost and not isinstance(error, OSError):
            how = 'did not answer within --rank_timeout' if re.search('time.?d? ?out', text, re.IGNORECASE) else 'ended'
            raise RuntimeError(f'another rank {how}, so this one stops; what is saved is whole, '
                               f'go on with --init_from=auto') from None
        raise


def derive_seed(*parts):
    """A seed of 63 bits that depends on every part: independent streams from one seed."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


def measure_matmul(dtype, look, n=1024):
    """Operations per second of an (n, n) by (n, n) product on the CPU, the best within `look` seconds."""
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    a @ b                                               # starts the threads
    seconds = []
    while len(seconds) < 3 or sum(seconds) < look:
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


# Choices: each returns what was chosen and the reason

def choose_device(wanted, local_rank):
    if wanted == 'auto':
        if torch.cuda.is_available():
            wanted, why = 'cuda', torch.cuda.get_device_name()
        elif torch.backends.mps.is_available():
            wanted, why = 'mps', 'no CUDA'
        else:
            wanted, why = 'cpu', 'no GPU found'
    else:
        why = 'as given'
    match = re.fullmatch(r'(cuda|cpu|mps)(?::(\d+))?', wanted)
    if not match:
        raise ValueError(f"device={wanted!r} is unknown; try 'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'")
    kind, index = match.groups()
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise ValueError('device=mps: this machine has no Metal GPU; try --device=auto')
    if kind != 'cuda':
        return torch.device(kind), why
    if not torch.cuda.is_available():
        raise ValueError(f'device={wanted}: this PyTorch finds no CUDA GPU; try --device=auto')
    index, count = int(index or local_rank), torch.cuda.device_count()
    if index >= count:
        raise ValueError(f'rank {local_rank} of this machine would use GPU {index}, but it has {count}; '
                         f'try --nproc_per_node={count}')
    torch.cuda.set_device(index)
    return torch.device('cuda', index), why


def choose_dtype(wanted, device):
    capability = torch.cuda.get_device_capability(device) if device.type == 'cuda' else None
    if wanted == 'auto':
        if not capability:
            return 'float32', f'the default on {device.type}'
        if capability >= (8, 0):
            return 'bfloat16', f'capability {capability[0]}.{capability[1]}'
        return 'float16', f'capability {capability[0]}.{capability[1]} has no bfloat16'
    if wanted not in DTYPES:
        raise ValueError(f"dtype={wanted!r} is unknown; try 'auto', {', '.join(map(repr, DTYPES))}")
    if wanted == 'bfloat16' and capability and capability < (8, 0):
        raise ValueError(f'dtype=bfloat16: this GPU has capability {capability[0]}.{capability[1]}, '
                         f'bfloat16 takes 8.0; try --dtype=float16')
    return wanted, 'as given'


def choose_compile(wanted, device):
    if wanted not in ('auto', True, False):
        raise ValueError(f"compile={wanted!r} should be True, False or 'auto'")
    if wanted is False:
        return False, 'as given'
    if wanted == 'auto' and device.type != 'cuda':
        return False, f'eager starts sooner on {device.type}'
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True, 'as given' if wanted is True else 'a GPU'
    except Exception as error:          # Triton, a C compiler or Python support may be missing
        reason = ' '.join(str(error).split())[:120] or type(error).__name__
        if wanted is True:
            raise ValueError(f'compile=True: no working compiler here ({reason}); '
                             f'try --compile=False') from None
        return False, f'no working compiler here: {reason}'


def join(wanted, device, timeout):
    """Meet torchrun's other ranks; the backend's name."""
    backend = wanted
    if wanted == 'auto':
        backend = 'nccl' if device.type == 'cuda' and dist.is_nccl_available() else 'gloo'
    if backend == 'nccl' and (device.type != 'cuda' or not dist.is_nccl_available()):
        raise ValueError(f'backend=nccl moves data between NVIDIA GPUs, and this runs on '
                         f'{device.type}; try --backend=gloo')
    limit = timedelta(seconds=timeout)
    try:
        store, rank, world = next(dist.distributed_c10d.rendezvous('env://', timeout=limit))
        if os.environ.get('GROUP_WORLD_SIZE', '1') == '1':
            # torchrun keeps one store over its restarts (2.13), with the addresses of the ranks that died.
            # On several machines this number can differ between them, and cannot tell the starts apart.
            store = dist.PrefixStore(f'start {os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)}', store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit,
                                device_id=device if backend == 'nccl' else None)
    except RuntimeError as error:
        raise RuntimeError(f'the ranks did not meet over {backend} ({str(error).splitlines()[0][:150]}); '
                           f'check that all were started, with the same address and port') from None
    return backend
