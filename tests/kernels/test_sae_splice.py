"""sae_splice: the dense autoencoder's result with features edited, its gradients, and what it refuses."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels import delta_splice, sae_splice
from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.sae_splice import dense, membership, reference

# plain PyTorch, and what is chosen for a CPU
PATHS = ("reference", None)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """Arguments of sae_splice by name."""

    x: Tensor
    w_enc: Tensor
    b_enc: Tensor
    w_dec: Tensor
    b_dec: Tensor
    error: bool
    k: int | None = None
    threshold: Tensor | None = None
    features: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None
    row: Tensor | None = None
    mask: Tensor | None = None

    def run(self, path: str | None = None, **options: Any) -> Tensor:
        with use(path):
            return sae_splice(**vars(self), **options)

    def exact(self) -> Tensor:
        """By the definition, in float64."""
        return reference.sae_splice(**{name: widened(value) for name, value in vars(self).items()})


def widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def make(gate: str, error: bool, dtype: torch.dtype = torch.float32, n_features: int = 5, m: int = 90) -> Case:
    """Two kinds of edit by row, some tokens outside the mask; 29 tokens of width 33."""
    n, d, generator = 29, 33, torch.Generator().manual_seed(0)
    wide = torch.promote_types(dtype, torch.float32)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=wide)

    # often active ones, so that edits of active features are seen
    b_enc = normal(m)
    features = b_enc.argsort(descending=True)[: 2 * n_features : 2].int()
    return Case(
        normal(n, d).to(dtype), (normal(m, d) / d**0.5).to(dtype), b_enc, (normal(m, d) / d**0.5).to(dtype),
        normal(d).to(dtype), error,
        k=12 if gate == "topk" else None,
        threshold=normal(m).abs() if gate == "threshold" else None,
        features=features, scale=normal(2, n_features), shift=normal(2, n_features),
        lo=torch.full((2, n_features), -1.5, dtype=wide), hi=torch.full((2, n_features), 2.0, dtype=wide),
        row=torch.randint(0, 2, (n,), generator=generator, dtype=torch.int32),
        mask=torch.rand(n, generator=generator) < 0.8,
    )  # fmt: skip


def unedited(case: Case) -> Case:
    return replace(case, features=None, scale=None, shift=None, lo=None, hi=None, row=None)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_is_the_dense_autoencoder(path: str | None, dtype: torch.dtype, error: bool, gate: str) -> None:
    case = make(gate, error, dtype)
    variants = [case, replace(case, mask=None), unedited(case), unedited(replace(case, mask=None))]
    variants.append(replace(case, row=None, scale=None, lo=None, shift=case.shift[:1], hi=case.hi[:1]))
    for each in variants:
        expected = each
        if each.features is not None and each.scale is None:
            ones = torch.ones_like(each.shift)
            expected = replace(each, scale=ones, lo=ones * -torch.inf)
        y = each.run(path)
        assert y.dtype == dtype and y.data_ptr() != case.x.data_ptr()
        assert_within(y, expected.exact(), OUTPUT[dtype])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_weights_may_be_wider_than_tokens(path: str | None, gate: str) -> None:
    for error in (False, True):
        case = make(gate, error)
        case = replace(case, x=case.x.bfloat16())
        assert_within(case.run(path), case.exact(), OUTPUT[torch.bfloat16])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_the_error_is_what_the_reconstruction_misses(path: str | None, gate: str) -> None:
    """decode(edited) + (x - decode(features)), from the op without the error."""
    case = make(gate, False, torch.float64)
    case = replace(case, mask=None)
    expected = case.run(path) + (case.x - unedited(case).run(path))
    assert_within(replace(case, error=True).run(path), expected, 1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_what_is_not_edited_keeps_its_bits(path: str | None, dtype: torch.dtype, gate: str) -> None:
    case = make(gate, True, dtype)
    case.x[:, 3] = -0.0
    outside = ~case.mask
    case.x[outside.nonzero()[0, 0], 5] = torch.nan
    y = case.run(path)
    assert same_bits(y[outside], case.x[outside]) and not torch.equal(y[case.mask], case.x[case.mask])
    assert same_bits(replace(case, error=False).run(path)[outside], case.x[outside])
    # with the error kept, nothing but an edit changes anything
    assert same_bits(unedited(case).run(path), case.x)
    same = replace(case, scale=torch.ones(2, 5), shift=torch.zeros(2, 5), lo=None, hi=None)
    assert same_bits(same.run(path), case.x)
    # scaling features that are off leaves them off
    rarer = case.b_enc.argsort(descending=True)[25:30].int()
    scaled = replace(case, features=rarer, shift=None, lo=None, hi=None, mask=None, x=case.x.nan_to_num(0.0))
    code = reference.code_of(scaled.x, scaled.w_enc, scaled.b_enc, scaled.k, scaled.threshold)
    off = (code[:, rarer] == 0).all(1)
    y = scaled.run(path)
    assert 0 < off.sum() < len(off) and same_bits(y[off], scaled.x[off])
    assert (y[~off] != scaled.x[~off]).any(1).all()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", [False, True])
def test_of_equal_features_the_first_is_kept(path: str | None, error: bool) -> None:
    """Ten copies of one feature, which lead; the k-th is the sixth of them."""
    case = make("topk", error, n_features=2)
    copies = torch.tensor([3, 8, 20, 31, 44, 57, 60, 71, 80, 89])
    w_enc, b_enc = case.w_enc.clone(), case.b_enc.clone()
    w_enc[copies], b_enc[copies] = 0.0, 9.0
    edit = dict(features=copies[[5, 6]].int(), scale=torch.zeros(1, 2), shift=None, lo=None, hi=None, row=None)
    case = replace(case, w_enc=w_enc, b_enc=b_enc, k=6, mask=None, **edit)
    change = case.run(path) - unedited(case).run(path)
    torch.testing.assert_close(change, -9.0 * case.w_dec[57].expand_as(change), rtol=0, atol=1e-5)


@pytest.mark.parametrize("path", PATHS)
def test_with_a_threshold_it_is_delta_splice(path: str | None) -> None:
    case = make("threshold", True)
    chosen = case.features.long()
    with use(path):
        expected = delta_splice(
            case.x, case.w_enc[chosen], case.b_enc[chosen], case.threshold[chosen], case.w_dec[chosen],
            case.scale, case.shift, case.lo, case.hi, row=case.row, mask=case.mask,
        )  # fmt: skip
    assert same_bits(case.run(path), expected)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n_features", [17, 64])
def test_many_features(path: str | None, n_features: int) -> None:
    for error in (False, True):
        case = make("topk", error, n_features=n_features, m=200)
        assert_within(case.run(path), case.exact(), OUTPUT[torch.float32])


def test_no_more_is_encoded_than_settles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[int, int]] = []

    def counting(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Tensor:
        encoded.append((len(x), len(w_enc)))
        return plain(x, w_enc, b_enc)

    plain = membership._encode
    monkeypatch.setattr(membership, "_encode", counting)
    case = make("topk", True, n_features=1, m=4000)
    rare = case.b_enc.argsort()[1500:1501]
    case = replace(case, features=rare.int())
    needed = int((((case.x @ case.w_enc[rare].T + case.b_enc[rare]) > 0).any(1) & case.mask).sum())
    case.run()
    # the feature's own z in every token, then blocks of others where it is above zero
    assert encoded[:2] == [(29, 1), (needed, 250)] and 0 < needed < int(case.mask.sum())
    assert sum(tokens * rows for tokens, rows in encoded[1:]) < 29 * 4000 / 5
    encoded.clear()
    replace(case, b_enc=case.b_enc - 100).run()
    assert encoded == [(29, 1)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_gradients_by_differences(path: str | None, error: bool, gate: str) -> None:
    case = make(gate, error, torch.float64, n_features=2, m=9)
    small = {"x": case.x[:5, :4], "w_enc": case.w_enc[:, :4] * 2, "w_dec": case.w_dec[:, :4], "b_dec": case.b_dec[:4]}
    case = replace(
        case, **{name: each.contiguous() for name, each in small.items()}, row=case.row[:5],
        mask=torch.tensor([True, True, False, True, True]), k=None if case.k is None else 4,
    )  # fmt: skip
    names = ["x", "w_enc", "b_enc", "w_dec", "scale", "shift", "lo", "hi"] + ([] if error else ["b_dec"])
    inputs = [getattr(case, name).clone().requires_grad_() for name in names]

    def run(*tensors: Tensor) -> Tensor:
        return replace(case, **dict(zip(names, tensors, strict=True))).run(path)

    assert torch.autograd.gradcheck(run, inputs, nondet_tol=0.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_masked_tokens_leak_nothing_into_gradients(path: str | None, error: bool, gate: str) -> None:
    case = make(gate, error)
    spoiled = case.x.clone()
    outside = (~case.mask).nonzero()[:, 0]
    spoiled[outside[0]], spoiled[outside[1]] = torch.nan, torch.inf
    names = ["x", "w_enc", "b_enc", "w_dec", "scale", "shift"] + ([] if error else ["b_dec"])
    found = []
    for x in (case.x, spoiled):
        leaves = {name: getattr(replace(case, x=x), name).clone().requires_grad_() for name in names}
        replace(case, **leaves).run(path)[case.mask].square().sum().backward()
        found.append([leaf.grad for leaf in leaves.values()])
    for name, clean, dirty in zip(names, *found, strict=True):
        assert torch.equal(clean, dirty), name


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("gate", ["topk", "threshold"])
@unchecked_shapes()
def test_compiles_as_one_graph_with_its_gradients(error: bool, gate: str) -> None:
    torch._dynamo.reset()
    case = make(gate, error)

    def run(x: Tensor, w_dec: Tensor, shift: Tensor) -> Tensor:
        return replace(case, x=x * 2, w_dec=w_dec, shift=shift).run()

    def run_plainly(x: Tensor, w_dec: Tensor, shift: Tensor) -> Tensor:
        return sae_splice(
            x * 2, case.w_enc, case.b_enc, w_dec, case.b_dec, error=error, k=case.k, threshold=case.threshold,
            features=case.features, scale=case.scale, shift=shift, lo=case.lo, hi=case.hi, row=case.row, mask=case.mask,
        )  # fmt: skip

    compiled = torch.compile(run_plainly, fullgraph=True, backend="aot_eager")
    results = []
    for each in (run, compiled):
        inputs = [t.clone().requires_grad_() for t in (case.x, case.w_dec, case.shift)]
        y = each(*inputs)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))


@unchecked_shapes()
def test_parts_are_well_formed_torch_ops() -> None:
    case = make("threshold", True)
    ops = torch.ops.hooked_vla
    torch.library.opcheck(ops.topk_threshold.default, (case.x, case.w_enc, case.b_enc, case.features, 12, case.mask))
    weights = [each.clone().requires_grad_() for each in (case.x, case.w_enc, case.b_enc)]
    torch.library.opcheck(ops.threshold_encode.default, (*weights, case.threshold))
    f = reference.code_of(case.x, case.w_enc, case.b_enc, None, case.threshold)
    inputs = [each.clone().requires_grad_() for each in (f, case.w_dec, case.b_dec)]
    torch.library.opcheck(ops.code_decode.default, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0, 0.02, 0.9])
def test_a_code_is_decoded_from_its_active_rows(dtype: torch.dtype, share: float) -> None:
    """Few active features go through their rows, many through the product: nothing, some, most."""
    wide = torch.promote_types(dtype, torch.float32)
    f = torch.rand(21, 70, dtype=wide) * (torch.rand(21, 70) < share)
    w_dec, b_dec = torch.rand(70, 9).to(dtype), torch.rand(9).to(dtype)
    expected = dense.decode_in_torch(f.double(), w_dec.double(), b_dec.double())
    out = dense.decode_on_cpu(f, w_dec, b_dec)
    assert out.dtype == dtype
    assert_within(out, expected, OUTPUT[dtype])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 12, 89, 90])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ways_to_find_the_members_agree_where_it_matters(dtype: torch.dtype, k: int, masked: bool) -> None:
    case = make("topk", True, dtype)
    arguments = (case.x, case.w_enc, case.b_enc, case.features, k, case.mask if masked else None)
    by_order, by_need = membership.by_order(*arguments), membership.by_need(*arguments)
    chosen = case.features.long()
    z = case.x.to(case.b_enc.dtype) @ case.w_enc[chosen].to(case.b_enc.dtype).T + case.b_enc[chosen]
    matters = (z > 0) & case.mask[:, None] if masked else z > 0
    assert torch.equal(by_order[matters], by_need[matters])
    assert 0 < (by_order[matters] == 0).sum() <= matters.sum()


def test_a_nan_settles_nothing() -> None:
    """One feature is NaN for every token, and so counts as one of the k."""
    case = make("topk", True)
    b_enc = case.b_enc.clone()
    b_enc[2] = torch.nan
    arguments = (case.x, case.w_enc, b_enc, case.features, 12, None)
    z = case.x @ case.w_enc[case.features.long()].T + b_enc[case.features.long()]
    assert torch.equal(membership.by_order(*arguments)[z > 0], membership.by_need(*arguments)[z > 0])


WRONG = {
    "no gate": ({"k": None}, ValueError, "exactly one of k and threshold must be given, got none"),
    "both gates": ({"threshold": torch.zeros(90)}, ValueError, "exactly one of k and threshold .* got both"),
    "k above m": ({"k": 91}, ValueError, r"k must lie in \[1, 90\], the number of features, got 91"),
    "k of 0": ({"k": 0}, ValueError, r"k must lie in \[1, 90\]"),
    "threshold too short": ({"k": None, "threshold": torch.zeros(1)}, ValueError, r"threshold must have shape \[90\]"),
    "threshold NaN": ({"k": None, "threshold": torch.full((90,), torch.nan)}, ValueError, "threshold must hold no NaN"),
    "x of another width": ({"x": torch.zeros(29, 32)}, ValueError, r"w_enc must have shape \[\*, 32\], got \[90, 33\]"),
    "x a NaN": ({"x": torch.full((29, 33), torch.nan)}, ValueError, "x must hold finite values, got nan"),
    "w_dec transposed": ({"w_dec": torch.zeros(33, 90)}, ValueError, r"w_dec must have shape \[90, 33\], got \[33,"),
    "w_dec too coarse": ({"w_dec": torch.zeros(90, 33).half()}, TypeError, "w_dec must be float32, got float16"),
    "w_dec infinite": (
        {"w_dec": torch.full((90, 33), torch.inf)}, ValueError, "w_dec at the edited features must hold finite values",
    ),
    "b_dec of m": ({"b_dec": torch.zeros(90)}, ValueError, r"b_dec must have shape \[33\], got \[90\]"),
    "b_dec NaN": ({"b_dec": torch.full((33,), torch.nan)}, ValueError, "b_dec must hold finite values, got nan"),
    "b_enc elsewhere": ({"b_enc": torch.zeros(90, device="meta")}, ValueError, "b_enc must be on cpu, got meta"),
    "features missing": ({"features": None}, ValueError, "features must say what scale and shift and lo and hi edit"),
    "edits missing": (
        dict.fromkeys(("scale", "shift", "lo", "hi")), ValueError,
        "features are given, so at least one of scale, shift, lo, hi must be, got none",
    ),
    "long features": ({"features": torch.arange(5)}, TypeError, "features must be int32, got int64"),
    "feature m": ({"features": torch.arange(86, 91).int()}, ValueError, r"features must lie in \[0, 90\), got 90"),
    "a feature twice": (
        {"features": torch.tensor([1, 2, 7, 3, 7]).int()}, ValueError, "features must differ .* got 7 twice",
    ),
    "edits of other features": ({"scale": torch.zeros(2, 4)}, ValueError, r"scale must have shape \[\*, 5\], got \[2"),
    "edits of other rows": ({"hi": torch.zeros(1, 5)}, ValueError, r"hi must have shape \[2, 5\], got \[1, 5\]"),
    "no row": ({"row": None}, ValueError, "row must say which of the 2 rows of scale each token uses, got None"),
    "row 2": ({"row": torch.full((29,), 2).int()}, ValueError, r"row must lie in \[0, 2\), got 2"),
    "mask of numbers": ({"mask": torch.ones(29)}, TypeError, "mask must be bool, got float32"),
    "lo above hi": ({"lo": torch.full((2, 5), 3.0)}, ValueError, "lo must be at most hi"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@unchecked_shapes()
def test_says_what_is_wrong(case: str) -> None:
    changes, error, message = WRONG[case]
    with pytest.raises(error, match=f"^sae_splice: {message}"):
        replace(make("topk", True), **changes).run()


@unchecked_shapes()
def test_says_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="^sae_splice: at most 64 features with the error kept, got 65"):
        make("topk", True, n_features=65, m=200).run()
    with pytest.raises(ValueError, match="^sae_splice: row must be None without features"):
        replace(unedited(make("topk", False)), row=torch.zeros(29).int()).run()


def test_values_are_looked_at_only_when_asked() -> None:
    case = make("topk", True)
    case.x[4] = torch.nan
    y = replace(case, mask=None).run(validate=False)
    assert y[[0, 1, 2, 3]].isfinite().all() and y[4].isnan().all()
