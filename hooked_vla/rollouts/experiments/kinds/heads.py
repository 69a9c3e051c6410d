"""Discrete against continuous actions: which policy's success falls faster when its activations are worse by as much?

Two policies act in the same scenes, under the same plan: the run's model, whose actions are continuous, and another one
that says them as tokens. In both, at the same relative depth of the language model, activations get noise that leaves a
given share of their variance, or are replaced by autoencoders of growing k; the tokens that a policy has already said,
which run through the same blocks again, get the same. Each policy is compared with itself unedited.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.names import layer
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import GATE, Runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, undecided
from hooked_vla.rollouts.experiments.kinds.autoencoders import SAESettings, autoencoders
from hooked_vla.rollouts.experiments.kinds.battery_runs import compare_suites, limited, records, run_suite, threshold
from hooked_vla.rollouts.experiments.kinds.heads_arms import JointArm, NoiseArm, level_sizes, measured
from hooked_vla.rollouts.experiments.kinds.heads_figures import heads_figures
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.manifest import describe_model
from hooked_vla.rollouts.matched_noise import STEP
from hooked_vla.rollouts.sae.loop_arms import LoopArm

with needs_analysis_extra():
    import pandas as pd

NOISE, SAE = "noise", "autoencoder"
CONTINUOUS, DISCRETE = "continuous", "discrete"
STREAM, AGAIN = "vlm", "decode"
# points of the common range of explained variances at which the curves are compared
_POINTS = 21
_RULES = {NOISE: "noise", SAE: "autoencoders"}


@dataclass(frozen=True, kw_only=True)
class Settings(SAESettings):
    """episodes: of each arm and model. discrete: the policy that says its actions as tokens. depth: of the block whose
    output is changed, from 0, the language model's first, to 1, its last. levels: explained variances that noise is to
    leave. ks: features a token of the autoencoders, one each, which are trained in the run; none: no autoencoders.
    n_action_steps: environment steps from plan to plan, in both models. lasts: how long a direction of noise does,
    "step" or "episode". max_steps: after which an episode has failed."""

    episodes: int
    discrete: str
    depth: float
    levels: tuple[float, ...]
    ks: tuple[int, ...] = ()
    n_action_steps: int = 1
    lasts: str = STEP
    max_steps: int = 96

    def __post_init__(self) -> None:
        """Raises ValueError for a depth outside 0..1, levels that are not below 1 or come twice, and sites, which
        follow from the depth."""
        super().__post_init__()
        if self.sites:
            raise ValueError(f"sites follow from depth in both models, got {list(self.sites)}")
        if not 0 <= self.depth <= 1:
            raise ValueError(f"depth must be in 0..1, got {self.depth}")
        if len(set(self.levels)) < len(self.levels) or not all(level < 1 for level in self.levels):
            raise ValueError(f"levels must be different numbers below 1, got {list(self.levels)}")


@dataclass(frozen=True, eq=False)
class Half:
    """One model's part. head: CONTINUOUS or DISCRETE; table: of its arms; runs: its episodes; saes: tables of its
    autoencoders."""

    head: str
    model: str
    sites: Sequence[str]
    table: pd.DataFrame
    runs: Runs
    saes: Sequence[pd.DataFrame]

    @property
    def baseline(self) -> float:
        return next(float(row["success"]) for row in records(self.table) if row["arm"] == BASELINE.name)


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError where the run's model says tokens or the other one does not, and for models without blocks in
    the language model; FileNotFoundError for another model that there is not."""
    source = replace(context.source, name=settings.discrete)
    other = replace(context, source=source, out=context.out / DISCRETE)
    halves = [_half(context, settings, CONTINUOUS), _half(other, settings, DISCRETE)]
    table = pd.concat([half.table for half in halves], ignore_index=True)
    gaps = pd.DataFrame([row for kind in (NOISE, SAE) for row in gap(halves, kind, settings.suite, context.seed)])
    saes = [part.assign(model=half.model) for half in halves for part in half.saes]
    return Outcome(
        main=table,
        verdicts=[_verdict(context, halves, gaps, kind) for kind in (NOISE, SAE)],
        tables={
            "models": _models((context, other), halves), "gaps": gaps,
            **({"coders": pd.concat(saes, ignore_index=True)} if saes else {}),
        },
        figures=heads_figures(table),
        labels=[f"floor effect: {half.model} succeeds in {half.baseline:.0%} of its unedited episodes; what is taken "
                "from that is not judged" for half in halves if half.baseline < GATE],
        notes=_notes(settings, halves),
    )  # fmt: skip


def _models(contexts: Sequence[Context], halves: Sequence[Half]) -> pd.DataFrame:
    """Which two models were compared, and where they are changed."""
    return pd.DataFrame([
        {"model": half.model, "head": half.head, "sites": ", ".join(half.sites), "baseline": half.baseline,
         "family": each.model.spec.family, "weights": str(describe_model(half.model, each.model)["weights"])[:12]}
        for each, half in zip(contexts, halves, strict=True)
    ])  # fmt: skip


def _half(context: Context, settings: Settings, head: str) -> Half:
    sites = _sites(context, settings, head)
    options = replace(limited(context, settings.max_steps), n_action_steps=settings.n_action_steps)
    sizes = level_sizes(context, settings.suite, sites, settings.levels, settings.lasts, options, settings.episodes)
    arms: list[JointArm] = []
    levels: dict[str, float] = {}
    for level in settings.levels:
        name = f"{NOISE} {level:g}"
        parts = [NoiseArm(f"{name}: {site}", site, sizes[site][level], settings.lasts) for site in sites]
        arms.append(JointArm(name, tuple(parts)))
        levels[name] = level
    saes = []
    for k in settings.ks:
        label = f"k{k}"
        changes, stored = {"k": k}, "saes"
        made, told = autoencoders(context, sites, settings, label=label, changes=changes, stored=stored)
        saes.append(told)
        parts = [LoopArm(f"{SAE} {label}: {sae.config.site}", sae, "token") for sae in made]
        arms.append(JointArm(f"{SAE} {label}", tuple(parts)))
    runs = run_suite(context, settings.suite, arms, settings.episodes, options)
    found = measured(context, settings.suite, arms, options, settings.episodes)
    table = _table(context, settings, head, arms, runs, sites, found)
    return Half(head, context.model_name, sites, table, runs, saes)


def _sites(context: Context, settings: Settings, head: str) -> list[str]:
    """The block's output in the language model and, where tokens that were said run through it again, there."""
    points = context.model.points
    says = any(name.startswith(f"{AGAIN}.") for name in points)
    if says != (head == DISCRETE):
        raise ValueError(
            f"{context.model_name} {'says its actions as tokens' if says else 'has continuous actions'}; a model with "
            f"{head} actions was expected here"
        )
    blocks = [name for name in points if name.startswith(f"{STREAM}.blocks.") and name.endswith("hook_resid_post")]
    if not blocks:
        raise ValueError(f"{context.model_name} has no blocks in a pathway {STREAM!r}")
    site = blocks[round(settings.depth * (len(blocks) - 1))]
    if not context.model.hook_points[site].reaches_action:
        raise ValueError(f"no action of {context.model_name} depends on {site}: choose a smaller depth")
    return [site, *([site.replace(STREAM, AGAIN, 1)] if says else [])]


def _table(
    context: Context, settings: Settings, head: str, arms: Sequence[JointArm], runs: Runs, sites: Sequence[str],
    found: Mapping[str, Sequence[Mapping[str, Any]]],
) -> pd.DataFrame:  # fmt: skip
    """The standard comparison with the model's own baseline. explained_variance: at the first site, the language
    model's; said_explained: of the tokens that run again; ratio: what is left of the baseline's success."""
    parts = {arm.name: arm for arm in arms}
    rows = []
    for row in records(compare_suites(context, [runs])):
        arm, each = parts.get(row["arm"]), found.get(row["arm"], ())
        base = row["baseline_success"]
        rows.append({
            "model": context.model_name, "head": head, "site": sites[0], "block": layer(sites[0]),
            "kind": "" if arm is None else NOISE if isinstance(arm.parts[0], NoiseArm) else SAE, "arm": row["arm"],
            "explained_variance": each[0]["explained_variance"] if each else np.nan,
            "fvu": each[0]["fvu"] if each else np.nan,
            "said_explained": each[1]["explained_variance"] if len(each) > 1 else np.nan,
            "ratio": row["success"] / base if base else np.nan,
            **{name: value for name, value in row.items() if name != "arm"},
        })  # fmt: skip
    return pd.DataFrame(rows)


def _curve(half: Half, kind: str, suite: str) -> tuple[np.ndarray, np.ndarray, list[tuple[str, int]]]:
    """Explained variance of every arm of a kind, ascending, and success of each scene under it, [scene arm]; the
    unedited policy, which explains all, is the last."""
    rows = sorted(
        (row for row in records(half.table) if row["kind"] == kind), key=lambda row: row["explained_variance"]
    )
    table = half.runs.episodes[half.runs.episodes["suite"] == suite]
    keys = zip(table["arm"], table["task"], table["seed"], table["success"], strict=True)
    won = {(arm, task, seed): float(success) for arm, task, seed, success in keys}
    scenes = [(task, seed) for arm, task, seed in won if arm == BASELINE.name]
    names = [*(row["arm"] for row in rows), BASELINE.name]
    x = np.array([*(row["explained_variance"] for row in rows), 1.0])
    return x, np.array([[won[name, *scene] for name in names] for scene in scenes]), scenes


def gap(halves: Sequence[Half], kind: str, suite: str, seed: int) -> list[dict[str, Any]]:
    """How much more the discrete policy keeps of its baseline's success than the continuous one, on the mean over the
    explained variances that both have, with its 95 % interval by tasks; nothing where they have none in common.

    Success between two arms' explained variances is interpolated, scene by scene.
    """
    curves = [_curve(half, kind, suite) for half in halves]
    low, high = max(x[0] for x, _, _ in curves), 1.0
    if any(len(x) < 2 for x, _, _ in curves) or not low < high:
        return []
    if curves[0][2] != curves[1][2]:
        raise ValueError("the two models did not act in the same scenes")
    grid = np.linspace(low, high, _POINTS)
    # per scene: mean success along the curve, and unedited success, of either model
    columns = [each for x, won, _ in curves for each in (_along(x, won, grid), won[:, -1])]
    tasks = [task for task, _ in curves[0][2]]

    def statistic(means: np.ndarray) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.nan_to_num(means[:, 2] / means[:, 3]) - np.nan_to_num(means[:, 0] / means[:, 1])

    values = np.stack(columns, 1)
    estimate, below, above = change_interval(values, tasks, statistic, seed)
    kept = [float(values[:, i].mean() / max(values[:, i + 1].mean(), 1e-12)) for i in (0, 2)]
    return [{"kind": kind, "from": low, "to": high, CONTINUOUS: kept[0], DISCRETE: kept[1], "difference": estimate,
             "low": below, "high": above}]  # fmt: skip


def _along(x: np.ndarray, won: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Each scene's mean success along a curve."""
    return np.array([np.interp(grid, x, scene).mean() for scene in won])


def _verdict(context: Context, halves: Sequence[Half], gaps: pd.DataFrame, kind: str) -> Verdict:
    rule = _RULES[kind]
    weak = [f"{half.model} succeeds in {half.baseline:.0%} by itself" for half in halves if half.baseline < GATE]
    found = [row for row in records(gaps) if row["kind"] == kind]
    said = "; ".join(
        f"with explained variances of {row['from']:.2f} to {row['to']:.0f}, {halves[0].model} keeps "
        f"{row[CONTINUOUS]:.0%} of its success and {halves[1].model} {row[DISCRETE]:.0%}, a difference of "
        f"{100 * row['difference']:+.0f} points ({100 * row['low']:+.0f} to {100 * row['high']:+.0f})" for row in found
    )  # fmt: skip
    if weak:
        return Verdict(rule, None, f"{', '.join(weak)}: a floor effect, not judged. {said}".strip())
    if not found:
        return Verdict(rule, None, "the two have no range of explained variances in common")
    [row] = found
    holds = decide(row["low"], row["high"], -threshold(context, rule), below=True)
    return Verdict(rule, holds, said + undecided(holds))


def _notes(settings: Settings, halves: Sequence[Half]) -> list[str]:
    names = " and ".join(half.model for half in halves)
    return [
        f"{names} differ in more than their heads: in how many actions a plan has, in what attention may see, in "
        "inputs and in training. A difference between them is not the head's alone.",
        f"Plans are made anew after n_action_steps = {settings.n_action_steps} in both, so that both meet as many "
        "draws of noise.",
        f"Noise is in proportion to each token's length, in a direction that lasts one {settings.lasts}; how much "
        "variance it leaves is measured on the unedited policy's tokens, apart for those that run again.",
        "Autoencoders are each model's own, of the same preset and numbers of features a token; what they miss has "
        "structure, and differs between models in more than size.",
    ] + _said_notes(halves)


def _said_notes(halves: Sequence[Half]) -> list[str]:
    """What is explained of the tokens that a policy has said, beside that of those before them, where policies are
    matched."""
    notes = []
    for half in halves:
        for kind in (NOISE, SAE):
            rows = [row for row in records(half.table) if row["kind"] == kind and row["said_explained"] > -np.inf]
            if rows:
                at, said = (
                    f"{min(row[name] for row in rows):.2f} to {max(row[name] for row in rows):.2f}"
                    for name in ("explained_variance", "said_explained")
                )
                notes.append(
                    f"{half.model}, {kind}: of the tokens that it has said, which run through the block again, {said} "
                    f"is explained; policies are matched by what is explained before that, {at}. Where the former is "
                    "more, its actions are changed less than the match says, and a smaller loss speaks for that too."
                )
    return notes
