"""Which token comes next: sampling from logits."""

import math
from typing import NamedTuple

import torch


class Sampling(NamedTuple):
    """The options of engine.generate.stream that choose a token."""
    temperature: float
    top_k: int | None
    top_p: float
    min_p: float
    repetition_penalty: float
    vocab_size: int | None


def new_seen(model, batch_size, sampling, device):
    """(B, V), where a token occurs in the text so far. Empty without a repetition penalty."""
    width = 0 if sampling.repetition_penalty == 1 else model.config.vocab_size
    return torch.zeros(batch_size, width, dtype=torch.bool, device=device)


def next_token(model, x, read, seen, noise, sampling):
    """The sampled tokens (B, 1), from hidden's x (B, T, C). read: the tokens (B, T) that it was computed from."""
    temperature, top_k, top_p, min_p, repetition_penalty, vocab_size = sampling
    logits = model.logits(x[:, -1]).float()[:, :vocab_size]     # (B, V)
    if repetition_penalty != 1:
        seen.scatter_(1, read, True)
        penalized = torch.where(logits > 0, logits / repetition_penalty, logits * repetition_penalty)
        logits = torch.where(seen[:, :vocab_size], penalized, logits)
    return sample_token(logits, temperature, top_k, top_p, noise, min_p)[:, None]


def sample_token(logits, temperature, top_k, top_p, noise, min_p=0.0):
    """One token per row, (B,), from float32 logits (B, V). The same noise (B, 1) gives the same token."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    ids = None
    if top_k and top_k < logits.size(-1) or top_p < 1 or min_p:
        logits, ids = logits.topk(min(top_k or logits.size(-1), logits.size(-1)))  # descending
    # Subtracting the largest keeps a small temperature from overflowing; float32 has none below 1e-45.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    cumulative = logits.softmax(dim=-1).cumsum(dim=-1)          # (B, V or k)
    total = cumulative[:, -1:]
    if top_p < 1:                                               # nucleus sampling, arXiv:1904.09751
        fewest = torch.searchsorted(cumulative, total * top_p).clamp(max=cumulative.size(-1) - 1)
        total = cumulative.gather(1, fewest)
    if min_p:
        last = (logits >= math.log(min_p)).sum(dim=-1, keepdim=True) - 1
        total = torch.minimum(total, cumulative.gather(1, last))
    # The total differs from 1 by rounding; after the division, every noise below 1 finds a token.
    index = torch.searchsorted(cumulative / total, noise, right=True).clamp(max=logits.size(-1) - 1)
    return (index if ids is None else ids.gather(1, index))[:, 0]
