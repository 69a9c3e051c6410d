"""Defines delta_splice in plain PyTorch. Sums are float32, or float64 for float64 tokens: that of the tables."""

import torch
from torch import Tensor


def delta_splice(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    w_dec: Tensor,
    scale: Tensor,
    shift: Tensor,
    lo: Tensor,
    hi: Tensor,
    row: Tensor | None,
    mask: Tensor | None,
    emit: bool,
    edit_only: bool,
) -> tuple[Tensor, Tensor]:
    """(y [n d], f [n S], or [0 S] without emit); y is the edit alone, in the tables' dtype, with edit_only."""
    wide = scale.dtype
    tokens = x.to(wide)
    z = torch.addmm(b_enc, tokens, w_enc.to(wide).T)
    f = torch.where(z > threshold, z, 0)
    if row is not None:
        scale, shift, lo, hi = (table[row] for table in (scale, shift, lo, hi))
    change = torch.clamp(scale * f + shift, lo, hi) - f
    if mask is not None:
        # not a product: a token outside the mask may hold NaN
        change = torch.where(mask[:, None], change, 0)
    edit = change @ w_dec.to(wide)
    features = f if emit else f.new_empty((0, f.shape[1]))
    if edit_only:
        return edit, features
    # x + 0 is not x where x is -0.0
    return torch.where(edit == 0, x, (tokens + edit).to(x.dtype)), features
