"""Defines sparse_dots, sparse_outer and sparse_backward in plain PyTorch; arguments are checked in the package."""

import torch
from torch import Tensor

from hooked_vla.kernels.checks import wide


def spread(values: Tensor, indices: Tensor, m: int) -> Tensor:
    """The code as a dense [n m].

    One column of indices at a time: the entries of a column fall into different rows, so that the order of addition
    is fixed on every device.
    """
    code = values.new_zeros((values.shape[0], m))
    for value, index in zip(values.split(1, dim=1), indices.long().split(1, dim=1), strict=True):
        code.scatter_add_(1, index, value)
    return code


def sparse_dots(grad: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    """dots[t, j] = grad[t] · w[indices[t, j]] in float32 (float64 stays float64)."""
    sums = wide(w.dtype)
    dots = torch.empty(indices.shape, dtype=sums, device=w.device)
    for j, index in enumerate(indices.unbind(1)):
        dots[:, j] = (grad.to(sums) * w.index_select(0, index)).sum(1)
    return dots


def sparse_outer(values: Tensor, indices: Tensor, x: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """outer[i] = Σ values[t, j]·x[t] over all (t, j) with indices[t, j] == i, and the sum of those values."""
    code = spread(values, indices, m)
    return (code.T @ x.to(code.dtype)).to(dtype), code.sum(0)


def sparse_backward(
    grad: Tensor, x: Tensor | None, values: Tensor, indices: Tensor, w_dec: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(d_values, d_w_dec, d_w_enc, d_b_enc); without x, d_w_enc has no rows."""
    m, dtype = w_dec.shape[0], w_dec.dtype
    d_values = sparse_dots(grad, indices, w_dec)
    if relu:
        d_values = d_values.where(values > 0, 0)
    d_w_dec, _ = sparse_outer(values, indices, grad, m, dtype)
    code = spread(d_values, indices, m)
    d_w_enc = w_dec.new_empty((0, w_dec.shape[1])) if x is None else (code.T @ x.to(code.dtype)).to(dtype)
    return d_values, d_w_dec, d_w_enc, code.sum(0)
