"""Recorded moments on disk: safetensors shards, each written whole, and read back as one set of arrays."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from safetensors import safe_open
from safetensors.numpy import save
from tqdm import tqdm

from hooked_vla.folders import write_file
from hooked_vla.training.demonstrations import Moment

_FIELDS = ("images", "state", "chunk", "goal", "task", "episode")


@dataclass(frozen=True)
class Moments:
    """Many moments of demonstrations. tasks: (suite, task) by the number in `task`; see demonstrations.Moment."""

    images: UInt8[np.ndarray, "moment camera height width 3"]
    state: Float32[np.ndarray, "moment d_state"]
    chunk: Float32[np.ndarray, "moment step d_action"]
    goal: Float32[np.ndarray, "moment 2 2"]
    task: Int64[np.ndarray, " moment"]
    episode: Int64[np.ndarray, " moment"]
    tasks: tuple[tuple[str, str], ...]

    def __len__(self) -> int:
        return len(self.task)


def gather(
    episodes: Iterator[list[list[Moment]]],
    tasks: Sequence[tuple[str, str]],
    n_moments: int,
    progress: Callable[[int], Any],
) -> Moments:
    """Take episodes until there are `n_moments` of them; progress is told how many each group brought."""
    kept: list[tuple[Moment, int]] = []
    episode = 0
    while len(kept) < n_moments:
        before = len(kept)
        for row in next(episodes):
            kept += [(moment, episode) for moment in row]
            episode += 1
        progress(min(len(kept), n_moments) - before)
    kept = kept[:n_moments]
    moments = [moment for moment, _ in kept]
    return Moments(
        images=np.stack([moment.images for moment in moments]),
        state=np.stack([moment.state for moment in moments]),
        chunk=np.stack([moment.chunk for moment in moments]),
        goal=np.stack([moment.goal for moment in moments]),
        task=np.array([moment.task for moment in moments]),
        episode=np.array([number for _, number in kept]),
        tasks=tuple(tasks),
    )


def save_shard(path: Path, moments: Moments) -> None:
    """Write a shard; it appears under its name when complete."""
    arrays = {name: np.ascontiguousarray(getattr(moments, name)) for name in _FIELDS}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, save(arrays, {"tasks": json.dumps(moments.tasks)}))


def load_shards(paths: Sequence[Path]) -> Moments:
    """Shards as one set, episodes renumbered.

    Raises FileNotFoundError where there is none, ValueError for shards of other tasks or shapes.
    """
    if not paths:
        raise FileNotFoundError("no shards of demonstrations were given")
    parts: list[Moments] = []
    n_episodes = 0
    for path in tqdm(paths, desc="reading demonstrations", unit="file"):
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in _FIELDS}
            tasks = tuple((suite, task) for suite, task in json.loads(file.metadata()["tasks"]))
        if parts and (tasks, arrays["chunk"].shape[1:]) != (parts[0].tasks, parts[0].chunk.shape[1:]):
            raise ValueError(f"{path} holds other tasks or chunks than {paths[0]}")
        arrays["episode"] += n_episodes
        n_episodes = int(arrays["episode"].max()) + 1
        parts.append(Moments(**arrays, tasks=tasks))
    return Moments(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in _FIELDS}, tasks=parts[0].tasks
    )
