"""gym-aloha's environments. They draw three 640 × 480 images a step whatever is asked for; here only what is wanted is.

Cameras: "top" (what the public data sets hold), "angle" and "front", which gym-aloha calls front_close.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

from collections.abc import Sequence
from typing import Any

import numpy as np
from gym_aloha.constants import FPS
from gym_aloha.env import AlohaEnv as GymAloha
from gym_aloha.tasks.sim import BimanualViperXTask
from jaxtyping import Float32, Float64, UInt8

from hooked_vla.rollouts.adapter import AdapterEnv
from hooked_vla.rollouts.drawing import ModelView
from hooked_vla.rollouts.suites import SuiteTask

CAMERAS = {"top": "top", "angle": "angle", "front": "front_close"}
N_JOINTS = 14
# joint angles of one arm, then its gripper: actuators' ctrlrange in gym_aloha/assets, and 0 (closed) to 1 (open)
_LOW = (-3.14158, -1.85005, -1.76278, -3.14158, -1.8675, -3.14158, 0.0)
_HIGH = (3.14158, 1.25664, 1.6057, 3.14158, 2.23402, 3.14158, 1.0)


class AlohaEnv(AdapterEnv):
    """A task of gym-aloha: the seed draws where the cube, or the peg and the socket, lie.

    State and action: per arm (left, then right) six joint angles in radians and the gripper, 0 closed to 1 open; an
    action is the angles to go to. Images are 4 : 3: `image_size` rows, and a third more columns. Reward: gym-aloha's
    stage of the task, 0 to 4; 4 is solved.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, task: SuiteTask, cameras: Sequence[str], image_size: int) -> None:
        # even, as video needs it; 640 at gym-aloha's own 480
        shape = (image_size, 2 * round(image_size * 2 / 3))
        super().__init__(task, cameras, tuple(CAMERAS), shape, N_JOINTS, _LOW * 2, _HIGH * 2)
        self.simulator = GymAloha(task.id, obs_type="pixels_agent_pos")
        control = self.simulator._env
        control.task.get_observation = _observe_joints
        self.model, self.data = control.physics.model.ptr, control.physics.data.ptr
        self._joints = np.zeros(N_JOINTS)
        self._view = ModelView(self.model, self.data, *shape)

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        return self._view.image(CAMERAS[camera])

    def close(self) -> None:
        self._view.close()
        self.simulator.close()

    def _start(self, seed: int) -> None:
        obs, _ = self.simulator.reset(seed=seed)
        self._joints = obs["agent_pos"]

    def _advance(self, action: Float64[np.ndarray, " 14"]) -> tuple[float, bool]:
        obs, reward, success, _, _ = self.simulator.step(action)
        self._joints = obs["agent_pos"]
        return float(reward), bool(success)

    def _state(self) -> Float32[np.ndarray, " 14"]:
        return self._joints.astype(np.float32)


def _observe_joints(physics: Any) -> dict[str, Any]:
    """What stands in for gym-aloha's observation: the joints, and no drawing."""
    return {"qpos": BimanualViperXTask.get_qpos(physics), "images": {"top": np.empty((0, 0, 3), np.uint8)}}
