"""Runs a sweep's tasks on workers: in this process, in others of this machine, or on a Ray cluster.

Only the process that started the sweep writes. Workers send finished episodes; where one dies, its task is given to
another, and episodes that had arrived already are not recorded twice.
"""

import os
import pickle
import signal
import sys
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol, runtime_checkable

from hooked_vla.rollouts.jobs import Job, Task, Worker, pickle_jobs
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Timing, Watcher
from hooked_vla.vla import HookedVLA

# a task whose workers died so often is not tried again
MAX_DEATHS = 3


class WorkerError(RuntimeError):
    """A worker failed, or the workers of one task died again and again."""


@dataclass(frozen=True)
class Event:
    """What a worker reports. kind: "ready" to take a task; an episode's "part"; a task "done", with its Timing;
    "failed" with the text of an error; "died" without a word."""

    worker: int
    kind: Literal["ready", "part", "done", "failed", "died"]
    payload: Any = None


@runtime_checkable
class Pool(Protocol):
    """Workers that run one task at a time. A worker takes its first task after it reported "ready"."""

    def start(self) -> int: ...

    def submit(self, worker: int, task: Task) -> None: ...

    def wait(self) -> Iterable[Event]: ...

    def close(self) -> None: ...


@runtime_checkable
class Executor(Protocol):
    """Where a sweep runs. in_process: it needs no copies of models, and watchers can look on."""

    workers: int
    in_process: bool

    def pool(self, jobs: Sequence[Job], loaded: Mapping[int, HookedVLA], watchers: Sequence[Watcher]) -> Pool: ...


def run_tasks(tasks: Sequence[Task], pool: Pool, workers: int, on_part: Callable[[Task, Part], None]) -> Timing:
    """Runs every task to its end on the pool, and closes it; on_part gets each episode that a worker finished.

    A task is given again, to another worker, when its worker died; its episodes may then come twice.
    Raises WorkerError when a worker reports an error, or the workers of one task died MAX_DEATHS times.
    """
    waiting, busy, idle = deque(tasks), dict[int, Task](), list[int]()
    deaths, timing = Counter[Task | None](), Timing()
    try:
        for _ in range(min(workers, len(tasks))):
            pool.start()
        while waiting or busy:
            for event in pool.wait():
                task = busy.get(event.worker)
                if event.kind == "part" and task is not None:
                    on_part(task, event.payload)
                elif event.kind == "failed":
                    where = "while it started" if task is None else f"at {task.group.cells[0]} and those beside it"
                    raise WorkerError(f"a worker failed {where}: {event.payload}")
                elif event.kind == "died":
                    if event.worker in idle:
                        idle.remove(event.worker)
                    else:
                        _count_death(deaths, task)
                    if task is not None:
                        del busy[event.worker]
                        waiting.appendleft(task)
                    if waiting:
                        pool.start()
                else:
                    busy.pop(event.worker, None)
                    idle.append(event.worker)
                    timing.add(event.payload or Timing())
                while idle and waiting:
                    worker, task = idle.pop(), waiting.popleft()
                    busy[worker] = task
                    pool.submit(worker, task)
    finally:
        pool.close()
    return timing


def _count_death(deaths: Counter[Task | None], task: Task | None) -> None:
    deaths[task] += 1
    if deaths[task] >= MAX_DEATHS:
        what = "as they started" if task is None else f"at {task.group.cells[0]} and those beside it"
        raise WorkerError(f"{deaths[task]} workers died {what} (killed, or out of memory?); giving up")


class _InProcess:
    """One worker, this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._events: Iterator[Event] = iter(())

    def start(self) -> int:
        self._events = iter([Event(0, "ready")])
        return 0

    def submit(self, worker: int, task: Task) -> None:
        self._events = self._run(task)

    def wait(self) -> Iterable[Event]:
        return [next(self._events)]

    def close(self) -> None:
        # ends the group that an exception may have left half-way: hooks come off, environments go back
        if hasattr(self._events, "close"):
            self._events.close()  # pyright: ignore[reportAttributeAccessIssue]
        self.worker.close()

    def _run(self, task: Task) -> Iterator[Event]:
        for part in self.worker.run(task):
            yield Event(0, "part", part)
        yield Event(0, "done", self.worker.take_timing())


class _Processes:
    """Worker processes of this machine, started afresh (not forked: threads and OpenGL do not survive a fork)."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs, self._context = pickle_jobs(jobs), get_context("spawn")
        self._processes: dict[int, tuple[Any, Connection]] = {}
        self._n_started = 0

    def start(self) -> int:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        theirs.close()
        worker, self._n_started = self._n_started, self._n_started + 1
        self._processes[worker] = process, ours
        with suppress(OSError):
            ours.send_bytes(self._jobs)
        return worker

    def submit(self, worker: int, task: Task) -> None:
        # a worker that is gone by now is found out by `wait`
        with suppress(OSError):
            self._processes[worker][1].send(task)

    def wait(self) -> Iterable[Event]:
        by_connection = {ours: worker for worker, (_, ours) in self._processes.items()}
        for ready in connection.wait(list(by_connection)):
            worker = by_connection[ready]  # pyright: ignore[reportArgumentType]
            process, ours = self._processes[worker]
            try:
                kind, payload = ours.recv()
            except (EOFError, OSError, pickle.UnpicklingError):
                del self._processes[worker]
                ours.close()
                process.kill()
                process.join()
                yield Event(worker, "died")
            else:
                yield Event(worker, kind, payload)

    def close(self) -> None:
        for process, ours in self._processes.values():
            process.terminate()
            ours.close()
        for process, _ in self._processes.values():
            process.join()
        self._processes = {}


def serve(to_driver: Connection) -> None:
    """What a worker process does, until the driver is gone."""
    # the driver decides what an interrupt means, and standard output is its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        answer(to_driver)


def answer(to_driver: Connection) -> None:
    """Reads jobs, then runs tasks and reports on them; an error is reported, and ends it.

    Raises EOFError or BrokenPipeError when the driver is gone.
    """
    try:
        worker = Worker(pickle.loads(to_driver.recv_bytes()))
        to_driver.send(("ready", None))
        while True:
            for part in worker.run(to_driver.recv()):
                to_driver.send(("part", part))
            to_driver.send(("done", worker.take_timing()))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as error:
        to_driver.send(("failed", describe_error(error)))


def describe_error(error: BaseException) -> str:
    """An error for another process to raise: what it says, then where it happened."""
    where = "".join(traceback.format_exception(error)).rstrip()
    return f"{type(error).__name__}: {error}\n\nin the worker:\n{where}"


class LocalExecutor:
    """This machine: one worker is this process itself, several are processes of their own with a model each.

    With several, a script must be importable without running the sweep (`if __name__ == "__main__":`).
    Raises ValueError for fewer than one worker.
    """

    def __init__(self, workers: int = 1) -> None:
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        self.workers, self.in_process = workers, workers == 1

    def pool(self, jobs: Sequence[Job], loaded: Mapping[int, HookedVLA], watchers: Sequence[Watcher]) -> Pool:
        return _InProcess(Worker(jobs, loaded, watchers)) if self.in_process else _Processes(jobs)
