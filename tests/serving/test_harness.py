"""The vla-eval model server, spoken to by the harness's own client."""

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import numpy as np
import pytest
import torch
from vla_eval.connection import Connection
from vla_eval.model_servers.base import SessionContext

from hooked_vla import HookedVLA, Observation
from hooked_vla.serving.harness import HookedModelServer
from hooked_vla.serving.policy import ServedPolicy
from hooked_vla.serving.server import serving


def look(seed: int = 0, size: int = 64) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    images = {camera: draw.integers(0, 256, (size, size, 3), dtype=np.uint8) for camera in ("agent", "wrist")}
    return {"images": images, "state": draw.normal(size=4), "task_description": "lift"}


def chunk(model: HookedVLA, seed: int) -> np.ndarray:
    obs = look(seed)
    state = obs["state"].astype(np.float32)
    return model.predict_action_chunk(Observation(obs["images"], state, obs["task_description"]))[0].numpy()


def talk(model: HookedVLA, say: Callable[[Any], Awaitable[Any]], **settings: Any) -> Any:
    """What a coroutine makes of a connection to the served model."""

    async def run(url: str) -> Any:
        async with Connection(url, timeout=20, max_retries=1) as client:
            return await say(client)

    with serving(model, "vla-eval", **settings) as server:
        return anyio.run(run, server.url)


@pytest.fixture(scope="module")
def act_policy() -> HookedVLA:
    # no random draws: the same observation, the same chunk
    return HookedVLA.from_spec("act", "tiny", seed=0)


def test_a_chunk_is_used_up_before_the_model_runs_again(act_policy):
    async def say(client: Any) -> Any:
        await client.start_episode({"task": {"name": "lift"}})
        first = [(await client.act(look(seed=0)))["actions"] for _ in range(8)]
        later = (await client.act(look(seed=1)))["actions"]
        await client.end_episode({"success": True})
        await client.start_episode({})
        # a new episode does not go on with the old chunk
        return client.server_info, first, later, (await client.act(look(seed=2)))["actions"]

    info, first, later, new = talk(act_policy, say)
    assert info["model_server"] == "HookedModelServer" and info["observation_params"]["send_state"]
    assert np.array_equal(first, chunk(act_policy, 0))
    assert np.array_equal(later, chunk(act_policy, 1)[0]) and np.array_equal(new, chunk(act_policy, 2)[0])


def test_edits_know_the_step_of_the_episode(tiny_model):
    seen = []

    def note(value, hook):
        seen.append(hook.run.env_step)

    async def say(client: Any) -> None:
        await client.start_episode({})
        for step in range(9):
            await client.act(look(step))

    talk(tiny_model, say, edits=[("vlm.blocks.0.hook_mlp_out", note)])
    assert seen == [0, 8]


def test_an_edit_is_active_in_the_served_model(act_policy):
    def flip(value, hook):
        return -value

    async def say(client: Any) -> Any:
        await client.start_episode({})
        return (await client.act(look()))["actions"]

    site = "encoder.blocks.0.hook_mlp_out"
    edited = talk(act_policy, say, edits=[(site, flip)])
    with act_policy.hooks([(site, flip)]):
        assert np.array_equal(edited, chunk(act_policy, 0)[0])
    assert not np.allclose(edited, chunk(act_policy, 0)[0])


def test_a_bad_observation_is_answered_and_the_next_one_too(act_policy):
    async def say(client: Any) -> Any:
        await client.start_episode({})
        errors = []
        for wrong in ({"images": {}}, look() | {"state": np.zeros(7)}, look() | {"images": {"agent": 3, "wrist": 4}}):
            with pytest.raises(RuntimeError) as error:
                await client.act(wrong)
            errors.append(str(error.value))
        return errors, (await client.act(look()))["actions"]

    (cameras, state, images), action = talk(act_policy, say)
    assert "no image for the cameras ['agent', 'wrist']" in cameras
    assert "'state' must be [4], got [7]" in state
    assert "camera 'agent': images are uint8" in images
    assert np.array_equal(action, chunk(act_policy, 0)[0])


def test_a_message_that_is_too_large_ends_that_connection_only(act_policy):
    async def say(client: Any) -> Any:
        noise = np.random.default_rng(0).bytes(100_000)
        async with Connection(client.url, timeout=20, max_retries=1) as other:
            await other.start_episode({})
            with pytest.raises(Exception, match="1009"):
                await other.act(look() | {"extra": noise})
        return (await client.act(look()))["actions"]

    assert talk(act_policy, say, max_message=50_000).shape == (4,)


def test_clients_that_look_back_are_asked_at_every_step():
    model = HookedVLA.from_spec("vqbet", "tiny", seed=0)

    async def say(client: Any) -> Any:
        with pytest.raises(RuntimeError, match="start an episode first"):
            await client.act(look())
        await client.start_episode({})
        torch.manual_seed(0)
        return [(await client.act(look(step)))["actions"] for step in range(6)]

    served = talk(model, say)
    torch.manual_seed(0)
    for step, action in enumerate(served):
        obs = look(step)
        expected = model.select_action(Observation(obs["images"], obs["state"].astype(np.float32), ""))[0]
        assert np.array_equal(action, expected.numpy())


def test_several_clients_share_a_forward_pass(act_policy):
    rows = []

    def note(value, hook):
        rows.append((len(value), hook.run.env_step))

    async def one(url: str, seed: int, found: dict[int, np.ndarray]) -> None:
        async with Connection(url, timeout=20, max_retries=1) as client:
            await client.start_episode({})
            found[seed] = (await client.act(look(seed)))["actions"]

    async def everybody(url: str) -> dict[int, np.ndarray]:
        found: dict[int, np.ndarray] = {}
        async with anyio.create_task_group() as group:
            for seed in range(5):
                group.start_soon(one, url, seed, found)
        return found

    edits = [("encoder.blocks.0.hook_mlp_out", note)]
    with serving(act_policy, "vla-eval", edits=edits, max_batch_size=4) as server:
        found = anyio.run(everybody, server.url)
    assert sum(n for n, _ in rows) == 5 and max(n for n, _ in rows) > 1 and {step for _, step in rows} == {0}
    for seed, action in found.items():
        assert np.allclose(action, chunk(act_policy, seed)[0], rtol=1e-5, atol=1e-5)


def test_batches_are_refused_where_rows_would_not_belong_together(act_policy):
    server = HookedModelServer(ServedPolicy(act_policy), max_batch_size=2)
    with pytest.raises(ValueError, match="same cameras and image sizes"):
        server.predict_batch([look(0), look(1, size=32)], [SessionContext("a", "1"), SessionContext("b", "2")])
    vqbet = ServedPolicy(HookedVLA.from_spec("vqbet", "tiny", seed=0))
    with pytest.raises(ValueError, match="max_batch_size must be 1"):
        HookedModelServer(vqbet, max_batch_size=2)
