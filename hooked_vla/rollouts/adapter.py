"""What adapters to public benchmarks share: the conventions of `suites` around somebody else's simulator."""

import string
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8
from numpy.typing import ArrayLike

from hooked_vla.rollouts import needs_sim_extra

with needs_sim_extra():
    import gymnasium
    from gymnasium import spaces

    from hooked_vla.rollouts.suites import SuiteTask

Expert = Callable[[gymnasium.Env[dict[str, Any], Any]], Float64[np.ndarray, " d_action"]]


class AdapterEnv(gymnasium.Env[dict[str, Any], ArrayLike]):
    """One task of a public benchmark.

    Observation: {"pixels": {camera: uint8 [H W 3]}, "state": float32 [d_state], "instruction": str}. Reward: the
    benchmark's own. An episode ends when the benchmark counts it as solved; whoever runs it limits its steps. info:
    "is_success" and "instruction". The same seed gives the same episode, whatever the environment did before.

    A subclass says how an episode starts (`_start`) and goes on (`_advance`), and what is seen (`_state`, `image`).
    n_steps: control steps since the last reset.
    """

    metadata = {"render_modes": ["rgb_array"]}
    render_mode = "rgb_array"

    def __init__(
        self,
        task: SuiteTask,
        cameras: Sequence[str],
        known_cameras: Sequence[str],
        image_shape: tuple[int, int],
        d_state: int,
        action_low: Sequence[float],
        action_high: Sequence[float],
    ) -> None:
        """image_shape: height and width. action_low, action_high: one number for each entry of an action.

        Raises ValueError for a camera that is not among the known ones, or an image without pixels.
        """
        if unknown := [camera for camera in cameras if camera not in known_cameras]:
            raise ValueError(f"unknown cameras {unknown} of {type(self).__name__}; cameras: {list(known_cameras)}")
        if min(image_shape) < 1:
            raise ValueError(f"images of {image_shape[0]} × {image_shape[1]} pixels; both must be at least 1")
        self.task, self.cameras, self.image_shape, self.n_steps = task, tuple(cameras), image_shape, 0
        image = spaces.Box(0, 255, (*image_shape, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({camera: image for camera in self.cameras}),
                "state": spaces.Box(-np.inf, np.inf, (d_state,), np.float32),
                "instruction": spaces.Text(
                    256, charset=string.ascii_letters + string.digits + string.punctuation + " "
                ),
            }
        )
        self.d_action = len(action_low)
        self.action_space = spaces.Box(np.array(action_low, np.float32), np.array(action_high, np.float32))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The episode of a seed; without one, of a seed drawn from the last one given. There are no options."""
        if options:
            raise ValueError(f"this environment has no reset options, got {sorted(options)}")
        super().reset(seed=seed)
        self.n_steps = 0
        self._start(int(self.np_random.integers(2**31)) if seed is None else seed)
        return self._observe(), self._info(False)

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step.

        Raises ValueError for an action that is not the right number of finite numbers.
        """
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (self.d_action,) or not np.isfinite(given).all():
            raise ValueError(
                f"an action of {self.task.id!r} is {self.d_action} finite numbers, got shape {given.shape}: {given}"
            )
        reward, success = self._advance(given)
        self.n_steps += 1
        return self._observe(), float(reward), bool(success), False, self._info(bool(success))

    def render(self) -> UInt8[np.ndarray, "height width 3"]:
        """What the first of the environment's cameras sees.

        Raises ValueError where it was made without cameras.
        """
        if not self.cameras:
            raise ValueError(f"this environment of {self.task.id!r} was made without cameras: there is nothing to draw")
        return self.image(self.cameras[0])

    @abstractmethod
    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        """What one of the known cameras sees."""

    @abstractmethod
    def _start(self, seed: int) -> None:
        """Set up the episode of a seed."""

    @abstractmethod
    def _advance(self, action: Float64[np.ndarray, " d_action"]) -> tuple[float, bool]:
        """One control step: its reward, and whether the task is solved."""

    @abstractmethod
    def _state(self) -> Float32[np.ndarray, " d_state"]:
        """Proprioception."""

    def _observe(self) -> dict[str, Any]:
        return {
            "pixels": {camera: self.image(camera) for camera in self.cameras},
            "state": self._state(),
            "instruction": self.task.instruction,
        }

    def _info(self, success: bool) -> dict[str, Any]:
        return {"is_success": success, "instruction": self.task.instruction}


def adapter_env(env: gymnasium.Env[dict[str, Any], Any], kind: type[AdapterEnv]) -> Any:
    """The adapter under whatever wraps it, for an expert that needs that kind.

    Raises TypeError where it is another environment.
    """
    inner = env.unwrapped
    if not isinstance(inner, kind):
        raise TypeError(f"this expert acts in {kind.__name__}, got {type(inner).__name__}")
    return inner
