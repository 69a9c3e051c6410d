"""A vla-eval model server (AllenAI's harness, 0.8): `predict(obs, ctx) -> {"actions": [chunk, d_action]}`.

The harness buffers a chunk per client and asks again when its steps are used up. Several clients' observations may
be answered by one batched forward pass (`max_batch_size`).
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from hooked_vla.inputs import Observation
from hooked_vla.serving import needs_harness_extra
from hooked_vla.serving.policy import ServedPolicy, Session

with needs_harness_extra():
    import anyio
    from vla_eval.model_servers.base import SessionContext
    from vla_eval.model_servers.predict import PredictModelServer

    # the harness's own server takes messages of any size and settings from any page
    from vla_eval.model_servers.serve import _handle_connection
    from vla_eval.specs import IMAGE_RGB, LANGUAGE, RAW, DimSpec


class HookedModelServer(PredictModelServer):
    """A served policy in the harness's terms; `vla_eval.evaluate(HookedModelServer(policy), ...)` works too.

    max_batch_size: observations of different clients that one forward pass may answer.
    """

    def __init__(self, policy: ServedPolicy, max_batch_size: int = 1, **settings: Any) -> None:
        """settings: the harness's, such as max_wait_time and action_ensemble.

        Raises ValueError for batches of a policy that looks at several observation steps.
        """
        if policy.remembers and max_batch_size > 1:
            raise ValueError(f"{policy.model.spec.name} looks at several observation steps: max_batch_size must be 1")
        # such a policy wants every observation, so it must be asked at every step
        chunk = None if policy.remembers else policy.model.spec.features.n_action_steps
        super().__init__(chunk_size=chunk, max_batch_size=max_batch_size, **settings)
        self.policy = policy
        self._sessions: dict[str, Session] = {}

    def get_observation_params(self) -> dict[str, Any]:
        """What benchmarks are asked to send."""
        features = self.policy.model.spec.features
        wanted = {"send_state": features.d_state > 0, "send_wrist_image": len(features.cameras) > 1}
        return {name: True for name, needed in wanted.items() if needed}

    def get_action_spec(self) -> dict[str, DimSpec]:
        """The robot's own units, which the checkpoint's training data decided."""
        return {"actions": RAW}

    def get_observation_spec(self) -> dict[str, DimSpec]:
        """What the policy reads."""
        features = self.policy.model.spec.features
        needed = {"image": (bool(features.cameras), IMAGE_RGB), "language": (features.max_text > 0, LANGUAGE),
                  "state": (features.d_state > 0, RAW)}  # fmt: skip
        return {name: spec for name, (there, spec) in needed.items() if there}

    async def on_episode_start(self, config: dict[str, Any], ctx: SessionContext) -> None:
        """Forget what the client showed in its last episode."""
        self._sessions[ctx.session_id] = self.policy.session()
        await super().on_episode_start(config, ctx)

    async def on_episode_end(self, result: dict[str, Any], ctx: SessionContext) -> None:
        """Forget the client's episode."""
        self._sessions.pop(ctx.session_id, None)
        await super().on_episode_end(result, ctx)

    async def on_observation(self, obs: dict[str, Any], ctx: SessionContext) -> None:
        """Check the observation before it may share a batch with another client's; errors go to this client alone."""
        self.policy.read(obs)
        await super().on_observation(obs, ctx)

    def predict(self, obs: dict[str, Any], ctx: SessionContext) -> dict[str, Any]:
        """The chunk [chunk, d_action] for one observation, or one action [d_action] of a policy that looks back.

        Raises ValueError when such a policy is shown an observation outside an episode.
        """
        session = self._sessions.get(ctx.session_id)
        if session is None and self.policy.remembers:
            raise ValueError(
                f"{self.policy.model.spec.name} looks at several observation steps: start an episode first"
            )
        session = session or self.policy.session()
        actions = session.act(self.policy.read(obs), env_step=ctx.step)
        return {"actions": actions[0] if self.policy.remembers else actions}

    def predict_batch(self, obs_batch: list[dict[str, Any]], ctx_batch: list[SessionContext]) -> list[dict[str, Any]]:
        """The same for several clients in one forward pass.

        Raises ValueError when their cameras or image sizes differ.
        """
        model, steps = self.policy.model, {ctx.step for ctx in ctx_batch}
        inputs = model.prepare(_stack([self.policy.read(obs) for obs in obs_batch]), self.policy.unnorm_key)
        # edits are told of the environment step only where it is that of every row
        chunks = self.policy.run(inputs, env_step=steps.pop() if len(steps) == 1 else None)
        return [{"actions": chunk} for chunk in chunks]


@asynccontextmanager
async def harness_handler(server: HookedModelServer) -> AsyncIterator[Any]:
    """What the websocket server calls for every connection."""
    async with anyio.create_task_group() as background:
        await server.on_serve_start(background)

        async def handle(connection: Any) -> None:
            await _handle_connection(connection, server)

        yield handle
        background.cancel_scope.cancel()


def _stack(observations: Sequence[Observation]) -> Observation:
    cameras = {tuple(obs.images) for obs in observations}
    shapes = {(camera, image.shape) for obs in observations for camera, image in obs.images.items()}
    if len(cameras) > 1 or len(shapes) > len(next(iter(cameras))):
        raise ValueError(f"clients of one batch must have the same cameras and image sizes, got {sorted(shapes)}")
    images = {camera: np.stack([obs.images[camera] for obs in observations]) for camera in cameras.pop()}
    instructions = [str(obs.instruction) for obs in observations]
    return Observation(images, np.stack([obs.state for obs in observations]), instructions)
