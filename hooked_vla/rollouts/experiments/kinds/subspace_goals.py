"""Which goal an episode of the tabletop went for: the told one, the donor's, or another; and whether it grasped."""

from collections.abc import Mapping, Sequence
from typing import Any

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import Rollouts
from hooked_vla.rollouts.tabletop.expert import PAD_REACH
from hooked_vla.rollouts.tabletop.scene import BLOCK_HALF
from hooked_vla.rollouts.tabletop.tasks import find_task

with needs_analysis_extra():
    import pandas as pd

# how high a block's centre may be over one that lies flat: tabletop/expert.py, Situation.is_placed
_LIES = BLOCK_HALF + 0.008
# metres that a block has gone up when it counts as lifted: more than a push tips it
LIFTED = 0.04


def far_donors(suite: str) -> dict[str, str]:
    """For each task of a suite of blocks and pads, one that means another block and another pad.

    Donors are dealt in turn, so that every task is one. Raises ValueError where a task has no such partner.
    """
    tasks = [find_task(suite, task.id) for task in get_suite(suite).tasks]
    blocks, pads = (list(dict.fromkeys(getattr(task, what) for task in tasks)) for what in ("block", "pad"))
    by_goal = {(task.block, task.pad): task.id for task in tasks}
    found = {}
    for task in tasks:
        goal = tuple(
            names[(names.index(own) + 1) % len(names)] for names, own in ((blocks, task.block), (pads, task.pad))
        )
        if len(blocks) < 2 or len(pads) < 2 or goal not in by_goal:
            raise ValueError(f"the suite {suite!r} has no task of another block and pad than {task.id!r}")
        found[task.id] = by_goal[goal]
    return found


def goal_table(rollouts: Rollouts, donors: Mapping[str, str]) -> pd.DataFrame:
    """One row an episode: arm, task, seed; donor: the donor's task; own, switched: the task's or the donor's block lay
    on its pad and was let go, at any step; lifted: some block went up by LIFTED; first_lifted: which, "" for none.

    Raises ValueError for rollouts that kept nothing.
    """
    if rollouts.folder is None:
        raise ValueError("these rollouts were not kept: run them with a folder")
    table = read_steps(rollouts.folder).select(["episode", "state", "poses"])
    steps: dict[int, list[tuple[Any, Any]]] = {}
    for episode, state, poses in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
        steps.setdefault(episode, []).append((state, poses))
    rows = []
    for episode in rollouts.episodes.to_pylist():
        path = [*steps[episode["episode"]], (episode["final_state"], episode["final_poses"])]
        own, donor = (find_task(episode["suite"], task) for task in (episode["task"], donors[episode["task"]]))
        placed = {goal for state, poses in path if not state[3] for goal in _placed(dict(poses))}
        lifted = first_lifted([dict(poses) for _, poses in path])
        rows.append(
            {
                "arm": episode["arm"],
                "task": episode["task"],
                "seed": episode["seed"],
                "donor": donor.id,
                "own": (own.block, own.pad) in placed,
                "switched": (donor.block, donor.pad) in placed,
                "placed": bool(placed),
                "lifted": lifted is not None,
                "first_lifted": lifted or "",
                "switched_block": lifted == donor.block,
            }
        )
    return pd.DataFrame(rows)


def first_lifted(path: Sequence[Mapping[str, Sequence[float]]]) -> str | None:
    """The first block that goes up by LIFTED over where it lay first; None where none does."""
    start = {name: place[2] for name, place in path[0].items() if name.startswith("blocks/")}
    for poses in path:
        for name, height in start.items():
            if poses[name][2] - height > LIFTED:
                return name.removeprefix("blocks/")
    return None


def share(goals: pd.DataFrame, column: str) -> dict[str, float]:
    """Share of episodes in which `column` holds, with Wilson's 95 % interval, as columns of a table."""
    held = sum(map(bool, goals[column]))
    low, high = wilson_interval(held, len(goals))
    return {column: held / len(goals), f"{column}_low": low, f"{column}_high": high}


def _placed(poses: Mapping[str, Sequence[float]]) -> set[tuple[str, str]]:
    """Block and pad of every block that lies on a pad, by the task's own measure."""
    blocks = {name[7:]: place for name, place in poses.items() if name.startswith("blocks/")}
    pads = {name[5:]: place for name, place in poses.items() if name.startswith("pads/")}
    return {
        (block, pad)
        for block, place in blocks.items()
        for pad, centre in pads.items()
        if max(abs(place[0] - centre[0]), abs(place[1] - centre[1])) < PAD_REACH and place[2] < _LIES
    }
