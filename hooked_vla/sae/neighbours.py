"""Features that are alike: by the direction that they write, and by the tokens in which they are active."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from hooked_vla.extras import needs_analysis_extra

# features that are compared with all others at once
BLOCK = 512


class Neighbours(NamedTuple):
    """The n nearest of every feature, nearest first. value: how near, 1 at most; NaN where there is no more."""

    feature: Int64[np.ndarray, "m n"]
    value: Float32[np.ndarray, "m n"]


def decoder_neighbours(w_dec: Float[Tensor, "m d"], n: int) -> Neighbours:
    """By the cosine of decoder rows; rows of length 0 have no neighbours, and are none.

    Memory: BLOCK × m numbers. Raises ValueError for n below 1 or above m - 1.
    """
    m = len(w_dec)
    _check(n, m)
    lengths = w_dec.detach().float().norm(dim=1)
    unit = w_dec.detach().float() / lengths.clamp_min(1e-30)[:, None]
    parts = []
    for start in range(0, m, BLOCK):
        cosine = unit[start : start + BLOCK] @ unit.T
        cosine[:, lengths == 0] = -torch.inf
        cosine[lengths[start : start + BLOCK] == 0] = -torch.inf
        parts.append(_nearest(cosine, start, n))
    return _joined(parts)


def coactive_neighbours(token: Int64[np.ndarray, " e"], feature: Int64[np.ndarray, " e"], m: int, n: int) -> Neighbours:
    """By the tokens in which both are active, over those in which one is (Jaccard): 1 for features that never part.

    token, feature: of every feature that is active in a token, each pair once. Those that share no token are no
    neighbours. Memory: the pairs, and BLOCK × m numbers. Raises ValueError for n below 1 or above m - 1.
    """
    _check(n, m)
    with needs_analysis_extra():
        from scipy.sparse import csr_matrix
    _, row = np.unique(token, return_inverse=True)
    shape = (int(row.max()) + 1 if len(row) else 1, m)
    active = csr_matrix((np.ones(len(row), np.float32), (row, feature)), shape=shape)
    by_feature, counts = active.T.tocsr(), np.bincount(feature, minlength=m).astype(np.float32)
    parts = []
    for start in range(0, m, BLOCK):
        both = torch.from_numpy(np.asarray((by_feature[start : start + BLOCK] @ active).todense(), np.float32))
        either = torch.from_numpy(counts[start : start + BLOCK, None] + counts[None]) - both
        share = torch.where(both > 0, both / either.clamp_min(1), -torch.inf)
        parts.append(_nearest(share, start, n))
    return _joined(parts)


def principal_components(w_dec: Float[Tensor, "m d"], n: int) -> Float32[np.ndarray, "m n"]:
    """Where decoder rows of length 1 lie along the n directions in which they differ most, the first the longest.

    Signs are such that each direction's largest number is positive. Memory: m × d and d × d numbers.
    Raises ValueError for n below 1 or above the width.
    """
    if not 1 <= n <= w_dec.shape[1]:
        raise ValueError(f"n must be in 1..{w_dec.shape[1]}, the width of decoder rows, got {n}")
    rows = w_dec.detach().double().cpu()
    unit = rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)
    centred = unit - unit.mean(0)
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    chosen = vectors.flip(1)[:, :n]
    largest = chosen.gather(0, chosen.abs().argmax(0, keepdim=True))
    return (centred @ (chosen * largest.sign())).float().numpy()


def _check(n: int, m: int) -> None:
    if not 1 <= n < m:
        raise ValueError(f"n must be in 1..{m - 1}, the number of other features, got {n}")


def _nearest(alike: Float[Tensor, "block m"], start: int, n: int) -> tuple[Tensor, Tensor]:
    """Of a block of features, beginning with feature `start`, without themselves."""
    own = torch.arange(len(alike), device=alike.device)
    alike[own, start + own] = -torch.inf
    return alike.topk(n, dim=1)


def _joined(parts: list[tuple[Tensor, Tensor]]) -> Neighbours:
    value, feature = (torch.cat(each).cpu() for each in zip(*parts, strict=True))
    return Neighbours(feature.numpy(), torch.where(value.isfinite(), value, torch.nan).float().numpy())
