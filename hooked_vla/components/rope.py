"""Rotary positions, half-split: dimension i is rotated together with dimension i + d_head/2. Always in float32."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, ready to broadcast over heads."""

    cos: Float[Tensor, "batch seq 1 half"]
    sin: Float[Tensor, "batch seq 1 half"]


def rotation(positions: Int[Tensor, "batch seq"], d_head: int, base: float) -> Rotation:
    """Angles position / base^(2i / d_head) for i = 0 .. d_head/2 - 1 (RoFormer, arXiv 2104.09864)."""
    exponents = (2.0 / d_head) * torch.arange(d_head // 2, dtype=torch.float32, device=positions.device)
    angles = (positions.float()[..., None] / base**exponents)[:, :, None, :]
    return Rotation(angles.cos(), angles.sin())


def rotate(x: Float[Tensor, "batch seq heads d_head"], by: Rotation) -> Float[Tensor, "batch seq heads d_head"]:
    """Turn every pair of dimensions by its position's angle; the result has x's dtype."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([first * by.cos - second * by.sin, second * by.cos + first * by.sin], dim=-1)
    return turned.to(x.dtype)
