"""Tasks of a process of its own: one after another, none for longer than it may take."""

import threading
from collections.abc import Iterator

import pytest

from hooked_vla.atlas import worker as module
from hooked_vla.atlas.worker import Interrupted, Worker, WorkError


def test_what_takes_too_long_is_stopped_and_the_next_task_runs() -> None:
    worker = Worker("replay")
    try:
        with pytest.raises(Interrupted, match="took more than 0.01 s"):
            worker.run("film", {}, 0.01)
        with pytest.raises(WorkError, match="no such task"):
            worker.run("no such task", {}, 60.0)
    finally:
        worker.close()
    with pytest.raises(WorkError, match="closed"):
        worker.run("film", {}, 1.0)


def test_a_stream_waits_for_its_turn_unless_it_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_S", 0.05)
    worker, begun, may_end = Worker("live view"), threading.Event(), threading.Event()

    def steps(task: str, *_: object) -> Iterator[tuple[str, object]]:
        if task == "first":
            begun.set()
            may_end.wait(30.0)
        yield "done", task

    monkeypatch.setattr(worker, "_steps", steps)
    first = threading.Thread(target=worker.run, args=("first", {}, 1.0))
    first.start()
    assert begun.wait(30.0)
    with pytest.raises(WorkError, match="stopped before its turn"):
        list(worker.stream("second", {}, 1.0, lambda: True))
    third = worker.stream("third", {}, 1.0, lambda: False)
    assert next(third) == ("wait", None)
    may_end.set()
    assert list(third)[-1] == ("done", "third")
    first.join(30.0)
