"""The prompt battery as an experiment: what is run, how ends are told apart, and when a rule can be judged."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from report_numbers import unknown_numbers

from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import Definition, find_experiment
from hooked_vla.rollouts.experiments.goals import goals_reached
from hooked_vla.rollouts.experiments.kinds import prompts as kind
from hooked_vla.rollouts.experiments.kinds import prompts_goals as kind_goals
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.prompts import Settings
from hooked_vla.rollouts.experiments.kinds.prompts_goals import default_goals, goal_figures, goals_told, told_another
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import Rollouts


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
    assert did["baseline"]["done"] == did["baseline"]["own"] == "red-orange"
    named = did["wrong_target"]
    assert named["named"] in ("red-purple", "red-cyan") and named["done"] == named["named"]
    assert named["told"] == f"put the red block on the {named['named'][4:]} pad"
    verdicts = {each.rule: each for each in outcome.verdicts}
    # one task has no interval, and decides nothing
    assert verdicts["named-goal"].holds is None and "1 of 1 episodes" in verdicts["named-goal"].measured
    assert unknown_numbers(tmp_path, what) == []
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


def told(arm: str) -> Any:
    """An episode of the task red-orange, as far as its table goes."""
    one = {"episode": 0, "suite": "goal", "arm": arm, "task": "red-orange", "seed": 3,
           "instruction": "put the red block on the orange pad"}  # fmt: skip
    rollouts = object.__new__(Rollouts)
    object.__setattr__(rollouts, "episodes", pa.Table.from_pylist([one]))
    return rollouts


def path(*heights: float) -> list[tuple[list[float], dict[str, list[float]]]]:
    pads = {"pads/orange": [-0.2, 0.2], "pads/cyan": [0.2, 0.2]}
    return [([0, 0, 0.1, float(z > 0.05)], {"blocks/red": [0.2, 0.2, z, 1, 0, 0, 0], **pads}) for z in heights]


def test_a_goal_that_was_done_and_undone_counts_as_done(monkeypatch: pytest.MonkeyPatch) -> None:
    # red lies on cyan at the second step, and is taken up again
    monkeypatch.setattr(kind_goals, "goals_done", lambda rollouts: {0: goals_reached(path(0.1, 0.026, 0.1))})
    (row,) = records(goals_told(told("null"), "goal"))
    assert (row["done"], row["goals"], row["own"], row["named"]) == ("red-cyan", "red-cyan", "red-orange", "")
    # carried over the pad, but never let go
    monkeypatch.setattr(kind_goals, "goals_done", lambda rollouts: {0: goals_reached(path(0.1, 0.1))})
    (row,) = records(goals_told(told("upper_case"), "goal"))
    assert (row["done"], row["goals"], row["named"]) == ("nothing", "", "red-orange")


def did() -> pd.DataFrame:
    rows = [("null", task, "", done) for task, done in
            zip(["a", "a", "a", "b"], ["blue-cyan", "blue-cyan", "a", "nothing"], strict=True)]  # fmt: skip
    rows += [("other_task", "a", "b", "b"), ("other_task", "b", "b", "b"), ("wrong_object", "b", "", "b")]
    return pd.DataFrame(
        [(arm, task, 0, "", task, named, done, done.replace("nothing", "")) for arm, task, named, done in rows],
        columns=["arm", "task", "seed", "told", "own", "named", "done", "goals"],
    )


def test_defaults_are_the_commonest_goals_by_kind_and_task() -> None:
    found = default_goals(did()).set_index(["kind", "task"])
    assert list(found.index) == [(each, task) for each in ("null", "all") for task in ("all", "a", "b")]
    assert found.loc[("null", "all"), ["n", "default", "share", "none"]].tolist() == [4, "blue-cyan", 0.5, 0.25]
    assert found.loc[("all", "a"), ["n", "default", "share"]].tolist() == [3, "blue-cyan", 2 / 3]
    assert found.loc[("null", "b"), ["default", "share", "none"]].tolist() == ["nothing", 0, 1]


def test_only_prompts_that_name_another_goal_are_asked_whether_it_was_done() -> None:
    assert [(row["arm"], row["task"], row["named"]) for row in told_another(did())] == [("other_task", "a", "b")]
    figure, _ = goal_figures(did())["default_goals"]
    shown = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert shown == ["a", "b", "blue-cyan", "nothing"]


def judge(tmp_path: Path, wins: int, n: int) -> kind.Verdict:
    """shared-chance, of one kind without a goal in the suite of twelve tasks."""
    context = Context(find_experiment("E1"), ModelSource("smolvla-tabletop"), tmp_path)
    table = pd.DataFrame([
        {"suite": "goal", "arm": "baseline", "effect": "", "success": 1.0, "n": n},
        {"suite": "goal", "arm": "null", "effect": "no goal", "success": wins / n, "n": n},
    ])  # fmt: skip
    return kind._shared_chance(context, table, "goal")


@pytest.mark.parametrize(
    ("wins", "n", "holds"), [(0, 36, None), (0, 252, False), (3, 36, True), (20, 252, True), (18, 36, False)]
)
def test_never_is_not_one_in_twelve(tmp_path: Path, wins: int, n: int, holds: bool | None) -> None:
    verdict = judge(tmp_path, wins, n)
    assert verdict.holds is holds and f"{wins} of {n} episodes" in verdict.measured


def test_a_default_is_of_each_task_and_not_of_all(tmp_path: Path) -> None:
    """Every task has a default of its own, so that no goal is common over all tasks."""
    context = Context(find_experiment("E1"), ModelSource("smolvla-tabletop"), tmp_path)
    table = pd.DataFrame([{"suite": "goal", "arm": "baseline", "effect": "", "success": 1.0}])
    one = did().iloc[[0]]
    rows = [one.assign(task=f"t{i}", own=f"t{i}", done=f"g{i}", goals=f"g{i}") for i in range(8) for _ in range(3)]
    verdict = kind._default_goal(context, table, default_goals(pd.concat(rows)), "goal")
    assert verdict.holds is True and "Over all tasks the commonest, g0, is done in 12%" in verdict.measured


def test_the_shipped_definition_asks_for_all_kinds_and_enough_episodes() -> None:
    settings = find_experiment("E1").settle(False)
    assert settings.kinds == () and settings.episodes >= 30
    assert {each.id for each in find_experiment("E1").rules} == {
        "unique-drop", "shared-chance", "default-goal", "named-goal",
    }  # fmt: skip
