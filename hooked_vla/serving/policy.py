"""A policy as a server drives it: one forward pass at a time, edits attached while it runs, a memory per client."""

from collections import deque
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.kept import kept
from hooked_vla.hooks.model import HookRequest
from hooked_vla.inputs import ModelInputs, Observation, StepInputs
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.serving.requests import RequestReader
from hooked_vla.vla import HookedVLA


class ServedPolicy:
    """A model that several clients share, with the edits that are active in it.

    edits: (site pattern, function) pairs, as `model.hooks` takes them; attached only while a request is answered, so
    that the model stays as it is for everybody else. cameras, instruction: see RequestReader. unnorm_key: which
    statistics, for checkpoints that have several sets.
    """

    def __init__(
        self,
        model: HookedVLA,
        edits: Sequence[HookRequest] = (),
        cameras: Mapping[str, str] | None = None,
        instruction: str | None = None,
        unnorm_key: str | None = None,
    ) -> None:
        """Raises KeyError for an edit at an unknown site, ValueError for a map to cameras that the policy does not
        have, for an unknown unnorm_key, and for a policy that reads what no client sends."""
        features = model.spec.features
        if features.d_environment:
            raise ValueError(
                f"{model.spec.name} reads an environment state [{features.d_environment}], which no client sends"
            )
        if unnorm_key is not None:
            model.processor.with_key(unnorm_key)
        self.model, self.unnorm_key = model, unnorm_key
        self.read = RequestReader(features, dict(cameras or {}), instruction)
        self.edits = [(hook_names.resolve(site, list(model.points)), fn) for site, fn in edits]
        self.edited = sorted({str(site) if isinstance(site, str) else repr(site) for site, _ in edits})
        self._running = Lock()
        self._draws: SeededNoise | None = None

    @property
    def remembers(self) -> bool:
        """Whether the policy looks at several observation steps, so that it must be shown every one."""
        return self.model.spec.features.n_obs_steps > 1

    @property
    def metadata(self) -> dict[str, Any]:
        """What a client may want to know: plain values only."""
        features = self.model.spec.features
        return {
            "model": self.model.spec.name,
            "cameras": list(features.cameras),
            "camera_map": dict(self.read.cameras),
            "d_state": features.d_state,
            "d_action": features.d_action,
            "n_action_steps": 1 if self.remembers else features.n_action_steps,
            "n_obs_steps": features.n_obs_steps,
            "n_denoise_steps": self.model.n_denoise_steps,
            "edits": self.edited,
        }

    def session(self) -> "Session":
        """The state of one client's episode."""
        return Session(self)

    def run(
        self, inputs: ModelInputs, env_step: int | None = None, seed: int | None = None
    ) -> Float32[np.ndarray, "batch step d_action"]:
        """Action chunks for prepared inputs, in the robot's units.

        env_step: the environment step that edits are told of. seed: every row's random draws then follow from it and
        env_step (0 where it is not known) as they do in rollouts; None draws from the global generator. One pass runs
        at a time, whatever thread asks.
        Raises RuntimeError when an edit did not fire.
        """
        with self._running, torch.no_grad():
            noise = None if seed is None else self._noise(inputs)([seed] * inputs.batch_size, env_step or 0)
            with kept(self.model.run_state, "env_step"), self.model.hooks(self.edits):
                self.model.run_state.env_step = env_step
                chunk = self.model(inputs, noise, self.unnorm_key).chunk
        return chunk.float().cpu().numpy()

    def _noise(self, inputs: ModelInputs) -> SeededNoise:
        """What the model draws, found out on the first request that has a seed."""
        if self._draws is None:
            self._draws = SeededNoise.of(self.model, inputs.rows([0]))
        return self._draws


class Session:
    """One client in one episode: what it showed before, for policies that look back."""

    def __init__(self, policy: ServedPolicy) -> None:
        self.policy = policy
        self.reset()

    def reset(self) -> None:
        """An episode begins."""
        self._seen: list[StepInputs] = []
        self._queue: deque[Float32[np.ndarray, " d_action"]] = deque()

    def act(
        self, obs: Observation, env_step: int | None = None, seed: int | None = None
    ) -> Float32[np.ndarray, "step d_action"]:
        """The chunk that follows an observation.

        A policy that looks at several observation steps must be shown every one: it answers each with one action, and
        makes a new chunk when those of the last are used up; the first observation stands for those before it.
        Raises as the model does for an observation that does not fit; `run` for the arguments.
        """
        policy, features = self.policy, self.policy.model.spec.features
        inputs = policy.model.prepare(obs, policy.unnorm_key)
        if not policy.remembers or not isinstance(inputs, StepInputs):
            return policy.run(inputs, env_step, seed)[0]
        self._seen = [*(self._seen or [inputs] * (features.n_obs_steps - 1)), inputs][-features.n_obs_steps :]
        if not self._queue:
            chunk = policy.run(inputs.follow(self._seen[:-1]), env_step, seed)[0]
            self._queue.extend(chunk[: features.n_action_steps])
        return self._queue.popleft()[None]
