"""openpi's websocket protocol: metadata first, then one observation in and one dict with "actions" out, and so on.

Read from openpi's `serving/websocket_policy_server.py` and `policies/policy.py`, and from openpi-client 0.1.2. What
a request may hold beside openpi's own entries: "env_step" (which edits may refer to), "seed" (of the episode: it and
env_step then decide the random draws, as in rollouts), "reset" (an episode begins).
"""

import asyncio
import logging
import time
import traceback
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from hooked_vla.serving import needs_serve_extra
from hooked_vla.serving.policy import ServedPolicy, Session
from hooked_vla.serving.requests import read_whole_number
from hooked_vla.serving.wire import pack, unpack

with needs_serve_extra():
    from websockets.asyncio.server import ServerConnection
    from websockets.exceptions import ConnectionClosed

logger = logging.getLogger(__name__)


@asynccontextmanager
async def openpi_handler(policy: ServedPolicy) -> AsyncIterator[Any]:
    """What the websocket server calls for every connection; the model runs in one thread beside it."""
    with ThreadPoolExecutor(1, thread_name_prefix="hooked-vla-model") as worker:

        async def handle(connection: ServerConnection) -> None:
            await _converse(connection, policy, worker)

        yield handle


async def _converse(connection: ServerConnection, policy: ServedPolicy, worker: ThreadPoolExecutor) -> None:
    session, loop = policy.session(), asyncio.get_running_loop()
    whole_ms: float | None = None
    try:
        await connection.send(pack(policy.metadata))
        while True:
            data = await connection.recv()
            start = time.perf_counter()
            try:
                reply = await loop.run_in_executor(worker, _answer, session, data)
            # whatever goes wrong in one request, the client is told and may send the next
            except Exception as error:
                logger.warning("request failed: %s: %s", type(error).__name__, error)
                await connection.send(traceback.format_exc())
                continue
            reply["server_timing"] = {"infer_ms": 1e3 * (time.perf_counter() - start)}
            if whole_ms is not None:
                reply["server_timing"]["prev_total_ms"] = whole_ms
            await connection.send(pack(reply))
            whole_ms = 1e3 * (time.perf_counter() - start)
    except ConnectionClosed as closed:
        logger.info("client left: %s", closed)


def _answer(session: Session, data: bytes | str) -> dict[str, Any]:
    if isinstance(data, str):
        raise TypeError("a request is a binary message, got text")
    request = unpack(data)
    obs = session.policy.read(request)
    assert isinstance(request, Mapping)
    if request.get("reset"):
        session.reset()
    env_step, seed = read_whole_number(request, "env_step"), read_whole_number(request, "seed")
    return {"actions": session.act(obs, env_step, seed)}
