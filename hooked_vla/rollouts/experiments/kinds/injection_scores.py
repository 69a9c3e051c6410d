"""Scores of paired episodes, scene by scene: what arms differ by, with intervals by task, and what settles a rule."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from hooked_vla.analysis.statistics import mcnemar
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import Normalize, Runs, cosine, mean_with_interval
from hooked_vla.rollouts.experiments.intervals import change_interval
from hooked_vla.rollouts.experiments.kinds.battery_runs import ALPHA
from hooked_vla.rollouts.experiments.kinds.injection_runs import rows_of, scene_of
from hooked_vla.rollouts.experiments.outcome import Verdict

Scores = Mapping[Scene, float]


def successes(runs: Runs, arm: str) -> dict[Scene, float]:
    """1 for every scene in which the arm succeeds, else 0."""
    won = runs.episodes["success"].tolist()
    return {scene_of(runs, row): float(won[row]) for row in rows_of(runs, arm)}


def first_cosines(
    runs: Runs, arm: str, other: Runs, partners: Mapping[Scene, int], layout: Any, normalize: Normalize
) -> dict[Scene, float]:
    """Cosine of the normalised actions of each episode's first chunk with those of a partner's, by scene.

    partners: rows of `other`. All arms plan their first chunk from the same state, and execute as much of it.
    """
    found = {}
    for row in rows_of(runs, arm):
        scene = scene_of(runs, row)
        theirs = partners[scene]
        pair = [each.actions[i][each.chunks[i] == 0] for each, i in ((runs, row), (other, theirs))]
        found[scene] = cosine(normalize(pair[0]), normalize(pair[1]), layout)
    return found


def mean_score(scores: Scores, seed: int) -> tuple[float, float, float]:
    """Mean with its 95 % interval by tasks, without scenes whose score is NaN."""
    known = {scene: score for scene, score in scores.items() if score == score}
    return mean_with_interval(list(known.values()), [scene.task for scene in known], seed)


def difference(first: Scores, second: Scores, seed: int) -> tuple[float, float, float]:
    """Mean of first less second over the scenes that both have, with its 95 % interval by tasks."""
    return mean_score({scene: first[scene] - second[scene] for scene in first if scene in second}, seed)


def share_difference(first: Scores, second: Scores, seed: int) -> tuple[float, float, float]:
    """`difference` of yes-or-no scores, whose interval is widened where all tasks agree (`change_interval`)."""
    both = [scene for scene in first if scene in second]
    return change_interval([first[scene] - second[scene] for scene in both], [scene.task for scene in both], seed=seed)


def share_restored(arm: Scores, null: Scores, base: Scores, seed: int) -> tuple[float, float, float]:
    """Of what the null prompt took, the part that an arm gives back: Σ(arm - null) / Σ(base - null), with its 95 %
    interval by tasks. Scenes with a score that is not known are left out; NaN where it took nothing."""
    known = [scene for scene in arm if np.isfinite([each[scene] for each in (arm, null, base)]).all()]
    pairs = np.array([[arm[scene] - null[scene], base[scene] - null[scene]] for scene in known]).reshape(-1, 2)
    if pairs[:, 1].sum() <= 0:
        return float("nan"), float("nan"), float("nan")
    return change_interval(pairs, [scene.task for scene in known], _part, seed)


def _part(means: Float64[np.ndarray, "draw column"]) -> Float64[np.ndarray, " draw"]:
    """The first column's mean as part of the second's, which is above 0 but for draws of tasks that lost nothing."""
    return means[:, 0] / np.maximum(means[:, 1], 1e-9)


def paired_p(first: Mapping[Scene, Any], second: Mapping[Scene, Any]) -> float:
    """McNemar's exact p-value of two yes-or-no scores in the scenes that both have; NaN where there is none."""
    both = [scene for scene in first if scene in second]
    if not both:
        return float("nan")
    return mcnemar([bool(first[scene]) for scene in both], [bool(second[scene]) for scene in both]).p_value


def settle(rule: str, passes: bool, p_values: Sequence[float], measured: str) -> Verdict:
    """The verdict on a rule whose numbers pass or do not. Where they pass, but a test against a control cannot tell
    them from chance, nothing is settled: there are too few episodes."""
    worst = float(np.max(p_values))
    if passes and not worst < ALPHA:
        return Verdict(rule, None, f"{measured}; the numbers pass, but too few episodes settle it (p = {worst:.2g})")
    return Verdict(rule, passes, f"{measured}; p {'<' if worst < 0.001 else '='} {max(worst, 0.001):.2g}")
