"""lowrank_edit on a CPU: only the tokens inside the mask are computed, and fewer passes go over them.

The library that multiplies matrices may sum a token in another order when there are more or fewer tokens in the mask:
results then differ in the last bits, unlike on a GPU.
"""

import torch
from torch import Tensor

from hooked_vla.kernels.adding import added

# tokens from which on a product with rows that are copied into columns beforehand is the faster one (measured: 6 to
# 18 % for 50 to 1024 tokens)
COLUMNS_FROM = 32


def _difference(x: Tensor, src: Tensor | None, alpha: Tensor, beta: Tensor) -> tuple[Tensor, float]:
    """beta·src - alpha·x as (tensor, factor), in alpha's dtype; alpha and beta hold one value or one a token."""
    wide = alpha.dtype
    if src is None:
        if alpha.numel() == 1:
            return x.to(wide), -float(alpha)
        return x * -alpha[:, None], 1.0
    if alpha.numel() == 1 and float(alpha) == float(beta):
        return torch.sub(src.to(wide), x), float(alpha)
    # no fused multiply-add: equal products must leave exactly nothing
    return (src * beta[:, None]).sub_(x * alpha[:, None]), 1.0


def _edit(
    x: Tensor, src: Tensor | None, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor, add: Tensor | None
) -> Tensor:
    """Every token of x; src pairs with it; alpha, beta, add hold one entry or one a token."""
    wide = alpha.dtype
    if a.shape[0]:
        difference, factor = _difference(x, src, alpha, beta)
        columns = a.to(wide).T
        coefficients = difference @ (columns.contiguous() if x.shape[0] >= COLUMNS_FROM else columns)
        if factor != 1.0:
            coefficients.mul_(factor)
        # in the place of the difference, unless that is x itself
        delta = torch.mm(coefficients, b.to(wide), out=None if difference is x else difference)
        if add is not None:
            delta += add
    else:
        delta = torch.zeros(x.shape, dtype=wide) if add is None else add.expand(x.shape).clone()
    return added(x, delta)


def lowrank_edit(
    x: Tensor,
    src: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor,
    add: Tensor | None,
    pair: Tensor | None,
    row: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """As reference.py defines it."""
    chosen = None
    if mask is not None and not bool(mask.all()):
        chosen = mask.nonzero()[:, 0]
    tokens = x
    if chosen is not None:
        tokens = x[chosen]
        row = None if row is None else row[chosen]
        pair = chosen if pair is None else pair[chosen]
    if src is not None and pair is not None:
        src = src[pair]
    if row is not None:
        alpha, beta, add = alpha[row], beta[row], None if add is None else add[row]
    edited = _edit(tokens, src, a, b, alpha, beta, add)
    return edited if chosen is None else x.index_copy(0, chosen, edited)
