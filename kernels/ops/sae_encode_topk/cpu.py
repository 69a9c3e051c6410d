"""sae_encode_topk on a CPU: a block of tokens at a time, so that z never fills the memory; the k best of the best runs.

PyTorch's own selection is fast and leaves open which of equal values it takes. So one value more than needed is looked
for: where all k + 1 are different there was no choice, and the few tokens where two are equal are selected by key.
"""

import torch
from torch import Tensor
from torch.nn import functional

from hooked_vla.kernels.sae_encode_topk import packed, reference

# features of a run: the fastest of 16, 32, 64 and 128 for 32 to 64 of 8k to 32k features
GROUP = 32
# features for each of the k, from which on looking at runs first is faster (measured: k of 32 to 128)
RUNS_FROM = 256
# elements of z, and of the dictionary in float32, that are held at once: 64 and 16 MB
Z_BLOCK, W_BLOCK = 1 << 24, 1 << 22


def encode(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
    """z = x·w_encᵀ + b_enc; a narrower dictionary is widened a block of features at a time."""
    wide = b_enc.dtype
    tokens = x.to(wide)
    if w_enc.dtype == wide:
        return functional.linear(tokens, w_enc, b_enc)
    z = torch.empty((x.shape[0], w_enc.shape[0]), dtype=wide)
    step = max(1, W_BLOCK // max(1, w_enc.shape[1]))
    for rows, bias, out in zip(w_enc.split(step), b_enc.split(step), z.split(step, dim=1), strict=True):
        out.copy_(functional.linear(tokens, rows.to(wide), bias))
    return z


def encode_gmax(x: Tensor, w_enc: Tensor, b_enc: Tensor, group: int) -> tuple[Tensor, Tensor]:
    z = encode(x, w_enc, b_enc)
    return z, reference.group_maxima(z, group)


def _candidates(z: Tensor, maxima: Tensor | None, group: int, count: int) -> tuple[Tensor, Tensor]:
    """(values, indices) of the `count` largest in descending order, any of equal ones.

    They are in the `count` runs with the largest maxima, since each of those has a value at least as large as any
    outside of them. Without maxima all features are looked at.
    """
    n, m = z.shape
    if maxima is None or maxima.shape[1] <= count:
        return z.topk(count, dim=1)
    best = maxima.topk(count, dim=1, sorted=False).indices
    columns = (best[:, :, None] * group + torch.arange(group)).view(n, -1)
    held = z.gather(1, columns.clamp_max(m - 1)).masked_fill_(columns >= m, -torch.inf)
    values, places = held.topk(count, dim=1)
    return values, columns.gather(1, places)


def _select(z: Tensor, maxima: Tensor | None, group: int, k: int) -> tuple[Tensor, Tensor]:
    values, indices = _candidates(z, maxima, group, min(k + 1, z.shape[1]))
    # not >, so that a NaN is unclear too
    unclear = (~(values[:, :-1] > values[:, 1:])).any(1)
    values, indices = values[:, :k].contiguous(), indices[:, :k].int()
    if bool(unclear.any()):
        exact = packed.select if z.dtype == torch.float32 else reference.select
        values[unclear], indices[unclear] = exact(z[unclear], k)
    return values, indices.contiguous()


def select_topk(z: Tensor, maxima: Tensor, group: int, k: int) -> tuple[Tensor, Tensor]:
    return _select(z, maxima if z.shape[1] >= RUNS_FROM * k else None, group, k)


def sae_encode_topk(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """As reference.py defines it."""
    (n, m) = x.shape[0], w_enc.shape[0]
    values = torch.empty((n, k), dtype=b_enc.dtype)
    indices = torch.empty((n, k), dtype=torch.int32)
    step = max(1, Z_BLOCK // m)
    for tokens, value, index in zip(x.split(step), values.split(step), indices.split(step), strict=True):
        z = encode(tokens, w_enc, b_enc)
        maxima = reference.group_maxima(z, GROUP) if m >= RUNS_FROM * k else None
        chosen, where = _select(z, maxima, GROUP, k)
        value.copy_(chosen.relu() if relu else chosen)
        index.copy_(where)
    return values, indices
