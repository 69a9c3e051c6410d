"""How many features come before a given one in the order of a top-k encoder, without ever writing the encoding.

    z = x·w_encᵀ + b_enc;  rank of s = number of j with z_j > z_s, or z_j = z_s and j < s

Feature s is among the k that sae_encode_topk chooses exactly where its rank is below k: what an edit of a few features
of a top-k autoencoder needs to know.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from hooked_vla.kernels.checks import check_finite, check_matrix, check_parameter, check_range, validates
from hooked_vla.kernels.dispatch import implementation, paths_of
from hooked_vla.kernels.sae_encode_topk import check_encoder

MAX_FEATURES = 16


PATHS = paths_of(__name__, "rank_count")


@torch.library.custom_op("hooked_vla::rank_count", mutates_args=())
def rank_op(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor) -> Tensor:
    return implementation("rank_count", PATHS, x)(x, w_enc, b_enc, features)


@rank_op.register_fake
def _(x, w_enc, b_enc, features):
    return x.new_empty((x.shape[0], features.shape[0]), dtype=torch.int32)


def rank_count(
    x: Float[Tensor, "n d"],
    w_enc: Float[Tensor, "m d"],
    b_enc: Float[Tensor, " m"],
    features: Int32[Tensor, " S"],
    *,
    validate: bool | None = None,
) -> Int32[Tensor, "n S"]:
    """How many j have z_j > z_s, or z_j = z_s and j < s, for each token and each of at most 16 features s.

    x: tokens, float32, bfloat16 or float16; w_enc: x's dtype or float32; b_enc: float32. (Or all float64, not on the
    fused path.) features: indices into w_enc's rows, in any order. Sums are float32. On a GPU a token's counts depend
    neither on the other tokens nor on how many there are. NaN is the largest value. Not differentiable.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts and S, and when values are looked
    at for features out of range and for NaN or infinity in x, w_enc or b_enc.
    """
    op = "rank_count"
    check_encoder(op, x, w_enc, b_enc)
    check_matrix(op, "features", features, (None,), torch.int32, x.device)
    if features.shape[0] > MAX_FEATURES:
        raise ValueError(f"{op}: features must be at most {MAX_FEATURES}, got {features.shape[0]}")
    if validates(validate, x):
        check_range(op, "features", features, w_enc.shape[0])
        check_finite(op, "x", x)
        check_parameter(op, "w_enc", w_enc)
        check_parameter(op, "b_enc", b_enc)
    return rank_op(x, w_enc, b_enc, features)
