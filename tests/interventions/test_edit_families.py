"""Edits in every family: an identity at every hook point changes no bit, an edit of one row that row only."""

import warnings

import pytest
import torch
from public_checkpoints import read_golden
from torch import Tensor

from hooked_vla import HookedVLA, list_models
from hooked_vla.interventions import Ablate, AddRelative, Clamp, Edit, EditSet, Scale, SubspacePatch

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

# listening there takes attention, or the norm, another way
IN_THE_OPEN = ("hook_attn_scores", "hook_pattern", "hook_scale")


@pytest.fixture(scope="module", params=list_models())
def case(request) -> tuple[HookedVLA, dict, object]:
    golden = read_golden(request.param)
    return HookedVLA.from_pretrained(golden.folder).requires_grad_(False), golden.batch, golden.noise


def run(model: HookedVLA, batch: dict, noise: object, edits: list[Edit]) -> Tensor:
    """The actions, and the scores that decide them where they change by jumps only."""
    scores = [name for name in ("vlm.hook_logits", "decode.hook_logits") if name in model.points]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        actions, cache = model.run_with_cache(batch, scores, noise=noise, edits=EditSet(model, edits))
    rows = len(actions.normalized)
    told = [cache[name].reshape(-1, rows, *cache[name].shape[-1:]).movedim(1, 0).flatten(1) for name in scores]
    return torch.cat([actions.normalized.flatten(1), *told], dim=1)


def test_identity_edits_at_every_point_change_no_bit(case) -> None:
    model, batch, noise = case
    names = [n for n, site in model.hook_points.items() if site.dtype.is_floating_point and not n.endswith(IN_THE_OPEN)]
    directed = [name for name in names if name.endswith(("hook_resid_post", "hook_mlp_out", "hook_z", "hook_v"))]
    by_rows = [name for name in names if model.hook_points[name].axes[0] in ("batch", "image", "window")]
    edits: list[Edit] = [Scale(names, 1.0), Clamp(by_rows, -1e30, 1e30, rows=0)]
    for name in directed:
        sizes = zip(model.hook_points[name].axes, model.hook_points[name].shape, strict=True)
        width = [size for axis, size in sizes if axis not in ("batch", "image", "window", "seq", "prefix")]
        edits.append(AddRelative(name, torch.ones(width), 0.0))
        edits.append(SubspacePatch(name, torch.ones(width), torch.ones(width), 0.0))
    assert torch.equal(run(model, batch, noise, edits), run(model, batch, noise, []))


def test_an_edit_of_one_row_changes_that_row(case) -> None:
    model, batch, noise = case
    sites = [n for n, site in model.hook_points.items() if n.endswith("hook_resid_post") and site.reaches_action]
    plain = run(model, batch, noise, [])
    last = len(plain) - 1
    for name in (sites[0], sites[-1]):
        edited = run(model, batch, noise, [Ablate(name, "zero", rows=last)])
        assert torch.equal(edited[:last], plain[:last]), name
        assert not torch.equal(edited[last], plain[last]), name


def test_segments_are_known_to_edits(case) -> None:
    """Every segment of every stream that a residual stream has can be edited."""
    model, batch, noise = case
    found = model.segments(model.prepare(batch))
    sites = {model.points[n].streams["seq"]: n for n in model.points
             if n.endswith("hook_resid_post") and "seq" in model.points[n].streams}  # fmt: skip
    edits = [
        Scale(name, 1.0, tokens=segment)
        for stream, name in sites.items()
        if stream in found
        for segment in found[stream].present()
    ]
    assert edits and torch.equal(run(model, batch, noise, edits), run(model, batch, noise, []))
