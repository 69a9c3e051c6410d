"""LIBERO's environments after the protocol of its public evaluations, drawn with our own renderer.

Cameras: "agent" (agentview) and "wrist" (robot0_eye_in_hand). robosuite hands images out bottom up, and the public
data sets turn them by half a turn: what a policy sees is upright and mirrored left to right.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import libero.libero
import mujoco
import numpy as np
import torch
from jaxtyping import Float32, Float64, UInt8
from libero.libero.benchmark import task_maps
from libero.libero.envs.env_wrapper import ControlEnv
from robosuite.utils.errors import RandomizationError
from robosuite.utils.observables import Observable, sensor
from robosuite.utils.transform_utils import quat2axisangle

from hooked_vla.rollouts.adapter import AdapterEnv
from hooked_vla.rollouts.drawing import ModelView
from hooked_vla.rollouts.libero_files import assets_folder, needed_files, package_folder
from hooked_vla.rollouts.suites import SuiteTask

CAMERAS = {"agent": "agentview", "wrist": "robot0_eye_in_hand"}
FPS = 20
# starting states of a task, in the package's init_files
N_STARTS = 50
# until what was put down has settled, with the gripper open: openvla experiments/robot/libero/run_libero_eval.py
WAIT_STEPS, WAIT_ACTION = 10, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
# robosuite's groups of geoms: what collides, and what is seen
_COLLISION, _VISUAL = 0, 1


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    """robosuite draws from numpy's global generator: set it, and give it back as it was."""
    before = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(before)


class LiberoEnv(AdapterEnv):
    """A LIBERO task, started from one of its 50 official states: that of the seed modulo 50.

    State: the gripper's position (x, y, z, metres) and orientation (axis times angle), and its two fingers' joints.
    Action: seven numbers from -1 to 1 for robosuite's OSC_POSE controller: a move (5 cm each), a turn (0.5 rad each),
    and the gripper (1 closes, -1 opens). Reward: 1 when the task is solved.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, suite: str, task: SuiteTask, cameras: Sequence[str], image_size: int) -> None:
        """Raises FileNotFoundError where LIBERO's data files are not all there, with what is missing."""
        super().__init__(task, cameras, tuple(CAMERAS), (image_size, image_size), 8, [-1.0] * 7, [1.0] * 7)
        known = task_maps[suite][task.id]
        task_file = package_folder() / "bddl_files" / known.problem_folder / known.bddl_file
        assets = assets_folder()
        # where the package remembers what it has found or downloaded
        libero.libero._assets_path_cache = str(assets)
        starts = package_folder() / "init_files" / known.problem_folder / known.init_states_file
        self.starts: Float64[np.ndarray, "start state"] = torch.load(starts, weights_only=False)
        with needed_files(assets, task_file), _numpy_seed(0):
            self.simulator = ControlEnv(
                str(task_file),
                use_camera_obs=False,
                has_offscreen_renderer=False,
                ignore_done=True,
                hard_reset=False,
                control_freq=FPS,
            ).env
        self._observed: dict[str, Any] = {}
        model, data = self.simulator.sim.model._model, self.simulator.sim.data._data
        moment = mujoco.MjData(model)

        @sensor(modality="moment")
        def keep_moment(_: dict[str, Any]) -> float:
            mujoco.mj_copyData(moment, model, data)
            return 0.0

        # robosuite looks at the start of a control step, 48 ms before it ends, at robot and scene alike
        self.simulator.add_observable(Observable("moment", keep_moment, sampling_rate=FPS))
        self._view = ModelView(model, moment, *self.image_shape, hide_groups=(_COLLISION,), show_groups=(_VISUAL,))

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        return np.ascontiguousarray(self._view.image(CAMERAS[camera])[:, ::-1])

    def close(self) -> None:
        self._view.close()
        self.simulator.close()

    def _start(self, seed: int) -> None:
        start = seed % N_STARTS
        with _numpy_seed(start):
            self._reset_simulator()
            self.simulator.sim.set_state_from_flattened(self.starts[start])
            self.simulator.sim.forward()
            # the rest of the package's set_init_state; from here on it counts when to read the robot's state
            self.simulator._post_process()
            self.simulator._update_observables(force=True)
            for _ in range(WAIT_STEPS):
                self._advance(np.array(WAIT_ACTION))

    def _reset_simulator(self) -> None:
        """Fixtures are put within a centimetre of their places, and objects anywhere: the starting state moves those.

        robosuite's soft reset keeps what the gripper was told last. Put back, it goes on bit for bit as after a hard
        reset, which makes all models and their textures anew.

        Raises RandomizationError where robosuite finds no room for the objects in 100 tries.
        """
        for robot in self.simulator.robots:
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        for _ in range(99):
            try:
                self.simulator.reset()
            except RandomizationError:
                continue
            return
        self.simulator.reset()

    def _advance(self, action: Float64[np.ndarray, " 7"]) -> tuple[float, bool]:
        self._observed, reward, success, _ = self.simulator.step(action.clip(-1, 1))
        return float(reward), bool(success)

    def _state(self) -> Float32[np.ndarray, " 8"]:
        seen = self._observed
        parts = (seen["robot0_eef_pos"], quat2axisangle(seen["robot0_eef_quat"].copy()), seen["robot0_gripper_qpos"])
        return np.concatenate(parts).astype(np.float32)
