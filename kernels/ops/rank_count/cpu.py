"""rank_count on a CPU: where there is no NaN, one comparison of each z a feature, into numbers quick to add."""

import torch
from torch import Tensor

from hooked_vla.kernels.rank_count import reference
from hooked_vla.kernels.sae_encode_topk.reference import encode

# up to here float32 counts exactly
MOST_COUNTED = 1 << 24


def rank_count(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor) -> Tensor:
    """As reference.py defines it."""
    z = encode(x, w_enc, b_enc)
    if z.shape[1] > MOST_COUNTED or bool(z.isnan().any()):
        return reference.counted(z, features)
    counts = torch.empty((x.shape[0], features.shape[0]), dtype=torch.int32)
    before = torch.empty_like(z)
    for column, s in enumerate(features.tolist()):
        own = z[:, s : s + 1]
        # of two that are equal the one with the smaller index comes first
        torch.ge(z[:, :s], own, out=before[:, :s])
        torch.gt(z[:, s:], own, out=before[:, s:])
        counts[:, column] = before.sum(1)
    return counts
