"""Success rates with intervals, per task and overall."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import sqrt
from statistics import NormalDist
from typing import Any

from hooked_vla.rollouts import needs_sim_extra

with needs_sim_extra():
    import pyarrow as pa


@dataclass(frozen=True)
class Rate:
    """Successes among episodes. interval: Wilson's at 95 %."""

    episodes: int
    successes: int
    success_rate: float
    interval: tuple[float, float]

    @classmethod
    def of(cls, successes: int, episodes: int) -> "Rate":
        return cls(episodes, successes, successes / episodes, wilson_interval(successes, episodes))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"interval": list(self.interval)}


@dataclass(frozen=True)
class ArmSummary:
    """One arm's episodes: all of them, and task by task."""

    overall: Rate
    by_task: Mapping[str, Rate]


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


def summarise(episodes: pa.Table) -> dict[str, ArmSummary]:
    """The success of every arm in a table of episodes (`read_episodes`), arms and tasks in the order of the table."""
    outcomes: dict[str, dict[str, list[bool]]] = {}
    columns = (episodes[name].to_pylist() for name in ("arm", "task", "success"))
    for arm, task, success in zip(*columns, strict=True):
        outcomes.setdefault(arm, {}).setdefault(task, []).append(success)
    return {
        arm: ArmSummary(
            Rate.of(sum(map(sum, tasks.values())), sum(map(len, tasks.values()))),
            {task: Rate.of(sum(each), len(each)) for task, each in tasks.items()},
        )
        for arm, tasks in outcomes.items()
    }
