"""Generating token by token: a cache of keys and values, weight layouts, and the draw.

Apart from model.py, so that a reader of the training path need not pass through it.
`GPT.generate` and `GPT.stream` are the ways in.
"""

import statistics
import time
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F


class Memory:
    """Keys and values of the positions read so far, for one layer, in buffers made once.

    On a CPU they are float32 whatever the weights are: attention of one query over 432
    positions of GPT-2 takes 36 us then, and 237 or 367 us in bfloat16 or float16 (AVX-512).
    That is 72 KiB a position for 124M.
    """

    def __init__(self, B, H, positions, D, like):
        dtype = torch.float32 if like.device.type == 'cpu' else like.dtype
        self.keys = like.new_zeros(B, H, positions, D, dtype=dtype)
        self.values = like.new_zeros(B, H, positions, D, dtype=dtype)
        self.length = 0

    def attend(self, q, k, v):
        """Attention of T queries over what is held and T new positions; all (B, H, T, D)."""
        T, end = q.size(2), self.length + q.size(2)
        # Several queries behind earlier keys would need a mask of their own; nothing asks for it.
        assert T == 1 or self.length == 0
        self.keys[:, :, self.length:end] = k
        self.values[:, :, self.length:end] = v
        self.length = end
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, is_causal=T > 1).to(q.dtype)


class FixedMemory(Memory):
    """The same with shapes that never change, for a compiled step: it attends over the whole
    buffers, and a mask hides what is not written yet."""

    position = None                                             # (1,) tensor while a step runs

    def __init__(self, *shape_and_like):
        super().__init__(*shape_and_like)
        for buffer in (self.keys, self.values):
            torch._dynamo.mark_static_address(buffer)           # a CUDA graph may write to them

    def attend(self, q, k, v):
        if self.position is None:
            return super().attend(q, k, v)
        dtype = self.keys.dtype
        self.keys.index_copy_(2, self.position, k.to(dtype))
        self.values.index_copy_(2, self.position, v.to(dtype))
        seen = torch.arange(self.keys.size(2), device=q.device) <= self.position
        return F.scaled_dot_product_attention(q.to(dtype), self.keys, self.values, attn_mask=seen[None]).to(q.dtype)


@torch.inference_mode()
def stream(model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=1.0,
           noise=None, vocab_size=None, exact_window=False, compile=False):
    """Yield max_new_tokens times the next token of every sequence, (B,), after idx (B, T).

    temperature: 0 takes the likeliest token. top_k: draw among the k likeliest; None or 0
    for all. top_p: draw among the likeliest that together reach this probability. noise:
    (B, max_new_tokens) uniform numbers in [0, 1), one for each draw; None takes them from
    torch's global generator. vocab_size: ids from there on (the padding of the embedding)
    are never drawn. compile: compile the step that reads one token.

    Learned positions cannot slide in a cache. Once block_size is full, the last half of it
    is read again and the cache goes on from there, which costs one pass per half block;
    exact_window=True reads the whole last window again for every token instead.
    """
    if temperature < 0 or (top_k or 0) < 0 or not 0 < top_p <= 1:
        raise ValueError(f'temperature={temperature} and top_k={top_k} cannot be negative, '
                         f'top_p={top_p} should be above 0 and at most 1')
    B, block_size = idx.size(0), model.config.block_size
    if noise is None:
        noise = torch.rand(B, max_new_tokens, device=idx.device)
    noise = noise.t().unsqueeze(2).contiguous()                 # (max_new_tokens, B, 1)
    window = unread = idx[:, -block_size:]
    H, D = model.config.n_head, model.config.n_embd // model.config.n_head
    room = window.size(1) + max_new_tokens
    room = min(block_size, -(-room // 256) * 256 if compile else room)  # few sizes to compile for
    memories = [(FixedMemory if compile else Memory)(B, H, room, D, model.transformer.wte.weight)
                for _ in model.transformer.h]
    step = compiled_step(model, memories) if compile else None
    for i in range(max_new_tokens):
        if memories[0].length + unread.size(1) > block_size:
            unread = window[:, -(block_size if exact_window else -(-block_size // 2)):]
            for memory in memories:
                memory.length = 0
        x = step(unread) if step and memories[0].length else model.hidden(unread, memories)
        logits = model.lm_head(x[:, -1]).float()[:, :vocab_size]                 # (B, V)
        unread = draw(logits, temperature, top_k, top_p, noise[i])[:, None]      # (B, 1)
        window = torch.cat([window, unread], dim=1)[:, -block_size:]
        yield unread[:, 0]


def compiled_step(model, memories):
    """A function from (B, 1) tokens to (B, 1, C), compiled; with CUDA graphs on a GPU, where
    launching the small kernels of one token takes longer than running them."""
    fixed = torch.compile(model.hidden, mode='reduce-overhead', fullgraph=True, dynamic=False)
    position = torch.zeros(1, dtype=torch.long, device=memories[0].keys.device)

    def step(token):
        position.fill_(memories[0].length)
        for memory in memories:
            memory.position = position
        x = fixed(token, memories, position).clone()            # the graph's output is written over
        for memory in memories:
            memory.position = None
            memory.length += 1
        return x
    return step


def draw(logits, temperature, top_k, top_p, noise):
    """One token per row, (B,), from logits (B, V); noise (B, 1) decides, the same noise alike."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if top_k and top_k < logits.size(-1) or top_p < 1:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # descending
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature            # no overflow near 0
    upto = logits.softmax(dim=-1).cumsum(dim=-1)                # (B, V or k)
    total = upto[:, -1:]
    if top_p < 1:                                               # nucleus sampling, arXiv:1904.09751
        fewest = torch.searchsorted(upto, total * top_p).clamp(max=upto.size(-1) - 1)
        total = upto.gather(1, fewest)
    # rounding leaves the total a hair from 1; after the division every noise below 1 finds a token
    picked = torch.searchsorted(upto / total, noise, right=True)
    return (picked if ids is None else ids.gather(1, picked))[:, 0]


# Layout of the weights

class TransposedLinear(nn.Module):
    """A Linear whose weight lies (in, out), so that one row times it reads memory in order."""

    def __init__(self, linear, B):
        super().__init__()
        self.weight, self.bias = linear.weight.detach().t().contiguous(), linear.bias

    def forward(self, x):                                       # (B, T, in)
        y = x @ self.weight
        return y if self.bias is None else y + self.bias


class PackedLinear(nn.Module):
    """A Linear whose weight lies in the blocks that oneDNN multiplies B rows by. These are the
    operators that torch.compile packs weights with; a PyTorch without them raises."""

    def __init__(self, linear, B):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), B)
        self.bias = linear.bias

    def forward(self, x):                                       # (B, T, in)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')


@torch.no_grad()
def lay_out(model, B):
    """Keep the weights of each shape in the layout that multiplies B rows fastest on this CPU,
    measured here. The model then generates faster, and is no longer to be trained or saved.

    On two cores of an AVX-512 CPU at B=1, GPT-2's blocks in float32 take 18.6 ms as they are, 15.8 ms
    transposed and 10.0 ms packed; in float16 they are fastest as they are, 3.5 ms.
    """
    shapes = {}                                                 # shape: [(parent, name, Linear)]
    for parent in model.modules():
        for name, layer in parent.named_children():
            if isinstance(layer, nn.Linear):
                shapes.setdefault(layer.weight.shape, []).append((parent, name, layer))
    weights = {shape: [layer.weight for _, _, layer in places] for shape, places in shapes.items()}
    for shape, places in shapes.items():
        x = torch.ones(B, 1, shape[1], dtype=places[0][2].weight.dtype)
        others = [w for other, group in weights.items() if other != shape for w in group]
        best, fastest = None, median_seconds([layer for _, _, layer in places], x, others)
        for layout in (TransposedLinear, PackedLinear):
            try:
                layers = [layout(layer, B) for _, _, layer in places]
                seconds = median_seconds(layers, x, others)
            except (RuntimeError, AttributeError):              # not on this platform or in this precision
                continue
            if seconds < 0.95 * fastest:
                best, fastest = layers, seconds
        for (parent, name, _), layer in zip(places, best or ()):
            setattr(parent, name, layer)


def median_seconds(layers, x, others):
    """Of all layers of a shape in turn, each time after reading about 128 MiB of the other weights: by
    themselves they may stay in the processor's cache, where every layout is fast."""
    upto = list(accumulate(weight.nbytes for weight in others))
    enough = others[:1 + sum(read < 2 ** 27 for read in upto)]
    seconds = []
    while len(seconds) < 3 or len(seconds) < 10 and sum(seconds) < 0.1:
        for weight in enough:
            weight.sum()
        began = time.perf_counter()
        for layer in layers:
            layer(x)
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])                       # the first set up and paged in
