"""Noise in place of an injection: as large, elsewhere directed, and nothing where the injection changes nothing."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toy_suite import tiny, toy_suite

from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.interventions.injection import Injection
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE, describe_arms
from hooked_vla.rollouts.injection import InjectionArm, same_scene, sources_of
from hooked_vla.rollouts.matched_noise import (
    EPISODE,
    STEP,
    MatchedNoiseArm,
    NoiseHook,
    matched_noise,
    noise_of,
    with_controls,
)
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts

SITE = "expert.blocks.0.hook_resid_post"
OPTIONS = Options(n_envs=4, max_steps=6, n_action_steps=2, image_size=32)


def change() -> Tensor:
    drawn = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    drawn[1, 2] = 0
    return drawn


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("noise")
    with ActivationRecorder(folder / "recording", {"what": "baseline"}) as recorder:
        done = run_rollouts(tiny("smolvla"), toy_suite(), 2, 0, ("run", "walk"), out=folder / "run", options=OPTIONS,
                            watchers=[ActivationWatcher(recorder, [SITE])])  # fmt: skip
    return folder / "recording", done


def noisy(lasts: str, moments: list[tuple[int, int]], seeds: list[int]) -> list[Tensor]:
    """What a hook adds at some environment and denoise steps, where an injection adds `change`."""
    point = HookPoint("batch seq d_model")
    point.name = SITE
    inject: Callable[..., Tensor] = lambda value, hook: value + change()  # noqa: E731
    hook, found = NoiseHook(inject, seeds, lasts), []
    for env_step, denoise_step in moments:
        point.run = Run()
        point.run.env_step = env_step
        point.run.denoise_step = denoise_step
        value = torch.zeros(2, 5, 16)
        added = hook(value, point)
        assert added is not None
        found.append(added)
    return found


def test_noise_is_as_long_as_the_change_token_by_token() -> None:
    point = HookPoint("batch seq d_model")
    noise = matched_noise(change(), Layout.of(point), [7, 8])
    torch.testing.assert_close(noise.norm(dim=-1), change().norm(dim=-1))
    assert not noise[1, 2].any()
    assert torch.cosine_similarity(noise[0], change()[0], dim=-1).abs().max() < 0.9


def test_a_direction_lasts_an_episode_or_a_step() -> None:
    moments = [(0, 0), (0, 1), (2, 0)]
    first, *others = noisy(EPISODE, moments, [7, 8])
    assert all(torch.equal(each, first) for each in others)
    first, *others = noisy(STEP, moments, [7, 8])
    assert not any(torch.equal(each, first) for each in others) and not torch.equal(*others)
    for each in (first, *others):
        torch.testing.assert_close(each.norm(dim=-1), change().norm(dim=-1))
    # another episode has directions of its own
    assert not torch.equal(noisy(EPISODE, [(0, 0)], [7, 9])[0][1], noisy(EPISODE, [(0, 0)], [7, 8])[0][1])


def test_every_injection_has_its_control(recorded) -> None:
    folder, done = recorded
    sources = sources_of(done.episodes)
    arm = InjectionArm("x", folder, Injection(SITE, "hold"), same_scene(sources, [each.scene for each in sources]))
    found = with_controls([arm, replace(arm, name="y")])
    assert [each.name for each in found] == ["x", "noise: x", "y", "noise: y"]
    control = found[1]
    assert isinstance(control, MatchedNoiseArm) and control.donors == arm.donors and control.lasts == EPISODE
    both = [noise_of(arm), replace(noise_of(arm, STEP), name="steps")]
    first, second = describe_arms(both).values()
    assert first != second and first["injection"] == arm.describe()["injection"]
    with pytest.raises(ValueError, match="lasts must be 'episode' or 'step', got 'day'"):
        noise_of(arm, "day")


def test_noise_acts_in_closed_loop_and_not_where_the_donor_changes_nothing(recorded, tmp_path: Path) -> None:
    folder, done = recorded
    sources = sources_of(done.episodes)
    scenes = [each.scene for each in sources]
    itself = InjectionArm("itself", folder, Injection(SITE, "error"), same_scene(sources, scenes))
    turned = {scene: same_scene(sources, scenes)[other] for scene, other in zip(scenes, scenes[::-1], strict=True)}
    other = InjectionArm("other", folder, Injection(SITE, "hold"), turned)
    arms = [BASELINE, noise_of(itself), other, noise_of(other)]
    again = run_rollouts(tiny("smolvla"), toy_suite(), 2, 0, ("run", "walk"), arms, tmp_path, OPTIONS)
    table = read_steps(tmp_path).to_pandas().merge(again.episodes.to_pandas()[["episode", "arm"]], on="episode")
    did = {arm: np.stack(list(part["action"])) for arm, part in table.groupby("arm")}
    assert np.array_equal(did["noise: itself"], did["baseline"])
    for arm in ("other", "noise: other"):
        assert not np.array_equal(did[arm][:2], did["baseline"][:2])
    assert not np.array_equal(did["other"][:2], did["noise: other"][:2])
