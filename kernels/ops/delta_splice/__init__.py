"""Edits a few features of a sparse autoencoder in place, error term kept, without the full encode or decode.

    z = x·w_encᵀ + b_enc,  f = z where z > threshold else 0,  g = clamp(scale·f + shift, lo, hi)
    y = x + mask·(g - f)·w_dec

This is exactly decode(edited features) + (x - decode(features)) for ReLU (threshold 0), JumpReLU, and BatchTopK at
inference (one threshold for all), since every feature that is not edited cancels: S encoder and S decoder rows do.
"""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from hooked_vla.kernels.checks import (
    check_finite,
    check_matrix,
    check_parameter,
    check_range,
    validates,
    wide,
)
from hooked_vla.kernels.delta_splice import autograd
from hooked_vla.kernels.dispatch import implementation, paths_of

MAX_FEATURES = 64
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


PATHS = paths_of(__name__, "delta_splice")


@torch.library.custom_op("hooked_vla::delta_splice", mutates_args=())
def splice_op(
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
    """(y, f). threshold may be [n S] too, each token's own. Without `emit`, f is [0 S].

    With `edit_only`, y is the edit y - x itself, in the accumulator's dtype.
    """
    run = implementation("delta_splice", PATHS, x)
    return run(x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi, row, mask, emit, edit_only)


@splice_op.register_fake
def _(x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi, row, mask, emit, edit_only):
    y = torch.empty_like(x, dtype=scale.dtype if edit_only else x.dtype)
    return y, scale.new_empty((x.shape[0] if emit else 0, w_enc.shape[0]))


splice_op.register_autograd(autograd.backward, setup_context=autograd.setup_context)


def check_features(
    op: str, x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor, w_dec: Tensor, validate: bool
) -> None:
    """Raises unless x is [n d] and the features' weights fit it."""
    check_matrix(op, "x", x, (None, None), DTYPES)
    d, device = x.shape[1], x.device
    sums = wide(x.dtype)
    check_matrix(op, "w_enc", w_enc, (None, d), (x.dtype, torch.float32), device)
    n_features = w_enc.shape[0]
    if n_features > MAX_FEATURES:
        raise ValueError(f"{op}: w_enc must have at most {MAX_FEATURES} rows (edited features), got {n_features}")
    check_matrix(op, "b_enc", b_enc, (n_features,), sums, device)
    check_matrix(op, "threshold", threshold, (n_features,), sums, device)
    check_matrix(op, "w_dec", w_dec, (n_features, d), (x.dtype, torch.float32), device)
    if validate:
        for name, weights in (("w_enc", w_enc), ("b_enc", b_enc), ("w_dec", w_dec)):
            check_parameter(op, name, weights)
        check_parameter(op, "threshold", threshold, infinite=True)


def _check_bounds(op: str, lo: Tensor, hi: Tensor) -> None:
    """Raises unless some finite number lies between each lo and its hi."""
    # false for NaN too
    if bool(((lo <= hi) & (lo < torch.inf) & (hi > -torch.inf)).all()):
        return
    check_finite(op, "lo", lo, infinite=True)
    check_finite(op, "hi", hi, infinite=True)
    if bool((lo > hi).any()):
        raise ValueError(f"{op}: lo must be at most hi, got {(lo > hi).nonzero()[0].tolist()} the other way round")
    name, table, bad = ("lo", lo, torch.inf) if bool((lo == torch.inf).any()) else ("hi", hi, -torch.inf)
    where = (table == bad).nonzero()[0].tolist()
    raise ValueError(f"{op}: {name} must leave a finite number, got {bad} at {where}")


def check_edits(
    op: str,
    n: int,
    scale: Tensor,
    shift: Tensor,
    lo: Tensor,
    hi: Tensor,
    row: Tensor | None,
    like: Tensor,
    validate: bool,
) -> None:
    """Raises unless the edit tables are [R S] as `like` [S] is, and `row` picks one of the R for each of n."""
    check_matrix(op, "scale", scale, (None, like.shape[0]), like.dtype, like.device)
    n_rows = scale.shape[0]
    for name, table in (("shift", shift), ("lo", lo), ("hi", hi)):
        check_matrix(op, name, table, scale.shape, like.dtype, like.device)
    if row is not None:
        check_matrix(op, "row", row, (n,), torch.int32, like.device)
    elif n_rows != 1:
        raise ValueError(f"{op}: row must say which of the {n_rows} rows of scale each token uses, got None")
    if validate:
        check_parameter(op, "scale", scale)
        check_parameter(op, "shift", shift)
        _check_bounds(op, lo, hi)
        if row is not None:
            check_range(op, "row", row, n_rows)


def _checked(
    op: str, tensors: tuple[Tensor, ...], row: Tensor | None, mask: Tensor | None, validate: bool | None,
    emit: bool = False, edit_only: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi = tensors
    values = isinstance(x, Tensor) and validates(validate, x)
    check_features(op, x, w_enc, b_enc, threshold, w_dec, values)
    check_edits(op, x.shape[0], scale, shift, lo, hi, row, threshold, values)
    if mask is not None:
        check_matrix(op, "mask", mask, (x.shape[0],), torch.bool, x.device)
    if values:
        check_finite(op, "x", x, rows=mask)
    return splice_op(x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi, row, mask, emit, edit_only)


def delta_splice(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "S d"],
    b_enc: Float[Tensor, " S"],
    threshold: Float[Tensor, " S"],
    w_dec: Float[Tensor, "S d"],
    scale: Float[Tensor, "R S"],
    shift: Float[Tensor, "R S"],
    lo: Float[Tensor, "R S"],
    hi: Float[Tensor, "R S"],
    *,
    row: Int32[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    validate: bool | None = None,
) -> Float[Tensor, "n d"]:
    """x with S features edited: y = x + mask·(clamp(scale·f + shift, lo, hi) - f)·w_dec, f = z·[z > threshold].

    x: tokens, float32, bfloat16 or float16 (float64 on the reference path). w_enc, w_dec: the edited features' encoder
    and decoder rows, in x's dtype or float32. b_enc, threshold and the tables: float32 (float64 for float64 x); b_enc
    has the decoder's bias folded in (`fold_bias`). S is at most 64.
    scale, shift, lo, hi: one row of S values for each kind of edit; `row` says which of the R each token uses.
    Set a feature to v: scale 0, shift v. Ablate: scale 0. Leave alone: scale 1, shift 0, lo -inf, hi inf.
    mask: tokens to edit; None edits all.

    Sums are float32. Where the mask is False or the edit is exactly zero, the output has x's own bits. In Triton a
    token's result depends neither on the other tokens nor on how many there are; elsewhere that is up to PyTorch's
    matrix product. Contents of every tensor may change between replays of a captured graph. Differentiable, any number
    of times, in x, the weights, b_enc and the tables; not in threshold.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts and S, and when values are looked
    at for NaN (infinity too, but in threshold, lo and hi) in edited tokens or parameters, `row` out of range, lo > hi,
    and lo and hi that are both infinite in the same direction.
    """
    tensors = (x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi)
    return _checked("delta_splice", tensors, row, mask, validate)[0]


def delta_splice_features(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "S d"],
    b_enc: Float[Tensor, " S"],
    threshold: Float[Tensor, " S"],
    w_dec: Float[Tensor, "S d"],
    scale: Float[Tensor, "R S"],
    shift: Float[Tensor, "R S"],
    lo: Float[Tensor, "R S"],
    hi: Float[Tensor, "R S"],
    *,
    row: Int32[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    validate: bool | None = None,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n S"]]:
    """`delta_splice`, and f [n S], the features before the edit, of every token: float32 (float64 for such x)."""
    tensors = (x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi)
    return _checked("delta_splice_features", tensors, row, mask, validate, emit=True)


def splice_edit(
    x: Tensor, rows: tuple[Tensor, ...], tables: tuple[Tensor, ...], row: Tensor | None, mask: Tensor | None
) -> Float[Tensor, "n d"]:
    """What `delta_splice` would add to x, not rounded: float32 (float64 for float64 x); 0 outside of the mask.

    rows: w_enc, b_enc, threshold, w_dec; tables: scale, shift, lo, hi. Raises as delta_splice.
    """
    return _checked("delta_splice", (x, *rows, *tables), row, mask, None, edit_only=True)[0]


def fold_bias(
    w_enc: Float[Tensor, "S d"], b_enc: Float[Tensor, " S"], b_dec: Float[Tensor, " d"]
) -> Float[Tensor, " S"]:
    """b_enc - w_enc·b_dec, summed in float64: the bias of an encoder that subtracts the decoder's bias from its input.

    Returns float64 for a float64 w_enc, else float32, as the ops take it. Its values are looked at by the ops.
    Raises TypeError or ValueError for tensors that do not fit together.
    """
    check_matrix("fold_bias", "w_enc", w_enc, (None, None), contiguous=False)
    check_matrix("fold_bias", "b_enc", b_enc, (w_enc.shape[0],), device=w_enc.device, contiguous=False)
    check_matrix("fold_bias", "b_dec", b_dec, (w_enc.shape[1],), device=w_enc.device, contiguous=False)
    return (b_enc.double() - w_enc.double() @ b_dec.double()).to(wide(w_enc.dtype))
