"""Scripted experts for ALOHA: keyframes of the two grippers, turned into joint angles by inverse kinematics.

Its motors are springs that give way by up to 2 cm under the arms' weight, so their targets are raised by the load that
they bear. The experts read where the objects lie; for the insertion they also watch them in the grippers.
"""

# comes with an extra: where it is absent, importing says so
# pyright: reportMissingImports=false

# mujoco's functions come from compiled modules that have no stubs
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass
from typing import Any

import gymnasium
import mujoco
import numpy as np
from gym_aloha.constants import START_ARM_POSE
from jaxtyping import Float64

from hooked_vla.rollouts.adapter import Expert, adapter_env
from hooked_vla.rollouts.aloha.env import AlohaEnv

Vector = Float64[np.ndarray, " 3"]
Quaternion = Float64[np.ndarray, " 4"]

# between the ends of the finger pads, in the frame of gripper_link, metres
_TIP = np.array([0.15, 0.0, 0.0])
# joints of one arm without its fingers; the second arm's come after the first's and its two fingers
_N_ARM, _N_QPOS = 6, 8
# damping of the least-squares step, and its largest change of an angle: inverse kinematics settles within 20 of them
_DAMPING, _MAX_TURN, _MAX_STEPS = 1e-4, 0.2, 20
_OPEN, _CLOSED = 1.0, 0.0
# of the cube, and of the peg and the socket while they are gripped, over the table, metres
_CUBE_HEIGHT, _GRIP_HEIGHT = 0.02, 0.012
_X, _Y, _UP = np.eye(3)
# where the arms meet
_CUBE_MEETING, _PEG_MEETING = np.array([0.0, 0.5, 0.25]), np.array([0.0, 0.5, 0.2])
# of peg and socket from where they meet: before the insertion, and when the peg is all the way in; metres
_APART, _TOGETHER = 0.14, 0.035
_INSERT_FROM, _INSERT_UNTIL = 175, 255
# of what an object is off its place, the share that each step takes back, and the most in metres and radians
_FOLLOW, _FOLLOW_TURN, _MAX_FOLLOW, _MAX_FOLLOW_TURN = 0.15, 0.1, 0.004, 0.02


def turn(axis: Vector, degrees: float) -> Quaternion:
    """The rotation about an axis."""
    out = np.zeros(4)
    mujoco.mju_axisAngle2Quat(out, axis, np.deg2rad(degrees))
    return out


def times(first: Quaternion, second: Quaternion) -> Quaternion:
    """The rotation `second`, then `first`."""
    out = np.zeros(4)
    mujoco.mju_mulQuat(out, first, second)
    return out


def rotation_to(goal: Quaternion, now: Quaternion) -> Vector:
    """The rotation vector, in the world's frame, that leads from one orientation to another."""
    back, out = np.zeros(4), np.zeros(3)
    mujoco.mju_negQuat(back, now)
    mujoco.mju_quat2Vel(out, times(goal, back), 1)
    return out


def tip_of(body: Vector, orientation: Quaternion) -> Vector:
    """Where the point between the fingers' ends is, from the pose of gripper_link."""
    out = np.zeros(3)
    mujoco.mju_rotVecQuat(out, _TIP, orientation)
    return body + out


@dataclass(frozen=True)
class Pose:
    """Of a gripper: the point between its fingers' ends, and the orientation of gripper_link."""

    position: Vector
    orientation: Quaternion


@dataclass(frozen=True)
class Key:
    """A pose to be reached at a step, with the fingers so far open."""

    step: int
    pose: Pose
    fingers: float


class Arm:
    """One arm: its gripper's pose, and the joint angles for a pose by damped least squares on a copy of the data."""

    def __init__(self, model: "mujoco.MjModel", side: str) -> None:
        self.model, self.data = model, mujoco.MjData(model)
        self.body = model.body(f"vx300s_{side}/gripper_link").id
        first = 0 if side == "left" else _N_QPOS
        self.joints = np.arange(first, first + _N_ARM)
        self.data.qpos[: 2 * _N_QPOS] = START_ARM_POSE
        mujoco.mj_forward(model, self.data)
        self.start = Pose(
            tip_of(self.data.xpos[self.body], self.data.xquat[self.body]), self.data.xquat[self.body].copy()
        )
        self.dofs = model.jnt_dofadr[self.joints]
        self.stiffness = model.actuator_gainprm[self.joints, 0]

    def steer(self, pose: Pose, real: "mujoco.MjData") -> Float64[np.ndarray, " 6"]:
        """Motor targets that hold the gripper at a pose, given the load that the joints bear now."""
        sag = (real.qfrc_bias - real.qfrc_passive)[self.dofs] / self.stiffness
        return self.angles(pose) + sag

    def angles(self, pose: Pose) -> Float64[np.ndarray, " 6"]:
        """Joint angles of a pose, near those of the last."""
        body = pose.position - tip_of(np.zeros(3), pose.orientation)
        jacobian, error = np.zeros((6, self.model.nv)), np.zeros(6)
        limits = self.model.jnt_range[self.joints]
        for _ in range(_MAX_STEPS):
            mujoco.mj_kinematics(self.model, self.data)
            mujoco.mj_comPos(self.model, self.data)
            error[:3] = body - self.data.xpos[self.body]
            error[3:] = rotation_to(pose.orientation, self.data.xquat[self.body])
            if np.linalg.norm(error) < 1e-4:
                break
            mujoco.mj_jacBody(self.model, self.data, jacobian[:3], jacobian[3:], self.body)
            part = jacobian[:, self.dofs]
            step = part.T @ np.linalg.solve(part @ part.T + _DAMPING * np.eye(6), error)
            moved = self.data.qpos[self.joints] + step.clip(-_MAX_TURN, _MAX_TURN)
            self.data.qpos[self.joints] = moved.clip(limits[:, 0], limits[:, 1])
        return self.data.qpos[self.joints].copy()


def between(keys: list[Key], step: int) -> tuple[Pose, float]:
    """Pose and fingers at a step: eased from one key to the next, and at the last from then on."""
    after = next((i for i, key in enumerate(keys) if key.step > step), len(keys))
    if after == len(keys):
        return keys[-1].pose, keys[-1].fingers
    first, second = keys[after - 1], keys[after]
    linear = (step - first.step) / (second.step - first.step)
    eased = linear**2 * (3 - 2 * linear)
    goal = second.pose.orientation
    if first.pose.orientation @ goal < 0:
        goal = -goal
    orientation = (1 - eased) * first.pose.orientation + eased * goal
    position = (1 - eased) * first.pose.position + eased * second.pose.position
    fingers = (1 - linear) * first.fingers + linear * second.fingers
    return Pose(position, orientation / np.linalg.norm(orientation)), fingers


class TransferCube:
    """The right arm lifts the cube and holds it where the left arm takes it."""

    def __init__(self, model: "mujoco.MjModel", data: "mujoco.MjData") -> None:
        self.data, self.left, self.right = data, Arm(model, "left"), Arm(model, "right")
        cube = data.qpos[2 * _N_QPOS :][:3] * [1, 1, 0] + _CUBE_HEIGHT * _UP
        tilted = times(turn(_Y, -60.0), self.right.start.orientation)
        level = times(turn(_Y, -20.0), self.right.start.orientation)
        # the left fingers close from above and below, the right ones from the sides
        crossed = times(turn(_X, 90.0), self.left.start.orientation)
        at, above = Pose(cube, tilted), Pose(cube + 0.1 * _UP, tilted)
        meet, leave = Pose(_CUBE_MEETING, level), Pose(_CUBE_MEETING + 0.12 * _X, level)
        wait, take = Pose(_CUBE_MEETING - 0.13 * _X, crossed), Pose(_CUBE_MEETING - 0.008 * _X, crossed)
        self.right_keys = [
            Key(0, self.right.start, _CLOSED), Key(50, above, _OPEN), Key(75, at, _OPEN), Key(85, at, _OPEN),
            Key(105, at, _CLOSED), Key(125, above, _CLOSED), Key(195, meet, _CLOSED), Key(255, meet, _CLOSED),
            Key(270, meet, _OPEN), Key(295, leave, _OPEN),
        ]  # fmt: skip
        self.left_keys = [
            Key(0, self.left.start, _CLOSED), Key(70, wait, _OPEN), Key(190, wait, _OPEN), Key(220, take, _OPEN),
            Key(230, take, _OPEN), Key(250, take, _CLOSED),
        ]  # fmt: skip

    def action(self, step: int) -> Float64[np.ndarray, " 14"]:
        """Both arms' joint angles and fingers at a step."""
        out: list[float] = []
        for arm, keys in ((self.left, self.left_keys), (self.right, self.right_keys)):
            pose, fingers = between(keys, step)
            out += [*arm.steer(pose, self.data), fingers]
        return np.array(out)


class Insertion:
    """Both arms lift what is theirs, bring peg and socket in line, and then together."""

    def __init__(self, model: "mujoco.MjModel", data: "mujoco.MjData") -> None:
        self.data = data
        self.arms = (Arm(model, "left"), Arm(model, "right"))
        # x points from socket to peg
        self.sides = (-1.0, 1.0)
        self.keys: list[list[Key]] = []
        for arm, side, lying in zip(self.arms, self.sides, self._objects(), strict=True):
            tilted = times(turn(_Y, -60.0 * side), arm.start.orientation)
            place = lying[:3] * [1, 1, 0] + _GRIP_HEIGHT * _UP
            at, above = Pose(place, tilted), Pose(place + 0.12 * _UP, tilted)
            self.keys.append(
                [
                    Key(0, arm.start, _CLOSED), Key(50, above, _OPEN), Key(80, at, _OPEN), Key(88, at, _OPEN),
                    Key(110, at, _CLOSED), Key(130, Pose(place + 0.1 * _UP, tilted), _CLOSED),
                    Key(165, Pose(_PEG_MEETING + side * _APART * _X, tilted), _CLOSED),
                ]
            )  # fmt: skip
        self.held = [keys[-1].pose for keys in self.keys]

    def action(self, step: int) -> Float64[np.ndarray, " 14"]:
        """Both arms' joint angles and fingers at a step."""
        inserted = np.clip((step - _INSERT_FROM) / (_INSERT_UNTIL - _INSERT_FROM), 0, 1)
        apart = _APART + inserted * (_TOGETHER - _APART)
        out: list[float] = []
        for i, (arm, side, thing) in enumerate(zip(self.arms, self.sides, self._objects(), strict=True)):
            if step <= self.keys[i][-1].step:
                pose, fingers = between(self.keys[i], step)
            else:
                self.held[i] = self._follow(self.held[i], thing, _PEG_MEETING + side * apart * _X)
                pose, fingers = self.held[i], _CLOSED
            out += [*arm.steer(pose, self.data), fingers]
        return np.array(out)

    def _objects(self) -> tuple[Float64[np.ndarray, " 7"], Float64[np.ndarray, " 7"]]:
        """Poses of what the left and the right arm take: the socket and the peg, which come in the other order."""
        lying = self.data.qpos[2 * _N_QPOS :]
        return lying[7:14].copy(), lying[:7].copy()

    @staticmethod
    def _follow(held: Pose, thing: Float64[np.ndarray, " 7"], place: Vector) -> Pose:
        """The gripper's next pose, so that what it holds comes to a place, unturned."""
        move = np.clip(_FOLLOW * (place - thing[:3]), -_MAX_FOLLOW, _MAX_FOLLOW)
        rotation = _FOLLOW_TURN * rotation_to(np.array([1.0, 0, 0, 0]), thing[3:])
        rotation = rotation.clip(-_MAX_FOLLOW_TURN, _MAX_FOLLOW_TURN)
        angle = float(np.linalg.norm(rotation))
        if angle == 0:
            return Pose(held.position + move, held.orientation)
        return Pose(held.position + move, times(turn(rotation / angle, float(np.rad2deg(angle))), held.orientation))


_PLANS = {"transfer_cube": TransferCube, "insertion": Insertion}


def scripted_expert(task: str) -> Expert:
    """The expert of a task of gym-aloha. It plans when the environment has just been reset.

    It raises RuntimeError where it is first asked in the middle of an episode: it plans from how the episode starts.
    """
    plan: TransferCube | Insertion | None = None

    def act(env: gymnasium.Env[dict[str, Any], Any]) -> Float64[np.ndarray, " 14"]:
        nonlocal plan
        aloha = adapter_env(env, AlohaEnv)
        if aloha.n_steps == 0:
            plan = _PLANS[task](aloha.model, aloha.data)
        if plan is None:
            raise RuntimeError(f"the expert of {task!r} plans from an episode's start; it was first asked after it")
        return plan.action(aloha.n_steps)

    return act
