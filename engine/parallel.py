"""A model on its device and over its ranks: wrapping, gradient synchronization, each rank's share of a batch."""

import math
from contextlib import nullcontext

import torch

from engine import chunked_loss, cpu
from engine.errors import UserError


def wrap(model, env, recompute=False):
    """`model` as the training loop calls it: on its device, fast there, and averaging gradients over the ranks.

    recompute: with activation checkpointing. The returned module shares its parameters with `model`,
    which remains the one to save. Raises UserError for a combination that would not resume exactly.
    """
    model.to(env.device)
    if recompute:
        if env.compile and model.config.dropout:
            raise UserError('under torch.compile, recomputed dropout draws from a generator of its own, and a resumed '
                            'run would not be exact; try --compile=False, --recompute=False or --dropout=0')
        model.checkpoint_activations()
    if env.compile:
        # Static shapes: evaluation at another batch size compiles once more, and stays as fast.
        model = torch.compile(model, dynamic=False)
    elif env.device.type == 'cpu':
        cpu.optimize_for_training(model)
    elif env.device.type == 'cuda':
        chunked_loss.replace_loss(model)
    if env.world_size > 1:
        if env.compile:
            # DDP would split the graph at each gradient bucket, and nothing would fuse across the parts.
            torch._dynamo.config.optimize_ddp = False
        devices = [env.device.index] if env.device.type == 'cuda' else None
        model = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    return model


def sync_gradients(wrapped_model, enabled):
    """The context of a forward and backward pass that averages gradients over the ranks, if `enabled`."""
    if enabled or not hasattr(wrapped_model, 'no_sync'):
        return nullcontext()
    return wrapped_model.no_sync()


def split_batch(gradient_accumulation_steps, batch_size, world_size):
    """(micro_steps, micro_batch_size) of one rank: an equal share of the global batch.

    The global batch has gradient_accumulation_steps * batch_size sequences, whatever the number of
    ranks, and micro_batch_size is at most batch_size. Raises UserError where it does not divide.
    """
    total = gradient_accumulation_steps * batch_size
    micro_steps = math.ceil(total / world_size / batch_size)
    if total % (world_size * micro_steps):
        nearest = math.ceil(gradient_accumulation_steps / world_size) * world_size
        raise UserError(f'{gradient_accumulation_steps} x {batch_size} sequences do not divide over {world_size} ranks '
                        f'in equal micro-batches; try --gradient_accumulation_steps={nearest}')
    return micro_steps, total // world_size // micro_steps
