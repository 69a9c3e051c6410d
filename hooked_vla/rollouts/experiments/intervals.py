"""Intervals that decide rules: of changes of success, of statistics over several arms, and what one says of a limit.

Episodes of one task resemble each other, so whole tasks are resampled. Where all of them changed alike a bootstrap
knows no spread, and would call three episodes as sure as three hundred: such an interval is widened to what so many
episodes, none of which differs, can rule out.
"""

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from hooked_vla.analysis.statistics import wilson_interval

_RESAMPLES = 10_000
_ENDS = (0.025, 0.975)
Statistic = Callable[[Float64[np.ndarray, "draw column"]], Float64[np.ndarray, " draw"]]
UNDECIDED = "undecided: the interval has the limit in it, or there is none"


def mean_over_columns(means: Float64[np.ndarray, "draw column"]) -> Float64[np.ndarray, " draw"]:
    """The statistic "mean over arms"."""
    return means.mean(1)


def interval_of(
    columns: ArrayLike, clusters: Sequence[Hashable], statistic: Statistic = mean_over_columns, seed: int = 0
) -> tuple[float, float, float]:
    """A statistic of column means, and its 95 % percentile interval, resampling whole clusters with all their rows.

    columns: [episode column], or [episode]: what was measured of the same episodes, side by side, so that differences
    and ratios are paired. clusters: each row's. NaN without rows; NaN ends where there is one cluster only, and where
    the statistic of a resample is not defined.
    Raises ValueError for numbers that are not finite, or another number of clusters than rows.
    """
    values = np.asarray(columns, np.float64)
    values = values[:, None] if values.ndim == 1 else values
    if len(values) != len(clusters) or not np.isfinite(values).all():
        raise ValueError(f"{list(values.shape)} finite numbers need as many clusters as rows, got {len(clusters)}")
    if not len(values):
        return float("nan"), float("nan"), float("nan")
    estimate = float(statistic(values.mean(0, keepdims=True))[0])
    names = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(names) < 2:
        return estimate, float("nan"), float("nan")
    number = np.array([names[each] for each in clusters])
    sums = np.zeros((len(names), values.shape[1]))
    np.add.at(sums, number, values)
    times = np.random.default_rng(seed).multinomial(len(names), np.full(len(names), 1 / len(names)), size=_RESAMPLES)
    means = (times @ sums) / (times @ np.bincount(number))[:, None]
    low, high = np.quantile(statistic(means), _ENDS)
    return estimate, float(low), float(high)


def change_interval(
    changes: ArrayLike, tasks: Sequence[Hashable], statistic: Statistic = mean_over_columns, seed: int = 0
) -> tuple[float, float, float]:
    """`interval_of` changes of success, each in -1..1; where resampling tasks shows no spread, it is widened.

    All n episodes behaved alike then, and Wilson's interval of n of n says what share of others could still be missed:
    so far the interval reaches to either side, within -1..1.
    """
    estimate, low, high = interval_of(changes, tasks, statistic, seed)
    if high - low > 1e-12 or np.isnan(low):
        return estimate, low, high
    missed = 1 - wilson_interval(len(tasks), len(tasks))[0]
    return estimate, max(-1.0, estimate - missed), min(1.0, estimate + missed)


def decide(low: float, high: float, limit: float, below: bool) -> bool | None:
    """Whether a quantity is below a limit (below False: at or above it), by its interval; None where the interval has
    the limit in it, or is not known."""
    if not (high < limit or low >= limit):
        return None
    return (high < limit) == below


def undecided(holds: bool | None) -> str:
    """What a verdict by `decide` adds to what was measured."""
    return f"; {UNDECIDED}" if holds is None else ""
