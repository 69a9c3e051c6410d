"""Activation patching: what it must give whatever the model is, and that batching and resuming change nothing."""

import fnmatch
from dataclasses import replace

import pytest
import torch
from public_checkpoints import make_observation, read_golden
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA, Observation
from hooked_vla.analysis.metrics import logit_difference, relative_l2
from hooked_vla.analysis.patching import RESIDUALS, activation_patching
from hooked_vla.interventions import Patch

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

MODELS = ["act", "groot_n15", "openvla", "pi05", "smolvla", "xvla"]


def raw(values: Tensor) -> Tensor:
    """A metric that keeps all: random weights, to tell any two outcomes apart."""
    weights = torch.linspace(-1, 1, values[0].numel(), dtype=torch.float64).cos()
    # row by row: a product of matrices rounds a row by how many others there are
    return torch.stack([(row * weights).sum() for row in values.flatten(1).double()])


def fingerprint(edited: Tensor, base: Tensor, donor: Tensor) -> Tensor:
    return raw(edited)


@pytest.fixture(scope="module", params=MODELS)
def pair(request) -> tuple[HookedVLA, dict, dict, list[Tensor], str | None]:
    """A model with two batches of one row that differ in what is seen and, where there are any, in words."""
    golden = read_golden(request.param)
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    inputs = model.prepare(golden.batch)
    noise = [golden.noise] if isinstance(golden.noise, Tensor) else golden.noise
    noise = [draw[:1] for draw in noise]
    clean = inputs.rows([0])
    changed = {"images": clean.images.flip(-1), "state": None if clean.state is None else -clean.state}
    if hasattr(clean, "tokens") and "groot" not in request.param:
        changed["tokens"] = torch.where(clean.token_mask, clean.tokens.roll(1, 1), clean.tokens)
    corrupted = replace(clean, **{name: value for name, value in changed.items() if value is not None})
    # tokens change by jumps only: there the scores of the first one are compared
    read = "vlm.hook_logits" if "vlm.hook_logits" in model.points else None
    return model, clean, corrupted, noise, read


def last_residuals(model: HookedVLA) -> list[str]:
    """The last residual site of prefix and expert that reaches the action."""
    sites = [name for glob in RESIDUALS for name in fnmatch.filter(model.points, glob)]
    sites = [name for name in model.points if name in sites and model.hook_points[name].reaches_action]
    ways = {name.split(".")[0]: name for name in sites if not name.startswith(("vision", "adapter", "decode"))}
    return list(ways.values())


def test_a_patch_from_itself_changes_no_bit(pair) -> None:
    model, clean, _, noise, read = pair
    result = activation_patching(
        model, clean, clean, last_residuals(model), metric=fingerprint, noise=noise, read=read, batch_rows=1
    )
    assert len(result.table) and (result.table["effect"] == 0).all()


def test_batched_and_resumed_is_one_by_one_from_the_start(pair) -> None:
    model, clean, corrupted, noise, read = pair
    given = dict(sites=last_residuals(model), metric=fingerprint, noise=noise, read=read)
    alone = activation_patching(model, clean, corrupted, batch_rows=1, resume=False, **given)
    # one row at a time the kernels see the same shapes: the same bits
    resumed = activation_patching(model, clean, corrupted, batch_rows=1, **given)
    assert resumed.table.equals(alone.table)
    batched = activation_patching(model, clean, corrupted, batch_rows=5, **given)
    for column in ("value", "effect"):
        assert_close(torch.tensor(batched.table[column]), torch.tensor(alone.table[column]))
    assert alone.table["effect"].abs().max() > 0
    # by an ordinary hook, for one cell of the last site
    row = alone.table.iloc[-1]
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, [row.site], noise=list(noise))
        tokens = None if row.segment == "all" else row.segment
        patch = Patch(row.site, cache[row.site], tokens=tokens)
        actions, read_cache = model.run_with_cache(corrupted, [read or row.site], noise=list(noise), edits=[patch])
    assert float(raw(read_cache[read] if read else actions.normalized)) == row.value


def test_patching_all_that_the_actions_are_made_of_gives_the_clean_run(pair) -> None:
    model, clean, corrupted, noise, _ = pair
    site = "head.hook_actions" if "head.hook_actions" in model.points else "decode.hook_logits"
    for direction in ("denoising", "noising"):
        result = activation_patching(
            model, clean, corrupted, [site], metric=fingerprint, direction=direction, noise=noise
        )
        assert torch.equal(torch.tensor(result.table["value"]), result.donor), direction
        assert result.table["replay"].str.contains("actions").all()


NOISE = torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(1))


def observations() -> tuple[Observation, Observation]:
    clean = make_observation(2, 0, ["lift the red block", "push the blue block"])
    return clean, make_observation(2, 3, ["lift the tan block", "push the gold block"])


def test_pairs_are_patched_each_from_its_own_partner(tiny_model: HookedVLA) -> None:
    clean, corrupted = observations()
    sites = ["vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post"]
    both = activation_patching(tiny_model, clean, corrupted, sites, metric=fingerprint, noise=NOISE, batch_rows=6)
    for i in range(2):
        ready = [tiny_model.prepare(each).rows([i]) for each in (clean, corrupted)]
        alone = activation_patching(tiny_model, *ready, sites, metric=fingerprint, noise=NOISE[i : i + 1])
        mine = both.table[both.table["pair"] == i]
        assert mine["segment"].tolist() == alone.table["segment"].tolist()
        assert_close(torch.tensor(mine["value"].to_numpy()), torch.tensor(alone.table["value"].to_numpy()))


def test_cells_cover_segments_and_denoise_steps(tiny_model: HookedVLA) -> None:
    clean, corrupted = observations()
    sites = ["vlm.blocks.1.hook_resid_post", "vision.blocks.0.hook_resid_post", "expert.blocks.3.hook_resid_post"]
    result = activation_patching(tiny_model, clean, corrupted, sites, denoise_steps=range(4), noise=NOISE)
    cells = {key: len(rows) for key, rows in result.table.groupby(["site", "segment", "denoise_step"], dropna=False)}
    # only the second pair's shorter prompt is padded
    assert {n for key, n in cells.items() if key[1] != "pad"} == {2}
    by_site = {site: {key[1:] for key in cells if key[0] == site} for site in sites}
    assert {segment for segment, _ in by_site[sites[0]]} == {"image:agent", "image:wrist", "language", "state", "pad"}
    assert {segment for segment, _ in by_site[sites[1]]} == {"image:agent", "image:wrist"}
    assert by_site[sites[2]] == {("action", step) for step in range(4)}
    assert result.table["share"].equals(result.table["value"]), "recovery goes from 0 to 1"
    # the last block at the last step alone decides that step's velocity; at all steps together it is replay
    whole = activation_patching(tiny_model, clean, corrupted, sites[2:], [None], noise=NOISE)
    assert_close(torch.tensor(whole.table["value"].to_numpy()), torch.ones(2))
    assert whole.table["replay"].ne("").all() and result.table["replay"].eq("").all()


def test_dead_ends_have_no_effect_and_say_so(tiny_model: HookedVLA) -> None:
    clean, corrupted = observations()
    result = activation_patching(
        tiny_model, clean, corrupted, ["vlm.blocks.3.hook_resid_post"], metric=fingerprint, noise=NOISE
    )
    assert (result.table["effect"] == 0).all() and not result.table["reaches_action"].any()


def test_what_metrics_compare() -> None:
    golden = read_golden("openvla")
    model = HookedVLA.from_pretrained(golden.folder).requires_grad_(False)
    clean = model.prepare(golden.batch).rows([0])
    other = torch.randn(clean.images.shape, generator=torch.Generator().manual_seed(0))
    corrupted = replace(clean, images=3 * other)

    def difference(edited: Tensor, base: Tensor, donor: Tensor) -> Tensor:
        return logit_difference(edited[:, None], donor.argmax(-1, keepdim=True), base.argmax(-1, keepdim=True))

    site = "vlm.blocks.0.hook_resid_pre"
    result = activation_patching(
        model, clean, corrupted, [site], [None], metric=difference, noise=[], read="vlm.hook_logits"
    )
    # all of the first block's input is all that the model knows of images
    assert_close(torch.tensor(result.table["value"].to_numpy()), result.donor)
    steps = activation_patching(model, clean, corrupted, [site], [None], metric=relative_l2, noise=[],
                                read="decode.hook_logits")  # fmt: skip
    assert_close(steps.base, torch.zeros(1)), assert_close(steps.donor, torch.ones(1))


def test_errors_name_what_is_wrong(tiny_model: HookedVLA) -> None:
    clean, corrupted = observations()
    site = "vlm.blocks.1.hook_resid_post"

    def sweep(**changes):
        given = dict(sites=[site], noise=NOISE) | changes
        return activation_patching(tiny_model, given.pop("clean", clean), corrupted, **given)

    with pytest.raises(ValueError, match="direction must be"):
        sweep(direction="up")
    with pytest.raises(ValueError, match=r"segments \['image:nose'\]: no site of the sweep has them"):
        sweep(segments=["language", "image:nose"])
    with pytest.raises(ValueError, match=r"denoise_steps \[4\]"):
        sweep(denoise_steps=[0, 4])
    with pytest.raises(KeyError, match="resid_pots"):
        sweep(sites="vlm.blocks.1.hook_resid_pots")
    with pytest.raises(ValueError, match="paired row by row, but have 1 and 2 rows"):
        sweep(clean=make_observation(1))
    with pytest.raises(ValueError, match=r"one number a row, \[\d+\], got \[\]"):
        sweep(metric=lambda edited, base, donor: edited.sum())
    with pytest.raises(TypeError, match="noise is missing"):
        sweep(noise=None)
    longer = make_observation(2, 0, ["lift the red block and the blue block and put them down", "push it"])
    with pytest.raises(ValueError, match="'language' has .* use prompts of equal length"):
        sweep(clean=longer, segments=["language"])
    with pytest.raises(ValueError, match="no columns"):
        sweep(segments=["language"]).heatmap(columns="head")


def test_figures_show_every_site_and_segment(tiny_model: HookedVLA) -> None:
    clean, corrupted = observations()
    sites = ["vlm.blocks.2.hook_resid_pre", "vlm.blocks.3.hook_resid_post"]
    result = activation_patching(tiny_model, clean, corrupted, sites, noise=NOISE)
    figure = result.figure(title="a title")
    axes = figure.axes[0]
    assert [each.get_text() for each in axes.get_yticklabels()] == ["vlm 2 resid_pre", "vlm 3 resid_post"]
    assert [each.get_text() for each in axes.get_xticklabels()] == [
        "image:agent", "image:wrist", "language", "state", "pad",
    ]  # fmt: skip
    assert "a title" in axes.get_title() and "dead end" in axes.get_title()
    assert sum("∅" in each.get_text() for each in axes.texts) == 5
    shown = result.heatmap(title="<b>a title")
    (heat,) = shown.data
    assert list(shown.layout.yaxis.ticktext) == ["vlm 2 resid_pre", "vlm 3 resid_post"]
    assert list(shown.layout.xaxis.ticktext) == [each.get_text() for each in axes.get_xticklabels()]
    means = result.table.groupby(["site", "segment"])["effect"].mean()
    for i, site in enumerate(sites):
        for j, segment in enumerate(shown.layout.xaxis.ticktext):
            assert heat.z[i, j] == pytest.approx(means[site, segment]) and site in heat.text[i][j]
    # plotly's texts are HTML
    assert shown.layout.title.text == "&lt;b&gt;a title" and "dead end" in heat.text[1][0]
    assert sum(each.text == "∅" for each in shown.layout.annotations) == 5
