"""sae_encode_topk in Triton: a matrix product that also writes the maximum of each run of features, then, a program a
token, the k best runs and the k best of their features.

The second step is exact: a feature outside the k best runs has k features before it, one in each of them. Selection is
by 64-bit keys (order of the value, then smaller index first), so no two features are ever equal. Block sizes follow d,
m, k and the dtypes, never n: a token's sums do not depend on how many there are.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import TENSOR_CORES, Config
from hooked_vla.kernels.sae_encode_topk import packed

LARGEST = tl.constexpr(0x7FFFFFFF)
LEAST_KEY = tl.constexpr(-(2**63))


@triton.jit
def order_of(z):
    """int32 that compares as z does: NaN is the largest, -0.0 equals 0.0."""
    # -0.0 + 0.0 is 0.0
    bits = (z + 0.0).to(tl.int32, bitcast=True)
    return tl.where(z != z, LARGEST, bits ^ ((bits >> 31) & LARGEST))


@triton.jit
def _value_of(order):
    return (order ^ ((order >> 31) & LARGEST)).to(tl.float32, bitcast=True)


@triton.jit
def _key(order, index):
    return (order.to(tl.int64) << 32) | (index ^ LARGEST).to(tl.int64)


@triton.jit
def encode_tile(
    x_ptr, w_ptr, b_ptr, tokens, rows, n, in_m, d,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """z of some tokens and some rows of the encoder, float32; -inf where a row is not in the encoder.

    A product of two 16-bit numbers is exact in float32; of other dtypes both are widened.
    """
    total = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    x_rows = x_ptr + tokens.to(tl.int64)[:, None] * d
    w_rows = w_ptr + rows.to(tl.int64)[:, None] * d
    for start in range(0, d, BLOCK_D):
        at = start + tl.arange(0, BLOCK_D)[None, :]
        x = tl.load(x_rows + at, mask=(tokens < n)[:, None] & (at < d), other=0.0)
        w = tl.load(w_rows + at, mask=in_m[:, None] & (at < d), other=0.0)
        if x.dtype == w.dtype:
            total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
        else:
            total = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), total, input_precision="ieee")
    z = total + tl.load(b_ptr + rows, mask=in_m, other=0.0)[None, :]
    return tl.where(in_m[None, :], z, float("-inf"))


@triton.jit
def encode_kernel(
    x_ptr, w_ptr, b_ptr, z_ptr, maxima_ptr, n, m, d, n_blocks, n_groups,
    GROUP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    # neighbouring programs share a block of the dictionary, which is the larger operand
    tokens = (tl.program_id(0) % n_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = tl.program_id(0) // n_blocks
    features = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_n, in_m = tokens < n, features < m
    z = encode_tile(x_ptr, w_ptr, b_ptr, tokens, features, n, in_m, d, BLOCK_N, BLOCK_M, BLOCK_D)
    tl.store(z_ptr + tokens.to(tl.int64)[:, None] * m + features[None, :], z, mask=in_n[:, None] & in_m[None, :])
    best = tl.max(tl.reshape(order_of(z), (BLOCK_N, BLOCK_M // GROUP, GROUP)), 2)
    groups = tile * (BLOCK_M // GROUP) + tl.arange(0, BLOCK_M // GROUP)
    at_maxima = tokens.to(tl.int64)[:, None] * n_groups + groups[None, :]
    tl.store(maxima_ptr + at_maxima, _value_of(best), mask=in_n[:, None] & (groups < n_groups)[None, :])


@triton.jit
def select_kernel(
    z_ptr, maxima_ptr, values_ptr, indices_ptr, m, n_groups, k,
    RELU: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    groups = tl.arange(0, BLOCK_G)
    maxima = tl.load(maxima_ptr + token * n_groups + groups, mask=groups < n_groups, other=0.0)
    best = tl.where(groups < n_groups, _key(order_of(maxima), groups), LEAST_KEY)
    if BLOCK_C < BLOCK_G:
        best = tl.topk(best, BLOCK_C)
    chosen = (best & LARGEST).to(tl.int32) ^ LARGEST
    columns = chosen[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    here = (best != LEAST_KEY)[:, None] & (columns < m)
    z = tl.load(z_ptr + token * m + columns, mask=here, other=0.0)
    keys = tl.where(here, _key(order_of(z), columns), LEAST_KEY)
    top = tl.topk(tl.reshape(keys, (BLOCK_C * GROUP,)), BLOCK_K)
    value = _value_of((top >> 32).to(tl.int32))
    if RELU:
        # not maximum, which may drop a NaN
        value = tl.where(value < 0.0, 0.0, value)
    places = tl.arange(0, BLOCK_K)
    tl.store(values_ptr + token * k + places, value, mask=places < k)
    tl.store(indices_ptr + token * k + places, (top & LARGEST).to(tl.int32) ^ LARGEST, mask=places < k)


GROUPS = (32, 64, 128)
# keys that one program sorts in registers
MOST_KEYS = 8192
# elements of z that are held at once: 1 GiB
Z_BLOCK = 1 << 28
OPTIONS = {"enable_fp_fusion": True}


def tile(narrow: bool) -> dict[str, int]:
    """The matrix product's blocks and launch; narrow: 16-bit operands of one dtype, for the tensor cores."""
    if narrow:
        return {"BLOCK_N": 128, "BLOCK_M": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return {"BLOCK_N": 64, "BLOCK_M": 128, "BLOCK_D": 16, "num_warps": 8, "num_stages": 2}


def is_narrow(x: Tensor, w_enc: Tensor) -> bool:
    return x.dtype == w_enc.dtype != torch.float32


def selection(m: int, group: int, k: int) -> dict[str, int] | None:
    """Blocks of the selection and its warps; None where a program's registers would not hold the keys."""
    # at least two of each: sorting one key is no sort
    block_g = max(2, 1 << (-(-m // group) - 1).bit_length())
    block_k = max(2, 1 << (k - 1).bit_length())
    block_c = min(block_g, block_k)
    most = max(block_g, block_c * group)
    if most > MOST_KEYS:
        return None
    return {"GROUP": group, "BLOCK_G": block_g, "BLOCK_C": block_c, "BLOCK_K": block_k,
            "num_warps": 4 if most <= 2048 else 8 if most <= 4096 else 16}  # fmt: skip


def best_group(m: int, k: int) -> int:
    """The run length with which the two selections read least together."""
    return min(GROUPS, key=lambda group: m // group + k * group)


def encode_gmax(x: Tensor, w_enc: Tensor, b_enc: Tensor, group: int) -> tuple[Tensor, Tensor]:
    (n, d), m = x.shape, w_enc.shape[0]
    n_groups = -(-m // group)
    z = torch.empty((n, m), dtype=torch.float32, device=x.device)
    maxima = torch.empty((n, n_groups), dtype=torch.float32, device=x.device)
    if n:
        size = tile(is_narrow(x, w_enc))
        launch: dict[str, Any] = {"GROUP": group, **size, **OPTIONS}
        n_blocks = triton.cdiv(n, size["BLOCK_N"])
        encode_kernel[(n_blocks * triton.cdiv(m, size["BLOCK_M"]),)](
            x, w_enc, b_enc, z, maxima, n, m, d, n_blocks, n_groups, **launch
        )
    return z, maxima


def _select(z: Tensor, maxima: Tensor, group: int, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    (n, m), n_groups = z.shape, maxima.shape[1]
    size = selection(m, group, k)
    if size is None:
        values, indices = packed.select(z, k)
        return values.relu() if relu else values, indices
    values = torch.empty((n, k), dtype=torch.float32, device=z.device)
    indices = torch.empty((n, k), dtype=torch.int32, device=z.device)
    if n:
        launch: dict[str, Any] = {"RELU": relu, **size, "num_stages": 1, **OPTIONS}
        select_kernel[(n,)](z, maxima, values, indices, m, n_groups, k, **launch)
    return values, indices


def select_topk(z: Tensor, maxima: Tensor, group: int, k: int) -> tuple[Tensor, Tensor]:
    return _select(z, maxima, group, k, relu=False)


def sae_encode_topk(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor]:
    """As reference.py defines it."""
    m = w_enc.shape[0]
    group = best_group(m, k)
    step = max(1, Z_BLOCK // m)
    made = [_select(*encode_gmax(tokens, w_enc, b_enc, group), group, k, relu) for tokens in x.split(step)]
    if len(made) == 1:
        return made[0]
    values, indices = zip(*made, strict=True)
    return torch.cat(values), torch.cat(indices)


def _encode_config(tokens: str, weights: str, group: int) -> Config:
    size = tile(tokens == weights != "fp32")
    warps, stages = size.pop("num_warps"), size.pop("num_stages")
    pointers = {"x_ptr": f"*{tokens}", "w_ptr": f"*{weights}"}
    pointers |= dict.fromkeys(("b_ptr", "z_ptr", "maxima_ptr"), "*fp32")
    sizes = dict.fromkeys(("n", "m", "d", "n_blocks", "n_groups"), "i32")
    return Config(
        kernel=encode_kernel,
        signature={**pointers, **sizes},
        constexprs={"GROUP": group, **size},
        divisible=(*pointers, "m", "d"),
        num_warps=warps,
        num_stages=stages,
        name=f"encode-{tokens}-{weights}-group{group}",
        expects=TENSOR_CORES if tokens == weights != "fp32" else {},
        options=OPTIONS,
    )


def _select_config(m: int, k: int) -> Config:
    size = selection(m, best_group(m, k), k)
    assert size is not None
    warps = size.pop("num_warps")
    return Config(
        kernel=select_kernel,
        signature={
            "z_ptr": "*fp32", "maxima_ptr": "*fp32", "values_ptr": "*fp32", "indices_ptr": "*i32",
            "m": "i32", "n_groups": "i32", "k": "i32",
        },
        constexprs={"RELU": True, **size},
        divisible=("z_ptr", "maxima_ptr", "values_ptr", "indices_ptr", "m"),
        num_warps=warps,
        num_stages=1,
        name=f"select-m{m}-k{k}",
        options=OPTIONS,
    )  # fmt: skip


CONFIGS = [
    *(_encode_config("bf16", "bf16", group) for group in GROUPS),
    _encode_config("fp16", "fp16", 32),
    _encode_config("fp32", "fp32", 32),
    _encode_config("bf16", "fp32", 32),
    _select_config(16384, 32),
    _select_config(32768, 64),
    _select_config(8192, 256),
]
