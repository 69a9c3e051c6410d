"""Rotary positions, half-split: dimension i is rotated together with dimension i + d_head/2. Always in float32."""

from typing import NamedTuple

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor


class Rotation(NamedTuple):
    """Cosines and sines of every position's angles, ready to broadcast over heads."""

    cos: Float[Tensor, "batch seq 1 half"]
    sin: Float[Tensor, "batch seq 1 half"]

    def repeat(self, n: int) -> "Rotation":
        """The same for n batches in a row."""
        return Rotation(*(repeat(each, "b s 1 half -> (n b) s 1 half", n=n) for each in self))


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


def grid_rotation(places: Int[Tensor, "seq 2"], d_head: int, base: float) -> Rotation:
    """A quarter of a head's dimensions turn with the row and a quarter with the column of each place, paired with
    the other half: angles place / base^(4i / d_head) for i = 0 .. d_head/4 - 1 (Qwen2-VL, arXiv 2409.12191)."""
    exponents = (4.0 / d_head) * torch.arange(d_head // 4, dtype=torch.float32, device=places.device)
    angles = places.float()[:, :, None] / base**exponents
    angles = rearrange(angles, "s two d -> 1 s 1 (two d)")
    return Rotation(angles.cos(), angles.sin())


def multimodal_rotation(
    positions: Int[Tensor, "axis batch seq"], d_head: int, base: float, sections: tuple[int, ...]
) -> Rotation:
    """Angles of `rotation`, each frequency turning with one of a token's positions: time, row or column.

    sections: how many frequencies each axis has. Rows and columns take every third, interleaved, until they have
    theirs; all others are time's (Qwen3-VL's interleaved M-RoPE).
    """
    frequency = torch.arange(d_head // 2, device=positions.device)
    axis = frequency % 3
    axis = torch.where(frequency < 3 * torch.tensor(sections, device=positions.device)[axis], axis, 0)
    chosen = rearrange(positions.float()[axis], "half b s -> b s 1 half")
    exponents = (2.0 / d_head) * frequency.float()
    angles = chosen / base**exponents
    return Rotation(angles.cos(), angles.sin())
