"""Defines rank_count in plain PyTorch; arguments are checked in the package."""

import torch
from torch import Tensor

from hooked_vla.kernels.sae_encode_topk.reference import encode


def counted(z: Tensor, features: Tensor) -> Tensor:
    """How many z_j come before z_s in descending order, ties to the smaller index; NaN is the largest."""
    index = torch.arange(z.shape[1], device=z.device)
    counts = torch.zeros((z.shape[0], features.shape[0]), dtype=torch.int32, device=z.device)
    for s in range(features.shape[0]):
        own = z[:, features[s : s + 1]]
        before = (z > own) | (z.isnan() & ~own.isnan())
        level = (z == own) | (z.isnan() & own.isnan())
        counts[:, s] = (before | (level & (index < features[s]))).sum(1)
    return counts


def rank_count(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor) -> Tensor:
    """The rank of each chosen feature among the token's pre-activations."""
    return counted(encode(x, w_enc, b_enc), features)
