"""SimplerEnv's Bridge tasks (Li et al. 2024) through ManiSkill 3: a WidowX arm in front of photographed backgrounds.

It draws through Vulkan, and needs a driver: a GPU's, or lavapipe of Mesa 24.3 or later. The robot, the objects and the
photographs are downloads of ManiSkill's, which asks for them on the terminal; here it is never asked.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from hooked_vla.extras import needs_packages

with needs_packages(
    ("cv2", "gymnasium", "mani_skill", "sapien", "transforms3d"), "SimplerEnv needs: pip install hooked-vla[simpler]"
):
    import cv2
    import mani_skill
    import torch
    from mani_skill.envs.tasks.digital_twins import base_env
    from mani_skill.utils.registration import REGISTERED_ENVS

    from hooked_vla.rollouts.adapter import AdapterEnv
    from hooked_vla.rollouts.suites import Suite, SuiteTask

CAMERAS = {"agent": "3rd_view_camera"}
# mani_skill: BaseBridgeEnv._default_sim_config
FPS = 5
# simpler-env scripts/bridge.sh: --obj-episode-range 0 24
N_STARTS = 24
# ManiSkill's data, by what download_asset calls it -> where it is under MS_ASSET_DIR/data, with a file to look for
_DATA = {
    "bridge_v2_real2sim": "tasks/bridge_v2_real2sim_dataset/custom/info_bridge_custom_v0.json",
    "widowx250s": "robots/widowx/wx250s.urdf",
}


@dataclass(frozen=True)
class _Scene:
    """Tasks in front of one background. tasks: id -> ManiSkill's name and what it calls the instruction."""

    tasks: dict[str, tuple[str, str]]
    max_steps: int


# mani_skill/envs/tasks/digital_twins/bridge_dataset_eval/put_on_in_scene.py
_SCENES = {
    "simpler_bridge": _Scene(
        {
            "carrot_on_plate": ("PutCarrotOnPlateInScene-v1", "put carrot on plate"),
            "spoon_on_towel": ("PutSpoonOnTableClothInScene-v1", "put the spoon on the towel"),
            "stack_blocks": (
                "StackGreenCubeOnYellowCubeBakedTexInScene-v1",
                "stack the green block on the yellow block",
            ),
        },
        max_steps=60,
    ),
    "simpler_bridge_sink": _Scene(
        {"eggplant_in_basket": ("PutEggplantInBasketScene-v1", "put eggplant into yellow basket")}, max_steps=120
    ),
}


def _check_data() -> None:
    """Raises FileNotFoundError naming what ManiSkill has not downloaded, and how it is."""
    missing = {name: file for name, file in _DATA.items() if not (mani_skill.ASSET_DIR / file).is_file()}
    if missing:
        raise FileNotFoundError(
            f"SimplerEnv's data are not in {mani_skill.ASSET_DIR} (MS_ASSET_DIR is "
            f"{os.environ.get('MS_ASSET_DIR', 'not set')}): no {', '.join(missing.values())}. Download them with "
            + " and ".join(f"`python -m mani_skill.utils.download_asset {name}`" for name in missing)
        )


@contextmanager
def _vulkan() -> Iterator[None]:
    """Around what draws. Raises RuntimeError that says what is missing where there is no Vulkan driver."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error).lower() for word in ("vulkan", "vk::", "render device", "rendering device")):
            raise
        raise RuntimeError(
            f"SimplerEnv draws through Vulkan, and found no driver that can ({error}); it needs a GPU's, or lavapipe "
            "of Mesa 24.3 or later (Debian: mesa-vulkan-drivers and libvulkan1)"
        ) from error


class SimplerEnv(AdapterEnv):
    """A Bridge task of SimplerEnv, started from one of its 24 arrangements: that of the seed modulo 24.

    State: the arm's six joints in radians and the two fingers' in metres. Action: seven numbers: a move of the gripper
    in metres and a turn in radians, as Euler angles, in the robot's frame, and the gripper from -1 (closed) to 1.
    Images are 4 : 3, drawn at 480 × 640 as its camera is calibrated, and scaled. Reward: 1 when the task is solved.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, suite: str, task: SuiteTask, cameras: Sequence[str], image_size: int) -> None:
        """Raises FileNotFoundError where ManiSkill's data are missing, RuntimeError without a Vulkan driver."""
        shape = (image_size, 2 * round(image_size * 2 / 3))
        low, high = [-1.0] * 3 + [-np.pi / 2] * 3 + [-1.0], [1.0] * 3 + [np.pi / 2] * 3 + [1.0]
        super().__init__(task, cameras, tuple(CAMERAS), shape, 8, low, high)
        _check_data()
        # ManiSkill keeps these on the class: an environment would take over the background of the last one made
        twin = base_env.BaseDigitalTwinEnv
        twin._rgb_overlay_images, twin._objects_to_remove_from_greenscreen = {}, []
        with _vulkan():
            self.simulator = REGISTERED_ENVS[_SCENES[suite].tasks[task.id][0]].cls(
                obs_mode="rgb+segmentation", num_envs=1
            )
        self.simulator._rgb_overlay_images = twin._rgb_overlay_images
        self._seen: np.ndarray | None = None

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        assert self._seen is not None, "reset comes first"
        height, width = self.image_shape
        if self._seen.shape[:2] == (height, width):
            return self._seen.copy()
        return cv2.resize(self._seen, (width, height), interpolation=cv2.INTER_AREA)

    def close(self) -> None:
        self.simulator.close()

    def _start(self, seed: int) -> None:
        with _vulkan():
            obs, _ = self.simulator.reset(seed=seed % N_STARTS, options={"episode_id": torch.tensor([seed % N_STARTS])})
        self._look(obs)

    def _advance(self, action: Float64[np.ndarray, " 7"]) -> tuple[float, bool]:
        obs, _, _, _, info = self.simulator.step(action.astype(np.float32))
        self._look(obs)
        solved = bool(info["success"].item())
        return float(solved), solved

    def _look(self, obs: dict) -> None:
        self._seen = obs["sensor_data"][CAMERAS["agent"]]["rgb"][0].cpu().numpy().astype(np.uint8)

    def _state(self) -> Float32[np.ndarray, " 8"]:
        return self.simulator.agent.robot.get_qpos()[0].cpu().numpy().astype(np.float32)


def _suite(name: str) -> Suite:
    scene = _SCENES[name]

    def make(task: str, cameras: Sequence[str], image_size: int) -> SimplerEnv:
        return SimplerEnv(name, SUITES[name].task(task), cameras, image_size)

    return Suite(
        name,
        tuple(SuiteTask(task, instruction) for task, (_, instruction) in scene.tasks.items()),
        tuple(CAMERAS),
        d_state=8,
        d_action=7,
        max_steps=scene.max_steps,
        fps=FPS,
        make=make,
        n_starts=N_STARTS,
        packages=("mani-skill", "sapien"),
    )


SUITES = {name: _suite(name) for name in _SCENES}
