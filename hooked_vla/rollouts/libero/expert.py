"""A scripted expert for LIBERO's picking and placing, through the same seven numbers that a policy gives.

It reads where things lie, and moves the gripper over the object, down, up, over the goal, down and away. A phase ends
when the gripper is where it should be, or after a number of steps.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float64, Int
from libero.libero.benchmark import task_maps

from hooked_vla.rollouts.adapter import Expert, adapter_env
from hooked_vla.rollouts.libero.env import LiberoEnv

Vector = Float64[np.ndarray, " 3"]
OPEN, CLOSED = -1.0, 1.0
# what a step asks of the controller, in its units of 5 cm, for each metre to go: somewhat more, since the arm lags
_GAIN = 1.2 / 0.05
# bowls are gripped by the wall: this far from their middle, and this high over their origin, metres
_BOWL_WALL, _BOWL_GRIP = 0.047, 0.032
# how far the fingers reach over what is between them before the palm touches it, metres
_REACH = 0.032
_HOVER, _LIFT, _CLEAR = 0.12, 0.22, 0.16
# the palm passes what stands beside an object at this distance, and the fingers stay this share of its half on it
_MARGIN, _ON_IT = 0.005, 0.7
# over where things are put: a bowl's origin, and the gripper with anything else, metres
_BOWL_DROP, _DROP = 0.03, 0.10


class PickAndPlace:
    """Puts the goal's object on, or in, the goal's place."""

    def __init__(self, env: LiberoEnv) -> None:
        self.env = env
        _, self.object, self.place = env.simulator.parsed_problem["goal_state"][0]
        self.is_bowl = "bowl" in self.object
        model = env.simulator.sim.model._model
        roots = model.body_rootid[model.geom_bodyid]
        self.geoms = {
            name: np.flatnonzero((roots == model.body_rootid[body]) & (model.geom_contype != 0))
            for name, body in env.simulator.obj_body_id.items()
        }
        # the gripper is never turned
        self.palm = self._box(np.array([model.geom("gripper0_hand_collision").id])) - self.hand
        self.phases: list[Callable[[], tuple[Vector, float, bool]]] = [
            self._over, self._down, self._grip, self._lift, self._carry, self._lower, self._release, self._leave,
        ]  # fmt: skip
        self.phase, self.steps, self.height = 0, 0, 0.0

    def action(self) -> Float64[np.ndarray, " 7"]:
        """The next action: a move towards the phase's target, no turn, and the gripper."""
        target, gripper, done = self.phases[self.phase]()
        self.steps += 1
        if done:
            self.phase, self.steps = min(self.phase + 1, len(self.phases) - 1), 0
        move = np.clip(_GAIN * (target - self.hand), -1, 1)
        return np.array([*move, 0, 0, 0, gripper])

    @property
    def hand(self) -> Vector:
        return self.env.simulator.sim.data.site_xpos[self.env.simulator.robots[0].eef_site_id].copy()

    def position(self, name: str) -> Vector:
        """Of an object, a fixture, or a region of one."""
        simulator = self.env.simulator
        if name in simulator.obj_body_id:
            return simulator.sim.data.body_xpos[simulator.obj_body_id[name]].copy()
        return simulator.sim.data.get_site_xpos(name).copy()

    @property
    def grip(self) -> Vector:
        """Where the fingers close."""
        at = self.position(self.object)
        if self.is_bowl:
            return at + [0, _BOWL_WALL, _BOWL_GRIP]
        box = self._box(self.geoms[self.object])
        grip = np.array([*at[:2], max(at[2], box[1, 2] - _REACH)])
        return grip + [self._aside(grip, box), 0, 0]

    def _box(self, geoms: Int[np.ndarray, " geom"]) -> Float64[np.ndarray, "2 3"]:
        """The lowest and the highest x, y and z of geoms."""
        model, data = self.env.simulator.sim.model._model, self.env.simulator.sim.data._data
        turns, boxes = data.geom_xmat[geoms].reshape(-1, 3, 3), model.geom_aabb[geoms]
        middles = data.geom_xpos[geoms] + np.einsum("gij,gj->gi", turns, boxes[:, :3])
        halves = np.einsum("gij,gj->gi", np.abs(turns), boxes[:, 3:])
        return np.stack([(middles - halves).min(axis=0), (middles + halves).max(axis=0)])

    def _aside(self, grip: Vector, box: Float64[np.ndarray, "2 3"]) -> float:
        """How far along x, across the fingers' way, to grip off the middle: so that the palm passes a neighbour."""
        low, high = self.palm + grip
        for name, geoms in self.geoms.items():
            if name == self.object:
                continue
            near, far = self._box(geoms)
            if (near[:2] - _MARGIN < high[:2]).all() and (far + _MARGIN > low).all():
                ways = near[0] - _MARGIN - high[0], far[0] + _MARGIN - low[0]
                most = _ON_IT * (box[1, 0] - box[0, 0]) / 2
                return float(np.clip(min(ways, key=abs), -most, most))
        return 0.0

    def _over(self) -> tuple[Vector, float, bool]:
        target = self.grip + [0, 0, _HOVER]
        off = np.abs(target - self.hand)
        return target, OPEN, bool(np.hypot(*off[:2]) < 0.008 and off[2] < 0.03)

    def _down(self) -> tuple[Vector, float, bool]:
        return self.grip, OPEN, bool(np.linalg.norm(self.grip - self.hand) < 0.012 or self.steps > 40)

    def _grip(self) -> tuple[Vector, float, bool]:
        self.height = max(self.hand[2] + _LIFT, self.position(self.place)[2] + _CLEAR)
        return self.hand, CLOSED, self.steps > 12

    def _lift(self) -> tuple[Vector, float, bool]:
        there = bool(self.hand[2] > self.height - 0.02)
        return np.array([*self.hand[:2], self.height]), CLOSED, there or self.steps > 40

    def _carry(self) -> tuple[Vector, float, bool]:
        target = self.position(self.place) - (self.position(self.object) - self.hand)
        target[2] = self.height
        return target, CLOSED, bool(np.hypot(*(target - self.hand)[:2]) < 0.01 or self.steps > 80)

    def _lower(self) -> tuple[Vector, float, bool]:
        held = self.position(self.object) - self.hand
        target = self.position(self.place) - [held[0], held[1], 0]
        target[2] += _BOWL_DROP - held[2] if self.is_bowl else _DROP
        return target, CLOSED, bool(abs(target - self.hand)[2] < 0.015 or self.steps > 30)

    def _release(self) -> tuple[Vector, float, bool]:
        return self.hand, OPEN, self.steps > 15

    def _leave(self) -> tuple[Vector, float, bool]:
        return self.hand + [0, 0, 0.1], OPEN, False


# tasks that are one thing put on, or in, another, and that this solves: a bowl in a drawer leaves no room for the
# fingers, and drawers and knobs want other plans
_EXPERT_TASKS = {
    "libero_goal": (
        "put_the_bowl_on_the_stove",
        "put_the_bowl_on_top_of_the_cabinet",
        "put_the_cream_cheese_in_the_bowl",
        "put_the_bowl_on_the_plate",
        "put_the_wine_bottle_on_the_rack",
        "put_the_wine_bottle_on_top_of_the_cabinet",
    ),
    "libero_object": tuple(task_maps["libero_object"]),
    "libero_spatial": tuple(task for task in task_maps["libero_spatial"] if "drawer" not in task),
    "libero_10": (),
}


def scripted_expert(suite: str, task: str) -> Expert:
    """The expert of a task.

    Raises ValueError, with the suite's tasks that have one, for a task without.
    """
    if task not in _EXPERT_TASKS[suite]:
        raise ValueError(
            f"there is no scripted expert for {task!r}; tasks of {suite!r} with one: {list(_EXPERT_TASKS[suite])}"
        )
    plan: PickAndPlace | None = None

    def act(env: gymnasium.Env[dict[str, Any], Any]) -> Float64[np.ndarray, " 7"]:
        nonlocal plan
        inner = adapter_env(env, LiberoEnv)
        # asked first in the middle of an episode, it starts with its first phase there
        if plan is None or inner.n_steps == 0:
            plan = PickAndPlace(inner)
        return plan.action()

    return act
