"""Which goals of the tabletop an episode did, at any of its steps: a block on a pad, and let go.

An environment ends an episode at its own task's goal only. A policy that was led to another one does not stop there: it
goes on, and may well undo it. So where blocks lie at the end does not tell what was done.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.sweep import Rollouts
from hooked_vla.rollouts.tabletop.expert import PAD_REACH
from hooked_vla.rollouts.tabletop.scene import BLOCK_HALF
from hooked_vla.rollouts.tabletop.tasks import find_task

# how high a block's centre may be over one that lies flat: tabletop/expert.py, Situation.is_placed
_LIES = BLOCK_HALF + 0.008
# where the tabletop's state says that the cup holds a block
_HOLDS = 3
# "blocks/NAME" -> x, y, z and more, "pads/NAME" -> x, y; lists or arrays, metres
Poses = Mapping[str, Any]


def goal_of(suite: str, task: str) -> str:
    """What a task of the tabletop wants, as "block-pad". Raises ValueError for tasks that are not the tabletop's."""
    found = find_task(suite, task)
    return f"{found.block}-{found.pad}"


def placed(poses: Poses) -> list[str]:
    """The goals that hold in poses as they are recorded, as "block-pad": blocks that lie on a pad, by the tabletop's
    own measure, but for whether the cup still holds the block, which poses do not say (`goals_reached` looks)."""
    blocks, pads = (
        {name.removeprefix(kind): place for name, place in poses.items() if name.startswith(kind)}
        for kind in ("blocks/", "pads/")
    )
    return [
        f"{block}-{pad}"
        for block, place in blocks.items()
        for pad, centre in pads.items()
        if max(abs(place[0] - centre[0]), abs(place[1] - centre[1])) < PAD_REACH and place[2] < _LIES
    ]


def goals_reached(path: Iterable[tuple[Any, Poses]]) -> dict[str, int]:
    """Goals that are done at any step, with the first step at which they are, in that order.

    path: the tabletop's state and poses at every step, and after the last action.
    """
    found: dict[str, int] = {}
    for step, (state, poses) in enumerate(path):
        if state[_HOLDS] < 0.5:
            for goal in placed(poses):
                found.setdefault(goal, step)
    return found


def goals_done(rollouts: Rollouts) -> dict[int, dict[str, int]]:
    """`goals_reached` of every episode of a sweep, by its number; without those whose pads were not recorded (of other
    simulators than the tabletop). An episode that did nothing has an empty entry.

    Raises ValueError for rollouts that kept nothing.
    """
    return {episode: goals_reached(path) for episode, path in paths(rollouts).items() if _has_pads(path[0][1])}


def paths(rollouts: Rollouts) -> dict[int, list[tuple[Any, dict[str, Any]]]]:
    """State and poses at every step of every episode, and after its last action; poses: {} where none were recorded.

    Raises ValueError for rollouts that kept nothing.
    """
    if rollouts.folder is None:
        raise ValueError("these rollouts were not kept: run them with a folder")
    table = read_steps(rollouts.folder).select(["episode", "state", "poses"])
    found: dict[int, list[tuple[Any, dict[str, Any]]]] = {}
    for episode, state, poses in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        found.setdefault(episode, []).append((state, dict(poses or ())))
    for row in rollouts.episodes.to_pylist():
        found[row["episode"]].append((row["final_state"], dict(row["final_poses"] or ())))
    return found


def _has_pads(poses: Poses) -> bool:
    return any(name.startswith("pads/") for name in poses)
