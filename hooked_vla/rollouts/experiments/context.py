"""What a kind of experiment works with: a model, and rollouts, recordings and tables that an interrupted run finds
again.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.folders import write_file, write_json
from hooked_vla.inputs import Observation
from hooked_vla.rollouts import UNSEEN
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import spread_scenes
from hooked_vla.rollouts.executor import Executor, LocalExecutor
from hooked_vla.rollouts.experiments.definition import Definition, Rule
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.manifest import describe_model, describe_versions, differences, listed
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.settings import Options, native_image_size
from hooked_vla.rollouts.suites import Suite, get_suite, observation
from hooked_vla.rollouts.sweep import Rollouts, run_rollouts
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

EXPERIMENT = "experiment.json"
_FORMAT = "hooked-vla experiment 1"


@dataclass(frozen=True)
class Seen:
    """How an episode starts. frame, info: what the environment shows and says."""

    task: str
    seed: int
    frame: Mapping[str, Any]
    info: Mapping[str, Any]

    @property
    def observation(self) -> Observation:
        return observation(dict(self.frame))


@dataclass(frozen=True)
class Context:
    """One run of an experiment. out: its folder; seed: the first episode's; options: of all rollouts.

    Whatever is made through the methods is kept in `out` and found there when the same run is begun again.
    """

    definition: Definition
    source: ModelSource
    out: Path
    quick: bool = False
    seed: int = UNSEEN
    executor: Executor = field(default_factory=LocalExecutor)
    options: Options = field(default_factory=Options)
    progress: bool = False

    @property
    def model_name(self) -> str:
        return self.source.name

    @cached_property
    def model(self) -> HookedVLA:
        return self.source.load()

    @property
    def reads_words(self) -> bool:
        """Whether the policy is told anything: one that is not can only do tasks that the scene shows."""
        return hasattr(self.model.processor, "tokenizer")

    @property
    def rules(self) -> dict[str, Rule]:
        return {rule.id: rule for rule in self.definition.rules}

    def claim(self) -> None:
        """Make the folder that of this run, by writing experiment.json or by finding the same one.

        Raises ValueError where another run, or something else, is there, naming what differs.
        """
        about = self.describe()
        path = self.out / EXPERIMENT
        if not path.is_file():
            others = [each.name for each in self.out.iterdir()] if self.out.is_dir() else []
            if others:
                raise ValueError(
                    f"{self.out} has no {EXPERIMENT}, but holds {sorted(others)[:5]}: choose an empty folder"
                )
            write_json(path, about)
            return
        try:
            there = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is damaged: {error}; choose another folder") from error
        if found := differences(there, about):
            said = listed([description for _, description in found])
            raise ValueError(f"{self.out} holds another run: {said}. Go on with its settings, or choose another folder")

    def describe(self) -> dict[str, Any]:
        """All that decides how the run comes out."""
        return {
            "format": _FORMAT,
            "experiment": self.definition.id,
            "settings": asdict(self.definition.settle(self.quick)),
            "rules": [asdict(rule) for rule in self.definition.rules],
            "model": describe_model(self.model_name, self.model),
            "seed": self.seed,
            "quick": self.quick,
            "options": asdict(self.options),
            "versions": describe_versions(("pandas", "scikit-learn", "scipy", "kornia")),
        }

    def rollouts(
        self,
        label: str,
        suite: str | Suite,
        arms: Sequence[Arm] = (BASELINE,),
        episodes: int = 1,
        tasks: Sequence[str] | None = None,
        watchers: Sequence[Watcher] = (),
        seed: int | None = None,
        options: Options | None = None,
    ) -> Rollouts:
        """`run_rollouts` of the run's model into rollouts/LABEL, on the run's executor; in this process where somebody
        watches."""
        executor = LocalExecutor() if watchers else self.executor
        return run_rollouts(
            self.model if executor.in_process else self.source, suite, episodes, self.seed if seed is None else seed,
            tasks, arms, self.out / "rollouts" / label, self.options if options is None else options, self.model_name,
            executor, self.progress, watchers,
        )  # fmt: skip

    def folder(self, name: str) -> Path:
        """A place in the run's folder for recordings; not made yet."""
        return self.out / "recordings" / name

    def table(self, name: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """tables/NAME.parquet, made if it is not there yet."""
        path = self.out / "tables" / f"{name}.parquet"
        if not path.is_file():
            write_file(path, make().to_parquet(index=False))
        return pd.read_parquet(path)

    def observations(self, suite: str, n: int, seed: int | None = None) -> list[Seen]:
        """How the first `n` episodes of the suite's rollouts from that seed start."""
        where = get_suite(suite)
        scenes = spread_scenes([task.id for task in where.tasks], n, self.seed if seed is None else seed)
        size = self.options.image_size or native_image_size(self.model.spec)
        found = []
        for task in dict.fromkeys(scene.task for scene in scenes):
            env = where.make(task, where.cameras, size)
            try:
                for scene in scenes:
                    if scene.task == task:
                        frame, info = env.reset(seed=scene.seed)
                        found.append(Seen(task, scene.seed, frame, info))
            finally:
                env.close()
        return found
