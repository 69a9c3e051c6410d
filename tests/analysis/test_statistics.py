"""Statistics against published tables, statsmodels and SciPy."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from hooked_vla.analysis.statistics import (
    cluster_bootstrap,
    holm,
    mcnemar,
    paired_permutation,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "n", "interval"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_intervals_are_the_published_ones(successes: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(successes, n) == pytest.approx(interval, abs=5e-5)
    low, high = interval
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


@pytest.mark.parametrize(("successes", "n"), [(0, 5), (3, 7), (36, 36), (17, 48)])
def test_wilson_intervals_are_those_of_statsmodels(successes: int, n: int) -> None:
    for confidence in (0.8, 0.95):
        expected = proportion_confint(successes, n, alpha=1 - confidence, method="wilson")
        assert wilson_interval(successes, n, confidence) == pytest.approx(expected, abs=1e-12)


def test_a_wider_confidence_gives_a_wider_interval_and_the_ends_are_exact() -> None:
    narrow, wide = wilson_interval(7, 10, 0.5), wilson_interval(7, 10, 0.99)
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]
    assert wilson_interval(0, 3)[0] == 0.0 and wilson_interval(3, 3)[1] == 1.0


@pytest.mark.parametrize("arguments", [(0, 0), (3, 2), (-1, 2), (1, 2, 1.0)])
def test_shares_of_nothing_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(*arguments)


def outcomes(both: int, only_first: int, only_second: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    first = [True] * (both + only_first) + [False] * (only_second + neither)
    second = [True] * both + [False] * only_first + [True] * only_second + [False] * neither
    return np.array(first), np.array(second)


@pytest.mark.parametrize("table", [(20, 9, 2, 5), (0, 1, 0, 0), (3, 4, 4, 3), (10, 0, 12, 14), (794, 86, 150, 570)])
def test_mcnemar_is_that_of_statsmodels(table: tuple[int, int, int, int]) -> None:
    both, only_first, only_second, neither = table
    expected: Any = reference_mcnemar([[both, only_first], [only_second, neither]], exact=True)
    found = mcnemar(*outcomes(*table))
    assert (found.only_first, found.only_second) == (only_first, only_second)
    assert found.p_value == pytest.approx(expected.pvalue, rel=1e-9)
    first, second = outcomes(*table)
    swapped = mcnemar(second, first)
    assert swapped.p_value == pytest.approx(found.p_value)


def test_mid_p_is_the_published_one() -> None:
    # Fagerland, Lydersen & Laake 2013, table 1 (Bentur et al. 2009): 1 and 7 discordant pairs of 21
    first, second = outcomes(1, 1, 7, 12)
    assert mcnemar(first, second).p_value == pytest.approx(0.0703, abs=5e-5)
    assert mcnemar(first, second, "mid-p").p_value == pytest.approx(0.0391, abs=5e-5)
    # as many on both sides: no evidence at all
    assert mcnemar(*outcomes(0, 3, 3, 0), "mid-p").p_value == 1.0


def test_equal_outcomes_are_no_evidence_and_others_than_pairs_of_booleans_are_refused() -> None:
    assert mcnemar([True, False], [True, False]).p_value == 1.0
    with pytest.raises(ValueError, match="got 2 and 1 outcomes"):
        mcnemar([True, False], [True])
    with pytest.raises(ValueError, match="first: success is one boolean an episode, got int64"):
        mcnemar([1, 0], [True, False])


def test_holm_is_that_of_statsmodels_and_skips_tests_that_were_not_made() -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40):
        p = rng.random(n) ** 3
        assert holm(p) == pytest.approx(multipletests(p, method="holm")[1])
    # a hand-made case: 3, 2 and 1 times, never falling, at most 1
    assert holm([0.01, np.nan, 0.04, 0.03, 0.9]) == pytest.approx([0.04, np.nan, 0.09, 0.09, 0.9], nan_ok=True)
    assert holm([]).shape == (0,)
    with pytest.raises(ValueError, match="numbers in 0..1"):
        holm([0.5, 1.5])


def test_the_cluster_bootstrap_of_single_episodes_is_scipys() -> None:
    values = np.random.default_rng(1).normal(3, 2, 60)
    found = cluster_bootstrap(values, range(60), n_resamples=20_000, seed=5)
    expected = bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    spread = expected.high - expected.low
    # two independent sets of resamples: quantiles agree to about 1 % of the interval
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.03 * spread)
    assert found.estimate == pytest.approx(values.mean()) and found.n_clusters == 60


def test_episodes_that_resemble_each_other_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    tasks = np.repeat(np.arange(12), 10)
    values = rng.normal(size=12)[tasks] + 0.01 * rng.normal(size=120)
    clustered, alone = cluster_bootstrap(values, tasks.tolist()), cluster_bootstrap(values, range(120))
    # 120 episodes say no more than 12: the interval is √10 times as wide
    assert (clustered.high - clustered.low) / (alone.high - alone.low) == pytest.approx(10**0.5, rel=0.1)


def test_clusters_of_unequal_size_weigh_by_their_episodes() -> None:
    # resamples of {1 of 1 value, 0 of 3 values}: means 1, 1/4 and 0, one quarter, half and quarter of the time
    found = cluster_bootstrap([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"], confidence=0.6)
    assert (found.estimate, found.low, found.high) == (0.25, 0.0, 1.0)
    assert cluster_bootstrap([1.0, 0.0, 0.0, 0.0], ["a", "b", "b", "b"], confidence=0.4).high == 0.25


def test_the_bootstrap_is_seeded_and_says_what_it_cannot_do() -> None:
    values, tasks = np.random.default_rng(0).normal(size=8), list("abcdefgh")
    assert cluster_bootstrap(values, tasks, seed=3) == cluster_bootstrap(values, tasks, seed=3)
    assert cluster_bootstrap(values, tasks, seed=3) != cluster_bootstrap(values, tasks, seed=4)
    with pytest.raises(ValueError, match=r"at least 2 clusters, got \['a'\]"):
        cluster_bootstrap(values, ["a"] * 8)
    with pytest.raises(ValueError, match="8 values, but 3 clusters"):
        cluster_bootstrap(values, tasks[:3])
    with pytest.raises(ValueError, match="finite"):
        cluster_bootstrap([1.0, np.nan], ["a", "b"])


def test_paired_permutation_counts_exchanges() -> None:
    # 5 pairs that all differ the same way: 2 of 32 exchanges are as extreme
    assert paired_permutation([2, 3, 4, 5, 6], [1, 1, 1, 1, 1]) == pytest.approx(2 / 32)
    rng = np.random.default_rng(0)
    a, noise = rng.normal(size=30), rng.normal(size=30)
    assert paired_permutation(a, a + 0.1 * noise, seed=1) > 0.05 > paired_permutation(a, a + 1 + noise, seed=1)
    assert paired_permutation(a, noise, seed=1) == paired_permutation(a, noise, seed=1)
    with pytest.raises(ValueError, match="2 pairs or more"):
        paired_permutation([1], [2])
