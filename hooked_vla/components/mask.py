"""Attention masks from block flags, and the additive form that attention takes."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def block_mask(valid: Bool[Tensor, "batch seq"], starts_block: Bool[Tensor, " seq"]) -> Bool[Tensor, "batch seq seq"]:
    """True where query i may see key j: j's block is not after i's, and both are valid (big_vision, openpi).

    starts_block 0 0 0 1 1     i\\j  0 1 2 3 4
                               0    x x x
    three tokens that see      1    x x x
    each other, then two       2    x x x
    causal ones                3    x x x x
                               4    x x x x x
    """
    block = starts_block.long().cumsum(0)
    visible = block[None, :] <= block[:, None]
    return visible & valid[:, None, :] & valid[:, :, None]


def causal(valid: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq seq"]:
    """True where query i may see key j: j is not after i, and valid. Padded queries see what is valid before them."""
    length = valid.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=valid.device).tril()
    return earlier & valid[:, None, :]


def positions(valid: Bool[Tensor, "batch seq"]) -> Int[Tensor, "batch seq"]:
    """Position of each token among its row's valid tokens; padding repeats the position before it."""
    return valid.long().cumsum(1) - 1


def additive(visible: Bool[Tensor, "batch query key"], dtype: torch.dtype) -> Float[Tensor, "batch 1 query key"]:
    """0 where visible, the dtype's minimum elsewhere: a row that sees nothing attends evenly, as in the sources."""
    mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return mask.masked_fill(~visible, torch.finfo(dtype).min)[:, None]


def additive_or_blind(
    visible: Bool[Tensor, "batch query key"], dtype: torch.dtype
) -> Float[Tensor, "batch 1 query key"]:
    """Like `additive`, but a row that sees nothing attends to nothing: its minus infinities make fused attention, and
    ours, return 0 for it."""
    blind = ~visible.any(-1, keepdim=True)
    return additive(visible, dtype).masked_fill(blind[:, None], -torch.inf)
