"""A model on its device and over its ranks: wrapping, sharding, gradient synchronization, whole tensors for a file.

A strategy says what a rank holds. ddp: everything. fsdp: a shard of the weights, gradients and moments. hsdp: a
shard, the same on each machine. Sources: FSDP (Zhao et al. 2023, arXiv:2304.11277), torch.distributed.fsdp.
"""

from contextlib import nullcontext

import torch
import torch.distributed as dist

from engine.distributed import is_shard
from engine.errors import UserError
from engine.training import cpu as cpu_training


def check_strategy(strategy, reduce_dtype, env, optimizer='adamw'):
    """True where `strategy` shards the model. UserError where the machine,
    the precision or the optimizer rules it out."""
    if env.world_size == 1:
        return False
    if strategy == 'ddp':
        if reduce_dtype == 'bfloat16' and env.device.type != 'cuda':
            raise UserError('reduce_dtype=bfloat16 takes NCCL under ddp; try --reduce_dtype=float32, or --strategy=fsdp')
        return False
    if env.dtype == 'float16':
        raise UserError(f'strategy={strategy} does not scale the loss, which float16 needs: each rank would see the '
                        f'overflow of its own shard only; try --dtype=bfloat16, or --strategy=ddp')
    if optimizer == 'muon':
        raise UserError(f'Muon multiplies whole matrices, and strategy={strategy} gives a rank a part of each; try '
                        f'--strategy=ddp, or --optimizer=adamw')
    if strategy == 'hsdp' and env.world_size % env.local_world_size:
        raise UserError(f'strategy=hsdp needs machines with equally many ranks, and {env.world_size} ranks are not a '
                        f'multiple of {env.local_world_size}; try --strategy=fsdp')
    return True


def wrap(model, env, strategy='ddp', recompute=False, reduce_dtype='float32'):
    """`model` as the training loop calls it: on its device, fast there, and averaging gradients over the ranks.

    strategy: ddp, fsdp or hsdp. recompute: with activation checkpointing. reduce_dtype: of the gradients
    between ranks. The returned module shares its parameters with `model`, which remains the one to save.
    A sharded model may be on the meta device on all ranks but 0, whose weights the others get.
    Raises UserError for a combination that would not resume exactly.
    """
    sharded = check_strategy(strategy, reduce_dtype, env)
    if recompute:
        if env.compile and model.config.dropout:
            raise UserError('under torch.compile, recomputed dropout draws from a generator of its own, and a resumed '
                            'run would not be exact; try --compile=False, --recompute=False or --dropout=0')
        model.checkpoint_activations()
    if sharded:
        return shard(model, env, strategy, reduce_dtype)
    model.to(env.device)
    if env.compile:
        # Static shapes: evaluation at another batch size compiles once more, and stays as fast.
        model = torch.compile(model, dynamic=False)
    elif env.device.type == 'cpu':
        cpu_training.optimize_for_training(model)
    elif env.device.type == 'cuda':
        model.keep_logits = False
    if env.world_size > 1:
        if env.compile:
            # DDP would split the graph at each gradient bucket, and nothing would fuse across the parts.
            torch._dynamo.config.optimize_ddp = False
        devices = [env.device.index] if env.device.type == 'cuda' else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
        if reduce_dtype == 'bfloat16':
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
            model.register_comm_hook(None, bf16_compress_hook)
    return model


def shard(model, env, strategy, reduce_dtype):
    """`model` with its parameters sharded in place: one group per block, and one for the rest, which has the
    tied embedding. A device holds its shards, and the whole of one group at a time."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    shape, names = (env.world_size,), ('shard',)
    if strategy == 'hsdp':
        shape, names = (env.world_size // env.local_world_size, env.local_world_size), ('replicate', 'shard')
    mesh = init_device_mesh(env.device.type, shape, mesh_dim_names=names)
    reduce_dtype = torch.bfloat16 if reduce_dtype == 'bfloat16' else torch.float32
    # Under autocast a block's products take bfloat16 weights anyway, so gathering those halves the traffic. The
    # embeddings stay float32, and with them the residual stream, as under ddp. A CPU's layer norm wants its
    # weights in float32.
    half = torch.bfloat16 if env.dtype == 'bfloat16' and env.device.type == 'cuda' else None
    blocks = MixedPrecisionPolicy(half, reduce_dtype, cast_forward_inputs=False)
    rest = MixedPrecisionPolicy(None, reduce_dtype, cast_forward_inputs=False)
    for block in model.transformer.h:
        copy_from_rank_0(block, env.device)
        if env.compile:
            block.forward = torch.compile(block.forward, dynamic=False)
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    copy_from_rank_0(model, env.device)
    if env.device.type == 'cuda':
        model.keep_logits = False
    return fully_shard(model, mesh=mesh, mp_policy=rest)


def copy_from_rank_0(module, device):
    """Put rank 0's values of the parameters that are not sharded yet on every rank's device. Tied ones stay tied."""
    copies = {}
    for layer in module.modules():
        for name, parameter in layer.named_parameters(recurse=False, remove_duplicate=False):
            if is_shard(parameter):
                continue
            if parameter not in copies:
                value = torch.empty_like(parameter, device=device) if parameter.is_meta else parameter.detach().to(device)
                dist.broadcast(value, src=0)
                copies[parameter] = torch.nn.Parameter(value)
            setattr(layer, name, copies[parameter])


def sync_gradients(wrapped_model, enabled):
    """The context of a forward and backward pass that averages gradients over the ranks, if `enabled`."""
    if hasattr(wrapped_model, 'set_requires_gradient_sync'):
        wrapped_model.set_requires_gradient_sync(enabled)
    elif not enabled and hasattr(wrapped_model, 'no_sync'):
        return wrapped_model.no_sync()
    return nullcontext()


def shard_like(parameter, value):
    """`value` as `parameter` is: on its device, sharded alike, with as many rows. value: whole on every rank; it
    has more rows where block_size was lowered meanwhile."""
    if is_shard(value):
        return value
    value = value[:len(parameter)]
    if not is_shard(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def gather(value):
    """`value` with each sharded tensor in it whole: in CPU memory on rank 0, None on the others.

    value: nested dicts and lists, the same on every rank. A collective, one tensor at a time.
    """
    if is_shard(value):
        whole = value.full_tensor()
        return whole.cpu() if dist.get_rank() == 0 else None
    if isinstance(value, dict):
        return {key: gather(item) for key, item in value.items()}
    return [gather(item) for item in value] if isinstance(value, list) else value


def gather_model(model):
    """model.to_checkpoint() with whole weights, as `gather` has them. Tied weights share their memory."""
    contents = model.to_checkpoint()
    if any(map(is_shard, model.parameters())):
        parameters = model.state_dict(keep_vars=True)
        whole = {parameter: gather(parameter.detach()) for parameter in dict.fromkeys(parameters.values())}
        contents['model'] = {name: whole[parameter] for name, parameter in parameters.items()}
    return contents
