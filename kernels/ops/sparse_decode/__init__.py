"""A sparse decoder: the sum of the k dictionary rows that are active for a token, instead of a product with all m."""

from typing import Any

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from hooked_vla.kernels import checks
from hooked_vla.kernels.checks import wide
from hooked_vla.kernels.dispatch import implementation, paths_of, without_autocast
from hooked_vla.kernels.sparse_backward import FLOATS, check_entries, dots_op, outer_op

PATHS = paths_of(__name__, "sparse_decode")


@torch.library.custom_op("hooked_vla::sparse_decode", mutates_args=())
def decode_op(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    return implementation("sparse_decode", PATHS, w_dec)(values, indices, w_dec, base)


@decode_op.register_fake
def _(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    return w_dec.new_empty((values.shape[0], w_dec.shape[1]))


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    values, indices, w_dec, base = inputs
    ctx.save_for_backward(values, indices, w_dec)
    ctx.base = None if base is None else (base.dim(), base.dtype)


@without_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None]:
    values, indices, w_dec = ctx.saved_tensors
    grad = grad.contiguous()
    d_values = d_w_dec = d_base = None
    if ctx.needs_input_grad[0]:
        d_values = dots_op(grad, indices, w_dec)
    if ctx.needs_input_grad[2]:
        m, dtype = w_dec.shape[0], w_dec.dtype
        d_w_dec, _ = outer_op(values, indices, grad, m, dtype)
    if ctx.needs_input_grad[3]:
        rank, dtype = ctx.base
        d_base = (grad.sum(0, dtype=wide(grad.dtype)) if rank == 1 else grad).to(dtype)
    return d_values, None, d_w_dec, d_base


decode_op.register_autograd(_backward, setup_context=_setup)


def sparse_decode(
    values: Float[Tensor, "n k"],
    indices: Int32[Tensor, "n k"],
    w_dec: Float[Tensor, "m d"],
    base: Float[Tensor, "n d"] | Float[Tensor, " d"] | None = None,
    *,
    validate: bool | None = None,
) -> Float[Tensor, "n d"]:
    """out[t] = base[t] + Σ_j values[t, j]·w_dec[indices[t, j]]: what a dense decoder gives for a code with k entries.

    values: float32 (float64 where w_dec is). An index may occur twice in a token; k may be 0.
    w_dec: float32, bfloat16, float16 or float64. base: w_dec's dtype or float32, a row for each token, one for all
    (a decoder's bias), or None for zero. All contiguous, on one device.
    validate: whether to look at the numbers, which on a GPU waits for it; by default on a CPU.
    Returns w_dec's dtype, accumulated in float32 (float64) and rounded once; never an alias of base. A token's bits
    depend neither on the other tokens nor on the run. Differentiable, once, in values, w_dec and base.
    Raises TypeError (dtype) or ValueError (shape, device, layout, an index outside [0, m), a NaN or infinity).
    """
    op = "sparse_decode"
    checks.check_matrix(op, "w_dec", w_dec, (None, None), FLOATS)
    check_entries(op, values, indices, None, w_dec)
    n, (m, d) = values.shape[0], w_dec.shape
    if base is not None:
        shape = (d,) if isinstance(base, Tensor) and base.dim() == 1 else (n, d)
        checks.check_matrix(op, "base", base, shape, (w_dec.dtype, wide(w_dec.dtype)), w_dec.device)
    if checks.validates(validate, w_dec):
        checks.check_range(op, "indices", indices, m)
        checks.check_finite(op, "values", values)
        checks.check_parameter(op, "w_dec", w_dec)
        if base is not None:
            checks.check_finite(op, "base", base)
    return decode_op(values, indices, w_dec, base)
