"""A process of its own for what takes long or may crash: simulators that draw, and models that run.

The server asks for one task at a time and reads JSON lines back; a task that takes too long, or whose process dies,
is an error of that task and of nothing else. The process begins with the first task and ends when it was idle for a
while, or the server is gone. Everything in it happens in one thread, since what draws belongs to one.
"""

import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO, Any

from hooked_vla.atlas.routes import Conflict

# what a worker can be asked for: the function is called with its arguments, `emit` and `cancelled`
TASKS = {
    "film": "hooked_vla.atlas.replays:film",
    "ready": "hooked_vla.atlas.replays:ready",
    "attention": "hooked_vla.atlas.attending:attend",
    "act": "hooked_vla.atlas.acting:act",
    "act_options": "hooked_vla.atlas.acting:options",
    "pictures": "hooked_vla.atlas.pictures:pictures",
    "grids": "hooked_vla.atlas.pictures:grids",
    "umap": "hooked_vla.atlas.projections:umap",
}
# seconds without a task after which the process ends, and those that it has to stop when told to
IDLE_S, _STOP_S = 600.0, 10.0
# tasks that wait for the one that runs; more are turned away
WAITING = 6
_POLL_S = 0.5

Emit = Callable[[Any], None]
Cancelled = Callable[[], bool]


class WorkError(ValueError):
    """A task did not come to its end; the text says why, for the reader of the page. final: asked again it would say
    the same; otherwise another time may be better."""

    final = False


class Refused(WorkError):
    """What was asked for cannot be had, now or later."""

    final = True


class Interrupted(WorkError):
    """It took too long, or its process died."""


class Worker:
    """The server's side. name: what messages call it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._turn = threading.Lock()
        self._waiting = threading.Semaphore(WAITING)
        self._process: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._errors: IO[bytes] | None = None
        self._number = 0
        self._closed = False

    def run(self, task: str, arguments: Mapping[str, Any], seconds: float) -> Any:
        """What a task gives. seconds: how long it may take once it is its turn.

        Raises WorkError with the task's own text, or where it took too long or its process died; Conflict where others
        wait already.
        """
        with self._my_turn():
            for kind, value in self._steps(task, arguments, seconds, lambda: False):
                if kind == "done":
                    return value
        raise AssertionError("a task ends with what it gives, or raises")

    def stream(
        self, task: str, arguments: Mapping[str, Any], seconds: float, cancelled: Cancelled
    ) -> Iterator[tuple[str, Any]]:
        """("event", value) for everything that a task emits, ("wait", None) at least every half second meanwhile, and
        ("done", value). seconds: how long it may take once it is its turn. cancelled: asked often; the task is stopped
        once it says so.

        Raises WorkError as `run`, and where it is cancelled before its turn.
        """
        while not self._turn.acquire(timeout=_POLL_S):
            if cancelled():
                raise WorkError("stopped before its turn")
            yield "wait", None
        try:
            yield from self._steps(task, arguments, seconds, cancelled)
        finally:
            self._turn.release()

    def close(self) -> None:
        """End the process, whatever it does."""
        self._closed = True
        self._kill()

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        if not self._waiting.acquire(blocking=False):
            raise Conflict(f"the {self.name} has {WAITING} tasks waiting; ask again in a moment")
        try:
            with self._turn:
                yield
        finally:
            self._waiting.release()

    def _steps(
        self, task: str, arguments: Mapping[str, Any], seconds: float, cancelled: Cancelled
    ) -> Iterator[tuple[str, Any]]:
        if self._closed:
            raise WorkError(f"the {self.name} is closed")
        self._begin()
        self._number += 1
        finished = False
        try:
            self._send({"id": self._number, "task": task, "arguments": dict(arguments)})
            for kind, value in self._listen(self._number, seconds, cancelled):
                finished = kind == "done"
                yield kind, value
        except WorkError:
            finished = True
            raise
        finally:
            if not finished:
                # whoever listened went away in the middle
                self._kill()

    def _listen(self, number: int, seconds: float, cancelled: Cancelled) -> Iterator[tuple[str, Any]]:
        ends, told = time.monotonic() + seconds, False
        while True:
            if not told and cancelled():
                self._send({"cancel": number})
                ends, told = min(ends, time.monotonic() + _STOP_S), True
            try:
                answer = self._answers.get(timeout=max(0.01, min(_POLL_S, ends - time.monotonic())))
            except queue.Empty:
                if time.monotonic() < ends:
                    yield "wait", None
                    continue
                self._kill()
                text = "did not stop when told to" if told else f"took more than {seconds:g} s, and was stopped"
                raise Interrupted(f"the {self.name} {text}") from None
            if answer is None:
                raise Interrupted(f"the {self.name} ended in the middle of it: {self._last_words()}")
            if answer.get("id") != number:
                continue
            if "error" in answer:
                raise (Refused if answer.get("final") else WorkError)(str(answer["error"]))
            if "done" in answer:
                yield "done", answer["done"]
                return
            yield "event", answer["event"]

    def _begin(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._kill()
        self._answers, self._errors = queue.Queue(), tempfile.TemporaryFile()  # noqa: SIM115 as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "hooked_vla.atlas.worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._errors, text=True, encoding="utf-8", bufsize=1,
        )  # fmt: skip
        reader = threading.Thread(target=_read, args=(self._process.stdout, self._answers), daemon=True)
        reader.start()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process is not None and self._process.stdin is not None
        # that it died is told by the end of its answers
        with suppress(OSError):
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _last_words(self) -> str:
        if self._errors is None:
            return "it said nothing"
        size = self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, size - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"

    def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError, ValueError):
                if pipe is not None:
                    pipe.close()


def _read(lines: Any, answers: "queue.Queue[dict[str, Any] | None]") -> None:
    with suppress(ValueError, OSError):
        for line in lines:
            answers.put(json.loads(line))
    answers.put(None)


def main() -> None:
    """The process's side: tasks from standard input, answers to standard output."""
    out = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    # whatever is printed on the way must not mix with the answers
    os.dup2(2, 1)
    tasks: queue.Queue[dict[str, Any]] = queue.Queue()
    stopped: set[int] = set()
    threading.Thread(target=_take, args=(tasks, stopped), daemon=True).start()
    while True:
        try:
            asked = tasks.get(timeout=IDLE_S)
        except queue.Empty:
            return
        _answer(asked, stopped, out)


def _take(tasks: "queue.Queue[dict[str, Any]]", stopped: set[int]) -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "cancel" in message:
            stopped.add(message["cancel"])
        else:
            tasks.put(message)
    # the server is gone: at once, whatever is under way
    os._exit(0)


def _answer(asked: Mapping[str, Any], stopped: set[int], out: IO[str]) -> None:
    number = asked["id"]

    def say(kind: str, value: Any, **more: Any) -> None:
        out.write(json.dumps({"id": number, kind: value, **more}) + "\n")

    try:
        module, _, function = TASKS[asked["task"]].partition(":")
        task = getattr(importlib.import_module(module), function)
        say("done", task(asked["arguments"], lambda value: say("event", value), lambda: number in stopped))
    except Exception as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        expected = isinstance(error, ValueError | LookupError | OSError | ImportError | RuntimeError) and text
        # by its attribute: this module's own classes are others where it runs as a program
        final = getattr(error, "final", False) is True
        say("error", text if expected else f"{type(error).__name__}: {text}", final=final)


if __name__ == "__main__":
    main()
