"""Cross-entropy of a linear head without whole logits, to save memory.

PyTorch's own operations hold (positions, vocabulary) numbers several times over: 0.2 GB for every
1,024 positions of GPT-2, each time. Under torch.compile they are fused, and are the better choice.
"""

import torch

# Logits that are held at once. Where autocast lowers the precision, they are four times as many.
# With GPT-2's vocabulary that makes 166 or 667 positions on a CPU, and 1,334 or 5,336 on a GPU.
# Other devices take no chunks. docs/benchmarks.md says what smaller chunks cost.
CHUNK_LOGITS = {'cpu': 2 ** 23, 'cuda': 2 ** 26}
MIN_LOGITS = 2 ** 20        # below this, PyTorch's own operations are faster


def is_worth_chunking(n_positions: int, weight: torch.Tensor) -> bool:
    """Whether chunked_cross_entropy is the better choice for so many positions and the weight
    (V, C) of the head."""
    if torch.compiler.is_compiling():
        return False
    return weight.device.type in CHUNK_LOGITS and n_positions * len(weight) >= MIN_LOGITS


def chunked_cross_entropy(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor,
                          softcap: float) -> torch.Tensor:
    """The mean cross-entropy in nats, a float32 scalar, of the logits x @ weight.T.

    x: (B, T, C), the output of the last layer. weight: (V, C), that of the head.
    targets: (B, T) token ids, -1 where a position does not count.
    softcap: if not 0, the logits are softcap * tanh(logits / softcap).

    The logits of one chunk of positions exist at a time. The products have the precision of
    autocast, or else that of x. If gradients are enabled, the forward pass computes them too, so
    that no logit is computed twice. The loss can be differentiated once.
    """
    with_gradients = torch.is_grad_enabled()
    return LinearCrossEntropy.apply(
        x.flatten(0, 1), weight, targets.flatten(), softcap, with_gradients)


class LinearCrossEntropy(torch.autograd.Function):
    """chunked_cross_entropy for x (N, C) and targets (N,).

    with_gradients: whether a backward pass may follow. forward could not tell, because PyTorch
    disables gradients while it runs.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, with_gradients):
        dtype = product_dtype(x)
        x_low = x.to(dtype)
        weight_low = weight.to(dtype)
        is_counted = (targets >= 0).float()[:, None]            # (N, 1)
        n_counted = is_counted.sum()

        loss = torch.zeros((), dtype=torch.float32, device=x.device)
        d_x = None
        d_weight = None
        if with_gradients:
            d_x = torch.empty_like(x)
            if ctx.needs_input_grad[1]:                         # a frozen head gets none
                d_weight = torch.zeros_like(weight)

        size = positions_in_a_chunk(weight, dtype)
        for first in range(0, len(x), size):
            rows = slice(first, first + size)
            chunk_loss, d_logits = chunk_loss_and_gradient(
                x_low[rows], weight_low, targets[rows], is_counted[rows], softcap,
                with_gradients)
            loss += chunk_loss
            if with_gradients:
                d_x[rows] = (d_logits @ weight_low).to(x.dtype)
            if d_weight is not None:
                add_product(d_weight, d_logits.t(), x_low[rows])
            del d_logits                                        # before the next chunk's are made

        ctx.save_for_backward(d_x, d_weight, n_counted)
        return loss / n_counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_x, d_weight, n_counted = ctx.saved_tensors
        scale = d_loss / n_counted
        if d_weight is not None:
            d_weight.mul_(scale)
        return d_x.mul_(scale), d_weight, None, None, None


def product_dtype(x):
    """The precision in which a product with x is computed: that of autocast, or else that of x."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def positions_in_a_chunk(weight, dtype):
    """How many positions a chunk has, for a weight (V, C) whose products are computed in dtype."""
    n_logits = CHUNK_LOGITS[weight.device.type]
    if dtype != weight.dtype:
        # add_product then takes one more pass over (V, C) for each chunk, so they should be fewer.
        n_logits *= 4
    return max(1, n_logits // len(weight))


def chunk_loss_and_gradient(x, weight, targets, is_counted, softcap, with_gradient):
    """The sum of the losses of n positions, and its gradient with respect to their logits, (n, V).

    x: (n, C). weight: (V, C). targets: (n,).
    is_counted: (n, 1), 1 where a position counts and 0 where it does not.
    The gradient has the precision of x. It is None if with_gradient is False.
    """
    logits = (x @ weight.t()).float()                           # (n, V)
    if softcap:
        squeezed = logits.div_(softcap).tanh_()
        logits = squeezed * softcap

    # The loss: the logarithm of the sum of exponentials, less the logit of the target.
    target = targets.clamp(min=0)[:, None]                      # (n, 1)
    largest = logits.amax(dim=-1, keepdim=True)
    target_logit = logits.gather(1, target) - largest           # (n, 1)
    exponentials = logits.sub_(largest).exp_()
    total = exponentials.sum(dim=-1, keepdim=True)
    loss = ((total.log() - target_logit) * is_counted).sum()
    if not with_gradient:
        return loss, None

    # The gradient: the probabilities, less 1 at the target. It is of the sum, not of the mean, as
    # a division by the number of positions would turn it into zero in float16.
    d_logits = exponentials.mul_(is_counted / total).scatter_add_(1, target, -is_counted)
    if softcap:
        d_logits.addcmul_(d_logits * squeezed, squeezed, value=-1)      # times 1 - tanh^2
    return loss, d_logits.to(x.dtype)


def add_product(total, a, b):
    """Add a @ b to total in place."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)      # without a second tensor of its size
    else:
        total += a @ b
