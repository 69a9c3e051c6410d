"""Edits features of a sparse autoencoder that was trained on the mean token of a segment (an image, an instruction).

    m_g = mean of x over the tokens of segment g,  edit_g = delta_splice's edit of m_g,  y_t = x_t + edit_(segment of t)

In three steps that can be used alone: `segment_mean`, the edit, `segment_add`.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from hooked_vla.kernels.checks import check_finite, check_int, check_matrix, check_range, validates, wide
from hooked_vla.kernels.delta_splice import DTYPES, check_edits, check_features, splice_op
from hooked_vla.kernels.dispatch import implementation, paths_of, without_autocast

MEAN_PATHS = paths_of(__name__, "segment_mean")
ADD_PATHS = paths_of(__name__, "segment_add", ("reference", "fused"))


def _sizes(segment: Tensor, n_segments: int) -> Tensor:
    """[G 1], how many tokens each segment has; at least 1, for division."""
    numbers = torch.arange(n_segments, device=segment.device, dtype=segment.dtype)
    return (numbers[:, None] == segment).sum(1, keepdim=True).clamp_min(1)


@torch.library.custom_op("hooked_vla::segment_mean", mutates_args=())
def mean_op(x: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    return implementation("segment_mean", MEAN_PATHS, x)(x, segment, n_segments)


@torch.library.custom_op("hooked_vla::segment_add", mutates_args=())
def add_op(x: Tensor, delta: Tensor, segment: Tensor) -> Tensor:
    return implementation("segment_add", ADD_PATHS, x)(x, delta, segment)


@mean_op.register_fake
def _(x, segment, n_segments):
    return x.new_empty((n_segments, x.shape[1]), dtype=wide(x.dtype))


@add_op.register_fake
def _(x, delta, segment):
    return torch.empty_like(x)


def _keep_mean(ctx, inputs, output) -> None:
    x, segment, ctx.n_segments = inputs
    ctx.save_for_backward(segment)
    ctx.dtype = x.dtype


@without_autocast
def _mean_backward(ctx, grad: Tensor):
    (segment,) = ctx.saved_tensors
    share = (grad / _sizes(segment, ctx.n_segments)).contiguous()
    nothing = share.new_zeros((segment.shape[0], grad.shape[1]))
    return add_op(nothing, share, segment).to(ctx.dtype), None, None


def _keep_add(ctx, inputs, output) -> None:
    _, delta, segment = inputs
    ctx.save_for_backward(segment)
    ctx.n_segments = delta.shape[0]


@without_autocast
def _add_backward(ctx, grad: Tensor):
    (segment,) = ctx.saved_tensors
    if not ctx.needs_input_grad[1]:
        return grad, None, None
    mean = mean_op(grad.contiguous(), segment, ctx.n_segments)
    return grad, mean * _sizes(segment, ctx.n_segments), None


mean_op.register_autograd(_mean_backward, setup_context=_keep_mean)
add_op.register_autograd(_add_backward, setup_context=_keep_add)


def _check_segments(op: str, x: Tensor, segment: Tensor, n_segments: int, validate: bool | None) -> bool:
    """Raises unless x is [n d] and `segment` says of each token which of n_segments it belongs to.

    Returns whether values are looked at.
    """
    check_matrix(op, "x", x, (None, None), DTYPES)
    check_matrix(op, "segment", segment, (x.shape[0],), torch.int32, x.device)
    if n_segments < 0:
        raise ValueError(f"{op}: n_segments must be at least 0, got {n_segments}")
    values = validates(validate, x)
    if values:
        check_range(op, "segment", segment, n_segments, lower=-1)
    return values


def segment_mean(
    x: Float[Tensor, "n d"], segment: Int32[Tensor, " n"], n_segments: int, *, validate: bool | None = None
) -> Float[Tensor, "G d"]:
    """The mean token of each segment, float32 (float64 for float64 x); of a segment without tokens, zeros.

    x: tokens, float32, bfloat16, float16 (float64 on the reference path). segment: of each token its segment, from 0 to
    n_segments - 1, or -1 for none; in any order. A segment's sum is that of its own tokens in their order, wherever in
    the batch it begins. Differentiable in x.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices and layouts, a negative n_segments, and
    when values are looked at for segment numbers out of range and NaN or infinity in a segment's token.
    """
    n_segments = check_int("segment_mean", "n_segments", n_segments)
    if _check_segments("segment_mean", x, segment, n_segments, validate):
        check_finite("segment_mean", "x", x, rows=segment >= 0)
    return mean_op(x, segment, n_segments)


def segment_add(
    x: Float[Tensor, "n d"], delta: Float[Tensor, "G d"], segment: Int32[Tensor, " n"], *, validate: bool | None = None
) -> Float[Tensor, "n d"]:
    """y_t = x_t + delta[segment_t]; tokens of segment -1, and values to which 0 is added, keep their bits.

    x: tokens, float32, bfloat16, float16 (float64 on the reference path). delta: float32 (float64 for float64 x); the
    sum is made in it and rounded once. segment: of each token its row of delta, or -1. Differentiable in x and delta.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices and layouts, and when values are looked at
    for segment numbers out of range and NaN or infinity in delta or a segment's token.
    """
    check_matrix("segment_add", "x", x, (None, None), DTYPES)
    check_matrix("segment_add", "delta", delta, (None, x.shape[1]), wide(x.dtype), x.device)
    if _check_segments("segment_add", x, segment, delta.shape[0], validate):
        check_finite("segment_add", "x", x, rows=segment >= 0)
        check_finite("segment_add", "delta", delta)
    return add_op(x, delta, segment)


def segment_mean_delta(
    x: Float[Tensor, "n d"],
    segment: Int32[Tensor, " n"],
    n_segments: int,
    w_enc: Float[Tensor, "S d"],
    b_enc: Float[Tensor, " S"],
    threshold: Float[Tensor, " S"],
    w_dec: Float[Tensor, "S d"],
    scale: Float[Tensor, "R S"],
    shift: Float[Tensor, "R S"],
    lo: Float[Tensor, "R S"],
    hi: Float[Tensor, "R S"],
    *,
    row: Int32[Tensor, " G"] | None = None,
    validate: bool | None = None,
) -> Float[Tensor, "n d"]:
    """y_t = x_t + (g - f)·w_dec of t's segment: f the S features of the segment's mean token, g the edited ones.

    x, segment: as in `segment_mean`; tokens of segment -1 keep their bits. w_enc, b_enc, threshold, w_dec, scale,
    shift, lo, hi: as in `delta_splice`, the mean (float32) taking the place of the token. row: which of the R rows of
    the tables each segment uses; None where there is one. Differentiable in all that `delta_splice` is.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts, S and a negative n_segments, and
    when values are looked at for NaN (infinity too, but in threshold, lo and hi), indices out of range, lo > hi, and lo
    and hi that are both infinite in the same direction.
    """
    op = "segment_mean_delta"
    n_segments = check_int(op, "n_segments", n_segments)
    values = _check_segments(op, x, segment, n_segments, validate)
    check_features(op, x, w_enc, b_enc, threshold, w_dec, values)
    check_edits(op, n_segments, scale, shift, lo, hi, row, threshold, values)
    if values:
        check_finite(op, "x", x, rows=segment >= 0)
    mean = mean_op(x, segment, n_segments)
    tables = (b_enc, threshold, w_dec, scale, shift, lo, hi)
    edit = splice_op(mean, w_enc, *tables, row, None, False, True)[0]
    return add_op(x, edit, segment)
