"""rank_count in Triton: z_s of the asked features first, then the whole matrix product, of which nothing is written but
how many of each tile's features come before them.

Both use the same tile of the same shape, so a feature's two values are equal bit for bit, and so are those of features
that are copies of each other. Counts are added with integer atomics, whose sum does not depend on their order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import TENSOR_CORES, Config
from hooked_vla.kernels.sae_encode_topk.fused import (
    OPTIONS,
    encode_tile,
    is_narrow,
    order_of,
    tile,
)

# the width of the block of counts: the most features that are asked for
COUNTS: dict[str, Any] = {"BLOCK_S": 16}


@triton.jit
def own_kernel(
    x_ptr, w_ptr, b_ptr, features_ptr, own_ptr, n, d, n_features,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    places = tl.arange(0, BLOCK_M)
    asked = places < n_features
    features = tl.load(features_ptr + places, mask=asked, other=0)
    z = encode_tile(x_ptr, w_ptr, b_ptr, tokens, features, n, asked, d, BLOCK_N, BLOCK_M, BLOCK_D)
    at = tokens.to(tl.int64)[:, None] * n_features + places[None, :]
    tl.store(own_ptr + at, z, mask=(tokens < n)[:, None] & asked[None, :])


@triton.jit
def count_kernel(
    x_ptr, w_ptr, b_ptr, features_ptr, own_ptr, counts_ptr, n, m, d, n_features, n_blocks,
    BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share a block of the dictionary, which is the larger operand
    tokens = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = (tl.program_id(0) // n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = tokens < n, columns < m
    z = encode_tile(x_ptr, w_ptr, b_ptr, tokens, columns, n, in_m, d, BLOCK_N, BLOCK_M, BLOCK_D)
    # outside the dictionary it is that of -inf, and the index is larger than any: nothing there comes before a feature
    order = order_of(z)
    rows = tokens.to(tl.int64) * n_features
    places = tl.arange(0, BLOCK_S)
    counts = tl.zeros((BLOCK_N, BLOCK_S), tl.int32)
    for s in range(0, n_features):
        own = order_of(tl.load(own_ptr + rows + s, mask=in_n, other=0.0))[:, None]
        # equal ones come before s too where their index is smaller; no order is so small that this wraps
        last = own - (columns < tl.load(features_ptr + s)).to(tl.int32)[None, :]
        count = tl.sum((order > last).to(tl.int32), 1)
        counts = tl.where(places[None, :] == s, count[:, None], counts)
    # most tiles have nothing before a feature that is active
    wanted = in_n[:, None] & (places < n_features)[None, :] & (counts > 0)
    tl.atomic_add(counts_ptr + rows[:, None] + places[None, :], counts, mask=wanted, sem="relaxed")


def rank_count(x: Tensor, w_enc: Tensor, b_enc: Tensor, features: Tensor) -> Tensor:
    """As reference.py defines it."""
    (n, d), m, n_features = x.shape, w_enc.shape[0], features.shape[0]
    counts = torch.zeros((n, n_features), dtype=torch.int32, device=x.device)
    if counts.numel() == 0:
        return counts
    own = torch.empty((n, n_features), dtype=torch.float32, device=x.device)
    size = tile(is_narrow(x, w_enc))
    launch: dict[str, Any] = {**size, **OPTIONS}
    n_blocks = triton.cdiv(n, size["BLOCK_N"])
    own_kernel[(n_blocks,)](x, w_enc, b_enc, features, own, n, d, n_features, **launch)
    count_kernel[(n_blocks * triton.cdiv(m, size["BLOCK_M"]),)](
        x, w_enc, b_enc, features, own, counts, n, m, d, n_features, n_blocks, **launch, **COUNTS
    )
    return counts


def _configs(tokens: str, weights: str) -> list[Config]:
    size = tile(tokens == weights != "fp32")
    warps, stages = size.pop("num_warps"), size.pop("num_stages")
    pointers = {
        "x_ptr": f"*{tokens}", "w_ptr": f"*{weights}", "b_ptr": "*fp32", "features_ptr": "*i32", "own_ptr": "*fp32",
    }  # fmt: skip
    made = []
    for kernel, more, sizes, constexprs in (
        (own_kernel, {}, ("n", "d", "n_features"), {}),
        (count_kernel, {"counts_ptr": "*i32"}, ("n", "m", "d", "n_features", "n_blocks"), COUNTS),
    ):
        made.append(
            Config(
                kernel=kernel,
                signature={**pointers, **more, **dict.fromkeys(sizes, "i32")},
                constexprs={**constexprs, **size},
                divisible=(*pointers, *more, "d"),
                num_warps=warps,
                num_stages=stages,
                name=f"{kernel.__name__.removesuffix('_kernel')}-{tokens}-{weights}",
                expects=TENSOR_CORES if tokens == weights != "fp32" else {},
                options=OPTIONS,
            )
        )
    return made


CONFIGS = [
    *_configs("bf16", "bf16"),
    *_configs("fp16", "fp16"),
    *_configs("fp32", "fp32"),
    *_configs("bf16", "fp32"),
]
