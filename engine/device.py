"""The device of a run: which one, its precision, its compiler, and the most that it can do."""

import hashlib
import math
import re
import sys
import time
from contextlib import nullcontext

import torch

from engine.errors import UserError

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}

# Dense tensor-core TFLOP/s from NVIDIA's data sheets: (bfloat16 and float16, float32 as TF32).
# Volta and Turing have no TF32, so their second number is plain float32. The pattern matches the device's name.
PEAK_TFLOPS = {r'B200': (2250, 1125), r'H200 NVL': (835.5, 417.8), r'G?H200': (989.4, 494.7),
               r'H100 PCIe': (756, 378), r'H100 NVL': (835.5, 417.8), r'H100': (989.4, 494.7),
               r'A100': (312, 156), r'A40': (149.7, 74.8), r'A10': (125, 62.5), r'L40S': (362, 183),
               r'L4': (121, 60), r'RTX 4090': (165.2, 82.6), r'RTX 3090': (71, 35.6),
               r'V100-SXM2': (125, 15.7), r'V100-PCIE': (112, 14), r'T4': (65, 8.1)}


PYTORCH = tuple(int(n) for n in re.findall(r'\d+', torch.__version__)[:3])      # (2, 13, 0)


# Choices. Each returns the value and, where it was 'auto', the reason for it. UserError where this machine
# cannot do what was asked for.

def choose_device(device, local_rank=0):
    """'auto', 'cpu', 'mps', 'cuda' or 'cuda:N' to a torch.device. Ranks take the GPU of their local_rank."""
    reason = ''
    if device == 'auto':
        if torch.cuda.is_available():
            device, reason = 'cuda', torch.cuda.get_device_name()
        elif torch.backends.mps.is_available() and PYTORCH >= (2, 12):
            device, reason = 'mps', 'no CUDA'
        else:
            device, reason = 'cpu', 'no GPU found'
    match = re.fullmatch(r'(cuda|cpu|mps)(?::(\d{1,4}))?', device)
    if not match:
        raise UserError(f"device={device!r} is unknown; try 'auto', 'cuda', 'cuda:1', 'mps' or 'cpu'")
    kind, index = match.groups()
    if kind == 'mps' and not torch.backends.mps.is_available():
        raise UserError('device=mps: this machine has no Metal GPU; try --device=auto')
    if kind == 'mps' and PYTORCH < (2, 12):             # pytorch#181133
        raise UserError("device=mps: PyTorch below 2.12 computes attention wrongly on a Mac's GPU; "
                        'install a later one, or try --device=cpu')
    if kind != 'cuda':
        return torch.device(kind), reason
    if not torch.cuda.is_available():
        raise UserError(f'device={device}: this PyTorch finds no CUDA GPU; try --device=auto')
    index, count = int(index or local_rank), torch.cuda.device_count()
    if index >= count:
        raise UserError(f'local rank {local_rank} would use GPU {index}, and this machine has {count}; '
                        f'try --nproc_per_node={count}')
    torch.cuda.set_device(index)
    return torch.device('cuda', index), reason


def choose_dtype(dtype, device):
    """'auto' or a name in DTYPES to the name of the autocast precision."""
    capability = torch.cuda.get_device_capability(device) if device.type == 'cuda' else None
    if dtype == 'auto':
        if capability:
            number = '.'.join(map(str, capability))
            return (('bfloat16', f'capability {number}') if capability >= (8, 0) else
                    ('float16', f'capability {number} has no bfloat16'))
        faster = device.type == 'cpu' and cpu_multiplies_bfloat16()
        return 'float32', f'default on {device.type}' + ('; this CPU has fast --dtype=bfloat16' if faster else '')
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype!r} is unknown; try 'auto', {', '.join(map(repr, DTYPES))}")
    if dtype == 'bfloat16' and capability and capability < (8, 0):
        raise UserError(f'dtype=bfloat16 needs capability 8.0, and this GPU has '
                        f'{capability[0]}.{capability[1]}; try --dtype=float16')
    if dtype != 'float32' and device.type == 'mps' and PYTORCH <= (2, 12, 1):   # pytorch#195910
        raise UserError(f"dtype={dtype}: PyTorch up to 2.12.1 lets attention see the future in this precision on a "
                        f"Mac's GPU; install a later one, or try --dtype=float32")
    return dtype, ''


def cpu_multiplies_bfloat16():
    """True where the CPU has instructions for bfloat16 products: training is then about 2.5 times as fast."""
    return any(getattr(torch.cpu, name, lambda: False)() for name in ('_is_avx512_bf16_supported', '_is_amx_tile_supported'))


def choose_compile(compile, device):
    """'auto', True or False to whether torch.compile is used. With 'auto', a compiler that does
    not work means eager mode."""
    if compile not in ('auto', True, False):
        raise UserError(f"compile={compile!r} should be True, False or 'auto'")
    if compile is False:
        return False, ''
    if compile == 'auto' and device.type != 'cuda':
        return False, f'eager starts sooner on {device.type}'
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(1, device=device))
        return True, '' if compile is True else 'a GPU'
    except Exception as error:          # Triton, a C compiler or Python support may be missing
        reason = ' '.join(str(error).split())[:120] or type(error).__name__
        if compile is True:
            raise UserError(f'compile=True: no working compiler here ({reason}); try --compile=False') from None
        return False, f'no working compiler here: {reason}'


# Precision and randomness

def autocast(device, dtype):
    """The context in which forward passes run in precision `dtype`."""
    return nullcontext() if dtype == 'float32' else torch.autocast(device.type, DTYPES[dtype])


def grad_scaler(device, dtype):
    """A GradScaler, enabled for float16 only, where small gradients would become zero without it."""
    if dtype == 'float16' and device.type == 'mps':
        raise UserError("dtype=float16: a Mac's fused AdamW steps even where gradients overflowed; "
                        'try --dtype=bfloat16 or float32')
    return torch.amp.GradScaler(device.type, enabled=dtype == 'float16')


def derive_seed(*parts):
    """A 63-bit seed that depends on every part, so that one seed gives independent streams."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, 'little') >> 1


# Results without waiting

def is_asynchronous(device):
    """True where the host runs ahead of the device, so that reading a result waits."""
    return device.type != 'cpu'


def read_async(tensor):
    """Start copying `tensor` to the host. Returns a function that waits and returns it as a list."""
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

def peak_flops(device, dtype, budget=0.05):
    """Operations per second of this device in this precision, or None where nothing is known.

    For a known GPU it is the data sheet's. For a CPU it is measured, in about `budget` seconds; take
    the largest of several calls, as a busy CPU shows less.
    """
    if device.type == 'cuda':
        name = torch.cuda.get_device_name(device)
        for pattern, (half, single) in PEAK_TFLOPS.items():
            # A slice of a GPU (MIG) and the slower variants of a name are other devices.
            if re.search(rf'\b{pattern}\b(?! (?:Laptop|D|Ti|SUPER)\b)', name) and 'MIG' not in name:
                return (single if dtype == 'float32' else half) * 1e12
    return measure_matmul(DTYPES[dtype], budget) if device.type == 'cpu' else None


def measure_matmul(dtype, budget):
    """Operations per second of a square matrix product on the CPU, the best within about `budget` seconds."""
    # Without instructions for this precision a product of 1024 can take 5 s.
    fast = dtype == torch.float32 or dtype == torch.bfloat16 and cpu_multiplies_bfloat16()
    n = 1024 if fast else 256
    a, seconds = torch.ones(n, n, dtype=dtype), []
    a[:64, :64] @ a[:64, :64]                           # starts the threads
    while not seconds or sum(seconds) < budget:
        began = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def memory_bandwidth(device):
    """Bytes per second that the device reads, measured on a sum that is too large for its caches."""
    size = 2 ** (26 if device.type == 'cpu' else 29)    # 256 MiB; 2 GiB take a GPU half a millisecond
    numbers = torch.ones(size, device=device)
    seconds = []
    for _ in range(6):
        began = time.perf_counter()
        numbers.sum().item()
        seconds.append(time.perf_counter() - began)
    return numbers.nbytes / min(seconds)


def peak_memory(device):
    """Bytes: allocated by PyTorch on a GPU, resident in the whole process on a CPU, nan where unknown."""
    if device.type == 'cuda':
        return torch.cuda.max_memory_allocated(device)
    if device.type == 'mps':
        return torch.mps.driver_allocated_memory()
    try:
        import resource
    except ImportError:                                 # Windows has none
        return math.nan
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)
