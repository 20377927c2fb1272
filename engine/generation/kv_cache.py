"""The key/value cache of generation, and what attends over it."""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


class KVCache:
    """Keys and values of the positions read so far, for one layer, in buffers allocated once.

    On a CPU the buffers are float32 whatever the weights are, because attention of one query is
    several times slower in bfloat16 and float16 there. That takes 72 KiB a position for GPT-2 124M.
    """

    def __init__(self, batch_size, n_head, max_positions, head_size, like):
        dtype = torch.float32 if like.device.type == 'cpu' else like.dtype
        self.keys = like.new_zeros(batch_size, n_head, max_positions, head_size, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def n_keys(self, T):
        """How many keys T new queries attend over."""
        return self.length + T

    def attend(self, q, k, v, attn_bias=None):
        """Attention of T queries (B, H, T, D) over the cached positions and T new ones; k and v may have fewer heads.

        attn_bias: (1, H, T, n_keys) to add to the scores, -inf for the keys after a query; None hides only those.
        """
        T, end = q.size(2), self.length + q.size(2)
        # Several queries behind cached keys would need a mask; no caller does this.
        assert T == 1 or self.length == 0
        self.keys.narrow(2, self.length, T).copy_(k)
        self.values.narrow(2, self.length, T).copy_(v)
        self.length = end
        keys, values = self.keys.narrow(2, 0, end), self.values.narrow(2, 0, end)
        return attention(q, keys, values, attn_bias, is_causal=T > 1 and attn_bias is None)


class StaticKVCache(KVCache):
    """A KVCache of constant shapes, for a compiled step: it attends over the whole buffers, and a
    mask hides the positions that are not written yet."""

    position = None                                             # (1,) tensor while a compiled step runs

    def n_keys(self, T):
        return super().n_keys(T) if self.position is None else self.keys.size(2)

    def attend(self, q, k, v, attn_bias=None):
        if self.position is None:
            return super().attend(q, k, v, attn_bias)
        dtype = self.keys.dtype
        self.keys.index_copy_(2, self.position, k.to(dtype))
        self.values.index_copy_(2, self.position, v.to(dtype))
        written = torch.arange(self.keys.size(2), device=q.device) <= self.position
        return attention(q, self.keys, self.values, written[None] if attn_bias is None else attn_bias)


def attention(q, keys, values, mask, is_causal=False):
    """F.scaled_dot_product_attention in the precision of the keys, with the result in that of q."""
    if mask is not None and mask.is_floating_point():
        mask = mask.to(keys.dtype)
    return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, mask, is_causal=is_causal,
                                          enable_gqa=q.size(1) > keys.size(1)).to(q.dtype)


def decoding_attention(device):
    """The context in which a GPU does not choose cuDNN for attention: cuDNN builds a plan for every
    length of the cache, tens of milliseconds each on Hopper (pytorch#191576)."""
    if device.type != 'cuda':
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def new_caches(model, batch_size, positions, kind=KVCache):
    """One empty cache for each layer of `model`."""
    c = model.config
    like = next(model.parameters())
    return [kind(batch_size, c.kv_heads, positions, c.head_size, like) for _ in range(c.n_layer)]
