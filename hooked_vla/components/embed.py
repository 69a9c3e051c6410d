"""Embeddings: image patches with learned positions, and scalar times as sines and cosines."""

import math

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn


class PatchEmbed(nn.Conv2d):
    """Non-overlapping patches, each mapped linearly to d_model; rows of patches from top to bottom."""

    def __init__(self, patch_size: int, d_model: int) -> None:
        super().__init__(3, d_model, kernel_size=patch_size, stride=patch_size)

    def forward(self, image: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image seq d_model"]:
        return rearrange(super().forward(image), "i d h w -> i (h w) d")


class PositionTable(nn.Embedding):
    """Learned positions of a square grid, looked up by fractional coordinates for images of other sizes.

    SmolVLM's rule: a patch takes the table's cell that contains its fractional position.
    """

    def __init__(self, grid: int, d_model: int) -> None:
        super().__init__(grid * grid, d_model)
        self.grid = grid

    def forward(self, height: int, width: int) -> Float[Tensor, "seq d_model"]:
        """Positions for height × width patches."""
        rows, columns = self._cells(height), self._cells(width)
        return super().forward((rows[:, None] * self.grid + columns[None, :]).flatten())

    def _cells(self, n: int) -> Int[Tensor, " n"]:
        # in float32, as the source computes them: the rounding decides which cell an edge falls in
        boundaries = torch.arange(1 / self.grid, 1.0, 1 / self.grid, device=self.weight.device)
        places = torch.arange(n, dtype=torch.float32, device=self.weight.device) * (1.0 / torch.tensor(n))
        return torch.bucketize(places.clamp(max=1.0 - 1e-6), boundaries, right=True)


def sincos_time(
    time: Float[Tensor, " batch"], d_model: int, min_period: float, max_period: float
) -> Float[Tensor, "batch d_model"]:
    """[sin, cos] of 2π t / period for d_model/2 periods in geometric order, in float64 (openpi: posemb_sincos)."""
    fraction = torch.linspace(0.0, 1.0, d_model // 2, dtype=torch.float64, device=time.device)
    period = min_period * (max_period / min_period) ** fraction
    angle = 2 * math.pi / period * time[:, None].double()
    return torch.cat([angle.sin(), angle.cos()], dim=-1)
