"""Choices of device, precision and compiler, and what the machine can do."""

import itertools
import math
import os

import pytest
import torch

from engine import device as devices
from engine.errors import UserError

CPU = torch.device('cpu')
GPU = torch.device('cuda', 0)
without_gpu = pytest.mark.skipif(torch.cuda.is_available(),
                                 reason='this machine has the GPU that the test does without')


# Choices

@pytest.mark.parametrize('name', ['gpu', 'cuda:x', 'cuda:-1', '', 'CPU'])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(UserError, match=f"device='{name}' is unknown; try 'auto'"):
        devices.choose_device(name)


@without_gpu
def test_a_missing_gpu_is_refused_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(devices, 'nvidia_driver', lambda: None)
    words = 'device=cuda: this PyTorch finds no CUDA GPU; or try --device=auto'
    with pytest.raises(UserError, match=words):
        devices.choose_device('cuda')

    if not torch.backends.mps.is_available():
        words = 'device=mps: this machine has no Metal GPU; try --device=auto'
        with pytest.raises(UserError, match=words):
            devices.choose_device('mps')
        assert devices.choose_device('auto') == (CPU, 'no GPU found')


def install(build):
    version = torch.__version__.partition('+')[0]
    return (f'pip install torch=={version}+{build} --index-url '
            f'https://download.pytorch.org/whl/{build}')


@without_gpu
@pytest.mark.parametrize('driver, cuda, hidden, words, command', [
    ('570.86.15', '13.0', None, 'driver 570.86.15 is too old.*update it to 580', 'cu126'),
    ('470.57.02', '13.0', None, 'driver 470.57.02 is too old.*update it to 580', None),
    ('470.57.02', '12.6', None, 'driver 470.57.02 is too old.*update it to 525', None),
    ('570.86.15', '12.6', None, r'although the NVIDIA driver .*torch\.cuda\.init', None),
    ('580.65.06', '13.0', None, r'although the NVIDIA driver .*torch\.cuda\.init', None),
    ('580.65.06', '13.0', '', 'CUDA_VISIBLE_DEVICES hides every GPU', None),
    ('580.65.06', None, None, 'built without CUDA', 'cu130'),
    ('535.104.05', None, None, 'built without CUDA', 'cu126'),
])
def test_a_driver_without_a_usable_gpu_gets_its_reason(
        monkeypatch, driver, cuda, hidden, words, command):
    monkeypatch.setattr(devices, 'nvidia_driver', lambda: driver)
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if hidden is not None:
        monkeypatch.setenv('CUDA_VISIBLE_DEVICES', hidden)

    with pytest.raises(UserError, match=words) as refusal:
        devices.choose_device('cuda')
    assert ('pip install' in str(refusal.value)) == bool(command)
    if command:
        assert install(command) in str(refusal.value)
    if not torch.backends.mps.is_available():
        assert '--device=cuda says why' in devices.choose_device('auto').reason


@pytest.mark.skipif(os.name == 'nt', reason='the program is a shell script')
@pytest.mark.parametrize('script, expected', [
    ('echo 570.86.15; echo 570.86.15', '570.86.15'),
    ('echo Failed to initialize NVML; exit 18', None),
])
def test_the_driver_is_the_one_that_nvidia_smi_names(monkeypatch, tmp_path, script, expected):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert devices.nvidia_driver() is None
    program = tmp_path / 'nvidia-smi'
    program.write_text(f'#!/bin/sh\n{script}\n')
    program.chmod(0o755)
    assert devices.nvidia_driver() == expected


CUDA_13 = ['sm_75', 'sm_80', 'sm_86', 'sm_90', 'sm_100', 'sm_120']
CUDA_12 = ['sm_50', 'sm_60', 'sm_70', 'sm_75', 'sm_80', 'sm_86', 'sm_90']


@pytest.mark.parametrize('capability, built_for, advice', [
    ((7, 5), CUDA_13, None),
    ((8, 9), CUDA_13, None),                            # by the code for 8.6
    ((12, 1), CUDA_13, None),
    ((10, 3), CUDA_13, None),
    ((7, 0), CUDA_13, 'cu126'),
    ((6, 1), CUDA_13, 'cu126'),
    ((3, 7), CUDA_13, 'no later PyTorch has it either'),
    ((6, 1), CUDA_12, None),
    ((13, 0), CUDA_13, 'install a later PyTorch'),
    ((12, 0), CUDA_12, 'cu130'),
    ((12, 0), [*CUDA_12, 'compute_90'], None),          # the driver compiles it
    ((9, 4), ['gfx90a', 'gfx942'], None),               # AMD
])
def test_a_gpu_without_code_in_this_pytorch_is_refused(
        monkeypatch, capability, built_for, advice):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 1)
    monkeypatch.setattr(torch.cuda, 'set_device', lambda index: None)
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: built_for)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index: capability)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda index: 'Tesla V100')
    monkeypatch.setattr(torch.version, 'cuda', '12.6' if built_for == CUDA_12 else '13.0')
    if advice is None:
        assert devices.choose_device('cuda').value == GPU
        return

    if advice.startswith('cu'):
        advice = install(advice)
    found = f'Tesla V100 has capability {capability[0]}.{capability[1]}, '
    with pytest.raises(UserError) as refusal:
        devices.choose_device('cuda')
    assert found in str(refusal.value)
    assert advice in str(refusal.value)


def test_a_full_gpu_is_not_a_broken_compiler(monkeypatch):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError('CUDA out of memory')
    monkeypatch.setattr(torch, 'zeros', full)
    with pytest.raises(torch.OutOfMemoryError):
        devices.choose_compile('auto', GPU)


def test_each_rank_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: [])

    second = torch.device('cuda', 1)
    assert devices.choose_device('auto', local_rank=1) == (second, 'a GPU')
    assert devices.choose_device('cuda:1').value == second
    assert chosen == [1, 1]

    words = 'local rank 2 would use GPU 2, and this machine has 2; try --nproc_per_node=2'
    with pytest.raises(UserError, match=words):
        devices.choose_device('cuda', local_rank=2)


@pytest.mark.parametrize('capability, expected', [
    ((9, 0), 'bfloat16'), ((8, 0), 'bfloat16'), ((7, 5), 'float16')])
def test_auto_takes_the_precision_that_the_gpu_has(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: capability)
    assert devices.choose_dtype('auto', GPU).value == expected
    if expected == 'float16':
        with pytest.raises(UserError, match='this GPU has 7.5; try --dtype=float16'):
            devices.choose_dtype('bfloat16', GPU)


def test_auto_is_float32_on_a_cpu_and_an_unknown_precision_is_refused():
    assert devices.choose_dtype('auto', CPU).value == 'float32'
    for name in ('half', 'float8'):
        with pytest.raises(UserError, match=f"dtype='{name}' is unknown; try 'auto', 'float32'"):
            devices.choose_dtype(name, CPU)


def test_a_broken_compiler_means_eager_or_a_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError('no C compiler\nwas found')
    monkeypatch.setattr(torch, 'compile', broken)
    monkeypatch.setattr(torch, 'zeros', lambda n, device: None)     # it would be on the GPU

    chosen, reason = devices.choose_compile('auto', GPU)
    assert chosen is False
    assert 'no C compiler was found' in reason
    assert devices.choose_compile('auto', CPU).value is False
    assert devices.choose_compile(False, GPU) == (False, None)

    with pytest.raises(UserError, match='no C compiler was found.*--compile=False'):
        devices.choose_compile(True, CPU)
    with pytest.raises(UserError, match="compile='maybe' should be True, False or 'auto'"):
        devices.choose_compile('maybe', CPU)


# Precision and randomness

def test_a_named_precision_is_used():
    ones = torch.ones(2, 2)
    with devices.autocast(CPU, 'bfloat16'):
        assert (ones @ ones).dtype == torch.bfloat16
    with devices.autocast(CPU, 'float32'):
        assert (ones @ ones).dtype == torch.float32


def test_only_float16_scales_its_loss():
    enabled = {dtype: devices.grad_scaler(CPU, dtype).is_enabled() for dtype in devices.DTYPES}
    assert enabled == {'float32': False, 'bfloat16': False, 'float16': True}
    with pytest.raises(UserError, match='dtype=float16.*try --dtype=bfloat16'):
        devices.grad_scaler(torch.device('mps'), 'float16')


def test_streams_of_random_numbers_are_independent_and_repeat():
    parts = [
        (5, 'weights'), (5, 'dropout', 0, 0), (5, 'dropout', 0, 1), (5, 'dropout', 1, 0),
        (5, 'dropout', 10), (6, 'dropout', 0, 0), ('5', 'dropout', 0, 0)]
    seeds = [devices.derive_seed(*part) for part in parts]
    assert len(set(seeds)) == len(parts)
    assert all(0 <= seed < 2 ** 63 for seed in seeds)
    assert seeds == [devices.derive_seed(*part) for part in parts]

    # in every version, or runs would change
    assert devices.derive_seed(1337, 'dropout', 3, 1) == 7315786824696823167


def test_a_result_is_read_later():
    assert devices.read_async(torch.tensor([1.5, 2.0]))() == [1.5, 2.0]
    assert not devices.is_asynchronous(CPU)
    assert devices.is_asynchronous(GPU)


# What the machine can do

@pytest.mark.parametrize('name, half, single', [
    ('NVIDIA A100-SXM4-80GB', 312, 156),
    ('NVIDIA H100 80GB HBM3', 989.4, 494.7),
    ('NVIDIA H100 PCIe', 756, 378),
    ('NVIDIA H200', 989.4, 494.7),
    ('NVIDIA GH200 480GB', 989.4, 494.7),
    ('Tesla T4', 65, 8.1),
    ('Tesla V100-SXM2-16GB', 125, 15.7),
    ('NVIDIA A10', 125, 62.5),
    ('NVIDIA L4', 121, 60),
    ('NVIDIA GeForce RTX 4090', 165.2, 82.6),
    ('NVIDIA A10G', 70, 35),
    ('NVIDIA L40', 181, 90.5),
    ('NVIDIA L40S', 362, 183),
    ('NVIDIA H800', 989.4, 494.7),
    ('NVIDIA A800-SXM4-80GB', 312, 156),
    ('NVIDIA H20', 148, 74),
    ('NVIDIA B200', 2250, 1125),
    ('NVIDIA GB200', 2500, 1250),
    ('NVIDIA B300 SXM6 AC', 2250, 1125),
    ('NVIDIA GeForce RTX 5090', 209.5, 104.8),
    # other devices with similar names
    ('NVIDIA GeForce RTX 5090 D', None, None),
    ('NVIDIA A1000', None, None),
    ('NVIDIA GeForce RTX 4090 Laptop GPU', None, None),
    ('NVIDIA A100-SXM4-40GB MIG 1g.5gb', None, None),
])
def test_peaks_are_the_data_sheets_or_unknown(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    for dtype, tera in (('bfloat16', half), ('float16', half), ('float32', single)):
        assert devices.peak_flops(GPU, dtype) == (tera and pytest.approx(tera * 1e12))


@pytest.fixture
def millisecond_clock(monkeypatch):
    """A clock that goes on by 1 ms whenever it is read: rates do not depend on the machine."""
    ticks = itertools.count()
    monkeypatch.setattr(devices.time, 'perf_counter', lambda: next(ticks) / 1000)


def test_the_measured_peak_is_in_operations_per_second(millisecond_clock, monkeypatch):
    """A product of (n, n) matrices has n multiplications and n additions for each number."""
    products = []
    monkeypatch.setattr(torch.Tensor, '__matmul__', lambda a, b: products.append(a.shape))
    peak = devices.peak_flops(CPU, 'float32', budget=0.004)
    n = products[-1][0]
    assert peak == pytest.approx(2 * n ** 3 / 1e-3)
    assert len(products) == 1 + 4                               # the first one starts the threads


def test_the_measured_bandwidth_is_in_bytes_per_second(millisecond_clock):
    assert devices.memory_bandwidth(CPU) == pytest.approx(2 ** 28 / 1e-3)


def test_the_peak_memory_is_in_bytes():
    before = devices.peak_memory(CPU)
    if not math.isnan(before):                                  # Windows has none
        block = torch.ones(2 ** 26)
        assert devices.peak_memory(CPU) >= max(before, block.nbytes)
