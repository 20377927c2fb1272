"""Operations of the training step with a backward of their own, for CPUs: they hold less, and
move less, than what autograd derives. model.py uses them where it `pays`.

On two cores of an AVX-512 CPU (2026-11-21) a step of GPT-2 124M on 4 x 256 tokens in float32 took
4.4 s with them, in a process of 2.5 GiB, and 5.3 to 5.9 s in 3.0 GiB without.
"""

import torch
import torch.nn.functional as F

# Logits held at once: 166 positions of GPT-2's vocabulary, 32 MiB. Beside a weight of higher precision
# four times as many, since each chunk's gradient is then added to the weight's in a pass over (V, C).
LOGITS_AT_ONCE = 2 ** 23
ENOUGH = 2 ** 20                # numbers, 4 MiB, from which on it pays


def pays(tensor, size):
    """True on the CPU of `tensor`, where PyTorch's own operation would hold `size` numbers that the
    lean one does not. For fewer than ENOUGH they make a step slower, by 2 to 4% for the README's small one.
    Not for torch.compile, whose own kernels took 4.4 s for the step above, and 5.0 s with these
    among them.
    """
    return size >= ENOUGH and tensor.device.type == 'cpu' and not torch.compiler.is_compiling()


class TiedEmbedding(torch.autograd.Function):
    """Rows idx (B, T) of weight (V, C), and weight once more for the output layer to use.

    The output layer's gradient then arrives here, where the rows' gradients are added to it in
    place: it is LinearCrossEntropy's own tensor, and nobody else's. Autograd would spread the rows
    over V x C zeros first.
    """

    @staticmethod
    def forward(ctx, weight, idx):
        ctx.save_for_backward(idx)
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_embeddings, d_weight):
        idx, = ctx.saved_tensors
        return d_weight.index_add_(0, idx.flatten(), d_embeddings.flatten(0, 1)), None


class GELULinear(torch.autograd.Function):
    """The linear layer of GELU(x), x (..., in): keeps x alone, and takes its GELU again in backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, approximate):
        ctx.approximate = approximate
        weight = weight.to(x.dtype)                             # as under autocast
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


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of x (N, C) times weight (V, C), targets (N,) with -1 not counting.

    Logits exist for one chunk of positions at a time, and their gradients are taken while
    they do, so neither memory nor bandwidth goes to N x V numbers, and nothing is computed
    twice. 1,024 positions of GPT-2 took 1.3 s, 1.8 s with whole logits, and 4.7 s with PyTorch 2.13's
    F.linear_cross_entropy in chunks.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        dtype = torch.get_autocast_dtype('cpu') if torch.is_autocast_enabled('cpu') else x.dtype
        x_low, w_low = x.to(dtype), weight.to(dtype)
        live = (targets >= 0).float()[:, None]                  # (N, 1)
        counted = live.sum()
        loss = torch.zeros((), dtype=torch.float32)
        d_x = torch.empty_like(x) if with_gradients else None
        d_weight = torch.zeros_like(weight) if with_gradients else None
        size = max(1, LOGITS_AT_ONCE * (1 if dtype == weight.dtype else 4) // len(weight))
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            logits = (x_low[rows] @ w_low.t()).float()          # (n, V)
            target = targets[rows].clamp(min=0)[:, None]        # (n, 1)
            top = logits.amax(dim=-1, keepdim=True)
            right = logits.gather(1, target) - top              # (n, 1)
            total = logits.sub_(top).exp_().sum(dim=-1, keepdim=True)
            loss += ((total.log() - right) * live[rows]).sum()
            if with_gradients:
                # now d loss / d logits but for 1 / counted, which would vanish in float16
                logits.mul_(live[rows] / total).scatter_add_(1, target, -live[rows])
                grads = logits.to(dtype)
                d_x[rows] = grads @ w_low
                if dtype == weight.dtype:
                    d_weight.addmm_(grads.t(), x_low[rows])     # without a second (V, C)
                else:
                    d_weight += grads.t() @ x_low[rows]
                del logits, grads                               # before the next ones are made
        ctx.save_for_backward(d_x, d_weight, counted)
        return loss / counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_x, d_weight, counted = ctx.saved_tensors
        scale = d_loss / counted
        return d_x.mul_(scale), d_weight.mul_(scale), None, None
