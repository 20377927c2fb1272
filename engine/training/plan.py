"""What a training step takes of each GPU's memory and time, by arithmetic and not measured.

The step holds its state throughout: weights, gradients and moments. On top come two peaks, of which
the larger one counts: the end of the forward pass, where every layer's activations wait for the
backward pass, and in a compiled step the end of the backward pass, where the gradients of the
micro-batch wait to be added to those of the micro-batches before.

docs/scaling.md explains the formulas. A MemoryPlan leaves out about 1 GB that CUDA takes, what
PyTorch's allocator cannot use, and what Muon's update holds for a moment. The lines for people add
an allowance for the first two.
"""

from dataclasses import dataclass

import torch
from torch import nn

from engine.metrics.step_log import short_number
from engine.training.chunked_loss import CHUNK_LOGITS, MIN_LOGITS

GB = 1e9
GPUS_IN_A_MACHINE = 8
# GB of the GPUs that one can buy or rent
GPU_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 96, 141, 180, 288)
# What a GPU needs beside the tensors: CUDA's own bytes, and a share that lies in gaps
CUDA_BYTES = 1e9
GAPS = 0.05


@dataclass
class Step:
    """A training step on GPUs."""
    micro_batch_size: int           # sequences
    micro_steps: int                # micro-batches of each GPU
    gpus: int = 1
    strategy: str = 'ddp'           # ddp, fsdp or hsdp
    dtype: str = 'bfloat16'
    compile: bool = True
    recompute: bool = False
    optimizer: str = 'adamw'        # adamw or muon

    @property
    def is_sharded(self) -> bool:
        return self.gpus > 1 and self.strategy != 'ddp'

    @property
    def shards(self) -> int:
        """Over how many GPUs the state is spread."""
        if not self.is_sharded:
            return 1
        if self.strategy == 'hsdp':
            return min(self.gpus, GPUS_IN_A_MACHINE)
        return self.gpus

    @property
    def is_compiled_whole(self) -> bool:
        """True where the compiler sees the loss. With shards, or across machines, it sees one block
        at a time."""
        in_one_machine = self.gpus <= GPUS_IN_A_MACHINE
        return self.compile and in_one_machine and not self.is_sharded

    @property
    def bytes_in_products(self) -> int:
        """Bytes of a number that a matrix product reads under autocast."""
        return 4 if self.dtype == 'float32' else 2


@dataclass
class MemoryPlan:
    """The bytes that a step takes on each GPU, by parts."""
    # throughout the step
    weights: float
    gradients: float
    moments: float
    # at the end of the forward pass
    copies: float                   # of weights: in lower precision, or gathered from the shards
    activations: float
    loss: float                     # logits, and what the chunked loss holds
    # at the end of the backward pass
    new_gradients: float            # of the micro-batch

    @property
    def state(self) -> float:
        return self.weights + self.gradients + self.moments

    @property
    def peak(self) -> float:
        """The most bytes of tensors at once."""
        forward = self.copies + self.activations + self.loss
        return self.state + max(forward, self.new_gradients)


def plan_memory(model: nn.Module, step: Step) -> MemoryPlan:
    """The MemoryPlan of a GPT. It may be on the meta device, as only its shapes are read."""
    config = model.config
    n_tokens = step.micro_batch_size * config.block_size
    n_head = config.vocab_size * config.n_embd
    n_parameters = sum(p.numel() for p in model.parameters())
    n_blocks = sum(p.numel() for p in model.transformer.h.parameters())
    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_head_trained = model.lm_head.weight.requires_grad
    # float32 parameters that matrix products read; what adapters adapt may be in bfloat16
    n_products = n_head
    n_products += sum(p.numel() for p in model.transformer.h.parameters()
                      if p.dtype == torch.float32)

    # One GPU frees the gradients of a step before the next one. DDP keeps their memory for good.
    # FSDP is counted in the same way, as its shards of them are small.
    n_gradients = n_trained
    if step.gpus == 1 and step.micro_steps == 1:
        n_gradients = 0

    # AdamW has two moments of each parameter; Muon has one of each matrix in the blocks.
    n_moments = 2 * n_trained
    if step.optimizer == 'muon':
        n_moments -= sum(p.numel() for p in model.transformer.h.parameters()
                         if p.dim() == 2 and p.requires_grad)

    # what the products read in place of the float32 weights
    copies = 0
    if step.is_sharded:
        n_block = n_blocks / config.n_layer
        # the block at work and the next one; and, in float32, what lies outside the blocks
        copies = 2 * step.bytes_in_products * n_block + 4 * (n_parameters - n_blocks)
    elif step.dtype != 'float32':
        copies = 2 * n_products

    # The compiled backward pass returns all gradients at once; a tied matrix has two at first.
    new_gradients = 0
    if step.is_compiled_whole:
        new_gradients = 4 * n_trained
        if config.tied and is_head_trained:
            new_gradients += 4 * n_head

    return MemoryPlan(
        weights=sum(p.numel() * p.element_size() for p in model.parameters()) / step.shards,
        gradients=4 * n_gradients / step.shards,
        moments=4 * n_moments / step.shards,
        copies=copies,
        activations=activation_bytes(config, step) * n_tokens + mask_bytes(config, step),
        loss=loss_bytes(config, step, n_tokens, is_head_trained),
        new_gradients=new_gradients,
    )


def activation_bytes(config, step: Step) -> int:
    """The bytes of a token that the backward pass of all layers reads."""
    stream = 4 * config.n_embd                  # the residual stream is float32
    layer = layer_bytes(config, step)

    # beside the layers: the last norm's input and output, the norm of the embedding
    rest = stream + step.bytes_in_products * config.n_embd
    if config.embedding_norm:
        rest += stream
    if config.dropout and not step.compile:
        rest += config.n_embd

    if step.recompute:                          # the inputs of all layers, and one layer at work
        return config.n_layer * stream + layer + rest
    return config.n_layer * layer + rest


def layer_bytes(config, step: Step) -> int:
    """The bytes of a token that the backward pass of one layer reads: 36 n_embd for GPT-2."""
    width = config.n_embd
    keys = config.kv_heads * config.head_size
    low = step.bytes_in_products

    total = 2 * 4 * width                       # inputs of two norms, in float32
    total += 2 * low * width                    # their outputs
    total += low * (width + 2 * keys)           # queries, keys and values
    if config.position == 'rotary' or config.qk_norm:
        total += low * (width + keys)           # queries and keys as they are compared
    total += low * width                        # the output of attention

    total += low * 2 * config.mlp_width         # before and after the activation
    if config.gated:
        total += low * config.mlp_width         # the gate
        if not step.compile:
            total += low * config.mlp_width     # silu of the gate
    if config.dropout and not step.compile:
        total += 2 * width                      # two masks; a compiled step draws them again
    return total


def mask_bytes(config, step: Step) -> int:
    """The bytes of ALiBi's bias, which a compiled step shares among its layers."""
    if config.position != 'alibi':
        return 0
    n_copies = 1
    if not step.compile and not step.recompute:
        n_copies = config.n_layer
    return n_copies * step.bytes_in_products * config.n_head * config.block_size ** 2


def loss_bytes(config, step: Step, n_tokens: int, is_head_trained: bool = True) -> float:
    """The bytes of the logits, and of what the chunked loss holds beside those of a chunk."""
    vocab_size = config.vocab_size
    low = step.bytes_in_products
    if step.is_compiled_whole or n_tokens * vocab_size < MIN_LOGITS:
        return low * vocab_size * n_tokens

    # engine.training.chunked_loss: a chunk's logits in both precisions
    n_logits = CHUNK_LOGITS['cuda']
    if low < 4:
        n_logits *= 4
    chunk = min(n_tokens, max(1, n_logits // vocab_size))
    logits = (4 + low) * vocab_size * chunk

    # the gradients of the head and of its input, and the head's weights in lower precision
    head = vocab_size * config.n_embd
    gradients = 4 * config.n_embd * n_tokens
    if is_head_trained:
        gradients += 4 * head
    copy = 0
    if low < 4 and step.is_sharded:             # without shards it is among the copies
        copy = low * head
    return logits + gradients + copy


# For people

def describe_plan(model: nn.Module, step: Step, gpu: str, flops_per_second: float,
                  max_iters: int | None) -> list[str]:
    """A plan as lines of text.

    gpu: its name. flops_per_second: what is counted on, of each GPU. max_iters: steps of the whole
    run, or None where it has no end.
    """
    config = model.config
    n_parameters = sum(p.numel() for p in model.parameters())
    options = [step.dtype]
    options.append('compiled' if step.compile else 'not compiled')
    if step.recompute:
        options.append('activations recomputed')
    if step.gpus > 1:
        options.append(step.strategy)

    n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)

    lines = [
        f'plan         {step.gpus} x {gpu}, {", ".join(options)}; calculated, not measured',
        f'model        {n_parameters:,} parameters, a vocabulary of {config.vocab_size:,}',
        f'step         each GPU takes {step.micro_steps} times {step.micro_batch_size} x '
        f'{config.block_size:,} tokens',
    ]
    if n_trained < n_parameters:
        lines.append(f'training     {n_trained:,} of the parameters; the others are frozen')
    lines += memory_lines(plan_memory(model, step), step)

    # the time
    n_tokens = step.gpus * step.micro_steps * step.micro_batch_size * config.block_size
    rate = step.gpus * flops_per_second / model.flops_per_token()
    lines.append(f'speed        {rate:,.0f} tokens/s, {1000 * n_tokens / rate:,.0f} ms a step, at '
                 f'{flops_per_second / 1e12:.1f} TFLOP/s of a GPU')
    if max_iters:
        total = max_iters * n_tokens
        lines.append(f'run          {max_iters:,} steps read {short_number(total)} tokens in '
                     f'{format_duration(total / rate)}')
    return lines


def memory_lines(memory: MemoryPlan, step: Step) -> list[str]:
    """The parts of a MemoryPlan in GB, each on a line, and the GPU that has room for them."""
    throughout = [
        (memory.weights, 'weights'),
        (memory.gradients, 'gradients'),
        (memory.moments, f'moments of {step.optimizer}'),
    ]
    copies = f'weights in {step.dtype}'
    if step.is_sharded:
        copies = 'gathered weights'
    forward = [
        (memory.copies, copies),
        (memory.activations, 'activations'),
        (memory.loss, 'logits and loss'),
    ]
    backward = [(memory.new_gradients, 'gradients of a micro-batch')]

    lines = [f'memory       {memory.peak / GB:.1f} GB of a GPU at the most, of which']
    for when, parts in (('throughout', throughout), ('after forward', forward),
                        ('after backward', backward)):
        for n_bytes, name in parts:
            if n_bytes:
                lines.append(f'{n_bytes / GB:18.2f} {when:<14} {name}')

    needed = (1 + GAPS) * memory.peak + CUDA_BYTES
    fitting = [size for size in GPU_SIZES if size * GB >= needed]
    room = 'no GPU has room for this'
    if fitting:
        room = f'a GPU of {fitting[0]} GB has room for this'
    lines.append(f'room         {room}, 5% of gaps and 1 GB for CUDA')
    return lines


def format_duration(seconds: float) -> str:
    """'1.5 hours', in the largest unit of which there are at least two, or in minutes."""
    for size, unit in ((86400, 'days'), (3600, 'hours')):
        if seconds >= 2 * size:
            return f'{seconds / size:.1f} {unit}'
    return f'{seconds / 60:.1f} minutes'
