"""The same in Triton.

Entries are sorted by feature with a stable sort, so that a feature's tokens keep their order; then one program sums a
feature's rows (of grad and of x at once) for a block of columns, and writes zeros where the feature was never active.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import WIDE_LOADS, Config

# Rows that are in flight at once, by the kernel: 16 or 8 rows of a block of columns are 32 registers a thread and sum.
BLOCK_K = 16
BLOCK_E = 8
WARPS, STAGES = 4, 2
OPTIONS = {"enable_fp_fusion": True}
LAUNCH = {"num_warps": WARPS, "num_stages": STAGES, **OPTIONS}


def block_d(d: int) -> int:
    """Columns of a block; by d alone, so that a token's bits do not depend on how many there are."""
    return min(256, 1 << (d - 1).bit_length())


@triton.jit
def dots_kernel(
    grad, indices, values, w, dots, D: tl.constexpr, K: tl.constexpr, RELU: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    entry = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    chosen = entry < K
    row = tl.load(indices + token * K + entry, mask=chosen, other=0).to(tl.int64)
    products = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, D, BLOCK_D):
        column = start + tl.arange(0, BLOCK_D)
        inside = column < D
        slope = tl.load(grad + token * D + column, mask=inside, other=0.0).to(tl.float32)
        rows = tl.load(w + row[:, None] * D + column[None, :], mask=chosen[:, None] & inside[None, :], other=0.0)
        products += slope[None, :] * rows.to(tl.float32)
    total = tl.sum(products, 1)
    if RELU:
        active = tl.load(values + token * K + entry, mask=chosen, other=0.0) > 0
        total = tl.where(active, total, 0.0)
    tl.store(dots + token * K + entry, total, mask=chosen)


@triton.jit
def outer_kernel(
    values, grad, d_values, x, order, bounds, d_dec, d_enc, d_bias, D: tl.constexpr, K: tl.constexpr,
    HAS_X: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < D
    begin = tl.load(bounds + feature)
    end = tl.load(bounds + feature + 1)
    dec = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    enc = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    bias = tl.zeros([BLOCK_E], tl.float32)
    for start in range(begin, end, BLOCK_E):
        place = start + tl.arange(0, BLOCK_E)
        held = place < end
        entry = tl.load(order + place, mask=held, other=0)
        token = entry // K
        both = held[:, None] & inside[None, :]
        offset = token[:, None] * D + column[None, :]
        value = tl.load(values + entry, mask=held, other=0.0)
        dec += value[:, None] * tl.load(grad + offset, mask=both, other=0.0).to(tl.float32)
        d_value = tl.load(d_values + entry, mask=held, other=0.0)
        bias += d_value
        if HAS_X:
            enc += d_value[:, None] * tl.load(x + offset, mask=both, other=0.0).to(tl.float32)
    out = feature * D + column
    tl.store(d_dec + out, tl.sum(dec, 0).to(d_dec.dtype.element_ty), mask=inside)
    if HAS_X:
        tl.store(d_enc + out, tl.sum(enc, 0).to(d_enc.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        tl.store(d_bias + feature, tl.sum(bias, 0))


def _dots(grad: Tensor, values: Tensor | None, indices: Tensor, w: Tensor) -> Tensor:
    """Masked to values > 0 where they are given."""
    (n, k), d = indices.shape, w.shape[1]
    dots = torch.empty((n, k), dtype=torch.float32, device=w.device)
    if n and k:
        sizes = {"D": d, "K": k, "RELU": values is not None, "BLOCK_K": BLOCK_K, "BLOCK_D": block_d(d)}
        dots_kernel[(n, triton.cdiv(k, BLOCK_K))](
            grad, indices, dots if values is None else values, w, dots, **sizes, **LAUNCH
        )
    return dots


def by_feature(indices: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """(order, bounds): entries of [n k] sorted by feature, then token; feature i's are order[bounds[i]:bounds[i + 1]].

    Shapes do not depend on the values, and nothing waits for the host.
    """
    by_index, order = indices.flatten().sort(stable=True)
    edges = torch.arange(m + 1, dtype=torch.int32, device=indices.device)
    return order, torch.searchsorted(by_index, edges)


def _outer(
    values: Tensor, grad: Tensor, d_values: Tensor, x: Tensor | None, indices: Tensor, m: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(Σ values·grad, Σ d_values·x, Σ d_values) of each feature; without x the second has no rows."""
    d, device = grad.shape[1], grad.device
    d_dec = torch.empty((m, d), dtype=dtype, device=device)
    d_enc = torch.empty((0 if x is None else m, d), dtype=dtype, device=device)
    d_bias = torch.empty(m, dtype=torch.float32, device=device)
    sizes = {
        "D": d, "K": max(1, values.shape[1]), "HAS_X": x is not None, "BLOCK_E": BLOCK_E, "BLOCK_D": block_d(d),
    }  # fmt: skip
    outer_kernel[(m, triton.cdiv(d, block_d(d)))](
        values,
        grad,
        d_values,
        grad if x is None else x,
        *by_feature(indices, m),
        d_dec,
        d_enc,
        d_bias,
        **sizes,
        **LAUNCH,
    )
    return d_dec, d_enc, d_bias


def sparse_dots(grad: Tensor, indices: Tensor, w: Tensor) -> Tensor:
    return _dots(grad, None, indices, w)


def sparse_outer(values: Tensor, indices: Tensor, x: Tensor, m: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outer, _, total = _outer(values, x, values, None, indices, m, dtype)
    return outer, total


def sparse_backward(
    grad: Tensor, x: Tensor | None, values: Tensor, indices: Tensor, w_dec: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    d_values = _dots(grad, values if relu else None, indices, w_dec)
    return d_values, *_outer(values, grad, d_values, x, indices, w_dec.shape[0], w_dec.dtype)


def _dots_config(dtype: str, d: int, k: int, relu: bool) -> Config:
    signature = {"grad": f"*{dtype}", "indices": "*i32", "values": "*fp32", "w": f"*{dtype}", "dots": "*fp32"}
    return Config(
        kernel=dots_kernel,
        signature=signature,
        constexprs={"D": d, "K": k, "RELU": relu, "BLOCK_K": BLOCK_K, "BLOCK_D": block_d(d)},
        divisible=list(signature),
        num_warps=WARPS,
        num_stages=STAGES,
        name=f"dots {dtype} d={d} k={k}",
        expects=WIDE_LOADS,
        options=OPTIONS,
    )


def _outer_config(dtype: str, d: int, k: int, has_x: bool) -> Config:
    codes, rows = ("values", "d_values", "d_bias"), ("grad", "x", "d_dec", "d_enc")
    places = {"order": "*i64", "bounds": "*i64"}
    signature = {**dict.fromkeys(codes, "*fp32"), **dict.fromkeys(rows, f"*{dtype}"), **places}
    return Config(
        kernel=outer_kernel,
        signature=signature,
        constexprs={"D": d, "K": k, "HAS_X": has_x, "BLOCK_E": BLOCK_E, "BLOCK_D": block_d(d)},
        divisible=list(signature),
        num_warps=WARPS,
        num_stages=STAGES,
        name=f"outer {dtype} d={d} k={k}" + (" both" if has_x else ""),
        expects=WIDE_LOADS,
        options=OPTIONS,
    )


CONFIGS = [
    _dots_config("bf16", 1024, 64, relu=True),
    _dots_config("fp32", 720, 32, relu=False),
    _outer_config("bf16", 1024, 64, has_x=True),
    _outer_config("fp32", 720, 32, has_x=False),
]
