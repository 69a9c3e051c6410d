"""PushT (Chi et al. 2023; package gym-pusht 0.1.8): push a T-shaped block onto its outline with a round finger.

The one camera, "top", looks straight down; its drawing is not MuJoCo's, and always the same.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from hooked_vla.extras import needs_packages

with needs_packages(
    ("cv2", "gym_pusht", "gymnasium", "pygame", "pymunk", "shapely"), "PushT needs: pip install hooked-vla[pusht]"
):
    from gym_pusht.envs.pusht import PushTEnv as GymPushT

    from hooked_vla.rollouts.adapter import AdapterEnv
    from hooked_vla.rollouts.suites import Suite, SuiteTask

CAMERAS = ("top",)
# side of the table, in its own units
SIZE = 512
# gym_pusht/__init__.py: max_episode_steps; PushTEnv.metadata["render_fps"]
MAX_STEPS, FPS = 300, 10


class PushTEnv(AdapterEnv):
    """gym-pusht: the seed draws where the block and the finger are.

    State: the finger's position (x, y), 0 to 512. Action: the place that it is to go to, in the same units. Reward: the
    share of the outline that the block covers, 1 from 95 % on, which is solved. Beyond 512 an action is cut off.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, task: SuiteTask, cameras: Sequence[str], image_size: int) -> None:
        super().__init__(task, cameras, CAMERAS, (image_size, image_size), 2, [0.0, 0.0], [float(SIZE)] * 2)
        # its own observation would draw on every step
        self.simulator = GymPushT(
            obs_type="environment_state_agent_pos", observation_width=image_size, observation_height=image_size
        )

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        return np.ascontiguousarray(self.simulator._render())

    def close(self) -> None:
        self.simulator.close()

    def _start(self, seed: int) -> None:
        self.simulator.reset(seed=seed)

    def _advance(self, action: Float64[np.ndarray, " 2"]) -> tuple[float, bool]:
        _, reward, solved, _, _ = self.simulator.step(action.clip(0, SIZE))
        return float(reward), bool(solved)

    def _state(self) -> Float32[np.ndarray, " 2"]:
        return np.array(self.simulator.agent.position, np.float32)


def _make(task: str, cameras: Sequence[str], image_size: int) -> PushTEnv:
    return PushTEnv(SUITES["pusht"].task(task), cameras, image_size)


SUITES = {
    "pusht": Suite(
        "pusht",
        # the instruction of the data set lerobot/pusht
        (SuiteTask("pusht", "Push the T-shaped block onto the T-shaped target."),),
        CAMERAS,
        d_state=2,
        d_action=2,
        max_steps=MAX_STEPS,
        fps=FPS,
        make=_make,
        packages=("gym-pusht", "pymunk", "pygame", "opencv-python"),
    )
}
