"""Attribution: estimates are exact where they must be, and nearer to exact patching where they claim to be."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from public_checkpoints import make_observation
from tolerance import assert_close
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.analysis.attribution import agreement, attribution_patching, integrated_gradients
from hooked_vla.analysis.attribution_attention import PatternChange
from hooked_vla.analysis.attribution_graph import GraphRun
from hooked_vla.analysis.patching import activation_patching
from hooked_vla.analysis.patching_cells import Runs, plan_cells
from hooked_vla.analysis.patching_resume import Tape
from hooked_vla.inputs import VLAInputs

pytestmark = pytest.mark.usefixtures("unchecked_shapes")

STEPS = 4
NOISE = torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(1))
RESID = ["vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post", "expert.blocks.2.hook_resid_pre"]
Q_AND_K = ["vlm.blocks.1.attn.hook_q", "vlm.blocks.1.attn.hook_rot_k", "expert.blocks.0.attn.hook_rot_q",
           "expert.blocks.0.attn.hook_prefix_k", "expert.blocks.1.cross_attn.hook_k"]  # fmt: skip


@pytest.fixture(scope="module")
def model() -> HookedVLA:
    return HookedVLA.from_spec("smolvla", size="tiny", seed=0).requires_grad_(False)


def runs(model: HookedVLA, share: float) -> tuple[VLAInputs, VLAInputs]:
    """Two runs with the same words, whose images and states differ by a share of what two scenes differ by."""
    first, second = (model.prepare(make_observation(1, seed, ["lift the red block"])) for seed in (0, 3))
    assert isinstance(first, VLAInputs) and isinstance(second, VLAInputs)
    assert first.images is not None and second.images is not None
    images, state = first.images.lerp(second.images, share), first.state.lerp(second.state, share)
    return first, replace(first, images=images, state=state)


def weighted(edited: Tensor, base: Tensor, donor: Tensor) -> Tensor:
    """A linear metric."""
    return edited.flatten(1) @ torch.linspace(-1, 1, edited[0].numel())


def effects(result) -> Tensor:
    return torch.tensor(result.table["effect"].tolist(), dtype=torch.float64)


def test_estimates_are_exact_where_everything_behind_is_linear(model: HookedVLA) -> None:
    clean, corrupted = runs(model, 1.0)
    given = dict(sites=["expert.hook_velocity"], denoise_steps=[STEPS - 1], metric=weighted, noise=NOISE)
    exact = activation_patching(model, clean, corrupted, **given)
    assert exact.table["effect"].abs().min() > 1e-3
    for method in (attribution_patching, integrated_gradients):
        assert_close(effects(method(model, clean, corrupted, **given)), effects(exact))


@pytest.mark.parametrize("sites", [RESID, Q_AND_K], ids=["residuals", "queries and keys"])
def test_small_changes_are_estimated_to_first_order(model: HookedVLA, sites: list[str]) -> None:
    """The error of a ten times smaller change is a smaller part of it."""
    errors = []
    for share in (1.0, 0.1):
        clean, corrupted = runs(model, share)
        given = dict(sites=sites, denoise_steps=[1, 3], metric=weighted, noise=NOISE)
        exact = effects(activation_patching(model, clean, corrupted, **given))
        estimate = effects(attribution_patching(model, clean, corrupted, **given))
        errors.append(float((estimate - exact).abs().max() / exact.abs().max()))
    assert errors[1] < 0.25 * errors[0], errors


def test_integrated_gradients_add_up_to_the_exact_effect(model: HookedVLA) -> None:
    clean, corrupted = runs(model, 1.0)
    given = dict(sites=RESID, metric=weighted, noise=NOISE)
    exact = effects(activation_patching(model, clean, corrupted, **given))
    scale = exact.abs().max()
    error = {}
    for n in (1, 16):
        found = effects(integrated_gradients(model, clean, corrupted, n_points=n, **given))
        error[n] = float((found - exact).abs().max() / scale)
    first = effects(attribution_patching(model, clean, corrupted, **given))
    assert error[16] < 0.01 and error[16] < 0.2 * float((first - exact).abs().max() / scale), (error, first, exact)


@pytest.mark.parametrize("leaf", ["hook_q", "hook_rot_q", "hook_k", "hook_rot_k"])
def test_the_query_and_key_fix_is_exact_for_what_the_pattern_writes(leaf: str) -> None:
    """Attention's output is linear in its pattern, but not in queries and keys."""
    model = HookedVLA.from_spec("smolvla", "tiny", seed=0).requires_grad_(False)
    for block in model.net.vlm.blocks:
        block.attn.q_proj.weight.mul_(10.0)
    clean, corrupted = runs(model, 1.0)
    given = dict(sites=[f"vlm.blocks.1.attn.{leaf}"], metric=weighted, noise=NOISE, read="vlm.blocks.1.hook_attn_out")
    exact = effects(activation_patching(model, clean, corrupted, **given))
    assert_close(effects(attribution_patching(model, clean, corrupted, **given)), exact)
    plain = effects(attribution_patching(model, clean, corrupted, qk_fix=False, **given))
    assert float((plain - exact).norm() / exact.norm()) > 0.1


def test_patterns_with_the_donors_queries_are_those_of_a_patched_run(model: HookedVLA) -> None:
    clean, corrupted = runs(model, 1.0)
    sites = ["vlm.blocks.1.attn.hook_q", "vlm.blocks.2.attn.hook_q"]
    pair = Runs.of(model, clean, corrupted, "denoising", NOISE, None)
    pair.run_donor(sites)
    cells = plan_cells(model, pair.segments, sites, ["state", "image:*"], None)
    tape = Tape.record(model, pair.base, pair.noise, sites)
    patterns = [site.replace("hook_q", "hook_pattern") for site in sites]
    graph = GraphRun.of(pair, tape, [[]], patterns)
    change = PatternChange.of(pair, tape, cells, graph.nodes)
    for cell in cells:
        pattern = cell.site.replace("hook_q", "hook_pattern")
        with torch.no_grad():
            _, cache = model.run_with_cache(corrupted, [pattern], noise=NOISE, edits=pair.patches(cell)[0])
        row = change.rows["vlm", "hook_q", cell.segment]
        assert_close(change.patterns[pattern][0][row], cache[pattern][0])
        assert not torch.allclose(cache[pattern][0], graph.nodes.values[pattern][0][0], atol=1e-4)


def test_graddrop_is_the_mean_magnitude_over_dropped_blocks(model: HookedVLA) -> None:
    clean, corrupted = runs(model, 1.0)
    site, step = "expert.blocks.0.hook_attn_out", 2
    given = dict(metric=weighted, noise=NOISE)
    found = attribution_patching(model, clean, corrupted, [site], denoise_steps=[step], grad_drop=True, **given)
    with torch.no_grad():
        _, donor = model.run_with_cache(clean, [site], noise=NOISE)
    learning = HookedVLA.from_spec("smolvla", size="tiny", seed=0)
    blocks = [f"{way}.blocks.{i}" for way in ("vision", "vlm", "expert") for i in range(4)
              if f"{way}.blocks.{i}.hook_attn_out" in model.points]  # fmt: skip
    estimates = []
    for block in blocks:
        writes = [f"{block}.hook_attn_out", f"{block}.hook_mlp_out"]
        stop = [(name, lambda gradient, hook: gradient * 0) for name in writes]
        # the last vlm block writes nothing that any action depends on
        gradients = learning.hooks(bwd_hooks=[] if block == "vlm.blocks.3" else stop)
        with gradients:
            _, cache = learning.run_with_cache(
                corrupted, [site], noise=NOISE, incl_bwd=lambda actions: weighted(actions.normalized, *[None] * 2).sum()
            )
        change = donor[site][step] - cache[site][step].detach()
        estimates.append(abs(float((change * cache[f"{site}_grad"][step]).sum())))
    # the cached value stands behind the zero of its own block, which leaves nothing of it
    estimates[blocks.index("expert.blocks.0")] = 0.0
    assert_close(effects(found), torch.tensor([sum(estimates) / (len(blocks) - 1)], dtype=torch.float64))


def test_pairs_are_estimated_each_from_its_own_partner(model: HookedVLA) -> None:
    clean, corrupted = (make_observation(2, seed, ["lift the red block", "push it"]) for seed in (0, 3))
    sites, noise = [RESID[0], Q_AND_K[0]], torch.cat([NOISE, -NOISE])
    for method in (attribution_patching, integrated_gradients):
        both = method(model, clean, corrupted, sites, metric=weighted, noise=noise).table
        for i in range(2):
            ready = [model.prepare(each).rows([i]) for each in (clean, corrupted)]
            alone = method(model, *ready, sites, metric=weighted, noise=noise[i : i + 1]).table
            mine = both[both["pair"] == i]
            assert mine["segment"].tolist() == alone["segment"].tolist()
            np.testing.assert_allclose(mine["effect"], alone["effect"], rtol=1e-3, atol=1e-5)


def test_agreement_is_of_the_same_cells(model: HookedVLA) -> None:
    clean, corrupted = runs(model, 1.0)
    sites = [*RESID, "vlm.blocks.3.hook_resid_post"]
    exact = activation_patching(model, clean, corrupted, sites, noise=NOISE)
    itself = agreement(exact, exact, top=3)
    assert (itself.top_overlap, itself.top) == (1.0, 3)
    assert itself.pearson == pytest.approx(1) and itself.spearman == pytest.approx(1)
    assert itself.n == exact.table["reaches_action"].sum() < len(exact.table)
    estimate = attribution_patching(model, clean, corrupted, sites, noise=NOISE)
    found = agreement(exact, estimate)
    alive = torch.tensor(exact.table["reaches_action"].tolist())
    expected = np.corrcoef(*(effects(each)[alive] for each in (exact, estimate)))[0, 1]
    assert found.pearson == pytest.approx(expected, abs=1e-6)
    flipped = replace(exact, table=exact.table.assign(effect=-exact.table["effect"]))
    assert agreement(exact, flipped).spearman == pytest.approx(-1)
    with pytest.raises(ValueError, match="must be of the same cells"):
        agreement(exact, attribution_patching(model, clean, corrupted, RESID[:1], noise=NOISE))


def test_errors_say_what_cannot_be_estimated(model: HookedVLA) -> None:
    clean, corrupted = runs(model, 1.0)
    with pytest.raises(ValueError, match="no gradient"):
        attribution_patching(
            model, clean, corrupted, RESID[:1], metric=lambda e, b, d: e.detach().sum((1, 2)), noise=NOISE
        )
    with pytest.raises(ValueError, match="n_points must be at least 1"):
        integrated_gradients(model, clean, corrupted, RESID[:1], noise=NOISE, n_points=0)
