"""Defines rank_count in plain PyTorch; arguments are checked in the package."""

import torch
from torch import Tensor

from hooked_vla.kernels.sae_encode_topk.reference import encode


def rank_count(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor) -> Tensor:
    """How many z_j come before z_s in descending order, ties to the smaller index; NaN is the largest."""
    z = encode(x, w_enc, b_enc)
    index = torch.arange(z.shape[1], device=z.device)
    counts = torch.zeros((x.shape[0], features.shape[0]), dtype=torch.int32, device=x.device)
    for s in range(features.shape[0]):
        own = z[:, features[s : s + 1]]
        before = (z > own) | (z.isnan() & ~own.isnan())
        level = (z == own) | (z.isnan() & own.isnan())
        counts[:, s] = (before | (level & (index < features[s]))).sum(1)
    return counts
