"""Arms that show a policy another prompt, or other pictures, than the environment does.

What they make follows from the episode's seed (and, for noise, the environment step) alone, so that every rerun, in
whatever process, shows the same. At the first plan of every episode they look whether it reaches the model: a change
that ends in the preprocessing (capitals before a tokenizer that lowers them, a camera that the policy does not see) is
an error, since such an episode is the baseline's and would count as "no effect". `inert="run"` runs it all the same.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from hooked_vla.hooks.model import HookRequest
from hooked_vla.rollouts.batteries.images import IMAGE_KINDS, change_image, check_strength
from hooked_vla.rollouts.batteries.prompts import PROMPT_KINDS, change_prompt
from hooked_vla.rollouts.batteries.reach import check_reach
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.suites import Suite

Frame = Mapping[str, Any]
# what is done with an episode in which nothing that an arm changes reaches the model
Inert = Literal["error", "run"]


@dataclass(frozen=True)
class PromptArm:
    """Every episode is told its instruction changed by one kind of PROMPT_KINDS.

    instructions: of all the suite's tasks, from which other goals are taken; see `of`. inert: see above.
    Raises ValueError for an unknown kind.
    """

    name: str
    kind: str
    instructions: tuple[str, ...]
    inert: Inert = "error"

    def __post_init__(self) -> None:
        _check_inert(self.name, self.inert)
        if self.kind not in PROMPT_KINDS:
            raise ValueError(f"arm {self.name!r}: unknown kind {self.kind!r}; kinds: {list(PROMPT_KINDS)}")

    @classmethod
    def of(cls, kind: str, suite: Suite) -> "PromptArm":
        """The arm of a kind in a suite, named after the kind."""
        return cls(kind, kind, tuple(task.instruction for task in suite.tasks))

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "prompt", "change": self.kind, "instructions": list(self.instructions), "inert": self.inert}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return ()

    def prompt(self, cell: Cell, instruction: str) -> str:
        """What the episode is told in place of its instruction."""
        return change_prompt(self.kind, instruction, self.instructions, cell.seed)

    def observe(self, cell: Cell, env_step: int, frame: Frame) -> Frame:
        return {**frame, "instruction": self.prompt(cell, frame["instruction"])}

    def check(self, model: Any, settings: Any, cell: Cell, before: Frame, after: Frame) -> None:
        """Raises ValueError, naming arm and episode, where nothing of the change reaches the model."""
        if self.inert == "error":
            check_reach(self.name, model, settings, cell, before, after)


@dataclass(frozen=True)
class ImageArm:
    """Every picture of some cameras is changed by one kind of IMAGE_KINDS.

    strength: 1 is the battery's own. cameras: the suite's names; None for all that the policy is shown. inert: see
    above.
    Raises ValueError for an unknown kind, a strength that it does not take, and no cameras.
    """

    name: str
    kind: str
    strength: float = 1.0
    cameras: tuple[str, ...] | None = None
    inert: Inert = "error"

    def __post_init__(self) -> None:
        _check_inert(self.name, self.inert)
        if self.kind not in IMAGE_KINDS:
            raise ValueError(f"arm {self.name!r}: unknown kind {self.kind!r}; kinds: {list(IMAGE_KINDS)}")
        check_strength(self.kind, self.strength)
        if self.cameras == ():
            raise ValueError(f"arm {self.name!r}: no cameras; leave them out for all")

    def describe(self) -> Mapping[str, Any]:
        cameras = None if self.cameras is None else list(self.cameras)
        return {"kind": "image", "change": self.kind, "strength": self.strength, "cameras": cameras,
                "inert": self.inert}  # fmt: skip

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return ()

    def observe(self, cell: Cell, env_step: int, frame: Frame) -> Frame:
        """Raises ValueError for a camera that the frame does not have."""
        pixels = dict(frame["pixels"])
        if self.cameras is not None and (lacking := sorted(set(self.cameras) - set(pixels))):
            raise ValueError(f"arm {self.name!r}: no cameras {lacking} in what the policy is shown: {sorted(pixels)}")
        for camera in pixels if self.cameras is None else self.cameras:
            # each camera has noise of its own
            seed = (cell.seed, env_step, zlib.crc32(camera.encode()))
            pixels[camera] = change_image(self.kind, pixels[camera], self.strength, seed)
        return {**frame, "pixels": pixels}

    def check(self, model: Any, settings: Any, cell: Cell, before: Frame, after: Frame) -> None:
        """Raises ValueError, naming arm and episode, where nothing of the change reaches the model."""
        if self.inert == "error":
            check_reach(self.name, model, settings, cell, before, after)


def _check_inert(name: str, inert: str) -> None:
    if inert not in get_args(Inert):
        raise ValueError(f"arm {name!r}: inert must be one of {list(get_args(Inert))}, got {inert!r}")
