"""Choices of device, precision and compiler, and what the machine can do."""

import itertools
import math

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
def test_a_missing_gpu_is_refused_and_auto_does_without():
    words = 'device=cuda: this PyTorch finds no CUDA GPU; try --device=auto'
    with pytest.raises(UserError, match=words):
        devices.choose_device('cuda')

    if not torch.backends.mps.is_available():
        words = 'device=mps: this machine has no Metal GPU; try --device=auto'
        with pytest.raises(UserError, match=words):
            devices.choose_device('mps')
        assert devices.choose_device('auto') == (CPU, 'no GPU found')


def test_each_rank_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda: 'a GPU')
    monkeypatch.setattr(torch.cuda, 'set_device', chosen.append)

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
    # other devices with similar names
    ('NVIDIA A10G', None, None),
    ('NVIDIA L40', None, None),
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
