"""Episodes beside their sources: ends are taken when the source ends, and donors are told apart arm by arm."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vla.interventions.injection_reach import CUT_SET, DEAD_END, OPEN, REPLAY, Reach
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import Runs, layout_of
from hooked_vla.rollouts.experiments.kinds.injection_runs import Recorded, badges, overrides, reach_row
from hooked_vla.rollouts.injection import Source

SCENE = Scene("red-orange", 0)
LAYOUT = layout_of("goal")


def states(*x: float) -> np.ndarray:
    found = np.zeros((len(x), 4), np.float32)
    found[:, 0] = x
    return found


def runs(**paths: np.ndarray) -> Runs:
    """One episode of each arm, of the same scene."""
    table = pd.DataFrame([
        {"episode": i, "suite": "goal", "arm": arm, "task": SCENE.task, "seed": SCENE.seed, "success": False}
        for i, arm in enumerate(paths)
    ])  # fmt: skip
    actions = [np.ones((len(path) - 1, 4), np.float32) for path in paths.values()]
    return Runs(table, list(paths.values()), actions, [np.arange(len(each)) for each in actions])


def recorded(path: np.ndarray) -> Recorded:
    return Recorded(Path("recording"), (Source(0, SCENE),), runs(baseline=path))


def plainly(actions: np.ndarray) -> torch.Tensor:
    return torch.as_tensor(actions)


def test_what_comes_after_the_sources_end_does_not_count() -> None:
    """An episode that does as its source did, and goes on, has ended where the source ended."""
    source = recorded(states(0.0, 0.1, 0.2))
    main = runs(baseline=states(0.0, -0.1, -0.2, -0.3), replay=states(0.0, 0.1, 0.2, 0.1, 0.0, -0.1, -0.2, -0.3))
    found = overrides(main, dict.fromkeys(("baseline", "replay"), (source, {SCENE: 0})), LAYOUT, plainly)
    shares = dict(zip(found["arm"], found["endpoint_share"], strict=True))
    assert shares == {"baseline": 0, "replay": 1}
    # the episode without injection is taken at the same step too
    assert found["to_destination"].tolist() == pytest.approx([0.0, 0.4])


def test_every_arm_is_set_against_its_own_source() -> None:
    near, far = recorded(states(0.0, 0.1, 0.2)), recorded(states(0.0, 0.3, 0.6))
    main = runs(baseline=states(0.0, 0.0, 0.0), a=states(0.0, 0.1, 0.2), b=states(0.0, 0.1, 0.2))
    donors = {"b": (far, {SCENE: 0}), "baseline": (near, {SCENE: 0}), "a": (near, {SCENE: 0})}
    found = overrides(main, donors, LAYOUT, plainly)
    assert found["arm"].tolist() == ["b", "baseline", "a"]
    assert found["to_source"].tolist() == pytest.approx([0.4, 0.2, 0.0])


@pytest.mark.parametrize(
    ("replays", "inert", "cuts", "label"),
    [(True, False, True, REPLAY), (True, False, None, REPLAY), (True, False, False, CUT_SET),
     (False, True, False, DEAD_END), (False, False, True, OPEN)],
)  # fmt: skip
def test_replay_needs_the_prompt_to_be_cut_too(replays: bool, inert: bool, cuts: bool | None, label: str) -> None:
    row = reach_row(Reach("all", False, replays, inert, cuts))
    assert row["label"] == label and row["cuts_prompt"] == bool(cuts)
    said = badges([("x", label), ("y", OPEN)])
    assert [each.split(" (")[0] for each in said] == ([] if label == OPEN else [label])
    assert all(each.endswith(": x") for each in said)
