"""openpi's protocol over real sockets: with the public client where it is installed, and by its documented wire."""

import http.client
import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect as open_socket

from hooked_vla import HookedVLA, Observation
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.serving.server import RunningServer, serving
from hooked_vla.serving.wire import pack, unpack

OBS = {
    "observation/agent": np.full((64, 64, 3), 80, np.uint8),
    "observation/wrist": np.full((64, 64, 3), 200, np.uint8),
    "observation/state": np.linspace(-1, 1, 4),
    "prompt": "lift the block",
}


class PlainClient:
    """The protocol as openpi documents it: metadata on connecting, then a message each way; text is an error."""

    def __init__(self, server: RunningServer, **options: Any) -> None:
        self._open = ExitStack()
        connecting = open_socket(server.url, compression=None, max_size=None, **options)
        self.socket = self._open.enter_context(connecting)
        self.metadata = unpack(self.socket.recv())

    def infer(self, obs: Any) -> dict[str, Any]:
        self.socket.send(obs if isinstance(obs, str | bytes) else pack(obs))
        reply = self.socket.recv()
        if isinstance(reply, str):
            raise RuntimeError(reply)
        return unpack(reply)

    def close(self) -> None:
        self._open.close()


class PublicClient:
    """The client package that robots use."""

    def __init__(self, server: RunningServer) -> None:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy

        self.policy = WebsocketClientPolicy(server.host, server.port)
        self.metadata, self.infer = self.policy.get_server_metadata(), self.policy.infer

    def close(self) -> None:
        self.policy._ws.close()


needs_public = pytest.mark.skipif(
    importlib.util.find_spec("openpi_client") is None,
    reason="openpi-client is not installed (it pins numpy<2: pip install --no-deps openpi-client==0.1.2)",
)
CLIENTS = [pytest.param(PlainClient, id="wire"), pytest.param(PublicClient, id="openpi-client", marks=needs_public)]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with serving(HookedVLA.from_spec("smolvla", "tiny", seed=0)) as running:
        yield running


@contextmanager
def connect(server: RunningServer, client: type = PlainClient, **options: Any) -> Iterator[Any]:
    with closing(client(server, **options)) as connected:
        yield connected


def expected(model: HookedVLA, seed: int, edits: Any = (), env_step: int = 0) -> np.ndarray:
    obs = Observation({"agent": OBS["observation/agent"], "wrist": OBS["observation/wrist"]},
                      OBS["observation/state"].astype(np.float32), OBS["prompt"])  # fmt: skip
    noise = SeededNoise.of(model, obs)([seed], env_step)
    with model.hooks(edits):
        return model.predict_action_chunk(obs, noise)[0].numpy()


def get(server: RunningServer, path: str, headers: dict[str, str] | None = None) -> tuple[int, bytes]:
    with closing(http.client.HTTPConnection(server.host, server.port, timeout=10)) as connection:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_client_gets_metadata_and_chunks(server, client, tiny_model):
    with connect(server, client) as robot:
        assert robot.metadata["model"] == "smolvla" and robot.metadata["cameras"] == ["agent", "wrist"]
        assert (robot.metadata["n_action_steps"], robot.metadata["d_action"]) == (8, 4)
        first = robot.infer({**OBS, "seed": 3})
        assert first["actions"].dtype == np.float32 and first["server_timing"]["infer_ms"] > 0
        assert np.array_equal(first["actions"], expected(tiny_model, seed=3))
        second = robot.infer({**OBS, "seed": 4})
        assert not np.array_equal(first["actions"], second["actions"])
        assert second["server_timing"]["prev_total_ms"] >= first["server_timing"]["infer_ms"]


@needs_public
def test_openpis_broker_hands_out_a_chunk_step_by_step(server):
    broker = pytest.importorskip("openpi_client.action_chunk_broker", reason="openpi-client's dm-tree is not installed")
    client = PublicClient(server)
    chunk = client.infer({**OBS, "seed": 3})["actions"]
    steps = broker.ActionChunkBroker(client.policy, action_horizon=8)
    assert np.array_equal([steps.infer({**OBS, "seed": 3})["actions"] for _ in range(8)], chunk)
    client.close()


@pytest.mark.parametrize("client", CLIENTS)
def test_a_bad_request_is_answered_and_the_next_one_too(server, client):
    with connect(server, client) as robot:
        for wrong, message in (
            ({"prompt": "lift"}, "ValueError: no image for the cameras"),
            ({**OBS, "observation/state": np.zeros(9)}, r"ValueError: 'observation/state' must be \[4\], got \[9\]"),
            ({**OBS, "observation/agent": np.zeros((3, 3))}, "TypeError: camera 'agent': images are uint8"),
            ({**OBS, "seed": -1}, "ValueError: 'seed' must be in 0"),
            ({**OBS, "prompt": "lift " * 500}, "instruction of 2501 tokens, but the model takes 64"),
            ([1, 2], "TypeError: a request is a map of observations, got list"),
        ):
            with pytest.raises(RuntimeError, match=f"(?s)Traceback.*{message}"):
                robot.infer(wrong)
        assert robot.infer({**OBS, "seed": 3})["actions"].shape == (8, 4)


def test_bytes_that_are_no_message_and_text_are_answered(server):
    with connect(server) as robot:
        with pytest.raises(RuntimeError, match="WireError: 3 bytes are not a msgpack message"):
            robot.infer(b"\xc1\xc1\xc1")
        with pytest.raises(RuntimeError, match="TypeError: a request is a binary message, got text"):
            robot.infer("hello")
        with pytest.raises(RuntimeError, match="dtype object is refused"):
            robot.infer(pack({"a": np.zeros(1)}).replace(b"<f8", b"|O8"))
        assert "actions" in robot.infer(OBS)


def test_a_message_that_is_too_large_ends_that_connection_only(tiny_model):
    with serving(tiny_model, max_message=50_000) as server, connect(server) as patient:
        with connect(server) as robot, pytest.raises(ConnectionClosed) as closed:
            robot.infer({**OBS, "extra": np.zeros(20_000)})
        # websockets: CloseCode.MESSAGE_TOO_BIG
        assert closed.value.rcvd.code == 1009
        assert "actions" in patient.infer(OBS)


def test_clients_do_not_disturb_each_other(server, tiny_model):
    wanted = expected(tiny_model, seed=3)
    with connect(server) as first, connect(server) as second:
        for robot in (first, second):
            robot.socket.send(pack({**OBS, "seed": 3}))
        with connect(server) as leaver:
            leaver.socket.send(pack(OBS))
        replies = [unpack(robot.socket.recv())["actions"] for robot in (second, first)]
    assert all(np.array_equal(actions, wanted) for actions in replies)


def test_an_edit_is_active_in_the_served_model(tiny_model):
    steps = []

    def edit(value, hook):
        steps.append(hook.run.env_step)
        return -value

    edits = [("vlm.blocks.*.hook_mlp_out", edit)]
    with serving(tiny_model, edits=edits) as server, connect(server) as robot:
        assert robot.metadata["edits"] == ["vlm.blocks.*.hook_mlp_out"]
        actions = robot.infer({**OBS, "seed": 3, "env_step": 16})["actions"]
    assert set(steps) == {16}
    assert np.array_equal(actions, expected(tiny_model, seed=3, edits=edits, env_step=16))
    assert not np.allclose(actions, expected(tiny_model, seed=3, env_step=16))


def test_an_error_in_an_edit_goes_to_the_client(tiny_model):
    def narrow(value, hook):
        return value[..., :1]

    with serving(tiny_model, edits=[("expert.hook_velocity", narrow)]) as server, connect(server) as robot:
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"(?s)hook at expert.hook_velocity returned shape.*expected"):
                robot.infer(OBS)


def test_an_episode_begins_where_the_client_says_so():
    model = HookedVLA.from_spec("vqbet", "tiny", seed=0)
    obs = {key: value for key, value in OBS.items() if key != "prompt"} | {"seed": 1}
    with serving(model) as server, connect(server) as robot:
        first, second = (robot.infer(obs)["actions"] for _ in range(2))
        assert first.shape == (1, 4) and not np.array_equal(first, second)
        assert np.array_equal(robot.infer({**obs, "reset": True})["actions"], first)


def test_health_is_answered_without_a_websocket(server):
    assert get(server, "/healthz") == (200, b"OK\n")
    assert get(server, "/elsewhere")[0] == 426


def test_only_this_machine_and_no_browser_is_listened_to(server):
    assert server.host == "127.0.0.1" and server.url == f"ws://127.0.0.1:{server.port}"
    with pytest.raises(InvalidStatus, match="403"):
        PlainClient(server, origin="http://example.org")


def test_an_api_key_is_asked_for(tiny_model):
    with serving(tiny_model, api_key="secret") as server:
        for headers in ({}, {"Authorization": "Api-Key wrong"}):
            with pytest.raises(InvalidStatus, match="401"):
                PlainClient(server, additional_headers=headers)
        with connect(server, additional_headers={"Authorization": "Api-Key secret"}) as robot:
            assert robot.metadata["model"] == "smolvla"


def test_a_taken_address_is_an_error(server, tiny_model):
    with pytest.raises(OSError, match="in use"), serving(tiny_model, port=server.port):
        pass


def test_the_server_is_gone_after_the_block(tiny_model):
    with serving(tiny_model) as server, connect(server) as robot:
        pass
    with pytest.raises(ConnectionRefusedError):
        get(server, "/healthz")
    assert robot.socket.close_code is not None


def test_wrong_settings_are_refused(tiny_model):
    for settings, message in (
        ({"protocol": "grpc"}, r"unknown protocol 'grpc'; protocols: \['openpi', 'vla-eval'\]"),
        ({"max_batch_size": 4}, "max_batch_size is 1, got 4"),
        ({"cameras": {"image": "top"}}, "no cameras"),
    ):
        with pytest.raises(ValueError, match=message), serving(tiny_model, **settings):
            pass
