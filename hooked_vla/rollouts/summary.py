"""Success rates with intervals, per task and overall."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hooked_vla.analysis.statistics import wilson_interval
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
