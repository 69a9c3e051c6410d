"""Gymnasium environment of the tabletop: put one block on one pad, by moving a suction cup in small steps.

The same seed gives the same bits, whatever the environment did before. Each environment draws with its own
renderer, so several may live in one process.
"""

# mujoco's classes and functions come from compiled modules that have no stubs
# pyright: reportAttributeAccessIssue=false

import atexit
import weakref
from collections.abc import Sequence
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gymnasium import spaces
from jaxtyping import Float32, Float64, Int32, UInt8
from numpy.typing import ArrayLike

from hooked_vla.rollouts.tabletop import scene
from hooked_vla.rollouts.tabletop.expert import ACTION_SCALE, Situation, expert_action, phase
from hooked_vla.rollouts.tabletop.tasks import JITTER, TASKS, find_task

FPS = 20
SUBSTEPS = 10
START_AREA = ((-0.15, -0.15, -0.05), (0.15, 0.15, 0.05))
SETTLE_STEPS = 10

_DRAWING: "weakref.WeakSet[TabletopEnv]" = weakref.WeakSet()


class TabletopEnv(gymnasium.Env[dict[str, Any], ArrayLike]):
    """One task of a suite: put the block that the instruction means on the pad that it means.

    Observation: {"pixels": {camera: uint8 [H W 3]}, "state": float32 [4], "instruction": str}; the state is the rim of
    the suction cup (x, y, z), in metres, and 1 while it holds a block, else 0.
    Action: four numbers, clipped to -1..1. The first three set the cup's target up to 3 cm from where it is along
    x, y, z; the last turns suction on (above 0) or off. A step takes 50 ms.
    Reward: 1 when the block lies on the pad and the cup has let go, which ends the episode. info: "is_success",
    "instruction", "phase" (one of expert.PHASES), and "poses": position and quaternion (x, y, z, qw, qx, qy, qz) of
    every block, and the centre of every pad.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(
        self,
        suite: str = "goal",
        task: str | None = None,
        image_size: int = 96,
        cameras: Sequence[str] = ("agent", "wrist"),
        render_mode: str = "rgb_array",
    ) -> None:
        """task: name of the suite's task; None for its first."""
        if unknown := [camera for camera in cameras if camera not in scene.CAMERAS]:
            raise ValueError(f"unknown cameras {unknown} of the tabletop; cameras: {list(scene.CAMERAS)}")
        if render_mode not in self.metadata["render_modes"]:
            raise ValueError(f"unknown render_mode {render_mode!r}; modes: {self.metadata['render_modes']}")
        if task is None and suite in TASKS:
            task = TASKS[suite][0].id
        self.suite, self.task = suite, find_task(suite, task or "")
        self.image_size, self.cameras, self.render_mode = image_size, tuple(cameras), render_mode
        image = spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.observation_space = spaces.Dict(
            {
                "pixels": spaces.Dict({camera: image for camera in self.cameras}),
                "state": spaces.Box(-1, 1, (4,), np.float32),
                "instruction": spaces.Text(128, charset="abcdefghijklmnopqrstuvwxyz "),
            }
        )
        self.action_space = spaces.Box(-1, 1, (4,), np.float32)
        self.model = mujoco.MjModel.from_xml_string(scene.scene_xml(self.task.blocks, self.task.pads, image_size))
        self.data = mujoco.MjData(self.model)
        self._cup = self.model.geom("cup").id
        self._holders = [self.model.geom(name).id for name in self.task.blocks]
        self._renderer: mujoco.Renderer | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """A new arrangement of blocks and a new start of the cup, drawn from the seed.

        options: {"task": name} goes on with another task of the suite, if its scene has the same blocks and pads.
        Raises ValueError for any other option, and for a task of another scene.
        """
        self._take_options(options or {})
        super().reset(seed=seed)
        mujoco.mj_resetData(self.model, self.data)
        slots = self.np_random.permutation(np.array(self.task.slots))[: len(self.task.blocks)]
        for name, slot in zip(self.task.blocks, slots, strict=True):
            self.set_block(name, (*(slot + self.np_random.uniform(-JITTER, JITTER, 2)), scene.BLOCK_HALF))
        start = self.np_random.uniform(*START_AREA)
        self._drive(start, suction=False)
        for joint, target in zip(scene.SLIDES, start, strict=True):
            self.data.joint(joint).qpos = target
        self._run(SETTLE_STEPS)
        return self._observe(), self._info()

    def step(self, action: ArrayLike) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """One control step.

        Raises ValueError for an action that is not four finite numbers.
        """
        self.advance(action)
        info = self._info()
        return self._observe(), float(info["is_success"]), info["is_success"], False, info

    def advance(self, action: ArrayLike) -> None:
        """One control step of the physics alone; nothing is drawn. Raises as `step`."""
        given = np.asarray(action, dtype=np.float64)
        if given.shape != (4,) or not np.isfinite(given).all():
            raise ValueError(f"an action is 4 finite numbers (dx, dy, dz, suction), got shape {given.shape}: {given}")
        *move, suction = given.clip(-1, 1)
        now = np.array([self.data.joint(name).qpos[0] for name in scene.SLIDES])
        self._drive(now + ACTION_SCALE * np.array(move), suction=bool(suction > 0))
        self._run(SUBSTEPS)

    def render(self) -> UInt8[np.ndarray, "height width 3"]:
        """What the agent camera sees."""
        return self.image("agent")

    def close(self) -> None:
        """Free the renderer; the environment draws again if it is used afterwards."""
        if self._renderer is not None:
            self._renderer.close()
            self._renderer = None

    def set_block(self, block: str, position: Sequence[float]) -> None:
        """Put a block somewhere, upright and at rest."""
        joint = self.data.joint(self.model.body(block).jntadr[0])
        joint.qpos = (*position, 1, 0, 0, 0)
        joint.qvel = 0
        mujoco.mj_forward(self.model, self.data)

    def save_state(self) -> Float64[np.ndarray, " n"]:
        """Everything that decides how the physics go on."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        state = np.empty(mujoco.mj_stateSize(self.model, kind))
        mujoco.mj_getState(self.model, self.data, state, kind)
        return state

    def load_state(self, state: Float64[np.ndarray, " n"]) -> None:
        """Go back to a state of this environment's `save_state`."""
        kind = mujoco.mjtState.mjSTATE_INTEGRATION
        mujoco.mj_setState(self.model, self.data, state, kind)
        mujoco.mj_forward(self.model, self.data)
        # once more: the forward pass has moved the solver's warm start
        mujoco.mj_setState(self.model, self.data, state, kind)

    @property
    def instruction(self) -> str:
        """The task's instruction."""
        return self.task.instruction

    @property
    def situation(self) -> Situation:
        """What the expert acts on, for this task's block and pad."""
        return Situation(
            cup=self.data.site("rim").xpos.copy(),
            holds=self.holds,
            block=self.data.body(self.task.block).xpos.copy(),
            pad=np.array(scene.PADS[self.task.pad].xy),
        )

    @property
    def proprioception(self) -> Float32[np.ndarray, " 4"]:
        """The state that a policy is shown: rim of the cup (x, y, z) in metres, and 1 while it holds a block."""
        return np.array([*self.data.site("rim").xpos, self.holds], dtype=np.float32)

    @property
    def holds(self) -> bool:
        """Suction is on and a block touches the cup."""
        if self.data.ctrl[3] == 0:
            return False
        pairs = self.data.contact.geom[self.data.contact.dist < 0.002]
        with_cup = pairs[(pairs == self._cup).any(axis=1)]
        return bool(np.isin(with_cup, self._holders).any())

    def expert_action(self) -> Float64[np.ndarray, " 4"]:
        """What the scripted expert does here."""
        return expert_action(self.situation, self.task.style)

    def _take_options(self, options: dict[str, Any]) -> None:
        if unknown := sorted(set(options) - {"task"}):
            raise ValueError(f"unknown reset options {unknown} of the tabletop; options: ['task']")
        if "task" in options:
            task = find_task(self.suite, options["task"])
            if (task.blocks, task.pads) != (self.task.blocks, self.task.pads):
                raise ValueError(
                    f"the task {task.id!r} has another scene than {self.task.id!r}: make its own environment"
                )
            self.task = task

    def _run(self, substeps: int) -> None:
        mujoco.mj_step(self.model, self.data, substeps)
        # poses and contacts of the state after the last substep, not before it
        mujoco.mj_forward(self.model, self.data)

    def _drive(self, slides: np.ndarray, suction: bool) -> None:
        """Set the motors' targets."""
        self.data.ctrl[:3] = np.clip(slides, scene.SLIDE_LOW, scene.SLIDE_HIGH)
        self.data.ctrl[3] = float(suction)

    def _observe(self) -> dict[str, Any]:
        return {
            "pixels": {camera: self.image(camera) for camera in self.cameras},
            "state": self.proprioception,
            "instruction": self.instruction,
        }

    def _info(self) -> dict[str, Any]:
        poses = {
            name: np.concatenate([self.data.body(name).xpos, self.data.body(name).xquat]) for name in self.task.blocks
        }
        now = self.situation
        return {
            "is_success": now.is_placed,
            "instruction": self.instruction,
            "phase": phase(now, self.task.style),
            "poses": {"blocks": poses, "pads": {name: np.array(scene.PADS[name].xy) for name in self.task.pads}},
        }

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        """What a camera sees, whether or not it belongs to the observation."""
        image = self._drawn(camera).render().copy()
        red, green, blue = image[..., 0], image[..., 1], image[..., 2]
        # light falls on everything: nothing that is drawn is black
        image[(red | green | blue) == 0] = scene.SKY
        return image

    def object_mask(self, camera: str) -> Int32[np.ndarray, "height width"]:
        """What each pixel of a camera shows: index into `object_names`, or -1."""
        renderer = self._drawn(camera)
        renderer.enable_segmentation_rendering()
        try:
            shown = renderer.render().copy()
        finally:
            renderer.disable_segmentation_rendering()
        kinds = {"geom": int(mujoco.mjtObj.mjOBJ_GEOM), "site": int(mujoco.mjtObj.mjOBJ_SITE)}
        mask = np.full(shown.shape[:2], -1, np.int32)
        for i, name in enumerate(self.object_names):
            if name == "hand":
                hand = [g for g in range(self.model.ngeom) if self.model.geom(g).bodyid[0] in self._hand_bodies]
                mask[(shown[..., 1] == kinds["geom"]) & np.isin(shown[..., 0], hand)] = i
                continue
            found = self.model.site(name).id if name.startswith("pad_") else self.model.geom(name).id
            kind = kinds["site"] if name.startswith("pad_") else kinds["geom"]
            mask[(shown[..., 0] == found) & (shown[..., 1] == kind)] = i
        return mask

    @property
    def object_names(self) -> tuple[str, ...]:
        """The scene's blocks, its pads as "pad_<name>", and the hand."""
        return (*self.task.blocks, *(f"pad_{name}" for name in self.task.pads), "hand")

    @property
    def _hand_bodies(self) -> tuple[int, int]:
        return self.model.body("hand").id, self.model.body("cup").id

    def _drawn(self, camera: str) -> "mujoco.Renderer":
        """The renderer, with the present scene as the camera sees it."""
        if self._renderer is None:
            self._renderer = mujoco.Renderer(self.model, self.image_size, self.image_size)
            _DRAWING.add(self)
            # last registered runs first: before MuJoCo's own exit takes EGL away from renderers that nobody closed
            atexit.unregister(_close_all)
            atexit.register(_close_all)
            for flag in ("mjRND_SHADOW", "mjRND_REFLECTION"):
                self._renderer.scene.flags[getattr(mujoco.mjtRndFlag, flag)] = 0
        self._renderer.update_scene(self.data, camera)
        return self._renderer


def _close_all() -> None:
    for env in list(_DRAWING):
        env.close()
