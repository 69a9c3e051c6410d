"""lowrank_edit: the explicit matrix's edit without the matrix, bits that must not move, gradients, what it refuses."""

import pytest
import torch
from bounds import EDIT, OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.lowrank_edit import lowrank_edit

PATHS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def make(n: int, d: int, r: int, n_rows: int, dtype: torch.dtype, m: int | None = None, seed: int = 0) -> list[Tensor]:
    """x, src, a, b, alpha, beta, add: an edit about as large as a token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x, src = draw(n, d).to(dtype), draw(n if m is None else m, d).to(dtype)
    a, b = (draw(r, d).div(max(1, size) ** 0.5).to(dtype) for size in (d, r))
    alpha, beta = (torch.rand(n_rows, generator=generator).to(wide(dtype)) + 0.5 for _ in range(2))
    return [x, src, a, b, alpha, beta, draw(n_rows, d).to(wide(dtype))]


def choices(n: int, m: int, n_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pair = torch.randint(0, m, (n,), generator=generator, dtype=torch.int32)
    row = torch.randint(0, n_rows, (n,), generator=generator, dtype=torch.int32)
    return {"pair": pair, "row": row, "mask": torch.rand(n, generator=generator) < 0.7}


def by_token(given: list[Tensor | None], pair=None, row=None, mask=None) -> Tensor:
    """The same, in float64, one token at a time with the whole matrix."""
    x, src, a, b, alpha, beta, add = (None if each is None else each.double() for each in given)
    assert x is not None and a is not None and b is not None and alpha is not None and beta is not None
    matrix, out = b.T @ a, []
    for i, token in enumerate(x):
        kind = 0 if row is None else int(row[i])
        difference = -alpha[kind] * token
        if src is not None:
            difference = difference + beta[kind] * src[i if pair is None else int(pair[i])]
        delta = matrix @ difference + (0 if add is None else add[kind])
        out.append(token + delta if mask is None or mask[i] else token)
    return torch.stack(out) if out else x


def assert_right(given: list[Tensor | None], **options: Tensor) -> Tensor:
    x = given[0]
    assert x is not None
    y, expected = lowrank_edit(*given, **options), by_token(given, **options)
    assert y.dtype == x.dtype
    assert_within(y, expected, OUTPUT[x.dtype])
    mask = options.get("mask", torch.ones(x.shape[0], dtype=torch.bool))
    assert_within((y.double() - x.double())[mask], (expected - x.double())[mask], EDIT[x.dtype])
    assert same_bits(y[~mask], x[~mask])
    return y


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(13, 33, 5, 3), (1, 1, 1, 1), (40, 65, 80, 2), (7, 20, 0, 2)])
def test_is_the_matrix_edit(path: str, dtype: torch.dtype, size: tuple[int, int, int, int]) -> None:
    n, _, _, n_rows = size
    given = make(*size, dtype, m=6)
    with use(path):
        assert_right(given, **choices(n, 6, n_rows))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("left_out", [(), ("src",), ("add",), ("src", "add")])
@pytest.mark.parametrize("one_strength", [False, True])
def test_optional_parts(path: str, left_out: tuple[str, ...], one_strength: bool) -> None:
    given: list[Tensor | None] = [*make(9, 24, 3, 1, torch.float32)]
    given[1] = None if "src" in left_out else given[1]
    given[6] = None if "add" in left_out else given[6]
    if one_strength:
        given[5] = given[4]
    with use(path):
        assert_right(given)
        assert_right(given, mask=torch.arange(9) % 2 == 0)


@pytest.mark.parametrize("path", PATHS)
def test_float32_weights_of_narrow_tokens(path: str) -> None:
    given = make(9, 24, 3, 1, torch.bfloat16)
    given[2:4] = [each.float() for each in given[2:4]]
    with use(path):
        assert_right([*given])


@pytest.mark.parametrize("path", PATHS)
def test_is_what_the_table_of_edits_says(path: str) -> None:
    """A patched subspace holds the source's part of it, a projected one nothing; the rest of the token stays."""
    x, src = torch.randn(2, 11, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(30, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    rows, one, none = basis.T.contiguous(), torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    mean = src.mean(0)
    with use(path):
        patched = lowrank_edit(x, src, rows, rows, one, one, None)
        projected = lowrank_edit(x, None, rows, rows, one, one, None)
        averaged = lowrank_edit(x, None, rows, rows, one, one, (mean @ basis @ rows)[None])
        steered = lowrank_edit(x, None, rows[:0], rows[:0], none, none, 3 * mean[None])
    torch.testing.assert_close(patched @ basis, src @ basis)
    torch.testing.assert_close(projected @ basis, torch.zeros(11, 4, dtype=torch.float64))
    torch.testing.assert_close(averaged @ basis, (mean @ basis).expand(11, 4))
    torch.testing.assert_close(steered, x + 3 * mean)
    rest = x - x @ basis @ rows
    for edited in (patched, projected, averaged):
        torch.testing.assert_close(edited - edited @ basis @ rows, rest)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_tokens_and_zero_strengths_keep_every_bit(path: str, dtype: torch.dtype) -> None:
    given = make(12, 20, 5, 2, dtype)
    given[0][3] = -0.0
    row, both = torch.arange(12, dtype=torch.int32) % 2, [given[4], given[4].clone()]
    with use(path):
        patched = lowrank_edit(given[0], given[0].clone(), given[2], given[3], *both, None, row=row)
        single = lowrank_edit(given[0], given[0].clone(), given[2], given[3], both[0][:1], both[0][:1], None)
        nothing = [torch.zeros_like(each) for each in given[4:]]
        still = lowrank_edit(*given[:4], *nothing, row=row)
        empty = lowrank_edit(*given[:2], given[2][:0], given[3][:0], *given[4:6], None, row=row)
    for y in (patched, single, still, empty):
        assert same_bits(y, given[0]) and y.data_ptr() != given[0].data_ptr()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_columns_that_the_edit_does_not_reach_keep_every_bit(path: str, dtype: torch.dtype) -> None:
    given = make(12, 20, 5, 1, dtype)
    given[3][:, 7:] = 0
    given[0][:, 9] = -0.0
    with use(path):
        y = lowrank_edit(*given[:6], None)
    assert same_bits(y[:, 7:], given[0][:, 7:]) and not torch.equal(y[:, :7], given[0][:, :7])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_tokens_keep_every_bit_and_leak_nothing(path: str, dtype: torch.dtype) -> None:
    given = make(12, 20, 5, 1, dtype)
    given[0][4] = float("nan")
    given[0][5] = -0.0
    given[1][6] = float("inf")
    mask = torch.ones(12, dtype=torch.bool)
    mask[[4, 5, 6]] = False
    with use(path):
        y = lowrank_edit(*given, mask=mask)
        nobody = lowrank_edit(*given, mask=torch.zeros_like(mask))
    assert same_bits(y[~mask], given[0][~mask]) and y[mask].isfinite().all()
    assert same_bits(nobody, given[0]) and nobody.data_ptr() != given[0].data_ptr()


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens_and_no_columns(path: str) -> None:
    for n, d in ((0, 5), (4, 0)):
        given = make(n, d, 2, 1, torch.bfloat16)
        with use(path):
            assert lowrank_edit(*given, mask=torch.ones(n, dtype=torch.bool)).shape == (n, d)


@pytest.mark.parametrize("path", PATHS)
def test_same_bits_run_to_run(path: str) -> None:
    given, options = make(60, 65, 9, 3, torch.float32, m=6), choices(60, 6, 3)
    with use(path):
        assert same_bits(lowrank_edit(*given, **options), lowrank_edit(*given, **options))


FREE = {"all": (0, 1, 2, 3, 4, 5, 6), "no src": (0, 2, 3, 4, 6), "no add": (0, 1, 2, 3, 4, 5), "alpha alone": (4,)}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("free", FREE)
@pytest.mark.parametrize("chosen", [False, True])
def test_gradients_by_differences(path: str, free: str, chosen: bool) -> None:
    given: list[Tensor | None] = [*make(4, 3, 2, 3 if chosen else 1, torch.float64, m=3 if chosen else None)]
    options = choices(4, 3, 3) if chosen else {}
    if free == "no src":
        given[1] = None
        options.pop("pair", None)
    elif free == "no add":
        given[6] = None
    inputs = [each.requires_grad_() for i in FREE[free] if (each := given[i]) is not None]

    def edit(*leaves: Tensor) -> Tensor:
        arguments = given.copy()
        for place, leaf in zip(FREE[free], leaves, strict=True):
            arguments[place] = leaf
        return lowrank_edit(*arguments, **options)

    with use(path):
        assert torch.autograd.gradcheck(edit, inputs, nondet_tol=0.0)
        if chosen and free == "all":
            assert torch.autograd.gradgradcheck(edit, inputs, fast_mode=True)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_in_other_dtypes(dtype: torch.dtype) -> None:
    """From a slope that is one number seen from everywhere, as sum() makes it; NaN in masked tokens goes nowhere."""
    given, options = make(11, 20, 3, 3, dtype, m=4), choices(11, 4, 3)
    options["mask"][2] = False
    given[0][2] = float("nan")
    mine = [each.clone().requires_grad_() for each in given]
    theirs = [each.double().requires_grad_() for each in given]
    lowrank_edit(*mine, **options).sum().backward()
    with use("reference"):
        lowrank_edit(*theirs, **options).sum().backward()
    for ours, exact in zip(mine, theirs, strict=True):
        assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == ours.dtype
        assert_within(ours.grad.flatten(), exact.grad.flatten(), 1e-5 if dtype == torch.float32 else 5e-3)


@unchecked_shapes()
def test_compiles_as_one_graph_with_its_gradients() -> None:
    torch._dynamo.reset()
    given, options = make(6, 8, 2, 3, torch.float32, m=4), choices(6, 4, 3)

    def run(*tensors: Tensor) -> Tensor:
        return lowrank_edit(tensors[0] * 2, *tensors[1:], **options).relu()

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results = []
    for each in (run, compiled):
        inputs = [t.clone().requires_grad_() for t in given]
        out = each(*inputs)
        out.square().sum().backward()
        results.append([out, *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@unchecked_shapes()
def test_new_contents_need_no_new_graph() -> None:
    torch._dynamo.reset()
    given, options = make(6, 8, 2, 3, torch.float32, m=4), choices(6, 4, 3)
    compiled = torch.compile(lambda x: lowrank_edit(x, *given[1:], **options), fullgraph=True, backend="aot_eager")
    compiled(given[0])
    with torch.compiler.set_stance("fail_on_recompile"):
        given[4].fill_(3.0)
        given[2].mul_(-1)
        options["mask"].logical_not_()
        options["pair"].zero_()
        assert same_bits(compiled(given[0]), lowrank_edit(*given, **options))


@pytest.mark.parametrize("full", [False, True])
@unchecked_shapes()
def test_is_a_well_formed_torch_op(full: bool) -> None:
    given: list[Tensor | None] = [*make(4, 5, 2, 2 if full else 1, torch.float32, m=3 if full else None)]
    options = choices(4, 3, 2) if full else {"pair": None, "row": None, "mask": None}
    if not full:
        given[1] = given[6] = None
    inputs = [None if each is None else each.requires_grad_() for each in given]
    torch.library.opcheck(torch.ops.hooked_vla.lowrank_edit.default, (*inputs, *options.values()))


GOOD = dict(zip(("x", "src", "a", "b", "alpha", "beta", "add"), make(4, 5, 2, 3, torch.float32, m=6), strict=True))
GOOD |= choices(4, 6, 3)
WRONG = {
    "x of integers": ({"x": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "x must be float32"),
    "x not contiguous": ({"x": torch.zeros(5, 4).T}, ValueError, "x must be contiguous"),
    "x of rank 3": ({"x": torch.zeros(1, 4, 5)}, ValueError, r"x must have shape \[\*, \*\], got \[1, 4, 5\]"),
    "src of another width": ({"src": torch.zeros(6, 4)}, ValueError, r"src must have shape \[\*, 5\], got \[6, 4\]"),
    "src not paired": ({"pair": None}, ValueError, r"src must have shape \[4, 5\], got \[6, 5\]"),
    "src of another dtype": ({"src": torch.zeros(6, 5).bfloat16()}, TypeError, "src must be float32, got bfloat16"),
    "src elsewhere": ({"src": torch.zeros(6, 5, device="meta")}, ValueError, "src must be on cpu as x is, got meta"),
    "a of another width": ({"a": torch.zeros(2, 4)}, ValueError, r"a must have shape \[\*, 5\], got \[2, 4\]"),
    "a not transposed": ({"a": torch.zeros(5, 2).T}, ValueError, "a must be contiguous"),
    "a of too many rows": ({"a": torch.zeros(513, 5)}, ValueError, "a must have at most 512 rows .* got 513"),
    "b of another rank": ({"b": torch.zeros(3, 5)}, ValueError, r"b must have shape \[2, 5\], got \[3, 5\]"),
    "b of another dtype": ({"b": torch.zeros(2, 5).bfloat16()}, TypeError, "b must be float32, got bfloat16"),
    "alpha too coarse": ({"alpha": torch.ones(3).bfloat16()}, TypeError, "alpha must be float32, got bfloat16"),
    "alpha a number": ({"alpha": 1.0}, TypeError, "alpha must be a tensor, got float"),
    "beta of other rows": ({"beta": torch.ones(2)}, ValueError, r"beta must have shape \[3\], got \[2\]"),
    "add of other rows": ({"add": torch.ones(1, 5)}, ValueError, r"add must have shape \[3, 5\], got \[1, 5\]"),
    "pair without src": ({"src": None}, ValueError, "pair says which row of src .* src is None"),
    "pair of long": ({"pair": torch.zeros(4, dtype=torch.int64)}, TypeError, "pair must be int32, got int64"),
    "pair out of range": ({"pair": torch.full((4,), 6).int()}, ValueError, r"pair must lie in \[0, 6\), got 6"),
    "row left out": ({"row": None}, ValueError, "row must say which of the 3 entries of alpha .* got None"),
    "row out of range": ({"row": torch.full((4,), -1).int()}, ValueError, r"row must lie in \[0, 3\), got -1"),
    "mask of numbers": ({"mask": torch.ones(4)}, TypeError, "mask must be bool, got float32"),
    "mask too long": ({"mask": torch.ones(5, dtype=torch.bool)}, ValueError, r"mask must have shape \[4\], got \[5\]"),
    "alpha a NaN": ({"alpha": torch.full((3,), torch.nan)}, ValueError, r"alpha must hold finite values, got nan"),
    "x a NaN": ({"x": torch.full((4, 5), torch.nan)}, ValueError, "x must hold finite values, got nan"),
    "src infinite": ({"src": torch.full((6, 5), torch.inf)}, ValueError, "src must hold finite values, got inf"),
    "b infinite": ({"b": torch.full((2, 5), -torch.inf)}, ValueError, "b must hold finite values, got -inf"),
}


@pytest.mark.parametrize("case", WRONG)
@unchecked_shapes()
def test_says_what_is_wrong(case: str) -> None:
    changed, error, message = WRONG[case]
    lowrank_edit(**GOOD)
    with pytest.raises(error, match=f"^lowrank_edit: {message}"):
        lowrank_edit(**(GOOD | changed))


def test_values_are_looked_at_only_when_asked() -> None:
    given = make(4, 5, 2, 1, torch.float32)
    given[0][1] = torch.nan
    y = lowrank_edit(*given, validate=False)
    assert y[1].isnan().all() and y[[0, 2, 3]].isfinite().all()
