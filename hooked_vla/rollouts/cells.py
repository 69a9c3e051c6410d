"""What a sweep consists of: cells (one episode under one arm), cut into groups that run side by side as one batch.

Which cells form a group, and at which row, follows from the sweep alone, so that an interrupted sweep cuts the same
groups again.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Scene:
    """A task and the seed that decides how its episode starts and which noise the policy draws."""

    task: str
    seed: int


@dataclass(frozen=True)
class Cell:
    """One episode to run. id: its number in the sweep; arm: name of the arm under which the policy acts."""

    id: int
    arm: str
    task: str
    seed: int

    def __str__(self) -> str:
        return f"episode {self.id} (arm {self.arm!r}, task {self.task!r}, seed {self.seed})"


@dataclass(frozen=True)
class Group:
    """Cells that run side by side, one a row."""

    index: int
    cells: tuple[Cell, ...]


def spread_scenes(tasks: Sequence[str], episodes: int, seed: int) -> tuple[Scene, ...]:
    """`episodes` scenes spread evenly over the tasks, in the tasks' order; scene i has seed `seed + i`.

    The scenes of one task have consecutive seeds, so that a suite with a fixed list of starts shows as many of them
    as it can.
    Raises ValueError for fewer than one episode, a negative seed, or no tasks.
    """
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if not tasks:
        raise ValueError("no tasks to run")
    return tuple(Scene(tasks[i * len(tasks) // episodes], seed + i) for i in range(episodes))


def cells_of(scenes: Sequence[Scene], arms: Sequence[str]) -> tuple[Cell, ...]:
    """Every scene under every arm: the first arm's cells, then the second's."""
    return tuple(
        Cell(number * len(scenes) + i, arm, scene.task, scene.seed)
        for number, arm in enumerate(arms)
        for i, scene in enumerate(scenes)
    )


def cut_groups(scenes: Sequence[Scene], arms: Sequence[str], n_envs: int) -> tuple[Group, ...]:
    """All cells in groups of at most `n_envs`.

    A group takes scenes from all over the list, so that a row goes through few tasks and every group shows many. A
    scene is in the same row of the same set of scenes under every arm; where all scenes fit into a group more than
    once, the group holds several whole arms.
    Raises ValueError for n_envs below 1.
    """
    if n_envs < 1:
        raise ValueError(f"n_envs must be at least 1, got {n_envs}")
    cells, n = cells_of(scenes, arms), len(scenes)
    batches: list[tuple[Cell, ...]] = []
    if n < n_envs:
        size = n * (n_envs // n)
        batches = [cells[start : start + size] for start in range(0, len(cells), size)]
    else:
        n_groups = -(-n // n_envs)
        for start in range(0, len(cells), n):
            batches += [cells[start + first : start + n : n_groups] for first in range(n_groups)]
    return tuple(Group(index, batch) for index, batch in enumerate(batches))
