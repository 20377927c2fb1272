"""What makes generation on a CPU faster. It is put on a model from outside; the model has no part in it.

Most of a token's time goes into reading the weights from memory. `optimize_for_generation` stores them in the layout
that is read fastest, in the model's precision. Everything else becomes float32, in which a CPU computes fastest.
It also replaces how a Block reads one token.
"""

import statistics
import time
from functools import partial
from itertools import accumulate

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.generation.kv_cache import KVCache
from engine.positions import alibi_bias, rotary_angles, rotate

PARTS = 8                       # of a SplitLinear's inputs; 2 and 4 were up to 5% slower


# Layouts of a weight. Each takes and returns float32. Where the platform or the precision does not have one, it
# raises RuntimeError or AttributeError.

class PlainLinear(nn.Module):
    """A Linear with its weight as it is."""

    def __init__(self, linear, batch_size):
        super().__init__()
        self.weight, self.bias = without_grad(linear)
        self.dtype = self.weight.dtype

    def forward(self, x):                                       # (..., in)
        if self.dtype == torch.float32:
            return product_of_rows(x, self.weight, self.bias)
        if x.numel() == x.size(-1):
            return self.row(x.to(self.dtype)).float()
        if self.dtype == torch.float16:                         # few CPUs multiply several rows fast in float16
            return product_of_rows(x, self.weight.float(), None if self.bias is None else self.bias.float())
        return F.linear(x.bfloat16(), self.weight, self.bias).float()

    def row(self, x):
        """The product with one row, by PyTorch's own code instead of oneDNN: it reads bfloat16 twice as fast."""
        if self.dtype == torch.float16 and self.bias is not None:           # 5% faster than F.linear
            return without_onednn(torch.addmv, self.bias, self.weight, x.reshape(-1)).view(*x.shape[:-1], -1)
        return without_onednn(F.linear, x, self.weight, self.bias)


class SplitLinear(nn.Module):
    """A Linear in float32 that stores its weight as (in, out). It multiplies one row in PARTS parts of the inputs
    and adds the results, so that each core reads memory in order."""

    def __init__(self, linear, batch_size):
        super().__init__()
        if linear.weight.dtype != torch.float32 or batch_size > 1 or linear.in_features % PARTS:
            raise RuntimeError('a SplitLinear is for one row in float32')
        weight, self.bias = without_grad(linear)
        self.weight = weight.t().contiguous()
        self.parts = self.weight.view(PARTS, -1, linear.out_features)

    def forward(self, x):                                       # (..., in)
        if x.numel() > x.size(-1):
            return product_of_rows(x, self.weight.t(), self.bias)
        y = torch.bmm(x.reshape(PARTS, 1, -1), self.parts).sum(0)   # (1, out)
        return (y if self.bias is None else y.add_(self.bias)).view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """A Linear that stores its weight in oneDNN's blocks for products with batch_size rows.
    torch.compile packs weights with the same operators."""

    def __init__(self, linear, batch_size):
        super().__init__()
        weight, self.bias = without_grad(linear)
        self.dtype, self.weight = weight.dtype, torch.ops.mkldnn._reorder_linear_weight(weight, batch_size)

    def forward(self, x):                                       # (..., in)
        return torch.ops.mkldnn._linear_pointwise(x.to(self.dtype), self.weight, self.bias, 'none', [], '').float()


class Float16Linear(nn.Module):
    """A Linear that stores its weight in float16 in FBGEMM's blocks, and multiplies float32 with it."""

    def __init__(self, linear, batch_size):
        super().__init__()
        if linear.weight.dtype != torch.float16:
            raise RuntimeError('a Float16Linear is for weights in float16')
        weight, bias = without_grad(linear)
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())

    def forward(self, x):                                       # (..., in)
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


LAYOUTS = [PlainLinear, SplitLinear, PackedLinear, Float16Linear]


def without_onednn(function, *arguments):
    """The function's result by PyTorch's own code."""
    was_enabled = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = False
    try:
        return function(*arguments)
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def without_grad(linear):
    """Its weight and bias as plain tensors: a module finds them faster than parameters."""
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def product_of_rows(x, weight, bias):
    """F.linear in float32, by oneDNN where PyTorch has it: faster than F.linear's MKL on AMD."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, 'none', [], '')
    return F.linear(x, weight, bias)


class Lookup(nn.Module):
    """An Embedding that returns float32, whatever its weight is stored in."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight

    def forward(self, idx):
        return F.embedding(idx, self.weight).float()


@torch.no_grad()
def optimize_for_generation(model, batch_size):
    """Store the weights of each shape in the layout that multiplies batch_size rows fastest, as measured here, and
    read one token in fewer operations. After this, the model can neither be trained nor saved nor moved."""
    replace_linears(model, batch_size)
    model.transformer.wte = Lookup(model.transformer.wte)
    for module in model.modules():
        if not isinstance(module, Lookup):
            for p in module.parameters(recurse=False):
                p.data = p.data.float()
    for block in model.transformer.h:
        try:
            step = one_token_step(block, model.config)
        except (AttributeError, RuntimeError, TypeError):       # a block of other parts
            step = None
        if step:
            block.forward = partial(block_forward, block, block.forward, step)


def replace_linears(model, batch_size):
    """Store each Linear of the model in the layout that is fastest for its shape."""
    shapes = {}                                                 # shape: [(parent, name, Linear)]
    for parent in model.modules():
        for name, layer in parent.named_children():
            if type(layer) is nn.Linear:
                shapes.setdefault(layer.weight.shape, []).append((parent, name, layer))
    for shape, places in shapes.items():
        others = [layer.weight for other, group in shapes.items() if other != shape for _, _, layer in group]
        layers = in_fastest_layout([layer for _, _, layer in places], batch_size, others)
        for (parent, name, _), layer in zip(places, layers):
            setattr(parent, name, layer)


def in_fastest_layout(linears, batch_size, others):
    """The Linears, all of one shape, in the layout that multiplies batch_size rows fastest: by the median of several
    rounds with the first 64 MiB of them.

    The layouts take turns, so that other programs slow all of them. Before each measurement, about 128 MiB of
    `others`, weights of other shapes, are read: layers measured alone may stay in the processor's cache, where
    every layout is fast.
    """
    n_measured = n_up_to(2 ** 26, [linear.weight for linear in linears])
    others = others[:n_up_to(2 ** 27, others)]
    x, layers = torch.ones(batch_size, 1, linears[0].in_features), {}
    for layout in LAYOUTS:
        try:
            built = [layout(linear, batch_size) for linear in linears[:n_measured]]
            built[0](x)
        except (RuntimeError, AttributeError):                  # not on this platform or in this precision
            continue
        layers[layout] = built
    seconds, began = {layout: [] for layout in layers}, time.perf_counter()
    for i in range(10):
        if i >= 3 and time.perf_counter() - began > 0.1 * len(layers):
            break
        for layout, built in layers.items():
            for weight in others:
                torch.empty(0, dtype=torch.uint8).set_(weight.untyped_storage()).amax()     # the fastest way to read it
            start = time.perf_counter()
            for layer in built:
                layer(x)
            seconds[layout].append(time.perf_counter() - start)
    best = min(layers, key=lambda layout: statistics.median(seconds[layout]))
    return layers[best] + [best(linear, batch_size) for linear in linears[n_measured:]]


def n_up_to(n_bytes, weights):
    """How many of the first weights hold n_bytes: all of them, if they are smaller."""
    return 1 + sum(end < n_bytes for end in accumulate(weight.nbytes for weight in weights[:-1]))


# One token through a Block, in fewer operations

def one_token_step(block, config):
    """A function (x, kv_cache, rotation, attn_bias) with the result of Block.forward for one token of each sequence.
    None if two tokens show that its result differs: a changed block keeps its own forward."""
    attn, mlp = block.attn, block.mlp
    ln_1, ln_2 = norm_function(block.ln_1), norm_function(block.ln_2)
    # The forward of a module takes less time than a call of it.
    c_attn, c_proj, c_fc, mlp_proj, activation = (getattr(layer, 'forward', layer) for layer in (
        attn.c_attn, attn.c_proj, mlp.c_fc, mlp.c_proj, mlp.activation))

    def step(x, kv_cache, rotation, attn_bias):                 # (B, 1, C)
        heads = c_attn(ln_1(x)).view(x.size(0), -1, 1, config.head_size)
        q, k, v = heads.split([attn.n_head, attn.n_kv_head, attn.n_kv_head], dim=1)     # each (B, H or G, 1, D)
        if config.qk_norm:
            q, k = attn.q_norm(q), attn.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        y = kv_cache.attend(q, k, v, attn_bias)                 # (B, H, 1, D)
        x = x + c_proj(y.reshape(x.shape))
        return x + mlp_proj(activation(c_fc(ln_2(x))))

    c, results = config, []
    x = torch.linspace(-1, 1, 2 * c.n_embd).view(2, 1, 1, c.n_embd)     # two tokens of one sequence
    for function in (step, block):
        kv_cache = KVCache(1, c.kv_heads, 2, c.head_size, x)
        for i in range(2):
            position = torch.tensor([i])
            rotation = rotary_angles(position, c.head_size, c.rope_theta) if c.position == 'rotary' else None
            attn_bias = alibi_bias(position, i + 1, c.n_head) if c.position == 'alibi' else None
            results.append(function(x[i], kv_cache, rotation, attn_bias))
    return step if torch.allclose(torch.cat(results[:2]), torch.cat(results[2:]), 1e-4, 1e-5) else None


def norm_function(norm):
    """The forward of a norm. That of a LayerNorm skips the lookups of F.layer_norm."""
    if type(norm) is not nn.LayerNorm:
        return norm.forward
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def block_forward(block, plain_forward, step, x, kv_cache=None, rotation=None, attn_bias=None):
    if kv_cache is None or x.size(1) > 1 or block.training:
        return plain_forward(x, kv_cache, rotation, attn_bias)
    if x.size(0) > 1:
        return step(x, kv_cache, rotation, attn_bias)
    return without_onednn(step, x, kv_cache, rotation, attn_bias)   # oneDNN's exact GELU of one row takes 3 times as long
