"""A small real run, a server of it, a copy of it, and a browser whose pages may neither complain nor ask elsewhere."""

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright
from shared_folder import shared_folder
from starlette.testclient import TestClient
from unchecked import unchecked_shapes

from hooked_vla.atlas.app import Server, create_app
from hooked_vla.atlas.export import export_run
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.serve import listen, make_server
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.report import write_outcome
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.settings import Options

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PORT = 8765
WAIT_MS = 60_000
expect.set_options(timeout=WAIT_MS)
SETTINGS = {"episodes": 2, "max_steps": 12, "injected": ["vlm:middle", "vlm:last", "expert"], "controls": ["expert"],
            "cross_prompt": [], "cross_seed": False}  # fmt: skip


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RUN/E4: two short episodes an arm of a shipped policy on the tabletop. Leave it as it is; copy it to change."""
    return shared_folder(tmp_path_factory, "atlas", run_e4) / "RUN"


def run_e4(folder: Path) -> None:
    definition = find_experiment("E4")
    definition = replace(definition, settings={**definition.settings, **SETTINGS}, quick={})
    options = Options(4, image_size=96)
    context = Context(definition, ModelSource("smolvla-tabletop"), folder / "RUN" / "E4", options=options)
    with unchecked_shapes():
        context.claim()
        write_outcome(context, definition.module.run(context, definition.settle(False)))


@pytest.fixture(scope="session")
def run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    opened = Run.open(run_folder, cache=tmp_path_factory.mktemp("cache"))
    yield opened
    opened.close()


def client_of(run: Run, live: bool = True) -> TestClient:
    """Asks a run's application as the page would; its token is in `client.app.state.server`."""
    server = Server(PORT)
    app = create_app(run, server, live)
    app.state.server = server
    return TestClient(app, base_url=f"http://127.0.0.1:{PORT}", raise_server_exceptions=True)


@pytest.fixture(scope="session")
def make_client() -> Callable[..., TestClient]:
    """`client_of`, for runs of a test's own."""
    return client_of


@pytest.fixture(scope="session")
def client(run: Run) -> TestClient:
    return client_of(run)


@contextmanager
def serving(run: Run, live: bool = True) -> Iterator[str]:
    """A server of a run while the block lasts; its address, "http://127.0.0.1:PORT/"."""
    listening = listen(0)
    server = make_server(run, listening, live)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        deadline = time.monotonic() + 30
        while not server.started:
            assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        listening.close()
    assert not thread.is_alive(), "the server did not end"


@pytest.fixture(scope="session")
def serve_run() -> Callable[..., AbstractContextManager[str]]:
    """`serving`, for runs of a test's own."""
    return serving


@pytest.fixture(scope="session")
def served(run: Run) -> Iterator[str]:
    """The address of a server of `run`."""
    with serving(run) as address:
        yield address


@pytest.fixture(scope="session")
def exported(run: Run, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The file:// address of a copy of `run`, without films and attention: each takes a second or more to make."""
    folder = tmp_path_factory.mktemp("exported") / "PAGE"
    export_run(run, folder, replays=False)
    return f"{(folder / 'index.html').as_uri()}"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """For one module: while Playwright is open its event loop runs, and nothing in this process can run another."""
    if CHROMIUM is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    with sync_playwright() as playwright:
        # a container's root has no sandbox
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@dataclass
class Guard:
    """What pages did that they must not."""

    origin: str
    wrong: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def watch(self, page: Page) -> None:
        page.on("console", self.console)
        page.on("pageerror", lambda error: self.complain(f"error: {error}"))
        page.on("request", lambda asked: self.request(asked.url))
        page.on("requestfailed", lambda asked: self.complain(f"failed: {asked.url}"))

    def console(self, said: ConsoleMessage) -> None:
        if said.type in ("error", "warning"):
            self.complain(f"console: {said.text}")

    def request(self, url: str) -> None:
        if not url.startswith((self.origin, "data:", "blob:")):
            self.complain(f"a request to {url}")

    def complain(self, text: str) -> None:
        if not any(part in text for part in self.expected):
            self.wrong.append(text)


@pytest.fixture(scope="session", name="visit")
def _visit() -> Callable[[Page, str], Page]:
    return visit


OpenPage = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """open_page(address, "#/experiments", width=1280, scheme="light", expected=()) -> a page that was drawn.

    The test fails at its end if a page wrote an error or a warning to the console, or asked for anything outside its
    own origin (for a copy: outside its folder). expected: parts of complaints that the test means to cause.
    """
    contexts, guards = [], []

    def opened(
        address: str, place: str = "", width: int = 1280, height: int = 900,
        scheme: Literal["light", "dark"] = "light", expected: tuple[str, ...] = (),
    ) -> Page:  # fmt: skip
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        # a copy must open without a network
        context.set_offline(address.startswith("file:"))
        guard = Guard(address.rsplit("/", 1)[0] + "/", expected=expected)
        page = context.new_page()
        # a core that others hold makes a page slow, not wrong
        page.set_default_timeout(WAIT_MS)
        guard.watch(page)
        contexts.append(context)
        guards.append(guard)
        page.goto(address + place)
        drawn(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [text for guard in guards for text in guard.wrong]


def visit(page: Page, place: str) -> Page:
    """The page at another place ("#/models") of the same document, when its view was drawn."""
    page.evaluate("place => { delete document.querySelector('#main').dataset.drawn; location.hash = place; }", place)
    return drawn(page)


def drawn(page: Page) -> Page:
    """The page, when its view was drawn. (wait_for_function would need eval, which the page's policy forbids.)"""
    page.locator("#main[data-drawn]").wait_for(state="attached")
    return page
