"""Demonstrations: what cameras show, and what the expert would do from there for the next actions.

The hand is disturbed on its way, so that the states next to the expert's path are there too; the labels are not: they
come from letting the expert go on, undisturbed, from every recorded state. The same recording serves corrections of a
policy's own episodes (DAgger, arXiv 1011.0686): the policy acts, the expert says what it would have done.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, UInt8

from hooked_vla.inputs import Observation
from hooked_vla.rollouts.tabletop import MAX_STEPS, PADS, TASKS, TabletopEnv
from hooked_vla.rollouts.tabletop.tasks import find_task
from hooked_vla.training.frames import project
from hooked_vla.vla import HookedVLA

# shares of the suites among demonstrations; shift is never trained on
MIXTURE = {"goal": 0.6, "object": 0.12, "spatial": 0.1, "style": 0.18}
NOISES = (0.0, 0.3, 0.6, 1.0)


@dataclass(frozen=True)
class Moment:
    """One recorded step. chunk: the expert's next actions; goal: where the first camera sees the block and the pad that
    are meant (column, row; 0..1 from the left and top); task: what is told, by its number in the recorder's names."""

    images: UInt8[np.ndarray, "camera height width 3"]
    state: Float32[np.ndarray, " d_state"]
    chunk: Float32[np.ndarray, "step d_action"]
    goal: Float32[np.ndarray, "2 2"]
    task: int


Act = Callable[[Sequence[TabletopEnv]], Sequence[np.ndarray]]


class Recorder:
    """Runs episodes of many tasks and records moments of them.

    suites: shares of the suites; tasks of a suite are equally frequent. chunk: actions a label. keep: share of the
    steps that is recorded. retold: share of these that are labelled as another task of the same scene would be, of the
    same block while one is held: what a scene looks like then says nothing of what is meant.
    """

    def __init__(
        self, suites: dict[str, float], cameras: Sequence[str], image_size: int, chunk: int, seed: int,
        keep: float = 0.5, retold: float = 0.0,
    ) -> None:  # fmt: skip
        self.rng = np.random.default_rng(seed)
        self.cameras, self.image_size, self.chunk, self.keep = tuple(cameras), image_size, chunk, keep
        self.retold = retold
        self.names = [(suite, task.id) for suite in suites for task in TASKS[suite]]
        shares = np.array([suites[suite] / len(TASKS[suite]) for suite, _ in self.names])
        self.shares = shares / shares.sum()
        self._envs: dict[tuple[int, str, tuple[str, ...], tuple[str, ...]], TabletopEnv] = {}

    def episodes(self, n_rows: int, make_act: Callable[[int], Act] | None = None) -> Iterator[list[list[Moment]]]:
        """Endless groups of `n_rows` episodes side by side: the moments of each.

        make_act: makes what acts in all rows of a group; None for the disturbed expert.
        """
        make_act = make_act or (lambda rows: Disturbed(self.rng, rows))
        while True:
            tasks = [int(self.rng.choice(len(self.names), p=self.shares)) for _ in range(n_rows)]
            envs = [self._reset(row, task) for row, task in enumerate(tasks)]
            yield self._record(envs, make_act(n_rows))

    def _record(self, envs: list[TabletopEnv], act: Act) -> list[list[Moment]]:
        moments: list[list[Moment]] = [[] for _ in envs]
        running = [True] * len(envs)
        for _ in range(MAX_STEPS):
            actions = act(envs)
            for row, (env, action) in enumerate(zip(envs, actions, strict=True)):
                if not running[row]:
                    continue
                if self.rng.random() < self.keep:
                    moments[row].append(self._moment(env))
                env.advance(action)
                running[row] = not env.situation.is_placed and abs(env.situation.block[:2]).max() < 0.4
            if not any(running):
                break
        return moments

    def _moment(self, env: TabletopEnv) -> Moment:
        own = env.task
        # drawn only where asked for: without it, the same seed records the same moments as ever
        if self.retold and self.rng.random() < self.retold:
            others = [
                task for task in TASKS[env.suite]
                if (task.blocks, task.pads, task.style) == (own.blocks, own.pads, own.style)
                and (task.block == own.block or not env.holds)
            ]  # fmt: skip
            env.task = others[self.rng.integers(len(others))]
        meant = np.array([env.situation.block, (*PADS[env.task.pad].xy, 0.0)])
        moment = Moment(
            images=np.stack([env.image(camera) for camera in self.cameras]),
            state=env.proprioception,
            chunk=expert_chunk(env, self.chunk),
            goal=project(env, self.cameras[0], meant).astype(np.float32),
            task=self.names.index((env.suite, env.task.id)),
        )
        env.task = own
        return moment

    def _reset(self, row: int, index: int) -> TabletopEnv:
        """An environment at the start of an episode; tasks with the same scene share one, and its renderer."""
        suite, name = self.names[index]
        task = find_task(suite, name)
        key = (row, suite, task.blocks, task.pads)
        if key not in self._envs:
            self._envs[key] = TabletopEnv(suite, name, self.image_size, self.cameras)
        env = self._envs[key]
        # what is observed is drawn when a moment is kept
        env.cameras = ()
        env.reset(seed=int(self.rng.integers(2**31)), options={"task": name})
        return env


class Policy:
    """A model, replanning as often as its features say; made anew for every group."""

    def __init__(self, model: HookedVLA) -> None:
        self.model, self._planned = model, deque[np.ndarray]()

    def __call__(self, envs: Sequence[TabletopEnv]) -> Sequence[np.ndarray]:
        if not self._planned:
            features = self.model.spec.features
            images = {camera: np.stack([env.image(camera) for env in envs]) for camera in features.cameras}
            states = np.stack([env.proprioception for env in envs])
            obs = Observation(images, states, [env.instruction for env in envs])
            chunk = self.model.predict_action_chunk(obs).numpy()
            self._planned.extend(chunk[:, : features.n_action_steps].swapaxes(0, 1))
        return list(self._planned.popleft())


class Disturbed:
    """The expert with noise on its movements, a level for each episode, and now and then a slip of the suction."""

    def __init__(self, rng: np.random.Generator, n_rows: int) -> None:
        self.rng, self.levels = rng, rng.choice(NOISES, n_rows)

    def __call__(self, envs: Sequence[TabletopEnv]) -> list[np.ndarray]:
        actions = []
        for env, level in zip(envs, self.levels, strict=True):
            action = env.expert_action()
            action[:3] += level * self.rng.standard_normal(3)
            if self.rng.random() < 0.01 * level:
                action[3] = -action[3]
            actions.append(action)
        return actions


def expert_chunk(env: TabletopEnv, length: int) -> Float32[np.ndarray, "step 4"]:
    """The expert's next actions from here; the environment is left as it was."""
    before, actions = env.save_state(), []
    for _ in range(length):
        actions.append(env.expert_action())
        env.advance(actions[-1])
    env.load_state(before)
    return np.array(actions, np.float32)
