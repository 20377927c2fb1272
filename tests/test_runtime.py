import os
import signal

import pytest
import torch

import runtime


@pytest.mark.parametrize('arguments, words', [
    (dict(device='gpu'), "device='gpu' is unknown"), (dict(device='cuda:x'), 'is unknown'), (dict(dtype='half'), "dtype='half' is unknown"),
    (dict(compile='yes'), "compile='yes'")])
def test_an_unknown_choice_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        runtime.start(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason='this machine has the GPU that the test does without')
def test_a_missing_gpu_is_refused_and_auto_does_without():
    with pytest.raises(ValueError, match='no CUDA GPU; try --device=auto'):
        runtime.start(device='cuda')
    if not torch.backends.mps.is_available():
        rt = runtime.start(compile='auto')
        assert (rt.device.type, rt.dtype, rt.compile) == ('cpu', 'float32', False)
        assert 'no GPU found' in rt.summary


def test_bfloat16_is_honoured_on_a_cpu():
    rt = runtime.start(device='cpu', dtype='bfloat16')
    with rt.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert not rt.scaler().is_enabled()
    assert runtime.start(device='cpu', dtype='float16').scaler().is_enabled()


def test_a_broken_compiler_means_eager_or_a_reason(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError('no C compiler\nwas found')
    monkeypatch.setattr(torch, 'compile', broken)
    chosen, why = runtime.choose_compile('auto', torch.device('cuda', 0))
    assert chosen is False and 'no C compiler was found' in why
    with pytest.raises(ValueError, match='--compile=False'):
        runtime.choose_compile(True, torch.device('cpu'))


def test_streams_of_random_numbers_are_independent_and_repeat():
    rt = runtime.start(device='cpu', seed=5)
    drawn = {}
    for purpose in [('weights',), ('dropout', 0, 0), ('dropout', 0, 1), ('dropout', 1, 0), ('dropout', 10)]:
        rt.seed_for(*purpose)
        drawn[purpose] = tuple(torch.rand(3).tolist())
    assert len(set(drawn.values())) == len(drawn)
    rt.seed_for('dropout', 0, 1)
    assert tuple(torch.rand(3).tolist()) == drawn['dropout', 0, 1]


@pytest.mark.parametrize('name, half, single', [
    ('NVIDIA A100-SXM4-80GB', 312, 156), ('NVIDIA H100 80GB HBM3', 989.4, 494.7), ('NVIDIA H100 PCIe', 756, 378),
    ('NVIDIA H200', 989.4, 494.7), ('Tesla T4', 65, 8.1), ('Tesla V100-SXM2-16GB', 125, 15.7), ('NVIDIA A10', 125, 62.5),
    ('NVIDIA A10G', None, None), ('NVIDIA L4', 121, 60), ('NVIDIA L40', None, None), ('NVIDIA A1000', None, None)])
def test_peaks_are_the_data_sheets_or_unknown(monkeypatch, name, half, single):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    rt = runtime.start(device='cpu')
    rt.device = torch.device('cuda', 0)
    for rt.dtype, tera in (('bfloat16', half), ('float32', single)):
        assert rt.peak_flops() == (tera and pytest.approx(tera * 1e12))


def test_the_measured_peak_is_one_that_a_matmul_reaches():
    import time
    peak = runtime.start(device='cpu').peak_flops()
    a = torch.rand(512, 512)
    rates = []
    for _ in range(20):
        began = time.perf_counter()
        a @ a
        rates.append(2 * 512 ** 3 / (time.perf_counter() - began))
    assert 0.2 < max(rates) / peak < 5                          # a check of units, not of speed


@pytest.mark.skipif(not hasattr(signal, 'SIGUSR1'), reason='this system has no SIGUSR1')
def test_the_first_signal_is_noted_and_kills_nothing():
    before = {number: signal.getsignal(number) for number in runtime.SIGNALS}
    try:
        rt = runtime.start(device='cpu')
        rt.catch_signals()
        assert rt.signal_from(rt.signal_flags().tolist()) == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert rt.signal_from(rt.signal_flags().tolist()) == rt.signal_anywhere() == signal.SIGUSR1
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def share(accumulation, batch, ranks):
    rt = runtime.start(device='cpu')
    rt.world = ranks
    return rt.share_of_batch(accumulation, batch)


@pytest.mark.parametrize('accumulation, batch, ranks, expected', [
    (40, 12, 1, (40, 12)), (40, 12, 8, (5, 12)), (1, 64, 2, (1, 32)), (5, 12, 2, (3, 10)), (1, 64, 64, (1, 1))])
def test_each_rank_takes_an_equal_share(accumulation, batch, ranks, expected):
    micros, size = share(accumulation, batch, ranks)
    assert (micros, size) == expected and micros * size * ranks == accumulation * batch and size <= batch


@pytest.mark.parametrize('accumulation, batch, ranks', [(1, 12, 5), (3, 1, 2), (7, 3, 4)])
def test_what_does_not_divide_is_refused_with_settings_that_do(accumulation, batch, ranks):
    with pytest.raises(ValueError) as error:
        share(accumulation, batch, ranks)
    share(int(str(error.value).split('=')[-1]), batch, ranks)
