"""The same on a CPU, where a weighted bag of embeddings is the fastest sum of rows there is.

The gradient of a dictionary is the decoder read by columns: feature i's row is a bag of tokens. Entries are put in
order of feature once, and both dictionaries' gradients are such bags.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hooked_vla.kernels.checks import wide

# embedding_bag's number for summing
SUM = 0


def sparse_dots(grad: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    """The derivative of a bag in its weights, which multiplies rows where they lie."""
    sums, (n, k), rows = wide(w.dtype), indices.shape, indices.flatten()
    if not rows.numel():
        return torch.empty(indices.shape, dtype=sums, device=w.device)
    if w.dtype != sums and rows.numel() < w.shape[0]:
        # only rows that are needed are widened
        w, rows = w[rows], torch.arange(rows.numel(), dtype=rows.dtype)
    starts = torch.arange(0, n * k, k, dtype=rows.dtype)
    tokens = torch.arange(n, dtype=rows.dtype).repeat_interleave(k)
    backward = torch.ops.aten._embedding_bag_per_sample_weights_backward
    return backward(grad.to(sums), w.to(sums), rows, starts, tokens, SUM).view(n, k)


def by_feature(indices: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(order, starts): entries of [n k] sorted by feature, then token, and where each of the m features begins."""
    flat = indices.flatten()
    counts = flat.bincount(minlength=m)
    return flat.argsort(stable=True), counts.cumsum(0) - counts


def bags(values: Tensor, x: Tensor, order: Tensor, starts: Tensor, dtype: torch.dtype) -> Tensor:
    """Row i: the sum of values·x over the entries of feature i."""
    if not order.numel():
        return x.new_zeros((starts.shape[0], x.shape[1]), dtype=dtype)
    tokens = order // values.shape[1]
    weights = values.flatten()[order]
    return functional.embedding_bag(tokens, x.to(weights.dtype), starts, per_sample_weights=weights, mode="sum").to(
        dtype
    )


def sums(values: Tensor, indices: Tensor, m: int) -> Tensor:
    return values.new_zeros(m).index_add_(0, indices.flatten(), values.flatten())


def sparse_outer(values: Tensor, indices: Tensor, x: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return bags(values, x, *by_feature(indices, m), dtype), sums(values, indices, m)


def sparse_backward(
    grad: Tensor, x: Tensor | None, values: Tensor, indices: Tensor, w_dec: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    m, dtype = w_dec.shape[0], w_dec.dtype
    d_values = sparse_dots(grad, indices, w_dec)
    if relu:
        d_values = d_values.where(values > 0, 0)
    order, starts = by_feature(indices, m)
    d_w_dec = bags(values, grad, order, starts, dtype)
    d_w_enc = w_dec.new_empty((0, w_dec.shape[1])) if x is None else bags(d_values, x, order, starts, dtype)
    return d_values, d_w_dec, d_w_enc, sums(d_values, indices, m)
