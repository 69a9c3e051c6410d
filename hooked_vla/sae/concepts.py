"""Features that tell what the simulator knew: steps with a label against those without it.

    d          Cohen's: (mean with - mean without) / pooled standard deviation, over steps, zeros included
    frequency  share of the steps with the label in which the feature is active
    score      d × frequency (Action Atlas, arXiv 2603.19233)
    within     d inside of tasks: differences of means within each task that has both kinds of steps, weighted with
               n₊·n₋ / n, over the standard deviation within tasks and kinds

A label that goes with the task (its target, say) is told by any feature of the task: only `within` speaks of the label
itself, and where no task has both kinds the concept is said to be confounded. Features are chosen by their score on
some seeds, and all numbers are given again on the others. How large the best of all features' scores becomes by chance
is found by turning the labels of each episode by a random number of steps, which keeps how long labels and features
last; labels that are the same for a whole episode are exchanged between episodes instead.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int64
from numpy.typing import ArrayLike

from hooked_vla.sae.feature_steps import FeatureSteps

# a medium effect (Cohen 1988, Statistical Power Analysis, section 2.2), asked for on held-out seeds, within tasks too
MEDIUM = 0.5
# steps of each kind that a comparison needs at least
MIN_STEPS = 10
# a difference without any spread is no larger than so many standard deviations
_LARGEST = 1e6
Label = str | None


@dataclass(frozen=True, eq=False)
class Scores:
    """Of every feature; see the head of this file. n_tasks: that have both kinds of steps; without, within is NaN."""

    d: Float64[np.ndarray, " m"]
    frequency: Float64[np.ndarray, " m"]
    within: Float64[np.ndarray, " m"]
    n_tasks: int

    @property
    def score(self) -> Float64[np.ndarray, " m"]:
        return self.d * self.frequency


@dataclass(frozen=True)
class FeatureScore:
    """One feature's numbers for a concept, on one set of seeds."""

    d: float
    frequency: float
    score: float
    within: float


@dataclass(frozen=True)
class ConceptFeature:
    """A feature that was chosen for a concept. held_out: its numbers on seeds that it was not chosen on. p_value: how
    often the best of all features scores as high with labels moved at random."""

    feature: int
    chosen: FeatureScore
    held_out: FeatureScore
    p_value: float

    @property
    def is_confirmed(self) -> bool:
        """Whether held-out steps show at least a medium effect, over all and within tasks."""
        # NaN, where no task has both kinds of steps, is not
        return self.held_out.d >= MEDIUM and self.held_out.within >= MEDIUM


@dataclass(frozen=True)
class Concept:
    """A label's value, as in phase = "grasp". steps, held_out_steps: with it, on the seeds of either kind. n_tasks:
    that have steps with and without it, on the held-out seeds. features: the best first."""

    kind: str
    value: str
    steps: int
    held_out_steps: int
    n_tasks: int
    features: tuple[ConceptFeature, ...]

    @property
    def is_confounded(self) -> bool:
        """Whether it goes with the task, so that no feature can be told from one of the task."""
        return not self.n_tasks

    def __str__(self) -> str:
        return f"{self.kind}={self.value}"

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("kind", "value", "steps", "held_out_steps", "n_tasks")}
        features = [
            {"feature": each.feature, "p_value": each.p_value, "is_confirmed": each.is_confirmed,
             "chosen": _plain(each.chosen), "held_out": _plain(each.held_out)} for each in self.features
        ]  # fmt: skip
        return found | {"is_confounded": self.is_confounded, "features": features}


def _plain(score: FeatureScore) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if np.isnan(value) else value for name, value in asdict(score).items()}


def contrast(
    steps: FeatureSteps,
    positive: Bool[np.ndarray, " n"],
    negative: Bool[np.ndarray, " n"],
    tasks: Sequence[str],
    min_steps: int = MIN_STEPS,
) -> Scores:
    """Every feature on steps with a label against steps without it; what is neither does not count.

    min_steps: of each kind that a task needs for `within`. Raises ValueError for arrays of other lengths, steps of both
    kinds, and fewer than two of one kind.
    """
    _, task = np.unique(np.asarray(tasks, dtype=object).astype(str), return_inverse=True)
    if not len(positive) == len(negative) == len(task) == steps.n_steps:
        raise ValueError(f"{steps.n_steps} steps, but {len(positive)}, {len(negative)} and {len(task)} of labels")
    if (positive & negative).any():
        raise ValueError(f"{int((positive & negative).sum())} steps are both with and without the label")
    if positive.sum() < 2 or negative.sum() < 2:
        raise ValueError(f"two steps of each kind are needed, got {int(positive.sum())} and {int(negative.sum())}")
    with_it, without = _Sums.of(steps, positive), _Sums.of(steps, negative)
    spread = np.sqrt((with_it.squares + without.squares) / (with_it.n + without.n - 2))
    parts = []
    for number in range(int(task.max()) + 1):
        here = task == number
        if min((here & positive).sum(), (here & negative).sum()) >= max(min_steps, 1):
            parts.append((_Sums.of(steps, here & positive), _Sums.of(steps, here & negative)))
    within = np.full(steps.n_features, np.nan)
    freedom = sum(a.n + b.n - 2 for a, b in parts)
    if parts and freedom > 0:
        weights = np.array([a.n * b.n / (a.n + b.n) for a, b in parts])
        gaps = np.stack([a.mean - b.mean for a, b in parts])
        inside = np.sqrt(sum(a.squares + b.squares for a, b in parts) / freedom)
        within = _over(weights @ gaps / weights.sum(), inside)
    return Scores(_over(with_it.mean - without.mean, spread), with_it.active / with_it.n, within, len(parts))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Of some steps, by feature. squares: of distances from the mean; active: steps above 0."""

    n: int
    mean: Float64[np.ndarray, " m"]
    squares: Float64[np.ndarray, " m"]
    active: Int64[np.ndarray, " m"]

    @classmethod
    def of(cls, steps: FeatureSteps, chosen: Bool[np.ndarray, " n"]) -> "_Sums":
        here = chosen[steps.row]
        feature, value, m = steps.feature[here], steps.value[here].astype(np.float64), steps.n_features
        n, active = int(chosen.sum()), np.bincount(feature, minlength=m)
        mean = np.bincount(feature, value, m) / n
        # steps at 0 are as far from the mean as the mean is large
        squares = np.bincount(feature, (value - mean[feature]) ** 2, m) + (n - active) * mean**2
        return cls(n, mean, squares, active)


def _over(gap: np.ndarray, spread: np.ndarray) -> np.ndarray:
    return gap / np.maximum(spread, np.maximum(np.abs(gap) / _LARGEST, np.finfo(np.float64).tiny))


def find_concepts(
    steps: FeatureSteps,
    labels: Mapping[str, Sequence[Label]],
    tasks: Sequence[str],
    seeds: ArrayLike,
    top: int = 10,
    held_out: float = 0.3,
    n_shuffles: int = 20,
    seed: int = 0,
    min_steps: int = MIN_STEPS,
) -> list[Concept]:
    """The best features of every value of every kind of label, in the order in which these first come.

    labels: kind -> one value a step, None where there is none; a value is compared with all others of its kind. tasks:
    of every step; seeds: of its episode, whole seeds being held out (a share of `held_out` of them, drawn from `seed`).
    Values with fewer than min_steps steps, with or without, on seeds of either kind are left out.
    Raises ValueError for no labels, lengths other than that of steps, fewer than two seeds, and a share outside 0..1.
    """
    if not labels:
        raise ValueError("no labels to look for")
    if not 0 < held_out < 1 or top < 1 or n_shuffles < 1:
        raise ValueError(f"held_out must be in 0..1, top and n_shuffles at least 1: {held_out}, {top}, {n_shuffles}")
    numbers = np.asarray(seeds)
    for name, each in {**labels, "tasks": tasks, "seeds": numbers}.items():
        if len(each) != steps.n_steps:
            raise ValueError(f"{name}: {len(each)} for {steps.n_steps} steps")
    away = held_out_steps(numbers, held_out, seed)
    halves = [(steps.chosen(here), here) for here in (~away, away)]
    task_of = np.asarray(tasks, dtype=object)
    found = []
    for kind, given in labels.items():
        values = np.asarray(given, dtype=object)
        for value in dict.fromkeys(each for each in given if each is not None):
            positive = values == value
            negative = np.array([each is not None for each in given]) & ~positive
            kinds = [(positive[here], negative[here]) for _, here in halves]
            if min(int(each.sum()) for pair in kinds for each in pair) < max(min_steps, 2):
                continue
            scores = [
                contrast(half, *pair, task_of[here].tolist(), min_steps)
                for (half, here), pair in zip(halves, kinds, strict=True)
            ]
            chances = _best_by_chance(halves[0][0], *kinds[0], n_shuffles, seed)
            found.append(_concept(kind, str(value), scores, kinds, chances, top))
    return found


def held_out_steps(seeds: ArrayLike, share: float, seed: int) -> Bool[np.ndarray, " n"]:
    """Steps of the seeds that are held out: at least one seed, and never all. Raises ValueError for a single seed."""
    numbers = np.asarray(seeds)
    there = np.unique(numbers)
    if len(there) < 2:
        raise ValueError(f"some seeds are held out, so two are needed, got {there.tolist()}")
    n = min(max(1, round(share * len(there))), len(there) - 1)
    return np.isin(numbers, np.random.default_rng(seed).permutation(there)[:n])


def _concept(
    kind: str, value: str, scores: Sequence[Scores], kinds: Sequence[tuple[np.ndarray, np.ndarray]],
    chances: np.ndarray, top: int,
) -> Concept:  # fmt: skip
    first, second = scores
    best = np.argsort(-first.score, kind="stable")[:top].tolist()
    features = tuple(
        ConceptFeature(
            int(each), _of(first, each), _of(second, each),
            float((1 + (chances >= first.score[each]).sum()) / (1 + len(chances))),
        )
        for each in best if first.score[each] > 0
    )  # fmt: skip
    return Concept(kind, value, int(kinds[0][0].sum()), int(kinds[1][0].sum()), second.n_tasks, features)


def _of(scores: Scores, feature: int) -> FeatureScore:
    return FeatureScore(
        float(scores.d[feature]), float(scores.frequency[feature]), float(scores.score[feature]),
        float(scores.within[feature]),
    )  # fmt: skip


def _best_by_chance(
    steps: FeatureSteps, positive: np.ndarray, negative: np.ndarray, n_shuffles: int, seed: int
) -> Float64[np.ndarray, " shuffle"]:
    """The highest score of all features, with labels moved."""
    rng, found = np.random.default_rng(seed), []
    kind = np.where(positive, 1, np.where(negative, -1, 0))
    ends = np.cumsum(steps.lengths)
    starts = ends - steps.lengths
    constant = all((kind[a:b] == kind[a]).all() for a, b in zip(starts, ends, strict=True))
    nowhere = [""] * steps.n_steps
    for _ in range(n_shuffles):
        if constant:
            moved = np.repeat(rng.permutation(kind[starts]), steps.lengths)
        else:
            moved = np.concatenate([np.roll(kind[a:b], rng.integers(b - a)) for a, b in zip(starts, ends, strict=True)])
        if min((moved == 1).sum(), (moved == -1).sum()) < 2:
            # episodes of other lengths took all steps of one kind
            continue
        # one task: only the score over all is asked for
        found.append(float(contrast(steps, moved == 1, moved == -1, nowhere).score.max()))
    return np.array(found)


def directions(
    motion: Float64[np.ndarray, "n axis"], still: float, names: Sequence[str] = ("x", "y", "z")
) -> list[str]:
    """In words where something moves: "+x", "-z", ..., by the axis along which it moves most; "still" for less than
    that along all. names: of the axes. Raises ValueError for another number of axes."""
    if motion.ndim != 2 or motion.shape[1] != len(names):
        raise ValueError(f"motion must be [n {len(names)}], got {list(motion.shape)}")
    axis = np.abs(motion).argmax(1)
    along = motion[np.arange(len(motion)), axis]
    return [
        "still" if abs(value) < still else f"{'+' if value > 0 else '-'}{names[i]}"
        for i, value in zip(axis.tolist(), along.tolist(), strict=True)
    ]
