"""Defines segment_mean and segment_add in plain PyTorch."""

import torch
from torch import Tensor

from hooked_vla.kernels.checks import wide


def segment_mean(x: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """Mean of the tokens of each segment [G d], float32 or float64; zeros where there are none."""
    dtype = wide(x.dtype)
    if n_segments == 0:
        return x.new_zeros((0, x.shape[1]), dtype=dtype)
    belongs = torch.arange(n_segments, device=x.device)[:, None] == segment
    # not a product with 0 and 1: a token elsewhere may hold NaN
    sums = [torch.where(each[:, None], x, 0).sum(0, dtype=dtype) for each in belongs]
    return torch.stack(sums) / belongs.sum(1, keepdim=True).clamp_min(1)


def segment_add(x: Tensor, delta: Tensor, segment: Tensor) -> Tensor:
    """x plus each token's row of delta, in delta's dtype, rounded to x's; x's own bits where nothing is added."""
    if delta.shape[0] == 0:
        return x.clone()
    edit = torch.where(segment[:, None] >= 0, delta[segment.clamp_min(0)], 0)
    return torch.where(edit == 0, x, (x.to(delta.dtype) + edit).to(x.dtype))
