"""Linear probes: what can be read off activations, beside what can be read off without them.

A probe is scored on groups (tasks, episodes) of which it has seen nothing, and its score means little alone: the same
probe on shuffled labels (Hewitt & Liang 2019, arXiv 1909.03368), on a model of random weights, and on metadata such as
the time step says what reading off costs. Where probes stand for what a network uses, take their directions out
(`Subspace.project_out`) and see whether it behaves otherwise: being readable is not being used.

Ridge regression and logistic regression are scikit-learn's; it needs the `analysis` extra.
"""

import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Float, Float64
from numpy.typing import ArrayLike
from torch import Tensor

from hooked_vla.analysis.probes_marker import Marker, Metric
from hooked_vla.extras import needs_analysis_extra

with needs_analysis_extra():
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, RidgeCV
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

Kind = Literal["ridge", "logistic"]
Fold = tuple[np.ndarray, np.ndarray]
# strengths of ridge regression's penalty on standardised columns, of which generalised cross-validation chooses
ALPHAS = tuple(10.0**power for power in range(-1, 6))
_MOST_DRAWS = 100


@dataclass(frozen=True, eq=False)
class Probe:
    """A fitted probe, in the units of the activations: standardisation is undone.

    weights: one row for each output: a target of ridge regression, a class of logistic regression (of two classes, the
    second alone; of more, rows sum to zero, since only differences count). classes: of logistic regression, sorted.
    center: mean of the activations that it was fitted on.
    """

    kind: Kind
    weights: Float64[np.ndarray, "output d"]
    intercept: Float64[np.ndarray, " output"]
    center: Float64[np.ndarray, " d"]
    classes: tuple[Any, ...] = ()

    @property
    def directions(self) -> Float64[np.ndarray, "output d"]:
        """The rows of `weights`, each of length 1: along them the probe's outputs grow fastest.

        Raises ValueError for an output that does not depend on the activations.
        """
        lengths = np.linalg.norm(self.weights, axis=1, keepdims=True)
        if not lengths.all():
            raise ValueError(f"outputs {np.flatnonzero(lengths == 0).tolist()} of the probe depend on no direction")
        return self.weights / lengths

    def outputs(self, x: Float[np.ndarray, "n d"] | Float[Tensor, "n d"]) -> Float64[np.ndarray, "n output"]:
        """Values of the targets, or scores of the classes before the softmax."""
        return np.asarray(x, np.float64) @ self.weights.T + self.intercept

    def predict(self, x: Float[np.ndarray, "n d"] | Float[Tensor, "n d"]) -> np.ndarray:
        """Targets [n output], or each row's class [n]."""
        outputs = self.outputs(x)
        if self.kind == "ridge":
            return outputs
        chosen = (outputs[:, 0] > 0).astype(int) if len(self.classes) == 2 else outputs.argmax(1)
        return np.array(self.classes, dtype=object)[chosen]


@dataclass(frozen=True, eq=False)
class ProbeScore:
    """How well a kind of probe reads labels off activations of groups that it was not fitted on.

    score, with low and high, its 95 % interval by a bootstrap of whole groups. chance: the score of the constant that
    fits best: 0 (r2), 0.5 (auc), the share of the commonest class (accuracy). predictions: each row's, by the probe
    that had not seen its group; of `auc`, the score of the second class. marker: what scores any choice of groups.
    """

    metric: Metric
    score: float
    low: float
    high: float
    chance: float
    n: int
    n_groups: int
    n_folds: int
    predictions: np.ndarray
    marker: Marker = field(repr=False)


@dataclass(frozen=True, eq=False)
class Controlled:
    """A probe's score beside its controls. shuffles: scores on shuffled labels, one a draw; baselines: scores on other
    features of the same rows, by name."""

    probe: ProbeScore
    shuffles: tuple[ProbeScore, ...]
    baselines: Mapping[str, ProbeScore]

    @property
    def shuffled(self) -> float:
        """Mean score on shuffled labels."""
        return float(np.mean([each.score for each in self.shuffles]))

    @property
    def shuffled_high(self) -> float:
        """Largest score on shuffled labels."""
        return float(np.max([each.score for each in self.shuffles]))

    @property
    def selectivity(self) -> float:
        """Score minus that on shuffled labels (Hewitt & Liang 2019)."""
        return self.probe.score - self.shuffled

    @property
    def margin(self) -> float:
        """Score minus the best control's, shuffled labels included."""
        return self.probe.score - max([self.shuffled, *(each.score for each in self.baselines.values())])

    def margins(self, times: Float64[np.ndarray, "draw group"]) -> Float64[np.ndarray, " draw"]:
        """The margin on choices of groups, each counted so many times (`probe.marker.names` is their order): the score
        there minus the largest of the controls' there. NaN where one of them has no score on a choice."""
        shuffled = np.mean([each.marker.scores(times) for each in self.shuffles], axis=0)
        controls = [shuffled, *(each.marker.scores(times) for each in self.baselines.values())]
        return self.probe.marker.scores(times) - np.max(controls, axis=0)


def grouped_folds(
    groups: Sequence[Hashable], n_folds: int | None = None, classes: ArrayLike | None = None
) -> list[Fold]:
    """(training rows, test rows) of each fold; the rows of a group are all in one of the two.

    n_folds: groups are dealt into so many folds of about equal size; None: one fold for each group. classes: of the
    rows; where a fold of that size would have a class to itself, groups are dealt so that folds have equal shares of
    the classes (StratifiedGroupKFold of scikit-learn). The same groups and classes give the same folds.
    Raises ValueError for fewer than two groups, or more folds than groups.
    """
    names = list(dict.fromkeys(groups))
    n = len(names) if n_folds is None else n_folds
    if len(names) < 2:
        raise ValueError(f"a probe is scored on groups that it has not seen: that needs at least 2, got {names}")
    if not 2 <= n <= len(names):
        raise ValueError(f"{n} folds of {len(names)} groups: there must be at least 2, and no more than groups")
    number = np.array([names.index(each) for each in groups])
    folds = [(train, test) for train, test in GroupKFold(n).split(number, groups=number)]
    if n_folds is None or classes is None or _all_learnable(np.asarray(classes), folds):
        return folds
    return [(train, test) for train, test in StratifiedGroupKFold(n).split(number, classes, groups=number)]


def fit_probe(x: Any, y: ArrayLike, kind: Kind, c: float = 1.0) -> Probe:
    """A probe on all rows. x: [n d]; y: numbers [n] or [n output] (ridge), labels [n] (logistic).

    Columns are standardised for the fit. Ridge regression's penalty is chosen among ALPHAS by generalised
    cross-validation on these rows; logistic regression's is 1 / c.
    Raises ValueError for NaN or infinite numbers, labels that are all the same, lengths that differ, an unknown kind.
    """
    x, y = _checked(x, y, kind)
    center, spread = x.mean(0), x.std(0)
    spread[spread == 0] = 1.0
    z = (x - center) / spread
    # scikit-learn has no types
    fitted: Any
    if kind == "ridge":
        fitted = RidgeCV(alphas=ALPHAS).fit(z, y)
        raw, offset, classes = np.atleast_2d(fitted.coef_), np.atleast_1d(fitted.intercept_), ()
    else:
        fitted = _fit_logistic(z, y, c)
        raw, offset, classes = fitted.coef_, fitted.intercept_, tuple(fitted.classes_.tolist())
        if len(classes) > 2:
            # the softmax does not see what all classes share
            raw, offset = raw - raw.mean(0), offset - offset.mean()
    weights = raw / spread
    return Probe(kind, weights, offset - weights @ center, center, classes)


def score_probe(
    x: Any,
    y: ArrayLike,
    groups: Sequence[Hashable],
    kind: Kind,
    metric: Metric | None = None,
    n_folds: int | None = None,
    within: Sequence[Hashable] | None = None,
    c: float = 1.0,
    seed: int = 0,
    folds: Sequence[Fold] | None = None,
) -> ProbeScore:
    """Score of a kind of probe on groups that each probe has not seen (leave-group-out, or `n_folds` of groups).

    metric: r2 (ridge; the mean over outputs), accuracy or auc (logistic; of two classes); None: the kind's first.
    within: rows whose means `r2` compares with: a probe that only tells, say, tasks apart then scores 0, not the share
    of the spread that is between tasks. Standardisation and penalty are fitted on a fold's training rows alone.
    folds: in place of those that `grouped_folds` makes, n_folds or one a group.
    Raises as `fit_probe` and `grouped_folds`, and ValueError for a class that one fold alone has (nothing is left to
    learn it from), numbers that do not vary, or a metric that is not the kind's.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of probe {kind!r}; kinds: {list(get_args(Kind))}")
    chosen: Metric = metric or ("r2" if kind == "ridge" else "accuracy")
    if chosen not in get_args(Metric) or (chosen == "r2") != (kind == "ridge"):
        raise ValueError(f"{kind} probes are not scored by {chosen!r}: ridge by r2, logistic by accuracy or auc")
    x, y = _checked(x, y, kind)
    for name, given in (("groups", groups), ("within", within)):
        if given is not None and len(given) != len(x):
            raise ValueError(f"{len(x)} rows, but {name} has {len(given)}")
    if chosen == "auc" and len(np.unique(y)) != 2:
        raise ValueError(f"auc is of two classes, got {np.unique(y).tolist()}")
    folds = _folds(y, groups, kind, n_folds) if folds is None else folds
    predictions = np.empty(y.shape if chosen == "r2" else len(y), object if chosen == "accuracy" else np.float64)
    for train, test in folds:
        if kind == "logistic":
            _check_classes(y, train, test, groups)
        probe = fit_probe(x[train], y[train], kind, c)
        found = probe.outputs(x[test])[:, 0] if chosen == "auc" else probe.predict(x[test])
        predictions[test] = found.reshape(predictions[test].shape)
    marker = Marker(chosen, y, predictions, groups, within)
    low, high = marker.interval(seed)
    return ProbeScore(
        chosen, marker.score, low, high, marker.chance, len(y), marker.n, len(folds), predictions, marker
    )  # fmt: skip


def score_with_controls(
    x: Any,
    y: ArrayLike,
    groups: Sequence[Hashable],
    kind: Kind,
    metric: Metric | None = None,
    baselines: Mapping[str, Any] | None = None,
    units: Sequence[Hashable] | None = None,
    n_shuffles: int = 3,
    n_folds: int | None = None,
    within: Sequence[Hashable] | None = None,
    c: float = 1.0,
    seed: int = 0,
) -> Controlled:
    """`score_probe` beside its controls, all on the same rows and folds.

    baselines: other features [n d] of the same rows by name: activations of a model with random weights,
    `metadata_features`. units: see `shuffle_labels`; n_shuffles: how often labels are shuffled.
    Raises as `score_probe`.
    """
    options: Any = {"kind": kind, "metric": metric, "n_folds": n_folds, "within": within, "c": c, "seed": seed}
    probe = score_probe(x, y, groups, **options)
    options["folds"] = folds = _folds(y, groups, kind, n_folds)
    drawn = [
        score_probe(x, _learnable(y, folds, kind, (seed, i), units), groups, **options)
        for i in range(max(n_shuffles, 1))
    ]
    scored = {name: score_probe(other, y, groups, **options) for name, other in (baselines or {}).items()}
    return Controlled(probe, tuple(drawn), scored)


def shuffle_labels(y: ArrayLike, seed: int | Sequence[int], units: Sequence[Hashable] | None = None) -> np.ndarray:
    """The labels in another order. units: rows that keep one label in common (episodes, for what holds of a whole
    episode): then whole units change labels, and what is shuffled is as smooth in time as what is not.

    Raises ValueError for units with several labels, or another number of them than of labels.
    """
    y, rng = np.asarray(y), np.random.default_rng(seed)
    if units is None:
        return y[rng.permutation(len(y))]
    if len(units) != len(y):
        raise ValueError(f"{len(y)} labels, but {len(units)} units")
    names = list(dict.fromkeys(units))
    number = np.array([names.index(each) for each in units])
    firsts = np.array([int(np.argmax(number == i)) for i in range(len(names))])
    if not (y == y[firsts][number]).all():
        at = int(np.argmax(np.atleast_1d(y != y[firsts][number]).reshape(len(y), -1).any(1)))
        raise ValueError(f"unit {units[at]!r} has several labels: units share one label, else shuffle rows")
    return y[firsts[rng.permutation(len(names))]][number]


def _folds(y: ArrayLike, groups: Sequence[Hashable], kind: Kind, n_folds: int | None) -> list[Fold]:
    """`grouped_folds`, which for classes look at them."""
    return grouped_folds(groups, n_folds, y if kind == "logistic" else None)


def _learnable(
    y: ArrayLike, folds: Sequence[Fold], kind: Kind, seed: tuple[int, int], units: Sequence[Hashable] | None
) -> np.ndarray:
    """Shuffled labels of which every fold can learn all classes, as it can of the true ones: drawn again until so."""
    tries = (shuffle_labels(y, (*seed, attempt), units) for attempt in range(_MOST_DRAWS))
    learnable = (labels for labels in tries if kind == "ridge" or _all_learnable(labels, folds))
    return next(learnable, shuffle_labels(y, seed, units))


def _all_learnable(y: np.ndarray, folds: Sequence[Fold]) -> bool:
    """Whether every class of a fold's test rows is among its training rows."""
    return all(set(y[test].tolist()) <= set(y[train].tolist()) for train, test in folds)


def metadata_features(columns: Mapping[str, ArrayLike]) -> Float64[np.ndarray, "n d"]:
    """Features that say what is known without looking: numbers as themselves and their squares, everything else as
    one column a value. columns: such as the environment step, the episode's task.

    Raises ValueError for no columns, lengths that differ, or numbers that are not finite.
    """
    parts: list[np.ndarray] = []
    for name, values in columns.items():
        column = np.asarray(values)
        if column.ndim != 1 or (parts and len(column) != len(parts[0])):
            raise ValueError(f"metadata column {name!r} has shape {list(column.shape)}: one value for each row")
        if column.dtype.kind in "iuf":
            if not np.isfinite(column).all():
                raise ValueError(f"metadata column {name!r} has numbers that are not finite")
            parts.append(np.stack([column, column.astype(np.float64) ** 2], axis=1))
        else:
            kinds = list(dict.fromkeys(column.tolist()))
            parts.append(np.array([[value == each for each in kinds] for value in column.tolist()]))
    if not parts:
        raise ValueError("metadata needs at least one column")
    return np.concatenate([part.astype(np.float64) for part in parts], axis=1)


def _fit_logistic(x: np.ndarray, y: np.ndarray, c: float) -> LogisticRegression:
    """Stops after 300 iterations: on separable classes more of them only make weights longer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return LogisticRegression(C=c, max_iter=300).fit(x, y)


def _check_classes(y: np.ndarray, train: np.ndarray, test: np.ndarray, groups: Sequence[Hashable]) -> None:
    if unseen := sorted(set(y[test].tolist()) - set(y[train].tolist()), key=str):
        names = list(dict.fromkeys(groups[i] for i in test if y[i] in unseen))
        raise ValueError(
            f"classes {unseen} are in the groups {names} alone: left out for testing, nothing is left to learn them "
            "from; group rows by what does not decide the class"
        )


def _checked(x: Any, y: ArrayLike, kind: str) -> tuple[np.ndarray, np.ndarray]:
    if kind not in get_args(Kind):
        raise ValueError(f"unknown kind of probe {kind!r}; kinds: {list(get_args(Kind))}")
    features = np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, np.float64)
    labels = np.asarray(y.detach().cpu() if isinstance(y, Tensor) else y)
    if features.ndim != 2 or len(features) != len(labels):
        raise ValueError(f"x must be [n d] with one label a row, got {list(features.shape)} and {list(labels.shape)}")
    if bad := np.flatnonzero(~np.isfinite(features).all(1)).tolist():
        raise ValueError(f"x has NaN or infinite numbers in {len(bad)} of {len(features)} rows, first {bad[:5]}")
    if kind == "ridge":
        if labels.dtype.kind not in "biuf" or labels.ndim not in (1, 2):
            raise ValueError(f"ridge probes read numbers [n] or [n output], got {labels.dtype} {list(labels.shape)}")
        labels = labels.astype(np.float64)
        if not np.isfinite(labels).all():
            raise ValueError("y has NaN or infinite numbers")
        if flat := np.flatnonzero(np.ptp(labels.reshape(len(labels), -1), axis=0) == 0).tolist():
            raise ValueError(f"y is constant in outputs {flat}: there is nothing to read")
    elif labels.ndim != 1:
        raise ValueError(f"logistic probes read one label a row, got shape {list(labels.shape)}")
    elif labels.dtype.kind == "f" and not np.isfinite(labels).all():
        raise ValueError("y has NaN or infinite numbers")
    elif len(set(labels.tolist())) < 2:
        raise ValueError(f"all labels are {labels.tolist()[0] if len(labels) else 'missing'!r}: nothing to tell apart")
    return features, labels
