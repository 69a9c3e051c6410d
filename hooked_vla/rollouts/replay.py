"""Recorded episodes with their images: run again from seed and actions, and checked against the record.

Tables hold no frames. The environments are deterministic, so an episode's recorded actions from its seed show them
again; states, rewards and success must come out as recorded, which also tells that the record is true.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Float64, UInt8

from hooked_vla.rollouts.drawing import QUALITY_VARIABLE
from hooked_vla.rollouts.records import read_episodes, read_manifest, read_steps
from hooked_vla.rollouts.runner import Environments
from hooked_vla.rollouts.settings import IMAGE_SIZE
from hooked_vla.rollouts.suites import Suite, get_suite

# columns of the table of steps that tell what an episode did, rather than what it saw and how it went
_CARRIED = ("phase", "chunk", "chunk_step")
# environments that are kept for the next episode of their task
_KEPT = 4


class ReplayError(RuntimeError):
    """An episode did not come out as it was recorded."""


@dataclass(frozen=True)
class Episode:
    """One episode, step by step: what was seen, what was then done, and what that led to.

    number: in the run that it was recorded in. images: camera -> what it showed when the action was taken.
    last_images, last_state: after the last action. fps: steps a second. columns: further values, one for every step.
    about: what else is known of the episode as a whole, plain values.
    """

    number: int
    instruction: str
    fps: int
    images: Mapping[str, UInt8[np.ndarray, "step _height _width 3"]]
    states: Float32[np.ndarray, "step d_state"]
    actions: Float32[np.ndarray, "step d_action"]
    rewards: Float64[np.ndarray, " step"]
    successes: Bool[np.ndarray, " step"]
    last_images: Mapping[str, UInt8[np.ndarray, "_height _width 3"]]
    last_state: Float32[np.ndarray, " d_state"]
    columns: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises ValueError for an episode without steps, or entries of different numbers of steps."""
        lengths = {"states": len(self.states), "rewards": len(self.rewards), "successes": len(self.successes)}
        lengths |= {name: len(each) for name, each in [*self.images.items(), *self.columns.items()]}
        wrong = {name: n for name, n in lengths.items() if n != len(self)}
        if wrong or not len(self):
            raise ValueError(f"episode {self.number} has {len(self)} actions, but {wrong or 'needs at least one'}")

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def success(self) -> bool:
        """Whether the task was done at the end."""
        return bool(self.successes[-1])


def replay(
    folder: str | Path,
    episodes: Sequence[int] | None = None,
    cameras: Sequence[str] | None = None,
    image_size: int | None = None,
    suite: Suite | None = None,
    tolerance: float = 0.0,
) -> Iterator[Episode]:
    """The recorded episodes of a folder of rollouts, with images, one after the other.

    episodes: their numbers; None: all that are recorded. cameras, image_size: what to draw; by default what the policy
    saw. suite: for runs in a suite that has no name here. tolerance: how far states and rewards may be from the record;
    0 where the simulator is the very same.
    Raises FileNotFoundError or ValueError for a folder that is not one of rollouts, KeyError for episodes that are not
    recorded, ValueError for unknown cameras or where images would be drawn otherwise than the policy saw them,
    ReplayError naming the first step that comes out otherwise.
    """
    manifest = read_manifest(folder)
    suite = get_suite(manifest["suite"]["name"]) if suite is None else suite
    seen = list(dict.fromkeys(manifest["settings"]["cameras"].values()))
    cameras = list(cameras if cameras is not None else seen or suite.cameras)
    if unknown := [camera for camera in cameras if camera not in suite.cameras]:
        raise ValueError(f"the suite {suite.name!r} has no cameras {unknown}; it has {list(suite.cameras)}")
    drawn = manifest["suite"].get("render")
    if seen and suite.quality is not None and drawn != (now := suite.quality()):
        raise ValueError(
            f"{folder} was recorded with images drawn {drawn!r}, now they are drawn {now!r}: {QUALITY_VARIABLE} decides"
        )
    if image_size is None:
        # a scripted expert looks at no images
        image_size = int(manifest["settings"]["image_size"]) if seen else IMAGE_SIZE
    rows = {row["episode"]: row for row in read_episodes(folder, episodes).to_pylist()}
    wanted = sorted(rows) if episodes is None else list(episodes)
    environments = Environments(suite, cameras, image_size, limit=_KEPT)
    try:
        for number in wanted:
            steps = read_steps(folder, [number]).to_pylist()
            yield _Run(suite, rows[number], steps, cameras, tolerance, manifest).again(environments)
    finally:
        environments.close()


@dataclass
class _Run:
    """One episode as it was recorded, to be run again."""

    suite: Suite
    row: Mapping[str, Any]
    steps: Sequence[Mapping[str, Any]]
    cameras: Sequence[str]
    tolerance: float
    manifest: Mapping[str, Any]

    def again(self, environments: Environments) -> Episode:
        """Raises ReplayError."""
        env = environments.take(self.row["task"])
        try:
            obs, _ = env.reset(seed=self.row["seed"])
            frames, states = [obs["pixels"]], [obs["state"]]
            self._check("instruction", 0, self.row["instruction"], obs["instruction"])
            for i, step in enumerate(self.steps):
                self._compare("state", i, step["state"], states[-1])
                obs, reward, _, _, info = env.step(np.array(step["action"], np.float32))
                self._compare("reward", i, [step["reward"]], [reward])
                self._check("success", i, step["success"], bool(info["is_success"]))
                frames.append(obs["pixels"])
                states.append(obs["state"])
            self._compare("state", len(self.steps), self.row["final_state"], states[-1])
        finally:
            environments.give_back(self.row["task"], env)
        carried = {name: [step[name] for step in self.steps] for name in _CARRIED}
        about = {key: self.row[key] for key in ("model", "suite", "arm", "task", "seed", "success", "ending")}
        return Episode(
            number=self.row["episode"],
            instruction=self.row["instruction"],
            fps=self.suite.fps,
            images={camera: np.stack([frame[camera] for frame in frames[:-1]]) for camera in self.cameras},
            states=np.stack([np.asarray(state, np.float32) for state in states[:-1]]),
            actions=np.array([step["action"] for step in self.steps], np.float32),
            rewards=np.array([step["reward"] for step in self.steps], np.float64),
            successes=np.array([step["success"] for step in self.steps], bool),
            last_images={camera: frames[-1][camera] for camera in self.cameras},
            last_state=np.asarray(states[-1], np.float32),
            columns={name: values for name, values in carried.items() if None not in values},
            about=about,
        )

    def _compare(self, what: str, step: int, recorded: Any, now: Any) -> None:
        recorded, now = np.asarray(recorded), np.asarray(now)
        same = recorded.shape == now.shape
        if not same or not np.allclose(recorded, now, rtol=0, atol=self.tolerance, equal_nan=True):
            off = f", {np.abs(recorded - now).max():.3g} apart" if same else ""
            self._fail(what, step, f"{recorded.tolist()} was recorded, now {now.tolist()}{off}")

    def _check(self, what: str, step: int, recorded: Any, now: Any) -> None:
        if recorded != now:
            self._fail(what, step, f"{recorded!r} was recorded, now {now!r}")

    def _fail(self, what: str, step: int, text: str) -> None:
        versions = {name: self.manifest["versions"].get(name) for name in ("mujoco", "gymnasium", "commit")}
        raise ReplayError(
            f"episode {self.row['episode']} (task {self.row['task']!r}, seed {self.row['seed']}), step {step}: the "
            f"{what} differs: {text}. It was recorded with {versions}"
        )
