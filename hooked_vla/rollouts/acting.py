"""Who acts in a batch of episodes: a hooked model under arms, or a suite's scripted expert.

A model always sees a batch of the same number of rows: rows whose episode is over keep their last observation, and
rows that no episode has repeat the first one. With text of one length, an episode is then the same, bit for bit,
whatever shares its batch (where the kernels treat rows alike, as those that were measured do).
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from hooked_vla.hooks.kept import kept
from hooked_vla.hooks.model import HookRequest
from hooked_vla.inputs import ModelInputs, Observation, StepInputs
from hooked_vla.rollouts.arms import Arm, CheckedArm, ObservingArm, group_hooks
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Settings, check_action_width, constant_text
from hooked_vla.rollouts.suites import Suite
from hooked_vla.vla import HookedVLA

Frame = Mapping[str, Any]
EXPERT = "expert"


@dataclass
class Row:
    """One row of a batch. seen: the last observations that were drawn; running: its episode is not over."""

    cell: Cell
    env: Any
    seen: deque[Frame] = field(default_factory=deque)
    running: bool = True


@runtime_checkable
class Actor(Protocol):
    """What acts. n_action_steps: actions executed of a chunk; n_seen: observations that a chunk is made from.

    acting: what holds while a group of `n_cells` episodes runs in `rows`; capture: hooks to attach after the edits.
    act: the actions of every row from here on; those of rows that are not running mean nothing.
    """

    n_action_steps: int
    n_seen: int

    @contextmanager
    def acting(self, rows: Sequence[Row], n_cells: int, capture: Sequence[HookRequest]) -> Iterator[None]: ...

    def act(self, rows: Sequence[Row], env_step: int) -> Float32[np.ndarray, "row step d_action"]: ...


class ModelActor:
    """A hooked model under the arms of the rows. name: what messages call the model; noise: what `try_out` found."""

    def __init__(
        self, name: str, model: HookedVLA, suite: Suite, arms: Sequence[Arm], settings: Settings, noise: SeededNoise
    ) -> None:
        self.name, self.model, self.suite, self.arms, self.settings = name, model, suite, arms, settings
        self.n_action_steps, self.n_seen = settings.n_action_steps, model.spec.features.n_obs_steps
        self.noise = noise
        self._observing = {arm.name: arm for arm in arms if isinstance(arm, ObservingArm)}

    @contextmanager
    def acting(self, rows: Sequence[Row], n_cells: int, capture: Sequence[HookRequest]) -> Iterator[None]:
        requests = group_hooks(self.arms, [row.cell for row in rows], n_cells)
        with ExitStack() as stack:
            stack.enter_context(constant_text(self.model.processor, self.settings.constant_text))
            stack.enter_context(kept(self.model.run_state, "env_step", "in_use"))
            stack.enter_context(self.model.hooks([*requests, *capture]))
            yield

    def act(self, rows: Sequence[Row], env_step: int) -> Float32[np.ndarray, "row step d_action"]:
        self.model.run_state.env_step, self.model.run_state.in_use = env_step, [row.running for row in rows]
        seen = [self._seen(rows, i, env_step) for i in range(-self.n_seen, 0)]
        if env_step == 0:
            self._check(rows, seen[-1])
        *history, inputs = (prepare(self.model, self.settings, frames) for frames in seen)
        if isinstance(inputs, StepInputs) and history:
            inputs = inputs.follow(history)  # pyright: ignore[reportArgumentType]
        noise = self.noise([row.cell.seed for row in rows], env_step)
        chunk = self.model.predict_action_chunk(inputs, noise, self.settings.unnorm_key)
        return chunk[:, : self.n_action_steps].float().cpu().numpy()

    def _check(self, rows: Sequence[Row], shown: Sequence[Frame]) -> None:
        """Lets arms look whether what they show reaches the model."""
        for row, frame in zip(rows, shown, strict=True):
            arm = self._observing.get(row.cell.arm)
            if row.running and isinstance(arm, CheckedArm):
                arm.check(self.model, self.settings, row.cell, row.seen[-1], frame)

    def _seen(self, rows: Sequence[Row], i: int, env_step: int) -> list[Frame]:
        """Observation i of every row, as its arm lets the policy see it."""
        arms = [self._observing.get(row.cell.arm) for row in rows]
        frames = [row.seen[i] for row in rows]
        return [
            frame if arm is None else arm.observe(row.cell, env_step, frame)
            for arm, row, frame in zip(arms, rows, frames, strict=True)
        ]


def try_out(name: str, model: HookedVLA, suite: Suite, settings: Settings, frame: Frame) -> SeededNoise:
    """Runs the model on one observation of the suite, which tells what it draws. name: what messages call it.

    Raises ValueError where the model does not take the observation, or its actions are not the suite's.
    """
    try:
        inputs = prepare(model, settings, [frame])
        noise = SeededNoise.of(model, inputs)
        chunk = model.predict_action_chunk(inputs, noise([0], 0), settings.unnorm_key)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"the model {name!r} cannot act on what the suite {suite.name!r} shows: {error.args[0]}"
        ) from error
    check_action_width(name, chunk.shape[-1], suite)
    if chunk.shape[1] < settings.n_action_steps:
        raise ValueError(
            f"n_action_steps is {settings.n_action_steps}, but the model {name!r} plans {chunk.shape[1]} steps"
        )
    return noise


def prepare(model: HookedVLA, settings: Settings, frames: Sequence[Frame]) -> ModelInputs:
    """Observations of a suite, one a row, as the model's inputs.

    Raises KeyError for a camera that they lack, ValueError for whatever else the model does not take.
    """
    images = {
        camera: np.stack([frame["pixels"][source] for frame in frames]) for camera, source in settings.cameras.items()
    }
    states = np.stack([frame["state"] for frame in frames])
    obs = Observation(images, states, [frame["instruction"] for frame in frames])
    return model.prepare(obs, settings.unnorm_key)


class ExpertActor:
    """The suite's scripted expert, one for every row; it looks at the environment, not at observations."""

    n_action_steps, n_seen = 1, 0

    def __init__(self, suite: Suite) -> None:
        """Raises ValueError for a suite without an expert."""
        if suite.expert is None:
            raise ValueError(f"the suite {suite.name!r} has no scripted expert")
        self.suite, self.make = suite, suite.expert
        self._experts: list[Callable[[Any], Any]] = []

    @contextmanager
    def acting(self, rows: Sequence[Row], n_cells: int, capture: Sequence[HookRequest]) -> Iterator[None]:
        if capture:
            raise ValueError("a scripted expert has no activations to record")
        self._experts = [self.make(row.cell.task) for row in rows]
        yield

    def act(self, rows: Sequence[Row], env_step: int) -> Float32[np.ndarray, "row step d_action"]:
        actions = np.zeros((len(rows), 1, self.suite.d_action), np.float32)
        for i, row in enumerate(rows):
            if row.running:
                actions[i, 0] = self._experts[i](row.env)
        return actions
