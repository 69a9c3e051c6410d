"""Arms: what they say of themselves, and hooks that leave other arms' rows alone, bit for bit."""

import re

import pyarrow.compute as pc
import pytest
import torch
from test_noise import make_observation
from torch import Tensor
from toy_suite import tiny, toy_suite

from hooked_vla import HookedVLA, list_models
from hooked_vla.hooks.cache import ROW_AXES
from hooked_vla.rollouts.arms import BASELINE, FunctionArm, describe_arms, group_hooks, only_rows
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts


def shift(value: Tensor, hook) -> Tensor:
    # not the same everywhere: a norm would take that away
    return value + torch.linspace(-1, 1, value.shape[-1])


def shift_in_place(value: Tensor, hook) -> None:
    value += torch.linspace(-1, 1, value.shape[-1])


def points_by_rows(model: HookedVLA) -> dict[str, str]:
    """For every kind of rows, a point of the model that has it and reaches the action."""
    sites = model.hook_points
    return {
        sites[name].axes[0]: name
        for name in reversed(sites)
        if sites[name].reaches_action and sites[name].axes[0] in ROW_AXES and "pattern" not in name
    }


@pytest.mark.parametrize("name", list_models())
def test_hooks_of_one_row_leave_the_other_rows_alone(name: str) -> None:
    model = tiny(name)
    obs = make_observation(model, 3)
    noise = SeededNoise.of(model, make_observation(model, 1))([1, 2, 3], 0)
    plain = model(obs, noise).normalized
    points = list(points_by_rows(model).values())
    assert model.hook_points[points[0]].axes[0] == "batch"
    middle, edited = torch.tensor([False, True, False]), {}
    for fn in (shift, shift_in_place):
        with model.hooks([(points, only_rows(fn, middle))]):
            edited[fn] = model(obs, noise).normalized
    with model.hooks([(points, shift)]):
        everywhere = model(obs, noise).normalized
    assert torch.equal(edited[shift][[0, 2]], plain[[0, 2]])
    assert torch.equal(edited[shift][1], everywhere[1]) and torch.equal(edited[shift_in_place], edited[shift])
    # discrete actions may stay the same
    assert name in ("openvla", "pi0_fast", "vqbet") or not torch.equal(everywhere[1], plain[1])


def test_a_value_that_all_rows_share_cannot_be_edited_for_one() -> None:
    model = tiny("act")
    shared = next(name for name, site in model.hook_points.items() if site.axes[0] not in ROW_AXES)
    obs = make_observation(model, 2)
    with (
        pytest.raises(ValueError, match=re.escape(shared) + ".*shared by all rows"),
        model.hooks([(shared, only_rows(shift, torch.tensor([True, False])))]),
    ):
        model(obs)


def test_what_a_hook_returns_wrongly_is_still_refused(tiny_model: HookedVLA) -> None:
    site, rows = "vlm.blocks.0.hook_resid_pre", torch.tensor([True, False])
    obs = make_observation(tiny_model, 2)
    with (
        pytest.raises(ValueError, match="returned shape"),
        tiny_model.hooks([(site, only_rows(lambda value, hook: value[:1], rows))]),
    ):
        tiny_model(obs)


def test_only_a_mixed_batch_is_masked() -> None:
    arm = FunctionArm("edit", (("vlm.*.hook_resid_pre", shift),), "adds 1")
    own = [Cell(i, "edit", "t", i) for i in range(2)]
    assert group_hooks([BASELINE, arm], own, 2) == [("vlm.*.hook_resid_pre", shift)]
    # the padding row, which says "edit" too, does not count
    baseline = [Cell(0, "baseline", "t", 0)]
    assert group_hooks([BASELINE, arm], baseline * 2, 1) == []
    [(site, masked)] = group_hooks([BASELINE, arm], [*baseline, *own], 2)
    assert site == "vlm.*.hook_resid_pre" and masked is not shift


def test_arms_describe_themselves() -> None:
    arm = FunctionArm("edit", ((["a.*", "b"], shift), (re.compile("c.*"), shift), (None, shift)), "adds 1")
    assert describe_arms([BASELINE, arm]) == {
        "baseline": {"kind": "baseline"},
        "edit": {"kind": "functions", "sites": [["a.*", "b"], "c.*", None], "description": "adds 1"},
    }


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ([], "no arms"),
        ([BASELINE, BASELINE], "used more than once.*baseline"),
        ([FunctionArm("", (("*", shift),), "adds 1")], "not empty"),
    ],
)
def test_arms_that_cannot_be_told_apart_are_refused(arms: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        describe_arms(arms)


def test_functions_must_be_described_and_descriptions_be_json() -> None:
    with pytest.raises(ValueError, match="'edit': functions need a description"):
        FunctionArm("edit", (("*", shift),), " ")
    with pytest.raises(ValueError, match="'edit' has no hooks"):
        FunctionArm("edit", (), "nothing")

    class Odd:
        name = "odd"

        def describe(self):
            return {"strength": torch.ones(1)}

        def hooks(self, rows):
            return []

    with pytest.raises(ValueError, match="arm 'odd': its description is not JSON"):
        describe_arms([Odd()])


def test_an_arm_may_change_what_the_policy_sees_and_nothing_else(tiny_model: HookedVLA) -> None:
    """The policy acts on the changed observation; other rows, tables and environments keep what was there."""

    class Darkened:
        name = "dark"

        def describe(self):
            return {"kind": "dark"}

        def hooks(self, rows):
            return ()

        def observe(self, cell, env_step, frame):
            seen.append((cell.seed, env_step))
            return {**frame, "pixels": {name: pixels // 2 for name, pixels in frame["pixels"].items()}}

    seen: list[tuple[int, int]] = []
    suite = toy_suite()
    done = run_rollouts(tiny_model, suite, 2, seed=5, arms=[BASELINE, Darkened()], options=Options(n_envs=4))
    n = done.plan.job.settings.n_action_steps
    assert {(5, 0), (6, 0)} <= set(seen) <= {(seed, step) for seed in (5, 6) for step in range(0, suite.max_steps, n)}
    alone = run_rollouts(tiny_model, suite, 2, seed=5, options=Options(n_envs=4))
    rows = [done.episodes.filter(pc.field("arm") == arm) for arm in ("baseline", "dark")]
    assert rows[0].equals(alone.episodes.replace_schema_metadata(rows[0].schema.metadata))
    assert rows[0]["final_state"] != rows[1]["final_state"] and rows[0]["instruction"] == rows[1]["instruction"]
