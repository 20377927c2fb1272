"""Cross-entropy of a linear head without whole logits, to save memory.

PyTorch's own operations hold (positions, vocabulary) numbers several times over: 0.2 GB for every
1,024 positions of GPT-2, each time. Under torch.compile they are fused, and are the better choice.
"""

import torch
import torch.nn.functional as F

# Logits held at once in float32, and four times as many in lower precision: at GPT-2's vocabulary
# 83 and 333 positions on a CPU, 1,334 and 5,336 on a GPU.
CHUNK_LOGITS = {'cpu': 2 ** 22, 'cuda': 2 ** 26}
MIN_LOGITS = 2 ** 20        # below this, PyTorch's own operations are faster


def is_worth_chunking(n_positions: int, vocab_size: int) -> bool:
    """Whether there are so many logits that chunked_cross_entropy is the better choice."""
    return n_positions * vocab_size >= MIN_LOGITS


def chunked_cross_entropy(x, weight, targets, softcap):
    """The mean cross-entropy of x (B, T, C) with a head's weight (V, C) and targets (B, T): a float32 scalar."""
    return LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), softcap, torch.is_grad_enabled())


def replace_loss(model):
    """Make `model.loss_fn` return (None, loss) in chunks wherever there are at least MIN_LOGITS logits.

    A model keeps its own loss_fn where that is not the cross-entropy of a product with lm_head.weight,
    squeezed by config.softcap.
    """
    head, embedding, whole_loss, softcap = model.lm_head, model.transformer.wte, model.loss_fn, model.config.softcap
    if type(head) is not torch.nn.Linear or head.bias is not None or not is_plain_loss(model):
        return
    tied_weight = []                                            # of the last forward pass, for its loss

    def embed(idx):
        if head.weight is not embedding.weight or not torch.is_grad_enabled() or idx.numel() * len(head.weight) < MIN_LOGITS:
            return F.embedding(idx, embedding.weight)
        # loss_fn uses this weight, so that both gradients arrive at one node of the graph.
        embedded, weight = TiedEmbedding.apply(embedding.weight, idx)
        tied_weight[:] = [weight]
        return embedded

    def loss_fn(x, targets):
        weight = tied_weight.pop() if tied_weight else head.weight
        if targets.numel() * len(weight) < MIN_LOGITS:
            return whole_loss(x, targets)
        return None, LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), softcap, torch.is_grad_enabled())
    embedding.forward, model.loss_fn = embed, loss_fn


@torch.no_grad()
def is_plain_loss(model):
    """True where loss_fn is LinearCrossEntropy of its inputs. The inputs are large, so that another soft cap shows."""
    weight = model.lm_head.weight
    x = torch.linspace(-1e3, 1e3, weight.size(1), device=weight.device, dtype=weight.dtype).expand(1, 2, -1)
    targets = torch.tensor([[0, len(weight) - 1]], device=weight.device)
    loss = LinearCrossEntropy.apply(x.flatten(0, 1), weight, targets.flatten(), model.config.softcap, False)
    return torch.allclose(model.loss_fn(x, targets)[1].float(), loss, rtol=1e-4)


class TiedEmbedding(torch.autograd.Function):
    """Rows idx (B, T) of weight (V, C), and weight once more for the loss to use.

    The gradient from the loss then arrives here, and the rows' gradients are added to it in place.
    Autograd would spread them over a second (V, C) tensor.
    """

    @staticmethod
    def forward(ctx, weight, idx):
        ctx.save_for_backward(idx)
        ctx.set_materialize_grads(False)
        ctx.weight_shape = weight.shape
        return F.embedding(idx, weight), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_embedded, d_weight):
        idx, = ctx.saved_tensors
        if d_weight is None:                                    # the weight was not used again
            d_weight = d_embedded.new_zeros(ctx.weight_shape)
        if d_embedded is not None:
            d_weight.index_add_(0, idx.flatten(), d_embedded.flatten(0, 1).to(d_weight.dtype))
        return d_weight, None


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits x @ weight.T, for x (N, C), weight (V, C) and targets (N,), where
    targets of -1 do not count. softcap: the logits are softcap * tanh(logits / softcap), if not 0.
    Returns a float32 scalar in nats.

    The logits of one chunk of positions exist at a time. The forward pass also takes their
    gradients, so nothing is computed twice. Precision follows autocast.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, softcap, with_gradients):
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
            if softcap:
                squeezed = logits.div_(softcap).tanh_()
                logits = squeezed * softcap
            target = targets[rows].clamp(min=0)[:, None]        # (n, 1)
            largest = logits.amax(dim=-1, keepdim=True)
            target_logit = logits.gather(1, target) - largest   # (n, 1)
            total = logits.sub_(largest).exp_().sum(dim=-1, keepdim=True)
            loss += ((total.log() - target_logit) * counts[rows]).sum()
            if with_gradients:
                # Now d loss / d logits, but for 1 / n_counted, which would become zero in float16.
                logits.mul_(counts[rows] / total).scatter_add_(1, target, -counts[rows])
                if softcap:
                    logits.addcmul_(logits * squeezed, squeezed, value=-1)      # times 1 - tanh^2
                grads = logits.to(dtype)
                d_x[rows] = (grads @ w_low).to(x.dtype)
                if dtype == weight.dtype:
                    d_weight.addmm_(grads.t(), x_low[rows])     # without a second (V, C)
                else:
                    d_weight += grads.t() @ x_low[rows]
                del logits, grads                               # before the next ones are made
        ctx.save_for_backward(d_x, d_weight, n_counted)
        return loss / n_counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_loss):
        d_x, d_weight, n_counted = ctx.saved_tensors
        scale = d_loss / n_counted
        return d_x.mul_(scale), d_weight.mul_(scale), None, None, None
