"""Injection in closed loop: donors by scene, windows by environment step, bit-exact self-injection, clear errors."""

from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest
from toy_suite import ToyEnv, tiny, toy_suite

from hooked_vla.interventions.injection import ExhaustedError, Injection
from hooked_vla.interventions.injection_sites import residual_sites, stream_sites
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE, describe_arms
from hooked_vla.rollouts.cells import Cell, Scene
from hooked_vla.rollouts.injection import (
    InjectionArm,
    Source,
    Told,
    ToldArm,
    cross_seed,
    cross_task,
    load_donors,
    same_scene,
    same_start,
    sources_of,
)
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import Rollouts, run_rollouts

MODEL = "smolvla"
# rows for three arms of four episodes
OPTIONS = Options(n_envs=12, max_steps=6, n_action_steps=2, image_size=32)
TASKS = ("walk", "run")


class FarEnv(ToyEnv):
    """Its goal is too far away: every episode takes all of its time."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed, options=options)
        self.goal = 1000 + (seed or 0) % 4
        return self._observe(), self._info()


SUITE = toy_suite(make=FarEnv)


NOISE = "expert.hook_noisy_actions"


def sites() -> list[str]:
    return [*residual_sites(tiny(MODEL)), NOISE]


def replaying() -> list[str]:
    """All that the expert makes actions of: what it has seen, and the noise that it starts from."""
    return [*stream_sites(tiny(MODEL), "expert"), NOISE]


def sweep(
    out: Path, arms: Any, episodes: int = 4, seed: int = 0, tasks=TASKS, watchers: Any = (), options=OPTIONS
) -> Rollouts:
    return run_rollouts(tiny(MODEL), SUITE, episodes, seed, tasks, arms, out, options, watchers=watchers)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> tuple[Path, Rollouts]:
    """Four recorded episodes, two of each task."""
    folder = tmp_path_factory.mktemp("source")
    with ActivationRecorder(folder / "recording", {"what": "baseline"}) as recorder:
        done = sweep(folder / "run", [BASELINE], watchers=[ActivationWatcher(recorder, sites())])
    return folder / "recording", done


def actions(done: Rollouts, arm: str, episode: int = 0) -> np.ndarray:
    """What an arm's n-th episode did."""
    assert done.folder is not None
    table = done.episodes.to_pandas()
    number = table[table["arm"] == arm]["episode"].iloc[episode]
    return np.stack(read_steps(done.folder, [int(number)])["action"].to_pylist())


def test_episodes_injected_into_themselves_are_the_same_bytes(source, tmp_path: Path) -> None:
    recording, done = source
    found = sources_of(done.episodes)
    donors = same_scene(found, [each.scene for each in found])
    assert donors == {each.scene: each.episode for each in found} and len(donors) == 4
    arm = InjectionArm("baseline", recording, Injection(sites(), "error"), donors)
    again = sweep(tmp_path / "again", [arm])
    assert done.folder is not None and again.folder is not None
    first, second = (sorted((folder / "steps").rglob("*.parquet")) for folder in (done.folder, again.folder))
    assert len(first) == 4 and [a.read_bytes() for a in first] == [b.read_bytes() for b in second]


def test_a_cut_set_replays_each_cells_own_donor_while_it_lasts(source, tmp_path: Path) -> None:
    """Arms share a batch: what is injected into one leaves the others' rows alone."""
    recording, done = source
    found, stream = sources_of(done.episodes), replaying()
    donors = cross_seed(found, [each.scene for each in found])
    assert sorted(donors.values()) == [0, 1, 2, 3] and all(donors[each.scene] != each.episode for each in found)
    windows = [Injection(stream, "error", env=range(start, start + 2)) for start in (0, 2)]
    arms = [BASELINE, *(InjectionArm(str(each.env), recording, each, donors) for each in windows)]
    mixed = sweep(tmp_path / "mixed", arms)
    for i, each in enumerate(found):
        plain, first, second = (actions(mixed, arm.name, i) for arm in arms)
        theirs = actions(done, "baseline", donors[each.scene])
        assert np.array_equal(plain, actions(done, "baseline", i)) and not np.array_equal(plain[:2], theirs[:2])
        assert np.array_equal(first[:2], theirs[:2]) and not np.array_equal(first[2:4], theirs[2:4])
        assert np.array_equal(second[:2], plain[:2]) and np.array_equal(second[2:4], theirs[2:4])


def test_when_a_donor_has_ended_the_policy_says_what_happens(source, tmp_path: Path) -> None:
    recording, done = source
    found, stream = sources_of(done.episodes), replaying()
    donors = cross_seed(found, [each.scene for each in found])
    longer = Options(n_envs=12, max_steps=8, n_action_steps=2, image_size=32)

    def arm(exhaustion: str) -> InjectionArm:
        return InjectionArm(exhaustion, recording, Injection(stream, exhaustion), donors)

    run = sweep(tmp_path / "two", [BASELINE, arm("stop"), arm("hold")], options=longer)
    theirs, plain, stopped, held = (
        actions(done, "baseline", donors[found[0].scene]),
        *(actions(run, name) for name in ("baseline", "stop", "hold")),
    )
    assert len(theirs) == 6 and len(held) == 8
    assert np.array_equal(held, np.concatenate([theirs, theirs[-2:]]))
    assert np.array_equal(stopped[:6], theirs) and not np.array_equal(stopped[6:], held[6:])
    assert not np.array_equal(plain[:6], theirs)
    with pytest.raises(ExhaustedError, match="arm 'error': the recording of episode 1 .* ends at env_step 4, .* at 6"):
        sweep(tmp_path / "error", [arm("error")], options=longer)
    # the same episode needs nothing more once it is over
    alone = InjectionArm(
        "alone", recording, Injection(stream, "error"), same_scene(found, [each.scene for each in found])
    )
    assert sweep(tmp_path / "alone", [alone]).episodes.num_rows == 4


def test_another_rhythm_is_an_error(source, tmp_path: Path) -> None:
    recording, done = source
    found = sources_of(done.episodes)
    arm = InjectionArm("a", recording, Injection(sites(), "stop"), same_scene(found, [each.scene for each in found]))
    with pytest.raises(KeyError, match=r"env_step 3 of episode \d .*recorded: \[0, 2, 4\]"):
        sweep(tmp_path / "a", [arm], options=Options(n_envs=4, max_steps=6, n_action_steps=3, image_size=32))


def test_what_is_told_reaches_the_model_from_its_step_on(tmp_path: Path) -> None:
    arms = [
        BASELINE,
        ToldArm("null", [Told("")]),
        ToldArm("switch", [Told("go somewhere else", 2)]),
        ToldArm("back", [Told({Scene("walk", 0): "go far away", Scene("run", 1): "go"}), Told(None, 3)]),
    ]
    run = run_rollouts(tiny(MODEL), SUITE, 2, 0, TASKS, arms, tmp_path / "run", OPTIONS)
    plain, null, switch, back = (actions(run, arm.name) for arm in arms)
    assert not np.array_equal(null[:2], plain[:2])
    assert np.array_equal(switch[:2], plain[:2]) and not np.array_equal(switch[2:4], plain[2:4])
    # plans are made at 0, 2 and 4: what changes at 3 is heard at 4
    assert not np.array_equal(back[:2], plain[:2]) and not np.array_equal(back[2:4], plain[2:4])
    frame = {"pixels": {}, "state": np.zeros(1), "instruction": "go walk"}
    cell = Cell(0, "back", "walk", 0)
    assert [arms[3].observe(cell, step, frame)["instruction"] for step in (0, 2, 3, 5)] == ["go far away"] * 2 + [
        "go walk"
    ] * 2
    assert frame["instruction"] == "go walk"
    with pytest.raises(KeyError, match="episode 0 .* nobody says what it is told from env_step 0 on"):
        arms[3].observe(Cell(0, "back", "walk", 9), 0, frame)
    with pytest.raises(
        ValueError, match=r"arm 'a': what is told starts at different env_steps from 0 on, got \[0, 0\]"
    ):
        ToldArm("a", [Told("x"), Told("y")])
    with pytest.raises(ValueError, match="arm 'a' tells nothing"):
        ToldArm("a", [])


def test_donors_are_chosen_by_scene() -> None:
    scenes = [Scene(task, seed) for task in ("a", "b") for seed in (1, 2)]
    sources = [Source(10 + i, scene) for i, scene in enumerate(scenes)]
    assert list(same_scene(sources, scenes).values()) == [10, 11, 12, 13]
    assert list(cross_seed(sources, scenes).values()) == [11, 10, 13, 12]
    assert list(same_start(sources, scenes).values()) == [12, 13, 10, 11]
    assert list(cross_task(sources, scenes).values()) == [13, 12, 11, 10]
    with pytest.raises(ValueError, match="no donor of the same task from another seed for Scene"):
        cross_seed(sources[::2], scenes)


def test_arms_describe_and_pickle_and_say_what_is_missing(source, tmp_path: Path) -> None:
    recording, done = source
    found = sources_of(done.episodes)
    donors = same_scene(found, [each.scene for each in found])
    arm = InjectionArm("a", recording, Injection(sites(), "hold", tokens="language"), donors, [Told("")])
    described = describe_arms([arm])["a"]
    assert described["kind"] == "injection" and described["recording"] == {"what": "baseline"}
    assert described["donors"] == [["walk", 0, 0], ["walk", 1, 1], ["run", 2, 2], ["run", 3, 3]]
    assert described["injection"]["exhaustion"] == "hold" and described["told"] == [{"start": 0, "text": ""}]
    twin = cloudpickle.loads(cloudpickle.dumps(arm))
    assert describe_arms([twin]) == describe_arms([arm])
    rows = [Cell(0, "a", "walk", 0), Cell(1, "a", "walk", 7)]
    with pytest.raises(KeyError, match="arm 'a' has no donor for episode 1 .*task 'walk', seed 7"):
        arm.hooks(rows)
    elsewhere = InjectionArm("a", recording, Injection("vlm.hook_tokens", "hold"), donors)
    with pytest.raises(KeyError, match="no hook point matches 'vlm.hook_tokens'"):
        elsewhere.hooks(rows[:1])
    with pytest.raises(ValueError, match=r"arm 'a': donors \[99\] are not in the recording"):
        InjectionArm("a", recording, arm.injection, {Scene("walk", 0): 99}).describe()
    with pytest.raises(FileNotFoundError, match="not a recording"):
        InjectionArm("a", tmp_path, arm.injection, donors).describe()
    with pytest.raises(ValueError, match="arm 'a' has no donors"):
        InjectionArm("a", recording, arm.injection, {})


def test_donors_are_read_as_far_as_they_are_needed_and_no_further_than_fits(source) -> None:
    recording = ActivationRecording(source[0])
    site = "expert.blocks.0.hook_resid_post"
    every = load_donors(recording, [0, 2], [site], Injection(site, "error"), 10**9, "arm")
    assert set(every[0].held[site]) == {0, 2, 4} and len(every[2].held[site][0].value) == tiny(MODEL).n_denoise_steps
    some = load_donors(recording, [0], [site], Injection(site, "hold", denoise=1, env=range(2)), 10**9, "arm")
    # and the last, with which it would go on
    assert set(some[0].held[site]) == {0, 4} and some[0].held[site][0].steps == (1,)
    with pytest.raises(
        MemoryError, match=r"arm 'x': up to expert.blocks.0.hook_resid_post, .* more than max_bytes=1,000"
    ):
        load_donors(recording, [0], [site], Injection(site, "error"), 1000, "arm 'x'")
    kept = [name for name in recording.sites if name.startswith("vlm")]
    assert all(
        len(each.value) == 1
        for steps in load_donors(recording, [0], kept, Injection(kept, "error"), 10**9, "arm")[0].held.values()
        for each in steps.values()
    )
