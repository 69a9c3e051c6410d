"""Defines sparse_decode in plain PyTorch; arguments are checked in the package."""

import torch
from torch import Tensor

from hooked_vla.kernels.checks import wide


def sparse_decode(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    """base + Σ_j values[:, j]·w_dec[indices[:, j]], the sum in float32 (float64 stays float64)."""
    sums = wide(w_dec.dtype)
    out = torch.zeros((values.shape[0], w_dec.shape[1]), dtype=sums, device=w_dec.device)
    for value, index in zip(values.unbind(1), indices.unbind(1), strict=True):
        out += value[:, None] * w_dec.index_select(0, index)
    if base is not None:
        out += base
    return out.to(w_dec.dtype)
