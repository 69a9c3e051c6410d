"""Gradients of sae_encode_topk, through the chosen features alone; the choice has none, as in every top-k autoencoder.

With g = the gradient of the values, zero where relu cut them off: dx = Σ_j g_j·w_enc[i_j] is a sparse decode, and
dw_enc[i] = Σ g_j·x, db_enc[i] = Σ g_j over all (token, j) with i_j = i are a decoder's gradients.
"""

from typing import Any

import torch
from torch import Tensor

from hooked_vla.kernels.dispatch import without_autocast


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_enc, _, _, relu = inputs
    ctx.save_for_backward(x, w_enc, *output)
    ctx.relu = relu


@without_autocast
def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    # these ops have no need of this one, and users of this one alone none of them
    from hooked_vla.kernels.sparse_backward import sparse_outer
    from hooked_vla.kernels.sparse_decode import sparse_decode

    x, w_enc, values, indices = ctx.saved_tensors
    grad = grad.contiguous()
    if ctx.relu:
        grad = torch.where(values > 0, grad, 0)
    d_x = d_w = d_b = None
    if ctx.needs_input_grad[0]:
        d_x = sparse_decode(grad, indices, w_enc, None, validate=False).to(x.dtype)
    if any(ctx.needs_input_grad[1:3]):
        # tokens whose values nobody asks about may hold anything: 0·NaN is NaN
        x = torch.where((grad != 0).any(1, keepdim=True), x, 0)
        d_w, d_b = sparse_outer(grad, indices, x, w_enc.shape[0], dtype=w_enc.dtype, validate=False)
    return d_x, d_w, d_b, None, None
