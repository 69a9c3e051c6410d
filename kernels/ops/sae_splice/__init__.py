"""A sparse autoencoder in the place of an activation, with features edited and, if wanted, its error term kept.

    z = x·w_encᵀ + b_enc;  f = z where z > threshold (JumpReLU, BatchTopK), or where among the k largest and above zero
    g = clamp(scale·f + shift, lo, hi) for the edited features, f for the others
    error kept: y = x + (g - f)·w_dec        error dropped: y = g·w_dec + b_dec

With the error kept nothing but the edited features matters: delta_splice, for a threshold without any encoding, for a
top k after finding out which of them are among the k. With it dropped, the k active rows are decoded.
"""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from hooked_vla.kernels.checks import check_finite, check_matrix, check_parameter, check_range, validates
from hooked_vla.kernels.delta_splice import MAX_FEATURES, check_edits, splice_op
from hooked_vla.kernels.sae_encode_topk import check_encoder, check_k, topk_op
from hooked_vla.kernels.sae_splice.dense import decode_op, encode_op
from hooked_vla.kernels.sae_splice.membership import threshold_op
from hooked_vla.kernels.sae_splice.reference import edited
from hooked_vla.kernels.sparse_decode import decode_op as sparse_decode_op

OP = "sae_splice"
# what leaves a feature as it is
IDENTITY = {"scale": 1.0, "shift": 0.0, "lo": -torch.inf, "hi": torch.inf}

Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def _check_dictionary(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, k: int | None, threshold: Tensor | None
) -> None:
    check_encoder(OP, x, w_enc, b_enc)
    (m, d), wide = w_enc.shape, b_enc.dtype
    check_matrix(OP, "w_dec", w_dec, (m, d), wide if x.dtype == wide else (x.dtype, wide), x.device)
    check_matrix(OP, "b_dec", b_dec, (d,), (w_dec.dtype, wide), x.device)
    if (k is None) == (threshold is None):
        raise ValueError(f"{OP}: exactly one of k and threshold must be given, got {'none' if k is None else 'both'}")
    if threshold is not None:
        check_matrix(OP, "threshold", threshold, (m,), wide, x.device)


def _tables(features: Tensor | None, like: Tensor, given: dict[str, Tensor | None]) -> Tables | None:
    """scale, shift, lo, hi, those not given filled in with what changes nothing."""
    present = {name: table for name, table in given.items() if table is not None}
    if features is None:
        if present:
            raise ValueError(f"{OP}: features must say what {' and '.join(present)} edit, got None")
        return None
    if not present:
        raise ValueError(f"{OP}: features are given, so at least one of {', '.join(given)} must be, got none")
    check_matrix(OP, "features", features, (None,), torch.int32, like.device)
    name, first = next(iter(present.items()))
    check_matrix(OP, name, first, (None, features.shape[0]), like.dtype, like.device)
    filled = (present[name] if name in present else torch.full_like(first, IDENTITY[name]) for name in IDENTITY)
    scale, shift, lo, hi = filled
    return scale, shift, lo, hi


def _check_values(
    x: Tensor, w_enc: Tensor, w_dec: Tensor, vectors: dict[str, Tensor | None], features: Tensor | None,
    mask: Tensor | None, error: bool,
) -> None:  # fmt: skip
    check_finite(OP, "x", x, rows=mask)
    for name, value in vectors.items():
        if value is not None:
            check_parameter(OP, name, value, infinite=name == "threshold")
    # with the error kept and a threshold, what is not edited is not read
    whole = {"w_enc": not error or vectors["threshold"] is None, "w_dec": not error}
    for name, weights in (("w_enc", w_enc), ("w_dec", w_dec)):
        if whole[name]:
            check_parameter(OP, name, weights)
    if features is None:
        return
    check_range(OP, "features", features, w_enc.shape[0])
    unique, counts = features.unique(return_counts=True)
    if len(unique) < len(features):
        raise ValueError(f"{OP}: features must differ from each other, got {int(unique[counts > 1][0])} twice")
    for name, weights in (("w_enc", w_enc), ("w_dec", w_dec)):
        if not whole[name]:
            check_finite(OP, f"{name} at the edited features", weights.detach().index_select(0, features))


def _with_error(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, k: int | None, threshold: Tensor | None,
    features: Tensor, tables: Tables, row: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    if threshold is None:
        assert k is not None
        gate = threshold_op(x.detach(), w_enc.detach(), b_enc.detach(), features, k, mask)
    else:
        gate = threshold.index_select(0, features)
    w_enc, b_enc, w_dec = (each.index_select(0, features) for each in (w_enc, b_enc, w_dec))
    return splice_op(x, w_enc, b_enc, gate, w_dec, *tables, row, mask, False, False)[0]


def _topk_without_error(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, k: int,
    features: Tensor | None, tables: Tables | None, row: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    values, indices = topk_op(x, w_enc, b_enc, k, True)
    if mask is not None:
        # a token outside the mask may hold NaN, which gradients of w_dec would see
        values = torch.where(mask[:, None], values, 0)
    if features is not None and tables is not None:
        # edited features leave the list of the active ones and come back at its end, active or not
        hit = indices[:, :, None] == features
        f = torch.where(hit, values[:, :, None], 0).sum(1)
        values = torch.cat([torch.where(hit.any(2), 0, values), edited(f, *tables, row)], dim=1)
        indices = torch.cat([indices, features.expand(x.shape[0], -1)], dim=1)
    return sparse_decode_op(values, indices, w_dec, b_dec)


def _threshold_without_error(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor, b_dec: Tensor, threshold: Tensor,
    features: Tensor | None, tables: Tables | None, row: Tensor | None, mask: Tensor | None,
) -> Tensor:  # fmt: skip
    if mask is not None:
        # a token outside the mask may hold NaN, which gradients of the dictionary would see
        x = torch.where(mask[:, None], x, 0)
    f = encode_op(x, w_enc, b_enc, threshold)
    if features is not None and tables is not None:
        chosen = features.long()
        f = f.index_copy(1, chosen, edited(f.index_select(1, chosen), *tables, row))
    return decode_op(f, w_dec, b_dec)


def sae_splice(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "m d"],
    b_enc: Float[Tensor, " m"],
    w_dec: Float[Tensor, "m d"],
    b_dec: Float[Tensor, " d"],
    *,
    error: bool,
    k: int | None = None,
    threshold: Float[Tensor, " m"] | None = None,
    features: Int32[Tensor, " S"] | None = None,
    scale: Float[Tensor, "R S"] | None = None,
    shift: Float[Tensor, "R S"] | None = None,
    lo: Float[Tensor, "R S"] | None = None,
    hi: Float[Tensor, "R S"] | None = None,
    row: Int32[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    validate: bool | None = None,
) -> Float[Tensor, "n d"]:
    """x through a sparse autoencoder, S of its features edited; the formula stands at the head of this file.

    x: tokens, float32, bfloat16 or float16. w_enc, w_dec: x's dtype or float32. b_enc: float32, with the decoder's bias
    folded in (`fold_bias`) where the encoder subtracts it. b_dec: w_dec's dtype or float32; it takes part if the error
    is dropped. (Or all float64, not on the fused path.) All contiguous, on one device.
    Exactly one of k (a top-k encoder with relu, ties to the smaller index) and threshold (float32, 0 for ReLU).
    error: keep x - decode(f), so that without edits y is x; at most 64 features then. Else y is the reconstruction.
    features: which to edit, each once; None edits none. scale, shift, lo, hi: float32, one row of S values for each
    kind of edit; what is left out leaves alone. `row` says which of the R each token uses.
    mask: tokens to treat; the others keep x's bits, and so do, with the error, tokens whose edit is exactly zero.

    Contents of every tensor may change between replays of a captured graph. Differentiable in x, the dictionary, the
    biases and the tables, through the active features; neither the choice of the k nor the threshold has a gradient.
    Edited rows are copied out of the dictionary at each call: with a threshold and a fixed set of features, a
    delta_splice of rows that were copied once is faster.

    validate: look at the values too (default: on a CPU only, since it synchronises); of the dictionary at what is read,
    which with the error kept is w_dec at the edited features, and with a threshold w_enc too.
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts, k and combinations of arguments,
    and when values are looked at for NaN or infinity in treated tokens and parameters, features that are out of range
    or repeated, `row` out of range, lo > hi, and lo and hi that are both infinite in the same direction.
    """
    _check_dictionary(x, w_enc, b_enc, w_dec, b_dec, k, threshold)
    k = None if k is None else check_k(OP, k, w_enc.shape[0])
    tables = _tables(features, b_enc, {"scale": scale, "shift": shift, "lo": lo, "hi": hi})
    if mask is not None:
        check_matrix(OP, "mask", mask, (x.shape[0],), torch.bool, x.device)
    look = validates(validate, x)
    if look:
        _check_values(x, w_enc, w_dec, {"b_enc": b_enc, "b_dec": b_dec, "threshold": threshold}, features, mask, error)
    if features is not None and tables is not None:
        if error and features.shape[0] > MAX_FEATURES:
            raise ValueError(f"{OP}: at most {MAX_FEATURES} features with the error kept, got {features.shape[0]}")
        check_edits(OP, x.shape[0], *tables, row, b_enc.new_empty(features.shape[0]), look)
    elif row is not None:
        raise ValueError(f"{OP}: row must be None without features")

    if error:
        if features is None or tables is None:
            return x.clone()
        return _with_error(x, w_enc, b_enc, w_dec, k, threshold, features, tables, row, mask)
    if threshold is not None:
        y = _threshold_without_error(x, w_enc, b_enc, w_dec, b_dec, threshold, features, tables, row, mask)
    else:
        assert k is not None
        y = _topk_without_error(x, w_enc, b_enc, w_dec, b_dec, k, features, tables, row, mask)
    return y.to(x.dtype) if mask is None else torch.where(mask[:, None], y.to(x.dtype), x)
