"""The scripted expert: a smooth function of what cameras and proprioception show, so that it can be imitated.

It has no memory and no hidden phase. Where an expert would switch at a threshold it moves along a funnel instead:
the height that it wants is a function of the distance to go, and how fast it travels one of the height it has. The
phase label is read off the same numbers afterwards.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from hooked_vla.rollouts.tabletop.scene import BLOCK_HALF, PAD_HALF
from hooked_vla.rollouts.tabletop.tasks import Style

PHASES = ("approach", "descend", "grasp", "lift", "transport", "release")
# metres from the cup to its target under an action of 1
ACTION_SCALE = 0.03
BLOCK_TOP = 2 * BLOCK_HALF
# how far from the pad's centre a block may lie, along each side, and be on it
PAD_REACH = PAD_HALF - 0.010
_TOUCH = BLOCK_TOP - 0.004
_PLACE = BLOCK_TOP + 0.004
_GAIN = 0.8


@dataclass(frozen=True)
class Situation:
    """What the expert acts on. cup: rim of the cup (x, y, z); block: centre (x, y, z); pad: centre (x, y); metres."""

    cup: Float64[np.ndarray, " 3"]
    holds: bool
    block: Float64[np.ndarray, " 3"]
    pad: Float64[np.ndarray, " 2"]

    @property
    def to_block(self) -> float:
        """Horizontal distance from the cup to the block."""
        return float(np.linalg.norm(self.block[:2] - self.cup[:2]))

    @property
    def to_pad(self) -> float:
        """Horizontal distance from the cup to the pad's centre."""
        return float(np.linalg.norm(self.pad - self.cup[:2]))

    @property
    def is_placed(self) -> bool:
        """The block lies on the pad, and the cup has let go."""
        off = np.abs(self.block[:2] - self.pad).max()
        return bool(not self.holds and off < PAD_REACH and self.block[2] < BLOCK_HALF + 0.008)


def expert_action(now: Situation, style: Style) -> Float64[np.ndarray, " 4"]:
    """The expert's action: dx, dy, dz of the cup's target in units of ACTION_SCALE, and suction (on above 0)."""
    x, y, z = now.cup
    if now.is_placed:
        goal, height, freedom, suction = now.cup[:2], style.height, 1.0, -1.0
    elif now.holds:
        goal = now.pad
        height = _PLACE + (style.height - _PLACE) * _ramp(now.to_pad, 0.015, 0.10)
        # lift first: no way sideways until the block is clear of the table and its neighbours
        freedom = max(_ramp(z, 0.06, min(style.height, 0.11) - 0.005), 1 - _ramp(now.to_pad, 0.02, 0.05))
        suction = max(now.to_pad - 0.03, z - _PLACE - 0.010) / 0.010
    else:
        goal = now.block[:2]
        height = _TOUCH + (style.height - _TOUCH) * _ramp(now.to_block, 0.012, 0.07)
        freedom = 1 - 0.9 * _ramp(height - z, 0.0, 0.04)
        suction = min(0.028 - now.to_block, _TOUCH + 0.035 - z) / 0.010
    step = _GAIN * np.array([*(freedom * (goal - (x, y))), height - z]) / ACTION_SCALE
    step[:2] *= min(1.0, style.speed / max(float(np.linalg.norm(step[:2])), 1e-9))
    step[2] = np.clip(step[2], -style.speed, style.speed)
    return np.array([*step, np.clip(suction, -1, 1)])


def phase(now: Situation, style: Style) -> str:
    """Which of PHASES the situation belongs to."""
    if now.holds:
        if now.to_pad < 0.05:
            return "release"
        return "lift" if now.cup[2] < min(style.height, 0.11) - 0.015 else "transport"
    if now.is_placed:
        return "release"
    if now.to_block > 0.03:
        return "approach"
    return "descend" if now.cup[2] > BLOCK_TOP + 0.015 else "grasp"


def _ramp(value: float, low: float, high: float) -> float:
    """0 below `low`, 1 above `high`, smooth between (3t² - 2t³)."""
    t = min(max((value - low) / (high - low), 0.0), 1.0)
    return t * t * (3 - 2 * t)
