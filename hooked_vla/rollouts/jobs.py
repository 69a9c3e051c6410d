"""A sweep's share of one model and one suite as a worker takes it: picklable, with everything that runs a group."""

import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hooked_vla import registry
from hooked_vla.rollouts.acting import Actor, ExpertActor, ModelActor
from hooked_vla.rollouts.arms import Arm
from hooked_vla.rollouts.cells import Group
from hooked_vla.rollouts.manifest import weight_hash
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Environments, GroupRunner, Timing, Watcher
from hooked_vla.rollouts.settings import Settings, torch_threads
from hooked_vla.rollouts.suites import Suite
from hooked_vla.spec import ModelSpec
from hooked_vla.vla import HookedVLA


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from, so that each worker can get it for itself.

    name: of a spec, for random weights of that size and seed; else what `HookedVLA.from_pretrained` takes.
    """

    name: str
    size: str = "full"
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    revision: str | None = None

    def spec(self) -> ModelSpec | None:
        """The spec of a model with random weights; None where a checkpoint decides it.

        Raises ValueError for an unknown size.
        """
        return registry.get_spec(self.name, self.size) if self.name in registry.list_models() else None

    def load(self) -> HookedVLA:
        """The model. Raises what `from_spec` and `from_pretrained` raise."""
        if self.spec() is not None:
            return HookedVLA.from_spec(self.name, self.size, self.seed, self.device, self.dtype)
        return HookedVLA.from_pretrained(self.name, self.device, self.dtype, self.revision)


@dataclass(frozen=True)
class Job:
    """One model on one suite. name: the model's, in tables; model None: the suite's scripted expert acts.

    weights: hash that the model must have, see manifest.py; noise: what it draws. None for the expert.
    """

    name: str
    model: ModelSource | HookedVLA | None
    suite: Suite
    arms: tuple[Arm, ...]
    settings: Settings
    weights: str | None
    noise: SeededNoise | None

    def actor(self, model: HookedVLA | None) -> Actor:
        """Who acts; model: loaded already, or None."""
        if self.model is None or self.noise is None:
            return ExpertActor(self.suite)
        if model is None:
            model = self.model if isinstance(self.model, HookedVLA) else self.model.load()
            if (found := weight_hash(model)) != self.weights:
                raise RuntimeError(f"{self.name!r} has other weights here than where the sweep began: {found}")
        return ModelActor(self.name, model, self.suite, self.arms, self.settings, self.noise)


@dataclass(frozen=True)
class Task:
    """A group of one of a sweep's jobs, by the job's number."""

    job: int
    group: Group


class Worker:
    """Runs tasks one after another, holding one model at a time. loaded: models that are here already, by job."""

    def __init__(
        self, jobs: Sequence[Job], loaded: Mapping[int, HookedVLA] | None = None, watchers: Sequence[Watcher] = ()
    ) -> None:
        self.jobs, self.loaded, self.watchers = jobs, loaded or {}, watchers
        self._runner: GroupRunner | None = None
        self._number: int | None = None

    def run(self, task: Task) -> Iterator[Part]:
        """The task's episodes, each as soon as it is over."""
        job = self.jobs[task.job]
        with torch_threads(job.settings.threads):
            runner = self._open(task.job)
            yield from runner.run(task.group)

    def take_timing(self) -> Timing:
        """What was measured since this was last asked."""
        if self._runner is None:
            return Timing()
        taken, self._runner.timing = self._runner.timing, Timing()
        return taken

    def close(self) -> None:
        """Close the environments and let go of the model."""
        if self._runner is not None:
            self._runner.environments.close()
        self._runner, self._number = None, None

    def _open(self, number: int) -> GroupRunner:
        if self._runner is None or self._number != number:
            self.close()
            job = self.jobs[number]
            settings = job.settings
            # a group's environments stay for the next one, and those that the group before it left
            environments = Environments(
                job.suite, tuple(settings.cameras.values()), settings.image_size, 2 * settings.n_envs
            )
            self._runner = GroupRunner(
                job.actor(self.loaded.get(number)), job.suite, job.name, settings.n_envs, settings.max_steps,
                environments, self.watchers,
            )  # fmt: skip
            self._number = number
        return self._runner


def pickle_jobs(jobs: Sequence[Job]) -> bytes:
    """The jobs as bytes, functions and closures included; `pickle.loads` reads them.

    Raises TypeError naming what cannot travel.
    """
    import cloudpickle

    try:
        return cloudpickle.dumps(tuple(jobs))
    except (TypeError, AttributeError, pickle.PicklingError) as error:
        names = sorted({arm.name for job in jobs for arm in job.arms})
        raise TypeError(
            f"models, suites or arms ({names}) that cannot be sent to other processes: {error}; use one worker"
        ) from error
