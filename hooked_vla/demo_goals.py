"""Two goals in one scene: the robot is told one, and some of its copies have the other one's language tokens inside.

All rows start in the same state and act from the same noise. Row A is told goal A and row B goal B; the others are told
A, and at every plan their language tokens entering one block of the language model are replaced by those of a run on
the same cameras that was told B. Where such a row ends says which goal those tokens carry at that depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from hooked_vla.hooks import HookPoint
from hooked_vla.inputs import LANGUAGE, Observation
from hooked_vla.rollouts.tabletop import MAX_STEPS, TabletopEnv
from hooked_vla.rollouts.tabletop.tasks import Task, find_task
from hooked_vla.vla import HookedVLA

SITE = "vlm.blocks.{}.hook_resid_pre"
# pixels of a film's panels
FILM_SIZE = 224


@dataclass(frozen=True)
class Copy:
    """One row: which goal it is told, and the block at which the other goal's language tokens enter, if any."""

    name: str
    told: str
    layer: int | None = None


@dataclass
class Outcome:
    """What a row did. reached: "A", "B" or "neither"; path: of the cup, metres, one place a step."""

    copy: Copy
    reached: str
    path: list[list[float]]
    frames: list[UInt8[np.ndarray, "height width 3"]]

    def numbers(self) -> dict[str, Any]:
        """Without the frames."""
        return {
            "told": self.copy.told, "patched_layer": self.copy.layer, "reached": self.reached,
            "env_steps": len(self.path) - 1, "path": [[round(x, 4) for x in place] for place in self.path],
        }  # fmt: skip


def copies(model: HookedVLA) -> list[Copy]:
    """The rows: A, B, and A patched at each block of the language model."""
    n_layers = sum(name.endswith("hook_resid_pre") and name.startswith("vlm.") for name in model.hook_points)
    return [Copy("A", "A"), Copy("B", "B"), *(Copy(f"A, patched at block {i}", "A", i) for i in range(n_layers))]


def run_goals(model: HookedVLA, goals: dict[str, str], seed: int, filmed: bool) -> list[Outcome]:
    """Let all rows act in the scene of `seed` until each has reached a goal, or time is up.

    goals: tasks of the goal suite, by "A" and "B".
    Raises ValueError when the two instructions have different numbers of tokens.
    """
    tasks = {name: find_task("goal", task) for name, task in goals.items()}
    rows = copies(model)
    # films are drawn by a renderer of their own size, on the same simulation
    envs = [TabletopEnv("goal", goals["A"], cameras=()) for _ in rows]
    for env in envs:
        env.reset(seed=seed)
    outcomes = [Outcome(row, "neither", [env.situation.cup.tolist()], []) for row, env in zip(rows, envs, strict=True)]
    camera = TabletopEnv("goal", goals["A"], FILM_SIZE, ())
    told = [tasks[row.told].instruction for row in rows]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(0, MAX_STEPS, model.spec.features.n_action_steps):
        chunk = _plan(model, rows, envs, told, tasks["B"].instruction, draw_noise(model, generator))
        for step in range(model.spec.features.n_action_steps):
            for outcome, env, actions in zip(outcomes, envs, chunk, strict=True):
                if outcome.reached == "neither":
                    env.advance(actions[step].numpy())
                    outcome.path.append(env.situation.cup.tolist())
                    outcome.reached = next((name for name, task in tasks.items() if _is_reached(env, task)), "neither")
                if filmed:
                    outcome.frames.append(_picture(camera, env))
        if all(outcome.reached != "neither" for outcome in outcomes):
            break
    for env in (*envs, camera):
        env.close()
    return outcomes


def draw_noise(model: HookedVLA, generator: torch.Generator) -> Float[Tensor, "1 chunk d_action"]:
    """Starting noise for one chunk."""
    shape = [size for size in model.hook_points["expert.hook_noisy_actions"].shape if isinstance(size, int)]
    return torch.randn(1, *shape, generator=generator)


@torch.no_grad()
def _plan(
    model: HookedVLA, rows: Sequence[Copy], envs: Sequence[TabletopEnv], told: list[str], other: str, noise: Tensor
) -> Float[Tensor, "row step d_action"]:
    images = {camera: np.stack([env.image(camera) for env in envs]) for camera in model.spec.features.cameras}
    states = np.stack([env.proprioception for env in envs])
    noise = noise.expand(len(rows), -1, -1)
    source = model.prepare(Observation(images, states, [other] * len(rows)))
    inputs = model.prepare(Observation(images, states, told))
    language = model.segments(inputs)["vlm"].mask(LANGUAGE)
    if not torch.equal(language, model.segments(source)["vlm"].mask(LANGUAGE)):
        raise ValueError(f"goals need instructions of equal length, got {sorted({*told, other})}")
    layers = [row.layer for row in rows if row.layer is not None]
    _, cache = model.run_with_cache(source, [SITE.format(layer) for layer in layers], noise)

    def patch(layer: int) -> Any:
        here = torch.tensor([row.layer == layer for row in rows])[:, None] & language

        def give(value: Tensor, hook: HookPoint) -> Tensor:
            return torch.where(here[..., None], cache[SITE.format(layer)], value)

        return give

    with model.hooks([(SITE.format(layer), patch(layer)) for layer in layers]):
        return model(inputs, noise).chunk


def _is_reached(env: TabletopEnv, task: Task) -> bool:
    own, env.task = env.task, task
    try:
        return env.situation.is_placed
    finally:
        env.task = own


def _picture(camera: TabletopEnv, env: TabletopEnv) -> UInt8[np.ndarray, "height width 3"]:
    camera.load_state(env.save_state())
    return camera.image("agent")
