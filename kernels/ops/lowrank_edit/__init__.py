"""A low-rank edit of tokens: subspace patch, projection, ablation along directions, steering, erasure, in one form.

    y = x + mask·(((beta·src[pair] - alpha·x)·aᵀ)·b + add)

| edit                                      | a, b       | alpha, beta | add                         |
|-------------------------------------------|------------|-------------|-----------------------------|
| patch of a subspace with basis U          | Uᵀ, Uᵀ     | 1, 1        |                             |
| projecting a subspace out (zero ablation) | Uᵀ, Uᵀ     | 1, no src   |                             |
| mean ablation along it                    | Uᵀ, Uᵀ     | 1, no src   | U·Uᵀ·mean                   |
| DAS with a rotation's first r rows        | R[:r] twice| 1, 1        |                             |
| LEACE, x - P·(x - mean) with P = B·A      | A, Bᵀ      | 1, no src   | P·mean                      |
| steering                                  | [0 d] twice| none        | strength·direction          |

The matrix B·A [d d] is never made: 4ndr products of numbers where it would take 2nd².
"""

import torch
from jaxtyping import Bool, Float, Int32
from torch import Tensor

from hooked_vla.kernels.checks import (
    check_finite,
    check_matrix,
    check_parameter,
    check_range,
    check_same,
    validates,
    wide,
)
from hooked_vla.kernels.dispatch import implementation, paths_of
from hooked_vla.kernels.lowrank_edit import autograd

MAX_RANK = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


PATHS = paths_of(__name__, "lowrank_edit")


@torch.library.custom_op("hooked_vla::lowrank_edit", mutates_args=())
def edit_op(
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
    return implementation("lowrank_edit", PATHS, x)(x, src, a, b, alpha, beta, add, pair, row, mask)


@edit_op.register_fake
def _(x, src, a, b, alpha, beta, add, pair, row, mask):
    return torch.empty_like(x)


edit_op.register_autograd(autograd.backward, setup_context=autograd.setup_context)


def _check_shapes(
    x: Tensor, src: Tensor | None, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor, add: Tensor | None,
    pair: Tensor | None, row: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    op = "lowrank_edit"
    check_matrix(op, "x", x, (None, None), DTYPES)
    (n, d), device = x.shape, x.device
    if src is not None:
        check_matrix(op, "src", src, (n if pair is None else None, d))
        check_same(op, "src", src, x)
    check_matrix(op, "a", a, (None, d), (x.dtype, torch.float32), device)
    if a.shape[0] > MAX_RANK:
        raise ValueError(f"{op}: a must have at most {MAX_RANK} rows (the rank of the edit), got {a.shape[0]}")
    check_matrix(op, "b", b, (a.shape[0], d), a.dtype, device)
    sums = wide(x.dtype)
    check_matrix(op, "alpha", alpha, (None,), sums, device)
    n_rows = alpha.shape[0]
    check_matrix(op, "beta", beta, (n_rows,), sums, device)
    if add is not None:
        check_matrix(op, "add", add, (n_rows, d), sums, device)
    if pair is not None:
        if src is None:
            raise ValueError(f"{op}: pair says which row of src each token takes, but src is None")
        check_matrix(op, "pair", pair, (n,), torch.int32, device)
    if row is not None:
        check_matrix(op, "row", row, (n,), torch.int32, device)
    elif n_rows != 1:
        raise ValueError(f"{op}: row must say which of the {n_rows} entries of alpha each token uses, got None")
    if mask is not None:
        check_matrix(op, "mask", mask, (n,), torch.bool, device)


def _check_values(
    x: Tensor, src: Tensor | None, a: Tensor, b: Tensor, alpha: Tensor, beta: Tensor, add: Tensor | None,
    pair: Tensor | None, row: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    op = "lowrank_edit"
    # a and b are often one tensor
    for name, value in (("a", a), ("b", None if b is a else b), ("alpha", alpha), ("beta", beta), ("add", add)):
        if value is not None:
            check_parameter(op, name, value)
    if pair is not None and src is not None:
        check_range(op, "pair", pair, src.shape[0])
    if row is not None:
        check_range(op, "row", row, alpha.shape[0])
    check_finite(op, "x", x, rows=mask)
    if src is not None:
        check_finite(op, "src", src, rows=mask if pair is None else None)


def lowrank_edit(
    x: Float[Tensor, "n d"],
    src: Float[Tensor, "m d"] | None,
    a: Float[Tensor, "r d"],
    b: Float[Tensor, "r d"],
    alpha: Float[Tensor, " R"],
    beta: Float[Tensor, " R"],
    add: Float[Tensor, "R d"] | None,
    *,
    pair: Int32[Tensor, " n"] | None = None,
    row: Int32[Tensor, " n"] | None = None,
    mask: Bool[Tensor, " n"] | None = None,
    validate: bool | None = None,
) -> Float[Tensor, "n d"]:
    """y = x + mask·(((beta·src[pair] - alpha·x)·aᵀ)·b + add).

    x: tokens, float32, bfloat16 or float16 (float64 on the reference and CPU paths). src: what is patched in, in x's
    dtype; None leaves the term out. a, b: the edit's reading and writing directions as rows, both in x's dtype or both
    in float32; their number r is at most 512 and may be 0.
    alpha, beta, add: float32 (float64 for float64 x), one entry for each kind of edit; beta is unused without src.
    pair: which row of src each token takes; None pairs them in order, and then m is n.
    row: which entry of alpha, beta and add each token uses; None stands for 0, and then there must be one.
    mask: tokens to edit; None edits all.

    Sums are float32. Where the mask is False or the edit is exactly zero (as it is where beta·src equals alpha·x and
    nothing is added), the output has x's own bits. On a GPU a token's result depends neither on the other tokens nor on
    how many there are. Contents of every tensor may change between replays of a captured graph. Differentiable, any
    number of times, in every floating-point argument.

    validate: look at the values too (default: on a CPU only, since it synchronises).
    Raises TypeError for wrong dtypes; ValueError for wrong shapes, devices, layouts and r, for pair without src, and
    when values are looked at for NaN or infinity in parameters, in tokens to edit or in src, and for pair or row out of
    range.
    """
    tensors = (x, src, a, b, alpha, beta, add, pair, row, mask)
    _check_shapes(*tensors)
    if validates(validate, x):
        _check_values(*tensors)
    return edit_op(*tensors)
