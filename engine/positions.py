"""Positions without embeddings: rotary (Su et al. 2021, arXiv:2104.09864), ALiBi (Press et al. 2021, arXiv:2108.12409).

Both depend on the distance of two tokens alone. T queries, S keys, H heads, D channels in each head.
"""

import math

import torch


def rotary_angles(positions, head_size, theta):
    """(cos, sin), each (T, 1, D), by which `rotate` turns the pairs of channels at `positions` (T,).

    The first pair turns by 1 radian a position, the last one by about 1 / theta.
    """
    channels = torch.arange(0, head_size, 2, device=positions.device)
    angles = positions[:, None] / theta ** (channels / head_size)                   # (T, D / 2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1)[:, None], torch.cat([-sin, sin], dim=-1)[:, None]


def rotate(x, cos, sin):
    """Queries or keys x (B, T, H, D) with each pair of channels (i, i + D / 2) turned by its angle. The pairs
    are those of Llama in transformers. Computed in float32."""
    return (x * cos + x.roll(x.size(-1) // 2, dims=-1) * sin).type_as(x)


def alibi_bias(positions, n_keys, n_head):
    """What is added to the scores of queries at `positions` (T,) and keys at 0 to n_keys - 1: (1, H, T, S).

    It falls with the distance, in each head by another slope, and is -inf for a key after its query. The slopes
    of a power of two of heads are geometric; other numbers of heads add every other slope of twice that power.
    """
    power = 2 ** (n_head.bit_length() - 1)
    head = torch.arange(1, n_head + 1, device=positions.device)
    slopes = 2.0 ** -torch.where(head <= power, 8 * head / power, (8 * (head - power) - 4) / power)     # (H,)
    distance = positions[:, None] - torch.arange(n_keys, device=positions.device)   # (T, S)
    return (-slopes[:, None, None] * distance).masked_fill(distance < 0, -math.inf)[None]
