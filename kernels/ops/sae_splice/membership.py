"""Which of a few features a top-k encoder keeps, as thresholds of each token: 0 where kept, else infinite.

With such thresholds an edit of a top-k autoencoder is delta_splice. Where a feature is at or below zero, or the token
outside the mask, the threshold may be either: nothing is active there.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_vla.kernels.dispatch import implementation
from hooked_vla.kernels.rank_count import MAX_FEATURES as MOST_RANKED
from hooked_vla.kernels.sae_encode_topk import cpu, reference


def _thresholds(kept: Tensor, like: Tensor) -> Tensor:
    return torch.where(kept, 0.0, torch.inf).to(like.dtype)


def _matches(indices: Tensor, features: Tensor) -> Tensor:
    """[n S]: whether the feature is among the token's indices [n k]."""
    return (indices[:, :, None] == features).any(1)


def by_order(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """From the sorted encoding: plain PyTorch, which defines it."""
    _, indices = reference.sae_encode_topk(x, w_enc, b_enc, k, True)
    return _thresholds(_matches(indices, features), b_enc)


def by_rank(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """By counting what comes before each feature, in the matrix product's epilogue; for many features by selection."""
    from hooked_vla.kernels.rank_count.fused import rank_count
    from hooked_vla.kernels.sae_encode_topk.fused import sae_encode_topk

    if features.shape[0] <= MOST_RANKED:
        return _thresholds(rank_count(x, w_enc, b_enc, features) < k, b_enc)
    _, indices = sae_encode_topk(x, w_enc, b_enc, k, True)
    return _thresholds(_matches(indices, features), b_enc)


def _encode(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z of a block of features. Rows of the dictionary as rows of the product: faster, above all for few tokens."""
    if w_enc.dtype != b_enc.dtype:
        return cpu.encode(x, w_enc, b_enc)
    return torch.addmm(b_enc[:, None], w_enc, x.to(b_enc.dtype).T).T


def by_need(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """From as few features as will tell: on a CPU the encoding is nearly all of an edit's time.

    A feature is not kept if it is at or below zero, or if any k features are above it. So the dictionary is encoded a
    block at a time, each as large as all before it, and tokens in which every feature is settled drop out. Exact
    selection decides where rounding could.
    """
    kept = torch.zeros((x.shape[0], features.shape[0]), dtype=torch.bool)
    chosen, m = features.long(), w_enc.shape[0]
    rows, bias = w_enc[chosen].to(b_enc.dtype), b_enc[chosen]
    z = _encode(x, rows, bias)
    # more than two sums of the same products differ by, whose errors grow with the root of their number
    slack = x.to(z.dtype).norm(dim=1, keepdim=True) * rows.norm(dim=1) + bias.abs()
    slack *= 8 * x.shape[1] ** 0.5 * torch.finfo(z.dtype).eps
    may = z > 0
    if mask is not None:
        may &= mask[:, None]
    tokens = may.any(1).nonzero()[:, 0]
    best = z.new_empty((len(tokens), 0))
    done = 0
    while done < m and len(tokens):
        block = slice(done, done + (done or max(4 * k, m // 16)))
        seen = torch.cat([best, _encode(x[tokens], w_enc[block], b_enc[block])], dim=1)
        best, done = seen.topk(min(k, seen.shape[1]), dim=1).values, block.stop
        if best.shape[1] < k:
            continue
        # not <, so that a NaN settles nothing
        may[tokens] &= ~(z[tokens] + slack[tokens] < best[:, -1:])
        left = may[tokens].any(1)
        tokens, best = tokens[left], best[left]
    if len(tokens):
        kept[tokens] = sure = may[tokens] & (z[tokens] - slack[tokens] > best[:, -1:])
        tokens = tokens[(may[tokens] & ~sure).any(1)]
    if len(tokens):
        _, indices = cpu.sae_encode_topk(x[tokens], w_enc, b_enc, k, True)
        kept[tokens] = _matches(indices, features)
    return _thresholds(kept, b_enc)


PATHS: dict[str, Callable[[], Callable[..., Any]]] = {
    "reference": lambda: by_order,
    "fused": lambda: by_rank,
    "cpu": lambda: by_need,
}


@torch.library.custom_op("hooked_vla::topk_threshold", mutates_args=())
def threshold_op(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor, k: int, mask: Tensor | None) -> Tensor:
    """[n S] in b_enc's dtype; a constant for autograd."""
    return implementation("topk_threshold", PATHS, x)(x, w_enc, b_enc, features, k, mask)


@threshold_op.register_fake
def _(x, w_enc, b_enc, features, k, mask):
    return b_enc.new_empty((x.shape[0], features.shape[0]))
