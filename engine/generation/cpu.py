"""Layouts of weights that a CPU reads faster than those of nn.Linear, for generation.

Most of a token's time goes into reading the weights from memory. `optimize_for_generation` stores
the weight of each Linear in a layout that depends only on the precision and the number of
sequences. So a command gives the same text each time. With another number of sequences at once, a
text may change, because sums round differently: a layout that is fast for one row adds the products
in another order than one that is fast for several.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

PARTS = 8               # of the inputs of a SplitLinear; 2 and 4 were up to 5% slower


@torch.no_grad()
def optimize_for_generation(model: nn.Module, batch_size: int) -> None:
    """Store the weights of `model` as a CPU reads them fastest for products with batch_size rows.

    Linears and embeddings keep the model's precision, and return float32. All other parameters
    become float32, in which a CPU computes fastest. A class derived from nn.Linear stays as it
    is. After this, the model can neither be trained nor saved nor moved to another device.
    """
    layout = choose_layout(next(model.parameters()).dtype, batch_size)
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                setattr(parent, name, layout(layer))
            elif type(layer) is nn.Embedding:
                setattr(parent, name, Lookup(layer))

    for parameter in model.parameters():
        parameter.data = parameter.data.float()


def choose_layout(dtype: torch.dtype, batch_size: int) -> type[nn.Module]:
    """The layout for a precision and a number of rows, among those that this build of PyTorch has.

    docs/benchmarks.md says how they compare.
    """
    if dtype == torch.float16:
        if 'fbgemm' in torch.backends.quantized.supported_engines:
            return Float16Linear
        return PlainLinear

    if batch_size == 1:
        if dtype == torch.float32:
            return SplitLinear
        return PlainLinear

    if onednn_packs(dtype):
        return PackedLinear
    return PlainLinear


@contextmanager
def one_token_kernels(idx: torch.Tensor) -> Iterator[None]:
    """Turn oneDNN off while a model reads idx (B, T), if this is a single token on a CPU.

    PyTorch's own code is faster for one row, which shows in small models. docs/benchmarks.md has
    the figures.
    """
    was_enabled = torch.backends.mkldnn.enabled
    if idx.device.type == 'cpu' and idx.numel() == 1:
        torch.backends.mkldnn.enabled = False
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = was_enabled


def onednn_packs(dtype: torch.dtype) -> bool:
    """Whether oneDNN is part of this PyTorch and packs weights of float32 or bfloat16 on this
    CPU."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


# The layouts: each is made of an nn.Linear, takes float32 (..., in) and returns float32 (..., out).
# Their weights are plain tensors, as a module looks these up faster than parameters.

class PlainLinear(nn.Module):
    """The weight as it is."""

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = detached_bias(linear)

    def forward(self, x):
        x = x.to(self.weight.dtype)
        is_one_row = x.numel() == x.size(-1)
        if self.weight.dtype == torch.float16 and not is_one_row:
            # few CPUs multiply several rows fast in float16
            bias = None if self.bias is None else self.bias.float()
            return F.linear(x.float(), self.weight.float(), bias)
        return F.linear(x, self.weight, self.bias).float()


class SplitLinear(nn.Module):
    """The weight of float32 as (in, out), in PARTS parts of the inputs.

    One row is multiplied part by part, and the results are added. This way each core reads memory
    in order.
    """

    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight.detach().t().contiguous()   # (in, out)
        self.bias = detached_bias(linear)
        self.parts = None                                       # (PARTS, in / PARTS, out)
        if linear.in_features % PARTS == 0:
            self.parts = self.weight.view(PARTS, -1, linear.out_features)

    def forward(self, x):
        if self.parts is None or x.numel() > x.size(-1):
            return F.linear(x, self.weight.t(), self.bias)

        y = torch.bmm(x.reshape(PARTS, 1, -1), self.parts).sum(0)   # (1, out)
        if self.bias is not None:
            y.add_(self.bias)
        return y.view(*x.shape[:-1], -1)


class PackedLinear(nn.Module):
    """The weight of float32 or bfloat16 in oneDNN's blocks. torch.compile uses the same
    operators."""

    def __init__(self, linear):
        super().__init__()
        self.dtype = linear.weight.dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
        self.bias = detached_bias(linear)

    def forward(self, x):
        x = x.to(self.dtype)
        y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, 'none', [], '')
        return y.float()


class Float16Linear(nn.Module):
    """The weight of float16 in FBGEMM's blocks, which multiply float32."""

    def __init__(self, linear):
        super().__init__()
        bias = detached_bias(linear)
        if bias is not None:
            bias = bias.float()
        weight = linear.weight.detach().float()
        self.packed = torch.ops.quantized.linear_prepack_fp16(weight, bias)

    def forward(self, x):
        return torch.ops.quantized.linear_dynamic_fp16(x, self.packed)


class Lookup(nn.Module):
    """An Embedding that returns float32, whatever its weight is stored in."""

    def __init__(self, embedding):
        super().__init__()
        self.weight = embedding.weight.detach()

    def forward(self, idx):
        return F.embedding(idx, self.weight).float()


def detached_bias(linear):
    if linear.bias is None:
        return None
    return linear.bias.detach()
