"""A suite without a simulator: a point on a line, whose images are noise from the seed and the step.

A policy cannot do the task but by chance; the expert walks to the end in as many steps as the seed says.
"""

from dataclasses import replace
from functools import cache
from typing import Any

import gymnasium
import numpy as np

from hooked_vla import HookedVLA
from hooked_vla.rollouts.suites import Suite, SuiteTask

CAMERAS = ("agent", "wrist")


class ToyEnv(gymnasium.Env):
    """Goes along by the first number of the action; done where it passes the goal. info has phase and poses.

    task "cliff" terminates without success at step 3; task "short" truncates at step 2. drawn: step numbers whose
    images were made.
    """

    def __init__(self, task: str, cameras, image_size: int) -> None:
        self.task, self.cameras, self.image_size = task, tuple(cameras), image_size
        self.drawn: list[int] = []
        self.n_made_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed_, self.t, self.x, self.drawn = seed, 0, 0.0, []
        self.goal = 3 + seed % 4
        return self._observe(), self._info()

    def step(self, action):
        assert action.shape == (4,) and action.dtype == np.float32
        self.t, self.x = self.t + 1, self.x + float(np.clip(action[0], -1, 1))
        self.n_made_steps += 1
        info = self._info()
        terminated = info["is_success"] or (self.task == "cliff" and self.t == 3)
        return self._observe(), float(info["is_success"]), terminated, self.task == "short" and self.t == 2, info

    def _observe(self) -> dict[str, Any]:
        if self.cameras:
            self.drawn.append(self.t)
        shape = (self.image_size, self.image_size, 3)
        images = {
            camera: np.random.default_rng((self.seed_, self.t, i)).integers(0, 256, shape, np.uint8)
            for i, camera in enumerate(self.cameras)
        }
        state = np.array([self.x, self.goal, self.t, 0], np.float32)
        return {"pixels": images, "state": state, "instruction": f"go {self.task}"}

    def _info(self) -> dict[str, Any]:
        poses = {"points": {"self": np.array([self.x])}, "goal": np.array([self.goal, 0])}
        return {"is_success": self.x >= self.goal, "phase": "far" if self.x < 1 else "near", "poses": poses}


def toy_suite(**changes) -> Suite:
    tasks = tuple(SuiteTask(name, f"go {name}") for name in ("walk", "run", "cliff", "short"))
    suite = Suite("toy", tasks, CAMERAS, d_state=4, d_action=4, max_steps=12, fps=10, make=ToyEnv, expert=walker)
    return replace(suite, **changes)


def walker(task: str):
    return lambda env: np.array([1.0, 0, 0, 0])


@cache
def tiny(name: str) -> HookedVLA:
    """A model of random weights, shared by tests: leave it as it is."""
    return HookedVLA.from_spec(name, "tiny", seed=0)
