"""E4: a cut set ends where its source ends, and with the object moved goes to its old place."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from injection_case import context, run

from hooked_vla.rollouts.experiments.kinds import injection_tasks as kind
from hooked_vla.rollouts.experiments.kinds.injection_moved import can_move, grasp_step, moved_suite
from hooked_vla.rollouts.experiments.kinds.injection_runs import turned_tasks
from hooked_vla.rollouts.tabletop import TabletopEnv


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    injected = ["vlm:middle", "expert", "adapter"]
    return run("E4", tmp_path_factory.mktemp("e4") / "run", injected=injected, max_steps=24)


def test_replay_ends_where_its_source_ends(done) -> None:
    made, outcome = done
    rows = {row["arm"]: row for row in outcome.main.to_dict("records")}
    assert list(rows) == ["baseline", "rerun", kind.SOURCE_PROMPT, "vlm:middle", "expert"]
    assert rows["expert"]["label"] == "replay" and rows["vlm:middle"]["label"] == "open"
    for arm in ("expert", kind.SOURCE_PROMPT):
        assert rows[arm]["to_source"] == 0 and rows[arm]["endpoint_share"] == 1
        assert rows[arm]["cos_src"] == pytest.approx(1, abs=1e-6) and rows[arm]["source"] == 1
    assert rows["baseline"]["to_destination"] == 0 and rows["baseline"]["to_source"] > 0.01
    assert rows["rerun"]["to_destination"] < 1e-5
    assert any("adapter was not run" in note for note in outcome.notes)
    assert all(verdict.holds is None for verdict in outcome.verdicts)


def test_with_the_object_moved_replay_goes_to_its_old_place(done) -> None:
    moved = done[1].tables["moved_object"]
    assert len(moved), "no source grasps within the steps of this test"
    by_arm = {arm: part for arm, part in moved.groupby("arm")}
    assert by_arm["expert"]["at_old_place"].all() and (by_arm["expert"]["to_old"] < 0.03).all()
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


def test_the_step_of_the_grasp_is_the_first_that_holds() -> None:
    states = np.zeros((5, 4))
    assert grasp_step(states) is None
    states[3:, 3] = 1
    assert grasp_step(states) == 3


def test_rules_are_judged_from_the_tables(tmp_path: Path) -> None:
    made, settings = context("E4", tmp_path), kind.Settings(2, ("expert",))
    rows = [{"arm": arm, "ends_at_source": arm != "baseline", "to_source": 0.0, "to_destination": 0.2, "success": own,
             "follows_source": True, "three_way": "source"}
            for arm, own in (("baseline", True), (kind.SOURCE_PROMPT, False), ("expert", False))]  # fmt: skip
    each = pd.DataFrame(rows)
    assert kind._ends_at_source(made, settings, each).holds and kind._fails(made, settings, each).holds
    other = pd.DataFrame([{**row, "ends_at_source": False, "success": True} for row in rows])
    assert not kind._ends_at_source(made, settings, other).holds and not kind._fails(made, settings, other).holds
    assert kind._goes_to_the_old_place(made, settings, None).holds is None
    with pytest.raises(ValueError, match="judged 'expert' is not injected"):
        kind.Settings(2, ("vlm",))
