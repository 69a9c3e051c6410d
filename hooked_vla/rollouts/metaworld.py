"""MetaWorld (Yu et al. 2019; package metaworld 3.1.1): 50 tasks of a Sawyer arm, with an instruction for each.

Cameras: "agent" is corner2, seen from where the public VLA data sets put it, which is the model's own corner4; both
hang upside down there, and are turned round here. "wrist" is gripperPOV.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, UInt8

from hooked_vla.extras import needs_packages

with needs_packages(
    ("gymnasium", "metaworld", "mujoco", "packaging"), "MetaWorld needs: pip install hooked-vla[metaworld]"
):
    import gymnasium
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE
    from metaworld.policies import ENV_POLICY_MAP

    from hooked_vla.rollouts.adapter import AdapterEnv, Expert, adapter_env
    from hooked_vla.rollouts.drawing import ModelView, render_quality
    from hooked_vla.rollouts.suites import Suite, SuiteTask

# camera of ours -> camera of the model, and whether it hangs upside down.
# corner2 at (0.75, 0.075, 0.7): arXiv 2206.14244, and lerobot 0.4 envs/metaworld.py; metaworld 3 has it as corner4
CAMERAS = {"agent": ("corner4", True), "wrist": ("gripperPOV", False)}
# metaworld: SawyerXYZEnv.max_path_length
MAX_STEPS = 500
# metaworld: SawyerMocapBase.metadata["render_fps"]
FPS = 80

INSTRUCTIONS = {
    "assembly": "put the ring over the peg",
    "basketball": "drop the basketball into the hoop",
    "bin-picking": "move the cube from one bin to the other",
    "box-close": "put the lid on the box",
    "button-press-topdown": "press the button from above",
    "button-press-topdown-wall": "reach over the wall and press the button from above",
    "button-press": "press the button",
    "button-press-wall": "reach around the wall and press the button",
    "coffee-button": "press the button of the coffee machine",
    "coffee-pull": "pull the mug away from the coffee machine",
    "coffee-push": "push the mug under the coffee machine",
    "dial-turn": "turn the dial",
    "disassemble": "take the ring off the peg",
    "door-close": "close the door",
    "door-lock": "lock the door",
    "door-open": "open the door",
    "door-unlock": "unlock the door",
    "hand-insert": "put the hand into the hole",
    "drawer-close": "close the drawer",
    "drawer-open": "open the drawer",
    "faucet-open": "open the faucet",
    "faucet-close": "close the faucet",
    "hammer": "drive the nail in with the hammer",
    "handle-press-side": "press the handle down from the side",
    "handle-press": "press the handle down",
    "handle-pull-side": "pull the handle up from the side",
    "handle-pull": "pull the handle up",
    "lever-pull": "pull the lever up",
    "peg-insert-side": "put the peg into the hole in the side of the box",
    "pick-place-wall": "lift the puck over the wall to the target",
    "pick-out-of-hole": "lift the puck out of the hole",
    "reach": "move the hand to the target",
    "push-back": "push the block back to the target",
    "push": "push the puck to the target",
    "pick-place": "lift the puck to the target",
    "plate-slide": "slide the plate into the cabinet",
    "plate-slide-side": "slide the plate sideways into the cabinet",
    "plate-slide-back": "slide the plate out of the cabinet",
    "plate-slide-back-side": "slide the plate sideways out of the cabinet",
    "peg-unplug-side": "pull the peg out of the side of the box",
    "soccer": "push the ball into the goal",
    "stick-push": "push the box with the stick",
    "stick-pull": "pull the box with the stick",
    "push-wall": "push the block around the wall to the target",
    "reach-wall": "move the hand over the wall to the target",
    "shelf-place": "put the block on the shelf",
    "sweep-into": "sweep the block into the hole",
    "sweep": "sweep the block off the table",
    "window-open": "open the window",
    "window-close": "close the window",
}


class MetaWorldEnv(AdapterEnv):
    """A MetaWorld task: the seed draws where its objects and its goal are.

    State: the hand's position (x, y, z, metres) and how far the gripper is open (0..1). Action: four numbers from -1
    to 1: the hand's move (1 cm each), and the fingers' effort (1 closes). Reward: MetaWorld's dense one, 0 to 10.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}

    def __init__(self, task: SuiteTask, cameras: Sequence[str], image_size: int) -> None:
        super().__init__(task, cameras, tuple(CAMERAS), (image_size, image_size), 4, [-1.0] * 4, [1.0] * 4)
        self.simulator = ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE[f"{task.id}-v3-goal-observable"](seed=0)
        # every reset draws a new arrangement, from the generator that `seed` sets
        self.simulator._freeze_rand_vec = False
        self.simulator.seeded_rand_vec = True
        self.full_state = np.zeros(39)
        self._view = ModelView(self.simulator.model, self.simulator.data, image_size, image_size)

    def image(self, camera: str) -> UInt8[np.ndarray, "height width 3"]:
        name, upside_down = CAMERAS[camera]
        drawn = self._view.image(name)
        return np.ascontiguousarray(drawn[::-1, ::-1]) if upside_down else drawn

    def close(self) -> None:
        self._view.close()
        self.simulator.close()

    def _start(self, seed: int) -> None:
        self.simulator.seed(seed)
        self.full_state, _ = self.simulator.reset()

    def _advance(self, action: Float64[np.ndarray, " 4"]) -> tuple[float, bool]:
        self.full_state, reward, _, _, info = self.simulator.step(action.clip(-1, 1))
        return float(reward), bool(info["success"])

    def _state(self) -> Float32[np.ndarray, " 4"]:
        return self.full_state[:4].astype(np.float32)


def _expert(task: str) -> Expert:
    """MetaWorld's own scripted policy for a task; it reads the objects' poses and the goal."""
    SUITES["metaworld"].task(task)
    policy = ENV_POLICY_MAP[f"{task}-v3"]()

    def act(env: gymnasium.Env[dict[str, Any], Any]) -> Float64[np.ndarray, " 4"]:
        state = adapter_env(env, MetaWorldEnv).full_state
        with warnings.catch_warnings():
            # it says so whenever what it wants is outside -1..1
            warnings.filterwarnings("ignore", message=r"Constant\(s\) may be too high")
            return np.clip(np.asarray(policy.get_action(state), np.float64), -1, 1)

    return act


def _make(task: str, cameras: Sequence[str], image_size: int) -> MetaWorldEnv:
    return MetaWorldEnv(SUITES["metaworld"].task(task), cameras, image_size)


SUITES = {
    "metaworld": Suite(
        "metaworld",
        tuple(SuiteTask(name, instruction) for name, instruction in INSTRUCTIONS.items()),
        tuple(CAMERAS),
        d_state=4,
        d_action=4,
        max_steps=MAX_STEPS,
        fps=FPS,
        make=_make,
        expert=_expert,
        packages=("metaworld",),
        quality=render_quality,
    )
}
