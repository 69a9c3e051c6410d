"""Results on disk: a folder of Parquet files that only ever grows.

FOLDER/manifest.json            what was run; see manifest.py
FOLDER/steps/000/000000012.parquet     one row a step of episode 12 (000: 12 // 1000)
FOLDER/episodes/000/000000012.parquet  its one row in the table of episodes

An episode is recorded when its file under episodes/ exists. Files appear under their name when complete and are never
written again. Nothing that differs from run to run (times, hosts) is in them.
"""

import errno
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from hooked_vla.folders import lock, write_file
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.cells import Cell

with needs_sim_extra():
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_PER_FOLDER = 1000
_POSES = pa.map_(pa.string(), pa.list_(pa.float64()))

# state, phase and poses are those in which the action was chosen; reward and success are what it led to
STEPS = pa.schema(
    [
        ("episode", pa.int64()),
        ("env_step", pa.int32()),
        ("chunk", pa.int32()),
        ("chunk_step", pa.int32()),
        ("state", pa.list_(pa.float32())),
        ("action", pa.list_(pa.float32())),
        ("reward", pa.float64()),
        ("success", pa.bool_()),
        ("phase", pa.string()),
        ("poses", _POSES),
    ]
)
# ending: "success"; "terminated" or "truncated" by the environment; "time limit"
EPISODES = pa.schema(
    [
        ("episode", pa.int64()),
        ("model", pa.string()),
        ("suite", pa.string()),
        ("arm", pa.string()),
        ("task", pa.string()),
        ("instruction", pa.string()),
        ("seed", pa.int64()),
        ("success", pa.bool_()),
        ("ending", pa.string()),
        ("n_steps", pa.int32()),
        ("n_chunks", pa.int32()),
        ("total_reward", pa.float64()),
        ("final_state", pa.list_(pa.float32())),
        ("final_phase", pa.string()),
        ("final_poses", _POSES),
    ]
)


@dataclass(frozen=True)
class Part:
    """A finished episode as the bytes of its two files."""

    cell: Cell
    success: bool
    n_steps: int
    steps: bytes
    episode: bytes


@dataclass
class EpisodeLog:
    """Takes down one episode while it runs."""

    cell: Cell
    instruction: str
    rows: list[dict[str, Any]] = field(default_factory=list)

    def step(
        self, before: Mapping[str, Any], info_before: Mapping[str, Any], action: ArrayLike, chunk: tuple[int, int],
        reward: float, success: bool,
    ) -> None:  # fmt: skip
        """before, info_before: what was observed when the action was taken. chunk: number of the chunk that the action
        comes from, and its place in it."""
        self.rows.append(
            {
                "episode": self.cell.id,
                "env_step": len(self.rows),
                "chunk": chunk[0],
                "chunk_step": chunk[1],
                "state": np.array(before["state"], np.float32),
                "action": np.array(action, np.float32),
                "reward": reward,
                "success": success,
                "phase": info_before.get("phase"),
                "poses": _flat(info_before.get("poses")),
            }
        )

    def finish(
        self, model: str, suite: str, ending: str, last: Mapping[str, Any], last_info: Mapping[str, Any]
    ) -> Part:
        """The finished episode; last, last_info: what was observed after the last action."""
        success = ending == "success"
        row = {
            "episode": self.cell.id,
            "model": model,
            "suite": suite,
            "arm": self.cell.arm,
            "task": self.cell.task,
            "instruction": self.instruction,
            "seed": self.cell.seed,
            "success": success,
            "ending": ending,
            "n_steps": len(self.rows),
            "n_chunks": self.rows[-1]["chunk"] + 1,
            "total_reward": float(sum(row["reward"] for row in self.rows)),
            "final_state": np.array(last["state"], np.float32),
            "final_phase": last_info.get("phase"),
            "final_poses": _flat(last_info.get("poses")),
        }
        return Part(self.cell, success, len(self.rows), _encode(self.rows, STEPS), _encode([row], EPISODES))


def _flat(poses: dict[str, Any] | None, prefix: str = "") -> list[tuple[str, np.ndarray]] | None:
    """Nested dicts of vectors as pairs of "outer/inner" and vector."""
    if poses is None:
        return None
    flat: list[tuple[str, np.ndarray]] = []
    for name, value in poses.items():
        # dict alone: asking for any Mapping takes longer than the rest
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}/") or []
        else:
            flat.append((f"{prefix}{name}", np.array(value, np.float64).ravel()))
    return flat


def _encode(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows), schema)
    # for so few rows, dictionaries and statistics take longer and more room than they save
    pq.write_table(table, sink, compression="zstd", use_dictionary=False, write_statistics=False)
    return sink.getvalue().to_pybytes()


class Store:
    """The folder of one sweep, open for recording by one process at a time; see `Store.open`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = folder.glob("episodes/*/*.parquet")
        self.recorded = {number for number in (int(file.stem) for file in files) if _is_recorded(folder, number)}

    @classmethod
    @contextmanager
    def open(cls, folder: Path) -> "Iterator[Store]":
        """The store of a folder that has a manifest, locked until the block ends.

        What a killed process left unfinished is removed.
        Raises BlockingIOError when another process is recording there.
        """
        with (folder / MANIFEST).open() as opened:
            lock(opened, f"recording in {folder}")
            for left in [*folder.glob(".*.tmp"), *folder.glob("*/*/.*.tmp")]:
                left.unlink(missing_ok=True)
            yield cls(folder)

    def add(self, part: Part) -> bool:
        """Record an episode; False where it was recorded before, and stays as it is.

        Raises OSError when it cannot be written; nothing of it is then left in the folder.
        """
        steps, episode = (_file(self.folder, kind, part.cell.id) for kind in ("steps", "episodes"))
        if part.cell.id in self.recorded:
            if (steps.read_bytes(), episode.read_bytes()) != (part.steps, part.episode):
                logger.warning("%s came out otherwise than it was recorded in %s", part.cell, self.folder)
            return False
        try:
            write_file(steps, part.steps)
            # last: it says that the episode is there
            write_file(episode, part.episode)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                error.errno,
                f"no space left for {part.cell}: {len(self.recorded)} episodes are recorded in {self.folder}; make "
                "room and run the same command again to go on",
            ) from error
        self.recorded.add(part.cell.id)
        return True


def _file(folder: Path, kind: str, number: int) -> Path:
    return folder / kind / f"{number // _PER_FOLDER:03d}" / f"{number:09d}.parquet"


def _is_recorded(folder: Path, number: int) -> bool:
    episode = _file(folder, "episodes", number)
    # a machine that lost power may leave names without content
    return episode.is_file() and episode.stat().st_size > 0 and _file(folder, "steps", number).is_file()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of a folder of results.

    Raises FileNotFoundError where there is none, ValueError for one that is damaged.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no {MANIFEST} in {folder}: not a folder of rollouts")
    try:
        found = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; restore it, or record into another folder") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} is damaged: it holds a {type(found).__name__}, not an object")
    return found


def read_episodes(folder: str | Path, episodes: Sequence[int] | None = None) -> pa.Table:
    """One row an episode, in the order of their numbers; columns as in EPISODES. `.to_pandas()` where pandas is.

    episodes: only these numbers, in this order. Raises FileNotFoundError for a folder without manifest, KeyError for an
    episode that is not recorded.
    """
    read_manifest(folder)
    return _read(Path(folder), "episodes", EPISODES, episodes)


def read_steps(folder: str | Path, episodes: Sequence[int] | None = None) -> pa.Table:
    """One row a step, episode by episode; columns as in STEPS. episodes: only these numbers.

    Raises FileNotFoundError for a folder without manifest, KeyError for an episode that is not recorded.
    """
    read_manifest(folder)
    return _read(Path(folder), "steps", STEPS, episodes)


def _read(folder: Path, kind: str, schema: pa.Schema, wanted: Sequence[int] | None) -> pa.Table:
    """Files of recorded episodes only: the steps of one that was interrupted do not count."""
    numbers = sorted(Store(folder).recorded) if wanted is None else list(wanted)
    if missing := [number for number in numbers if not _is_recorded(folder, number)]:
        raise KeyError(f"episodes {missing[:10]} are not recorded in {folder}")
    tables = [pq.ParquetFile(_file(folder, kind, number)).read() for number in numbers]
    return pa.concat_tables([schema.empty_table(), *tables]).combine_chunks()
