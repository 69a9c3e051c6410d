"""Probes: what can be read off a policy's activations while it acts, where, and whether the policy depends on it.

Activations are those of unedited episodes, recorded as the policy planned; a model of random weights is shown the very
same frames. Goals are then taken out along their probes' directions in closed loop, beside random directions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.activations import ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import RERUN, action_normalizer, compare, join, layout_of, read_runs, rerun
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map, success_bars
from hooked_vla.rollouts.experiments.intervals import decide, undecided
from hooked_vla.rollouts.experiments.kinds.battery_runs import limited, records, settings_in, threshold
from hooked_vla.rollouts.experiments.kinds.probes_held_out import AHEAD, ALONE, BOTH, EXPERT, VLM, hold_out
from hooked_vla.rollouts.experiments.kinds.probes_removal import (
    PURSUED,
    choose_removal,
    fit_removals,
    pursued_goals,
    removal_arms,
    removal_effects,
    removal_verdicts,
)
from hooked_vla.rollouts.experiments.kinds.probes_scores import (
    ACTION,
    FEWEST,
    GOAL,
    STATE,
    SUCCESS,
    probe_sites,
    random_weights,
    record_again,
    score_everything,
)
from hooked_vla.rollouts.experiments.kinds.subspace_fits import choose_frames
from hooked_vla.rollouts.experiments.kinds.subspace_goals import far_donors, goal_table, share
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.labelled import FrameRecorder, SegmentMeans, read_frames, step_labels
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd

_FRAMES = 32
# episodes without what probes read start from other seeds than those that the probes were fitted on
_APART = 50_000
_NAMES = {"block": "goal: block", "pad": "goal: pad"}


@dataclass(frozen=True)
class Settings:
    """episodes: unedited ones whose plans are probed. removal_episodes: of each arm of the removal. sites: globs of
    what is probed; inputs: of what directions are also taken out of, but where nothing is scored: an input token says
    what it was given. n_folds: of tasks. n_shuffles: how often labels are shuffled. max_steps: after which an episode
    has failed."""

    episodes: int
    removal_episodes: int
    suite: str = "goal"
    sites: tuple[str, ...] = (
        "vision.*.hook_resid_post",
        "vlm.blocks.*.hook_resid_post",
        "adapter.blocks.*.hook_resid_post",
        "expert.blocks.*.hook_resid_post",
    )
    inputs: tuple[str, ...] = ("vlm.hook_tokens",)
    n_folds: int = 4
    n_shuffles: int = 3
    max_steps: int = 120


@dataclass(frozen=True, eq=False)
class Recorded:
    """Unedited episodes: their activations and those of random weights, and what was true at every plan."""

    rollouts: Rollouts
    own: ActivationRecording
    other: ActivationRecording
    labels: pd.DataFrame
    steps: tuple[int, ...]


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a suite whose tasks are not blocks and pads, and a model without a site to probe."""
    far_donors(settings.suite)
    recorded = _record(context, settings)
    scored = cache(
        lambda: score_everything(
            context.model, probe_sites(context.model, settings.sites), recorded.own, recorded.other, recorded.labels,
            recorded.steps, settings.n_folds, settings.n_shuffles, context.seed,
        )
    )  # fmt: skip
    scores = context.table("scores", lambda: pd.DataFrame([each.row() for each in scored()]))
    held_out = context.table("held_out", lambda: hold_out(scored(), context.seed))
    effects, removal, verdicts, chosen = _remove(context, settings, recorded)
    best = pd.DataFrame(_best(scores))
    shown = success_bars(removal, reference=BASELINE.name)
    return Outcome(
        main=held_out,
        verdicts=[*_margin_verdicts(context, held_out), _chance_verdict(context, records(best)), *verdicts],
        tables={"best": best, "removal": removal, "removal_effects": effects, "scores": scores},
        figures={
            "scores": (_map(scores, "score", None), "What probes read on tasks that they have not seen: accuracy of "
                       "the goal's block and pad, R² of end effector and next action within tasks."),
            "margins": (_map(scores, "margin", 0.0), "The same, minus the best control: shuffled labels, random "
                        "weights, the clock, proprioception, or the image encoder."),
            "removal": (shown, f"Success without what goal probes read, at {' in '.join(chosen)} tokens, or at all "
                        "layers; dashed: the baseline's."),
        },
        notes=_notes(recorded, chosen),
    )  # fmt: skip


def _record(context: Context, settings: Settings) -> Recorded:
    options = limited(context, settings.max_steps)
    prepared = settings_in(context, settings.suite, options)
    sites = probe_sites(context.model, (*settings.sites, *settings.inputs))
    steps = tuple(sorted({0, context.model.n_denoise_steps - 1}))
    with SegmentMeans(context.folder("activations")) as recorder:
        watchers = [
            ActivationWatcher(recorder, sites, denoise_steps=steps),
            FrameRecorder(context.folder("frames"), prepared.n_action_steps),
        ]
        rollouts = context.rollouts("recorded", settings.suite, episodes=settings.episodes, watchers=watchers,
                                    options=options)  # fmt: skip
    twin = random_weights(context.model, context.seed)
    frames = read_frames(context.folder("frames"))
    other = record_again(twin, prepared, frames, sites, steps, context.folder("random_weights"))
    return Recorded(rollouts, ActivationRecording(context.folder("activations")), other, step_labels(rollouts), steps)


def _remove(
    context: Context, settings: Settings, recorded: Recorded
) -> tuple[pd.DataFrame, pd.DataFrame, list[Verdict], tuple[str, str]]:
    """Effects of removals on single plans, the comparison in closed loop, its verdicts, and where the removals of one
    place took things out. Episodes are others than those that the probes were fitted on."""
    options, seed = limited(context, settings.max_steps), context.seed + _APART
    frames = choose_frames(read_frames(context.folder("frames")), _FRAMES, context.seed)
    prepared = settings_in(context, settings.suite, options)
    removals = fit_removals(context.model, prepared, frames, recorded.own, recorded.labels, context.seed)
    effects = context.table("effects", lambda: removal_effects(context.model, prepared, frames, removals))
    chosen = choose_removal(effects)
    arms = [BASELINE, *removal_arms(removals, chosen)]
    n = settings.removal_episodes
    done = context.rollouts("removal", settings.suite, arms, n, seed=seed, options=options)
    again = rerun(context, "rerun", settings.suite, n, options=options, seed=seed)
    runs = join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))
    table = compare(runs, layout_of(settings.suite), action_normalizer(context.model), seed=context.seed)
    pursued = pursued_goals(goal_table(done, far_donors(settings.suite)))
    extra = []
    for row in records(table):
        mine = pursued.loc[pursued["arm"] == row["arm"]]
        shares = [share(mine, name) if len(mine) else {name: float("nan")} for name in ("lifted", *PURSUED)]
        extra.append({name: value for each in shares for name, value in each.items()})
    whole = pd.concat([table, pd.DataFrame(extra)], axis=1)
    return effects, whole, removal_verdicts(context, settings.suite, whole, pursued, runs), chosen


_COLUMNS = (
    "label", "pathway", "denoise_step", "site", "segment", "metric", "score", "low", "high", "chance", "shuffled",
    "random_weights", "time", "proprioception", "pictures", "selectivity", "margin", "best_control", "n",
)  # fmt: skip


def _best(scores: pd.DataFrame, by: str = "score") -> list[dict[str, Any]]:
    """For every label, pathway and denoise step, the place where `by` is largest; one row each."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in records(scores):
        step = row["denoise_step"]
        key = (row["label"], row["pathway"], None if step is None or step != step else int(step))
        if key not in found or row[by] > found[key][by]:
            found[key] = row
    labels = list(dict.fromkeys(row["label"] for row in found.values()))
    ordered = sorted(found.values(), key=lambda row: labels.index(row["label"]))
    return [{name: row[name] for name in _COLUMNS} for row in ordered]


def _margin_verdicts(context: Context, held_out: pd.DataFrame) -> list[Verdict]:
    """Whether goals are read from the language model, beyond controls and beyond the expert, and end effector and next
    action from the expert beyond the language model: all by margins over controls, at places chosen on other tasks."""
    rows = {(row["label"], row["side"]): row for row in records(held_out)}
    above = "goal-in-vlm"
    found = []
    if any((goal, VLM) not in rows for goal in GOAL):
        found.append(Verdict(above, None, "no language model was probed"))
    else:
        mine, limit = [rows[goal, VLM] for goal in GOAL], threshold(context, above)
        full = [row for row in mine if _at_ceiling(row, limit)]
        held = [None if row in full else decide(row["low"], row["high"], limit, below=False) for row in mine]
        holds = False if False in held else None if None in held else True
        found.append(Verdict(above, holds, f"{_all_said(mine, rows)}{_why_open(holds, full)}"))
    for rule, label, side in (
        ("goal-vlm-over-expert", BOTH, VLM), ("state-in-expert", STATE, EXPERT), ("action-in-expert", ACTION, EXPERT),
    ):  # fmt: skip
        if (label, AHEAD[side]) not in rows:
            found.append(Verdict(rule, None, "language model or expert was not probed"))
            continue
        ahead, limit = rows[label, AHEAD[side]], threshold(context, rule)
        own = [rows[each, side] for each in (GOAL if label == BOTH else (label,))]
        parts = [rows[row["label"], way] for row in own for way in (side, *OTHER[side])]
        full = [row for row in own if _at_ceiling(row, limit)]
        # a margin that cannot be had is not one that is missing
        ceiling = len(full) == len(own)
        holds = None if ceiling else decide(ahead["low"], ahead["high"], limit, below=False)
        found.append(
            Verdict(
                rule,
                holds,
                f"margins over controls: {AHEAD[side]} {ahead['margin']:+z.2f} ({ahead['low']:+z.2f} to "
                f"{ahead['high']:+z.2f}); {_all_said(parts, rows)}{_why_open(holds, full if ceiling else [])}",
            )
        )
    return found


OTHER = {VLM: (EXPERT,), EXPERT: (VLM,)}


def _at_ceiling(row: dict[str, Any], limit: float) -> bool:
    """Whether a control reads so much at every place that no margin as large as the limit is left: scores end at 1."""
    return row["least_control"] > 1 - limit


def _why_open(holds: bool | None, full: Sequence[dict[str, Any]]) -> str:
    """Why a verdict is open, if it is. full: labels that a control reads nearly as well as anything could."""
    if holds is not None or not full:
        return undecided(holds)
    each = ", ".join(f"{row['label']} with {row['least_control']:.2f} or more" for row in full)
    return f"; not judged: at every place some control reads {each}, which leaves no such margin to anything"


def _said(row: dict[str, Any]) -> str:
    return (
        f"{row['label']}, {row['side']}: {row['margin']:+z.2f} ({row['low']:+z.2f} to {row['high']:+z.2f}) "
        f"over {row['best_control']}, score {row['score']:.2f} at {row['chosen']}"
    )


def _all_said(mine: Sequence[dict[str, Any]], rows: Mapping[tuple[str, str], dict[str, Any]]) -> str:
    """What rows measure; where an adapter is part of the language model's side, also what is left without it."""
    alone = [rows[row["label"], ALONE] for row in mine if row["side"] == VLM and (row["label"], ALONE) in rows]
    return "; ".join(map(_said, [*mine, *alone]))


def _chance_verdict(context: Context, best: list[dict[str, Any]]) -> Verdict:
    """Whether shuffled labels score chance where probes score best."""
    rule = "shuffled-at-chance"
    off = {f"{row['label']} at {row['site']}": row["shuffled"] - row["chance"] for row in best}
    worst = max(off, key=lambda name: off[name])
    said = f"most above chance: {worst}, by {off[worst]:.2f}" if off[worst] >= 0.005 else "none is above chance"
    return Verdict(rule, off[worst] <= threshold(context, rule), said)


def _map(scores: pd.DataFrame, value: str, centre: float | None) -> Any:
    """Heat map of places by labels."""
    rows = []
    for row in records(scores):
        step = row["denoise_step"]
        at = "" if step is None or step != step else f" @{int(step)}"
        rows.append({"place": f"{row['site'].replace('hook_', '')}{at}, {row['segment']}",
                     "label": _NAMES.get(row["label"], row["label"]), value: max(row[value], -1.0)})  # fmt: skip
    limits = (0.0, 1.0) if centre is None else (-1.0, 1.0)
    return heat_map(pd.DataFrame(rows), "place", "label", value, centre=centre, limits=limits, form="z.2f")


def _notes(recorded: Recorded, chosen: tuple[str, str]) -> list[str]:
    lost = [not won for won in recorded.rollouts.episodes["success"].to_pylist()]
    notes = [
        "Goals are scored on combinations of block and pad that the probe has not seen; intervals resample tasks. "
        "Instructions are a few fixed words, so that on language tokens any model, random weights too, tells them "
        "apart: what counts is the margin over that control. The place is chosen on half of the tasks and judged on "
        "the other half; the largest margin of all places is shown beside it, and is larger by that choice alone.",
        "While it acts, a policy shows its goal: which block it goes to, and carries. The image encoder, which is told "
        "nothing, is the control for that. Activations are means over tokens: which token stands out is not read.",
        "Accuracy below chance: where a task is left out, training has fewer examples of its block and its pad, so a "
        "probe that reads one of the two guesses the other worse than at random.",
        "A margin below 0 says that a control reads more, not that the model hides what it knows: in comparisons of "
        "language model and expert it counts as 0.",
        "Where a control reads a label nearly as well as anything could, at every place, no margin is left to show, "
        "and the rule is not judged. The adapter between language model and expert, where there is one, counts as the "
        "language model's; what is read without it stands beside it.",
        "Random weights see the same frames and the same noise; their expert's inputs at later denoise steps are their "
        "own. Rules are judged at the first denoise step, at which the expert's input holds nothing of the action yet.",
        "R² is within tasks: a probe that only tells tasks apart scores 0. Pictures end at -1.",
        f"Removals act on {' in '.join(chosen)} tokens, where taking the goal's directions out changes single plans "
        "most compared with random ones. Other layers may carry the goal past one site: hence the arms that act at all "
        "layers at once. Random directions that are stretched move tokens as far as the goal's, in root mean square "
        f"over the tokens of {_FRAMES} unedited plans; they are what the goal's are judged against. Episodes start "
        "from other seeds than those of the probes.",
        "A policy that fails has not lost its goal for that: it counts as pursuing another one where it lifts another "
        "block first, or does another goal and not its own.",
    ]
    if not FEWEST <= sum(lost) <= len(lost) - FEWEST:
        notes.append(
            f"{SUCCESS} was not probed: {sum(lost)} of {len(lost)} episodes failed, and an AUC needs {FEWEST} of each."
        )
    return notes
