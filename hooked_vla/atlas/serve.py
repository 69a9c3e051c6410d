"""Serves a run on this machine until it is interrupted."""

import logging
import socket
import threading
import webbrowser
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

from hooked_vla.atlas.app import Server, create_app
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.features import get_columns
from hooked_vla.atlas.views.live import get_options
from hooked_vla.atlas.views.models import RUN, all_models, results
from hooked_vla.atlas.views.replayed import replays
from hooked_vla.extras import needs_packages

with needs_packages(("uvicorn",), "the Atlas needs: pip install 'hooked-vla[atlas]'"):
    import uvicorn

HOST = "127.0.0.1"
# for a process to begin
READY_S = 120.0


def serve(run: Run, port: int, live: bool, browser: bool, say: Callable[[str], None]) -> None:
    """Serve a run's page on the loopback interface; port 0: any that is free. browser: open the page.

    Raises OSError for a port that is taken.
    """
    with closing(listen(port)) as listening:
        server = make_server(run, listening, live)
        address = f"http://{HOST}:{listening.getsockname()[1]}/"
        say(f"{run.root} at {address} (Ctrl-C ends)")
        if browser:
            # a browser may take its time to start, and its call to return
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        threading.Thread(target=warm, args=(run, live), daemon=True).start()
        with suppress(KeyboardInterrupt), quiet_end(server):
            server.run(sockets=[listening])


def warm(run: Run, live: bool) -> None:
    """What takes long the first time, before anybody asks for it: the run's models and features, the process that makes
    films, and (live) the one that lets a policy act."""
    # what is damaged says so when it is asked for
    with suppress(Exception):
        warm_views(run)
    with suppress(Exception):
        if run.rollouts:
            replays(run).run("ready", {}, READY_S)
    with suppress(Exception):
        if live:
            get_options(run)


def warm_views(run: Run) -> None:
    """Build the run's models, and read the figures of its features."""
    for known in all_models(run):
        if known["source"] == RUN:
            # what cannot be built says so when it is asked for
            with suppress(Exception):
                results(run, known["key"])
    for index in run.indexes:
        with suppress(Exception):
            get_columns(run, index)


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface. Raises OSError naming a port that is taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise OSError(
            error.errno, f"port {port} of {HOST} cannot be used ({error.strerror}): choose another --port"
        ) from error
    return listening


def make_server(run: Run, listening: socket.socket, live: bool) -> "uvicorn.Server":
    """A server of the run on a socket that listens; it does not run yet."""
    app = create_app(run, Server(listening.getsockname()[1]), live)
    # streams that never end by themselves must not keep the server from ending
    return uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                         timeout_graceful_shutdown=2, ws="none"))  # fmt: skip


@contextmanager
def quiet_end(server: "uvicorn.Server") -> Iterator[None]:
    """Inside the block, nothing is logged once the server was told to end: whoever still waits for a film is then cut
    off, which is no fault to report."""

    def running(record: logging.LogRecord) -> bool:
        return not server.should_exit

    logger = logging.getLogger("uvicorn.error")
    logger.addFilter(running)
    try:
        yield
    finally:
        logger.removeFilter(running)
