"""Edits as arms of a sweep: they describe themselves, act on their own rows, and follow the clocks of the run."""

import json

import pytest
import torch
from public_checkpoints import make_observation

from hooked_vla import HookedVLA
from hooked_vla.interventions import Add, EditArm, Patch, Scale
from hooked_vla.rollouts.arms import BASELINE, Arm, describe_arms, group_hooks
from hooked_vla.rollouts.cells import Cell

SITE, EXPERT = "vlm.blocks.*.hook_resid_post", "expert.blocks.0.hook_resid_post"


def test_an_arm_says_what_it_does() -> None:
    arm = EditArm("steer", [Add(SITE, torch.ones(100), 2.0), Scale(SITE, 0.5)])
    assert isinstance(arm, Arm)
    described = describe_arms([BASELINE, arm])["steer"]
    assert described["kind"] == "edits" and described["edits"][1] == {"edit": "Scale", "site": SITE, "factor": 0.5}
    other = EditArm("steer", [Add(SITE, torch.zeros(100), 2.0), Scale(SITE, 0.5)])
    assert json.dumps(described) != json.dumps(describe_arms([other])["steer"])


def test_arms_need_edits_and_no_rows_of_their_own() -> None:
    with pytest.raises(ValueError, match="arm 'a' has no edits; an arm without edits is BASELINE"):
        EditArm("a", [])
    with pytest.raises(ValueError, match="arm 'a': the sweep decides which rows an arm has"):
        EditArm("a", [Scale(SITE, 0.5, rows=1)])


def test_an_arm_edits_its_own_rows_as_the_model_would(tiny_model: HookedVLA) -> None:
    obs, noise = make_observation(3), torch.randn(3, 8, 8)
    edits = [
        Scale(SITE, 0.5, tokens="language", env=range(2, 4)),
        Patch(EXPERT, torch.ones(4, 1, 8, 48), denoise=[1, 3]),
    ]
    rows = [Cell(i, arm, "t", i) for i, arm in enumerate(["baseline", "edited", "edited"])]
    requests = group_hooks([BASELINE, EditArm("edited", edits)], rows, 3)
    try:
        for tiny_model.run_state.env_step in (1, 2):
            plain = tiny_model(obs, noise).chunk
            expected = tiny_model(obs, noise, edits=edits).chunk
            with tiny_model.hooks(requests):
                chunk = tiny_model(obs, noise).chunk
            assert torch.equal(chunk[0], plain[0]) and torch.equal(chunk[1:], expected[1:])
            assert not torch.equal(chunk[1], plain[1])
        tiny_model.run_state.env_step = None
        with pytest.raises(ValueError, match="env: the environment step is not known"), tiny_model.hooks(requests):
            tiny_model(obs, noise)
    finally:
        tiny_model.run_state.env_step = None


def test_a_sweep_finds_out_beforehand_what_does_not_fit(tiny_model: HookedVLA) -> None:
    EditArm("a", [Scale(SITE, 0.5, tokens="words")]).check(tiny_model)
    with pytest.raises(ValueError, match=r"arm 'a': edit 'Scale' \(Scale\): site: no hook point matches 'no.site'"):
        EditArm("a", [Scale("no.site", 0.5)]).check(tiny_model)
    with pytest.raises(ValueError, match=r"arm 'a': edit 'Add' \(Add\): direction is \[2\], but .* is 64 wide"):
        EditArm("a", [Add(SITE, [1.0, 2.0], 1.0)]).check(tiny_model)


def test_wrong_steps_and_widths_are_named(tiny_model: HookedVLA) -> None:
    for edit, message in (
        (Scale(SITE, 0.5, denoise=1), r"edit Scale: denoise: vlm.blocks.0.hook_resid_post runs once per chunk"),
        (Add(SITE, [1.0, 2.0], 1.0), r"edit Add: direction is \[2\], but vlm.blocks.0.hook_resid_post is 64 wide"),
        (Scale(SITE, 0.5, tokens="words"), r"edit Scale: tokens: at vlm.blocks.0.hook_resid_post, no token segment"),
    ):
        requests = EditArm("a", [edit]).hooks([])
        with pytest.raises(ValueError, match=message), tiny_model.hooks(requests):
            tiny_model(make_observation())
