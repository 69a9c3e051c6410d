"""Intervals that decide: paired, by tasks, wide where nothing varies, and undecided where the limit lies inside."""

import numpy as np
import pytest

from hooked_vla.analysis.statistics import cluster_bootstrap, wilson_interval
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, interval_of, undecided

RNG = np.random.default_rng(0)
TASKS = [f"t{i % 6}" for i in range(36)]


def test_means_are_those_of_a_bootstrap_by_task() -> None:
    values = RNG.normal(size=36)
    estimate, low, high = interval_of(values, TASKS)
    other = cluster_bootstrap(values, TASKS)
    assert estimate == pytest.approx(other.estimate)
    assert (low, high) == pytest.approx((other.low, other.high), abs=0.02)


def test_columns_are_resampled_together() -> None:
    """Two measures that rise and fall together have a ratio that hardly varies."""
    first = np.exp(RNG.normal(size=36))
    both = np.stack([2 * first, first], axis=1)
    ratio, low, high = interval_of(both, TASKS, lambda means: means[:, 0] / means[:, 1])
    assert (ratio, low, high) == pytest.approx((2, 2, 2))
    apart = np.stack([2 * first, RNG.permutation(first)], axis=1)
    _, low, high = interval_of(apart, TASKS, lambda means: means[:, 0] / means[:, 1])
    assert high - low > 0.3


@pytest.mark.parametrize("change", [-1.0, 0.0, 1.0])
def test_episodes_that_all_change_alike_are_not_certain(change: float) -> None:
    """Three of three is no proof: Wilson's interval says what was missed."""
    missed = 1 - wilson_interval(3, 3)[0]
    estimate, low, high = change_interval([change] * 3, ["a", "b", "c"])
    assert estimate == change and (low, high) == pytest.approx((max(-1, change - missed), min(1, change + missed)))
    many = change_interval([change] * 36, TASKS)
    assert many[2] - many[1] < 0.3 * (high - low)
    # where tasks differ, it is the bootstrap's
    mixed = [1.0, 0.0] * 18
    assert change_interval(mixed, TASKS) == interval_of(mixed, TASKS)


def test_without_rows_or_a_second_task_there_is_no_interval() -> None:
    assert np.isnan(interval_of(np.zeros((0, 1)), [])).all()
    estimate, low, high = change_interval([0.5, 1.0], ["a", "a"])
    assert estimate == 0.75 and np.isnan(low) and np.isnan(high)
    with pytest.raises(ValueError, match="as many clusters as rows, got 1"):
        interval_of([0.0, 1.0], ["a"])
    with pytest.raises(ValueError, match="finite numbers"):
        interval_of([0.0, np.nan], ["a", "b"])


def test_a_limit_inside_of_the_interval_decides_nothing() -> None:
    assert decide(0.1, 0.2, 0.3, below=True) is True and decide(0.1, 0.2, 0.3, below=False) is False
    assert decide(0.3, 0.4, 0.3, below=False) is True and decide(0.3, 0.4, 0.3, below=True) is False
    assert decide(0.1, 0.4, 0.3, below=True) is None and decide(float("nan"), 0.4, 0.3, below=True) is None
    assert "undecided" in undecided(None) and undecided(True) == undecided(False) == ""
