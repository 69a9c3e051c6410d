"""A LeRobotDataset as a suite whose environments play recorded episodes back, whatever the policy does.

So a data set is shown to a policy by the same runner as a simulator, with the same preprocessing: at frame 0, and then
whenever the policy would plan again. Layout and field names as in export_lerobot.py; frames are decoded one at a time.
"""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from hooked_vla.extras import needs_packages
from hooked_vla.lerobot import ACTION, IMAGES, OBS_STATE, camera_name, image_key
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.suites import Suite, SuiteTask

with needs_sim_extra():
    import gymnasium
    import pyarrow as pa
    import pyarrow.parquet as pq
with needs_packages(("av",), "films need: pip install hooked-vla[sim]"):
    import av
    from av.error import FFmpegError

_VERSIONS = ("v3.",)
_SUCCESS = "next.success"


@dataclass(frozen=True)
class Recorded:
    """One episode's table. steps: its frames; where: camera key -> film, and seconds at which the episode begins."""

    number: int
    length: int
    instructions: Sequence[str]
    states: np.ndarray
    timestamps: np.ndarray
    success: bool
    images: Mapping[str, Sequence[Any]]
    films: Mapping[str, tuple[Path, float]]


class LeRobotFolder:
    """A LeRobotDataset v3 on disk, episode by episode.

    cameras: their names, of films and of images in the tables.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError for a folder that is not a data set; ValueError for another version, a damaged
        description, or one without cameras or actions."""
        self.folder = Path(folder)
        self.info = self._read_info()
        features: dict[str, Any] = self.info["features"]
        self.films = [key for key, each in features.items() if each["dtype"] == "video"]
        self.pictures = [key for key, each in features.items() if each["dtype"] == "image"]
        self.cameras = tuple(camera_name(key) for key in features if key in (*self.films, *self.pictures))
        if not self.cameras or ACTION not in features:
            raise ValueError(f"{self.folder} needs images ({IMAGES}...) and {ACTION!r}; it has {sorted(features)}")
        self.d_state = int(features[OBS_STATE]["shape"][0]) if OBS_STATE in features else 0
        self.d_action, self.fps = int(features[ACTION]["shape"][0]), int(self.info["fps"])

    @cached_property
    def tasks(self) -> dict[int, str]:
        """Instructions by number."""
        table = self._table(self.folder / "meta/tasks.parquet")
        # the instruction is the index of the data frame that LeRobot wrote, whatever that is called
        text = next(name for name in table.column_names if name != "task_index")
        return dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))

    @cached_property
    def episodes(self) -> dict[int, dict[str, Any]]:
        """Rows of the table of episodes by number, without their statistics."""
        files = sorted(self.folder.glob("meta/episodes/*/*.parquet"))
        if not files:
            raise ValueError(f"{self.folder}/meta/episodes has no tables: the data set is incomplete")
        rows: dict[int, dict[str, Any]] = {}
        for file in files:
            names = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
            rows |= {row["episode_index"]: row for row in self._table(file, names).to_pylist()}
        return dict(sorted(rows.items()))

    def read(self, number: int, cameras: Sequence[str]) -> Recorded:
        """One episode, ready to be played with some of its cameras.

        Raises KeyError for one that is not there, ValueError for files that are missing, damaged or do not fit.
        """
        if number not in self.episodes:
            raise KeyError(f"no episode {number} in {self.folder}; it has {len(self.episodes)}")
        row, keys = self.episodes[number], [self.key(camera) for camera in cameras]
        path = self.folder / self.info["data_path"].format(
            chunk_index=row["data/chunk_index"], file_index=row["data/file_index"]
        )
        features, pictures = self.info["features"], [key for key in keys if key in self.pictures]
        columns = ["timestamp", "task_index", *(name for name in (OBS_STATE, _SUCCESS) if name in features), *pictures]
        table = self._table(path, columns, [("episode_index", "=", number)])
        if len(table) != row["length"]:
            raise ValueError(f"{path} has {len(table)} frames of episode {number}, {row['length']} are expected")
        n = len(table)
        states = np.zeros((n, 0), np.float32)
        if OBS_STATE in features:
            states = np.array(table[OBS_STATE].to_pylist(), np.float32).reshape(n, self.d_state)
        return Recorded(
            number, n, [self.tasks[task] for task in table["task_index"].to_pylist()], states,
            table["timestamp"].to_numpy().astype(np.float64),
            bool(table[_SUCCESS].to_pylist()[-1]) if _SUCCESS in features else False,
            {key: table[key].to_pylist() for key in pictures},
            {key: self._film(row, key) for key in keys if key in self.films},
        )  # fmt: skip

    def key(self, camera: str) -> str:
        """Raises ValueError for a camera that is not there."""
        if camera not in self.cameras:
            raise ValueError(f"{self.folder} has no camera {camera!r}; it has {list(self.cameras)}")
        return image_key(camera)

    def _film(self, row: Mapping[str, Any], key: str) -> tuple[Path, float]:
        place = {name: row[f"videos/{key}/{name}"] for name in ("chunk_index", "file_index")}
        return self.folder / self.info["video_path"].format(video_key=key, **place), row[f"videos/{key}/from_timestamp"]

    def _read_info(self) -> dict[str, Any]:
        path = self.folder / "meta/info.json"
        if not path.is_file():
            raise FileNotFoundError(f"no meta/info.json in {self.folder}: not a LeRobotDataset")
        try:
            info = json.loads(path.read_text())
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        if missing := [name for name in ("codebase_version", "features", "fps", "data_path") if name not in info]:
            raise ValueError(f"{path} is damaged: it does not say {missing}")
        version = info["codebase_version"]
        if not version.startswith(_VERSIONS):
            raise ValueError(
                f"{self.folder} is a LeRobotDataset {version}; this reads v3: LeRobot's convert_dataset_v21_to_v30 "
                "makes one of it"
            )
        return info

    def _table(self, path: Path, columns: Sequence[str] | None = None, filters: Any = None) -> pa.Table:
        try:
            return pq.read_table(path, columns=None if columns is None else list(columns), filters=filters)
        except (OSError, pa.ArrowException) as error:
            raise ValueError(f"{path} is missing, damaged or lacks {columns}: {error}") from error


class PlaybackEnv(gymnasium.Env[dict[str, Any], Any]):
    """Shows a recorded episode, frame after frame; actions change nothing. cameras: those whose images are made.

    The episode ends (truncated) after its last frame. Its success, where recorded, is said at the end.
    """

    def __init__(self, dataset: LeRobotFolder, number: int, cameras: Sequence[str]) -> None:
        self.dataset, self.number, self.cameras = dataset, number, tuple(cameras)
        self._all = self.cameras
        self._reels: dict[str, Iterator[Any]] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The first frame; seed and options change nothing."""
        self.close()
        self._episode = self.dataset.read(self.number, self._all)
        self._reels = {key: self._reel(key) for key in self._episode.films}
        self._go_to(0)
        return self._observe(), {"is_success": False}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """The next frame, or the last one again at the end."""
        over = self._frame + 1 == self._episode.length
        if not over:
            self._go_to(self._frame + 1)
        return self._observe(), 0.0, False, over, {"is_success": over and self._episode.success}

    def close(self) -> None:
        """Close the films."""
        for reel in self._reels.values():
            reel.close()  # pyright: ignore[reportAttributeAccessIssue]
        self._reels = {}

    def _go_to(self, frame: int) -> None:
        """Have the next frame of every film, whether or not somebody will look at it."""
        self._frame = frame
        self._shown = {key: next(reel) for key, reel in self._reels.items()}

    def _observe(self) -> dict[str, Any]:
        """The present frame; only what is looked at becomes an image."""
        pixels = {}
        for camera in self.cameras:
            key = self.dataset.key(camera)
            shown = self._shown.get(key)
            pixels[camera] = self._picture(key) if shown is None else shown.to_ndarray(format="rgb24")
        at = self._frame
        return {"pixels": pixels, "state": self._episode.states[at], "instruction": self._episode.instructions[at]}

    def _reel(self, key: str) -> Iterator[Any]:
        """The episode's frames of one film, still encoded colours."""
        path, start = self._episode.films[key]
        # lerobot: frames are within half a step of their time
        half, times = 0.5 / self.dataset.fps, (start + self._episode.timestamps).tolist()
        n = 0
        try:
            with av.open(str(path)) as film:
                stream = film.streams.video[0]
                stream.codec_context.thread_count = 1
                film.seek(int(max(0.0, times[0] - half) / stream.time_base), stream=stream)  # pyright: ignore
                for frame in film.decode(stream):
                    while n < len(times) and frame.time >= times[n] - half:
                        if frame.time > times[n] + half:
                            raise ValueError(f"{path} has no frame at {times[n]:.3f} s, of episode {self.number}")
                        yield frame
                        n += 1
                    if n == len(times):
                        return
        except FFmpegError as error:
            raise ValueError(f"{path} is missing, truncated, or not a film: {error}") from error
        raise ValueError(f"{path} ends before {times[n]:.3f} s, where a frame of episode {self.number} is due")

    def _picture(self, key: str) -> UInt8[np.ndarray, "height width 3"]:
        """An image that is in the table itself, as a file's bytes or a path."""
        cell = self._episode.images[key][self._frame]
        content = cell["bytes"] if cell["bytes"] is not None else (self.dataset.folder / cell["path"]).read_bytes()
        try:
            with av.open(io.BytesIO(content), "r") as file:
                return next(file.decode(video=0)).to_ndarray(format="rgb24")
        except (FFmpegError, StopIteration) as error:
            raise ValueError(f"{key}, episode {self.number}, frame {self._frame}: not an image: {error}") from error


def lerobot_suite(folder: str | Path) -> Suite:
    """The data set as a suite: a task for every episode, "episode-000012".

    Raises as `LeRobotFolder`.
    """
    dataset = LeRobotFolder(folder)
    if not dataset.episodes:
        raise ValueError(f"{folder} has no episodes")
    tasks = tuple(SuiteTask(_task(n), (row["tasks"] or [""])[0]) for n, row in dataset.episodes.items())
    numbers = {_task(number): number for number in dataset.episodes}
    longest = max(row["length"] for row in dataset.episodes.values())
    return Suite(
        f"lerobot:{dataset.folder.resolve().name}", tasks, dataset.cameras, dataset.d_state, dataset.d_action,
        max_steps=longest, fps=dataset.fps,
        make=lambda task, cameras, image_size: PlaybackEnv(dataset, numbers[task], cameras), n_starts=None,
    )  # fmt: skip


def episode_scenes(suite: Suite, episodes: int | None = None) -> list[Scene]:
    """A scene for each of the first `episodes` episodes, all where None; its seed is the episode's number.

    Raises ValueError for fewer than one episode, or more than there are.
    """
    numbers = [int(task.id.rpartition("-")[2]) for task in suite.tasks]
    n = len(numbers) if episodes is None else episodes
    if not 1 <= n <= len(numbers):
        raise ValueError(f"{suite.name} has {len(numbers)} episodes, asked for {n}")
    return [Scene(task.id, number) for task, number in zip(suite.tasks, numbers, strict=True)][:n]


def _task(number: int) -> str:
    return f"episode-{number:06d}"
