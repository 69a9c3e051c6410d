"""E4: a cut set ends where its source ends, and with the object moved goes to its old place."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from injection_case import context, run

from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.kinds import injection_tasks as kind
from hooked_vla.rollouts.experiments.kinds.injection_moved import can_move, grasp_step, moved_suite, place_at_grasp
from hooked_vla.rollouts.experiments.kinds.injection_runs import Recorded, turned_tasks
from hooked_vla.rollouts.injection import InjectionArm, Source
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.tabletop import TabletopEnv


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    changes = {"injected": ["vlm:middle", "expert", "adapter"], "controls": ["expert"], "cross_prompt": ["vlm:middle"]}
    return run("E4", tmp_path_factory.mktemp("e4") / "run", max_steps=24, cross_seed=False, **changes)


def test_replay_ends_where_its_source_ends(done) -> None:
    made, outcome = done
    rows = {row["arm"]: row for row in outcome.main.to_dict("records")}
    assert list(rows) == [
        "baseline", "rerun", kind.SOURCE_PROMPT, "vlm:middle", "expert", "noise: expert", "source prompt: vlm:middle",
        "same scene: expert",
    ]  # fmt: skip
    assert rows["expert"]["label"] == "replay" and rows["vlm:middle"]["label"] == "open"
    for arm in ("expert", kind.SOURCE_PROMPT):
        assert rows[arm]["to_source"] == 0 and rows[arm]["endpoint_share"] == 1
        assert rows[arm]["cos_src"] == pytest.approx(1, abs=1e-6) and rows[arm]["source"] == 1
    assert rows["baseline"]["to_destination"] == 0 and rows["baseline"]["to_source"] > 0.01
    assert rows["rerun"]["to_destination"] < 1e-5
    # the own run's values change nothing; noise as large as the donor's does not end where the donor does
    assert rows["same scene: expert"]["displacement"] == 0 and rows["same scene: expert"]["to_source"] == 0
    assert rows["noise: expert"]["displacement"] > 0 and rows["noise: expert"]["endpoint_share"] < 1
    # told the source's prompt, its own values change nothing either
    assert rows["source prompt: vlm:middle"]["to_source"] == 0 < rows["vlm:middle"]["to_source"]
    assert any("Without a control of noise: vlm:middle" in note for note in outcome.notes)
    assert any("adapter was not run" in note for note in outcome.notes)
    assert all(verdict.holds is None for verdict in outcome.verdicts)


def test_what_cuts_the_prompt_is_said_to(done) -> None:
    reach = done[1].tables["reach"]
    cut = [row["injected"] for row in reach.to_dict("records") if row["cuts_prompt"] and row["label"] == "open"]
    said = [label for label in done[1].labels if label.startswith("prompt cut (")]
    assert [label.partition("): ")[2].split(", ") for label in said] == ([cut] if cut else [])
    opened = pd.DataFrame([{"injected": "vlm", "label": "open", "cuts_prompt": True},
                           {"injected": "expert", "label": "replay", "cuts_prompt": True}])  # fmt: skip
    assert [label for label in kind._labels(opened) if "prompt cut" in label and label.endswith(": vlm")]
    shown = done[1].main.set_index("arm")["cuts_prompt"]
    assert bool(shown["expert"]) and not bool(shown["baseline"])


def test_with_the_object_moved_replay_goes_to_its_old_place(done) -> None:
    moved = done[1].tables["moved_object"]
    assert len(moved), "no source grasps within the steps of this test"
    by_arm = {arm: part for arm, part in moved.groupby("arm")}
    assert by_arm["expert"]["at_old_place"].all() and (by_arm["expert"]["to_old"] < 0.037).all()
    assert not by_arm[kind.SOURCE_PROMPT]["at_old_place"].any()


def test_moving_changes_one_block_and_what_it_trades_places_with() -> None:
    suites = (moved_suite("goal"), moved_suite("goal", {"red-orange": "blue"}))
    env, moved = (suite.make("red-orange", ("top",), 32) for suite in suites)
    plain = TabletopEnv("goal", "red-orange", 32, ("top",))
    try:
        places = [{name: pose[:2] for name, pose in each.reset(seed=5)[1]["poses"]["blocks"].items()}
                  for each in (plain, env, moved)]  # fmt: skip
        assert np.allclose(places[1]["red"], places[0]["green"]) and np.allclose(places[1]["green"], places[0]["red"])
        assert np.allclose(places[2]["blue"], places[0]["yellow"]) and np.allclose(places[2]["red"], places[0]["red"])
        first, second = (each.reset(seed=5)[0] for each in (plain, env))
        assert np.array_equal(first["state"], second["state"])
        assert not np.array_equal(first["pixels"]["top"], second["pixels"]["top"])
    finally:
        for each in (plain, env, moved):
            each.close()


def test_a_lone_block_goes_to_another_place_for_blocks() -> None:
    env = moved_suite("object").make("red", ("top",), 32)
    plain = TabletopEnv("object", "red", 32, ("top",))
    try:
        old, new = (each.reset(seed=5)[1]["poses"]["blocks"]["red"][:2] for each in (plain, env))
        assert np.linalg.norm(old - new) > 0.15
    finally:
        env.close()
        plain.close()


def test_only_the_tabletops_objects_can_be_moved() -> None:
    assert can_move("goal") and not can_move("libero_goal")
    with pytest.raises(ValueError, match="objects of the suite 'libero_goal' cannot be moved"):
        moved_suite("libero_goal")


def test_sources_have_another_task_at_every_place() -> None:
    turned = turned_tasks("goal", 4)
    assert turned[0] == "green-purple" and sorted(turned) == sorted(turned_tasks("goal", 1))
    with pytest.raises(ValueError, match="every one of the 12 tasks of 'goal' its own place"):
        turned_tasks("goal", 12)


def test_at_the_old_place_is_over_it_and_not_merely_nearer_to_it() -> None:
    states = np.zeros((3, 4))
    states[1:, 3] = 1
    old, new = np.array([0.0, 0.0]), np.array([0.4, 0.0])
    for x, at in ((0.0, True), (0.025, True), (0.027, False), (0.1, False)):
        here = np.zeros((3, 4))
        here[:, 0] = x
        runs = Runs(pd.DataFrame({"arm": ["a"]}), [here], [here[:2]], [np.zeros(2)])
        found = place_at_grasp(runs, 0, states, old, new)
        assert found is not None and found["at_old_place"] is at and found["to_old"] == pytest.approx(x)
    assert place_at_grasp(runs, 0, np.zeros((3, 4)), old, new) is None


def test_the_step_of_the_grasp_is_the_first_that_holds() -> None:
    states = np.zeros((5, 4))
    assert grasp_step(states) is None
    states[3:, 3] = 1
    assert grasp_step(states) == 3


def judged(ends: bool, success: float, n: int = 12) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Episodes, and their comparison, in which the injection does so, and its noise nothing."""
    arms = {"baseline": (False, 1.0), kind.SOURCE_PROMPT: (True, 0.0), "expert": (ends, success),
            "noise: expert": (False, 1.0)}  # fmt: skip
    rows = [{"arm": arm, "task": str(seed), "seed": seed, "ends_at_source": end, "to_source": 0.0,
             "to_destination": 0.2, "follows_source": True, "three_way": "source"}
            for arm, (end, _) in arms.items() for seed in range(n)]  # fmt: skip
    compared = [{"arm": arm, "success": each, "success_low": 0.0, "success_high": 1.0, "holm_p": 0.5 ** (n - 1)}
                for arm, (_, each) in arms.items()]  # fmt: skip
    return pd.DataFrame(rows), pd.DataFrame(compared)


def test_rules_are_judged_from_the_tables_and_by_a_test(tmp_path: Path) -> None:
    made, settings = context("E4", tmp_path), kind.Settings(2, ("expert",))
    each, compared = judged(True, 0.0)
    ends = kind._ends_at_source(made, settings, each)
    assert ends.holds and "controls: noise: expert 0%, baseline 0%" in ends.measured
    assert kind._fails(made, settings, compared).holds
    each, compared = judged(False, 1.0)
    assert kind._ends_at_source(made, settings, each).holds is False
    assert kind._fails(made, settings, compared).holds is False
    each, compared = judged(True, 0.0, 4)
    assert kind._ends_at_source(made, settings, each).holds is None
    assert kind._fails(made, settings, compared).holds is None
    assert kind._goes_to_the_old_place(made, settings, None).holds is None
    with pytest.raises(ValueError, match="judged 'expert' is not injected"):
        kind.Settings(2, ("vlm",))


def test_a_donor_of_another_seed_gives_its_noise_too(tmp_path: Path) -> None:
    made = context("E4", tmp_path, episodes=13, injected=["expert"], max_steps=4)
    settings = made.definition.settle(False)
    scenes = [Scene("a", 0), Scene("b", 1), Scene("a", 2), Scene("b", 3)]
    sources = tuple(Source(i, scene) for i, scene in enumerate(scenes))
    empty = Runs(pd.DataFrame({"arm": []}), [], [], [])
    own = Recorded(tmp_path / "own", sources, empty)
    tasks = [task.id for task in get_suite("goal").tasks][:2]
    turned = tuple(Source(i, Scene(tasks[i % 2], scene.seed)) for i, scene in enumerate(scenes))
    source = Recorded(tmp_path / "source", turned, empty)
    setup = kind.Setup(
        {"expert": ["expert.blocks.3.hook_resid_post"]}, source, {scene: i for i, scene in enumerate(scenes)}, own
    )
    planned = {each.arm.name: each for each in kind.plan(made, settings, setup)}
    crossed = planned["cross seed: expert"]
    assert crossed.source is own and crossed.donors == {scenes[0]: 2, scenes[1]: 3, scenes[2]: 0, scenes[3]: 1}
    assert isinstance(crossed.arm, InjectionArm) and crossed.arm.injection.sites == (
        "expert.blocks.3.hook_resid_post",
        "expert.hook_noisy_actions",
    )
    assert planned["same scene: expert"].donors == {scene: i for i, scene in enumerate(scenes)}
