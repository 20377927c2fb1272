"""A model on its device and over its ranks: wrapping, sharding, gradients.

A strategy says what a rank holds. ddp: everything. fsdp: a shard of the weights, gradients and
moments. hsdp: a shard, the same on each machine.
Sources: FSDP (Zhao et al. 2023, arXiv:2304.11277), torch.distributed.fsdp.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from engine.distributed import Environment, is_shard
from engine.errors import UserError

STRATEGIES = ('ddp', 'fsdp', 'hsdp')


def is_sharded(strategy: str, env: Environment) -> bool:
    """True where each rank holds a part of the model. One rank holds all of it."""
    return env.world_size > 1 and strategy != 'ddp'


def check_strategy(strategy: str, reduce_dtype: str, env: Environment, optimizer: str = 'adamw'):
    """UserError where the machine, the precision or the optimizer rules out `strategy`."""
    if env.world_size == 1:
        return

    if strategy == 'ddp':
        if reduce_dtype == 'bfloat16' and env.device.type != 'cuda':
            raise UserError('reduce_dtype=bfloat16 takes NCCL under ddp; '
                            'try --reduce_dtype=float32, or --strategy=fsdp')
        return

    if env.dtype == 'float16':
        raise UserError(f'strategy={strategy} does not scale the loss, which float16 needs: each '
                        f'rank would see the overflow of its own shard only; '
                        f'try --dtype=bfloat16, or --strategy=ddp')
    if optimizer == 'muon':
        raise UserError(f'Muon multiplies whole matrices, and strategy={strategy} gives a rank a '
                        f'part of each; try --strategy=ddp, or --optimizer=adamw')
    if strategy == 'hsdp' and env.world_size % env.local_world_size:
        raise UserError(f'strategy=hsdp needs machines with equally many ranks, and '
                        f'{env.world_size} ranks are not a multiple of {env.local_world_size}; '
                        f'try --strategy=fsdp')


def build_on_ranks(build: Callable[[], nn.Module], model_class: type, strategy: str,
                env: Environment) -> nn.Module:
    """The model that build() returns, on every rank.

    Of a sharded one, rank 0 alone builds the whole, so that a machine holds it once. The others get
    model_class(config) on the meta device, and `wrap` gives them their shards.
    """
    sharded = is_sharded(strategy, env)
    model = None
    with env.raise_on_all_ranks():
        if env.is_main or not sharded:
            model = build()
    if not sharded:
        return model

    config = env.all_gather(model.config if env.is_main else None)[0]
    if model is None:
        with torch.device('meta'):
            model = model_class(config)
    return model


# Wrapping

def wrap(model: nn.Module, env: Environment, strategy: str = 'ddp', recompute: bool = False,
         reduce_dtype: str = 'float32') -> nn.Module:
    """`model` as the training loop calls it: on its device, compiled where env says so, averaging
    gradients over the ranks.

    strategy: ddp, fsdp or hsdp, which check_strategy has accepted. recompute: whether the backward
    pass computes activations again. reduce_dtype: the precision of gradients between ranks.
    The returned module shares its parameters with `model`, which remains the one to save.
    A sharded model may be on the meta device on all ranks but 0, whose weights the others get.
    Raises UserError for a combination that would not resume exactly.
    """
    if recompute:
        if env.compile and any(rate > 0 for rate in dropout_rates(model)):
            raise UserError('under torch.compile, recomputed dropout draws from a generator of its '
                            'own, and a resumed run would not be exact; '
                            'try --compile=False, --recompute=False, or no dropout')
        model.recompute = True
    model.keep_logits = False                   # a training step reads the loss alone
    if is_sharded(strategy, env):
        return shard(model, env, strategy, reduce_dtype)

    model.to(env.device)
    if env.compile and env.world_size > env.local_world_size:
        # Gradients start on their way to other machines while earlier blocks are computed. Those
        # of a whole compiled model come at the end of its backward pass, all at once.
        compile_blocks(model)
    elif env.compile:
        # Static shapes: evaluation at another batch size compiles once more, and stays as fast.
        model = torch.compile(model, dynamic=False)
    if env.world_size > 1:
        model = distribute(model, env, reduce_dtype)
    return model


def dropout_rates(model):
    """The rates of a model's dropout layers. Attention has that of the model."""
    return {layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)}


def compile_blocks(model):
    """Compile each block by itself, in place."""
    for block in model.transformer.h:
        block.forward = torch.compile(block.forward, dynamic=False)


def distribute(model, env, reduce_dtype):
    """`model` under DistributedDataParallel."""
    if env.compile:
        # DDP would split the graph at each gradient bucket, and nothing would fuse across parts.
        torch._dynamo.config.optimize_ddp = False

    devices = [env.device.index] if env.device.type == 'cuda' else None
    ddp = DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    if reduce_dtype == 'bfloat16':
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
        ddp.register_comm_hook(None, bf16_compress_hook)
    lay_out_buckets(ddp, env.device)
    return ddp


def lay_out_buckets(ddp, device):
    """Give DDP the buckets of gradients that it keeps, before the first step.

    DDP sums gradients in buckets. It starts with one for all, and makes others at the second
    forward pass, in the order in which the first backward pass had the gradients ready. With three
    ranks or more, a sum is rounded by its place in a bucket. So the first iteration of a process
    would be rounded differently from all later ones, and a resumed run would not be exact.

    Two passes over a sum of all parameters, with gradients of zero, settle this. They visit the
    parameters from the last to the first, as the model's backward pass does. After the second pass
    the gradients lie in the buckets.
    """
    model = ddp.module
    ddp.module = ParameterSum(model)
    for _ in range(2):
        ddp(torch.zeros((), device=device)).backward()
    ddp.module = model


class ParameterSum(nn.Module):
    """The sum of all parameters of a model, times a factor, which is then their gradient."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, factor):
        return factor * sum(parameter.sum() for parameter in self.model.parameters())


def shard(model, env, strategy, reduce_dtype):
    """`model` with its parameters sharded in place.

    Each block is one group, and the rest is another, which has the tied embedding. A device holds
    its shards, and the whole of one group at a time.
    """
    from torch.distributed.fsdp import fully_shard
    mesh = device_mesh(strategy, env)
    block_precision, rest_precision = precisions(reduce_dtype, env)

    if env.compile:
        compile_blocks(model)
    for block in model.transformer.h:
        copy_from_rank_0(block, env.device)
        fully_shard(block, mesh=mesh, mp_policy=block_precision)

    copy_from_rank_0(model, env.device)
    return fully_shard(model, mesh=mesh, mp_policy=rest_precision)


def device_mesh(strategy, env):
    """The ranks in a row, or with hsdp as machines times the ranks of each."""
    from torch.distributed.device_mesh import init_device_mesh
    if strategy == 'hsdp':
        machines = env.world_size // env.local_world_size
        shape = (machines, env.local_world_size)
        names = ('replicate', 'shard')
    else:
        shape = (env.world_size,)
        names = ('shard',)
    return init_device_mesh(env.device.type, shape, mesh_dim_names=names)


def precisions(reduce_dtype, env):
    """FSDP's policies for the blocks and for the rest of the model.

    Under autocast a block's products take bfloat16 weights anyway, so gathering those halves the
    traffic. The embeddings stay float32, and with them the residual stream, as under ddp. A CPU's
    layer norm wants its weights in float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy
    reduced = torch.bfloat16 if reduce_dtype == 'bfloat16' else torch.float32
    gathered = None
    if env.dtype == 'bfloat16' and env.device.type == 'cuda':
        gathered = torch.bfloat16
    blocks = MixedPrecisionPolicy(gathered, reduced, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(None, reduced, cast_forward_inputs=False)
    return blocks, rest


def copy_from_rank_0(module, device):
    """Put rank 0's values of the parameters that are not sharded yet on every rank's device.
    Tied ones stay tied."""
    copies = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            if is_shard(parameter):
                continue
            if parameter not in copies:
                value = broadcast_from_rank_0(parameter, device)
                copies[parameter] = nn.Parameter(value, parameter.requires_grad)
            setattr(layer, name, copies[parameter])


def broadcast_from_rank_0(parameter, device):
    if parameter.is_meta:
        value = torch.empty_like(parameter, device=device)
    else:
        value = parameter.detach().to(device)
    dist.broadcast(value, src=0)
    return value


def sync_gradients(wrapped_model: nn.Module, enabled: bool) -> AbstractContextManager:
    """The context of a forward and backward pass of one micro-step.

    enabled: whether ddp averages the gradients over the ranks, and hsdp over the machines. Until
    then they add up on each rank. fsdp averages them over its ranks in every pass, and hsdp within
    a machine, so that a rank never holds more than its shard of them.
    """
    if hasattr(wrapped_model, 'set_requires_all_reduce'):           # FSDP
        wrapped_model.set_requires_all_reduce(enabled)
    elif not enabled and hasattr(wrapped_model, 'no_sync'):         # DDP
        return wrapped_model.no_sync()
    return nullcontext()


def clear_gradients(optimizer: torch.optim.Optimizer, wrapped_model: nn.Module):
    """Forget the gradients of a step. Their memory is freed, but under DDP they become zero where
    they lie: in the buckets, beside which DDP would otherwise hold them a second time."""
    in_buckets = isinstance(wrapped_model, DistributedDataParallel)
    optimizer.zero_grad(set_to_none=not in_buckets)


# Shards

def shard_like(parameter: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value` with as many rows as `parameter`, and sharded as it is.

    value: whole on every rank, or sharded already. It has more rows where block_size was lowered.
    """
    if is_shard(value):
        return value
    value = value[:len(parameter)]
    if not is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh,
                             parameter.placements, src_data_rank=None)
