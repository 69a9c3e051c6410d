"""Goals that an episode did are found at any of its steps, by the environment's own measure."""

from dataclasses import replace
from pathlib import Path

import pytest

from hooked_vla.rollouts.experiments import goals as kind
from hooked_vla.rollouts.experiments.goals import goal_of, goals_done, goals_reached, paths, placed
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import Rollouts, run_rollouts

FREE, HOLDING = [0.0, 0.0, 0.2, 0.0], [0.0, 0.0, 0.2, 1.0]
ASIDE, ON, OTHER = (0.0, -0.1, 0.026), (-0.2, 0.2, 0.026), (0.2, 0.2, 0.026)


def poses(red: tuple[float, ...], blue: tuple[float, ...] = ASIDE) -> dict[str, list[float]]:
    blocks = {f"blocks/{name}": [*place, 1, 0, 0, 0] for name, place in (("red", red), ("blue", blue))}
    return {**blocks, "pads/orange": [-0.2, 0.2], "pads/cyan": [0.2, 0.2]}


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> Rollouts:
    return run_rollouts("expert", "goal", 2, 700_000, ["red-orange", "green-cyan"], out=tmp_path_factory.mktemp("e"))


def test_a_goal_that_is_undone_was_done() -> None:
    path = [(FREE, poses(ASIDE)), (HOLDING, poses(ON)), (FREE, poses(ON)), (HOLDING, poses(ON)), (FREE, poses(ASIDE))]
    assert goals_reached(path) == {"red-orange": 2}
    assert placed(path[-1][1]) == []


def test_a_block_that_is_held_over_its_pad_is_not_placed() -> None:
    assert goals_reached([(FREE, poses(ASIDE)), (HOLDING, poses(ON)), (FREE, poses(ASIDE))]) == {}
    high = (ON[0], ON[1], 0.10)
    assert goals_reached([(FREE, poses(high))]) == {}


def test_goals_come_in_the_order_in_which_they_are_done() -> None:
    path = [(FREE, poses(ASIDE, OTHER)), (FREE, poses(ON, OTHER)), (FREE, poses(OTHER, ASIDE))]
    assert list(goals_reached(path).items()) == [("blue-cyan", 0), ("red-orange", 1), ("red-cyan", 2)]


def test_the_measure_is_the_environments_own() -> None:
    env = get_suite("goal").make("red-cyan", ("top",), 16)
    env.reset(seed=3)
    for x in (0.15, 0.156, 0.2, 0.244, 0.25):
        env.unwrapped.set_block("red", (x, 0.2, 0.026))  # pyright: ignore[reportAttributeAccessIssue]
        info = env.unwrapped._info()  # pyright: ignore[reportAttributeAccessIssue]
        flat = {f"{what}/{name}": place for what, each in info["poses"].items() for name, place in each.items()}
        assert ("red-cyan" in goals_reached([(FREE, flat)])) == info["is_success"], x
    env.close()


def test_the_scripted_expert_does_its_task_at_its_last_step(expert: Rollouts) -> None:
    done = goals_done(expert)
    for row in expert.episodes.to_pylist():
        assert row["success"] and done[row["episode"]] == {goal_of("goal", row["task"]): row["n_steps"]}
    assert goal_of("object", "red") == "red-purple"
    with pytest.raises(ValueError, match="unknown task 'red-grey'"):
        goal_of("goal", "red-grey")


def test_what_was_not_kept_or_recorded_is_not_made_up(expert: Rollouts, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="were not kept"):
        goals_done(replace(expert, folder=None))
    blind = {episode: [(state, {}) for state, _ in path] for episode, path in paths(expert).items()}
    monkeypatch.setattr(kind, "paths", lambda _: blind)
    assert goals_done(expert) == {}


def test_paths_have_every_step_and_what_the_last_action_led_to(expert: Rollouts, tmp_path: Path) -> None:
    found = paths(expert)
    for row in expert.episodes.to_pylist():
        path = found[row["episode"]]
        assert len(path) == row["n_steps"] + 1 and path[-1][0] == row["final_state"]
