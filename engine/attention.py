"""Attention: the only call of PyTorch's kernel, and the base of the classes that make it.

B sequences, T queries, S keys, H heads of queries, G of keys and values, D channels in each head.
"""

import torch
import torch.nn.functional as F


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None,
              is_causal: bool = False, dropout: float = 0.0) -> torch.Tensor:
    """The attention of queries q (B, H, T, D) over k and v, both (B, G, S, D): (B, H, T, D).

    mask: broadcast to (B, H, T, S). Booleans say which keys a query sees; numbers are added to the
    scores, and their precision becomes that of q. None masks nothing.
    is_causal: query t sees the keys 0 to t; mask has to be None.
    dropout: the share of the attention weights that become zero.
    """
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)

    is_grouped = k.size(1) < q.size(1)                  # several heads of queries share one of keys
    if is_grouped and not has_grouped_kernel(q, mask):
        if q.size(2) == 1 and not is_causal:
            return attention_of_one_query(q, k, v, mask, dropout)
        times = q.size(1) // k.size(1)
        k = k.repeat_interleave(times, dim=1)                           # (B, H, S, D)
        v = v.repeat_interleave(times, dim=1)                           # (B, H, S, D)
        is_grouped = False

    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=is_causal,
                                          enable_gqa=is_grouped)


def attention_of_one_query(q, k, v, mask, dropout):
    """The same for T = 1. The heads of a group take the place of the T queries, so that no key or
    value is repeated."""
    B, H, _, D = q.shape
    G = k.size(1)
    q = q.reshape(B, G, H // G, D)
    if mask is not None and mask.dim() == 4 and mask.size(1) == H:
        mask = mask.reshape(-1, G, H // G, mask.size(3))
    y = attention(q, k, v, mask, dropout=dropout)                       # (B, G, H / G, D)
    return y.reshape(B, H, 1, D)


def has_grouped_kernel(q, mask):
    """True where PyTorch has a fast kernel for fewer heads of keys than of queries.

    On a GPU that is FlashAttention alone, which takes 16 bits, no mask, and capability 8.0. Without
    it, PyTorch 2.11 to 2.13 computes grouped queries by plain products, and holds all the scores.
    """
    if q.device.type != 'cuda':
        return True
    is_half = q.dtype in (torch.float16, torch.bfloat16)
    return is_half and mask is None and has_flash_attention()


@torch.compiler.assume_constant_result                  # torch.compile cannot trace the question
def has_flash_attention():
    return torch.cuda.get_device_capability() >= (8, 0)


class CausalAttention:
    """What the queries of a layer attend over: here the sequence itself, up to their own position.

    GPT.hidden passes one such object to each layer. A subclass may remember earlier keys, look at
    the scores, or hide other keys, and the model stays as it is.
    """

    length = 0                  # how many positions it holds from earlier passes

    def __init__(self, dropout: float = 0.0):
        self.dropout = dropout

    def n_keys(self, T: int) -> int:
        """How many keys T new queries attend over. A bias has to cover their positions, from 0
        on."""
        return self.length + T

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               bias: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of queries q (B, H, T, D) over k and v (B, G, T, D), and over any earlier keys.

        bias: (1, H, T, n_keys), added to the scores, with -inf for each key after its query. None
        means that those keys are hidden, and nothing is added.
        """
        return attention(q, k, v, bias, is_causal=bias is None, dropout=self.dropout)
