"""What a policy did: the goals of the tabletop that it reached at any step, by what the prompt named."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.batteries.prompts import NO_GOAL, OTHER_GOAL, PROMPT_KINDS, SAME_GOAL, change_prompt
from hooked_vla.rollouts.experiments.figures import heat_map
from hooked_vla.rollouts.experiments.goals import goal_of, goals_done
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure

NOTHING = "nothing"
ALL = "all"
_COLUMNS = ("arm", "task", "seed", "told", "own", "named", "done", "goals")


def effect_of(arm: str) -> str:
    """What an arm does to the goal that is named; "" for arms that are no kind of prompt."""
    return PROMPT_KINDS[arm].effect if arm in PROMPT_KINDS else ""


def goals_told(rollouts: Rollouts, suite: str) -> pd.DataFrame:
    """One row an episode: what it was told, the goal that this names, and what it did.

    own: the task's goal. named: the own where the wording alone was changed; else the goal whose instruction was told,
    "" for none. done: the first goal that was done and let go, at whatever step, or "nothing"; goals: all of them, in
    order, with spaces between. Episodes of other simulators than the tabletop have no rows.
    """
    tasks = {task.instruction: task.id for task in get_suite(suite).tasks}
    done, rows = goals_done(rollouts), []
    for episode in rollouts.episodes.to_pylist():
        if episode["episode"] not in done:
            continue
        arm, told = episode["arm"], episode["instruction"]
        if arm in PROMPT_KINDS:
            # the table of episodes has what the environment said
            told = change_prompt(arm, told, tuple(tasks), episode["seed"])
        own, reached = goal_of(suite, episode["task"]), list(done[episode["episode"]])
        same = effect_of(arm) in ("", SAME_GOAL)
        named = own if same else goal_of(suite, tasks[told]) if told in tasks else ""
        rows.append({"arm": arm, "task": episode["task"], "seed": episode["seed"], "told": told, "own": own,
                     "named": named, "done": [*reached, NOTHING][0], "goals": " ".join(reached)})  # fmt: skip
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def default_goals(did: pd.DataFrame) -> pd.DataFrame:
    """What is done when the prompt names no goal: by kind and task, where "all" stands for all kinds, or all tasks.

    default: the goal that is done (first) most often; share: of the episodes; none: share of those without any goal.
    """
    free = _free(did)
    rows = []
    for kind in dict.fromkeys((*(row["arm"] for row in free), *([ALL] if free else []))):
        mine = [row for row in free if kind in (ALL, row["arm"])]
        for task in (ALL, *dict.fromkeys(row["task"] for row in mine)):
            done = [row["done"] for row in mine if task in (ALL, row["task"])]
            goals = Counter(each for each in done if each != NOTHING).most_common(1)
            default, n = goals[0] if goals else (NOTHING, 0)
            rows.append({"kind": kind, "task": task, "n": len(done), "default": default, "share": n / len(done),
                         "none": done.count(NOTHING) / len(done)})  # fmt: skip
    return pd.DataFrame(rows, columns=["kind", "task", "n", "default", "share", "none"])


def told_another(did: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows of `goals_told` whose prompt names another goal of the suite than the own one."""
    rows = [row for row in records(did) if effect_of(row["arm"]) == OTHER_GOAL]
    return [row for row in rows if row["named"] not in ("", row["own"])]


def goal_figures(did: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """Named × done goals where the prompt names another, and what is done where it names none."""
    goals = {row["own"] for row in records(did)} | {row["done"] for row in records(did)}
    ends = [*sorted(goals - {NOTHING}), NOTHING]
    figures = {}
    for name, rows, by, caption in (
        ("named_goals", told_another(did), "named",
         "Told another goal of the scene: the goal that the prompt names, and the one that was done first."),
        ("default_goals", _free(did), "arm", "Told no goal: which one was done first."),
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
