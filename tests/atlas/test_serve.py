"""What takes long is ready before anybody asks, and a server that is told to end says nothing of who was cut off."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from hooked_vla.atlas import serve
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.serve import listen, make_server, quiet_end, warm
from hooked_vla.atlas.views.live import get_options, live_of
from hooked_vla.atlas.views.replayed import replays
from hooked_vla.atlas.worker import Worker


@pytest.fixture
def own(run_folder: Path, tmp_path: Path) -> Iterator[Run]:
    run = Run.open(run_folder, cache=tmp_path / "cache")
    yield run
    run.close()


def unasked(*_: object) -> None:
    raise AssertionError("a worker is asked for what it said before")


def test_processes_have_begun_before_the_first_question(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    warm(own, live=True)
    for worker in (replays(own), live_of(own).worker):
        assert worker._process is not None and worker._process.poll() is None
    monkeypatch.setattr(Worker, "run", unasked)
    assert "smolvla-tabletop" in get_options(own)["models"]


def test_only_what_the_page_has_is_begun(tmp_path: Path, own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(Worker, "run", lambda self, task, *_: asked.append(task))
    warm(own, live=False)
    warm(Run.open(tmp_path, cache=tmp_path / "none"), live=False)
    assert asked == ["ready"]


def test_a_server_that_ends_is_quiet(own: Run) -> None:
    said: list[str] = []
    logger, handler = logging.getLogger("uvicorn.error"), logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    with listen(0) as listening:
        server = make_server(own, listening, live=False)
        logger.addHandler(handler)
        try:
            with quiet_end(server):
                logger.error("a fault")
                server.should_exit = True
                logger.error("cut off")
            logger.error("of another server")
        finally:
            logger.removeHandler(handler)
    assert said == ["a fault", "of another server"]


def test_what_is_damaged_does_not_keep_the_rest_from_being_ready(own: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def damaged(run: Run) -> object:
        raise AttributeError("a manifest without a model")

    def busy(self: Worker, task: str, *_: object) -> object:
        asked.append(task)
        raise OSError("no process more")

    monkeypatch.setattr(serve, "all_models", damaged)
    monkeypatch.setattr(Worker, "run", busy)
    warm(own, live=True)
    assert asked == ["ready", "act_options"]
