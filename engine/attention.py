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
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p=dropout, is_causal=is_causal,
                                          enable_gqa=is_grouped)


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
