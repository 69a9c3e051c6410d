"""A sweep on a Ray cluster: each actor holds a model (on a GPU where the model is on one) and its environments.

The machines need this package at the same version and the checkpoint under the same name, but no shared folder for
results: actors send finished episodes, and the process that started the sweep writes them.
"""

import logging
import os
import pickle
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hooked_vla.extras import needs_packages
from hooked_vla.rollouts.executor import Event, Pool, describe_error
from hooked_vla.rollouts.jobs import Job, Task, Worker, pickle_jobs
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.vla import HookedVLA

with needs_packages(("ray",), "running on a cluster needs: pip install hooked-vla[ray]"):
    # no reports to its makers
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # pyright: ignore[reportMissingImports]
    from ray.exceptions import RayActorError, RayError  # pyright: ignore[reportMissingImports]


class RayExecutor:
    """Workers are Ray actors, which run wherever the cluster has room.

    The cluster is the one that this process is connected to, else that of the environment variable RAY_ADDRESS, else
    one of this machine's own. cpus, gpus: what each worker reserves; gpus None: one where the model is on a GPU; less
    than one lets workers share it.
    Raises ValueError for fewer than one worker.
    """

    in_process = False

    def __init__(self, workers: int = 1, cpus: float = 1.0, gpus: float | None = None) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers, self.cpus, self.gpus = workers, cpus, gpus

    def pool(self, jobs: Sequence[Job], loaded: Mapping[int, HookedVLA], watchers: Sequence[Watcher]) -> Pool:
        """Raises ConnectionError where there is no cluster at RAY_ADDRESS."""
        if not ray.is_initialized():
            ray.init(os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level=logging.ERROR)
        on_gpu = any(str(getattr(job.model, "device", "cpu")).startswith("cuda") for job in jobs)
        gpus = float(on_gpu) if self.gpus is None else self.gpus
        return _Actors(jobs, self.cpus, gpus)


class _RemoteWorker:
    """A worker as an actor; its errors come back as text, so that only its death is an error to Ray."""

    def __init__(self, jobs: bytes) -> None:
        self._jobs = jobs
        self._worker: Worker | None = None

    def ready(self) -> tuple[str, Any]:
        try:
            self._worker = Worker(pickle.loads(self._jobs))
        except Exception as error:
            return "failed", describe_error(error)
        return "ready", None

    def run(self, task: Task) -> Iterable[tuple[str, Any]]:
        assert self._worker is not None
        try:
            for part in self._worker.run(task):
                yield "part", part
        except Exception as error:
            yield "failed", describe_error(error)
        else:
            yield "done", self._worker.take_timing()


class _Actors:
    """Actors and what each is to say next: a reference, or a generator of them."""

    def __init__(self, jobs: Sequence[Job], cpus: float, gpus: float) -> None:
        self._jobs = ray.put(pickle_jobs(jobs))
        # neither actors nor their tasks are tried again by Ray: who runs what is decided in one place
        self._kind: Any = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_RemoteWorker)
        self._actors: dict[int, Any] = {}
        # what was asked of which worker, and whether it answers with a stream
        self._pending: dict[Any, tuple[int, bool]] = {}
        self._n_started = 0

    def start(self) -> int:
        worker, self._n_started = self._n_started, self._n_started + 1
        actor: Any = self._kind.remote(self._jobs)
        self._actors[worker] = actor
        self._pending[actor.ready.remote()] = worker, False
        return worker

    def submit(self, worker: int, task: Task) -> None:
        stream = self._actors[worker].run.options(num_returns="streaming").remote(task)
        self._pending[stream] = worker, True

    def wait(self) -> Iterable[Event]:
        source: Any = ray.wait(list(self._pending), num_returns=1)[0][0]
        worker, streams = self._pending[source]
        try:
            answer: Any = ray.get(next(source) if streams else source)
        except StopIteration:
            # the last word was "done" or "failed"
            del self._pending[source]
            return []
        except (RayActorError, RayError):
            del self._pending[source]
            ray.kill(self._actors.pop(worker))
            return [Event(worker, "died")]
        if not streams:
            del self._pending[source]
        return [Event(worker, *answer)]

    def close(self) -> None:
        for actor in self._actors.values():
            ray.kill(actor)
        self._actors, self._pending = {}, {}
