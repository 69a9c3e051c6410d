"""sparse_backward: the gradients that autograd finds through the dense code, the same bits every run."""

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.sparse_backward import sparse_backward, sparse_dots, sparse_outer

PATHS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SIZES = [(13, 7, 101, 33), (1, 1, 1, 1), (40, 30, 11, 257)]


def make(
    n: int, k: int, m: int, d: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """grad, x, values, indices (which repeat within a token), w_dec."""
    generator = torch.Generator().manual_seed(0)
    grad, x = torch.randn(2, n, d, generator=generator).to(dtype)
    values = torch.randn(n, k, generator=generator, dtype=torch.promote_types(dtype, torch.float32))
    indices = torch.randint(0, m, (n, k), generator=generator, dtype=torch.int32)
    return grad, x, values, indices, torch.randn(m, d, generator=generator).to(dtype)


def by_autograd(
    grad: Tensor, x: Tensor, values: Tensor, indices: Tensor, w_dec: Tensor, relu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four gradients in float64, from an encoder whose chosen pre-activations are `values` before the relu."""
    n, m = values.shape[0], w_dec.shape[0]
    z = values.double().requires_grad_()
    w = w_dec.double().requires_grad_()
    code = torch.zeros(n, m, dtype=torch.float64).scatter_add(1, indices.long(), z.relu() if relu else z)
    (code @ w).backward(grad.double())
    chosen = torch.zeros(n, m, dtype=torch.float64).scatter_add(1, indices.long(), z.grad)
    return z.grad, w.grad, chosen.T @ x.double(), chosen.sum(0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("relu", [False, True])
def test_is_what_autograd_finds(path: str, dtype: torch.dtype, size: tuple[int, int, int, int], relu: bool) -> None:
    grad, x, values, indices, w_dec = make(*size, dtype)
    # no sum cancels, so that an error is seen relative to what was added up
    grad, x, w_dec = grad.abs(), x.abs(), w_dec.abs()
    values = values if relu else values.abs()
    with use(path):
        ours = sparse_backward(grad, x, values.relu() if relu else values, indices, w_dec, relu=relu)
        without_x = sparse_backward(grad, None, values.relu() if relu else values, indices, w_dec, relu=relu)
    expected = by_autograd(grad, x, values, indices, w_dec, relu)
    for mine, right, kind in zip(ours, expected, (values.dtype, dtype, dtype, values.dtype), strict=True):
        assert mine.dtype == kind
        assert_within(mine, right, OUTPUT[kind])
    assert without_x[2] is None
    assert all(same_bits(a, b) for a, b in zip(ours, without_x, strict=True) if b is not None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_are_the_whole(path: str, dtype: torch.dtype) -> None:
    grad, x, values, indices, w_dec = make(20, 6, 15, 31, dtype)
    with use(path):
        d_values, d_w_dec, d_w_enc, d_b_enc = sparse_backward(grad, x, values, indices, w_dec, relu=False)
        assert same_bits(sparse_dots(grad, indices, w_dec), d_values)
        assert same_bits(sparse_outer(values, indices, grad, 15, dtype=dtype)[0], d_w_dec)
        outer, total = sparse_outer(d_values, indices, x, 15)
    assert outer.dtype == d_values.dtype and same_bits(outer.to(dtype), d_w_enc) and same_bits(total, d_b_enc)


@pytest.mark.parametrize("path", PATHS)
def test_every_run_has_the_same_bits(path: str) -> None:
    arguments = make(300, 9, 5, 64)
    with use(path):
        first, second = (sparse_backward(*arguments, relu=True) for _ in range(2))
    assert all(same_bits(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 3), (4, 0)])
def test_nothing_active_gives_zeros(path: str, shape: tuple[int, int]) -> None:
    values, indices = torch.zeros(shape), torch.zeros(shape, dtype=torch.int32)
    x = torch.randn(shape[0], 5)
    with use(path):
        d_values, *gradients = sparse_backward(x, x, values, indices, torch.randn(6, 5), relu=True)
    assert d_values.shape == shape
    for each, size in zip(gradients, ((6, 5), (6, 5), (6,)), strict=True):
        assert each.shape == size and not each.any()


@unchecked_shapes()
def test_compiles_as_one_graph() -> None:
    torch._dynamo.reset()
    arguments = make(6, 4, 11, 8)

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return sparse_backward(*tensors, relu=True)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(compiled(*arguments), run(*arguments), strict=True))


@unchecked_shapes()
def test_are_well_formed_torch_ops() -> None:
    grad, x, values, indices, w_dec = make(4, 3, 6, 5)
    ops = torch.ops.hooked_vla
    torch.library.opcheck(ops.sparse_dots.default, (grad, indices, w_dec))
    torch.library.opcheck(ops.sparse_outer.default, (values, indices, x, 6, torch.float32))
    for each in (x, None):
        torch.library.opcheck(ops.sparse_backward.default, (grad, each, values, indices, w_dec, True))


GOOD = make(4, 3, 6, 5)
WRONG = {
    "grad of another width": (0, torch.zeros(4, 6), ValueError, r"grad must have shape \[\*, 5\], got \[4, 6\]"),
    "grad of integers": (0, torch.zeros(4, 5, dtype=torch.int32), TypeError, "grad must be float32"),
    "grad a NaN": (0, torch.full((4, 5), float("nan")), ValueError, "grad must hold finite values, got nan"),
    "x of another length": (1, torch.zeros(3, 5), ValueError, r"x must have shape \[4, 5\], got \[3, 5\]"),
    "x infinite": (1, torch.full((4, 5), float("inf")), ValueError, "x must hold finite values, got inf"),
    "x elsewhere": (1, torch.zeros(4, 5, device="meta"), ValueError, "x must be on cpu, got meta"),
    "values too fine": (2, torch.zeros(4, 3).double(), TypeError, "values must be float32, got float64"),
    "values of fewer tokens": (2, torch.zeros(3, 3), ValueError, r"values must have shape \[4, \*\], got \[3, 3\]"),
    "indices of another k": (3, torch.zeros(4, 2).int(), ValueError, r"indices must have shape \[4, 3\], got \[4, 2\]"),
    "long indices": (3, torch.zeros(4, 3).long(), TypeError, "indices must be int32, got int64"),
    "index m": (3, torch.full((4, 3), 6).int(), ValueError, r"indices must lie in \[0, 6\), got 6"),
    "w_dec not contiguous": (4, torch.zeros(5, 6).T, ValueError, "w_dec must be contiguous"),
}


@pytest.mark.parametrize("case", WRONG)
@unchecked_shapes()
def test_says_what_is_wrong(case: str) -> None:
    place, wrong, error, message = WRONG[case]
    arguments = [*GOOD[:place], wrong, *GOOD[place + 1 :]]
    with pytest.raises(error, match=f"^sparse_backward: {message}"):
        sparse_backward(*arguments, relu=True)


@unchecked_shapes()
def test_its_parts_say_what_is_wrong() -> None:
    grad, x, values, indices, w_dec = GOOD
    with pytest.raises(ValueError, match=r"^sparse_dots: indices must have shape \[4, \*\], got \[3, 3\]"):
        sparse_dots(grad, indices[:3], w_dec)
    with pytest.raises(ValueError, match=r"^sparse_dots: indices must lie in \[0, 5\), got 5"):
        sparse_dots(grad, torch.full_like(indices, 5), w_dec[:5])
    with pytest.raises(ValueError, match="^sparse_outer: m must be at least 1, got 0"):
        sparse_outer(values, indices, x, 0)
    with pytest.raises(ValueError, match=r"^sparse_outer: indices must lie in \[0, 2\)"):
        sparse_outer(values, torch.full_like(indices, 2), x, 2)
    with pytest.raises(TypeError, match="^sparse_outer: dtype must be one of torch.float32, .*, got torch.int32"):
        sparse_outer(values, indices, x, 6, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"^sparse_outer: values must have shape \[4, \*\], got \[3, 3\]"):
        sparse_outer(values[:3], indices[:3], x, 6)
