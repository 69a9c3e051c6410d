"""Statistics of paired episodes: intervals, tests and corrections, each seeded where it draws.

Episodes are paired by scene and noise, so success is compared by McNemar's test; episodes of one task resemble each
other, so means are resampled by whole tasks. What SciPy offers is taken from there; it needs the `analysis` extra.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64
from numpy.typing import ArrayLike

from hooked_vla.extras import needs_analysis_extra

# resamples at once, so that memory stays below some tens of megabytes
_AT_ONCE = 1000


def wilson_interval(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Score interval of a share: p with |p̂ - p| ≤ z √(p (1 - p) / n) (Wilson 1927, J. Am. Stat. Assoc. 22:209).

    Raises ValueError for n below 1, successes outside 0..n, or a confidence outside 0..1.
    """
    if n < 1 or not 0 <= successes <= n or not 0 < confidence < 1:
        raise ValueError(f"no interval for {successes} successes of {n} at confidence {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # exact at the ends, where the sum leaves a rounding error
    return (0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half)


@dataclass(frozen=True)
class McNemar:
    """A test of two shares of the same episodes. only_first, only_second: episodes in which one alone succeeded."""

    only_first: int
    only_second: int
    p_value: float


def mcnemar(first: ArrayLike, second: ArrayLike, method: Literal["exact", "mid-p"] = "exact") -> McNemar:
    """Whether two conditions succeed equally often, from the episodes in which they differ (McNemar 1947).

    first, second: success of the same episodes, [episode] booleans. Two-sided. exact: binomial, never too small.
    mid-p: half of the observed table's probability is left out, which is less conservative and keeps the level in
    practice (Fagerland, Lydersen & Laake 2013, BMC Med. Res. Methodol. 13:91). Where no episode differs, p is 1.
    Raises ValueError for arrays that are not booleans of one length, none at all, or another method.
    """
    if method not in ("exact", "mid-p"):
        raise ValueError(f"unknown method {method!r} of McNemar's test; methods: exact, mid-p")
    a, b = _outcomes("first", first), _outcomes("second", second)
    if len(a) != len(b):
        raise ValueError(f"McNemar's test compares the same episodes: got {len(a)} and {len(b)} outcomes")
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    n = only_a + only_b
    if not n:
        return McNemar(0, 0, 1.0)
    with needs_analysis_extra():
        from scipy.stats import binom, binomtest
    if method == "exact":
        return McNemar(only_a, only_b, float(binomtest(only_a, n, 0.5).pvalue))
    fewer = min(only_a, only_b)
    p = 2 * binom.cdf(fewer, n, 0.5) - binom.pmf(fewer, n, 0.5)
    return McNemar(only_a, only_b, float(min(p, 1.0)))


@dataclass(frozen=True)
class Bootstrap:
    """A mean with its interval. n_clusters: what was resampled; few (below about 10) make an interval too narrow."""

    estimate: float
    low: float
    high: float
    n_clusters: int


def cluster_bootstrap(
    values: ArrayLike,
    clusters: Sequence[Hashable],
    n_resamples: int = 10_000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Bootstrap:
    """Percentile interval of the mean of `values` [episode], resampling whole clusters with replacement.

    clusters: each value's, such as its task. The mean is over episodes, so larger clusters weigh more. Resampling the
    outer level alone keeps what episodes of a cluster share (Davison & Hinkley 1997, section 3.8). The same seed gives
    the same interval.
    Raises ValueError for values that are not finite, as many clusters as values, fewer than two clusters (there is
    nothing to resample), or a confidence outside 0..1.
    """
    numbers = _numbers("values", values)
    if len(clusters) != len(numbers):
        raise ValueError(f"{len(numbers)} values, but {len(clusters)} clusters: each value needs its own")
    if not 0 < confidence < 1 or n_resamples < 1:
        raise ValueError(f"no interval from {n_resamples} resamples at confidence {confidence}")
    index = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    if len(index) < 2:
        raise ValueError(f"a bootstrap by cluster needs at least 2 clusters, got {list(index)}")
    number = np.array([index[name] for name in clusters])
    sums, counts = np.bincount(number, numbers), np.bincount(number)
    rng = np.random.default_rng(seed)
    means = []
    for start in range(0, n_resamples, _AT_ONCE):
        drawn = rng.integers(len(index), size=(min(_AT_ONCE, n_resamples - start), len(index)))
        means.append(sums[drawn].sum(1) / counts[drawn].sum(1))
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Bootstrap(float(numbers.mean()), float(low), float(high), len(index))


def holm(p_values: ArrayLike) -> Float64[np.ndarray, " test"]:
    """p-values of several tests, adjusted so that comparing each with α keeps the chance of any false alarm below α
    (Holm 1979, Scand. J. Stat. 6:65): the i-th smallest of m, counting from 0, times m - i, but never below those of
    smaller ones.

    A NaN stands for a test that was not made: it stays NaN, and does not count.
    Raises ValueError for values outside 0..1.
    """
    p = np.asarray(p_values, np.float64)
    made = ~np.isnan(p)
    if p.ndim != 1 or not ((p[made] >= 0) & (p[made] <= 1)).all():
        raise ValueError(f"p-values are a list of numbers in 0..1, got {p_values!r}")
    order = np.argsort(p[made], kind="stable")
    scaled = p[made][order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1.0)
    result = np.full(p.shape, np.nan)
    result[made] = adjusted
    return result


def paired_permutation(first: ArrayLike, second: ArrayLike, n_resamples: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of the mean difference of pairs under random exchange within each pair.

    first, second: numbers [episode] of the same episodes. All 2^n exchanges are made where those are no more than
    n_resamples, else so many random ones (and the observed one), from the seed.
    Raises ValueError for arrays of different lengths, fewer than two pairs, or numbers that are not finite.
    """
    a, b = _numbers("first", first), _numbers("second", second)
    if len(a) != len(b) or len(a) < 2:
        raise ValueError(f"a paired test needs 2 pairs or more, got {len(a)} and {len(b)} numbers")
    with needs_analysis_extra():
        from scipy.stats import permutation_test

    def mean_difference(x: np.ndarray, y: np.ndarray, axis: int) -> Any:
        return (x - y).mean(axis=axis)

    rng = np.random.default_rng(seed)
    done = permutation_test(
        (a, b), mean_difference, permutation_type="samples", vectorized=True, n_resamples=n_resamples, rng=rng
    )
    return float(done.pvalue)


def _outcomes(name: str, values: ArrayLike) -> np.ndarray:
    outcomes = np.asarray(values)
    if outcomes.dtype != np.bool_ or outcomes.ndim != 1 or not len(outcomes):
        raise ValueError(f"{name}: success is one boolean an episode, got {outcomes.dtype} {list(outcomes.shape)}")
    return outcomes


def _numbers(name: str, values: ArrayLike) -> Float64[np.ndarray, " episode"]:
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError(f"{name} must be finite numbers, one an episode, got shape {list(numbers.shape)}: {numbers}")
    return numbers
