"""Gradients of delta_splice, in plain PyTorch: products with S rows, S at most 64.

With u = scale·f + shift and h = mask·(dy·w_decᵀ) the gradient of g:
    dz = active·(h·(scale·[lo <= u <= hi] - 1) + df),   dx = dy + dz·w_enc,   dw_enc = dzᵀ·x,   dw_dec = (g - f)ᵀ·dy
Rows of the tables are summed by a product with a 0/1 matrix, not by atomics: the same bits every time. A token outside
the mask may hold anything: it takes no part in any sum, but for what its features, where they are asked for, pass on.
"""

from typing import Any

import torch
from torch import Tensor

from hooked_vla.kernels.dispatch import without_autocast


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, emit, edit_only = inputs
    ctx.save_for_backward(*tensors)
    ctx.emit, ctx.edit_only = emit, edit_only


def _by_row(values: Tensor, row: Tensor | None, n_rows: int) -> Tensor:
    """[n S] -> [R S], summed over the tokens of each row of the tables."""
    if row is None:
        return values.sum(0, keepdim=True)
    chosen = torch.arange(n_rows, device=row.device)[:, None] == row
    return chosen.to(values.dtype) @ values


def _of_tables(grad: Tensor, f: Tensor, u: Tensor, lo: Tensor, hi: Tensor, row: Tensor | None, n_rows: int) -> tuple:
    """Gradients of scale, shift, lo, hi from that of g = clamp(u, lo, hi)."""
    inside = grad * ((u >= lo) & (u <= hi))
    parts = (inside * f, inside, grad * (u < lo), grad * (u > hi))
    return tuple(_by_row(part, row, n_rows) for part in parts)


@without_autocast
def backward(ctx: Any, grad_y: Tensor, grad_f: Tensor | None) -> tuple[Tensor | None, ...]:
    x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi, row, mask = ctx.saved_tensors
    wide, n_rows, needs = scale.dtype, scale.shape[0], ctx.needs_input_grad

    def inside(values: Tensor) -> Tensor:
        return values if mask is None else torch.where(mask[:, None], values, 0)

    tokens, grad = x.to(wide), inside(grad_y.to(wide))
    z = torch.addmm(b_enc, tokens, w_enc.to(wide).T)
    active = z > threshold
    f = inside(torch.where(active, z, 0))
    if row is not None:
        scale, shift, lo, hi = (table[row] for table in (scale, shift, lo, hi))
    u = scale * f + shift
    grad_g = grad @ w_dec.to(wide).T
    grad_z = grad_g * (scale * ((u >= lo) & (u <= hi)) - 1)
    if ctx.emit and grad_f is not None:
        grad_z = grad_z + grad_f
    grad_z = torch.where(active, grad_z, 0)

    made: list[Tensor | None] = [None] * 13
    if needs[0]:
        through = grad_z @ w_enc.to(wide)
        made[0] = (through if ctx.edit_only else grad_y.to(wide) + through).to(x.dtype)
    if needs[1]:
        # not x itself: 0·NaN is NaN
        taking_part = (grad_z != 0).any(1, keepdim=True)
        made[1] = (grad_z.T @ torch.where(taking_part, tokens, 0)).to(w_enc.dtype)
    if needs[2]:
        made[2] = grad_z.sum(0)
    if needs[4]:
        made[4] = (inside(torch.clamp(u, lo, hi) - f).T @ grad).to(w_dec.dtype)
    if any(needs[5:9]):
        made[5:9] = _of_tables(grad_g, f, u, lo, hi, row, n_rows)
    return tuple(made)
