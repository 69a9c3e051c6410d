"""Probes: what can be read off a policy's activations while it acts, where, and whether the policy depends on it.

Activations are those of unedited episodes, recorded as the policy planned; a model of random weights is shown the very
same frames. Goals are then taken out along their probes' directions in closed loop, beside random directions.
"""

from dataclasses import dataclass
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.rollouts.activations import ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import RERUN, action_normalizer, compare, join, layout_of, read_runs, rerun
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map, success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    gate_note,
    limited,
    points,
    records,
    settings_in,
    threshold,
)
from hooked_vla.rollouts.experiments.kinds.probes_removal import (
    ANOTHER_ALL,
    GOAL_ALL,
    RANDOM_ALL,
    choose_removal,
    fit_removals,
    removal_arms,
    removal_effects,
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

VLM, EXPERT = "vlm", "expert"
# what is between the language model and the expert belongs to neither claim
_VLM_SIDE = (VLM, "adapter")
_FRAMES = 32
_NAMES = {"block": "goal: block", "pad": "goal: pad"}


@dataclass(frozen=True)
class Settings:
    """episodes: unedited ones whose plans are probed. removal_episodes: of each arm of the removal. sites: globs of
    what is probed. n_folds: of tasks. n_shuffles: how often labels are shuffled. max_steps: after which an episode has
    failed."""

    episodes: int
    removal_episodes: int
    suite: str = "goal"
    sites: tuple[str, ...] = (
        "vision.*.hook_resid_post",
        "vlm.hook_tokens",
        "vlm.blocks.*.hook_resid_post",
        "adapter.blocks.*.hook_resid_post",
        "expert.hook_tokens",
        "expert.blocks.*.hook_resid_post",
    )
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
    scores = context.table(
        "scores",
        lambda: score_everything(
            context.model, recorded.own, recorded.other, recorded.labels, recorded.steps, settings.n_folds,
            settings.n_shuffles, context.seed,
        ),
    )  # fmt: skip
    effects, removal, chosen = _remove(context, settings, recorded)
    best = _best(scores)
    shown = success_bars(removal, reference=BASELINE.name)
    return Outcome(
        main=pd.DataFrame(best),
        verdicts=[
            *_goal_verdicts(context, best, _best(scores, "margin")),
            *_dynamics_verdicts(context, best),
            _chance_verdict(context, best),
            _removal_verdict(context, settings, removal),
        ],
        tables={"removal": removal, "removal_effects": effects, "scores": scores},
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
    sites = probe_sites(context.model, settings.sites)
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
) -> tuple[pd.DataFrame, pd.DataFrame, tuple[str, str]]:
    """Effects of removals on single plans, the comparison in closed loop, and where the latter took things out."""
    options = limited(context, settings.max_steps)
    removals = fit_removals(context.model, recorded.own, recorded.labels, context.seed)
    frames = choose_frames(read_frames(context.folder("frames")), _FRAMES, context.seed)
    prepared = settings_in(context, settings.suite, options)
    effects = context.table("effects", lambda: removal_effects(context.model, prepared, frames, removals))
    chosen = choose_removal(effects)
    arms = [BASELINE, *removal_arms(removals, chosen)]
    done = context.rollouts("removal", settings.suite, arms, settings.removal_episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.removal_episodes, options=options)
    table = compare(
        join(read_runs(done), read_runs(again, {BASELINE.name: RERUN})), layout_of(settings.suite),
        action_normalizer(context.model), seed=context.seed,
    )  # fmt: skip
    goals = goal_table(done, far_donors(settings.suite))
    goals["right_block"] = [row["first_lifted"] == row["task"].partition("-")[0] for row in records(goals)]
    extra = []
    for row in records(table):
        mine = goals.loc[goals["arm"] == row["arm"]]
        names = ("lifted", "right_block")
        extra.append({n: share(mine, n)[n] if len(mine) else float("nan") for n in names})
    return effects, pd.concat([table, pd.DataFrame(extra)], axis=1), chosen


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


def _top(best: list[dict[str, Any]], label: str, side: tuple[str, ...], by: str = "score") -> dict[str, Any] | None:
    """The best row of a label on one side. Of the expert, before anything was denoised: at later steps its own input
    is nearly the action that is to be read."""
    rows = [row for row in best if row["label"] == label and row["pathway"] in side]
    rows = [row for row in rows if not hook_names.is_denoised(row["site"]) or row["denoise_step"] == 0]
    return max(rows, key=lambda row: row[by]) if rows else None


def _said(row: dict[str, Any]) -> str:
    return (
        f"{row['label']} {row['score']:.2f} at {row['site']} ({row['segment']}), best control {row['best_control']} "
        f"{row['score'] - row['margin']:.2f}"
    )


def _goal_verdicts(context: Context, best: list[dict[str, Any]], ahead: list[dict[str, Any]]) -> list[Verdict]:
    """Whether the goal is read from the language model, beyond controls (where it is furthest ahead of them) and beyond
    the expert (where each reads it best)."""
    above, over = "goal-in-vlm", "goal-vlm-over-expert"
    furthest = [row for row in (_top(ahead, goal, _VLM_SIDE, "margin") for goal in GOAL) if row is not None]
    vlm = [_top(best, goal, _VLM_SIDE) for goal in GOAL]
    expert = [_top(best, goal, (EXPERT,)) for goal in GOAL]
    theirs = [row for row in vlm if row is not None]
    if len(theirs) < len(GOAL):
        return [Verdict(rule, None, "no language model was probed") for rule in (above, over)]
    margin = min(row["margin"] for row in furthest)
    found = [Verdict(above, margin >= threshold(context, above), "; ".join(map(_said, furthest)))]
    mine = [row for row in expert if row is not None]
    if len(mine) < len(GOAL):
        return [*found, Verdict(over, None, "no expert was probed")]
    means = [sum(row["score"] for row in rows) / len(GOAL) for rows in (theirs, mine)]
    said = f"mean accuracy of block and pad: language model {means[0]:.2f}, expert {means[1]:.2f} (first denoise step)"
    return [*found, Verdict(over, means[0] - means[1] >= threshold(context, over), said)]


def _dynamics_verdicts(context: Context, best: list[dict[str, Any]]) -> list[Verdict]:
    """Whether end effector and next action are read better from the expert than from the language model."""
    found = []
    for rule, label in (("state-in-expert", STATE), ("action-in-expert", ACTION)):
        vlm, expert = _top(best, label, _VLM_SIDE), _top(best, label, (EXPERT,))
        if vlm is None or expert is None:
            found.append(Verdict(rule, None, "language model or expert was not probed"))
            continue
        ahead = expert["score"] - vlm["score"]
        found.append(Verdict(rule, ahead >= threshold(context, rule), f"{_said(expert)}; {_said(vlm)}"))
    return found


def _chance_verdict(context: Context, best: list[dict[str, Any]]) -> Verdict:
    """Whether shuffled labels score chance where probes score best."""
    rule = "shuffled-at-chance"
    off = {f"{row['label']} at {row['site']}": row["shuffled"] - row["chance"] for row in best}
    worst = max(off, key=lambda name: off[name])
    return Verdict(rule, off[worst] <= threshold(context, rule), f"most above chance: {worst}, by {off[worst]:.2f}")


def _removal_verdict(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    rule = "removal"
    if why := gate_note(table, settings.suite):
        return Verdict(rule, None, why)
    change = {row["arm"]: row["difference"] for row in records(table)}
    right = {row["arm"]: row["right_block"] for row in records(table)}
    random = min(change[RANDOM_ALL], change[ANOTHER_ALL])
    said = (
        f"{GOAL_ALL}: {points(change[GOAL_ALL])}, random: {points(change[RANDOM_ALL])}, {points(change[ANOTHER_ALL])}"
    )
    return Verdict(
        rule,
        random - change[GOAL_ALL] >= threshold(context, rule),
        f"{said}; the right block is lifted first in {right[GOAL_ALL]:.0%}, in the baseline in "
        f"{right[BASELINE.name]:.0%}",
    )


def _map(scores: pd.DataFrame, value: str, centre: float | None) -> Any:
    """Heat map of places by labels."""
    rows = []
    for row in records(scores):
        step = row["denoise_step"]
        at = "" if step is None or step != step else f" @{int(step)}"
        rows.append({"place": f"{row['site'].replace('hook_', '')}{at}, {row['segment']}",
                     "label": _NAMES.get(row["label"], row["label"]), value: max(row[value], -1.0)})  # fmt: skip
    limits = (0.0, 1.0) if centre is None else (-1.0, 1.0)
    return heat_map(pd.DataFrame(rows), "place", "label", value, centre=centre, limits=limits, form=".2f")


def _notes(recorded: Recorded, chosen: tuple[str, str]) -> list[str]:
    lost = [not won for won in recorded.rollouts.episodes["success"].to_pylist()]
    notes = [
        "Goals are scored on combinations of block and pad that the probe has not seen; intervals resample tasks. "
        "Instructions are a few fixed words, so that on language tokens any model, random weights too, tells them "
        "apart: what counts is the margin over that control. It is judged where it is largest, of all places probed.",
        "While it acts, a policy shows its goal: which block it goes to, and carries. The image encoder, which is told "
        "nothing, is the control for that. Activations are means over tokens: which token stands out is not read.",
        "Accuracy below chance: where a task is left out, training has fewer examples of its block and its pad, so a "
        "probe that reads one of the two guesses the other worse than at random.",
        "Random weights see the same frames and the same noise; their expert's inputs at later denoise steps are their "
        "own. Rules are judged at the first denoise step, at which the expert's input holds nothing of the action yet.",
        "R² is within tasks: a probe that only tells tasks apart scores 0. Pictures end at -1.",
        f"Removals act on {' in '.join(chosen)} tokens, where taking the goal's directions out changes single plans "
        "most compared with random ones. Other layers may carry the goal past one site: hence the arms that act at all "
        "layers at once.",
    ]
    if not FEWEST <= sum(lost) <= len(lost) - FEWEST:
        notes.append(
            f"{SUCCESS} was not probed: {sum(lost)} of {len(lost)} episodes failed, and an AUC needs {FEWEST} of each."
        )
    return notes
