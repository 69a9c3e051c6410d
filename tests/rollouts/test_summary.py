"""Rates by arm and task."""

import pyarrow as pa

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.rollouts.summary import summarise


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
