"""The tabletop with an object moved: everything as it was, but the block that the task means stands elsewhere.

Whoever goes to where the block is, goes elsewhere; whoever replays an episode goes to its old place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.sweep import Rollouts
from hooked_vla.rollouts.tabletop import scene
from hooked_vla.rollouts.tabletop.env import TabletopEnv
from hooked_vla.rollouts.tabletop.tasks import TASKS, find_task

# where the tabletop's state says that the cup holds a block
_HOLDS = 3
# metres along x and y: the cup is over where the block stood
AT = scene.BLOCK_HALF


class MovedEnv(TabletopEnv):
    """The tabletop, in which a block trades places with another after the start is drawn; where there is no other, it
    goes to the place for blocks that is farthest away. moved: the block; None: the task's own."""

    def __init__(self, *args: Any, moved: str | None = None, **keywords: Any) -> None:
        super().__init__(*args, **keywords)
        self.moved = moved

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As the tabletop's; the cup starts where it would without the move."""
        super().reset(seed=seed, options=options)
        moved = self.moved or self.task.block
        here = self.data.body(moved).xpos.copy()
        blocks = self.task.blocks
        other = blocks[(blocks.index(moved) + 1) % len(blocks)]
        if other != moved:
            there = self.data.body(other).xpos.copy()
            self.set_block(other, here.tolist())
        else:
            slot = max(self.task.slots, key=lambda place: np.linalg.norm(np.array(place) - here[:2]))
            there = np.array([*slot, scene.BLOCK_HALF])
        self.set_block(moved, there.tolist())
        return self._observe(), self._info()


def can_move(suite: str) -> bool:
    """Whether objects of the suite can be moved: those of the tabletop can."""
    return suite in TASKS


def moved_suite(suite: str, moved: Mapping[str, str] | None = None) -> Suite:
    """A suite of the tabletop with an object moved, named "SUITE-moved".

    moved: task -> the block that is moved; None: each task's own.
    Raises ValueError for suites of other simulators.
    """
    if not can_move(suite):
        raise ValueError(f"objects of the suite {suite!r} cannot be moved: only those of {list(TASKS)} can")
    return replace(get_suite(suite), name=f"{suite}-moved", make=partial(_make, suite, dict(moved or {})), expert=None)


def block_of(suite: str, task: str) -> str:
    """The block that a task of the tabletop means."""
    return find_task(suite, task).block


def _make(suite: str, moved: dict[str, str], task: str, cameras: Sequence[str], image_size: int) -> MovedEnv:
    return MovedEnv(suite, task, image_size, cameras, moved=moved.get(task))


def first_places(rollouts: Rollouts) -> dict[int, dict[str, np.ndarray]]:
    """Where blocks stand at the start of every episode of the tabletop: episode -> block -> (x, y), metres."""
    assert rollouts.folder is not None
    table = read_steps(rollouts.folder).select(["episode", "env_step", "poses"]).to_pylist()
    return {
        row["episode"]: {name.removeprefix("blocks/"): np.array(pose[:2]) for name, pose in row["poses"]
                         if name.startswith("blocks/")}
        for row in table if row["env_step"] == 0
    }  # fmt: skip


def grasp_step(states: np.ndarray) -> int | None:
    """The step after which the cup first holds a block; None where it never does. states: [step, 4]."""
    held = np.flatnonzero(states[:, _HOLDS] > 0.5)
    return int(held[0]) if len(held) else None


def place_at_grasp(
    runs: Runs, row: int, source_states: np.ndarray, old: np.ndarray, new: np.ndarray
) -> dict[str, Any] | None:
    """Where an episode's cup is when its source grasps; None where the source never does.

    to_old, to_new: distances from the block's old and new place on the table, metres; at_old_place: over the old place,
    within half a block along both axes, and nearer to it than to the new one.
    """
    step = grasp_step(source_states)
    if step is None:
        return None
    place = runs.states[row][min(step, len(runs.states[row]) - 1), :2]
    to_old, to_new = (float(np.linalg.norm(place - each)) for each in (old, new))
    over = bool(np.abs(place - old).max() <= AT)
    return {"to_old": to_old, "to_new": to_new, "at_old_place": over and to_old < to_new}
