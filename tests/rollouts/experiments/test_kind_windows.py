"""E6: windows and switches act from their environment step on and not before; own values move nothing."""

from pathlib import Path

import numpy as np
import pytest
from injection_case import context, run

from hooked_vla.rollouts.experiments.kinds import windows as kind
from hooked_vla.rollouts.records import read_episodes, read_steps


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E6", tmp_path_factory.mktemp("e6") / "run", steps=8, windows=2, switches=[0, 4], max_steps=12)


def test_own_values_are_the_floor_and_others_are_not(done) -> None:
    table = done[1].main
    windows = table[table["kind"] == kind.INJECTED]
    assert windows["start"].tolist() == [0, 4] and windows["stop"].tolist() == [4, 8]
    assert (windows["no_op_floor"] == 0).all() and (windows["displacement"] > 0).all() and (windows["within"] > 0).all()
    switches = table[table["kind"] == kind.SWITCH]
    assert switches["start"].tolist() == [0, 4] and (switches["displacement"] > 0).all()
    assert set(done[1].tables["success"]["arm"]) >= {"baseline", "rerun", "own values 0–3", "window 4–7", "switch at 4"}


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


def test_rules_are_judged_from_the_table(tmp_path: Path) -> None:
    made = context("E6", tmp_path)

    def rows(late: float, goal: float, floor: float = 0.0) -> list[dict]:
        moved = [{"kind": kind.INJECTED, "start": i * 12, "stop": i * 12 + 12, "displacement": far, "within": far,
                  "no_op_floor": floor, "success": 0.5} for i, far in enumerate((0.1, 0.07, late))]  # fmt: skip
        return moved + [{"kind": kind.SWITCH, "start": step, "donors_goal": share, "success": 0.0}
                        for step, share in ((0, 0.9), (32, goal))]  # fmt: skip

    assert kind._early_windows(made, rows(0.04, 0)).holds and not kind._early_windows(made, rows(0.06, 0)).holds
    assert "first ÷ last 2.50" in kind._early_windows(made, rows(0.04, 0)).measured
    assert kind._early_switches(made, rows(0.1, 0.1)).holds and not kind._early_switches(made, rows(0.1, 0.6)).holds
    assert kind._early_switches(made, rows(0.1, float("nan"))).holds is None
    assert kind._floors(made, rows(0.1, 0)).holds and not kind._floors(made, rows(0.1, 0, 1e-9)).holds
