"""The server answers its own page, and nobody else."""

import json
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from hooked_vla.atlas import app as app_module
from hooked_vla.atlas.app import TOKEN, to_json
from hooked_vla.atlas.routes import Conflict, Events, Media, NotThere, Route, plain
from hooked_vla.atlas.run import Run

OWN = "http://127.0.0.1:8765"


def said(run: Run, kind: str) -> Any:
    if kind == "media":
        return Media(b"\x89PNG", "image/png")
    if kind == "events":
        return Events(iter([{"a": 1}, None, {"b": float("nan")}]))
    raise {"missing": NotThere("no such thing"), "busy": Conflict("one at a time"), "wrong": ValueError("a bad page"),
           "broken": OSError("a disk")}[kind]  # fmt: skip


def changed(run: Run, body: dict[str, Any]) -> Any:
    return {"got": body}


@pytest.fixture
def toy(run: Run, make_client: Callable[..., TestClient], monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """A server with routes of the tests' own."""
    routes = [Route("said/{kind}", said), Route("change", changed, method="POST"),
              Route("asked", lambda run, text: {"text": text}, query=("text",))]  # fmt: skip
    monkeypatch.setattr(app_module, "all_routes", lambda live: routes)
    return make_client(run)


def post(client: TestClient, content: bytes = b"{}", **headers: str) -> int:
    own = {"origin": OWN, TOKEN: client.app.state.server.token}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return client.post("/api/change", content=content, headers=own | named).status_code


def test_the_page_and_its_files_are_served(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    token = client.app.state.server.token
    assert token in page.text and len(token) >= 32
    for name, kind in (("app.js", "text/javascript"), ("app.css", "text/css"), ("plotly.min.js", "text/javascript")):
        assert name in page.text or name.startswith("plotly")
        answer = client.get(f"/{name}")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)


def test_every_answer_forbids_what_the_page_does_not_need(client: TestClient) -> None:
    for path in ("/", "/app.js", "/api/experiments", "/api/nothing", "/nothing"):
        headers = client.get(path).headers
        assert headers["content-security-policy"].startswith("default-src 'self'; style-src 'self' 'unsafe-inline';")
        assert "script-src" not in headers["content-security-policy"] and "unsafe-eval" not in str(headers)
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1", "127.0.0.1:80", "localhost:8766",
                                  "localhost.evil.example:8765", "", "127.0.0.1:8765@evil.example"])  # fmt: skip
def test_other_names_are_not_answered(client: TestClient, host: str) -> None:
    for path in ("/", "/api/experiments"):
        answer = client.get(path, headers={"host": host})
        assert answer.status_code == 421 and client.app.state.server.token not in answer.text


@pytest.mark.parametrize("host", ["localhost:8765", "127.0.0.1:8765", "[::1]:8765", "LOCALHOST:8765"])
def test_its_own_names_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/experiments", headers={"host": host}).status_code == 200


def test_a_browser_that_comes_from_elsewhere_gets_the_page_alone(client: TestClient) -> None:
    for site in ("cross-site", "same-site"):
        assert client.get("/", headers={"sec-fetch-site": site}).status_code == 200
        assert client.get("/api/experiments", headers={"sec-fetch-site": site}).status_code == 403
        assert client.get("/app.js", headers={"sec-fetch-site": site}).status_code == 403
    for site in ("same-origin", "none"):
        assert client.get("/api/experiments", headers={"sec-fetch-site": site}).status_code == 200


def test_posts_need_our_origin_and_token(toy: TestClient) -> None:
    assert post(toy) == 200
    for origin in ("http://evil.example", "null", "http://127.0.0.1:8766", "https://127.0.0.1:8765", ""):
        assert post(toy, origin=origin) == 403, origin
    assert post(toy, sec_fetch_site="cross-site") == 403
    for token in ("", "x", toy.app.state.server.token[:-1]):
        assert post(toy, x_atlas_token=token) == 403
    assert toy.post("/api/change", headers={TOKEN: toy.app.state.server.token}).status_code == 403
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS"):
        assert toy.request(method, "/api/change").status_code == 403
    assert toy.get("/api/change").status_code == 404


def test_what_is_posted_is_a_small_json_object(toy: TestClient) -> None:
    assert post(toy, b'{"a": [1]}') == 200 and post(toy, b"") == 200
    for content in (b"[1]", b"{", b"\xff", b"[" * 60_000):
        assert post(toy, content) == 400
    assert post(toy, b'"' + b"a" * app_module.MAX_BODY + b'"') == 413


@pytest.mark.parametrize("path", [
    "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%2e%2e/%2e%2e/etc/passwd", "....//....//etc/passwd",
    "app.py", "page/app.js", "/etc/passwd", "%00", "api", "api/", "data/index.js", "static/../app.js", "..\\..\\etc",
])  # fmt: skip
def test_no_path_leads_out_of_the_page(served: str, path: str) -> None:
    # http.client sends a path as it stands, where others tidy it up
    port = int(served.rstrip("/").rpartition(":")[2])
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", f"/{path}")
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    assert answer.status in (400, 404) and b"root:" not in text and b"import" not in text


@pytest.mark.parametrize(
    "key", ["..", "%2e%2e", "..%2f..", "E4%2f..%2fE4", "E4%00", "nothing", "'; DROP TABLE x; --", "%"]
)
def test_no_key_is_a_path(client: TestClient, key: str) -> None:
    for rest in (
        "",
        "/table/results",
        "/table/..%2f..%2fresults/page/0",
        "/figure/..%2fsuccess",
        "/table/results/page/0",
    ):
        answer = client.get(f"{OWN}/api/experiments/{key}{rest}")
        assert answer.status_code == 404 or key in ("..", "%2e%2e"), answer.text
        assert set(answer.json()) == {"error"} or answer.json() == client.get("/api/experiments").json()


def test_troubles_are_told_without_a_traceback(toy: TestClient) -> None:
    told = {kind: toy.get(f"/api/said/{kind}") for kind in ("missing", "busy", "wrong", "broken")}
    assert {kind: answer.status_code for kind, answer in told.items()} == {
        "missing": 404, "busy": 409, "wrong": 400, "broken": 500,
    }  # fmt: skip
    assert told["missing"].json() == {"error": "no such thing"} and told["broken"].json() == {
        "error": "OSError: a disk"
    }
    assert not any("Traceback" in answer.text or ".py" in answer.text for answer in told.values())


def test_media_and_streams(toy: TestClient) -> None:
    media = toy.get("/api/said/media")
    assert media.content == b"\x89PNG" and media.headers["content-type"] == "image/png"
    events = toy.get("/api/said/events")
    assert events.headers["content-type"].startswith("text/event-stream")
    assert events.text == 'data: {"a":1}\n\n:\n\ndata: {"b":null}\n\n'
    assert toy.get("/api/asked?text=a%26b&other=1").json() == {"text": "a&b"}


def test_a_stream_is_closed_when_nobody_listens() -> None:
    import anyio

    ended = []

    def endless() -> Iterator[int]:
        try:
            while True:
                yield 1
        finally:
            ended.append(True)

    async def listen_once() -> None:
        stream = app_module._stream(Events(endless()))
        async for _ in stream:
            break
        await stream.aclose()

    anyio.run(listen_once)
    assert ended == [True]


def test_values_are_strict_json_that_ends_no_script() -> None:
    import numpy as np

    value = {"a": float("inf"), 1: np.float32("nan"), "b": np.arange(2), "c": {"</script>\u2028"}, "d": Path("x"),
             "e": b"\xff", "f": np.int64(3), "g": (None, True)}  # fmt: skip
    text = to_json(value)
    assert json.loads(text) == {"a": None, "1": None, "b": [0, 1], "c": ["</script>\u2028"], "d": "x", "e": "\ufffd",
                                "f": 3, "g": [None, True]}  # fmt: skip
    assert b"<" not in text and text.isascii()
    assert plain(float("-inf")) is None


def test_routes_say_what_they_cannot_be() -> None:
    with pytest.raises(ValueError, match="GET or POST"):
        Route("x", said, method="PUT")
    with pytest.raises(ValueError, match="media must be one of"):
        Route("x", said, media="text/html")
    with pytest.raises(ValueError, match="an export holds no answers"):
        Route("x", said, listing=lambda run: iter(()), query=("a",))
