"""The prompt battery as an experiment: what is run, how ends are told apart, and when a rule can be judged."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from hooked_vla.rollouts.experiments.definition import Definition, find_experiment
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.prompts import Settings
from hooked_vla.rollouts.experiments.kinds.prompts_goals import default_goals, goal_figures, placed_goals, told_another
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import get_suite


def small(**settings) -> Definition:
    """E1 with few of its kinds."""
    return replace(find_experiment("E1"), settings={"episodes": 1, **settings}, quick={})


def test_prompts_that_reach_the_model_are_run_and_those_that_do_not_are_named(tmp_path: Path) -> None:
    what = small(kinds=["upper_case", "wrong_target", "nonsense", "foreign"], max_steps=64)
    outcome = run_experiment(what, tmp_path, "smolvla-tabletop", options=Options(n_envs=3))
    main = outcome.main.set_index(["suite", "arm"])
    assert set(main.index) == {
        *(("object", arm) for arm in ("baseline", "nonsense", "rerun")),
        *(("goal", arm) for arm in ("baseline", "wrong_target", "nonsense", "rerun")),
    }
    assert main["success"].xs("baseline", level="arm").tolist() == [1, 1]
    reach = outcome.tables["reach"].set_index(["suite", "kind"])
    same = ("as another kind: not run", "nonsense")
    assert list(zip(reach["status"], reach["same_as"], strict=True)) == [
        ("unchanged: not run", ""), ("unchanged: not run", ""), ("changed", ""), same,
        ("unchanged: not run", ""), ("changed", ""), ("changed", ""), same,
    ]  # fmt: skip
    # one scene names one pad; capitals are lower case to the tokenizer; invented and German words are all unknown
    assert outcome.labels[0].startswith(
        "no token changed: upper_case (object), wrong_target (object), upper_case (goal)."
    )
    assert reach.loc[("goal", "nonsense"), "known"] == 0
    assert any("nonsense 100%, foreign 100% of the words" in note for note in outcome.notes)
    did = {row["arm"]: row for row in records(outcome.tables["goals"])}
    assert did["baseline"]["done"] == did["baseline"]["task"] == "red-orange"
    named = did["wrong_target"]
    assert named["named"] in ("red-purple", "red-cyan") and named["done"] == named["named"]
    assert named["told"] == f"put the red block on the {named['named'][4:]} pad"
    verdicts = {each.rule: each for each in outcome.verdicts}
    assert verdicts["named-goal"].holds is True and "1 of 1 episodes" in verdicts["named-goal"].measured
    moved = [row["displacement"] for row in records(outcome.main) if row["arm"] == "nonsense"]
    assert max(row["floor"] for row in records(outcome.main)) < 1e-4 < min(moved)
    for name in ("success", "named_goals", "default_goals"):
        assert (tmp_path / "figures" / f"{name}.png").stat().st_size > 5000


def test_nothing_is_judged_where_the_baseline_fails_and_a_run_that_is_there_is_read_again(tmp_path: Path) -> None:
    what, options = small(kinds=["null"], max_steps=4), Options(n_envs=2)
    outcome = run_experiment(what, tmp_path, "smolvla-tabletop", options=options)
    assert [each.holds for each in outcome.verdicts] == [None] * 4
    assert "the baseline succeeds in 0% of object: a floor effect" in outcome.verdicts[0].measured
    again = run_experiment(what, tmp_path, "smolvla-tabletop", options=options)
    pd.testing.assert_frame_equal(again.main, outcome.main)
    assert again.verdicts == outcome.verdicts and again.notes == outcome.notes


def test_a_model_without_language_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="act-tabletop reads no text"):
        run_experiment(small(kinds=["null"], max_steps=4), tmp_path, "act-tabletop")
    with pytest.raises(ValueError, match=r"unknown kinds \['rude'\] of prompts"):
        Settings(1, kinds=("rude",))


def poses(**blocks: tuple[float, float, float]) -> list[tuple[str, list[float]]]:
    lying = [(f"blocks/{name}", [*place, 1, 0, 0, 0]) for name, place in blocks.items()]
    return [*lying, ("pads/orange", [-0.2, 0.2]), ("pads/cyan", [0.2, 0.2])]


def test_a_goal_holds_where_a_block_lies_on_a_pad() -> None:
    aside = (0.0, -0.1, 0.026)
    assert placed_goals(poses(red=(-0.21, 0.19, 0.026), blue=aside)) == ["red-orange"]
    # beside the pad; held above it
    assert placed_goals(poses(red=(-0.15, 0.2, 0.026), blue=(-0.2, 0.2, 0.10))) == []
    assert placed_goals(poses(red=(-0.2, 0.2, 0.026), blue=(0.2, 0.2, 0.026))) == ["red-orange", "blue-cyan"]


def test_the_places_are_the_environments_own_measure_of_success() -> None:
    env = get_suite("goal").make("red-cyan", ("top",), 16)
    env.reset(seed=3)
    for x in (0.15, 0.156, 0.2, 0.244, 0.25):
        env.unwrapped.set_block("red", (x, 0.2, 0.026))  # pyright: ignore[reportAttributeAccessIssue]
        info = env.unwrapped._info()  # pyright: ignore[reportAttributeAccessIssue]
        flat = [(f"{kind}/{name}", place) for kind, each in info["poses"].items() for name, place in each.items()]
        assert ("red-cyan" in placed_goals(flat)) == info["is_success"], x
    env.close()


def did() -> pd.DataFrame:
    rows = [("null", task, "", done) for task, done in
            zip(["a", "a", "a", "b"], ["blue-cyan", "blue-cyan", "several", "nothing"], strict=True)]  # fmt: skip
    rows += [("other_task", "a", "b", "b"), ("other_task", "b", "b", "b"), ("wrong_object", "b", "", "b")]
    return pd.DataFrame([(*row[:2], 0, "", *row[2:]) for row in rows],
                        columns=["arm", "task", "seed", "told", "named", "done"])  # fmt: skip


def test_defaults_are_the_commonest_goals_by_kind_and_task() -> None:
    found = default_goals(did()).set_index(["kind", "task"])
    assert list(found.index) == [("null", "all"), ("null", "a"), ("null", "b")]
    assert found.loc[("null", "all"), ["n", "default", "share", "none"]].tolist() == [4, "blue-cyan", 0.5, 0.25]
    assert found.loc[("null", "b"), ["default", "share", "none"]].tolist() == ["nothing", 0, 1]


def test_only_prompts_that_name_another_task_are_asked_whether_it_was_done() -> None:
    assert [(row["arm"], row["task"], row["named"]) for row in told_another(did())] == [("other_task", "a", "b")]
    figure, _ = goal_figures(did())["default_goals"]
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == ["a", "b", "blue-cyan", "several", "nothing"]


def test_the_shipped_definition_asks_for_all_kinds_and_enough_episodes() -> None:
    settings = find_experiment("E1").settle(False)
    assert settings.kinds == () and settings.episodes >= 30
    assert {each.id for each in find_experiment("E1").rules} == {
        "unique-drop", "shared-chance", "default-goal", "named-goal",
    }  # fmt: skip
