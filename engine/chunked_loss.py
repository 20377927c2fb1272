"""Cross-entropy of a linear head without whole logits: less memory, and on a CPU less time.

PyTorch's own operations hold (positions, vocabulary) numbers several times over: 0.2 GB for every
1,024 positions of GPT-2, each time. Under torch.compile they are fused, and are the better choice.
"""

import torch

CHUNK_LOGITS = {'cpu': 2 ** 23, 'cuda': 2 ** 28}    # logits held at once: 166 and 5,336 positions of GPT-2's vocabulary
MIN_LOGITS = 2 ** 20        # below this, PyTorch's own operations are faster


def replace_loss(model):
    """Make `model.loss_fn` return (None, loss) in chunks wherever there are at least MIN_LOGITS logits.

    A model whose `logits` is not a plain product with `lm_head.weight` keeps its own loss_fn.
    """
    weight, whole_loss = model.lm_head.weight, model.loss_fn
    with torch.no_grad():
        # Large numbers, so that a soft cap shows.
        x = torch.linspace(-1e3, 1e3, weight.size(1), device=weight.device, dtype=weight.dtype)[None, None]
        if not torch.allclose(model.logits(x), torch.nn.functional.linear(x, weight)):
            return

    def loss_fn(x, targets):
        if targets.numel() * len(model.lm_head.weight) < MIN_LOGITS:
            return whole_loss(x, targets)
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), model.lm_head.weight, targets.flatten(),
                                              torch.is_grad_enabled())
    model.loss_fn = loss_fn


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits x @ weight.T, for x (N, C), weight (V, C) and targets (N,), where
    targets of -1 do not count. Returns a float32 scalar in nats.

    The logits of one chunk of positions exist at a time. The forward pass also takes their
    gradients, so nothing is computed twice. Precision follows autocast.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        x_low, w_low = x.to(dtype), weight.to(dtype)
        counts = (targets >= 0).float()[:, None]                # (N, 1)
        n_counted = counts.sum()
        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        d_x = torch.empty_like(x) if with_gradients else None
        d_weight = torch.zeros_like(weight) if with_gradients else None
        # With a weight of higher precision, adding a chunk's gradient takes a pass over (V, C): larger chunks.
        size = max(1, CHUNK_LOGITS.get(kind, 2 ** 25) * (1 if dtype == weight.dtype else 4) // len(weight))
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            logits = (x_low[rows] @ w_low.t()).float()          # (n, V)
            target = targets[rows].clamp(min=0)[:, None]        # (n, 1)
            largest = logits.amax(dim=-1, keepdim=True)
            target_logit = logits.gather(1, target) - largest   # (n, 1)
            total = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
            loss += ((total.log() - target_logit) * counts[rows]).sum()
            if with_gradients:
                # Now d loss / d logits, but for 1 / n_counted, which would become zero in float16.
                logits.mul_(counts[rows] / total).scatter_add_(1, target, -counts[rows])
                grads = logits.to(dtype)
                d_x[rows] = (grads @ w_low).to(x.dtype)
                if dtype == weight.dtype:
                    d_weight.addmm_(grads.t(), x_low[rows])     # without a second (V, C)
                else:
                    d_weight += grads.t() @ x_low[rows]
                del logits, grads                               # before the next ones are made
        # On ctx rather than by save_for_backward, so that backward gives away the only reference to
        # d_weight: autograd then adds the embedding's gradient in place, without a third (V, C) tensor.
        ctx.gradients = d_x, d_weight, n_counted
        return loss / n_counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        (d_x, d_weight, n_counted), ctx.gradients = ctx.gradients, None
        scale = d_loss / n_counted
        return d_x.mul_(scale), d_weight.mul_(scale), None, None
