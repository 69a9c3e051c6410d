"""Scores by scene: pairs, shares of what was lost, and verdicts that a test must bear out."""

import numpy as np
import pytest

from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.kinds.injection_scores import (
    difference,
    mean_score,
    paired_p,
    settle,
    share_difference,
    share_restored,
)

SCENES = [Scene(str(i % 3), i) for i in range(9)]


def of(*values: float) -> dict[Scene, float]:
    return dict(zip(SCENES, map(float, values), strict=False))


def test_differences_are_of_the_same_scenes() -> None:
    first, second = of(*range(1, 10)), dict(list(of(*[1.0] * 9).items())[3:])
    mean, low, high = difference(first, second, 0)
    assert mean == pytest.approx(np.mean([3, 4, 5, 6, 7, 8])) and low <= mean <= high
    assert mean_score({**first, SCENES[0]: float("nan")}, 0)[0] == pytest.approx(np.mean(range(2, 10)))


def test_an_interval_of_shares_is_not_without_width() -> None:
    mean, low, high = share_difference(of(*[1.0] * 9), of(*[0.0] * 9), 0)
    assert mean == high == 1 and 0.5 < low < 0.8


def test_what_is_restored_is_a_part_of_what_was_lost() -> None:
    base, null = of(*[1.0] * 9), of(*[0.5] * 9)
    share, low, high = share_restored(of(*[0.5, 0.75, 1.0] * 3), null, base, 0)
    assert share == pytest.approx(0.5) and low <= 0.5 <= high
    assert np.isnan(share_restored(base, base, base, 0)).all()
    # a scene whose score is not known is left out
    unknown = {**of(*[0.75] * 9), SCENES[0]: float("nan")}
    assert share_restored(unknown, null, base, 0)[0] == pytest.approx(0.5)


def test_numbers_that_pass_settle_nothing_without_episodes() -> None:
    few, many = SCENES[:4], SCENES
    p_few, p_many = (paired_p(dict.fromkeys(each, 1.0), dict.fromkeys(each, 0.0)) for each in (few, many))
    assert p_few == 0.125 and p_many == pytest.approx(2 / 2**9)
    assert settle("r", True, [p_many], "m").holds is True
    assert settle("r", True, [p_many, p_few], "m").holds is None
    assert settle("r", False, [p_many], "m").holds is False
    for unknown in ([float("nan")], [p_many, float("nan")], [float("nan"), p_many]):
        assert settle("r", True, unknown, "m").holds is None
    assert np.isnan(paired_p(of(1.0), {SCENES[5]: 1.0}))
