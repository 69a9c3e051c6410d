"""Defines sae_splice in plain PyTorch, through the whole dictionary; arguments are checked in the package."""

import torch
from torch import Tensor


def code_of(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int | None, threshold: Tensor | None) -> Tensor:
    """f [n m]: z above the threshold, or the k largest z (ties to the smaller index) where above zero; else 0."""
    z = torch.addmm(b_enc, x.to(b_enc.dtype), w_enc.to(b_enc.dtype).T)
    if threshold is not None:
        return torch.where(z > threshold, z, 0)
    chosen = z.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(z).scatter(1, chosen, z.gather(1, chosen).relu())


def edited(f: Tensor, scale: Tensor, shift: Tensor, lo: Tensor, hi: Tensor, row: Tensor | None) -> Tensor:
    """g = clamp(scale·f + shift, lo, hi) [n S] with each token's row of the tables."""
    if row is not None:
        scale, shift, lo, hi = (table[row] for table in (scale, shift, lo, hi))
    return torch.clamp(scale * f + shift, lo, hi)


def sae_splice(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    w_dec: Tensor,
    b_dec: Tensor,
    k: int | None,
    threshold: Tensor | None,
    error: bool,
    features: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    lo: Tensor | None,
    hi: Tensor | None,
    row: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    f = code_of(x, w_enc, b_enc, k, threshold)
    g = f
    if features is not None:
        assert scale is not None and shift is not None and lo is not None and hi is not None
        g = f.index_copy(1, features.long(), edited(f[:, features.long()], scale, shift, lo, hi, row))
    weights = w_dec.to(f.dtype)
    if error:
        # decode(g) + (x - decode(f)), of which only the edited features remain
        edit = (g - f) @ weights
        y = torch.where(edit == 0, x, (x + edit).to(x.dtype))
    else:
        y = (g @ weights + b_dec).to(x.dtype)
    return y if mask is None else torch.where(mask[:, None], y, x)
