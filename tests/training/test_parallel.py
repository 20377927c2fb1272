"""A model on its device and over its ranks.

Where these tests need several ranks, they take PyTorch's fake group, whose collectives move nothing
and whose other ranks do not exist, or a real group of one rank.
"""

import gc
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_leaves, tree_map_only

from engine import distributed
from engine.checkpoint import gathered
from engine.checkpoint.contents import find_not_finite
from engine.training import optim, parallel
from model import GPT, GPTConfig


def tiny_gpt(**changes):
    torch.manual_seed(0)
    shape = dict(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=32)
    return GPT(GPTConfig(**{**shape, **changes}))


def environment(world_size, compile=False):
    return distributed.Environment(torch.device('cpu'), 'float32', compile, 0, 0, world_size, '')


@contextmanager
def process_group(backend, **options):
    dist.init_process_group(backend, rank=0, **options)
    try:
        yield
    finally:
        dist.destroy_process_group()


@pytest.fixture
def one_rank(tmp_path):
    """A group that DDP takes for several ranks'."""
    with process_group('gloo', init_method=f'file://{tmp_path}/store', world_size=1):
        yield


@pytest.fixture
def eight_ranks():
    with process_group('fake', store=FakeStore(), world_size=8):
        yield


@pytest.mark.parametrize('compile', [False, True])
def test_a_wrapped_model_computes_the_same_with_the_same_weights(compile, monkeypatch):
    """The backend traces the model and runs it as it is, which takes no C compiler."""
    torch_compile = torch.compile

    def compile_by_tracing(model, **options):
        return torch_compile(model, backend='eager', **options)
    monkeypatch.setattr(torch, 'compile', compile_by_tracing)

    # the plain model
    model = tiny_gpt()
    idx = torch.randint(50, (2, 16))
    logits, loss = model(idx, idx)
    loss.backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    names = list(model.state_dict())

    # the wrapped one
    env = distributed.start_environment(device='cpu')
    env.compile = compile
    wrapped = parallel.wrap(model, env)
    with parallel.sync_gradients(wrapped, enabled=False):
        found = wrapped(idx, idx)[1]
        found.backward()

    torch.testing.assert_close(found, loss)
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)
    assert list(model.to_checkpoint()['model']) == names        # without the prefixes of wrappers


def test_only_the_last_micro_step_waits_for_the_other_ranks():
    class Wrapped:
        """A model over several ranks, as far as synchronization goes."""
        is_synchronized = True

        @contextmanager
        def no_sync(self):
            self.is_synchronized = False
            yield
            self.is_synchronized = True

    wrapped = Wrapped()
    found = []
    for enabled in (False, False, True):
        with parallel.sync_gradients(wrapped, enabled):
            found.append(wrapped.is_synchronized)
    assert found == [False, False, True]


# DDP

def done(bucket):
    """What a hook of DDP's returns of a bucket of gradients that was sent."""
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def test_gradients_lie_in_the_buckets_of_ddp_from_the_first_step(one_rank):
    """Beside the buckets, they would take 4 bytes a parameter once more."""
    model = tiny_gpt()
    ddp = parallel.distribute(model, environment(2), 'float32')
    optimizer = optim.adamw(model, 1e-2, 0.1, (0.9, 0.95))
    idx = torch.randint(50, (2, 16))
    gradients = []
    for enabled in (False, True, False, True):
        with parallel.sync_gradients(ddp, enabled):
            ddp(idx, idx)[1].backward()
        gradients.append({p.grad.untyped_storage().data_ptr() for p in model.parameters()})
        if enabled:
            optimizer.step()
            parallel.clear_gradients(optimizer, ddp)
            assert not any(p.grad.any() for p in model.parameters())

    buckets = set()

    def record(_, bucket):
        buckets.add(bucket.buffer().untyped_storage().data_ptr())
        return done(bucket)
    ddp.register_comm_hook(None, record)
    ddp(idx, idx)[1].backward()
    assert gradients == [buckets] * 4


def test_without_ddp_the_memory_of_gradients_is_freed():
    model = tiny_gpt()
    optimizer = optim.adamw(model, 1e-2, 0.1, (0.9, 0.95))
    idx = torch.randint(50, (2, 16))
    model(idx, idx)[1].backward()
    parallel.clear_gradients(optimizer, model)
    assert all(p.grad is None for p in model.parameters())


def test_the_first_step_sums_gradients_in_the_buckets_of_all_later_ones(one_rank, monkeypatch):
    """With three ranks or more, other buckets would be other roundings. 2.4 MB are two buckets."""
    buckets = []
    steps = []

    class Recorded(parallel.DistributedDataParallel):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            self.register_comm_hook(None, self.record)

        def record(self, _, bucket):
            buckets.append([tuple(p.shape) for p in bucket.parameters()])
            return done(bucket)
    monkeypatch.setattr(parallel, 'DistributedDataParallel', Recorded)

    model = tiny_gpt(n_embd=128, vocab_size=2048)
    ddp = parallel.distribute(model, environment(2), 'float32')
    idx = torch.randint(50, (2, 16))
    for _ in range(3):
        buckets.clear()
        ddp(idx, idx)[1].backward()
        steps.append(list(buckets))
    assert len(steps[0]) == 2
    assert steps == [steps[0]] * 3


# Shards

def count_bytes():
    """The bytes of all tensors that Python knows."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        is_tensor = type(item) in (torch.Tensor, torch.nn.Parameter) and not item.is_sparse
        if is_tensor and item.device.type == 'cpu':
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize('strategy, n_shards', [('fsdp', 8), ('hsdp', 4)])
def test_a_sharded_rank_holds_its_part_of_the_gradients_alone(
        strategy, n_shards, eight_ranks, monkeypatch):
    """After each micro-step, and not only after the last, where an optimizer step follows."""
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '4')
    model = tiny_gpt()
    n_bytes = sum(p.nbytes for p in model.parameters())
    wrapped = parallel.wrap(model, environment(8), strategy)
    idx = torch.randint(50, (2, 16))
    before = count_bytes()
    for enabled in (False, False, True):
        with parallel.sync_gradients(wrapped, enabled):
            wrapped(idx, idx)[1].backward()
        held = count_bytes() - before
        assert held == pytest.approx(n_bytes / n_shards, rel=0.2)


# What is saved

class OnGPU(torch.Tensor):
    """A tensor that says that it is on a GPU, and mixes with others as badly as one."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=value.dtype,
                                                   device='cuda')

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        options = options or {}
        tensors = [item for item in tree_leaves((arguments, options))
                   if isinstance(item, torch.Tensor)]
        if not all(isinstance(tensor, cls) for tensor in tensors):
            raise RuntimeError('expected all tensors to be on the same device')

        to_cpu = options.get('device') == torch.device('cpu')
        values = tree_map_only(cls, lambda tensor: tensor.value, arguments)
        if to_cpu:
            return values[0].clone()
        return tree_map_only(torch.Tensor, cls, function(*values, **options))


def test_everything_that_is_gathered_is_in_cpu_memory():
    """AdamW's count of steps is no shard, and lies on the GPU."""
    state = {'state': {0: {'step': OnGPU(torch.tensor(3.0)), 'exp_avg': torch.ones(2)}},
             'param_groups': [{'lr': 0.1}]}
    found = gathered.gather(state)
    assert type(found['state'][0]['step']) is torch.Tensor
    assert found == {'state': {0: {'step': 3, 'exp_avg': found['state'][0]['exp_avg']}},
                     'param_groups': [{'lr': 0.1}]}


@pytest.mark.parametrize('step, expected', [
    (3.0, None),
    (float('nan'), 'optimizer state 0 step'),
])
def test_tensors_on_several_devices_are_checked(step, expected):
    optimizer = {'state': {0: {'exp_avg': torch.ones(2), 'step': OnGPU(torch.tensor(step))}}}
    assert find_not_finite({'weight': torch.ones(3)}, optimizer) == expected
