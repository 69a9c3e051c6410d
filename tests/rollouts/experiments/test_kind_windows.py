"""E6: windows and switches act from their environment step on and not before; own values move nothing."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from injection_case import context, run

from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments import goals
from hooked_vla.rollouts.experiments.compare import read_runs
from hooked_vla.rollouts.experiments.kinds import windows as kind
from hooked_vla.rollouts.experiments.kinds.injection_runs import Recorded
from hooked_vla.rollouts.experiments.outcome import Verdict
from hooked_vla.rollouts.injection import sources_of
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.sweep import Rollouts, run_rollouts


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E6", tmp_path_factory.mktemp("e6") / "run", steps=8, windows=2, switches=[0, 4], max_steps=12)


def test_own_values_are_the_floor_and_others_are_not(done) -> None:
    table = done[1].main
    windows = table[table["kind"] == kind.INJECTED]
    assert windows["start"].tolist() == [0, 4] and windows["stop"].tolist() == [4, 8]
    assert (windows["no_op_floor"] == 0).all() and (windows["displacement"] > 0).all() and (windows["within"] > 0).all()
    # the control moves as well, and elsewhere
    noise = table[table["kind"] == kind.NOISE]
    assert (noise["within"] > 0).all() and (noise["within"].to_numpy() != windows["within"].to_numpy()).all()
    switches = table[table["kind"] == kind.SWITCH]
    assert switches["start"].tolist() == [0, 4] and (switches["displacement"] > 0).all()
    assert set(done[1].tables["success"]["arm"]) >= {"baseline", "rerun", "own values 0–3", "window 4–7", "switch at 4"}


def test_the_whole_expert_is_found_to_be_replay(done) -> None:
    made, outcome = done
    assert set(outcome.main[outcome.main["kind"] == kind.INJECTED]["label"]) == {"replay"}
    assert outcome.tables["reach"]["agrees"].all() and outcome.labels[0].startswith("replay (")
    assert "> **replay (" in (made.out / "report.md").read_text()


def test_told_its_donors_prompt_from_the_start_an_episode_ends_where_its_donor_does(done) -> None:
    """Ends are taken when the donor ends: what is done after that is not the donor's doing."""
    rows = {row["arm"]: row for row in done[1].main.to_dict("records")}
    assert rows["switch at 0"]["endpoint_share"] == 1
    assert 0 < rows["window 0–3"]["endpoint_share"] < 1


def test_nothing_changes_before_its_step(done) -> None:
    """Counted in forward calls, a window of 4 would be over in the first chunk, and one from 4 on would begin in it."""
    folder = done[0].out / "rollouts" / "main"
    episodes = read_episodes(folder).to_pandas()

    def of(arm: str, seed: int) -> np.ndarray:
        number = episodes[(episodes["arm"] == arm) & (episodes["seed"] == seed)]["episode"].iloc[0]
        return np.stack(read_steps(folder, [int(number)])["action"].to_pylist())

    for seed in episodes["seed"].unique():
        plain = of("baseline", seed)
        for arm, start in (("window 4–7", 4), ("switch at 4", 4), ("window 0–3", 0), ("switch at 0", 0)):
            changed = of(arm, seed)
            assert np.array_equal(changed[:start], plain[:start])
            assert not np.array_equal(changed[start : start + 4], plain[start : start + 4])
        # the donor's own actions come back in the window, in all of its steps
        theirs = done[0].out / "rollouts" / "source"
        source = read_episodes(theirs).to_pandas()
        number = int(source[source["seed"] == seed]["episode"].iloc[0])
        donor = np.stack(read_steps(theirs, [number])["action"].to_pylist())
        assert np.array_equal(of("window 0–3", seed)[:4], donor[:4])
        assert np.array_equal(of("window 4–7", seed)[4:8], donor[4:8])


def test_steps_between_plans_are_refused(tmp_path: Path) -> None:
    made = context("E6", tmp_path, steps=9, windows=3)
    with pytest.raises(ValueError, match=r"plans every 4 environment steps: .* but \[3\] do not"):
        made.definition.module.run(made, made.definition.settle(False))
    for wrong, message in (({"steps": 10}, "cannot be cut into 3"), ({"switches": [4, 0]}, "in ascending order")):
        with pytest.raises(ValueError, match=message):
            context("E6", tmp_path, **wrong)


def named(done: Rollouts, arm: str) -> Rollouts:
    """The sweep with another name of its only arm."""
    names = pa.array([arm] * done.episodes.num_rows)
    table = done.episodes.set_column(done.episodes.column_names.index("arm"), "arm", names)
    return replace(done, episodes=table)


def recorded(done: Rollouts, folder: Path) -> Recorded:
    return Recorded(folder, tuple(sources_of(done.episodes)), read_runs(done))


@pytest.fixture(scope="module")
def expert(tmp_path_factory) -> Rollouts:
    """The scripted expert as if it had been switched at 0: told another task than the scene's, it does that one."""
    folder = tmp_path_factory.mktemp("expert")
    done = run_rollouts("expert", "goal", 2, 700_000, ["red-orange", "green-cyan"], out=folder)
    return named(done, "switch at 0")


def test_a_goal_that_was_done_and_undone_counts(
    expert: Rollouts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The environment does not stop at the donor's goal, so the policy goes on: the block lies elsewhere at the end."""
    source = recorded(named(expert, "baseline"), tmp_path)
    setup = kind.Setup([], source, source, {each.scene: each.episode for each in source.sources})
    settings = kind.Settings(2)
    plain = goals.paths(expert)
    undone = {episode: [*path, (path[0][0], path[0][1])] for episode, path in plain.items()}
    assert not any(goals.placed(path[-1][1]) for path in undone.values())
    monkeypatch.setattr(goals, "paths", lambda _: undone)
    found = kind._other_goal(settings, setup, expert)
    assert list(found["switch at 0"].values()) == [1, 1]
    # as often as the donor itself succeeds
    assert source.runs.episodes["success"].tolist() == [True, True]
    runs = read_runs(expert)
    kind._check_zero(setup, runs, kind.Scored({}, found, {}))
    missed = {"switch at 0": dict.fromkeys(found["switch at 0"], 0.0)}
    with pytest.raises(RuntimeError, match="the donor succeeds, and the same actions do not do its goal"):
        kind._check_zero(setup, runs, kind.Scored({}, missed, {}))


def rows(late: float, goal: float, floor: float = 0.0, middle: float = 0.07) -> list[dict]:
    moved = [{"kind": what, "arm": f"{what} {i}", "start": i * 12, "stop": i * 12 + 12, "displacement": 1.0,
              "within": far, "no_op_floor": floor, "success": 0.5}
             for what in (kind.INJECTED, kind.NOISE) for i, far in enumerate((0.1, middle, late))]  # fmt: skip
    return moved + [{"kind": kind.SWITCH, "arm": f"switch at {step}", "start": step, "donors_goal": share,
                     "own_goal": 0.0, "n_begun": 12} for step, share in ((0, 1.0), (32, goal))]  # fmt: skip


def scored(late: float, goal: float, n: int = 12, middle: float = 0.07) -> kind.Scored:
    scenes = [Scene(str(i), i) for i in range(n)]
    within = {f"window {i}": dict.fromkeys(scenes, far) for i, far in enumerate((0.1, middle, late))}
    goals_done = {"switch at 0": dict.fromkeys(scenes, 1.0),
                  "switch at 32": {scene: float(i < goal * n) for i, scene in enumerate(scenes)}}  # fmt: skip
    return kind.Scored(within, goals_done, {})


def test_windows_are_judged_by_their_own_steps_in_order(tmp_path: Path) -> None:
    made = context("E6", tmp_path)

    def judge(late: float, **changes: float) -> Verdict:
        return kind._early_windows(made, rows(late, 0, **changes), scored(late, 0, **changes))

    assert judge(0.04).holds and "first ÷ last 2.50" in judge(0.04).measured
    # displacement over whole episodes is the same in all of them, and decides nothing
    assert judge(0.06).holds is False
    high = judge(0.04, middle=0.12)
    assert high.holds is False and "not less from each to the next" in high.measured


def test_switches_are_judged_by_goals_and_a_test(tmp_path: Path) -> None:
    made = context("E6", tmp_path)
    assert kind._early_switches(made, rows(0.1, 0.0), scored(0.1, 0.0)).holds
    assert kind._early_switches(made, rows(0.1, 0.75), scored(0.1, 0.75)).holds is False
    few = kind._early_switches(made, rows(0.1, 0.0), scored(0.1, 0.0, 4))
    assert few.holds is None and "too few episodes settle it (p = 0.12)" in few.measured
    unknown = rows(0.1, float("nan"))
    assert kind._early_switches(made, unknown, scored(0.1, 0.0)).holds is None
    assert kind._floors(made, rows(0.1, 0)).holds and not kind._floors(made, rows(0.1, 0, 1e-9)).holds


def test_an_episode_that_ended_before_its_switch_is_not_one_of_it(expert: Rollouts, tmp_path: Path) -> None:
    """The first of the two ends at a step at which the other still has its way to go."""
    settings = kind.Settings(2)
    rows = expert.episodes.to_pylist()
    steps = expert.episodes.column_names.index("n_steps")
    cut = expert.episodes.set_column(steps, "n_steps", pa.array([32, 33], pa.int32()))
    late = named(replace(expert, episodes=cut), "switch at 32")
    second = Scene(rows[1]["task"], rows[1]["seed"])
    assert list(kind._own_goal(settings, late)["switch at 32"]) == [second]
    source = recorded(named(expert, "baseline"), tmp_path)
    setup = kind.Setup([], source, source, {each.scene: each.episode for each in source.sources})
    assert list(kind._other_goal(settings, setup, late)["switch at 32"]) == [second]
    assert len(kind._own_goal(settings, named(late, "switch at 28"))["switch at 28"]) == 2


def test_windows_are_compared_in_the_episodes_that_last_through_all(tmp_path: Path) -> None:
    """What ends before the last window would make the first one look larger here."""
    made, all_of = context("E6", tmp_path), scored(0.04, 0)
    fast = {Scene(f"fast {i}", i): 9.0 for i in range(12)}
    some = {**all_of.within, "window 0": {**all_of.within["window 0"], **fast}}
    found = kind._early_windows(made, rows(0.04, 0), replace(all_of, within=some))
    assert found.holds and "in the 12 episodes" in found.measured and "first ÷ last 2.50" in found.measured
    none = {**all_of.within, "window 2": {}}
    assert kind._early_windows(made, rows(0.04, 0), replace(all_of, within=none)).holds is None
