"""delta_splice on a CPU: what it equals, what it leaves alone, gradients, compilation, and what it refuses."""

from collections.abc import Iterator

import pytest
import torch
from bounds import EDIT, OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels import delta_splice, delta_splice_features, fold_bias, use

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ("x", "w_enc", "b_enc", "threshold", "w_dec", "scale", "shift", "lo", "hi")


def tensors(n: int = 37, d: int = 24, n_features: int = 5, n_rows: int = 1, dtype=torch.float32) -> list[Tensor]:
    """x, the features' weights and random edits about as large as a token."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, w_enc, w_dec = draw(n, d), draw(n_features, d) / d**0.5, draw(n_features, d) / d**0.5
    tables = [draw(n_rows, n_features) * 2, draw(n_rows, n_features) * 2]
    tables += [torch.full((n_rows, n_features), value) for value in (-1.0, 4.0)]
    features = [draw(n_features) * 0.1, draw(n_features).abs() * 0.3]
    x, w_enc, w_dec = (each.to(dtype) for each in (x, w_enc, w_dec))
    return [x, w_enc, *(each.to(wide) for each in features), w_dec, *(each.to(wide) for each in tables)]


def rows_and_mask(n: int, n_rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    row = torch.randint(0, n_rows, (n,), generator=generator, dtype=torch.int32)
    return {"row": row, "mask": torch.rand(n, generator=generator) < 0.7}


@pytest.fixture(params=["reference", "cpu"])
def each_path(request: pytest.FixtureRequest) -> Iterator[str]:
    with use(request.param):
        yield request.param


def doubled(given: list[Tensor]) -> list[Tensor]:
    return [each.double() for each in given]


def test_equals_decoding_edited_features_and_the_error_term() -> None:
    """The idiom it replaces: encode all features, edit some, decode all, add back what the autoencoder misses."""
    n, d, m = 33, 24, 200
    generator = torch.Generator().manual_seed(0)
    x, w_enc, w_dec = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((n, d), (m, d), (m, d)))
    b_enc, b_dec = (torch.randn(s, generator=generator, dtype=torch.float64) for s in (m, d))
    threshold = torch.rand(m, generator=generator, dtype=torch.float64)
    z = (x - b_dec) @ w_enc.T + b_enc
    f = z * (z > threshold)
    chosen = torch.tensor([3, 17, 180])
    edited = f.clone()
    edited[:, chosen] = torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64) * f[:, chosen] + 0.5
    expected = edited @ w_dec + b_dec + (x - (f @ w_dec + b_dec))

    one = torch.ones(1, 3, dtype=torch.float64)
    scale = torch.tensor([[0.0, 2.0, -1.0]], dtype=torch.float64)
    folded = fold_bias(w_enc[chosen], b_enc[chosen], b_dec)
    weights = (w_enc[chosen], folded, threshold[chosen], w_dec[chosen])
    y, features = delta_splice_features(x, *weights, scale, one / 2, -torch.inf * one, torch.inf * one)
    assert_within(y, expected, OUTPUT[torch.float64])
    assert_within(features, f[:, chosen], OUTPUT[torch.float64])


@pytest.mark.parametrize("dtype", DTYPES)
def test_agrees_with_float64(dtype: torch.dtype, each_path: str) -> None:
    given = tensors(n_rows=3, dtype=dtype)
    options = rows_and_mask(37, 3)
    y, f = delta_splice_features(*given, **options)
    with use("reference"):
        expected, features = delta_splice_features(*doubled(given), **options)
    assert y.dtype == dtype and f.dtype == torch.float32
    assert_within(y, expected, OUTPUT[dtype])
    assert_within(f, features, OUTPUT[torch.float32])
    edited = options["mask"]
    x = given[0].double()
    assert_within((y.double() - x)[edited], (expected - x)[edited], EDIT[dtype])
    assert same_bits(y[~edited], given[0][~edited])
    assert same_bits(delta_splice(*given, **options), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_identity_edit_keeps_every_bit(dtype: torch.dtype, each_path: str) -> None:
    given = tensors(dtype=dtype)
    given[0][3], given[0][4] = -0.0, float("nan")
    one = torch.ones(1, 5)
    given[5:] = [one, 0 * one, -torch.inf * one, torch.inf * one]
    y = delta_splice(*given, validate=False)
    assert same_bits(y, given[0]) and y.data_ptr() != given[0].data_ptr()


def test_scaling_an_inactive_feature_keeps_every_bit(each_path: str) -> None:
    given = tensors()
    given[0][3] = -0.0
    given[3].fill_(torch.inf)
    given[6].zero_()
    assert same_bits(delta_splice(*given), given[0])


def test_a_masked_token_may_hold_anything(each_path: str) -> None:
    given = tensors()
    given[0][5], given[0][6] = float("nan"), float("inf")
    mask = torch.ones(37, dtype=torch.bool)
    mask[5:7] = False
    y = delta_splice(*given, mask=mask)
    assert same_bits(y[5:7], given[0][5:7]) and y[mask].isfinite().all()


def test_sums_that_are_exactly_zero_keep_bits(each_path: str) -> None:
    """A decoder without weight on some dimensions moves the others alone."""
    given = tensors()
    given[0][:, ::2] = -0.0
    given[4][:, ::2] = 0.0
    y = delta_splice(*given)
    assert same_bits(y[:, ::2], given[0][:, ::2]) and (y[:, 1::2] != given[0][:, 1::2]).any()
    some = torch.arange(37) % 3 == 0
    y = delta_splice(*given, mask=some)
    assert same_bits(y[:, ::2], given[0][:, ::2]) and same_bits(y[~some], given[0][~some])


def test_kinds_of_edit(each_path: str) -> None:
    """Ablate, set and clamp, each in its own row of the tables."""
    given = tensors(n_features=1, n_rows=3)
    x, w_enc, b_enc, threshold, w_dec = given[:5]
    scale, shift = torch.tensor([[0.0], [0.0], [1.0]]), torch.tensor([[0.0], [7.0], [0.0]])
    lo, hi = torch.full((3, 1), -torch.inf), torch.tensor([[torch.inf], [torch.inf], [0.5]])
    row = torch.arange(37, dtype=torch.int32) % 3
    y, f = delta_splice_features(*given[:5], scale, shift, lo, hi, row=row)
    target = torch.stack([torch.zeros(37), torch.full((37,), 7.0), f[:, 0].clamp_max(0.5)])
    wanted = target.gather(0, row.long()[None])[0]
    assert_within(y, x + (wanted - f[:, 0])[:, None] * w_dec, 1e-6)
    assert f.max() > 0.5


def test_each_token_may_have_its_own_threshold(each_path: str) -> None:
    """The op below takes [n S] too: that is how membership of a top k is said."""
    given = tensors()
    own = torch.where(torch.arange(37)[:, None] % 2 == 0, given[3], torch.inf).contiguous()
    arguments = (None, None, True, False)
    y, f = torch.ops.hooked_vla.delta_splice(*given[:3], own, *given[4:], *arguments)
    always, _ = delta_splice_features(*given)
    given[3].fill_(torch.inf)
    never, _ = delta_splice_features(*given)
    assert_within(y, torch.where(torch.arange(37)[:, None] % 2 == 0, always, never), 1e-6)
    assert (f[1::2] == 0).all() and (f[::2] > 0).any()


@pytest.mark.parametrize(("n", "n_features"), [(0, 3), (5, 0)])
def test_nothing_to_edit(n: int, n_features: int, each_path: str) -> None:
    given = tensors(n=n, n_features=n_features)
    y, f = delta_splice_features(*given)
    assert same_bits(y, given[0]) and f.shape == (n, n_features)


@unchecked_shapes()
@pytest.mark.parametrize("n_rows", [1, 2])
def test_gradients(n_rows: int) -> None:
    """Of everything but the threshold, both outputs, by finite differences."""
    given = tensors(n=6, d=4, n_features=3, n_rows=n_rows, dtype=torch.float64)
    options = {"row": torch.arange(6, dtype=torch.int32) % n_rows, "mask": torch.arange(6) != 2}
    leaves = [each.requires_grad_(name != "threshold") for name, each in zip(NAMES, given, strict=True)]
    # both sides of the threshold and of either clamp occur, none within reach of a finite difference
    with torch.no_grad():
        f = delta_splice_features(*leaves, **options)[1]
        u = (leaves[5][options["row"]] * f + leaves[6][options["row"]]).flatten().sort().values
        leaves[7].fill_((u[5] + u[6]) / 2), leaves[8].fill_((u[11] + u[12]) / 2)
        assert (f == 0).any() and (f > 0).any() and u[6] - u[5] > 1e-4 and u[12] - u[11] > 1e-4
    assert torch.autograd.gradcheck(lambda *args: delta_splice_features(*args, **options), leaves)
    assert torch.autograd.gradcheck(lambda *args: delta_splice(*args, **options), leaves)
    assert torch.autograd.gradgradcheck(lambda *args: delta_splice(*args, **options), leaves, fast_mode=True)


@unchecked_shapes()
def test_gradients_keep_the_dtype_of_what_they_are_of() -> None:
    leaves = [each.requires_grad_(True) for each in tensors(dtype=torch.bfloat16)]
    delta_splice(*leaves).float().square().sum().backward()
    for name, leaf in zip(NAMES, leaves, strict=True):
        assert leaf.grad is None if name == "threshold" else leaf.grad.dtype == leaf.dtype, name


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_masked_tokens_leak_nothing_into_gradients(bad: float) -> None:
    given, options = tensors(n_rows=2), rows_and_mask(37, 2)
    outside = (~options["mask"]).nonzero()[:, 0]
    spoiled, slope = given[0].clone(), torch.randn(37, 24)
    spoiled[outside[0]] = bad
    slope[outside[0]] = bad
    found = []
    for x in (given[0], spoiled):
        tokens_and_rest = zip(NAMES, [x, *given[1:]], strict=True)
        leaves = [each.clone().requires_grad_(name != "threshold") for name, each in tokens_and_rest]
        y = delta_splice(*leaves, **options)
        y.backward(slope if x is spoiled else slope.nan_to_num(0.0, 0.0))
        found.append([leaf.grad for leaf in leaves if leaf.requires_grad])
    for clean, dirty in zip(*([each[1:] for each in found]), strict=True):
        assert torch.equal(clean, dirty)
    assert torch.equal(found[0][0][options["mask"]], found[1][0][options["mask"]])


def test_features_of_masked_tokens_have_gradients() -> None:
    given = tensors()
    w_enc = given[1].clone().requires_grad_()
    mask = torch.zeros(37, dtype=torch.bool)
    f = delta_splice_features(given[0], w_enc, *given[2:], mask=mask)[1]
    f.sum().backward()
    assert_within(w_enc.grad, (f > 0).float().T @ given[0], OUTPUT[torch.float32])


@unchecked_shapes()
def test_compiles_into_one_graph_and_edits_stay_inputs() -> None:
    torch._dynamo.reset()
    given, options = tensors(n_rows=2), rows_and_mask(37, 2)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    for backend in (count, "aot_eager"):
        compiled = torch.compile(lambda *args: delta_splice(*args, **options), fullgraph=True, backend=backend)
        for change in range(3):
            given[6] += change
            options["mask"].logical_not_()
            assert same_bits(compiled(*given), delta_splice(*given, **options))
    assert len(graphs) == 1
    leaf = given[0].clone().requires_grad_(True)
    (ours,) = torch.autograd.grad(compiled(leaf, *given[1:]).square().sum(), leaf)
    (eager,) = torch.autograd.grad(delta_splice(leaf, *given[1:], **options).square().sum(), leaf)
    assert torch.equal(ours, eager)


@unchecked_shapes()
@pytest.mark.parametrize("emit", [False, True])
def test_registered_as_pytorch_asks(emit: bool) -> None:
    given = tensors(n=5, d=4, n_features=2, n_rows=2)
    given[0].requires_grad_(True)
    given[6].requires_grad_(True)
    options = rows_and_mask(5, 2)
    arguments = (*given, options["row"], options["mask"], emit, False)
    torch.library.opcheck(torch.ops.hooked_vla.delta_splice.default, arguments)


REFUSED = {
    "width of w_enc": ("w_enc", lambda t: t[:, :-1].contiguous(), r"w_enc must have shape \[\*, 24\], got \[5, 23\]"),
    "number of biases": ("b_enc", lambda t: t[:-1], r"b_enc must have shape \[5\], got \[4\]"),
    "rank of x": ("x", lambda t: t[None], r"x must have shape \[\*, \*\], got \[1, 37, 24\]"),
    "dtype of x": ("x", lambda t: t.int(), r"x must be float32 or bfloat16 or float16 or float64, got int32"),
    "dtype of w_dec": ("w_dec", lambda t: t.half(), r"w_dec must be float32, got float16"),
    "dtype of scale": ("scale", lambda t: t.bfloat16(), r"scale must be float32, got bfloat16"),
    "device": ("w_dec", lambda t: t.to("meta"), r"w_dec must be on cpu, got meta"),
    "layout of x": ("x", lambda t: t.T.contiguous().T, r"x must be contiguous, got shape \[37, 24\]"),
    "rows of lo": ("lo", lambda t: t.repeat(2, 1), r"lo must have shape \[1, 5\], got \[2, 5\]"),
    "NaN in x": (
        "x",
        lambda t: t.index_fill(0, torch.tensor(4), torch.nan),
        r"x must hold finite values, got nan",
    ),
    "NaN in w_enc": ("w_enc", lambda t: t * torch.nan, r"w_enc must hold finite values, got nan at \[0, 0\]"),
    "NaN in threshold": ("threshold", lambda t: t * torch.nan, r"threshold must hold no NaN"),
    "infinite shift": ("shift", lambda t: t + torch.inf, r"shift must hold finite values, got inf"),
    "NaN in hi": ("hi", lambda t: t * torch.nan, r"hi must hold no NaN, got nan"),
    "lo above hi": ("lo", lambda t: t + 9, r"lo must be at most hi, got \[0, 0\] the other way round"),
}


@unchecked_shapes()
@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str) -> None:
    name, spoil, message = REFUSED[case]
    given = dict(zip(NAMES, tensors(), strict=True))
    given[name] = spoil(given[name])
    with pytest.raises((TypeError, ValueError), match="delta_splice: " + message):
        delta_splice(*given.values())


@unchecked_shapes()
def test_refuses_rows_and_masks_that_do_not_fit() -> None:
    given, options = tensors(n_rows=2), rows_and_mask(37, 2)
    with pytest.raises(ValueError, match=r"row must say which of the 2 rows of scale each token uses, got None"):
        delta_splice(*given)
    with pytest.raises(ValueError, match=r"row must lie in \[0, 2\), got 2"):
        delta_splice(*given, row=options["row"] + 1)
    with pytest.raises(TypeError, match=r"row must be int32, got int64"):
        delta_splice(*given, row=options["row"].long())
    with pytest.raises(ValueError, match=r"mask must have shape \[37\], got \[36\]"):
        delta_splice(*given, row=options["row"], mask=options["mask"][1:])
    with pytest.raises(TypeError, match=r"mask must be bool, got int32"):
        delta_splice(*given, row=options["row"], mask=options["row"])
    with pytest.raises(ValueError, match=r"delta_splice_features: w_enc must have at most 64 rows .* got 65"):
        delta_splice_features(*tensors(n_features=65))


def test_fold_bias_sums_in_float64() -> None:
    w_enc = torch.tensor([[1e8, 1.0, -1e8]])
    assert fold_bias(w_enc, torch.tensor([0.25]), torch.ones(3)).tolist() == [-0.75]
    assert fold_bias(w_enc.bfloat16(), torch.zeros(1), torch.ones(3)).dtype == torch.float32
    third = torch.tensor([1 / 3], dtype=torch.float64)
    assert torch.equal(fold_bias(torch.ones(1, 1).double(), third, torch.zeros(1)), third)
    with unchecked_shapes(), pytest.raises(ValueError, match=r"fold_bias: b_dec must have shape \[3\], got \[2\]"):
        fold_bias(w_enc, torch.zeros(1), torch.zeros(2))
