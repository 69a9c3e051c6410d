"""Whether a feature is general or memorised: DrVLA's metric, which looks at how it comes and goes over episodes.

For every feature (arXiv 2603.19183), an episode being active where the feature is ever above 0:

    coverage      share of the episodes that are active
    onsets        how often it begins, mean over active episodes: it is on from above `on` until it is 0 again
    magnitude     its maximum, mean over active episodes
    run_length    steps in which it is on, over onsets and over the episode's length; mean over episodes with an onset

P(general) = σ(w·(coverage, onsets, magnitude, run_length) + intercept); general where that is 1/2 or more.

The published coefficients were fitted on 30 labels each, to codes of tokens that were scaled to length 1 (`token_norm`,
preset `drvla`) at the steps of a data set: for other codes, magnitude and `on` are in other units. `fit` takes labels
of one's own. The metric follows frequency closely, so that stands beside it, and a null in which steps are shuffled
over all episodes tells what frequency alone would give.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike

from hooked_vla.sae.feature_steps import FeatureSteps

STATISTICS = ("coverage", "onsets", "magnitude", "run_length")
# where a feature is on, of codes of tokens of length 1 (arXiv 2603.19183)
ON = 0.1
_ITERATIONS, _CLOSE = 100, 1e-10


@dataclass(frozen=True, eq=False)
class EpisodeStatistics:
    """By feature; see the head of this file. Where no episode is active (has an onset), the means are 0.

    frequency: share of all steps in which it is active. active: episodes. n_episodes: that there are.
    """

    coverage: Float64[np.ndarray, " m"]
    onsets: Float64[np.ndarray, " m"]
    magnitude: Float64[np.ndarray, " m"]
    run_length: Float64[np.ndarray, " m"]
    frequency: Float64[np.ndarray, " m"]
    active: Int64[np.ndarray, " m"]
    n_episodes: int

    @property
    def matrix(self) -> Float64[np.ndarray, "m 4"]:
        """The four, in the order of STATISTICS."""
        return np.stack([getattr(self, name) for name in STATISTICS], 1)

    @property
    def alive(self) -> Bool[np.ndarray, " m"]:
        """Features that are active in some episode."""
        return self.active > 0


def episode_statistics(steps: FeatureSteps, on: float = ON) -> EpisodeStatistics:
    """The statistics of every feature. on: above which it begins, in the units of the codes.

    Raises ValueError for a threshold below 0.
    """
    if not on >= 0:
        raise ValueError(f"on must be 0 or more, got {on}")
    m, n_episodes, lengths = steps.n_features, len(steps.lengths), steps.lengths
    if not len(steps.row):
        none = np.zeros(m)
        return EpisodeStatistics(none, none, none, none, none, np.zeros(m, np.int64), n_episodes)
    episode = steps.place[steps.row]
    # maximum of each feature in each of its episodes; entries are sorted by both
    starts = np.flatnonzero(_changes(steps.feature) | _changes(episode))
    owner, where = steps.feature[starts], episode[starts]
    highest = np.maximum.reduceat(steps.value.astype(np.float64), starts)
    active = np.bincount(owner, minlength=m)
    # stretches without a step at 0, which are on from the first step above the threshold to their end
    apart = _changes(steps.feature) | _changes(episode) | (np.diff(steps.row, prepend=-2) != 1)
    begins = np.flatnonzero(apart)
    ends = np.append(begins[1:], len(apart)) - 1
    first = np.minimum.reduceat(np.where(steps.value > on, steps.row, steps.n_steps), begins)
    length = np.maximum(steps.row[ends] - first + 1, 0)
    pair = np.searchsorted(starts, begins, side="right") - 1
    onsets = np.bincount(pair, length > 0, len(starts))
    lasted = np.bincount(pair, length, len(starts))
    relative = lasted / np.maximum(onsets, 1) / lengths[where]
    with_onset = np.bincount(owner, onsets > 0, m)
    return EpisodeStatistics(
        coverage=active / n_episodes,
        onsets=np.bincount(owner, onsets, m) / np.maximum(active, 1),
        magnitude=np.bincount(owner, highest, m) / np.maximum(active, 1),
        run_length=np.bincount(owner, relative, m) / np.maximum(with_onset, 1),
        frequency=steps.frequency,
        active=active,
        n_episodes=n_episodes,
    )


def _changes(sorted_numbers: Int64[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """Where another number than before begins."""
    return np.diff(sorted_numbers, prepend=sorted_numbers[0] - 1) != 0


@dataclass(frozen=True)
class Generality:
    """The logistic model. weights: of STATISTICS. fitted: on how many labels; accuracy: share of them that it tells,
    and left_out: share that models of all other labels do; NaN for published ones."""

    weights: tuple[float, float, float, float]
    intercept: float
    fitted: int = 30
    accuracy: float = float("nan")
    left_out: float = float("nan")

    def probability(self, statistics: EpisodeStatistics) -> Float64[np.ndarray, " m"]:
        """P(general) of every feature; NaN for one that is never active."""
        z = statistics.matrix @ np.array(self.weights) + self.intercept
        return np.where(statistics.alive, _sigmoid(z), np.nan)

    def to_json(self) -> dict[str, Any]:
        return {"weights": dict(zip(STATISTICS, self.weights, strict=True)), "intercept": self.intercept,
                "fitted": self.fitted}  # fmt: skip


# arXiv 2603.19183, π0.5 fine-tuned on each
PUBLISHED = {
    "libero": Generality((1.8009, 1.8858, 0.5164, -0.3611), -4.2030),
    "droid": Generality((2.3559, 0.7409, 0.3487, -1.0443), -1.7825),
}


def fit(statistics: EpisodeStatistics, features: Sequence[int], general: ArrayLike, penalty: float = 1.0) -> Generality:
    """The model of one's own labels: general[i] says whether feature features[i] is.

    Maximum likelihood with penalty / 2 times the squared weights (the intercept goes free), by Newton's method; without
    a penalty, labels that a plane separates would have no finite weights.
    Raises ValueError for a penalty that is not positive, labels of one kind only, one feature twice, and features that
    are not there or never active.
    """
    labels = np.asarray(general)
    chosen = np.asarray(features, np.int64)
    if labels.dtype != np.bool_ or labels.shape != chosen.shape or labels.ndim != 1:
        raise ValueError(f"general must be one boolean a feature, got {labels.dtype} {list(labels.shape)}")
    if not penalty > 0:
        raise ValueError(f"penalty must be positive, got {penalty}")
    m = len(statistics.coverage)
    if len(np.unique(chosen)) < len(chosen) or not ((chosen >= 0) & (chosen < m)).all():
        raise ValueError(f"features must be different numbers in 0..{m - 1}, got {chosen.tolist()}")
    if dead := chosen[~statistics.alive[chosen]].tolist():
        raise ValueError(f"features {dead} are never active: there is nothing to tell them by")
    if labels.all() or not labels.any():
        raise ValueError(f"labels of both kinds are needed, got {len(labels)} of one")
    x = np.column_stack([statistics.matrix[chosen], np.ones(len(chosen))])
    weights = _logistic(x, labels, penalty)
    right = [
        (x[i] @ _logistic(np.delete(x, i, 0), np.delete(labels, i), penalty) >= 0) == labels[i]
        for i in range(len(labels))
    ]
    a, b, c, d, intercept = weights.tolist()
    return Generality(
        (a, b, c, d), intercept, len(labels), float(((x @ weights >= 0) == labels).mean()), float(np.mean(right))
    )


def _logistic(x: np.ndarray, labels: np.ndarray, penalty: float) -> np.ndarray:
    """Weights of the columns, of which the last is the constant and goes unpenalised."""
    ridge = np.full(x.shape[1], penalty)
    ridge[-1] = 0.0
    if labels.all() or not labels.any():
        # of one kind: the constant alone would grow for ever
        ridge[-1] = penalty
    weights = np.zeros(x.shape[1])
    for _ in range(_ITERATIONS):
        p = _sigmoid(x @ weights)
        slope = x.T @ (p - labels) + ridge * weights
        curvature = (x * (p * (1 - p))[:, None]).T @ x + np.diag(ridge)
        step = np.linalg.solve(curvature, slope)
        # far from the optimum a whole step may overshoot
        weights = weights - step * min(1.0, 5.0 / max(float(np.abs(step).max()), 1e-300))
        if float(np.abs(step).max()) < _CLOSE:
            return weights
    raise ValueError(f"the fit did not settle in {_ITERATIONS} steps; a larger penalty than {penalty} helps")


def _sigmoid(z: np.ndarray) -> np.ndarray:
    # both halves without overflow
    small = np.exp(-np.abs(z))
    return np.where(z >= 0, 1 / (1 + small), small / (1 + small))


@dataclass(frozen=True, eq=False)
class GeneralityReport:
    """The metric beside what might explain it.

    statistics, probability: by feature. null: P(general), mean over shuffles. p_value: share of shuffles (and the
    observed one) in which it is no larger than observed: small for a feature that is rarer in episodes than steps that
    know of none would be. general, general_null: share of the features that are ever active that are general, and the
    mean of that in the shuffles. frequency_correlation: Spearman's, of P(general) and frequency; NaN where either is
    the same for all.
    """

    statistics: EpisodeStatistics
    probability: Float64[np.ndarray, " m"]
    null: Float64[np.ndarray, " m"]
    p_value: Float64[np.ndarray, " m"]
    general: float
    general_null: float
    frequency_correlation: float
    n_shuffles: int


def generality(
    steps: FeatureSteps, model: Generality, on: float = ON, n_shuffles: int = 20, seed: int = 0
) -> GeneralityReport:
    """The metric of every feature, its correlation with frequency, and its null. model: one of PUBLISHED, or a `fit`.

    Raises ValueError where no feature is ever active, for fewer than one shuffle, and as `episode_statistics`.
    """
    if n_shuffles < 1:
        raise ValueError(f"n_shuffles must be at least 1, got {n_shuffles}")
    statistics = episode_statistics(steps, on)
    if not statistics.alive.any():
        raise ValueError(f"none of {steps.n_features} features is ever active")
    observed, alive = model.probability(statistics), statistics.alive
    total, lower, shares = np.zeros(steps.n_features), np.ones(steps.n_features), []
    rng = np.random.default_rng(seed)
    for _ in range(n_shuffles):
        shuffled = model.probability(episode_statistics(steps.shuffled(rng), on))
        total += shuffled
        lower += shuffled <= observed
        shares.append(float((shuffled[alive] >= 0.5).mean()))
    return GeneralityReport(
        statistics, observed, total / n_shuffles, np.where(alive, lower / (n_shuffles + 1), np.nan),
        float((observed[alive] >= 0.5).mean()), float(np.mean(shares)),
        _rank_correlation(observed[alive], statistics.frequency[alive]), n_shuffles,
    )  # fmt: skip


def _rank_correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's: Pearson's of ranks, equal numbers having their mean rank."""
    ranks = [_ranks(each) for each in (a, b)]
    if any(each.std() == 0 for each in ranks):
        return float("nan")
    return float(np.corrcoef(np.stack(ranks))[0, 1])


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
