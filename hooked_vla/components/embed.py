"""Embeddings: image patches with learned positions, and scalar times as sines and cosines."""

import math

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional


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


class GridPositions(nn.Embedding):
    """Learned positions of a grid of one size only."""

    def __init__(self, grid: int, d_model: int) -> None:
        super().__init__(grid * grid, d_model)
        self.grid = grid

    def forward(self, height: int, width: int) -> Float[Tensor, "seq d_model"]:
        """Positions for height × width patches.

        Raises ValueError for any other grid than the table's.
        """
        if (height, width) != (self.grid, self.grid):
            raise ValueError(f"images of {height} × {width} patches, but the model reads {self.grid} × {self.grid}")
        return super().forward(torch.arange(self.grid**2, device=self.weight.device))


def sincos_bucket(bucket: Int[Tensor, " batch"], d_model: int) -> Float[Tensor, "batch d_model"]:
    """[sin, cos] of bucket · 10000^(-2i / d_model), i < d_model/2, in float32 (Isaac-GR00T: action_encoder.py)."""
    half = d_model // 2
    exponent = -torch.arange(half, dtype=torch.float32, device=bucket.device)
    # the factor in float32 too: at large buckets the rounding of the frequencies shows
    angle = bucket.float()[:, None] * (exponent * (torch.tensor(10_000.0).log() / half).item()).exp()
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def cossin_bucket(bucket: Int[Tensor, " batch"], d_model: int) -> Float[Tensor, "batch d_model"]:
    """[cos, sin] of bucket · 10000^(-i / (d_model/2 - 1)), i < d_model/2, in float32: the last frequency is 1e-4.

    diffusers: get_timestep_embedding(flip_sin_to_cos=True, downscale_freq_shift=1).
    """
    half = d_model // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=bucket.device) / (half - 1)
    angle = bucket.float()[:, None] * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def sine_positions_2d(height: int, width: int, d_model: int, device: torch.device) -> Float[Tensor, "seq d_model"]:
    """Fixed positions of a grid, rows from the top: d_model/2 values for the row, then as many for the column.

    Row k of n is at 2π (k + 1) / (n + 1e-6); value j is its sine (j even) or cosine (j odd) after division by
    10000^(2 floor(j/2) / (d_model/2)). In float32 (DETR: position_encoding.py).
    """
    half = d_model // 2
    exponent = 2 * (torch.arange(half, dtype=torch.float32, device=device) // 2) / half
    frequency = 10_000**exponent

    def along(n: int) -> Float[Tensor, "n half"]:
        place = torch.arange(1, n + 1, dtype=torch.float32, device=device)
        angle = (place / (place[-1] + 1e-6) * (2 * math.pi))[:, None] / frequency
        return torch.stack([angle[:, 0::2].sin(), angle[:, 1::2].cos()], dim=-1).flatten(1)

    rows = repeat(along(height), "h d -> h w d", w=width)
    columns = repeat(along(width), "w d -> h w d", h=height)
    return rearrange(torch.cat([rows, columns], dim=-1), "h w d -> (h w) d")


def cossin_time(time: Float[Tensor, " batch"], d_time: int, max_period: float) -> Float[Tensor, "batch d_time"]:
    """[cos, sin] of time · max_period^(-i / half), i < half = d_time // 2, in float32; an odd width ends with 0.

    LeRobot 0.6.1: xvla/soft_transformer.py, timestep_embedding.
    """
    half = d_time // 2
    frequency = (-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=time.device) / half).exp()
    angle = time.float()[:, None] * frequency
    return functional.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, d_time % 2))


class SequencePositions(nn.Embedding):
    """Learned positions in a row. offset: how many of the table's first rows no position uses."""

    def __init__(self, n_positions: int, d_model: int, offset: int) -> None:
        super().__init__(n_positions, d_model)
        self.offset = offset

    def forward(self, length: int) -> Float[Tensor, "length d_model"]:
        """Raises ValueError for more positions than there are."""
        if length > self.num_embeddings - self.offset:
            raise ValueError(f"{length} tokens, but there are {self.num_embeddings - self.offset} positions")
        return super().forward(torch.arange(self.offset, self.offset + length, device=self.weight.device))


def interleaved_sincos(n_positions: int, d_model: int) -> Float[Tensor, "n_positions d_model"]:
    """sin, cos, sin, ... of position · 10000^(-2i / d_model), i < d_model/2 (arXiv 1706.03762); d_model is even."""
    half = d_model // 2
    frequency = (torch.arange(half).float() * -(math.log(10_000) / half)).exp()
    angle = torch.arange(n_positions).float()[:, None] * frequency
    return rearrange(torch.stack([angle.sin(), angle.cos()], dim=-1), "n i two -> n (i two)")
