"""Each edit computes its formula on the tokens it is for, and leaves every other bit alone."""

from dataclasses import replace

import pytest
import torch
from edited_model import BANK, BASIS, SAE, SITE, SOURCE, TOPK, D, V, segment, value
from test_edits import make_sae
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.interventions import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    EditSet,
    Overwrite,
    Patch,
    ProjectOut,
    SAEFeatureEdit,
    SAEReconstruct,
    Scale,
    SubspacePatch,
)
from hooked_vla.interventions.operators import weights_dtype
from hooked_vla.kernels import lowrank_edit
from hooked_vla.sae.splice import SpliceSAE, Tables, edit_features, rows_of, splice, weights_of

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def model(request) -> HookedVLA:
    return HookedVLA.from_spec("smolvla", "tiny", dtype=request.param).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> HookedVLA:
    return HookedVLA.from_spec("smolvla", "tiny").requires_grad_(False)


def bits(value: Tensor) -> Tensor:
    return value.view(torch.int32 if value.dtype == torch.float32 else torch.int16)


def project(x: Tensor, basis: Tensor) -> Tensor:
    q = torch.linalg.qr(basis.double().T).Q
    return x @ q @ q.T


def features(x: Tensor, sae: SpliceSAE) -> Tensor:
    w_enc, b_enc, _, b_dec = (sae.tensors()[name].double() for name in ("w_enc", "b_enc", "w_dec", "b_dec"))
    z = (x - b_dec) @ w_enc.T + b_enc
    if sae.threshold is not None:
        return torch.where(z > sae.threshold.double(), z, 0)
    return torch.where(z >= z.topk(sae.k).values[..., -1:], z.clamp_min(0), 0)


def decode(f: Tensor, sae: SpliceSAE) -> Tensor:
    return f @ sae.w_dec.double() + sae.b_dec.double()


def with_features(x: Tensor, sae: SpliceSAE, keep: bool = True) -> Tensor:
    f = features(x, sae)
    g = f.clone()
    g[..., [5, 2]] = (torch.tensor([2.0, 0.0]) * f[..., [5, 2]] + 1).clamp(max=3)
    return decode(g, sae) + (x - decode(f, sae) if keep else 0)


CHANGE = {"scale": [2.0, 0.0], "shift": 1.0, "high": 3.0}
FORMULAS = {
    "patch": (Patch(SITE, SOURCE), lambda x: SOURCE.double()),
    "patch with a vector": (Patch(SITE, V), lambda x: V.double().expand_as(x)),
    "blend": (Patch(SITE, SOURCE, 0.25), lambda x: x + 0.25 * (SOURCE.double() - x)),
    "patch of channels": (
        Patch(SITE, SOURCE, channels=[1, 3]),
        lambda x: torch.where(torch.isin(torch.arange(D), torch.tensor([1, 3])), SOURCE.double(), x),
    ),
    "add": (Add(SITE, V, -1.5), lambda x: x - 1.5 * V),
    "add relative": (AddRelative(SITE, V, 0.5), lambda x: x + 0.5 * x.norm(dim=-1, keepdim=True) * V / V.norm()),
    "scale": (Scale(SITE, -0.5), lambda x: x * -0.5),
    "clamp": (Clamp(SITE, -0.25, 0.5), lambda x: x.clamp(-0.25, 0.5)),
    "zero": (Ablate(SITE, "zero"), lambda x: x * 0),
    "mean": (Ablate(SITE, "mean", V), lambda x: V.double().expand_as(x)),
    "project out": (ProjectOut(SITE, BASIS), lambda x: x - project(x, BASIS)),
    "project half out": (ProjectOut(SITE, V, 0.5, V), lambda x: x - 0.5 * project(x - V, V[None])),
    "subspace": (SubspacePatch(SITE, SOURCE, BASIS, 0.5), lambda x: x + 0.5 * project(SOURCE - x, BASIS)),
    "overwrite": (Overwrite(SITE, 4.0), lambda x: torch.full_like(x, 4)),
    "overwrite channels": (
        Overwrite(SITE, [7.0, 8.0], channels=[0, 9]),
        lambda x: x.index_copy(2, torch.tensor([0, 9]), torch.tensor([7.0, 8.0]).double().expand(2, 39, 2)),
    ),
    "reconstruct": (SAEReconstruct(SITE, SAE), lambda x: decode(features(x, SAE), SAE)),
    "reconstruct top k": (SAEReconstruct(SITE, TOPK), lambda x: decode(features(x, TOPK), TOPK)),
    "reconstruct means": (
        SAEReconstruct(SITE, SAE, pool="segment"),
        lambda x: x + (decode(features(x.mean(1, True), SAE), SAE) - x.mean(1, True)),
    ),
    "features": (SAEFeatureEdit(SITE, SAE, [5, 2], **CHANGE), lambda x: with_features(x, SAE)),
    "features without error": (
        SAEFeatureEdit(SITE, SAE, [5, 2], keep_error=False, **CHANGE),
        lambda x: with_features(x, SAE, keep=False),
    ),
    "features of top k": (SAEFeatureEdit(SITE, TOPK, [5, 2], **CHANGE), lambda x: with_features(x, TOPK)),
    "features of means": (
        SAEFeatureEdit(SITE, SAE, [5, 2], pool="segment", **CHANGE),
        lambda x: x + (with_features(x.mean(1, True), SAE) - x.mean(1, True)),
    ),
}


@pytest.mark.parametrize("case", FORMULAS)
def test_each_computes_its_formula(model: HookedVLA, case: str) -> None:
    edit, formula = FORMULAS[case]
    x = value(model)
    expected = formula(x.double())
    edited = value(model, edit)
    # relative to the size of what the sums are made of: sources and features are of the size of the activations
    size = x.double().abs().max()
    assert_close(edited.double() / size, expected / size, x.dtype)
    assert not torch.equal(edited, x)


@pytest.mark.parametrize("case", FORMULAS)
def test_tokens_outside_keep_their_bits(model: HookedVLA, case: str) -> None:
    """Even -0.0, which x + 0 is not."""
    if case == "reconstruct means":
        case = "features of means"
    edit = replace(FORMULAS[case][0], tokens="language", positions=range(8, 36))
    zeros = Overwrite(SITE, -0.0, positions=range(0, 39, 2))
    before, after = value(model, zeros), value(model, zeros, edit)
    inside = segment(model, "language")
    inside[:, :8] = inside[:, 36:] = False
    assert inside.any() and not inside.all()
    assert torch.equal(bits(before)[~inside], bits(after)[~inside])
    assert not torch.equal(before[inside], after[inside])


IDENTITIES = {
    "patch from itself": lambda x: Patch(SITE, x),
    "strength 0": lambda x: Patch(SITE, SOURCE, 0.0),
    "blend with itself": lambda x: Patch(SITE, x, 0.5),
    "add 0": lambda x: Add(SITE, V, 0.0),
    "add relative 0": lambda x: AddRelative(SITE, V, 0.0),
    "scale 1": lambda x: Scale(SITE, 1.0),
    "wide clamp": lambda x: Clamp(SITE, -100.0, 100.0),
    "no projection": lambda x: ProjectOut(SITE, BASIS, 0.0),
    "subspace from itself": lambda x: SubspacePatch(SITE, x, BASIS),
    "features as they are": lambda x: SAEFeatureEdit(SITE, SAE, range(32)),
    "top k features as they are": lambda x: SAEFeatureEdit(SITE, TOPK, [1, 2]),
    "means' features as they are": lambda x: SAEFeatureEdit(SITE, SAE, 1, pool="segment"),
    "100 features as they are": lambda x: SAEFeatureEdit(SITE, make_sae(128, D), range(100)),
}


@pytest.mark.parametrize("case", IDENTITIES)
def test_identity_edits_change_no_bit(model: HookedVLA, case: str) -> None:
    zeros = Overwrite(SITE, -0.0, positions=range(0, 39, 2))
    before = value(model, zeros)
    after = value(model, zeros, IDENTITIES[case](before))
    assert torch.equal(bits(before), bits(after))


def test_many_features_are_edited_as_few_are(tiny: HookedVLA) -> None:
    sae = make_sae(128, D)
    whole = SAEFeatureEdit(SITE, sae, range(100), scale=0.0)
    x = value(tiny)
    f = features(x.double(), sae)
    f[..., 100:] = 0
    assert_close(value(tiny, whole), x - f @ sae.w_dec.double())


def test_resampling_takes_tokens_of_the_bank_by_seed(tiny: HookedVLA) -> None:
    first, again = (value(tiny, Ablate(SITE, "resample", BANK, seed=1)) for _ in range(2))
    other = value(tiny, Ablate(SITE, "resample", BANK, seed=2))
    chosen = (first[:, :, None] == BANK).all(-1)
    assert bool(chosen.any(-1).all()) and torch.equal(chosen[0], chosen[1])
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("case", ["subspace", "project out", "features", "features of top k", "reconstruct", "add"])
def test_autocast_changes_no_edit(model: HookedVLA, case: str) -> None:
    """The model's own products are others under it; the edit of the same tokens is not."""
    edit, x = FORMULAS[case][0], value(model)
    expected = value(model, Patch(SITE, x), edit)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(bits(value(model, Patch(SITE, x), edit)), bits(expected))


def test_many_features_under_a_mask_and_by_row() -> None:
    """As one sum over all of them in float64; tokens outside keep even NaN and -0.0."""
    sae, generator = make_sae(150, D), torch.Generator().manual_seed(0)
    x = torch.randn(20, D, generator=generator)
    row, mask = torch.arange(20, dtype=torch.int32) % 2, torch.arange(20) % 3 != 0
    x[0], x[3] = -0.0, torch.nan
    rows = rows_of(sae, range(150), torch.float32, torch.device("cpu"))
    scale, shift = torch.randn(2, 150, generator=generator), torch.randn(2, 150, generator=generator)
    tables = Tables(scale, shift, torch.full((2, 150), -1.0), torch.full((2, 150), 2.0))
    y = edit_features(x, rows, tables, row, mask)
    f = features(x.double(), sae)
    g = (scale.double()[row] * f + shift.double()[row]).clamp(-1, 2)
    assert torch.equal(bits(y[~mask]), bits(x[~mask]))
    assert_close(y[mask], (x.double() + (g - f) @ sae.w_dec.double())[mask].float())


def test_a_float64_autoencoder_is_one() -> None:
    """Nothing on the way is rounded to float32, be the autoencoder in it or not."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, D, generator=generator, dtype=torch.float64)
    for sae in (make_sae(32, D), make_sae(32, D, k=4)):
        exact = SpliceSAE(**{name: each.double() / 3 for name, each in sae.tensors().items()}, k=sae.k)
        for each in (sae, exact):
            expected = decode(features(x, each), each)
            weights = weights_of(each, torch.float64, torch.device("cpu"))
            found = splice(x, weights, each.k, False, None, None, None, None)
            torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    rows = rows_of(exact if exact.k is None else make_sae(32, D), range(4), torch.float64, torch.device("cpu"))
    assert all(each.dtype == torch.float64 for each in rows)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_basis_in_bfloat16_moves_edits_less_than_allowed(strength: float) -> None:
    """On a GPU directions have the dtype of bfloat16 tokens; here on a CPU, against float64 with the exact basis."""
    d, r = 1024, 64
    generator = torch.Generator().manual_seed(0)
    x, source = torch.randn(2, 50, d, generator=generator).bfloat16()
    basis = torch.linalg.qr(torch.randn(d, r, generator=generator, dtype=torch.float64)).Q.T.contiguous()
    given = torch.tensor([strength])
    for src in (None, source):
        difference = -x.double() if src is None else src.double() - x.double()
        exact = strength * difference @ basis.T @ basis
        narrow = basis.bfloat16()
        y = lowrank_edit(x, src, narrow, narrow, given, given, None)
        # both in float64, so that only the basis differs; y itself is rounded to bfloat16
        wide = narrow.double()
        edit = lowrank_edit(x.double(), None if src is None else src.double(), wide, wide, given.double(),
                            given.double(), None) - x.double()  # fmt: skip
        # tests/kernels/bounds.py: EDIT and OUTPUT of bfloat16
        assert ((edit - exact).norm(dim=1) / exact.norm(dim=1)).max() < 2e-2
        expected = x.double() + exact
        assert ((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max() < 5e-3


def test_directions_are_narrow_where_a_gpu_multiplies_them(model: HookedVLA) -> None:
    site = EditSet(model, [ProjectOut(SITE, BASIS)])._programs[SITE].site
    assert weights_dtype(site) == torch.float32
    on_gpu = replace(site, device=torch.device("cuda"))
    assert weights_dtype(on_gpu) == (torch.bfloat16 if site.dtype == torch.bfloat16 else torch.float32)
    assert weights_dtype(replace(on_gpu, dtype=torch.float16)) == torch.float32
