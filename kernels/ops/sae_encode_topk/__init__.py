"""The k largest pre-activations of a sparse autoencoder's encoder, exactly and always the same ones.

    z = x·w_encᵀ + b_enc;  the k largest z of each token in descending order, ties to the smaller index

`encode_gmax` and `select_topk` are its two halves: z with the maximum of each run of features, and the choice, which
then reads only the k best runs. Fold the decoder's bias into b_enc (`fold_bias`) where the encoder subtracts it.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from hooked_vla.kernels.checks import check_finite, check_int, check_matrix, check_parameter, validates
from hooked_vla.kernels.dispatch import implementation, paths_of
from hooked_vla.kernels.sae_encode_topk import autograd

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# a run's maximum is taken within one block of the matrix product
MAX_GROUP = 128


TOPK, GMAX, SELECT = (paths_of(__name__, name) for name in ("sae_encode_topk", "encode_gmax", "select_topk"))


@torch.library.custom_op("hooked_vla::sae_encode_topk", mutates_args=())
def topk_op(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    return implementation("sae_encode_topk", TOPK, x)(x, w_enc, b_enc, k, relu)


@topk_op.register_fake
def _(x, w_enc, b_enc, k, relu):
    return b_enc.new_empty((x.shape[0], k)), b_enc.new_empty((x.shape[0], k), dtype=torch.int32)


topk_op.register_autograd(autograd.backward, setup_context=autograd.setup_context)


@torch.library.custom_op("hooked_vla::encode_gmax", mutates_args=())
def gmax_op(x: Tensor, w_enc: Tensor, b_enc: Tensor, group: int) -> tuple[Tensor, Tensor]:
    return implementation("encode_gmax", GMAX, x)(x, w_enc, b_enc, group)


@gmax_op.register_fake
def _(x, w_enc, b_enc, group):
    n, m = x.shape[0], w_enc.shape[0]
    return b_enc.new_empty((n, m)), b_enc.new_empty((n, m // group))


@torch.library.custom_op("hooked_vla::select_topk", mutates_args=())
def select_op(z: Tensor, maxima: Tensor, group: int, k: int) -> tuple[Tensor, Tensor]:
    return implementation("select_topk", SELECT, z)(z, maxima, group, k)


@select_op.register_fake
def _(z, maxima, group, k):
    return z.new_empty((z.shape[0], k)), z.new_empty((z.shape[0], k), dtype=torch.int32)


def check_encoder(op: str, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> None:
    """Raises unless x is [n d], w_enc [m d] with m >= 1 and b_enc [m], of dtypes that go together."""
    check_matrix(op, "x", x, (None, None), DTYPES)
    d, device = x.shape[1], x.device
    exact = x.dtype == torch.float64
    check_matrix(op, "w_enc", w_enc, (None, d), x.dtype if exact else (x.dtype, torch.float32), device)
    if w_enc.shape[0] == 0:
        raise ValueError(f"{op}: w_enc must have at least one row (feature), got shape [0, {d}]")
    check_matrix(op, "b_enc", b_enc, (w_enc.shape[0],), torch.float64 if exact else torch.float32, device)


def check_k(op: str, k: int, m: int) -> int:
    """k as Python has it. Raises TypeError unless it is a whole number, ValueError unless it is in [1, m]."""
    k = check_int(op, "k", k)
    if not 1 <= k <= m:
        raise ValueError(f"{op}: k must lie in [1, {m}], the number of features, got {k}")
    return k


def _check_values(op: str, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> None:
    check_finite(op, "x", x)
    check_parameter(op, "w_enc", w_enc)
    check_parameter(op, "b_enc", b_enc)


def _check_group(op: str, name: str, group: int, m: int) -> None:
    if not 1 <= group <= MAX_GROUP or group & (group - 1) or m % group:
        raise ValueError(f"{op}: {name} must be a power of 2 up to {MAX_GROUP} that divides {m}, got {group}")


def sae_encode_topk(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "m d"],
    b_enc: Float[Tensor, " m"],
    k: int,
    *,
    relu: bool = True,
    validate: bool | None = None,
) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"]]:
    """(values, indices) of the k largest z = x·w_encᵀ + b_enc, in descending order, ties to the smaller index.

    x: tokens, float32, bfloat16 or float16; w_enc: x's dtype or float32; b_enc: float32. (Or all float64, not on the
    fused path.) values: float32; relu raises those below zero to it once they are chosen, so that there are always k.
    Sums are float32, and the choice is made by them. On a GPU a token's result depends neither on the other tokens nor
    on how many there are. NaN is the largest value, and stays NaN.
    Differentiable, once, in x, w_enc and b_enc through the chosen features; a value at or below zero has no gradient
    with relu.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts and k, and when values are looked
    at for NaN or infinity in x, w_enc, b_enc or, where their product is too large, the chosen values.
    """
    op = "sae_encode_topk"
    check_encoder(op, x, w_enc, b_enc)
    k = check_k(op, k, w_enc.shape[0])
    look = validates(validate, x)
    if look:
        _check_values(op, x, w_enc, b_enc)
    values, indices = topk_op(x, w_enc, b_enc, k, relu)
    if look:
        check_finite(op, "w_enc's product with x", values.detach())
    return values, indices


def encode_gmax(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "m d"],
    b_enc: Float[Tensor, " m"],
    group: int,
    *,
    validate: bool | None = None,
) -> tuple[Float[Tensor, "n m"], Float[Tensor, "n groups"]]:
    """(z, maxima): z = x·w_encᵀ + b_enc, float32, and the largest z of each run of `group` features.

    group: a power of 2 up to 128 that divides m. Dtypes, sums and `validate` as for sae_encode_topk. Not
    differentiable: sae_encode_topk is.
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts and group, and when values are
    looked at for NaN or infinity in x, w_enc or b_enc.
    """
    op = "encode_gmax"
    check_encoder(op, x, w_enc, b_enc)
    group = check_int(op, "group", group)
    _check_group(op, "group", group, w_enc.shape[0])
    if validates(validate, x):
        _check_values(op, x, w_enc, b_enc)
    return gmax_op(x, w_enc, b_enc, group)


def select_topk(
    z: Float[Tensor, "n m"], maxima: Float[Tensor, "n groups"], k: int, *, validate: bool | None = None
) -> tuple[Float[Tensor, "n k"], Int32[Tensor, "n k"]]:
    """(values, indices) of the k largest z of each token, in descending order, ties to the smaller index.

    z, maxima: as `encode_gmax` returns them, float32 (or float64, not on the fused path); with other maxima the result
    is not defined. -inf keeps a feature from being chosen before others. Not differentiable.
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts and k, and when values are looked
    at for NaN in z or maxima.
    """
    op = "select_topk"
    check_matrix(op, "z", z, (None, None), (torch.float32, torch.float64))
    check_matrix(op, "maxima", maxima, (z.shape[0], None), z.dtype, z.device)
    m, groups = z.shape[1], maxima.shape[1]
    k = check_k(op, k, m)
    if groups == 0 or m % groups:
        raise ValueError(f"{op}: maxima must have a column for each run of z's {m} features, got {groups} columns")
    _check_group(op, "z's columns over maxima's", m // groups, m)
    if validates(validate, z):
        check_finite(op, "z", z, infinite=True)
        check_finite(op, "maxima", maxima, infinite=True)
    return select_op(z, maxima, m // groups, k)
