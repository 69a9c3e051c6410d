"""Which recorded episodes a row of an experiment's table was measured on, where the run holds them.

A row says under which arm it was measured, and often in which suite, task and seed; the experiment's own folders of
rollouts say which of these they hold. A row that names no arm leads nowhere: what it was measured on is not an episode,
or not told.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hooked_vla.atlas.run import ExperimentFolder, RolloutFolder, Run
from hooked_vla.atlas.views.episode_index import EpisodeIndex
from hooked_vla.atlas.views.episodes import sound_keys

# the baseline, run once more for the floor, is a folder of its own (rollouts/experiments/kinds)
RERUN, BASELINE = "rerun", "baseline"


@dataclass(frozen=True)
class _Held:
    """One folder of rollouts of an experiment."""

    run: Run
    folder: RolloutFolder

    @cached_property
    def scenes(self) -> dict[tuple[str, int], int]:
        return {(task, seed): i for i, (task, seed) in enumerate(self.folder.manifest["scenes"])}

    @cached_property
    def arms(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.folder.manifest["arms"])}

    def holds(self, model: Any, suite: Any, arm: str, task: Any, seed: Any) -> bool:
        manifest = self.folder.manifest
        if arm not in self.arms or suite not in (None, "", manifest["suite"]["name"]):
            return False
        if model not in (None, "", manifest["model"].get("name")):
            return False
        return task is None or self._n(task, seed) > 0

    def link(self, arm: str, task: Any, seed: Any) -> dict[str, Any]:
        """episode: its number, where the row is of one; else None, with n episodes of the arm (and the task)."""
        found = {"rollout": self.folder.key, "path": self.run.shown(self.folder.path), "arm": arm, "task": task or "",
                 "n": self._n(task, seed), "episode": None}  # fmt: skip
        if task is not None and seed is not None:
            number = self.arms[arm] * len(self.scenes) + self.scenes[task, seed]
            if EpisodeIndex.of(self.run, self.folder.key).episode_file("episodes", number) is not None:
                found["episode"] = number
        return found

    def _n(self, task: Any, seed: Any) -> int:
        if task is not None and seed is not None:
            return int((task, seed) in self.scenes)
        return sum(task in (None, own) for own, _ in self.scenes)


def measured_on(
    run: Run, experiment: ExperimentFolder, table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]
) -> list[dict[str, Any] | None]:
    """For each row the episodes, {"rollout", "path", "arm", "task", "n", "episode"}, or None.

    Of several folders that hold the arm, the one that the table is called after is meant ("moved_object" and
    rollouts/moved), else the one with the most arms; where several fit as well as each other, none is.
    """
    held = run.keep(f"rollouts of {experiment.key}", lambda: list(_held(run, experiment)))
    return [_find(held, table, dict(zip(columns, row, strict=True))) for row in rows] if held else [None] * len(rows)


def _held(run: Run, experiment: ExperimentFolder) -> Iterator[_Held]:
    for key in sound_keys(run):
        if run.rollouts[key].path.is_relative_to(experiment.path):
            yield _Held(run, run.rollouts[key])


def _find(held: Sequence[_Held], table: str, row: Mapping[str, Any]) -> dict[str, Any] | None:
    model, suite = row.get("model"), row.get("suite")
    task = row.get("task") if isinstance(row.get("task"), str) else None
    seed = row.get("seed") if isinstance(row.get("seed"), int) else None
    for arm in _arms(row):
        again = arm == RERUN
        wanted = BASELINE if again else arm
        fits = [each for each in held if each.folder.path.name.endswith(RERUN) == again]
        fits = [each for each in fits if each.holds(model, suite, wanted, task, seed)]
        if fits:
            named = [each for each in fits if table.startswith(each.folder.path.name)]
            most = max(len(each.arms) for each in named or fits)
            best = [each for each in named or fits if len(each.arms) == most]
            return best[0].link(wanted, task, seed) if len(best) == 1 else None
    return None


def _arms(row: Mapping[str, Any]) -> Iterator[str]:
    """What the row's arm may be called, the likeliest first."""
    if isinstance(row.get("arm"), str):
        yield row["arm"]
    elif all(isinstance(row.get(name), str) for name in ("donor", "null", "site")):
        # of null prompts (rollouts/experiments/kinds/injection_replay.py): whose values, told what, where
        donor, null, site = row["donor"], row["null"], row["site"]
        if donor == "own":
            yield f"{null}: {site}"
        else:
            yield from (f"{donor}: {null}: {site}", f"{donor}: {site}")
