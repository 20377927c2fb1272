"""The memory of a training step by arithmetic."""

import functools

import harness  # noqa: F401, puts the project on sys.path
import pytest
import torch

from engine.training import lora, optim
from engine.training.plan import Step, activation_bytes, mask_bytes, plan_memory
from model import GPT, GPTConfig

MEDIUM = dict(n_layer=24, n_head=16, n_embd=1024)
LARGE = dict(n_layer=36, n_head=20, n_embd=1280)
XL = dict(n_layer=48, n_head=25, n_embd=1600)
FAST = dict(position='rotary', norm='rmsnorm', qk_norm=True, embedding_norm=True,
            activation='relu2', tied=False, softcap=15.0)


@functools.cache
def gpt(**shape):
    with torch.device('meta'):
        return GPT(GPTConfig(**{'bias': False, **shape}))


@pytest.mark.parametrize('gigabytes, shape, step', [
    (7.7, {}, Step(12, 5, gpus=8)),
    (10.4, FAST, Step(16, 4, gpus=8, optimizer='muon')),
    (14.5, MEDIUM, Step(8, 8, gpus=8)),
    (21.2, LARGE, Step(4, 16, gpus=8)),
    (39.9, XL, Step(4, 32, gpus=8)),
    (31.6, XL, Step(4, 32, gpus=8, recompute=True)),
    (16.8, XL, Step(4, 32, gpus=8, strategy='fsdp')),
    (6.7, XL, Step(4, 32, gpus=8, strategy='fsdp', recompute=True)),
])
def test_the_peak_is_the_sum_of_what_the_generated_code_allocates(gigabytes, shape, step):
    """The figures were summed over the allocations in Inductor's code for an H100."""
    assert plan_memory(gpt(**shape), step).peak / 1e9 == pytest.approx(gigabytes, rel=0.05)


def bytes_for_the_backward_pass(model, idx, dtype):
    """The bytes of the distinct tensors, but for parameters, that autograd keeps of `hidden`."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage          # alive, so that no other takes its address
        return tensor

    enabled = dtype != 'float32'
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            output = model.hidden(idx)
    del output
    return sum(storage.nbytes() for address, storage in kept.items()
               if address not in parameters)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
@pytest.mark.parametrize('shape', [
    {},
    dict(activation='swiglu', position='rotary'),
    dict(activation='relu2', qk_norm=True, position='rotary', embedding_norm=True),
])
def test_activations_are_what_autograd_keeps(shape, dtype):
    """A GPU's kernels of these operations keep the same tensors as a CPU's."""
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=64, block_size=256, vocab_size=50,
                          bias=False, **shape))
    idx = torch.zeros(2, 256, dtype=torch.long)
    found = bytes_for_the_backward_pass(model, idx, dtype)

    step = Step(2, 1, dtype=dtype, compile=False)
    expected = activation_bytes(model.config, step) * idx.numel()
    expected += mask_bytes(model.config, step)
    if dtype == 'bfloat16':                         # copies of the weights in the products
        expected += 2 * sum(p.numel() for p in model.transformer.h.parameters())
    assert found == pytest.approx(expected, rel=0.06)


def test_one_gpu_gives_its_gradients_back_and_accumulation_keeps_them():
    model = gpt(n_layer=1)
    n_parameters = model.get_num_params(non_embedding=False)
    assert plan_memory(model, Step(1, 1)).gradients == 0
    for step in (Step(1, 2), Step(1, 1, gpus=2)):
        assert plan_memory(model, step).state == 16 * n_parameters


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_state_of_adapters_is_what_their_step_holds(dtype):
    """The bytes of all parameters, and of the moments that AdamW makes in a step."""
    settings = dict(lora_rank=4, lora_alpha=8.0, lora_targets='c_attn,c_fc', lora_dropout=0.0,
                    seed=1)
    model = GPT(GPTConfig(16, 50, n_layer=2, n_head=2, n_embd=32))
    lora.adapt(model, settings, dtype)
    optimizer = optim.adamw(model, 1e-3, 0.1, (0.9, 0.95))
    idx = torch.randint(50, (1, 16))
    with torch.autocast('cpu', torch.bfloat16, enabled=dtype == 'bfloat16'):
        model(idx, idx)[1].backward()
    optimizer.step()

    def n_bytes(tensors):
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    moments = [state[name] for state in optimizer.state.values()
               for name in ('exp_avg', 'exp_avg_sq')]
    plan = plan_memory(model, Step(1, 2, dtype=dtype))
    assert plan.weights == n_bytes(model.parameters())
    assert plan.moments == n_bytes(moments)
    assert plan.gradients == n_bytes(p.grad for p in model.parameters() if p.grad is not None)


def test_shards_divide_the_state_over_gpus_or_over_those_of_a_machine():
    model = gpt(n_layer=1)
    state = plan_memory(model, Step(1, 1, gpus=16)).state
    shares = {strategy: state / plan_memory(model, Step(1, 1, gpus=16, strategy=strategy)).state
              for strategy in ('ddp', 'fsdp', 'hsdp')}
    assert shares == {'ddp': 1, 'fsdp': 16, 'hsdp': 8}
