"""delta_splice on a CPU: only tokens that change are decoded; where features are sparse, most do not."""

import torch
from torch import Tensor

from hooked_vla.kernels.adding import added


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
    """As reference.py defines it."""
    wide = scale.dtype
    z = torch.addmm(b_enc, x.to(wide), w_enc.to(wide).T)
    f = torch.where(z > threshold, z, 0)
    if row is not None:
        scale, shift, lo, hi = (table[row] for table in (scale, shift, lo, hi))
    change = torch.clamp(scale * f + shift, lo, hi) - f
    changed = (change != 0).any(1)
    if mask is not None:
        changed &= mask
    features = f if emit else f.new_empty((0, f.shape[1]))
    chosen = changed.nonzero()[:, 0]
    whole = chosen.shape[0] == x.shape[0]
    edit = (change if whole else change[chosen]) @ w_dec.to(wide)
    if not edit_only:
        edit = added(x if whole else x[chosen], edit)
    if whole:
        return edit, features
    y = x.new_zeros(x.shape, dtype=wide) if edit_only else x.clone()
    return y.index_copy_(0, chosen, edit), features
