"""Which goal an episode of the tabletop went for: the told one, the donor's, or another; and whether it grasped."""

from collections.abc import Mapping, Sequence

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.goals import goals_reached, paths
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import Rollouts
from hooked_vla.rollouts.tabletop.tasks import find_task

with needs_analysis_extra():
    import pandas as pd

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
    found, rows = paths(rollouts), []
    for episode in rollouts.episodes.to_pylist():
        path = found[episode["episode"]]
        own, donor = (find_task(episode["suite"], task) for task in (episode["task"], donors[episode["task"]]))
        done = goals_reached(path)
        lifted = first_lifted([poses for _, poses in path])
        rows.append(
            {
                "arm": episode["arm"],
                "task": episode["task"],
                "seed": episode["seed"],
                "donor": donor.id,
                "own": f"{own.block}-{own.pad}" in done,
                "switched": f"{donor.block}-{donor.pad}" in done,
                "placed": bool(done),
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
