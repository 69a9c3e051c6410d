"""The websocket server that both protocols run on: loopback unless told otherwise, bounded messages, no browsers.

A page in somebody's browser can reach servers on the loopback of the machine it runs on, so connections that name
an origin, as browsers' do and robots' do not, are turned away.
"""

import asyncio
import hmac
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from hooked_vla.hooks.model import HookRequest
from hooked_vla.serving import needs_serve_extra
from hooked_vla.serving.policy import ServedPolicy
from hooked_vla.vla import HookedVLA

with needs_serve_extra():
    from websockets.asyncio.server import ServerConnection
    from websockets.asyncio.server import serve as listen
    from websockets.http11 import Request, Response

logger = logging.getLogger(__name__)

PROTOCOLS = ("openpi", "vla-eval")
LOOPBACK = ("127.0.0.1", "::1", "localhost")
# openpi: scripts/serve_policy.py
PORT = 8000
# four cameras of 1280 x 720 pixels take 11 MB
MAX_MESSAGE = 64 * 2**20
START_SECONDS = 30.0


@dataclass(frozen=True)
class RunningServer:
    """A server that listens. port: the one that was given, where 0 was asked for."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """Where clients connect."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"ws://{host}:{self.port}"


def serve(
    model: HookedVLA,
    protocol: str = "openpi",
    host: str = "127.0.0.1",
    port: int = PORT,
    edits: Sequence[HookRequest] = (),
    on_start: Callable[[RunningServer], None] = lambda server: None,
    **settings: Any,
) -> None:
    """Serve a policy until interrupted.

    protocol: "openpi" or "vla-eval". host: whom to listen to, only this machine by default; port: 0 for a free one.
    edits: (site pattern, function) pairs that are active in the served model. on_start: called once it listens.
    settings: cameras, instruction, unnorm_key (see ServedPolicy), max_message (bytes), api_key (which clients then
    must send, as openpi's do when they are given one), max_batch_size (vla-eval: clients that one forward pass may
    answer).
    Raises ValueError for an unknown protocol, ModuleNotFoundError naming the extra where a package is missing, OSError
    when the address is taken.
    """
    server = _Server(model, protocol, host, port, edits, **settings)
    try:
        asyncio.run(server.run(on_start))
    except KeyboardInterrupt:
        logger.info("stopped")


@contextmanager
def serving(
    model: HookedVLA,
    protocol: str = "openpi",
    host: str = "127.0.0.1",
    port: int = 0,
    edits: Sequence[HookRequest] = (),
    **settings: Any,
) -> Iterator[RunningServer]:
    """The same in the background, for the block: yields when clients can connect.

    Raises as `serve`, and TimeoutError when it does not listen within half a minute.
    """
    server = _Server(model, protocol, host, port, edits, **settings)
    started, found, failed = threading.Event(), [], []
    loop = asyncio.new_event_loop()

    def note(running: RunningServer) -> None:
        found.append(running)
        started.set()

    def run() -> None:
        try:
            loop.run_until_complete(server.run(note))
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            failed.append(error)
        finally:
            started.set()

    thread = threading.Thread(target=run, name="hooked-vla-serving", daemon=True)
    thread.start()
    try:
        if not started.wait(START_SECONDS):
            raise TimeoutError(f"the server did not listen within {START_SECONDS:g} s")
        if failed:
            raise failed[0]
        yield found[0]
    finally:
        loop.call_soon_threadsafe(server.stop)
        thread.join()
        loop.close()


class _Server:
    """One policy at one address."""

    def __init__(
        self,
        model: HookedVLA,
        protocol: str,
        host: str,
        port: int,
        edits: Sequence[HookRequest],
        max_message: int = MAX_MESSAGE,
        api_key: str | None = None,
        max_batch_size: int = 1,
        **settings: Any,
    ) -> None:
        self.host, self.port, self.protocol, self.api_key = host, port, protocol, api_key
        self.max_message = max_message
        self.make_handler = _handler_of(protocol, ServedPolicy(model, edits, **settings), max_batch_size)
        self._stopped: asyncio.Event | None = None

    async def run(self, on_start: Callable[[RunningServer], None]) -> None:
        """Listen until `stop`."""
        self._stopped = asyncio.Event()
        if self.host not in LOOPBACK:
            logger.warning("listening on %s: whoever reaches this machine can use the policy", self.host)
        async with self.make_handler() as handler, listen(
            handler, self.host, self.port, process_request=self._answer_http, origins=[None], compression=None,
            max_size=self.max_message,
        ) as server:  # fmt: skip
            port = next(iter(server.sockets)).getsockname()[1]
            running = RunningServer(self.host, port)
            logger.info("%s server on %s", self.protocol, running.url)
            on_start(running)
            await self._stopped.wait()

    def stop(self) -> None:
        """Close every connection and end `run`; called in its event loop."""
        if self._stopped is not None:
            self._stopped.set()

    def _answer_http(self, connection: ServerConnection, request: Request) -> Response | None:
        # openpi asks /healthz, vla-eval /health
        if request.path in ("/healthz", "/health"):
            return connection.respond(HTTPStatus.OK, "OK\n")
        if self.api_key is not None:
            given = request.headers.get("Authorization", "")
            if not hmac.compare_digest(given.encode(), f"Api-Key {self.api_key}".encode()):
                return connection.respond(HTTPStatus.UNAUTHORIZED, "this server wants an API key\n")
        return None


def _handler_of(protocol: str, policy: ServedPolicy, max_batch_size: int) -> Callable[[], Any]:
    """Makes what answers connections, in the event loop that it is called in."""
    if protocol == "openpi":
        if max_batch_size != 1:
            raise ValueError(f"openpi's clients are answered one by one: max_batch_size is 1, got {max_batch_size}")
        from hooked_vla.serving.openpi import openpi_handler

        return lambda: openpi_handler(policy)
    if protocol == "vla-eval":
        from hooked_vla.serving.harness import HookedModelServer, harness_handler

        server = HookedModelServer(policy, max_batch_size)
        return lambda: harness_handler(server)
    raise ValueError(f"unknown protocol {protocol!r}; protocols: {list(PROTOCOLS)}")
