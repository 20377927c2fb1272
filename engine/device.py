"""The device of a run: which one, its precision, its compiler, and the most that it can do."""

import hashlib
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

from engine.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
PYTORCH = tuple(int(n) for n in re.findall(r'\d+', torch.__version__)[:3])      # (2, 13, 0)

# Dense tensor-core TFLOP/s from NVIDIA's data sheets: (bfloat16 and float16, float32 as TF32).
# Volta and Turing have no TF32, so their second number is plain float32. The pattern matches the
# device's name, and the first match counts.
PEAK_TFLOPS = {
    r'B200': (2250, 1125),
    r'H200 NVL': (835.5, 417.8),
    r'G?H200': (989.4, 494.7),
    r'H100 PCIe': (756, 378),
    r'H100 NVL': (835.5, 417.8),
    r'H100': (989.4, 494.7),
    r'A100': (312, 156),
    r'A40': (149.7, 74.8),
    r'A10': (125, 62.5),
    r'L40S': (362, 183),
    r'L4': (121, 60),
    r'RTX 4090': (165.2, 82.6),
    r'RTX 3090': (71, 35.6),
    r'V100-SXM2': (125, 15.7),
    r'V100-PCIE': (112, 14),
    r'T4': (65, 8.1),
}


# Choices: each raises UserError where this machine cannot do what was asked for

class Choice(NamedTuple):
    """What was chosen for a setting, and why. The reason is None where a person chose."""

    value: Any
    reason: str | None = None


def choose_device(device: str, local_rank: int = 0) -> Choice:
    """The torch.device for 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'.

    Ranks take the GPU of their local_rank. The current device of CUDA is set to it.
    """
    reason = None
    if device == 'auto':
        device, reason = find_device()

    match = re.fullmatch(r'(cuda|cpu|mps)(?::(\d{1,4}))?', device)
    if not match:
        raise UserError(f"device={device!r} is unknown; try 'auto', 'cuda', 'cuda:1', 'mps' or "
                        f"'cpu'")
    kind, index = match.groups()
    if kind == 'mps':
        check_mps()
    if kind != 'cuda':
        return Choice(torch.device(kind), reason)

    # Which GPU
    if not torch.cuda.is_available():
        raise UserError(f'device={device}: this PyTorch finds no CUDA GPU; try --device=auto')
    index = int(index or local_rank)
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f'local rank {local_rank} would use GPU {index}, and this machine has '
                        f'{count}; try --nproc_per_node={count}')
    torch.cuda.set_device(index)
    return Choice(torch.device('cuda', index), reason)


def find_device():
    """The Choice of 'cuda', 'mps' or 'cpu' where the device is 'auto'."""
    if torch.cuda.is_available():
        return Choice('cuda', torch.cuda.get_device_name())
    if torch.backends.mps.is_available() and PYTORCH >= (2, 12):
        return Choice('mps', 'no CUDA')
    return Choice('cpu', 'no GPU found')


def check_mps():
    """UserError where a Mac's GPU is missing, or PyTorch computes wrongly on it."""
    if not torch.backends.mps.is_available():
        raise UserError('device=mps: this machine has no Metal GPU; try --device=auto')

    if PYTORCH < (2, 12):               # pytorch#181133
        raise UserError("device=mps: PyTorch below 2.12 computes attention wrongly on a Mac's GPU; "
                        'install a later one, or try --device=cpu')


def choose_dtype(dtype: str, device: torch.device) -> Choice:
    """The name of the autocast precision for 'auto' or a name in DTYPES."""
    if dtype == 'auto':
        return find_dtype(device)

    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; try 'auto', {', '.join(map(repr, DTYPES))}")

    if dtype == 'bfloat16' and device.type == 'cuda':
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            raise UserError(f'dtype=bfloat16 needs capability 8.0, and this GPU has '
                            f'{major}.{minor}; try --dtype=float16')

    if dtype != 'float32' and device.type == 'mps' and PYTORCH <= (2, 12, 1):   # pytorch#195910
        raise UserError(f'dtype={dtype}: PyTorch up to 2.12.1 lets attention see the future in '
                        f"this precision on a Mac's GPU; install a later one, or try "
                        f'--dtype=float32')
    return Choice(dtype)


def find_dtype(device):
    """The Choice of a precision where it is 'auto'."""
    if device.type == 'cuda':
        major, minor = torch.cuda.get_device_capability(device)
        if major >= 8:
            return Choice('bfloat16', f'capability {major}.{minor}')
        return Choice('float16', f'capability {major}.{minor} has no bfloat16')

    reason = f'default on {device.type}'
    if device.type == 'cpu' and cpu_multiplies_bfloat16():
        reason += '; this CPU has fast --dtype=bfloat16'
    return Choice('float32', reason)


def cpu_multiplies_bfloat16() -> bool:
    """True where the CPU has instructions for bfloat16 products.

    Training is then about 2.5 times as fast.
    """
    for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'):
        is_supported = getattr(torch.cpu, name, None)       # not in every version of PyTorch
        if is_supported and is_supported():
            return True
    return False


def choose_compile(compile: bool | str, device: torch.device) -> Choice:
    """Whether torch.compile is used, for 'auto', True or False.

    With 'auto', a compiler that does not work means eager mode.
    """
    if compile not in ('auto', True, False):
        raise UserError(f"compile={compile!r} should be True, False or 'auto'")

    # What needs no trial
    if compile is False:
        return Choice(False)
    if compile == 'auto' and device.type != 'cuda':
        return Choice(False, f'eager starts sooner on {device.type}')

    problem = try_compiler(device)
    if problem and compile is True:
        raise UserError(f'compile=True: no working compiler here ({problem}); try '
                        f'--compile=False')
    if problem:
        return Choice(False, f'no working compiler here: {problem}')
    if compile is True:
        return Choice(True)
    return Choice(True, 'a GPU')


def try_compiler(device):
    """Compile a small function. Returns None, or in a line why that failed."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return None
    except Exception as error:          # Triton, a C compiler or Python support may be missing
        return ' '.join(str(error).split())[:120] or type(error).__name__


# Precision, modes and randomness

def autocast(device: torch.device, dtype: str) -> AbstractContextManager:
    """The context in which forward passes run in precision `dtype`."""
    if dtype == 'float32':
        return nullcontext()
    return torch.autocast(device.type, DTYPES[dtype])


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """The model is in evaluation mode while the block runs, and then as it was before."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def grad_scaler(device: torch.device, dtype: str) -> torch.amp.GradScaler:
    """A GradScaler, which is enabled for float16 only.

    Without it small gradients in float16 would become zero.
    """
    if dtype == 'float16' and device.type == 'mps':
        raise UserError("dtype=float16: a Mac's fused AdamW steps even where gradients overflowed; "
                        'try --dtype=bfloat16 or float32')
    return torch.amp.GradScaler(device.type, enabled=dtype == 'float16')


def derive_seed(*parts: Any) -> int:
    """A 63-bit seed that depends on every part, so that one seed gives independent streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


# Results without waiting

def is_asynchronous(device: torch.device) -> bool:
    """True where the host runs ahead of the device, so that reading a result waits."""
    return device.type != 'cpu'


def read_async(tensor: torch.Tensor) -> Callable[[], list]:
    """Start copying `tensor` to the host. Returns a function that waits and gives it as a list."""
    if tensor.device.type != 'cuda':
        return tensor.tolist

    # A copy runs in the background only into pinned memory.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read():
        copied.synchronize()
        return host.tolist()
    return read


# What the machine can do

def peak_flops(device: torch.device, dtype: str, budget: float = 0.05) -> float | None:
    """Operations per second of this device in this precision, or None where nothing is known.

    For a known GPU it is the data sheet's. For a CPU it is measured, in about `budget` seconds;
    take the largest of several calls, as a busy CPU shows less.
    """
    if device.type == 'cuda':
        return data_sheet_flops(torch.cuda.get_device_name(device), dtype)
    if device.type == 'cpu':
        return measure_matmul(DTYPES[dtype], budget)
    return None


def data_sheet_flops(name, dtype):
    """Operations per second of the GPU of this name, or None where PEAK_TFLOPS lacks it."""
    if 'MIG' in name:                   # a slice of a GPU
        return None

    for pattern, (half, single) in PEAK_TFLOPS.items():
        # The slower variants of a name are other devices.
        if not re.search(rf'\b{pattern}\b(?! (?:Laptop|D|Ti|SUPER)\b)', name):
            continue

        if dtype == 'float32':
            return single * 1e12
        return half * 1e12
    return None


def measure_matmul(dtype, budget):
    """Operations per second of a square matrix product on the CPU.

    The product is repeated for about `budget` seconds, and the fastest one counts.
    """
    n = 256
    if dtype == torch.float32 or dtype == torch.bfloat16 and cpu_multiplies_bfloat16():
        n = 1024        # without instructions for the precision that product can take 5 s

    a = torch.ones(n, n, dtype=dtype)
    a[:64, :64] @ a[:64, :64]           # starts the threads

    seconds = []
    while not seconds or sum(seconds) < budget:
        seconds.append(measure_seconds(lambda: a @ a))
    return 2 * n ** 3 / min(seconds)


def memory_bandwidth(device: torch.device) -> float:
    """Bytes per second that the device reads, measured on a sum too large for its caches."""
    size = 2 ** 29                      # 2 GiB take a GPU half a millisecond
    if device.type == 'cpu':
        size = 2 ** 26                  # 256 MiB
    numbers = torch.ones(size, device=device)

    seconds = [measure_seconds(lambda: numbers.sum().item()) for _ in range(6)]
    return numbers.nbytes / min(seconds)


def measure_seconds(function):
    """The seconds that a call of `function` takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def peak_memory(device: torch.device) -> float:
    """The most bytes in use so far, nan where that is unknown.

    On a GPU it is what PyTorch allocated, on a CPU what is resident in the whole process.
    """
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory()

    try:
        import resource
    except ImportError:                 # Windows has none
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == 'darwin':        # counts bytes, and Linux KiB
        return peak
    return peak * 1024
