"""delta_splice in Triton. One program edits BLOCK_N tokens: it sums z over d in steps of BLOCK_D, then walks d again.

Tokens come from memory once: a program's own fit the cache when it reads them for the second time. Block sizes follow
d, S and the dtypes, never n, so a token's sums do not depend on how many there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import TENSOR_CORES, Config
from hooked_vla.kernels.products import weighed


@triton.jit
def _product(a, b):
    """a·b in float32. Equal 16-bit operands go to the tensor cores: their products are exact in float32."""
    if a.dtype == b.dtype:
        return tl.dot(a, b, input_precision="ieee")
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _change(f, scale_ptr, shift_ptr, lo_ptr, hi_ptr, at, valid):
    """clamp(scale·f + shift, lo, hi) - f, with the tables' entries at offsets `at`; 0 where not valid."""
    scale = tl.load(scale_ptr + at, mask=valid, other=1.0)
    shift = tl.load(shift_ptr + at, mask=valid, other=0.0)
    lo = tl.load(lo_ptr + at, mask=valid, other=0.0)
    hi = tl.load(hi_ptr + at, mask=valid, other=0.0)
    g = tl.minimum(tl.maximum(scale * f + shift, lo), hi)
    return tl.where(valid, g - f, 0.0)


@triton.jit
def splice_kernel(
    x_ptr, w_enc_ptr, b_enc_ptr, threshold_ptr, w_dec_ptr, scale_ptr, shift_ptr, lo_ptr, hi_ptr, row_ptr, mask_ptr,
    y_ptr, f_ptr, n, d, n_features, threshold_stride,
    HAS_ROW: tl.constexpr, HAS_MASK: tl.constexpr, EMIT: tl.constexpr, EDIT_ONLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    features = tl.arange(0, BLOCK_S)
    columns = tl.arange(0, BLOCK_D)
    in_n, in_s = tokens < n, features < n_features
    x_rows = tokens.to(tl.int64)[:, None] * d
    w_rows = features.to(tl.int64)[:, None] * d

    z = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    for start in range(0, d, BLOCK_D):
        at = start + columns
        in_d = at < d
        x = tl.load(x_ptr + x_rows + at[None, :], mask=in_n[:, None] & in_d[None, :], other=0.0)
        w = tl.load(w_enc_ptr + w_rows + at[None, :], mask=in_s[:, None] & in_d[None, :], other=0.0)
        z += _product(x, tl.trans(w))
    z += tl.load(b_enc_ptr + features, mask=in_s, other=0.0)[None, :]
    inside = in_n[:, None] & in_s[None, :]
    at_threshold = tokens.to(tl.int64)[:, None] * threshold_stride + features[None, :]
    threshold = tl.load(threshold_ptr + at_threshold, mask=inside, other=float("inf"))
    f = tl.where(z > threshold, z, 0.0)
    if EMIT:
        at_f = tokens.to(tl.int64)[:, None] * n_features + features[None, :]
        tl.store(f_ptr + at_f, f, mask=inside)

    valid = inside
    if HAS_MASK:
        chosen = tl.load(mask_ptr + tokens, mask=in_n, other=0) != 0
        valid = inside & chosen[:, None]
    at_table = tl.zeros((BLOCK_N, 1), tl.int64)
    if HAS_ROW:
        at_table = tl.load(row_ptr + tokens, mask=in_n, other=0).to(tl.int64)[:, None] * n_features
    change = _change(f, scale_ptr, shift_ptr, lo_ptr, hi_ptr, at_table + features[None, :], valid)

    for start in range(0, d, BLOCK_D):
        at = start + columns
        in_d = at < d
        here = in_n[:, None] & in_d[None, :]
        w = tl.load(w_dec_ptr + w_rows + at[None, :], mask=in_s[:, None] & in_d[None, :], other=0.0)
        edit = weighed(change, w, tl.zeros((BLOCK_N, BLOCK_D), tl.float32))
        if EDIT_ONLY:
            tl.store(y_ptr + x_rows + at[None, :], edit, mask=here)
        else:
            x = tl.load(x_ptr + x_rows + at[None, :], mask=here, other=0.0)
            # the token's own bits where nothing is added: x + 0 is not x where x is -0.0
            y = tl.where(edit == 0.0, x, (x.to(tl.float32) + edit).to(x.dtype))
            tl.store(y_ptr + x_rows + at[None, :], y, mask=here)


# blocks of columns: two tiles in flight stay below 100 KiB at S = 64 in either width
BLOCK_N = 16
STAGES = 2
OPTIONS = {"enable_fp_fusion": False}


def blocks(d: int, n_features: int, narrow: bool) -> tuple[int, int, int]:
    """(BLOCK_S, BLOCK_D, warps); narrow: tokens and weights are bfloat16, so that both products use tensor cores."""
    block_s = max(16, 1 << (n_features - 1).bit_length())
    widest = (256 if narrow else 64) // (1 if block_s <= 32 else 2)
    block_d = max(32, min(widest, 1 << (d - 1).bit_length()))
    # without tensor cores a product is unrolled over BLOCK_D: more warps, or its registers spill
    return block_s, block_d, 4 if narrow or block_s <= 32 else 8


def delta_splice(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    w_dec: Tensor,
    scale: Tensor,
    shift: Tensor,
    lo: Tensor,
    hi: Tensor,
    row: Tensor | None,
    mask: Tensor | None,
    emit: bool,
    edit_only: bool,
) -> tuple[Tensor, Tensor]:
    """As reference.py defines it."""
    (n, d), n_features = x.shape, w_enc.shape[0]
    y = torch.empty_like(x, dtype=torch.float32 if edit_only else x.dtype)
    f = torch.empty((n if emit else 0, n_features), dtype=torch.float32, device=x.device)
    if n == 0 or n_features == 0:
        y = torch.zeros_like(y) if edit_only else x.clone()
        return y, f.zero_()
    block_s, block_d, warps = blocks(d, n_features, x.dtype == w_enc.dtype == w_dec.dtype == torch.bfloat16)
    flags = {"HAS_ROW": row is not None, "HAS_MASK": mask is not None, "EMIT": emit, "EDIT_ONLY": edit_only}
    sizes = {"BLOCK_N": BLOCK_N, "BLOCK_S": block_s, "BLOCK_D": block_d}
    launch: dict[str, Any] = {**flags, **sizes, "num_warps": warps, "num_stages": STAGES, **OPTIONS}
    splice_kernel[(triton.cdiv(n, BLOCK_N),)](
        x, w_enc, b_enc, threshold, w_dec, scale, shift, lo, hi,
        x if row is None else row, x if mask is None else mask.view(torch.uint8), y, f, n, d, n_features,
        0 if threshold.dim() == 1 else n_features, **launch,
    )  # fmt: skip
    return y, f


def _config(tokens: str, weights: str, n_features: int, edit_only: bool = False, least: bool = False) -> Config:
    """With masks, rows and features, the most that the kernel does; or with none of them, as rollouts mostly call it.

    d = 1024 stands for every width from 256 on that is a multiple of 16: the blocks are the same.
    """
    block_s, block_d, warps = blocks(1024, n_features, tokens == weights == "bf16")
    tables = ("b_enc_ptr", "threshold_ptr", "scale_ptr", "shift_ptr", "lo_ptr", "hi_ptr", "f_ptr")
    pointers = {
        **dict.fromkeys(tables, "*fp32"), "x_ptr": f"*{tokens}", "w_enc_ptr": f"*{weights}", "w_dec_ptr": f"*{weights}",
        "row_ptr": "*i32", "mask_ptr": "*u8", "y_ptr": "*fp32" if edit_only else f"*{tokens}",
    }  # fmt: skip
    flags = {
        "HAS_ROW": not least, "HAS_MASK": not least, "EMIT": not (edit_only or least), "EDIT_ONLY": edit_only,
    }  # fmt: skip
    return Config(
        kernel=splice_kernel,
        signature={**pointers, "n": "i32", "d": "i32", "n_features": "i32", "threshold_stride": "i32"},
        constexprs={**flags, "BLOCK_N": BLOCK_N, "BLOCK_S": block_s, "BLOCK_D": block_d},
        divisible=(*pointers, "d"),
        num_warps=warps,
        num_stages=STAGES,
        name=f"{tokens}-{weights}-S{block_s}" + ("-edit" if edit_only else "") + ("-plain" if least else ""),
        # of float16 only the first product: in the second, changes would lose bits, or become infinite
        expects=SMALL_TENSOR_CORES if tokens == weights != "fp32" else {},
        options=OPTIONS,
    )


# 16 tokens are too few for wgmma
SMALL_TENSOR_CORES = {**TENSOR_CORES, "sm_90": ("mma.sync",)}
CONFIGS = [
    *(_config("bf16", "bf16", n_features) for n_features in (16, 32, 64)),
    *(_config("fp16", "fp16", n_features) for n_features in (16, 64)),
    *(_config("fp32", "fp32", n_features) for n_features in (16, 32, 64)),
    *(_config("bf16", "fp32", n_features) for n_features in (16, 64)),
    *(_config("fp32", weights, 64, edit_only=True) for weights in ("bf16", "fp32")),
    *(_config(dtype, dtype, 16, least=True) for dtype in ("bf16", "fp32")),
]
