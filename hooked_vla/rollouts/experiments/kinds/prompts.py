"""The prompt battery in closed loop: on a suite where the scene says what to do, and on one where only the prompt does.

A kind of prompt that changes no token of the model's is not run; what the policy did is read from where blocks lay, at
any step.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.batteries.arms import PromptArm
from hooked_vla.rollouts.batteries.prompts import NO_GOAL, PROMPT_KINDS
from hooked_vla.rollouts.batteries.reach import known_tokens, reaches, reads_text
from hooked_vla.rollouts.experiments.compare import Runs, by_task
from hooked_vla.rollouts.experiments.context import Context, Seen
from hooked_vla.rollouts.experiments.figures import success_bars
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, interval_of, undecided
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    CHANGED,
    PARTLY,
    REFUSED,
    RUN,
    SAME,
    UNCHANGED,
    arms_of,
    cell_of,
    changes,
    compare_suites,
    few_tasks,
    gate_note,
    limited,
    points,
    records,
    roll_suite,
    settings_in,
    significant,
    threshold,
    with_rerun,
)
from hooked_vla.rollouts.experiments.kinds.prompts_goals import (
    ALL,
    default_goals,
    effect_of,
    goal_figures,
    goals_told,
    told_another,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.settings import Settings as RolloutSettings
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd


@dataclass(frozen=True)
class Settings:
    """episodes: of each suite and arm. unique_suite: whose scene alone says what to do; shared_suite: whose tasks share
    a scene. max_steps: after which an episode has failed. kinds: of PROMPT_KINDS; none for all."""

    episodes: int
    unique_suite: str = "object"
    shared_suite: str = "goal"
    max_steps: int = 120
    kinds: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in PROMPT_KINDS]:
            raise ValueError(f"unknown kinds {unknown} of prompts; kinds: {list(PROMPT_KINDS)}")


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model that reads no text, and where no kind of prompt reaches it."""
    suites = list(dict.fromkeys((settings.unique_suite, settings.shared_suite)))
    reach = context.table("reach", lambda: pd.concat([check_prompts(context, settings, each) for each in suites]))
    runs, rolled, options = dict[str, Runs](), {}, limited(context, settings.max_steps)
    for suite in suites:
        arms = prompt_arms(records(reach), suite)
        if not arms:
            raise ValueError(f"no kind of prompt changes a token of {context.model_name} in {suite}: nothing to run")
        rolled[suite] = roll_suite(context, suite, arms, settings.episodes, options)
        runs[suite] = with_rerun(context, rolled[suite], suite, settings.episodes, options)
    table = compare_suites(context, runs.values())
    table.insert(2, "effect", [effect_of(arm) for arm in table["arm"]])
    did = goals_told(rolled[settings.shared_suite], settings.shared_suite)
    defaults = default_goals(did)
    bars = success_bars(table, reference=BASELINE.name)
    return Outcome(
        main=table,
        verdicts=[
            _unique_drop(context, table, reach, runs[settings.unique_suite], settings.unique_suite),
            _shared_chance(context, table, settings.shared_suite),
            _default_goal(context, table, defaults, settings.shared_suite),
            _named_goal(context, table, did, settings.shared_suite),
        ],
        tables={
            "defaults": defaults,
            "reach": reach,
            "tasks": pd.concat([by_task(each) for each in runs.values()], ignore_index=True),
            "goals": did,
        },
        figures={"success": (bars, "Success of the original task; dashed: the baseline's."), **goal_figures(did)},
        labels=_labels(records(reach)),
        notes=[*_notes(records(reach)), _default_note(settings.shared_suite), *few_tasks(table)],
    )


def prompt_arms(reach: list[dict[str, Any]], suite: str) -> list[PromptArm]:
    """The kinds that are run in a suite. Where some episodes' tokens are known to stay as they are, these are run all
    the same: `reach` has their share."""
    found = []
    for row in reach:
        if row["suite"] == suite and row["status"] in RUN:
            arm = PromptArm.of(row["kind"], get_suite(suite))
            found.append(replace(arm, inert="run") if row["status"] == PARTLY else arm)
    return found


def check_prompts(context: Context, settings: Settings, suite: str) -> pd.DataFrame:
    """What of every kind reaches the model in the run's own episodes: one row a kind.

    changed: share of the episodes in which a token differs behind the preprocessing. known: share of the prompts' words
    that the tokenizer knows. same_as: an earlier kind whose prompts are the same tokens in every episode.
    """
    starts = context.observations(suite, settings.episodes)
    prepared = settings_in(context, suite, limited(context, settings.max_steps))
    if not reads_text(context.model, prepared, starts[0].frame):
        raise ValueError(f"{context.model_name} reads no text: a prompt battery has nothing to change")
    rows: list[dict[str, Any]] = []
    ids: dict[str, list[tuple[int, ...]]] = {}
    for kind in settings.kinds or PROMPT_KINDS:
        row, texts = _check(context, PromptArm.of(kind, get_suite(suite)), starts, prepared)
        same = next((other for other, each in ids.items() if each == texts), "") if row["status"] in RUN else ""
        if same:
            row["status"] = SAME
        elif row["status"] in RUN:
            ids[kind] = texts
        rows.append({"suite": suite, "kind": kind, "effect": effect_of(kind), **row, "same_as": same})
    return pd.DataFrame(rows)


def _check(
    context: Context, arm: PromptArm, starts: list[Seen], prepared: RolloutSettings
) -> tuple[dict[str, Any], list[tuple[int, ...]]]:
    """A kind's row of `check_prompts`, and the ids of every episode's text (none where one is refused)."""
    cells = [cell_of(arm, seen) for seen in starts]
    told = [arm.observe(cell, 0, seen.frame) for cell, seen in zip(cells, starts, strict=True)]
    try:
        found = [reaches(context.model, prepared, seen.frame, after) for seen, after in zip(starts, told, strict=True)]
    except ValueError as error:
        return {"status": REFUSED, "changed": float("nan"), "known": float("nan"),
                "example": told[0]["instruction"], "refused": str(error)}, []  # fmt: skip
    share = sum(reach.changed for reach in found) / len(found)
    known, tokens = map(sum, zip(*(known_tokens(context.model, each["instruction"]) for each in told), strict=True))
    status = CHANGED if share == 1 else PARTLY if share else UNCHANGED
    return {"status": status, "changed": share, "known": known / tokens if tokens else float("nan"),
            "example": told[0]["instruction"], "refused": ""}, [each.text for each in found]  # fmt: skip


def _unique_drop(context: Context, table: pd.DataFrame, reach: pd.DataFrame, runs: Runs, suite: str) -> Verdict:
    rule, limit = "unique-drop", threshold(context, "unique-drop")
    if why := gate_note(table, suite):
        return Verdict(rule, None, why)
    rows = arms_of(table, suite)
    drops = {row["arm"]: -row["difference"] for row in rows}
    change, tasks = changes(runs, suite, list(drops))
    mean, low, high = change_interval(-change, tasks, seed=context.seed)
    unknown = {row["kind"] for row in records(reach) if row["suite"] == suite and row["known"] < 1}
    worst = max(drops, key=lambda arm: drops[arm])
    over = ", ".join(arm for arm, drop in drops.items() if drop >= limit) or "none"
    known = [drop for arm, drop in drops.items() if arm not in unknown]
    without = f", {points(-sum(known) / len(known))} over the {len(known)} without unknown tokens" if known else ""
    holds = decide(low, high, limit, below=True)
    return Verdict(
        rule,
        holds,
        f"{suite}: mean change {points(-mean)} ({points(-high)} to {points(-low)}) over {len(drops)} kinds{without}; "
        f"worst {worst} ({points(-drops[worst])}); kinds that lose as much as the rule forbids: {over}; "
        f"{significant(rows)}{undecided(holds)}",
    )


def _shared_chance(context: Context, table: pd.DataFrame, suite: str) -> Verdict:
    """Whether 1/K is in the interval of success, and 0 is not: otherwise "never" would pass as "one in K"."""
    rule = "shared-chance"
    rows = [row for row in arms_of(table, suite) if row["effect"] == NO_GOAL]
    if (why := gate_note(table, suite)) or not rows:
        return Verdict(rule, None, why or "no kind without a goal was run")
    n = sum(row["n"] for row in rows)
    wins = sum(round(row["success"] * row["n"]) for row in rows)
    chance, (low, high) = 1 / len(get_suite(suite).tasks), wilson_interval(wins, n)
    holds = None if not wins and chance <= high else low <= chance <= high
    each = ", ".join(f"{row['arm']} {row['success']:.0%}" for row in rows)
    few = "; too few episodes to tell 1/K from never" if holds is None else ""
    return Verdict(
        rule,
        holds,
        f"{suite}: {wins} of {n} episodes ({wins / n:.1%}, {low:.1%} to {high:.1%}) do the original task where no goal "
        f"is named, 1/K = {chance:.1%} ({each}){few}",
    )


def _default_goal(context: Context, table: pd.DataFrame, defaults: pd.DataFrame, suite: str) -> Verdict:
    """Whether the commonest goal of each task's episodes is the rule, on the mean over tasks."""
    rule, limit = "default-goal", threshold(context, "default-goal")
    rows = [row for row in records(defaults) if row["kind"] == ALL]
    if (why := gate_note(table, suite)) or not rows:
        return Verdict(rule, None, why or "poses of objects are not recorded, or no such kind was run")
    total, tasks = rows[0], rows[1:]
    mean, low, high = interval_of([row["share"] for row in tasks], [row["task"] for row in tasks], seed=context.seed)
    holds = decide(low, high, limit, below=False)
    same = sum(row["default"] == row["task"] for row in tasks)
    return Verdict(
        rule,
        holds,
        f"{suite}: a task's commonest goal is done in {mean:.0%} of its episodes ({low:.0%} to {high:.0%}, "
        f"{len(tasks)} tasks); it is the task's own in {same}, and in the rule's share of the episodes or more in "
        f"{sum(row['share'] >= limit for row in tasks)}. Over all tasks the commonest, {total['default']}, is done in "
        f"{total['share']:.0%}, none in {total['none']:.0%}{undecided(holds)}",
    )


def _named_goal(context: Context, table: pd.DataFrame, did: pd.DataFrame, suite: str) -> Verdict:
    rule, limit = "named-goal", threshold(context, "named-goal")
    rows = told_another(did)
    if (why := gate_note(table, suite)) or not rows:
        return Verdict(rule, None, why or "no episode was told another goal of its scene")
    named, own = ([_reached(row, row[which]) for row in rows] for which in ("named", "own"))
    share, low, high = change_interval(np.array(named, float), [row["task"] for row in rows], seed=context.seed)
    holds = decide(max(low, 0.0), high, limit, below=False)
    return Verdict(
        rule,
        holds,
        f"{suite}: the named goal is done in {sum(named)} of {len(rows)} episodes ({share:.0%}, {max(low, 0):.0%} to "
        f"{high:.0%} by tasks), the original one in {sum(own)}{undecided(holds)}",
    )


def _reached(row: Mapping[str, Any], goal: str) -> bool:
    return goal in row["goals"].split()


def _labels(reach: list[dict[str, Any]]) -> list[str]:
    idle = ", ".join(f"{row['kind']} ({row['suite']})" for row in reach if row["status"] == UNCHANGED)
    return [f"no token changed: {idle}. The model gets the same ids, so these were not run."] if idle else []


def _default_note(suite: str) -> str:
    """What a default can be where only the instruction tells tasks apart."""
    return (
        f"In {suite} the tasks have the same scenes, and only the instruction tells them apart: without it, what is "
        "the same over starts is a default of the policy. That each task has one of its own cannot show there."
    )


def _notes(reach: list[dict[str, Any]]) -> list[str]:
    notes = [
        "A prompt is changed for the whole episode. Success ends an episode; a named other goal does not: a goal "
        "counts as done when its block lay on its pad and was let go at any step, whatever came of it later.",
        "Intervals resample whole tasks. Kinds without a goal are judged together; their episodes of one start are "
        "not independent, so that the interval around 1/K is narrower than it should be.",
    ]
    for row in reach:
        where = f"{row['kind']} in {row['suite']}"
        if row["status"] == PARTLY:
            notes.append(
                f"{where} changes tokens in {row['changed']:.0%} of the episodes: the others are the baseline's, and "
                "dilute its row."
            )
        if row["status"] == SAME:
            notes.append(f"{where} is the same tokens as {row['same_as']} in every episode, whose row is its own too.")
        if row["status"] == REFUSED:
            notes.append(f"{where} was not run: {row['refused']}")
    unknown = {row["kind"]: 1 - row["known"] for row in reach if row["known"] < 1}
    if unknown:
        each = ", ".join(f"{kind} {share:.0%}" for kind, share in unknown.items())
        notes.append(
            f"Words that the tokenizer does not know become one and the same unknown token: {each} of the words. To "
            "the model these are masked texts, whatever they mean to a reader."
        )
    return notes
