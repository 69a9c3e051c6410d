"""Two goals in one scene: the robot is told one, and some of its copies have the other one's language tokens inside.

Every copy is an episode of the goal suite under an arm of its own, recorded as all rollouts are. They start in the same
state and act from the same noise. Copy A is told goal A and copy B goal B; the others are told A, and at every plan
their language tokens entering one block of the language model are replaced by those of a run on the same cameras that
was told B. Where such a copy ends says which goal those tokens carry at that depth.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from hooked_vla.hooks import ActivationCache, HookPoint
from hooked_vla.inputs import LANGUAGE
from hooked_vla.rollouts.acting import ModelActor, Row, prepare
from hooked_vla.rollouts.arms import Arm, Baseline, FunctionArm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.manifest import claim_folder
from hooked_vla.rollouts.records import Store, read_episodes, read_steps
from hooked_vla.rollouts.replay import replay
from hooked_vla.rollouts.runner import Environments, GroupRunner
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.sweep import make_plan
from hooked_vla.rollouts.tabletop import TabletopEnv
from hooked_vla.rollouts.tabletop.tasks import Task, find_task
from hooked_vla.vla import HookedVLA

SUITE, SITE = "goal", "vlm.blocks.{}.hook_resid_pre"
# pixels of a film's panels, and the camera that they show
FILM_SIZE, FILM_CAMERA = 224, "agent"


@dataclass(frozen=True)
class Copy:
    """One episode: which goal it is told, and the block at which the other goal's language tokens enter, if any."""

    name: str
    told: str
    layer: int | None = None


@dataclass(frozen=True)
class Outcome:
    """What a copy did. episode: its number in the record; reached: "A", "B" or "neither"; path: of the cup, metres, one
    place a step, and the last."""

    copy: Copy
    episode: int
    reached: str
    path: list[list[float]]

    def numbers(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        return {
            "told": self.copy.told, "patched_layer": self.copy.layer, "reached": self.reached, "episode": self.episode,
            "env_steps": len(self.path) - 1, "path": [[round(x, 4) for x in place] for place in self.path],
        }  # fmt: skip


def copies(model: HookedVLA) -> list[Copy]:
    """A, A patched at each block of the language model, and B."""
    n_layers = sum(name.endswith("hook_resid_pre") and name.startswith("vlm.") for name in model.hook_points)
    return [Copy("A", "A"), *(Copy(f"A, patched at block {i}", "A", i) for i in range(n_layers)), Copy("B", "B")]


def run_goals(model: HookedVLA, name: str, goals: Mapping[str, str], seed: int, folder: Path) -> list[Outcome]:
    """Let all copies act in the scene of `seed` until each has reached a goal, or time is up.

    name: what the record calls the model; goals: tasks of the goal suite, by "A" and "B"; folder: of the record, which
    must be new. An episode that ends at goal B is recorded as "terminated": its task is A.
    Raises ValueError for a folder that holds something else, and when the two instructions have different numbers of
    tokens.
    """
    a, b = (find_task(SUITE, goals[each]) for each in ("A", "B"))
    rows, donor = copies(model), _Donor()
    arms = [_arm(row, b.instruction, donor) for row in rows]
    suite = _either_goal(get_suite(SUITE), b)
    plan = make_plan(model, suite, [Scene(a.id, seed)], arms, Options(n_envs=len(rows)), name)
    settings, noise = plan.job.settings, plan.job.noise
    assert noise is not None, "a model acts"
    actor = _GoalActor(ModelActor(name, model, suite, arms, settings, noise), donor, b.instruction)
    environments = Environments(suite, tuple(settings.cameras.values()), settings.image_size, len(rows))
    runner = GroupRunner(actor, suite, name, len(rows), settings.max_steps, environments)
    claim_folder(folder, plan.manifest)
    try:
        with Store.open(folder) as store:
            for group in plan.groups:
                for part in runner.run(group):
                    store.add(part)
    finally:
        environments.close()
    return [_outcome(folder, number, row) for number, row in enumerate(rows)]


def film_frames(folder: Path, episode: int) -> list[UInt8[np.ndarray, "height width 3"]]:
    """What a camera that looks at the whole scene saw, at every step and after the last; by running it again."""
    (found,) = replay(folder, [episode], [FILM_CAMERA], FILM_SIZE)
    return [*found.images[FILM_CAMERA], found.last_images[FILM_CAMERA]]


def draw_noise(model: HookedVLA, generator: torch.Generator) -> Float[Tensor, "1 chunk d_action"]:
    """Starting noise for one chunk."""
    shape = [size for size in model.hook_points["expert.hook_noisy_actions"].shape if isinstance(size, int)]
    return torch.randn(1, *shape, generator=generator)


class _Donor:
    """The run on the same cameras that is told B, made anew at every plan; None while it is being made."""

    cache: ActivationCache | None = None

    def give(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        """Hook function: the value with the donor's language tokens."""
        if self.cache is None:
            return None
        assert hook.segments is not None
        return torch.where(hook.segments.mask(LANGUAGE)[..., None], self.cache[hook.name], value)


class _GoalActor:
    """Makes the donor's run before every plan of an actor. other: what the donor is told."""

    def __init__(self, actor: ModelActor, donor: _Donor, other: str) -> None:
        self.actor, self.donor, self.other = actor, donor, other
        self.n_action_steps, self.n_seen, self.acting = actor.n_action_steps, actor.n_seen, actor.acting
        self.sites = [arm.requests[0][0] for arm in actor.arms if isinstance(arm, FunctionArm)]

    def act(self, rows: Sequence[Row], env_step: int) -> Float32[np.ndarray, "row step d_action"]:
        model, settings = self.actor.model, self.actor.settings
        told = [{**row.seen[-1], "instruction": self.other} for row in rows]
        source = prepare(model, settings, told)
        if env_step == 0:
            own = model.segments(prepare(model, settings, [row.seen[-1] for row in rows]))["vlm"].mask(LANGUAGE)
            if not torch.equal(own, model.segments(source)["vlm"].mask(LANGUAGE)):
                texts = sorted({self.other, *(row.seen[-1]["instruction"] for row in rows)})
                raise ValueError(f"goals need instructions of equal length, got {texts}")
        self.donor.cache = None
        noise = self.actor.noise([row.cell.seed for row in rows], env_step)
        self.donor.cache = model.run_with_cache(source, self.sites, noise)[1]
        return self.actor.act(rows, env_step)


class _EitherGoal(gymnasium.Wrapper[dict[str, Any], Any, dict[str, Any], Any]):
    """An environment in which the episode ends at another task's goal, too."""

    def __init__(self, env: gymnasium.Env[dict[str, Any], Any], other: Task) -> None:
        super().__init__(env)
        self.other = other

    def step(self, action: Any) -> tuple[dict[str, Any], Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        return obs, reward, terminated or _is_reached(self.unwrapped, self.other), truncated, info


def _either_goal(suite: Suite, other: Task) -> Suite:
    def make(task: str, cameras: Sequence[str], image_size: int) -> gymnasium.Env[dict[str, Any], Any]:
        return _EitherGoal(suite.make(task, cameras, image_size), other)

    return replace(suite, make=make)


def _arm(copy: Copy, other: str, donor: _Donor) -> Arm:
    """other: goal B's instruction."""
    if copy.layer is None:
        return Baseline(copy.name) if copy.told == "A" else ToldArm(copy.name, [Told(other)])
    words = f"language tokens entering block {copy.layer} are those of a run that is told “{other}”, at every plan"
    return FunctionArm(copy.name, ((SITE.format(copy.layer), donor.give),), words)


def _outcome(folder: Path, number: int, copy: Copy) -> Outcome:
    (row,) = read_episodes(folder, [number]).to_pylist()
    states = [*read_steps(folder, [number])["state"].to_pylist(), row["final_state"]]
    reached = {"success": "A", "terminated": "B"}.get(row["ending"], "neither")
    return Outcome(copy, number, reached, [[float(x) for x in state[:3]] for state in states])


def _is_reached(env: Any, task: Task) -> bool:
    assert isinstance(env, TabletopEnv)
    own, env.task = env.task, task
    try:
        return env.situation.is_placed
    finally:
        env.task = own
