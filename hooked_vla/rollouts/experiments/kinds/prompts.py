"""The prompt battery in closed loop: on a suite where the scene says what to do, and on one where only the prompt does.

A kind of prompt that changes no token of the model's is not run; what the policy did is read from where blocks lie.
"""

from dataclasses import dataclass
from typing import Any

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.batteries.arms import PromptArm
from hooked_vla.rollouts.batteries.prompts import NO_GOAL, PROMPT_KINDS
from hooked_vla.rollouts.batteries.reach import known_tokens, reaches, reads_text
from hooked_vla.rollouts.experiments.compare import by_task
from hooked_vla.rollouts.experiments.context import Context, Seen
from hooked_vla.rollouts.experiments.figures import success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    CHANGED,
    PARTLY,
    REFUSED,
    RUN,
    SAME,
    UNCHANGED,
    arms_of,
    cell_of,
    compare_suites,
    gate_note,
    limited,
    points,
    records,
    run_suite,
    settings_in,
    threshold,
)
from hooked_vla.rollouts.experiments.kinds.prompts_goals import (
    ALL,
    default_goals,
    effect_of,
    goal_figures,
    goals_done,
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
    suites = (settings.unique_suite, settings.shared_suite)
    reach = context.table("reach", lambda: pd.concat([check_prompts(context, settings, each) for each in suites]))
    runs = {}
    for suite in suites:
        kinds = [row["kind"] for row in records(reach) if row["suite"] == suite and row["status"] in RUN]
        if not kinds:
            raise ValueError(f"no kind of prompt changes a token of {context.model_name} in {suite}: nothing to run")
        arms = [PromptArm.of(kind, get_suite(suite)) for kind in kinds]
        runs[suite] = run_suite(context, suite, arms, settings.episodes, limited(context, settings.max_steps))
    table = compare_suites(context, runs.values())
    table.insert(2, "effect", [effect_of(arm) for arm in table["arm"]])
    did = goals_done(runs[settings.shared_suite], settings.shared_suite)
    defaults = default_goals(did)
    bars = success_bars(table, reference=BASELINE.name)
    return Outcome(
        main=table,
        verdicts=[
            _unique_drop(context, table, reach, settings.unique_suite),
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
        notes=_notes(records(reach)),
    )


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


def _unique_drop(context: Context, table: pd.DataFrame, reach: pd.DataFrame, suite: str) -> Verdict:
    rule, limit = "unique-drop", threshold(context, "unique-drop")
    if why := gate_note(table, suite):
        return Verdict(rule, None, why)
    drops = {row["arm"]: -row["difference"] for row in arms_of(table, suite)}
    unknown = {row["kind"] for row in records(reach) if row["suite"] == suite and row["known"] < 1}
    worst, mean = max(drops, key=lambda arm: drops[arm]), sum(drops.values()) / len(drops)
    over = ", ".join(arm for arm, drop in drops.items() if drop >= limit) or "none"
    known = [drop for arm, drop in drops.items() if arm not in unknown]
    without = f" ({points(-sum(known) / len(known))} over the {len(known)} without unknown tokens)" if known else ""
    return Verdict(
        rule,
        mean < limit,
        f"{suite}: mean change {points(-mean)} over {len(drops)} kinds{without}, worst {worst} "
        f"({points(-drops[worst])}); kinds that lose as much as the rule forbids: {over}",
    )


def _shared_chance(context: Context, table: pd.DataFrame, suite: str) -> Verdict:
    rule, limit = "shared-chance", threshold(context, "shared-chance")
    rows = [row for row in arms_of(table, suite) if row["effect"] == NO_GOAL]
    if (why := gate_note(table, suite)) or not rows:
        return Verdict(rule, None, why or "no kind without a goal was run")
    chance, mean = 1 / len(get_suite(suite).tasks), sum(row["success"] for row in rows) / len(rows)
    each = ", ".join(f"{row['arm']} {row['success']:.0%}" for row in rows)
    return Verdict(
        rule,
        abs(mean - chance) <= limit,
        f"{suite}: {mean:.1%} of the original tasks succeed where no goal is named, 1/K = {chance:.1%} ({each})",
    )


def _default_goal(context: Context, table: pd.DataFrame, defaults: pd.DataFrame, suite: str) -> Verdict:
    rule, limit = "default-goal", threshold(context, "default-goal")
    rows = [row for row in records(defaults) if row["task"] == ALL]
    if (why := gate_note(table, suite)) or not rows:
        return Verdict(rule, None, why or "final places of objects are not recorded, or no such kind was run")
    share, none = (sum(row[name] for row in rows) / len(rows) for name in ("share", "none"))
    each = ", ".join(f"{row['kind']}: {row['default']} {row['share']:.0%}" for row in rows)
    return Verdict(
        rule,
        share >= limit,
        f"{suite}: the commonest goal is done in {share:.0%} of the episodes, none in {none:.0%} ({each})",
    )


def _named_goal(context: Context, table: pd.DataFrame, did: pd.DataFrame, suite: str) -> Verdict:
    rule, limit = "named-goal", threshold(context, "named-goal")
    rows = told_another(did)
    if (why := gate_note(table, suite)) or not rows:
        return Verdict(rule, None, why or "no episode was told another goal of its scene")
    named, own = (sum(row["done"] == row[which] for row in rows) for which in ("named", "task"))
    low, high = wilson_interval(named, len(rows))
    return Verdict(
        rule,
        named / len(rows) >= limit,
        f"{suite}: the named goal is done in {named} of {len(rows)} episodes ({low:.0%} to {high:.0%}), the original "
        f"one in {own}",
    )


def _labels(reach: list[dict[str, Any]]) -> list[str]:
    idle = ", ".join(f"{row['kind']} ({row['suite']})" for row in reach if row["status"] == UNCHANGED)
    return [f"no token changed: {idle}. The model gets the same ids, so these were not run."] if idle else []


def _notes(reach: list[dict[str, Any]]) -> list[str]:
    notes = ["A prompt is changed for the whole episode. Success ends an episode; a named other goal does not."]
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
