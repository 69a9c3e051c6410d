"""Gradients of lowrank_edit, in plain PyTorch.

With D = beta·src[pair] - alpha·x, g = mask·dy, H = g·bᵀ and K = H·a:
    dx = dy - alpha·K, which is lowrank_edit of dy with a and b exchanged;   dsrc[pair] = beta·K
    da = Hᵀ·D,  db = (D·aᵀ)ᵀ·g,  dalpha = -K·x,  dbeta = K·src[pair],  dadd = g, the last three summed over each row
"""

from typing import Any

import torch
from torch import Tensor

from hooked_vla.kernels.dispatch import without_autocast


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _sum_by(values: Tensor, index: Tensor | None, size: int) -> Tensor:
    """[n ...] -> [size ...], summed over equal indices (None: all 0), in the same order every time."""
    if index is None:
        return values.sum(0, keepdim=True)
    zeros = values.new_zeros((size, *values.shape[1:]))
    if values.device.type == "cpu":
        return zeros.index_add(0, index, values)
    # sorts the indices, where index_add would race
    return zeros.index_put((index,), values, accumulate=True)


def _of_parameters(ctx: Any, needs: tuple[bool, ...], grad: Tensor) -> dict[int, Tensor]:
    """Gradients of every input but x, by position, in alpha's dtype."""
    x, src, a, b, alpha, beta, add, pair, row, mask = ctx.saved_tensors
    wide = alpha.dtype

    def inside(values: Tensor) -> Tensor:
        # a token outside the mask may hold NaN
        return values.to(wide) if mask is None else torch.where(mask[:, None], values.to(wide), 0)

    def per_token(values: Tensor) -> Tensor:
        return (values if row is None else values[row])[:, None]

    tokens, g = inside(x), inside(grad)
    source = None if src is None else inside(src if pair is None else src[pair])
    h = g @ b.to(wide).T
    k = h @ a.to(wide)
    made = {}
    if needs[2] or needs[3]:
        difference = -per_token(alpha) * tokens
        if source is not None:
            difference = per_token(beta) * source + difference
        made[2] = h.T @ difference
        made[3] = (difference @ a.to(wide).T).T @ g
    made[4] = _sum_by(-(k * tokens).sum(1), row, alpha.shape[0])
    if src is not None and source is not None:
        made[5] = _sum_by((k * source).sum(1), row, beta.shape[0])
        if needs[1]:
            k = per_token(beta) * k
            made[1] = k if pair is None else _sum_by(k, pair, src.shape[0])
    if add is not None:
        made[6] = _sum_by(g, row, add.shape[0])
    return made


@without_autocast
def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, src, a, b, alpha, beta, add, pair, row, mask = ctx.saved_tensors
    needs = ctx.needs_input_grad
    made: list[Tensor | None] = [None] * 10
    if needs[0]:
        from hooked_vla.kernels.lowrank_edit import edit_op

        made[0] = edit_op(grad.contiguous(), None, b, a, alpha, beta, None, None, row, mask)
    if any(needs[1:7]):
        inputs = (x, src, a, b, alpha, beta, add)
        for position, value in _of_parameters(ctx, needs, grad).items():
            if needs[position]:
                made[position] = value.to(inputs[position].dtype)
    return tuple(made)
