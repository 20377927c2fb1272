"""What differs on a GPU. Start this file first on a machine that has one:

    python -m pytest tests/test_cuda.py

It takes a few minutes on one GPU, and uses as many as there are. Without CUDA it is skipped.
"""

import gc
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip('this PyTorch finds no CUDA GPU', allow_module_level=True)

from harness import ROOT, torchrun_options

from engine import device as devices
from engine.dataloader.batches import Batch, WeightedBatch, prefetch
from engine.distributed import start_environment
from engine.training import optim, parallel
from engine.training.plan import Step, plan_memory
from engine.training.run import BatchSchedule, Progress, Run
from model import GPT, GPTConfig
from train import train_step

SMALL = dict(block_size=256, vocab_size=4096, n_layer=4, n_head=4, n_embd=256)
MODERN = dict(position='rotary', norm='rmsnorm', activation='relu2', qk_norm=True,
              embedding_norm=True, tied=False, softcap=15.0, bias=False, n_kv_head=2)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason='this machine has one GPU')


def gpt(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**SMALL, **changes}))


def batches(env, config, batch_size=8):
    """The same random batches each time.

    64 of the tokens occur, and one follows another, so that thirty steps have much to learn.
    """
    def batch(i):
        generator = torch.Generator().manual_seed(i)
        starts = torch.randint(64, (batch_size, 1), generator=generator)
        tokens = (starts + 3 * torch.arange(config.block_size + 1)) % 64
        return WeightedBatch(tokens[:, :-1], tokens[:, 1:], weight=1.0)
    return prefetch(batch, ((i,) for i in range(10 ** 6)), env.device)


def forget_models():
    """Free what earlier tests left on the GPU, and count the peak of memory anew."""
    gc.collect()                    # a model may be in a circle of references
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def train(steps, dtype, compile, recompute=False, first_scale=None, device='cuda',
          optimizer='adamw', batch_size=8, **changes):
    """(losses, gradient norms, Run) of a small model."""
    env = start_environment(device, dtype, compile)
    # All models share the limit of compiled variants, and the compiler's trial counts as a graph.
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()

    model = gpt(**changes)
    wrapped = parallel.wrap(model, env, recompute=recompute).train()
    scaler = devices.grad_scaler(env.device, env.dtype)
    if first_scale:
        scaler = torch.amp.GradScaler('cuda', init_scale=first_scale)
    run = Run(
        model=model,
        wrapped_model=wrapped,
        optimizer=optim.build(optimizer, model, 3e-4, 0.1, (0.9, 0.95), 0.01),
        scaler=scaler,
        batch_schedule=BatchSchedule(2, batch_size, model.config.block_size, 1),
        grad_clip=1.0,
        seed=1,
        progress=Progress(),
    )

    source = batches(env, model.config, batch_size)
    numbers = []
    for _ in range(steps):
        numbers.append(train_step(run, source, env))
        run.count_iteration()
    source.close()
    losses = [step['loss'].item() for step in numbers]
    norms = [step['grad_norm'].item() for step in numbers]
    return losses, norms, run


@pytest.mark.parametrize('dtype, tolerance', [
    ('float32', 2e-3), ('bfloat16', 2e-2), ('float16', 1e-2)])
def test_thirty_compiled_steps_have_the_losses_of_eager_ones(dtype, tolerance):
    eager = train(30, dtype, False)[0]
    compiled = train(30, dtype, True)[0]
    assert eager[-1] < 0.9 * eager[0]
    assert compiled == pytest.approx(eager, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_the_modern_shape_trains_compiled_as_eager(optimizer):
    eager = train(30, 'bfloat16', False, optimizer=optimizer, **MODERN)[0]
    compiled = train(30, 'bfloat16', True, optimizer=optimizer, **MODERN)[0]
    assert eager[-1] < 0.9 * eager[0]
    assert compiled == pytest.approx(eager, rel=2e-2)


@pytest.mark.parametrize('optimizer', ['adamw', 'muon'])
def test_float16_skips_a_step_that_overflows_and_goes_on(optimizer):
    """The scale is halved at each overflow, from 2^28 on some 2 to 8 times."""
    scale = 2.0 ** 28
    losses, norms, run = train(20, 'float16', False, first_scale=scale, optimizer=optimizer)
    assert not math.isfinite(norms[0])
    assert math.isfinite(norms[-1])
    assert run.scaler.get_scale() < scale

    # skipped steps moved no weight, and the later ones did
    weights = run.model.state_dict()
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert all(map(math.isfinite, losses))
    first = gpt().state_dict()
    assert not torch.equal(weights['transformer.h.0.mlp.c_fc.weight'].cpu(),
                           first['transformer.h.0.mlp.c_fc.weight'])


def test_training_compiles_to_one_graph():
    train(3, 'bfloat16', True)
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
    assert not torch._dynamo.utils.counters['graph_break']


def test_recomputed_activations_take_less_memory_and_give_the_same_losses():
    peaks = []
    losses = []
    for recompute in (False, True):
        forget_models()
        losses.append(train(5, 'bfloat16', False, recompute=recompute, n_layer=8, dropout=0.1)[0])
        peaks.append(devices.peak_memory(torch.device('cuda')))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert peaks[1] < 0.8 * peaks[0]


@pytest.mark.skipif(torch.cuda.get_device_capability() < (8, 0), reason='no bfloat16')
@pytest.mark.parametrize('compile', [True, False])
@pytest.mark.parametrize('recompute', [False, True])
def test_a_plan_foretells_the_peak_of_memory(compile, recompute):
    """12 layers of 768 channels, and micro-batches of 4 x 1,024 tokens: 2 to 4 GB."""
    forget_models()
    before = torch.cuda.memory_allocated()
    shape = dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304, bias=False)
    model = train(3, 'bfloat16', compile, recompute=recompute, batch_size=4, **shape)[2].model
    found = devices.peak_memory(torch.device('cuda')) - before
    step = Step(micro_batch_size=4, micro_steps=2, compile=compile, recompute=recompute)
    assert found == pytest.approx(plan_memory(model, step).peak, rel=0.15)


def test_uncompiled_training_never_holds_whole_logits():
    """At GPT-2's vocabulary, whole float32 logits of 32 x 1,024 positions would take 6.6 GB."""
    forget_models()
    env = start_environment('cuda', 'bfloat16', False)
    model = gpt(vocab_size=50304, block_size=1024, n_layer=1, n_embd=64, n_head=1)
    wrapped = parallel.wrap(model, env)
    idx = torch.randint(50304, (32, 1024), device='cuda')
    with env.autocast():
        wrapped(idx, idx)[1].backward()
    assert devices.peak_memory(env.device) < 5e9


def test_batches_arrive_whole_and_in_order():
    def batch(i):
        return Batch(torch.full((512, 1024), i), torch.full((512, 1024), -i))

    source = prefetch(batch, ((i,) for i in range(50)), torch.device('cuda', 0))
    for i, (x, y) in enumerate(source):
        torch.cuda._sleep(10 ** 6)              # the computation is slower than the copies
        assert (x == i).all()
        assert (y == -i).all()


def test_numbers_are_read_in_their_order():
    reads = []
    for i in range(100):
        torch.cuda._sleep(10 ** 5)
        reads.append(devices.read_async(torch.full((3,), float(i), device='cuda')))
    assert [read()[0] for read in reads] == list(range(100))


@two_gpus
def test_another_gpu_leaves_the_first_one_alone():
    code = '''
import sys
sys.path[:0] = ['.', 'tests']
import torch, test_cuda
test_cuda.train(3, 'bfloat16', False, device='cuda:1')
print(torch.cuda.memory_reserved(0))
'''
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-1] == '0'


@pytest.fixture
def exact_float32():
    """Products of float32 in float32: start_environment leaves TF32 on."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision('highest')
    yield
    torch.set_float32_matmul_precision(precision)


def shortfall(model, text, n_read):
    """By how much the logits of the tokens after the first n_read are below the largest, at most.

    In standard deviations of the logits, which are computed without a cache in float32.
    """
    exact = gpt(**{name: getattr(model.config, name) for name in (*SMALL, *MODERN)})
    exact.load_state_dict(model.state_dict())
    exact = exact.to(text.device).eval()
    with torch.no_grad():
        logits = exact.logits(exact.hidden(text[:, :-1]))
    logits = logits[:, n_read - 1:]                                         # (B, new, V)
    chosen = logits.gather(2, text[:, n_read:, None])[:, :, 0]
    return ((logits.amax(2) - chosen).max() / logits.std()).item()


@pytest.mark.parametrize('shape', [{}, MODERN])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled_generation_is_uncompiled_generation(dtype, shape, exact_float32):
    """Token for token in float32. In bfloat16 near ties fall either way, so both texts are of
    tokens that are nearly the likeliest."""
    torch._dynamo.reset()
    model = gpt(**shape).to('cuda', dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    idx = torch.randint(4096, (2, 5), device='cuda')
    plain = model.generate(idx, 60, temperature=0)
    compiled = model.generate(idx, 60, temperature=0, compile=True)
    assert shortfall(model, plain, 5) < 0.2
    assert shortfall(model, compiled, 5) < 0.2
    if dtype == torch.float32:
        assert torch.equal(plain, compiled)


def test_fifty_compiled_generations_neither_recompile_nor_grow():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = gpt().to('cuda', torch.bfloat16).eval()
    idx = torch.randint(4096, (1, 5), device='cuda')
    reserved = []
    for _ in range(50):
        model.generate(idx, 40, top_k=50, compile=True)
        reserved.append(torch.cuda.memory_reserved())
    assert torch._dynamo.utils.counters['stats']['unique_graphs'] == 1
    assert reserved[-1] == reserved[5]


def test_generation_never_uses_cudnn_attention():
    model = gpt().to('cuda', torch.bfloat16).eval()
    with torch.profiler.profile() as recorded:
        model.generate(torch.randint(4096, (1, 5), device='cuda'), 20)
    assert not any('cudnn' in event.key.lower() for event in recorded.key_averages())


# Whole runs, by the command line

GPU = ['--device=cuda', '--dropout=0']


def assert_close(found, expected, tolerance):
    """The same records, with losses that differ by no more than a share of `tolerance`.

    The norm of a gradient moves more than the loss, so it may differ by ten times as much.
    """
    for a, b in zip(found, expected, strict=True):
        assert a == {key: pytest.approx(value, rel=tolerance * (10 if 'norm' in key else 1))
                     for key, value in b.items()}


@pytest.mark.parametrize('compile', [False, True])
def test_a_resumed_run_equals_one_that_never_stopped(workspace, compile):
    """To rounding: attention adds its gradients in no fixed order on a GPU. README says so."""
    flags = [*GPU, f'--compile={compile}', '--dtype=bfloat16']
    straight = f'out-straight-{compile}'
    stopped = f'out-stopped-{compile}'
    for arguments in ([*workspace.flags(straight), *flags],
                      [*workspace.flags(stopped), *flags, '--max_iters=10'],
                      [f'--out_dir={stopped}', '--init_from=resume', '--max_iters=20', *flags]):
        result = workspace.run_python('train.py', *arguments, timeout=600)
        assert result.codes == [0], result.stderr
    assert_close(workspace.records(stopped), workspace.records(straight), 1e-2)


def test_ranks_over_nccl_train_as_one_process(workspace):
    ranks = max(n for n in (1, 2, 4, 8) if n <= torch.cuda.device_count())
    flags = [*GPU, '--dtype=float32', '--gradient_accumulation_steps=8']
    one = workspace.run_python('train.py', *workspace.flags('out-one'), *flags)
    many = workspace.run_python('train.py', *workspace.flags('out-nccl'), *flags, ranks=ranks)
    assert one.codes == many.codes == [0], many.stderr
    if ranks > 1:
        assert f'{ranks} ranks over nccl' in many.stdout
    assert_close(workspace.records('out-nccl'), workspace.records('out-one'), 1e-3)


@two_gpus
@pytest.mark.parametrize('flags', [
    ['--strategy=fsdp'],
    ['--strategy=fsdp', '--compile=True'],
    ['--strategy=hsdp'],
    ['--strategy=fsdp', '--checkpoint=sharded'],
    ['--reduce_dtype=bfloat16'],
])
@pytest.mark.parametrize('dtype, tolerance', [('float32', 1e-3), ('bfloat16', 2e-2)])
def test_every_strategy_trains_as_ddp(workspace, flags, dtype, tolerance):
    shared = [*GPU, f'--dtype={dtype}', '--gradient_accumulation_steps=8', '--overwrite=True']
    shared.append('--rank_timeout=300')             # one rank may compile for longer than another
    expected = workspace.run_python('train.py', *workspace.flags('out-ddp'), *shared, ranks=2,
                                    timeout=600)
    found = workspace.run_python('train.py', *workspace.flags('out-sharded'), *shared, *flags,
                                 ranks=2, timeout=600)
    assert expected.codes == found.codes == [0], found.stderr

    assert_close(workspace.records('out-sharded'), workspace.records('out-ddp'), tolerance)


@two_gpus
def test_a_killed_rank_ends_the_others(workspace):
    flags = [*workspace.flags('out-killed', rank_timeout=20), *GPU, '--max_iters=1000000',
             '--gradient_accumulation_steps=2']
    command = [sys.executable, *torchrun_options(2), 'train.py', *flags]
    process = subprocess.Popen(command, cwd=workspace.folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith('iter 5'):
            break

    listed = subprocess.run(['pgrep', '-P', str(process.pid)], capture_output=True, text=True)
    os.kill(int(listed.stdout.split()[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert time.monotonic() - began < 100
    assert (workspace.folder / 'out-killed' / 'state.pt').exists()
