"""Exact selection by 64-bit keys: the value's order in the upper half, the index, larger first, in the lower one.

Two features never have the same key, so that any algorithm finds the same k: ties go to the smaller index. NaN is the
largest value; -0.0 equals 0.0.
"""

import torch
from torch import Tensor

LARGEST = 0x7FFFFFFF


def keys(z: Tensor) -> Tensor:
    """int64 keys of z [n m], float32."""
    # bits of a negative float grow with its size: turn them round
    bits = torch.where(z == 0, 0.0, z).view(torch.int32)
    order = (bits ^ ((bits >> 31) & LARGEST)).masked_fill(z.isnan(), LARGEST)
    index = torch.arange(z.shape[1], device=z.device)
    return (order.long() << 32) | (LARGEST - index)


def select(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row of z and their indices (int32), in descending order."""
    indices = LARGEST - (keys(z).topk(k, dim=1).values & LARGEST)
    return z.gather(1, indices), indices.int()
