"""Gymnasium environment of the tabletop: put one block on one pad, by moving a gripper in small steps.

The same seed gives the same bits, whatever the environment did before. Each environment draws with its own
renderer, so several may live in one process.
"""

# mujoco's classes and functions come from compiled modules that have no stubs
# pyright: reportAttributeAccessIssue=false

import atexit
import weakref
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, Float64, UInt8
from numpy.typing import ArrayLike

from hooked_vla.inputs import Observation
from hooked_vla.rollouts.tabletop import scene

SUBSTEPS = 10
# metres from the gripper to its target under an action of 1
ACTION_SCALE = 0.03
MIN_DISTANCE = 0.095
BLOCK_AREA = ((-0.24, -0.20), (0.24, 0.10))
START_AREA = ((-0.10, -0.10, -0.06), (0.10, 0.10, 0.03))
SETTLE_STEPS = 10

_DRAWING: "weakref.WeakSet[TabletopEnv]" = weakref.WeakSet()


class TabletopEnv(gymnasium.Env[dict[str, Any], ArrayLike]):
    """Put the `block` on the `pad`; every block and pad is in the scene, only the instruction says which is meant.

    Observation: {"pixels": {"agent", "wrist": uint8 [H W 3]}, "state": float32 [4], "instruction": str}; the state
    is the point between the finger tips (x, y, z) and the gap between the fingers, in metres.
    Action: four numbers, clipped to -1..1. The first three set the gripper's target up to 3 cm from where it is along
    x, y, z, of which it covers about 1 cm in the 50 ms of the step; the last sets the fingers from open (-1) to
    closed (1).
    Reward: 1 when the block lies on the pad, which ends the episode. info: "is_success", and under "poses" the
    position and quaternion (x, y, z, qw, qx, qy, qz) of every block, with the centre of every pad.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(
        self, image_size: int = 96, block: str = "red", pad: str = "orange", render_mode: str = "rgb_array"
    ) -> None:
        if block not in scene.BLOCKS:
            raise ValueError(f"unknown block {block!r}; blocks: {list(scene.BLOCKS)}")
        if pad not in scene.PADS:
            raise ValueError(f"unknown pad {pad!r}; pads: {list(scene.PADS)}")
        if render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"unknown render_mode {render_mode!r}; modes: {self.metadata['render_modes']}")
        self.image_size, self.block, self.pad, self.render_mode = image_size, block, pad, render_mode
        self.instruction = f"put the {block} block on the {pad} pad"
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({camera: image for camera in scene.CAMERAS}),
                "state": spaces.Box(-1, 1, (4,), np.float32),
                "instruction": spaces.Text(64, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )
        self.action_space = spaces.Box(-1, 1, (4,), np.float32)
        self.model = mujoco.MjModel.from_xml_string(scene.scene_xml(image_size))
        self.data = mujoco.MjData(self.model)
        self._renderer: mujoco.Renderer | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new arrangement of blocks and a new start of the gripper, drawn from the seed; there are no options."""
        if options:
            raise ValueError(f"this environment has no reset options, got {sorted(options)}")
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        for name, xy in zip(scene.BLOCKS, self._draw_positions(), strict=True):
            self.set_block(name, (*xy, scene.BLOCK_HALF))
        start = self.np_random.uniform(*START_AREA)
        self._drive(start, opening=1.0)
        for joint, target in zip((*scene.SLIDES, *scene.FINGERS), self.data.ctrl, strict=True):
            self.data.joint(joint).qpos = target
        mujoco.mj_step(self.model, self.data, SETTLE_STEPS)
        return self._observe(), self._info()

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step.

        Raises ValueError for an action that is not four finite numbers.
        """
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (4,) or not np.isfinite(given).all():
            raise ValueError(f"an action is 4 finite numbers (dx, dy, dz, gripper), got shape {given.shape}: {given}")
        *move, gripper = given.clip(-1, 1)
        now = np.array([self.data.joint(name).qpos[0] for name in scene.SLIDES])
        self._drive(now + ACTION_SCALE * np.array(move), opening=(1 - gripper) / 2)
        mujoco.mj_step(self.model, self.data, SUBSTEPS)
        info = self._info()
        return self._observe(), float(info["is_success"]), info["is_success"], False, info

    def render(self) -> UInt8[np.ndarray, "height width 3"]:
        """What the agent camera sees."""
        return self._image("agent")

    def close(self) -> None:
        """Free the renderer; the environment draws again if it is used afterwards."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def set_block(self, block: str, position: tuple[float, float, float]) -> None:
        """Put a block somewhere, upright and at rest."""
        joint = self.data.joint(self.model.body(block).jntadr[0])
        joint.qpos = (*position, 1, 0, 0, 0)
        joint.qvel = 0
        mujoco.mj_forward(self.model, self.data)

    @property
    def is_success(self) -> bool:
        """The block's centre is over the pad and the block lies on the table."""
        position = self.data.body(self.block).xpos
        offset = np.abs(position[:2] - scene.PADS[self.pad].xy).max()
        return bool(offset < scene.PAD_HALF - 0.005 and position[2] < scene.BLOCK_HALF + 0.008)

    def _draw_positions(self) -> list[Float64[np.ndarray, " 2"]]:
        placed: list[np.ndarray] = []
        while len(placed) < len(scene.BLOCKS):
            xy = self.np_random.uniform(*BLOCK_AREA)
            if all(np.linalg.norm(xy - other) > MIN_DISTANCE for other in placed):
                placed.append(xy)
        return placed

    def _drive(self, slides: np.ndarray, opening: float) -> None:
        """Set the motors' targets; opening 0 is closed, 1 is open."""
        self.data.ctrl[:3] = np.clip(slides, scene.SLIDE_LOW, scene.SLIDE_HIGH)
        self.data.ctrl[3:] = (-scene.FINGER_TRAVEL * opening, scene.FINGER_TRAVEL * opening)

    def _observe(self) -> dict[str, Any]:
        return {
            "pixels": {camera: self._image(camera) for camera in scene.CAMERAS},
            "state": self._state(),
            "instruction": self.instruction,
        }

    def _state(self) -> Float32[np.ndarray, " 4"]:
        left, right = (self.data.joint(name).qpos[0] for name in scene.FINGERS)
        return np.array([*self.data.site("grip").xpos, right - left], dtype=np.float32)

    def _info(self) -> dict[str, Any]:
        blocks = {
            name: np.concatenate([self.data.body(name).xpos, self.data.body(name).xquat]) for name in scene.BLOCKS
        }
        pads = {name: np.array(pad.xy) for name, pad in scene.PADS.items()}
        return {"is_success": self.is_success, "poses": {"blocks": blocks, "pads": pads}}

    def _image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self.model, self.image_size, self.image_size)
            _DRAWING.add(self)
            # last registered runs first: before MuJoCo's own exit takes EGL away from renderers that nobody closed
            atexit.unregister(_close_all)
            atexit.register(_close_all)
            for flag in ("mjRND_SHADOW", "mjRND_REFLECTION"):
                self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._renderer.update_scene(self.data, camera)
        return self._renderer.render().copy()


def observation(obs: dict[str, Any]) -> Observation:
    """The environment's observation as a policy takes it."""
    return Observation(images=obs["pixels"], state=obs["state"], instruction=obs["instruction"])


def _close_all() -> None:
    for env in list(_DRAWING):
        env.close()
