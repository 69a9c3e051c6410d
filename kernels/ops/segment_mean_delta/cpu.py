"""segment_mean on a CPU: each token is added to its segment's sum once, in order."""

import torch
from torch import Tensor

from hooked_vla.kernels.checks import wide


def segment_mean(x: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """As reference.py defines it; one pass over the tokens instead of one for each segment."""
    dtype = wide(x.dtype)
    means = x.new_zeros((n_segments, x.shape[1]), dtype=dtype)
    order = torch.argsort(segment, stable=True)
    counts = torch.bincount(segment + 1, minlength=n_segments + 1).tolist()
    start = counts[0]
    for number, count in enumerate(counts[1:]):
        if count:
            means[number] = x[order[start : start + count]].sum(0, dtype=dtype) / count
        start += count
    return means
