"""lowrank_edit in Triton, in two launches: the coefficients (beta·src - alpha·x)·aᵀ, then their product with b, added.

The first splits the sum over d among programs, so that a few tokens keep a GPU busy too; the second adds the parts in
order, which needs no atomics. Block sizes follow d, r and the dtypes, never n: a token's sums do not depend on how many
there are. Where no token of a block is in the mask, nothing is computed.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hooked_vla.kernels.aot import TENSOR_CORES, Config
from hooked_vla.kernels.products import weighed


@triton.jit
def _edited(mask_ptr, tokens, n, HAS_MASK: tl.constexpr):
    """Which tokens exist and are in the mask."""
    edited = tokens < n
    if HAS_MASK:
        edited = edited & (tl.load(mask_ptr + tokens, mask=edited, other=0) != 0)
    return edited


@triton.jit
def _pick(index_ptr, tokens, edited, GIVEN: tl.constexpr, OTHERWISE_OWN: tl.constexpr):
    """The entry that index_ptr gives each token, int64; without it the token's own place, or 0."""
    if GIVEN:
        return tl.load(index_ptr + tokens, mask=edited, other=0).to(tl.int64)
    if OTHERWISE_OWN:
        return tokens.to(tl.int64)
    return tl.zeros_like(tokens).to(tl.int64)


@triton.jit
def project_kernel(
    x_ptr, src_ptr, a_ptr, alpha_ptr, beta_ptr, pair_ptr, row_ptr, mask_ptr, part_ptr, n, d, r,
    HAS_SRC: tl.constexpr, HAS_PAIR: tl.constexpr, HAS_ROW: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, SPLIT_D: tl.constexpr,
):  # fmt: skip
    """part[split, token, :] = (beta·src - alpha·x)·aᵀ over the columns of one split."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    edited = _edited(mask_ptr, tokens, n, HAS_MASK)
    if tl.sum(edited.to(tl.int32), 0) > 0:
        row = _pick(row_ptr, tokens, edited, HAS_ROW, False)
        alpha = tl.load(alpha_ptr + row, mask=edited, other=0.0)[:, None]
        beta = tl.load(beta_ptr + row, mask=edited, other=0.0)[:, None]
        x_rows = tokens.to(tl.int64)[:, None] * d
        src_rows = _pick(pair_ptr, tokens, edited, HAS_PAIR, True)[:, None] * d
        a_rows = ranks.to(tl.int64)[:, None] * d
        total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for start in range(0, SPLIT_D, BLOCK_D):
            at = split * SPLIT_D + start + tl.arange(0, BLOCK_D)[None, :]
            here = edited[:, None] & (at < d)
            difference = -(alpha * tl.load(x_ptr + x_rows + at, mask=here, other=0.0).to(tl.float32))
            if HAS_SRC:
                difference += beta * tl.load(src_ptr + src_rows + at, mask=here, other=0.0).to(tl.float32)
            a = tl.load(a_ptr + a_rows + at, mask=(ranks < r)[:, None] & (at < d), other=0.0)
            total = weighed(difference, tl.trans(a), total)
        at_part = (split.to(tl.int64) * n + tokens)[:, None] * r + ranks[None, :]
        tl.store(part_ptr + at_part, total, mask=edited[:, None] & (ranks < r)[None, :])


@triton.jit
def apply_kernel(
    x_ptr, b_ptr, add_ptr, row_ptr, mask_ptr, part_ptr, y_ptr, n, d, r, n_splits,
    HAS_RANK: tl.constexpr, HAS_ADD: tl.constexpr, HAS_ROW: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """y = x + (sum of the parts)·b + add, for a block of tokens and columns."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    edited = _edited(mask_ptr, tokens, n, HAS_MASK)
    delta = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if tl.sum(edited.to(tl.int32), 0) > 0:
        if HAS_RANK:
            for start in range(0, r, BLOCK_R):
                ranks = start + tl.arange(0, BLOCK_R)
                inside = edited[:, None] & (ranks < r)[None, :]
                coefficients = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
                for split in range(0, n_splits):
                    at_part = (tokens.to(tl.int64) + split * n.to(tl.int64))[:, None] * r + ranks[None, :]
                    coefficients += tl.load(part_ptr + at_part, mask=inside, other=0.0)
                b_rows = ranks.to(tl.int64)[:, None] * d
                b = tl.load(b_ptr + b_rows + at, mask=(ranks < r)[:, None] & (at < d), other=0.0)
                delta = weighed(coefficients, b, delta)
        if HAS_ADD:
            add_rows = _pick(row_ptr, tokens, edited, HAS_ROW, False)[:, None] * d
            delta += tl.load(add_ptr + add_rows + at, mask=edited[:, None] & (at < d), other=0.0)
    here = (tokens < n)[:, None] & (at < d)
    at_x = tokens.to(tl.int64)[:, None] * d + at
    x = tl.load(x_ptr + at_x, mask=here, other=0.0)
    # the token's own bits where nothing is added: x + 0 is not x where x is -0.0
    y = tl.where(delta == 0.0, x, (x.to(tl.float32) + delta).to(x.dtype))
    tl.store(y_ptr + at_x, y, mask=here)


# a tile of 64 tokens fills the tensor cores' rows, and re-reads a and b as rarely as r = 64 asks for
BLOCK_N = 64
PROJECT_WARPS, PROJECT_STAGES, APPLY_STAGES = 4, 3, 2
# equal products must cancel exactly: no multiply-add that rounds once
OPTIONS = {"enable_fp_fusion": False}


def _power_of_2(size: int, least: int, most: int) -> int:
    """The smallest that is not below size, within limits."""
    return min(most, max(least, 1 << max(0, size - 1).bit_length()))


@dataclass(frozen=True)
class Blocks:
    """Block sizes of the two launches."""

    split_d: int
    project_r: int
    project_d: int
    apply_r: int
    apply_d: int
    apply_warps: int


def project_sizes(size: Blocks) -> dict[str, int]:
    return {"BLOCK_R": size.project_r, "BLOCK_D": size.project_d, "SPLIT_D": size.split_d}


def apply_sizes(size: Blocks) -> dict[str, int]:
    return {"BLOCK_R": size.apply_r, "BLOCK_D": size.apply_d}


def blocks(d: int, r: int, narrow: bool) -> Blocks:
    """By d and r alone; narrow: weights are bfloat16.

    At most four splits above d = 1024: the second launch reads every part again for each of its blocks of columns.
    Without tensor cores a product is unrolled over the dimension that it sums: shorter blocks there, lest registers
    spill.
    """
    split_d, ranks = max(256, _power_of_2(d, 1, 1 << 30) // 4), _power_of_2(r, 16, 64)
    if narrow:
        return Blocks(split_d, ranks, _power_of_2(d, 16, 64), ranks, _power_of_2(d, 16, 128), apply_warps=4)
    return Blocks(split_d, ranks, 16, 16, _power_of_2(d, 16, 32), apply_warps=8)


def lowrank_edit(
    x: Tensor,
    src: Tensor | None,
    a: Tensor,
    b: Tensor,
    alpha: Tensor,
    beta: Tensor,
    add: Tensor | None,
    pair: Tensor | None,
    row: Tensor | None,
    mask: Tensor | None,
) -> Tensor:
    """As reference.py defines it."""
    (n, d), r = x.shape, a.shape[0]
    y = torch.empty_like(x)
    if n == 0 or d == 0:
        return y
    size = blocks(d, r, b.dtype == torch.bfloat16)
    n_blocks, n_splits = -(-n // BLOCK_N), -(-d // size.split_d)
    flags = {"HAS_ROW": row is not None, "HAS_MASK": mask is not None, "BLOCK_N": BLOCK_N}
    # an absent tensor's pointer is never read
    rows, masks = x if row is None else row, x if mask is None else mask.view(torch.uint8)
    parts = torch.empty((n_splits, n, r), dtype=torch.float32, device=x.device)
    if r:
        launch: dict[str, Any] = {
            "HAS_SRC": src is not None, "HAS_PAIR": pair is not None, **flags, **project_sizes(size),
            "num_warps": PROJECT_WARPS, "num_stages": PROJECT_STAGES, **OPTIONS,
        }  # fmt: skip
        project_kernel[(n_blocks, n_splits, triton.cdiv(r, size.project_r))](
            x, x if src is None else src, a, alpha, beta, x if pair is None else pair, rows, masks, parts, n, d, r,
            **launch,
        )  # fmt: skip
    launch = {
        "HAS_RANK": r > 0, "HAS_ADD": add is not None, **flags, **apply_sizes(size),
        "num_warps": size.apply_warps, "num_stages": APPLY_STAGES, **OPTIONS,
    }  # fmt: skip
    apply_kernel[(n_blocks, triton.cdiv(d, size.apply_d))](
        x, b, x if add is None else add, rows, masks, parts, y, n, d, r, n_splits, **launch
    )
    return y


def _configs(tokens: str, weights: str, d: int, r: int, least: bool = False) -> list[Config]:
    """Both kernels, with every optional argument, the most that they do; or, with `least`, with src alone."""
    size = blocks(d, r, weights == "bf16")
    flags = {"HAS_ROW": not least, "HAS_MASK": not least, "BLOCK_N": BLOCK_N}
    shared = {"row_ptr": "*i32", "mask_ptr": "*u8", "part_ptr": "*fp32", "x_ptr": f"*{tokens}"}
    project = {
        **shared, "src_ptr": f"*{tokens}", "a_ptr": f"*{weights}", "alpha_ptr": "*fp32", "beta_ptr": "*fp32",
        "pair_ptr": "*i32",
    }  # fmt: skip
    apply = {**shared, "b_ptr": f"*{weights}", "add_ptr": "*fp32", "y_ptr": f"*{tokens}"}
    name, expects = f"{tokens}-{weights}-d{d}-r{r}", TENSOR_CORES if weights == "bf16" else {}
    name += "-plain" if least else ""
    return [
        Config(
            kernel=project_kernel,
            signature={**project, "n": "i32", "d": "i32", "r": "i32"},
            constexprs={**flags, "HAS_SRC": True, "HAS_PAIR": not least, **project_sizes(size)},
            divisible=(*project, "d", "r"),
            num_warps=PROJECT_WARPS,
            num_stages=PROJECT_STAGES,
            name=f"project-{name}",
            expects=expects,
            options=OPTIONS,
        ),
        Config(
            kernel=apply_kernel,
            signature={**apply, "n": "i32", "d": "i32", "r": "i32", "n_splits": "i32"},
            constexprs={**flags, "HAS_RANK": True, "HAS_ADD": not least, **apply_sizes(size)},
            divisible=(*apply, "d", "r"),
            num_warps=size.apply_warps,
            num_stages=APPLY_STAGES,
            name=f"apply-{name}",
            expects=expects,
            options=OPTIONS,
        ),
    ]


CONFIGS = [
    *_configs("bf16", "bf16", 1024, 16),
    *_configs("bf16", "bf16", 1024, 32),
    *_configs("bf16", "bf16", 2048, 64),
    *_configs("fp16", "fp16", 1024, 64),
    *_configs("fp32", "fp32", 1024, 64),
    *_configs("bf16", "fp32", 4096, 64),
    *_configs("bf16", "bf16", 1024, 64, least=True),
]
