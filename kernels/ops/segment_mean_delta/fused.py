"""segment_mean and segment_add in Triton.

One program of segment_mean owns one segment and BLOCK_D columns. It looks for the segment's first and last token, then
sums from the first on in blocks of BLOCK_N: which tokens share a block does not depend on where in the batch the
segment begins, so neither does the sum, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import Config


@triton.jit
def mean_kernel(
    x_ptr, segment_ptr, mean_ptr, n, d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SCAN: tl.constexpr,
):  # fmt: skip
    own = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = columns < d
    first = n
    end = 0
    count = 0
    for start in range(0, n, BLOCK_SCAN):
        at = start + tl.arange(0, BLOCK_SCAN)
        found = tl.load(segment_ptr + at, mask=at < n, other=-1) == own
        first = tl.minimum(first, tl.min(tl.where(found, at, n)))
        end = tl.maximum(end, tl.max(tl.where(found, at + 1, 0)))
        count += tl.sum(found.to(tl.int32))
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(first, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        found = tl.load(segment_ptr + at, mask=at < end, other=-1) == own
        here = found[:, None] & in_d[None, :]
        x = tl.load(x_ptr + at.to(tl.int64)[:, None] * d + columns[None, :], mask=here, other=0.0)
        total += tl.sum(x.to(tl.float32), axis=0)
    mean = total / tl.maximum(count, 1).to(tl.float32)
    tl.store(mean_ptr + own.to(tl.int64) * d + columns, mean, mask=in_d)


@triton.jit
def add_kernel(
    x_ptr, delta_ptr, segment_ptr, y_ptr, n, d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_n = tokens < n
    here = in_n[:, None] & (columns < d)[None, :]
    segment = tl.load(segment_ptr + tokens, mask=in_n, other=-1)
    rows = segment.to(tl.int64)[:, None] * d
    edit = tl.load(delta_ptr + rows + columns[None, :], mask=here & (segment >= 0)[:, None], other=0.0)
    at = tokens.to(tl.int64)[:, None] * d + columns[None, :]
    x = tl.load(x_ptr + at, mask=here, other=0.0)
    # the token's own bits where nothing is added: x + 0 is not x where x is -0.0
    y = tl.where(edit == 0.0, x, (x.to(tl.float32) + edit).to(x.dtype))
    tl.store(y_ptr + at, y, mask=here)


MEAN_BLOCKS = {"BLOCK_N": 32, "BLOCK_D": 64, "BLOCK_SCAN": 1024}
ADD_BLOCKS = {"BLOCK_N": 4, "BLOCK_D": 512}
WARPS, STAGES = 4, 2
OPTIONS = {"enable_fp_fusion": False}
LAUNCH = {"num_warps": WARPS, "num_stages": STAGES, **OPTIONS}


def segment_mean(x: Tensor, segment: Tensor, n_segments: int) -> Tensor:
    """As reference.py defines it."""
    n, d = x.shape
    mean = torch.empty((n_segments, d), dtype=torch.float32, device=x.device)
    if n_segments and d:
        mean_kernel[(n_segments, triton.cdiv(d, MEAN_BLOCKS["BLOCK_D"]))](
            x, segment, mean, n, d, **MEAN_BLOCKS, **LAUNCH
        )
    return mean


def segment_add(x: Tensor, delta: Tensor, segment: Tensor) -> Tensor:
    """As reference.py defines it."""
    n, d = x.shape
    y = torch.empty_like(x)
    if n and d:
        add_kernel[(triton.cdiv(n, ADD_BLOCKS["BLOCK_N"]), triton.cdiv(d, ADD_BLOCKS["BLOCK_D"]))](
            x, delta, segment, y, n, d, **ADD_BLOCKS, **LAUNCH
        )
    return y


def _config(kernel, tokens: str, pointers: dict[str, str], blocks: dict[str, int], name: str) -> Config:
    types = {"x_ptr": f"*{tokens}", "segment_ptr": "*i32", **pointers}
    return Config(
        kernel=kernel,
        signature={**types, "n": "i32", "d": "i32"},
        constexprs=blocks,
        divisible=(*types, "d"),
        num_warps=WARPS,
        num_stages=STAGES,
        name=f"{name}-{tokens}",
        options=OPTIONS,
    )


CONFIGS = [
    *(_config(mean_kernel, tokens, {"mean_ptr": "*fp32"}, MEAN_BLOCKS, "mean") for tokens in ("bf16", "fp32")),
    *(
        _config(add_kernel, tokens, {"delta_ptr": "*fp32", "y_ptr": f"*{tokens}"}, ADD_BLOCKS, "add")
        for tokens in ("bf16", "fp32")
    ),
]
