"""How attention learns where a token is: embeddings, rotary positions, ALiBi.

An object of this file is made once for each forward pass, and every layer uses it. Rotary
positions and ALiBi have no parameters, and both depend only on the distance of two tokens. T
queries, S keys, H heads, D channels in each head.
"""

import math

import torch
import torch.nn.functional as F


class PositionEncoding:
    """What attention does about positions. Here that is nothing: learned embeddings are in
    attention's input.

    bias: (1, H, T, S), which attention adds to the scores, or None.
    """

    bias: torch.Tensor | None = None

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """Queries or keys x (B, T, H, D) as the scores should be computed from them."""
        return x


class RotaryPositions(PositionEncoding):
    """Turns each pair of channels (i, i + D / 2) by an angle that grows with the position.

    The first pair turns by 1 radian a position, the last one by about 1 / theta. The pairs are
    those of Llama in transformers. Source: Su et al. 2021 (arXiv:2104.09864).
    """

    def __init__(self, positions: torch.Tensor, head_size: int, theta: float):
        """positions: (T,)."""
        channels = torch.arange(0, head_size, 2, device=positions.device)
        angles = positions[:, None] / theta ** (channels / head_size)           # (T, D / 2)
        cos = angles.cos()
        sin = angles.sin()
        self.cos = torch.cat([cos, cos], dim=-1)[:, None]                       # (T, 1, D)
        self.sin = torch.cat([-sin, sin], dim=-1)[:, None]                      # (T, 1, D)

    def rotate(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, H, D), turned. The arithmetic is in float32, and the result has the precision
        of x."""
        swapped = x.roll(x.size(-1) // 2, dims=-1)
        return (x * self.cos + swapped * self.sin).type_as(x)


class ALiBi(PositionEncoding):
    """Lowers each score in proportion to the distance of query and key, in each head by another
    slope.

    The slopes of a power of two of heads are geometric. With a number of heads between two powers,
    the heads beyond the lower one take every other slope of the higher one.
    Source: Press et al. 2021 (arXiv:2108.12409).
    """

    def __init__(self, positions: torch.Tensor, n_keys: int, n_head: int):
        """positions: those of the queries, (T,). n_keys: the keys have the positions 0 to n_keys
        - 1."""
        power = 2 ** (n_head.bit_length() - 1)
        head = torch.arange(1, n_head + 1, device=positions.device)             # (H,)
        exponents = torch.where(head <= power, 8 * head / power, (8 * (head - power) - 4) / power)
        slopes = 2.0 ** -exponents

        keys = torch.arange(n_keys, device=positions.device)
        distance = positions[:, None] - keys                                    # (T, S)
        penalty = -slopes[:, None, None] * distance                             # (H, T, S)
        self.bias = penalty.masked_fill(distance < 0, -math.inf)[None]          # (1, H, T, S)


def encode_positions(config, positions: torch.Tensor, n_keys: int) -> PositionEncoding:
    """The PositionEncoding of a GPTConfig for queries at `positions` (T,) and keys at 0 to n_keys
    - 1."""
    if config.position == 'rotary':
        return RotaryPositions(positions, config.head_size, config.rope_theta)
    if config.position == 'alibi':
        return ALiBi(positions, n_keys, config.n_head)
    return PositionEncoding()


def resize_positions(rows: torch.Tensor, block_size: int) -> torch.Tensor:
    """Learned positions (T, C) for another context, (block_size, C).

    For a shorter one, these are the first rows. For a longer one, the rows are stretched by linear
    interpolation, so that the first and the last one stay at the ends.
    """
    if block_size <= len(rows):
        return rows[:block_size].clone()
    columns = rows.t()[None]                                                    # (1, C, T)
    stretched = F.interpolate(columns, block_size, mode='linear', align_corners=True)
    return stretched[0].t().contiguous()
