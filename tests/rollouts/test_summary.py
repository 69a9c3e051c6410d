"""Wilson intervals against published values, and rates by arm and task."""

import pyarrow as pa
import pytest

from hooked_vla.rollouts.summary import summarise, wilson_interval


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
def test_intervals_are_the_published_ones(successes: int, n: int, interval: tuple[float, float]) -> None:
    assert wilson_interval(successes, n) == pytest.approx(interval, abs=5e-5)
    low, high = interval
    assert wilson_interval(n - successes, n) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_a_wider_confidence_gives_a_wider_interval_and_the_ends_are_exact() -> None:
    narrow, wide = wilson_interval(7, 10, 0.5), wilson_interval(7, 10, 0.99)
    assert wide[0] < narrow[0] < 0.7 < narrow[1] < wide[1]
    assert wilson_interval(0, 3)[0] == 0.0 and wilson_interval(3, 3)[1] == 1.0


@pytest.mark.parametrize("arguments", [(0, 0), (3, 2), (-1, 2), (1, 2, 1.0)])
def test_shares_of_nothing_are_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="no interval"):
        wilson_interval(*arguments)


def test_rates_are_by_arm_and_task() -> None:
    table = pa.table(
        {"arm": ["a"] * 4 + ["b"], "task": ["x", "x", "y", "y", "x"], "success": [True, False, True, True, False]}
    )
    summary = summarise(table)
    assert list(summary) == ["a", "b"] and list(summary["a"].by_task) == ["x", "y"]
    assert (summary["a"].overall.successes, summary["a"].overall.episodes, summary["a"].overall.success_rate) == (
        3,
        4,
        0.75,
    )
    assert summary["a"].by_task["x"].success_rate == 0.5 and summary["b"].overall.success_rate == 0
    assert summary["a"].overall.to_json()["interval"] == list(wilson_interval(3, 4))
