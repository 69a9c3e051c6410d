"""What a policy did, by where the tabletop's blocks lie at the end: the own goal, another one, several, or nothing."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.batteries.prompts import NO_GOAL, OTHER_GOAL, PROMPT_KINDS, SAME_GOAL, change_prompt
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.figures import heat_map
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.tabletop.expert import PAD_REACH
from hooked_vla.rollouts.tabletop.scene import BLOCK_HALF

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure

NOTHING, SEVERAL = "nothing", "several"
ALL = "all"
# how high a block's centre may be over one that lies flat: tabletop/expert.py, Situation.is_placed
_LIES = BLOCK_HALF + 0.008


def effect_of(arm: str) -> str:
    """What an arm does to the goal that is named; "" for arms that are no kind of prompt."""
    return PROMPT_KINDS[arm].effect if arm in PROMPT_KINDS else ""


def placed_goals(final_poses: Sequence[tuple[str, Any]]) -> list[str]:
    """The goals that hold in a table's final poses, as "block-pad": blocks that lie on a pad, by the task's measure."""
    poses = dict(final_poses)
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


def goals_done(runs: Runs, suite: str) -> pd.DataFrame:
    """One row an episode: what it was told, the goal that this names, and the goal that holds at the end.

    named: the task's own where the wording alone was changed; else the task whose instruction was told, "" for none.
    done: a task, "nothing", or "several". Episodes of other simulators than the tabletop have no rows.
    """
    tasks = {task.instruction: task.id for task in get_suite(suite).tasks}
    rows = []
    for episode in records(runs.episodes):
        poses = episode["final_poses"]
        if poses is None or not any(name.startswith("pads/") for name, _ in poses):
            continue
        arm, told = episode["arm"], episode["instruction"]
        if arm in PROMPT_KINDS:
            # the table of episodes has what the environment said
            told = change_prompt(arm, told, tuple(tasks), episode["seed"])
        same = effect_of(arm) in ("", SAME_GOAL)
        held = placed_goals(poses)
        done = NOTHING if not held else held[0] if len(held) == 1 else SEVERAL
        rows.append({"arm": arm, "task": episode["task"], "seed": episode["seed"], "told": told,
                     "named": episode["task"] if same else tasks.get(told, ""), "done": done})  # fmt: skip
    return pd.DataFrame(rows, columns=["arm", "task", "seed", "told", "named", "done"])


def default_goals(did: pd.DataFrame) -> pd.DataFrame:
    """What is done when the prompt names no goal: by kind and task, and by kind over "all" tasks.

    default: the goal that is done most often; share: of the episodes; none: share of those that end without a goal.
    """
    free = _free(did)
    rows = []
    for kind in dict.fromkeys(row["arm"] for row in free):
        mine = [row for row in free if row["arm"] == kind]
        for task in (ALL, *dict.fromkeys(row["task"] for row in mine)):
            done = [row["done"] for row in mine if task in (ALL, row["task"])]
            goals = Counter(each for each in done if each not in (NOTHING, SEVERAL)).most_common(1)
            default, n = goals[0] if goals else (NOTHING, 0)
            rows.append({"kind": kind, "task": task, "n": len(done), "default": default, "share": n / len(done),
                         "none": done.count(NOTHING) / len(done)})  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "task", "n", "default", "share", "none"])


def told_another(did: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of `goals_done` whose prompt names another task of the suite than the own one."""
    rows = [row for row in records(did) if effect_of(row["arm"]) == OTHER_GOAL]
    return [row for row in rows if row["named"] not in ("", row["task"])]


def goal_figures(did: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Named × done goals where the prompt names another, and what is done where it names none."""
    goals = {row["task"] for row in records(did)} | {row["done"] for row in records(did)}
    ends = [*sorted(goals - {SEVERAL, NOTHING}), SEVERAL, NOTHING]
    figures = {}
    for name, rows, by, caption in (
        ("named_goals", told_another(did), "named",
         "Told another goal of the scene: the goal that the prompt names, and the one that holds at the end."),
        ("default_goals", _free(did), "arm", "Told no goal: which one holds at the end."),
    ):  # fmt: skip
        if rows:
            shares = _shares(rows, by, ends)
            drawn = heat_map(shares, by, "done", "share", unit="share of episodes", limits=(0, 1), form=".1g")
            figures[name] = (drawn, caption)
    return figures


def _free(did: pd.DataFrame) -> list[dict[str, Any]]:
    return [row for row in records(did) if effect_of(row["arm"]) == NO_GOAL]


def _shares(rows: Sequence[dict[str, Any]], by: str, ends: Sequence[str]) -> pd.DataFrame:
    """Share of every end among the rows with each value of a column."""
    names = dict.fromkeys(row[by] for row in rows)
    found = []
    for name in sorted(names) if by == "named" else names:
        done = [row["done"] for row in rows if row[by] == name]
        found += [{by: name, "done": end, "share": done.count(end) / len(done)} for end in ends]
    return pd.DataFrame(found)
