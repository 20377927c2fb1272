"""The device of a run: which one, its precision, its compiler, and the most that it can do."""

import hashlib
import math
import os
import re
import shutil
import subprocess
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
# Volta and Turing have no TF32, so their second number is plain float32. A sheet for eight GPUs, or
# for the two of a GB200, is divided by their number, and one with sparsity by two. The pattern
# matches the device's name, and the first match counts.
PEAK_TFLOPS = {
    r'GB[23]00': (2500, 1250),
    r'B[23]00': (2250, 1125),
    r'H200 NVL': (835.5, 417.8),
    r'G?H200': (989.4, 494.7),
    r'H[18]00 PCIe': (756, 378),
    r'H100 NVL': (835.5, 417.8),
    r'H[18]00': (989.4, 494.7),
    r'H20': (148, 74),
    r'A[18]00': (312, 156),
    r'A40': (149.7, 74.8),
    r'A10': (125, 62.5),
    r'A10G': (70, 35),
    r'L40S': (362, 183),
    r'L40': (181, 90.5),
    r'L4': (121, 60),
    r'RTX 5090': (209.5, 104.8),
    r'RTX 4090': (165.2, 82.6),
    r'RTX 3090': (71, 35.6),
    r'V100-SXM2': (125, 15.7),
    r'V100-PCIE': (112, 14),
    r'T4': (65, 8.1),
}

# The oldest NVIDIA driver for each major version of CUDA, by the notes on CUDA's releases.
OLDEST_DRIVER = {12: 525, 13: 580}
# PyTorch 2.11 to 2.13 is also built for CUDA 12.6. Only this build has code for GPUs of capability
# 5.0 to 7.0, such as Pascal and Volta (pytorch#175253).
LEGACY_BUILD = 'cu126'
LEGACY_CUDA = 12
LEGACY_CAPABILITY = (5, 0)


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
        raise UserError(f'device={device}: {why_no_cuda()}; or try --device=auto')
    index = int(index or local_rank)
    count = torch.cuda.device_count()
    if index >= count:
        raise UserError(f'local rank {local_rank} would use GPU {index}, and this machine has '
                        f'{count}; try --nproc_per_node={count}')
    check_capability(index)
    torch.cuda.set_device(index)
    return Choice(torch.device('cuda', index), reason)


def find_device():
    """The Choice of 'cuda', 'mps' or 'cpu' where the device is 'auto'."""
    if torch.cuda.is_available():
        return Choice('cuda', torch.cuda.get_device_name())
    if torch.backends.mps.is_available() and PYTORCH >= (2, 12):
        return Choice('mps', 'no CUDA')
    if nvidia_driver():
        return Choice('cpu', 'PyTorch cannot use the NVIDIA GPU; --device=cuda says why')
    return Choice('cpu', 'no GPU found')


def nvidia_driver() -> str | None:
    """The version of NVIDIA's driver, such as '580.65.06', or None without one."""
    program = shutil.which('nvidia-smi')            # it comes with the driver, on Windows too
    if program is None:
        return None

    command = [program, '--query-gpu=driver_version', '--format=csv,noheader']
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    versions = re.findall(r'^\d+\.[\d.]+', done.stdout, re.MULTILINE)
    return versions[0] if versions else None


def why_no_cuda():
    """Why PyTorch finds no CUDA GPU, and what to do, as the middle of a sentence."""
    driver = nvidia_driver()
    if driver is None or torch.version.hip:
        return 'this PyTorch finds no CUDA GPU'
    if os.environ.get('CUDA_VISIBLE_DEVICES') in ('', '-1'):
        return 'CUDA_VISIBLE_DEVICES hides every GPU; unset it'

    # PyTorch without CUDA
    driver_number = int(driver.partition('.')[0])
    if torch.version.cuda is None:
        build = 'cu130'
        if driver_number < OLDEST_DRIVER[13]:
            build = LEGACY_BUILD
        return f'this PyTorch is built without CUDA; type `{command_to_install(build)}`'

    # a driver that is older than PyTorch's CUDA
    cuda_major = int(torch.version.cuda.partition('.')[0])
    oldest = OLDEST_DRIVER.get(cuda_major, 0)
    if driver_number < oldest:
        reason = (f'the NVIDIA driver {driver} is too old for the CUDA {torch.version.cuda} of '
                  f'this PyTorch; update it to {oldest} or later')
        if cuda_major > LEGACY_CUDA and driver_number >= OLDEST_DRIVER[LEGACY_CUDA]:
            reason += f', or for a GPU before Hopper type `{command_to_install(LEGACY_BUILD)}`'
        return reason

    return (f'this PyTorch finds no CUDA GPU, although the NVIDIA driver {driver} is there; '
            f'`python -c "import torch; torch.cuda.init()"` prints why')


def command_to_install(build):
    """What to type for this version of PyTorch, built for another CUDA, such as 'cu126'."""
    version = torch.__version__.partition('+')[0]
    return (f'pip install torch=={version}+{build} '
            f'--index-url https://download.pytorch.org/whl/{build}')


def check_capability(index):
    """UserError where this PyTorch has no code for the GPU of this index.

    Code for sm_86 runs on GPUs of capability 8.6 and of later ones of the same major version. Code
    for compute_86 is compiled by the driver, for any later GPU.
    """
    names = re.findall(r'\b(sm|compute)_(\d+)(\d)', ' '.join(torch.cuda.get_arch_list()))
    if not names:                       # AMD's GPUs have other names
        return

    capability = torch.cuda.get_device_capability(index)
    built_for = []
    for kind, major, minor in names:
        oldest = (int(major), int(minor))
        built_for.append(oldest)
        if capability >= oldest and (kind == 'compute' or capability[0] == oldest[0]):
            return

    advice = 'install a later PyTorch'
    if torch.version.cuda and torch.version.cuda.startswith(f'{LEGACY_CUDA}.'):
        advice = f'type `{command_to_install("cu130")}`'
    if capability < min(built_for):
        advice = 'no later PyTorch has it either'
        if capability >= LEGACY_CAPABILITY and min(built_for) > (7, 0):
            advice = f'type `{command_to_install(LEGACY_BUILD)}`'
    found = '.'.join(map(str, capability))
    known = ', '.join(f'{major}.{minor}' for major, minor in sorted(set(built_for)))
    raise UserError(f'{torch.cuda.get_device_name(index)} has capability {found}, and this PyTorch '
                    f'{torch.__version__} has code for {known} only; {advice}, or try --device=cpu')


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


def dtype_of_gpu(name: str) -> str:
    """The precision that 'auto' chooses on a GPU that is known by name only."""
    if re.search(r'\b(V100|T4)\b', name):
        return 'float16'
    return 'bfloat16'


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
    number = torch.zeros(1, device=device)      # a full GPU is not the compiler's fault
    try:
        torch.compile(lambda x: x + 1)(number)
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


def data_sheet_flops(name: str, dtype: str) -> float | None:
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
