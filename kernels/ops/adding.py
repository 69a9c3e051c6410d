"""x + delta on a CPU, where what nothing is added to keeps its bits."""

import torch
from torch import Tensor

_INTS = {torch.float32: torch.int32, torch.float64: torch.int64}


def added(x: Tensor, delta: Tensor) -> Tensor:
    """x + delta, summed in delta's dtype and rounded once to x's; x's own bits where delta is zero.

    delta: float32 or float64, of x's shape; it may be overwritten.
    """
    if x.dtype == delta.dtype:
        # x + 0 is not x where x is -0.0 alone, whose bits are those of the least integer: one cheap pass tells
        bits = x.view(_INTS[x.dtype])
        if bits.numel() == 0 or int(bits.amin()) != torch.iinfo(bits.dtype).min:
            return delta.add_(x)
        return torch.where(delta == 0, x, x + delta)
    y = (x.to(delta.dtype) + delta).to(x.dtype)
    # counting is a tenth of the time of comparing and selecting
    return y if int(delta.count_nonzero()) == delta.numel() else torch.where(delta == 0, x, y)
