"""Scores of predictions, on all groups or on any choice of them: what a bootstrap by group resamples."""

from collections.abc import Hashable, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float64

Metric = Literal["r2", "accuracy", "auc"]
_N_RESAMPLES = 1000


class Marker:
    """Scores predictions on any choice of groups: groups weigh as often as they were chosen.

    Every metric is a ratio of sums over groups, [group output] or, for pairs of rows, [group group].
    """

    def __init__(
        self,
        metric: Metric,
        y: np.ndarray,
        predictions: np.ndarray,
        groups: Sequence[Hashable],
        within: Sequence[Hashable] | None,
    ) -> None:
        self.metric, self.y = metric, y
        names = {name: i for i, name in enumerate(dict.fromkeys(groups))}
        self.names, self.n = tuple(names), len(names)
        self.number = np.array([names[each] for each in groups])
        if metric == "r2":
            targets, found = y.reshape(len(y), -1), predictions.reshape(len(y), -1)
            self.above = self._sums(np.square(targets - found))
            self.below = self._sums(np.square(targets - _means(targets, within)))
            if flat := np.flatnonzero(self.below.sum(0) == 0).tolist():
                raise ValueError(f"outputs {flat} do not vary" + (" within the groups" if within is not None else ""))
        elif metric == "accuracy":
            self.above = self._sums(np.array(predictions == y, np.float64)[:, None])
            self.below = self._sums(np.ones((len(y), 1)))
        else:
            self._count_pairs(y == np.unique(y)[1], predictions)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        sums = np.zeros((self.n, values.shape[1]))
        np.add.at(sums, self.number, values)
        return sums

    def _count_pairs(self, second: np.ndarray, scores: np.ndarray) -> None:
        """above: how often a row of the second class in group i outscores one of the first in group j, ties half."""
        self.above = np.zeros((self.n, self.n))
        for j in range(self.n):
            others = np.sort(scores[(self.number == j) & ~second])
            wins = (np.searchsorted(others, scores, "left") + np.searchsorted(others, scores, "right")) / 2
            self.above[:, j] = self._sums(np.where(second, wins, 0.0)[:, None])[:, 0]
        counts = self._sums(np.stack([second, ~second], 1).astype(np.float64))
        self.below = np.outer(counts[:, 0], counts[:, 1])

    def scores(self, times: Float64[np.ndarray, "draw group"]) -> Float64[np.ndarray, " draw"]:
        """NaN where what was chosen has no score: one class, or no spread."""
        with np.errstate(invalid="ignore", divide="ignore"):
            if self.metric == "auc":
                pairs = (np.einsum("rg,gh,rh->r", times, each, times) for each in (self.above, self.below))
                return np.divide(*pairs)
            ratio = (times @ self.above) / (times @ self.below)
        return (1 - ratio if self.metric == "r2" else ratio).mean(1)

    @property
    def score(self) -> float:
        return float(self.scores(np.ones((1, self.n)))[0])

    @property
    def chance(self) -> float:
        if self.metric == "accuracy":
            return float(np.unique(self.y, return_counts=True)[1].max() / len(self.y))
        return 0.5 if self.metric == "auc" else 0.0

    def interval(self, seed: int) -> tuple[float, float]:
        """95 % by resampling whole groups; resamples without a score are left out."""
        drawn = np.random.default_rng(seed).multinomial(self.n, np.full(self.n, 1 / self.n), size=_N_RESAMPLES)
        low, high = np.nanquantile(self.scores(drawn.astype(np.float64)), [0.025, 0.975])
        return float(low), float(high)


def _means(y: np.ndarray, within: Sequence[Hashable] | None) -> np.ndarray:
    """The mean that each row is compared with."""
    if within is None:
        return y.mean(0, keepdims=True)
    names = list(dict.fromkeys(within))
    number = np.array([names.index(each) for each in within])
    sums = np.zeros((len(names), y.shape[1]))
    np.add.at(sums, number, y)
    return (sums / np.bincount(number)[:, None])[number]
