"""Suites of tasks by name, whatever simulator they come from: the tabletop's own, and adapters to public benchmarks.

An adapter is a module of this package that defines `SUITES`, a mapping from name to `Suite`, and is listed in
`_ADAPTERS`; it is imported only when one of its suites is asked for.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium
import numpy as np
from jaxtyping import Float64

from hooked_vla.inputs import Observation

# module under hooked_vla.rollouts -> the suites that it defines
_ADAPTERS: dict[str, tuple[str, ...]] = {
    "tabletop": ("goal", "object", "spatial", "shift", "style"),
    "libero": ("libero_goal", "libero_object", "libero_spatial", "libero_10"),
    "metaworld": ("metaworld",),
    "aloha": ("aloha_transfer_cube", "aloha_insertion"),
    "pusht": ("pusht",),
    "simpler": ("simpler_bridge", "simpler_bridge_sink"),
}


@dataclass(frozen=True)
class SuiteTask:
    """One task of a suite. id: unique in the suite; instruction: what the policy is told."""

    id: str
    instruction: str


@dataclass(frozen=True)
class Suite:
    """Tasks that share cameras, state and action space.

    cameras: names that `make` can draw. max_steps: environment steps after which an episode has failed. fps: control
    steps a second. make(task, cameras, image_size): a Gymnasium environment of the task, whose observation is
    {"pixels": {camera: uint8 [H W 3]}, "state": float32 [d_state], "instruction": str}, and whose info has
    "is_success"; the same seed of `reset` gives the same episode. n_starts: the episode seeds that differ, for suites
    whose starting states are a fixed list; None where every seed gives another. expert(task): a scripted expert, called
    with an environment of the task and giving its action [d_action]; one expert acts in one environment, and starts
    anew when that is reset. None where there is none; it raises ValueError for a task that it cannot do. packages: what
    is installed besides the project's own needs and decides how episodes come out. quality: says how images are drawn,
    where that can be chosen; None where it cannot. phases: what info["phase"] may be, in their order; empty where there
    is no such.
    """

    name: str
    tasks: tuple[SuiteTask, ...]
    cameras: tuple[str, ...]
    d_state: int
    d_action: int
    max_steps: int
    fps: int
    make: Callable[[str, Sequence[str], int], gymnasium.Env[dict[str, Any], Any]]
    n_starts: int | None = None
    expert: Callable[[str], Callable[[gymnasium.Env[dict[str, Any], Any]], Float64[np.ndarray, " d_action"]]] | None = (
        None
    )
    packages: tuple[str, ...] = ()
    quality: Callable[[], str] | None = None
    phases: tuple[str, ...] = ()

    def task(self, name: str) -> SuiteTask:
        """A task by its id.

        Raises ValueError with the suite's ids.
        """
        for task in self.tasks:
            if task.id == name:
                return task
        raise ValueError(f"unknown task {name!r} in the suite {self.name!r}; tasks: {[task.id for task in self.tasks]}")


def list_suites() -> list[str]:
    """Names of all suites, whether or not what they need is installed."""
    return [name for names in _ADAPTERS.values() for name in names]


def get_suite(name: str) -> Suite:
    """A suite by name.

    Raises ValueError with the known names; ModuleNotFoundError saying what to install where its simulator is not.
    """
    for module, names in _ADAPTERS.items():
        if name in names:
            return importlib.import_module(f"hooked_vla.rollouts.{module}").SUITES[name]
    raise ValueError(f"unknown suite {name!r}; suites: {list_suites()}")


def observation(obs: dict[str, Any]) -> Observation:
    """An environment's observation as a policy takes it."""
    return Observation(images=obs["pixels"], state=obs["state"], instruction=obs["instruction"])
