"""The same on a CPU, where it is a weighted bag of embeddings.

Never the dense product: it is faster only from k > m / 16 on (measured: 256 tokens of width 1024, float32, one core),
far denser than any dictionary, and its bits depend on the number of tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

# gathered rows that are widened at once, in elements: 2 MB of float32 stay in a core's cache
CHUNK = 1 << 19


def _bags(values: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    if not indices.numel():
        return w.new_zeros((values.shape[0], w.shape[1]))
    return functional.embedding_bag(indices, w, per_sample_weights=values, mode="sum")


def _widened_bags(values: Tensor, indices: Tensor, w_dec: Tensor) -> Tensor:
    """A bag's weights have its rows' dtype, and bfloat16 is too coarse for values: widen the rows, some at a time."""
    (n, k), d = values.shape, w_dec.shape[1]
    out = values.new_empty((n, d))
    step = max(1, CHUNK // max(1, k * d))
    for value, index, part in zip(values.split(step), indices.split(step), out.split(step), strict=True):
        rows = w_dec[index.flatten()].to(values.dtype)
        places = torch.arange(index.numel(), dtype=torch.int32).view(index.shape)
        part.copy_(_bags(value, places, rows))
    return out


def sparse_decode(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    bags = _bags if w_dec.dtype == values.dtype else _widened_bags
    out = bags(values, indices, w_dec)
    if base is not None:
        out += base
    return out.to(w_dec.dtype)
