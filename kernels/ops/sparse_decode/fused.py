"""The same in Triton: a program sums one token's rows for a block of columns.

Never the dense product with the code spread out: that would round the values to the dictionary's dtype, its bits would
depend on the number of tokens, and it would read less memory only where the dictionary is too large for the L2 cache
and yet has few features for so many active ones (m < 158·k, for n·k > m).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import WIDE_LOADS, Config
from hooked_vla.kernels.sparse_backward.fused import BLOCK_K, LAUNCH, OPTIONS, STAGES, WARPS, block_d


@triton.jit
def decode_kernel(
    values, indices, w_dec, base, out, base_stride, D: tl.constexpr, K: tl.constexpr, HAS_BASE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    sums = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, K, BLOCK_K):
        entry = start + tl.arange(0, BLOCK_K)
        chosen = entry < K
        row = tl.load(indices + token * K + entry, mask=chosen, other=0).to(tl.int64)
        value = tl.load(values + token * K + entry, mask=chosen, other=0.0)
        rows = tl.load(w_dec + row[:, None] * D + column[None, :], mask=chosen[:, None] & inside[None, :], other=0.0)
        sums += value[:, None] * rows.to(tl.float32)
    total = tl.sum(sums, 0)
    if HAS_BASE:
        total += tl.load(base + token * base_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * D + column, total.to(out.dtype.element_ty), mask=inside)


def sparse_decode(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    (n, k), d = values.shape, w_dec.shape[1]
    out = torch.empty((n, d), dtype=w_dec.dtype, device=w_dec.device)
    if n:
        sizes = {"D": d, "K": k, "HAS_BASE": base is not None, "BLOCK_K": BLOCK_K, "BLOCK_D": block_d(d)}
        stride = 0 if base is None or base.dim() == 1 else d
        decode_kernel[(n, triton.cdiv(d, block_d(d)))](
            values, indices, w_dec, w_dec if base is None else base, out, stride, **sizes, **LAUNCH
        )
    return out


def _config(dtype: str, d: int, k: int) -> Config:
    pointers = {"values": "*fp32", "indices": "*i32", **dict.fromkeys(("w_dec", "base", "out"), f"*{dtype}")}
    return Config(
        kernel=decode_kernel,
        signature={**pointers, "base_stride": "i32"},
        constexprs={"D": d, "K": k, "HAS_BASE": True, "BLOCK_K": BLOCK_K, "BLOCK_D": block_d(d)},
        divisible=[*pointers, "base_stride"],
        num_warps=WARPS,
        num_stages=STAGES,
        name=f"decode {dtype} d={d} k={k}",
        expects=WIDE_LOADS,
        options=OPTIONS,
    )


CONFIGS = [_config("bf16", 1024, 64), _config("fp32", 720, 32)]
