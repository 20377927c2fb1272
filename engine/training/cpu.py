"""What makes training on a CPU faster or leaner. It is put on a model from outside; the model has no part in it.

`optimize_for_training` replaces the loss and the forward of each MLP and RMSNorm. The results stay the same
but for rounding. Generation has engine.generation.cpu.
"""

from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.training import chunked_loss

MIN_ACTIVATIONS = 2 ** 20       # numbers in an MLP, 4 MiB; below this, GELULinear makes a step slower


def optimize_for_training(model):
    """Save fewer activations for the backward pass, and never hold whole logits.

    An MLP that does not compute c_proj(activation(c_fc(x))), with a GELU or a squared ReLU, keeps its own forward.
    """
    # glibc returns freed blocks to the system, and each one that is new costs a page fault per 4 KiB: 10% of a step of a
    # small model. Once a block of this size was freed, glibc keeps smaller ones, and up to 64 MB of free memory.
    torch.empty(31 * 2 ** 20, dtype=torch.uint8)
    chunked_loss.replace_loss(model)
    for norm in model.modules():
        if type(norm) is nn.RMSNorm:
            norm.forward = partial(rms_norm_forward, norm, norm.forward)
    for mlp in model.modules():
        layers = [getattr(mlp, name, None) for name in ('c_fc', 'c_proj', 'dropout')]
        if [type(layer) for layer in layers] == [nn.Linear, nn.Linear, nn.Dropout] and is_plain_mlp(mlp):
            mlp.forward = partial(mlp_forward, mlp, mlp.forward)


@torch.no_grad()
def is_plain_mlp(mlp):
    activation, x = getattr(mlp, 'activation', None), torch.linspace(-2, 2, 100)
    if type(activation) is not nn.GELU and not (callable(activation) and torch.equal(activation(x), F.relu(x).square())):
        return False
    x = torch.linspace(-1, 1, mlp.c_fc.in_features, dtype=mlp.c_fc.weight.dtype)
    was_training, _ = mlp.training, mlp.eval()
    found = mlp(x)
    mlp.train(was_training)
    return torch.allclose(found, mlp.c_proj(mlp.activation(mlp.c_fc(x))))


def mlp_forward(mlp, plain_forward, x):
    """MLP.forward by way of GELULinear, where that pays, or ReLU2Linear, if c_proj is still a plain Linear."""
    is_gelu, activations = type(mlp.activation) is nn.GELU, x.numel() // x.size(-1) * mlp.c_fc.out_features
    if is_gelu and activations < MIN_ACTIVATIONS or not torch.is_grad_enabled() or type(mlp.c_proj) is not nn.Linear:
        return plain_forward(x)
    arguments = mlp.c_fc(x), mlp.c_proj.weight, mlp.c_proj.bias
    y = GELULinear.apply(*arguments, mlp.activation.approximate) if is_gelu else ReLU2Linear.apply(*arguments)
    return mlp.dropout(y)


class GELULinear(torch.autograd.Function):
    """linear(gelu(x)) for x (..., in). Saves x alone and recomputes its GELU in the backward pass."""

    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        ctx.approximate = approximate
        weight = weight.to(x.dtype)                             # as autocast does
        ctx.save_for_backward(x, weight)
        return F.linear(F.gelu(x, approximate=approximate), weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        x, weight = ctx.saved_tensors
        rows = d_out.flatten(0, -2)                             # (N, out)
        d_weight = rows.t() @ F.gelu(x, approximate=ctx.approximate).flatten(0, -2)
        d_x = torch.ops.aten.gelu_backward(d_out @ weight, x, approximate=ctx.approximate)
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None, None


class ReLU2Linear(torch.autograd.Function):
    """linear(relu(x)^2) for x (..., in). Saves relu(x) alone. PyTorch's own backward pass of the square and the ReLU
    goes through memory about three times as often."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        positive, weight = F.relu(x), weight.to(x.dtype)        # as autocast does it
        ctx.save_for_backward(positive, weight)
        return F.linear(positive.square(), weight, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        positive, weight = ctx.saved_tensors
        rows = d_out.flatten(0, -2)                             # (N, out)
        d_weight = rows.t() @ positive.square().flatten(0, -2)
        d_x = (2 * d_out @ weight).mul_(positive)
        return d_x, d_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def rms_norm_forward(norm, plain_forward, x):
    """RMSNorm.forward by way of FewPassRMSNorm, where a backward pass will follow."""
    if x.dtype != torch.float32 or not torch.is_grad_enabled():
        return plain_forward(x)
    y = FewPassRMSNorm.apply(x, norm.eps)
    return y if norm.weight is None else y * norm.weight


class FewPassRMSNorm(torch.autograd.Function):
    """x (..., C) divided by its root mean square. PyTorch's own is made of many small operations on a CPU, and
    takes about twice as long with its backward pass."""

    @staticmethod
    def forward(ctx, x, eps):
        mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.size(-1)
        scale = (mean_square + eps).rsqrt()                     # (..., 1)
        y = x * scale
        ctx.save_for_backward(y, scale)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        y, scale = ctx.saved_tensors
        along_y = (d_y * y).mean(dim=-1, keepdim=True)
        return torch.addcmul(d_y, y, along_y, value=-1).mul_(scale), None
