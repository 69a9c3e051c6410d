"""The server of the Atlas: the views' paths under /api/, and the page's files. It answers this machine alone.

A page elsewhere must neither read it nor make it do something: only its own names are accepted as Host, nothing is
shared with other origins, and whatever is not a plain read needs this server's origin and the token in its page.
"""

import json
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from hooked_vla.atlas.page import KINDS, assets, document
from hooked_vla.atlas.routes import Conflict, Events, Media, NotThere, Route, plain
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views import all_routes, first_view
from hooked_vla.extras import needs_packages

with needs_packages(("fastapi",), "the Atlas needs: pip install 'hooked-vla[atlas]'"):
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.datastructures import Headers
    from fastapi.responses import FileResponse, HTMLResponse, Response, StreamingResponse

logger = logging.getLogger(__name__)

TOKEN = "x-atlas-token"
MAX_BODY = 64 * 2**10
POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; media-src 'self' blob:; "
    "object-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
_END = object()

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Server:
    """Who the server is. port: that it listens on; token: that its own page sends with every post."""

    port: int
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24), repr=False)

    @property
    def hosts(self) -> frozenset[str]:
        return frozenset(f"{name}:{self.port}" for name in ("localhost", "127.0.0.1", "[::1]"))

    @property
    def origins(self) -> frozenset[str]:
        return frozenset(f"http://{host}" for host in self.hosts)


def create_app(run: Run, server: Server, live: bool = True) -> FastAPI:
    """The application that serves a run. live: with the view that simulates."""
    app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    for route in all_routes(live):
        answer = _posted if route.method == "POST" else _asked
        app.add_api_route(f"/api/{route.path}", answer(run, route), methods=[route.method], include_in_schema=False)
    about = {"live": True, "simulates": live, "token": server.token, "run": run.root.name, "home": first_view(run)}
    page = document(about, live)

    def index() -> Response:
        return HTMLResponse(page, headers={"Cache-Control": "no-store"})

    app.add_api_route("/", index, include_in_schema=False)
    for name, path in assets(live).items():
        app.add_api_route(f"/{name}", _file(path), include_in_schema=False)
    for status in (404, 405):
        app.add_exception_handler(status, _nothing_there)
    app.add_middleware(Guard, server=server)
    return app


class Guard:
    """Refuses whatever does not come from this machine's own page, and marks every answer as for it alone."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], server: Server) -> None:
        self.app, self.server = app, server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return
        refused = self._refusal(scope["method"], scope["path"], Headers(scope=dict(scope)))

        async def marked(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *own]}
            await send(message)

        if refused is None:
            await self.app(scope, receive, marked)
        else:
            status, text = refused
            await _error(status, text)(dict(scope), receive, marked)

    def _refusal(self, method: str, path: str, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or hosts[0].lower() not in self.server.hosts:
            return 421, "this server answers only under its own name"
        # a browser says where a request comes from; to follow a link to the page is fine
        if path != "/" and headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return 403, "requests of other sites are refused"
        if method in ("GET", "HEAD"):
            return None
        if headers.getlist("origin") not in [[origin] for origin in self.server.origins]:
            return 403, "only this server's own page may change something"
        if not secrets.compare_digest(headers.get(TOKEN, "").encode(), self.server.token.encode()):
            return 403, "the page's token is missing or of another session: load the page again"
        return None


def _asked(run: Run, route: Route) -> Callable[..., Any]:
    async def answer(request: Request) -> Response:
        query = {name: request.query_params.get(name, "") for name in route.query}
        return await _answer(run, route, {**request.path_params, **query})

    return answer


def _posted(run: Run, route: Route) -> Callable[..., Any]:
    async def answer(request: Request) -> Response:
        sent = bytearray()
        async for chunk in request.stream():
            sent += chunk
            if len(sent) > MAX_BODY:
                return _error(413, f"more than {MAX_BODY} bytes were sent")
        try:
            body = json.loads(bytes(sent) or b"{}")
        except (ValueError, RecursionError):
            return _error(400, "what was sent is not JSON")
        if not isinstance(body, dict):
            return _error(400, "what was sent is not a JSON object")
        return await _answer(run, route, {**request.path_params, "body": body})

    return answer


async def _answer(run: Run, route: Route, parameters: Mapping[str, Any]) -> Response:
    """What a view says; its troubles as {"error": ...}, without a traceback."""
    try:
        found = await run_in_threadpool(_compute, run, route, parameters)
    except NotThere as error:
        return _error(404, str(error.args[0]) if error.args else "it is not there")
    except Conflict as error:
        return _error(409, str(error))
    except ValueError as error:
        return _error(400, str(error))
    except Exception as error:
        logger.warning("%s: %s", route.path, error, exc_info=logger.isEnabledFor(logging.DEBUG))
        return _error(500, f"{type(error).__name__}: {error}")
    if isinstance(found, Media):
        return Response(found.content, media_type=found.kind, headers={"Cache-Control": "no-cache"})
    if isinstance(found, Events):
        return StreamingResponse(_stream(found), media_type="text/event-stream", headers={"Cache-Control": "no-store"})
    return Response(found, media_type="application/json", headers={"Cache-Control": "no-store"})


def _compute(run: Run, route: Route, parameters: Mapping[str, Any]) -> Media | Events | bytes:
    found = route.get(run, **parameters)
    return found if isinstance(found, Media | Events) else to_json(found)


def to_json(value: Any) -> bytes:
    """Strict JSON in ASCII: nothing in it can end a script or a line of one."""
    return json.dumps(plain(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c").encode()


async def _stream(events: Events) -> AsyncIterator[bytes]:
    try:
        while (value := await run_in_threadpool(next, events.source, _END)) is not _END:
            yield b":\n\n" if value is None else b"data: " + to_json(value) + b"\n\n"
    finally:
        if callable(close := getattr(events.source, "close", None)):
            close()


def _file(path: Any) -> Callable[[], Response]:
    def answer() -> Response:
        return FileResponse(path, media_type=KINDS[path.suffix], headers={"Cache-Control": "no-cache"})

    return answer


async def _nothing_there(request: Request, error: Exception) -> Response:
    return _error(404, "there is nothing at this address")


def _error(status: int, text: str) -> Response:
    return Response(to_json({"error": text}), status, {"Cache-Control": "no-store"}, "application/json")
