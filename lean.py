"""Operations of the training step with a backward of their own, for CPUs: they hold less, and
move less, than the ones that autograd derives. model.py uses them where `fits` says so.

On two cores of an AVX-512 CPU (2026-11-21), GPT-2 124M at 4 x 256 tokens in float32: MEASURED
"""

import torch
import torch.nn.functional as F

# Logits held at once in float32: 166 positions of GPT-2's vocabulary, 32 MiB. 16 bits take four
# times as many, since each chunk's gradient is added to the float32 one in a pass over (V, C).
LOGITS_AT_ONCE = 2 ** 23


def fits(tensor):
    """True on a CPU that runs the model as it is written: a compiler fuses for itself."""
    return tensor.device.type == 'cpu' and not torch.compiler.is_compiling()


class TiedEmbedding(torch.autograd.Function):
    """Rows idx (B, T) of weight (V, C), and weight once more for the output layer to use.

    Its gradient arrives here from there, and the rows' gradients are added to it in place.
    Autograd would spread them over V x C zeros first.
    """

    @staticmethod
    def forward(ctx, weight, idx):
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_rows, d_weight):
        idx, = ctx.saved_tensors
        return d_weight.index_add_(0, idx.flatten(), d_rows.flatten(0, 1)), None


class GELULinear(torch.autograd.Function):
    """The linear layer of GELU(x), x (..., in): keeps x alone, and takes its GELU again in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        ctx.approximate, weight = approximate, weight.to(x.dtype)   # as autocast has it
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


class CrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) times weight (V, C), targets (N,) with -1 not counting.

    Logits exist for one chunk of positions at a time, and their gradients are taken while
    they do, so neither memory nor bandwidth goes to N x V numbers, and nothing is computed
    twice.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        x_low, w_low = x.to(dtype), weight.to(dtype)
        counted = (targets >= 0).sum()
        loss = torch.zeros((), dtype=torch.float32)
        d_x = torch.empty_like(x) if with_gradients else None
        d_weight = torch.zeros_like(weight) if with_gradients else None
        size = max(1, LOGITS_AT_ONCE * (1 if dtype == torch.float32 else 4) // len(weight))
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            logits = (x_low[rows] @ w_low.t()).float()          # (n, V)
            target = targets[rows].clamp(min=0)[:, None]        # (n, 1)
            live = (targets[rows] >= 0).float()[:, None]
            top = logits.amax(dim=-1, keepdim=True)
            label = logits.gather(1, target) - top              # (n, 1)
            total = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
            loss += ((total.log() - label) * live).sum()
            if with_gradients:
                # now d loss / d logits but for 1 / counted, which would vanish in float16
                logits.mul_(live / total).scatter_add_(1, target, -live)
                grads = logits.to(dtype)
                d_x[rows] = grads @ w_low
                if dtype == d_weight.dtype:
                    d_weight.addmm_(grads.t(), x_low[rows])     # without a second (V, C)
                else:
                    d_weight += grads.t() @ x_low[rows]
                del logits, grads                               # before the next ones are made
        ctx.save_for_backward(d_x, d_weight, counted)
        return loss / counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream):
        d_x, d_weight, counted = ctx.saved_tensors
        scale = upstream / counted
        return d_x * scale, d_weight.mul_(scale), None, None
