"""Whoever runs the tasks: none is lost, none recorded twice, and the bytes are those of one process."""

import multiprocessing
import os
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import cloudpickle
import pytest
import toy_suite as toys
from toy_suite import toy_suite

from hooked_vla.rollouts.arms import BASELINE, FunctionArm
from hooked_vla.rollouts.cells import Scene, cut_groups
from hooked_vla.rollouts.executor import MAX_DEATHS, Event, LocalExecutor, answer, run_tasks
from hooked_vla.rollouts.jobs import Task, pickle_jobs
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import make_plan, run_plans

SCENES = tuple(Scene(["walk", "run", "short"][i % 3], i) for i in range(20))
TASKS = [Task(0, group) for group in cut_groups(SCENES, ["baseline"], 4)]


def part(task: Task, row: int) -> Part:
    return Part(task.group.cells[row], True, 1, b"steps", b"episode")


class ScriptedPool:
    """Workers that do as `script` says: events for the worker's n-th task, "..." standing for all that is right."""

    def __init__(self, script: Callable[[int, int, Task], Sequence[Event]]) -> None:
        self.script, self.n_started, self.closed = script, 0, False
        self.events: list[Event] = []
        self.n_tasks = Counter[int]()
        self.given: list[tuple[int, Task]] = []

    def start(self) -> int:
        self.n_started += 1
        self.events.append(Event(self.n_started - 1, "ready"))
        return self.n_started - 1

    def submit(self, worker: int, task: Task) -> None:
        self.given.append((worker, task))
        self.events += self.script(worker, self.n_tasks[worker], task)
        self.n_tasks[worker] += 1

    def wait(self):
        assert self.events, "the driver waits for nobody"
        event, *self.events = self.events
        return [event]

    def close(self) -> None:
        self.closed = True


def well(worker: int, task: Task) -> list[Event]:
    parts = [Event(worker, "part", part(task, row)) for row in range(len(task.group.cells))]
    return [*parts, Event(worker, "done")]


def test_every_task_is_run_once_when_all_goes_well() -> None:
    pool, seen = ScriptedPool(lambda worker, n, task: well(worker, task)), []
    run_tasks(TASKS, pool, 3, lambda task, part: seen.append(part.cell.id))
    assert sorted(seen) == list(range(20)) and pool.n_started == 3 and pool.closed
    assert [task for _, task in pool.given] == TASKS
    alone = ScriptedPool(lambda worker, n, task: well(worker, task))
    run_tasks(TASKS[:1], alone, 8, lambda *_: None)
    assert alone.n_started == 1


def test_the_task_of_a_dead_worker_goes_to_another() -> None:
    def script(worker: int, n: int, task: Task) -> list[Event]:
        if worker == 1 and n == 1:
            return [Event(worker, "part", part(task, 0)), Event(worker, "died")]
        return well(worker, task)

    pool, seen = ScriptedPool(script), Counter()
    run_tasks(TASKS, pool, 2, lambda task, part: seen.update([part.cell.id]))
    assert set(seen) == set(range(20)) and pool.n_started == 3
    # one episode came before the death, and again afterwards: the store takes it once
    [lost] = [task for worker, task in pool.given if worker == 1][1:]
    assert [cell for cell, n in seen.items() if n == 2] == [lost.group.cells[0].id]
    assert [task for worker, task in pool.given].count(lost) == 2


def test_workers_that_die_idle_or_starting_are_replaced() -> None:
    class Fragile(ScriptedPool):
        def start(self) -> int:
            worker = super().start()
            if worker == 0:
                self.events[-1] = Event(0, "died")
            return worker

    pool, seen = Fragile(lambda worker, n, task: well(worker, task)), []
    run_tasks(TASKS, pool, 1, lambda task, part: seen.append(part.cell.id))
    assert sorted(seen) == list(range(20)) and pool.n_started == 2

    # worker 0 has nothing to do any more when it dies
    def script(worker: int, n: int, task: Task) -> list[Event]:
        return [Event(0, "died"), *well(worker, task)] if task is TASKS[1] else well(worker, task)

    pool, seen = ScriptedPool(script), []
    pool.n_tasks[1] = 0
    run_tasks(TASKS[:2], pool, 2, lambda task, part: seen.append(part.cell.id))
    assert len(seen) == len(set(seen)) == sum(len(task.group.cells) for task in TASKS[:2])


@pytest.mark.parametrize("starting", [True, False])
def test_a_task_that_kills_its_workers_is_given_up(starting: bool) -> None:
    class Deadly(ScriptedPool):
        def start(self) -> int:
            worker = super().start()
            if starting:
                self.events[-1] = Event(worker, "died")
            return worker

    pool = Deadly(lambda worker, n, task: [Event(worker, "died")])
    where = "as they started" if starting else "at episode 0 "
    with pytest.raises(RuntimeError, match=f"{MAX_DEATHS} workers died {where}"):
        run_tasks(TASKS, pool, 1, lambda *_: None)
    assert pool.closed and pool.n_started == MAX_DEATHS


def test_an_error_in_a_worker_stops_the_sweep_and_says_where() -> None:
    pool = ScriptedPool(lambda worker, n, task: [Event(worker, "failed", "ValueError: odd")])
    with pytest.raises(RuntimeError, match=r"failed at episode 0 \(arm 'baseline'.*beside it: ValueError: odd"):
        run_tasks(TASKS, pool, 1, lambda *_: None)
    assert pool.closed


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killing(LocalExecutor):
    """Kills one of its worker processes when the first episode arrives."""

    killed = 0

    def pool(self, jobs, loaded, watchers):
        pool = super().pool(jobs, loaded, watchers)
        wait = pool.wait

        def wait_and_kill():
            for event in wait():
                yield event
                if event.kind == "part" and not self.killed:
                    os.kill(pool._processes[event.worker][0].pid, signal.SIGKILL)
                    self.killed += 1

        pool.wait = wait_and_kill
        return pool


@pytest.fixture
def travelling_toys():
    """The suite's module goes along to processes that cannot import it."""
    cloudpickle.register_pickle_by_value(toys)
    yield
    cloudpickle.unregister_pickle_by_value(toys)


def test_processes_give_the_same_bytes_also_when_one_is_killed(tmp_path: Path, travelling_toys: None) -> None:
    plan = make_plan("expert", toy_suite(), SCENES, options=Options(n_envs=5))
    run_plans([plan], [tmp_path / "alone"])
    executor = Killing(2)
    [done] = run_plans([plan], [tmp_path / "killed"], executor)
    assert executor.killed == 1 and files(tmp_path / "alone") == files(tmp_path / "killed")
    assert done.episodes.num_rows == 20 and not multiprocessing.active_children()


def test_an_error_in_a_worker_is_reported_with_its_traceback() -> None:
    plan = make_plan("expert", toy_suite(expert=stumbler), SCENES[:2])
    driver, worker = multiprocessing.Pipe()
    driver.send_bytes(pickle_jobs([plan.job]))
    driver.send(Task(0, plan.groups[0]))
    answer(worker)
    assert driver.recv() == ("ready", None)
    kind, text = driver.recv()
    assert kind == "failed" and text.startswith("ArithmeticError: stumbled") and "in stumble" in text
    driver.send_bytes(pickle_jobs([plan.job]))
    driver.close()
    with pytest.raises((EOFError, BrokenPipeError)):
        answer(worker)


def stumbler(task: str):
    def stumble(env: object):
        raise ArithmeticError("stumbled")

    return stumble


def test_what_cannot_travel_is_named(tmp_path: Path) -> None:
    arm = FunctionArm("lock", (("*", multiprocessing.Lock().acquire),), "holds a lock")
    plan = make_plan("expert", toy_suite(), SCENES, (BASELINE, arm))
    with pytest.raises(TypeError, match=r"cannot be sent to other processes: .*use one worker"):
        run_plans([plan], [tmp_path], LocalExecutor(2))
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        LocalExecutor(0)
