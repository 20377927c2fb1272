"""The key/value cache of generation, and the kernels that attend over it."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from engine.attention import CausalAttention, attention


class KVCache(CausalAttention):
    """Keys and values of the positions read so far, for one layer, in buffers allocated once.

    On a CPU the buffers are float32 whatever the weights are, because attention of one query is
    several times slower in bfloat16 and float16 there. That takes 72 KiB a position for GPT-2 124M.
    """

    def __init__(self, batch_size: int, n_head: int, max_positions: int, head_size: int,
                 like: torch.Tensor):
        """n_head: how many heads the keys have. like: a tensor of the device and precision."""
        super().__init__()
        dtype = like.dtype
        if like.device.type == 'cpu':
            dtype = torch.float32
        shape = (batch_size, n_head, max_positions, head_size)
        self.keys = like.new_zeros(shape, dtype=dtype)
        self.values = torch.zeros_like(self.keys)
        self.length = 0

    def attend(self, q, k, v, bias=None):
        """Attention over the cached positions and T new ones, which are cached too."""
        T = q.size(2)
        start = self.length
        self.keys.narrow(2, start, T).copy_(k)
        self.values.narrow(2, start, T).copy_(v)
        self.length = start + T

        keys = self.keys.narrow(2, 0, self.length)
        values = self.values.narrow(2, 0, self.length)

        # PyTorch's causal mask lets the first query see one key, and here it sees start + 1.
        mask = bias
        if T > 1 and start > 0 and bias is None:
            places = torch.arange(self.length, device=q.device)
            mask = places <= places[start:, None]                               # (T, n_keys)
        is_causal = T > 1 and mask is None
        return attention(q.to(keys.dtype), keys, values, mask, is_causal).to(q.dtype)


class StaticKVCache(KVCache):
    """A KVCache that has constant shapes while a compiled step runs.

    CompiledDecoder sets `position` for that time. Attention then goes over the whole buffers, and a
    mask hides the positions that are not written yet. At other times this is a plain KVCache.
    """

    position: torch.Tensor | None = None        # of the query, (1,), while a compiled step runs

    def n_keys(self, T):
        if self.position is None:
            return super().n_keys(T)
        return self.keys.size(2)

    def attend(self, q, k, v, bias=None):
        if self.position is None:
            return super().attend(q, k, v, bias)

        dtype = self.keys.dtype
        self.keys.index_copy_(2, self.position, k.to(dtype))
        self.values.index_copy_(2, self.position, v.to(dtype))

        mask = bias
        if bias is None:
            places = torch.arange(self.keys.size(2), device=q.device)
            mask = (places <= self.position)[None]                          # (1, n_keys)
        return attention(q.to(dtype), self.keys, self.values, mask).to(q.dtype)


def new_caches(model: nn.Module, batch_size: int, positions: int,
               kind: type[KVCache] = KVCache) -> list[KVCache]:
    """One empty cache for each layer of a GPT."""
    config = model.config
    like = model.transformer.wte.weight
    return [kind(batch_size, config.kv_heads, positions, config.head_size, like)
            for _ in range(config.n_layer)]


class TextCache:
    """The caches of one sequence, with the ids that they hold, for several calls of `stream`.

    Where a text begins as the one before did, the model does not read that beginning again.
    """

    def __init__(self, model: nn.Module):
        self.kv_caches = new_caches(model, 1, model.config.block_size)
        self.ids: list[int] = []

    def common_length(self, ids: list[int]) -> int:
        """How many ids at the beginning of `ids` it holds. The last one does not count, as the
        model has to read it to predict the next."""
        n = 0
        for held, wanted in zip(self.ids, ids[:-1]):
            if held != wanted:
                break
            n += 1
        return n

    def truncate(self, length: int) -> None:
        """Forget what comes after the first `length` ids.

        The caches are right after an interrupted pass too, when some layers had read more tokens
        than others.
        """
        del self.ids[length:]
        for kv_cache in self.kv_caches:
            kv_cache.length = length


def decoding_attention(device: torch.device) -> AbstractContextManager:
    """The context in which a GPU does not choose cuDNN for attention: cuDNN builds a plan for every
    length of the cache, tens of milliseconds each on Hopper (pytorch#191576)."""
    if device.type != 'cuda':
        return nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
                        SDPBackend.MATH])
