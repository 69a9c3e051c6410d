"""sparse_decode: the dense decoder's sum from the active entries alone, its gradients, and what it refuses."""

import importlib

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.sparse_decode import sparse_decode

PATHS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# n, k, m, d: none a multiple of anything
SIZES = [(13, 7, 101, 33), (1, 1, 1, 1), (5, 40, 29, 257), (200, 3, 17, 5)]


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make(
    n: int, k: int, m: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """values, indices (which repeat within a token), w_dec, base [n d]."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=generator, dtype=wide(dtype))
    indices = torch.randint(0, m, (n, k), generator=generator, dtype=torch.int32)
    w_dec = torch.randn(m, d, generator=generator).to(dtype)
    return values, indices, w_dec, torch.randn(n, d, generator=generator).to(dtype)


def dense(values: Tensor, indices: Tensor, w_dec: Tensor, base: Tensor | None) -> Tensor:
    """The same through the whole dictionary."""
    code = torch.zeros(values.shape[0], w_dec.shape[0], dtype=values.dtype)
    out = code.scatter_add(1, indices.long(), values) @ w_dec
    return out if base is None else out + base


def doubled(*tensors: Tensor | None) -> list[Tensor | None]:
    return [each.double() if each is not None and each.is_floating_point() else each for each in tensors]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_is_the_dense_decoder(path: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    values, indices, w_dec, base = make(*size, dtype)
    for each in (None, base, base[0], base.to(wide(dtype))):
        with use(path):
            out = sparse_decode(values, indices, w_dec, each)
        assert out.dtype == dtype
        # the sum may cancel: the bound is relative to what is added up, as an error of each term would be
        expected = dense(*doubled(values, indices, w_dec, each))
        scale = dense(*doubled(values.abs(), indices, w_dec.abs(), None if each is None else each.abs()))
        assert_within(scale + (out.double() - expected), scale, OUTPUT[dtype])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_entries_leave_the_base(path: str, dtype: torch.dtype) -> None:
    values, indices, w_dec, base = make(4, 0, 9, 6, dtype)
    with use(path):
        out = sparse_decode(values, indices, w_dec, base)
        assert torch.equal(out, base) and out.data_ptr() != base.data_ptr()
        assert torch.equal(sparse_decode(values, indices, w_dec), torch.zeros(4, 6, dtype=dtype))
        nobody = sparse_decode(values[:0], indices[:0], w_dec, base[0])
    assert nobody.shape == (0, 6) and nobody.dtype == dtype


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_depend_on_the_others(path: str, dtype: torch.dtype) -> None:
    values, indices, w_dec, base = make(150, 33, 70, 129, dtype)
    with use(path):
        together = sparse_decode(values, indices, w_dec, base)
        for part in (slice(0, 1), slice(7, 9), slice(140, 150)):
            alone = sparse_decode(values[part], indices[part], w_dec, base[part])
            assert same_bits(alone, together[part])
        assert same_bits(sparse_decode(values, indices, w_dec, base), together)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("one_base", [False, True])
def test_gradients_by_differences(path: str, one_base: bool) -> None:
    values, indices, w_dec, base = make(4, 3, 6, 5, torch.float64)
    base = base[0] if one_base else base
    inputs = [each.requires_grad_() for each in (values, w_dec, base)]
    with use(path):
        assert torch.autograd.gradcheck(lambda v, w, b: sparse_decode(v, indices, w, b), inputs, nondet_tol=0.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_are_the_dense_decoders(path: str, dtype: torch.dtype) -> None:
    """From a slope that is one number seen from everywhere, as sum() makes it, and from a full one."""
    values, indices, w_dec, base = make(31, 9, 23, 17, dtype)
    for slope in (torch.ones((), dtype=dtype).expand(31, 17), torch.randn(31, 17).to(dtype)):
        mine = [each.clone().requires_grad_() for each in (values, w_dec, base)]
        theirs = [each.double().requires_grad_() for each in (values, w_dec, base)]
        with use(path):
            sparse_decode(mine[0], indices, mine[1], mine[2]).backward(slope)
        dense(theirs[0], indices, theirs[1], theirs[2]).backward(slope.double())
        for ours, exact in zip(mine, theirs, strict=True):
            assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == ours.dtype
            length = exact.grad.norm(dim=-1).mean()
            assert (ours.grad - exact.grad).norm(dim=-1).max() <= OUTPUT[ours.dtype] * length * 2


def test_only_gradients_that_are_needed_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen dictionary's gradient, m rows long, is not computed."""
    # the door has a function of the package's name
    sparse_backward = importlib.import_module("hooked_vla.kernels.sparse_backward")

    def refuse():
        raise AssertionError("computed for nobody")

    values, indices, w_dec, _ = make(4, 3, 6, 5)
    with monkeypatch.context() as patch:
        patch.setitem(sparse_backward.OUTER, "cpu", refuse)
        sparse_decode(values.requires_grad_(), indices, w_dec).sum().backward()
    with monkeypatch.context() as patch:
        patch.setitem(sparse_backward.DOTS, "cpu", refuse)
        sparse_decode(values.detach(), indices, w_dec.requires_grad_()).sum().backward()
    assert values.grad is not None and w_dec.grad is not None


@unchecked_shapes()
def test_compiles_as_one_graph_with_its_gradients() -> None:
    torch._dynamo.reset()
    values, indices, w_dec, base = make(6, 4, 11, 8)

    def run(v: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return sparse_decode(v * 2, indices, w, b).relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for each in (run, compiled):
        inputs = [t.clone().requires_grad_() for t in (values, w_dec, base)]
        out = each(*inputs)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("with_base", [False, True])
@unchecked_shapes()
def test_is_a_well_formed_torch_op(with_base: bool) -> None:
    values, indices, w_dec, base = make(4, 3, 6, 5)
    inputs = (values.requires_grad_(), indices, w_dec.requires_grad_(), base.requires_grad_() if with_base else None)
    torch.library.opcheck(torch.ops.hooked_vla.sparse_decode.default, inputs)


GOOD = make(4, 3, 6, 5)
WRONG = {
    "w_dec of integers": (2, torch.zeros(6, 5, dtype=torch.int32), TypeError, "w_dec must be float32"),
    "w_dec not contiguous": (2, torch.zeros(5, 6).T, ValueError, "w_dec must be contiguous"),
    "w_dec no matrix": (2, torch.zeros(6), ValueError, r"w_dec must have shape \[\*, \*\], got \[6\]"),
    "values too coarse": (0, torch.zeros(4, 3).bfloat16(), TypeError, "values must be float32, got bfloat16"),
    "values of another k": (0, torch.zeros(4, 2), ValueError, r"indices must have shape \[4, 2\], got \[4, 3\]"),
    "values elsewhere": (0, torch.zeros(4, 3, device="meta"), ValueError, "values must be on cpu, got meta"),
    "values a NaN": (
        0,
        torch.full((4, 3), float("nan")),
        ValueError,
        r"values must hold finite values, got nan at \[0",
    ),
    "long indices": (1, torch.zeros(4, 3, dtype=torch.int64), TypeError, "indices must be int32, got int64"),
    "index m": (1, torch.full((4, 3), 6, dtype=torch.int32), ValueError, r"indices must lie in \[0, 6\), got 6"),
    "index -1": (1, torch.full((4, 3), -1, dtype=torch.int32), ValueError, r"indices must lie in \[0, 6\), got -1"),
    "base of another width": (3, torch.zeros(4, 6), ValueError, r"base must have shape \[4, 5\], got \[4, 6\]"),
    "base of one number": (3, torch.zeros(1), ValueError, r"base must have shape \[5\], got \[1\]"),
    "base too fine": (3, torch.zeros(5).double(), TypeError, "base must be float32"),
    "base infinite": (3, torch.full((5,), float("inf")), ValueError, "base must hold finite values, got inf"),
    "base no tensor": (3, 0.0, TypeError, "base must be a tensor, got float"),
}


@pytest.mark.parametrize("case", WRONG)
@unchecked_shapes()
def test_says_what_is_wrong(case: str) -> None:
    place, wrong, error, message = WRONG[case]
    arguments = [*GOOD[:place], wrong, *GOOD[place + 1 :]]
    with pytest.raises(error, match=f"^sparse_decode: {message}"):
        sparse_decode(*arguments)


def test_values_are_looked_at_only_when_asked() -> None:
    values, indices, w_dec, _ = make(4, 3, 6, 5)
    values[2, 1] = torch.nan
    out = sparse_decode(values, indices, w_dec, validate=False)
    assert out[2].isnan().all() and out[[0, 1, 3]].isfinite().all()
