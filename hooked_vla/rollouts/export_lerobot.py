"""LeRobotDataset v3 on disk: one table of steps, one of episodes, mp4 films by camera, and what describes them.

Layout and field names read from lerobot 0.6.1 (`datasets/utils.py`, `feature_utils.py`, `dataset_writer.py`):

meta/info.json  meta/stats.json  meta/tasks.parquet  meta/episodes/chunk-000/file-000.parquet
data/chunk-000/file-000.parquet  videos/<camera key>/chunk-000/file-000.mp4

Tables and films hold many episodes and go on in a next file when they have grown large enough.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vla.folders import new_folder
from hooked_vla.lerobot import ACTION, OBS_STATE, image_key
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.column_statistics import ColumnStatistics
from hooked_vla.rollouts.replay import Episode
from hooked_vla.rollouts.video import QUALITY, Film, pixel_format

with needs_sim_extra():
    import pyarrow as pa
    import pyarrow.parquet as pq

VERSION = "v3.0"
# lerobot: datasets/utils.py
FILES_PER_CHUNK = 1000
DATA_BYTES, VIDEO_BYTES = 100 * 2**20, 200 * 2**20
_FILE = "chunk-{chunk_index:03d}/file-{file_index:03d}"
_DATA, _VIDEOS = f"data/{_FILE}.parquet", f"videos/{{video_key}}/{_FILE}.mp4"
_EPISODES = f"meta/episodes/{_FILE}.parquet"
# lerobot's encoder: a frame that can be decoded by itself comes every other one, for random access
_EVERY = 2
_COUNTERS = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64",
             "task_index": "int64"}  # fmt: skip
_OUTCOMES = {"next.reward": "float32", "next.success": "bool", "next.done": "bool"}
_ARROW = {"float32": pa.float32(), "float64": pa.float64(), "int64": pa.int64(), "bool": pa.bool_(),
          "string": pa.string()}  # fmt: skip


def write_lerobot(
    out: str | Path,
    episodes: Iterable[Episode],
    robot_type: str | None = None,
    quality: int = QUALITY,
    data_bytes: int = DATA_BYTES,
    video_bytes: int = VIDEO_BYTES,
) -> Path:
    """Write episodes as a LeRobotDataset; the folder appears when it is complete.

    robot_type: what LeRobot calls the robot. quality: of the films, see Film. data_bytes, video_bytes: how large a file
    may grow before the next is begun. What an Episode's `columns` hold becomes columns of the same names, what its
    `about` holds columns of the table of episodes.
    Raises FileExistsError where `out` is there already, BlockingIOError where it is being written; ValueError for no
    episodes, for episodes that do not fit together (cameras, sizes, widths, fps, columns), and for columns that are
    neither numbers nor strings.
    """
    out = Path(out)
    with new_folder(out, replace=False) as temporary:
        writer: _Writer | None = None
        with ExitStack() as stack:
            for episode in episodes:
                if writer is None:
                    writer = stack.enter_context(
                        _Writer(temporary, episode, robot_type, quality, data_bytes, video_bytes)
                    )
                writer.add(episode)
        if writer is None:
            raise ValueError(f"no episodes to write into {out}")
        writer.describe()
    return out


class _Writer(ExitStack):
    """The data set while it grows; the first episode says what all must be like."""

    def __init__(
        self, root: Path, first: Episode, robot_type: str | None, quality: int, data_bytes: int, video_bytes: int
    ) -> None:
        super().__init__()
        self.root, self.robot_type, self.limits = root, robot_type, (data_bytes, video_bytes)
        self.fps, self.features = first.fps, _features(first)
        self.cameras = {image_key(camera): camera for camera in first.images}
        self.data = self.enter_context(_Tables(root, _DATA, data_bytes))
        self.rows = self.enter_context(_Tables(root, _EPISODES, data_bytes))
        self.films = {
            key: self.enter_context(_Films(root, key, first.fps, quality, video_bytes)) for key in self.cameras
        }
        self.tasks: dict[str, int] = {}
        self.statistics: dict[str, ColumnStatistics] = {}
        self.n_episodes = self.n_frames = 0

    def add(self, episode: Episode) -> None:
        """Raises ValueError for an episode that is not like the first."""
        if (episode.fps, found := _features(episode)) != (self.fps, self.features):
            wrong = sorted(key for key in self.features | found if self.features.get(key) != found.get(key))
            raise ValueError(
                f"episode {episode.number} does not fit the data set in {wrong or ['fps']}: "
                f"{[found.get(key) for key in wrong] or episode.fps}, not "
                f"{[self.features.get(key) for key in wrong] or self.fps}"
            )
        columns = self._columns(episode)
        chunk, file = self.data.add(_step_table(columns, self.features))
        row: dict[str, Any] = {
            "episode_index": self.n_episodes, "tasks": [episode.instruction], "length": len(episode),
            "data/chunk_index": chunk, "data/file_index": file, "dataset_from_index": self.n_frames,
            "dataset_to_index": self.n_frames + len(episode),
        }  # fmt: skip
        for key, camera in self.cameras.items():
            row |= {f"videos/{key}/{name}": at for name, at in self.films[key].add(episode.images[camera]).items()}
        numbers = {key: value for key, value in columns.items() if self.features[key]["dtype"] != "string"}
        found = {key: ColumnStatistics.of_rows(value) for key, value in numbers.items()}
        found |= {key: ColumnStatistics.of_images(episode.images[camera]) for key, camera in self.cameras.items()}
        for key, each in found.items():
            plain = each.to_plain(image=key in self.cameras)
            row |= {f"stats/{key}/{name}": value for name, value in plain.items()}
            self.statistics[key] = ColumnStatistics.merge([self.statistics[key], each] if self.n_episodes else [each])
        row |= dict(episode.about) | {"run_episode": episode.number}
        chunk, file = self.rows.place(0)
        place = {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file}
        self.rows.add(pa.Table.from_pylist([row | place]))
        self.n_episodes, self.n_frames = self.n_episodes + 1, self.n_frames + len(episode)

    def describe(self) -> None:
        """Write what holds of the whole; the tables and films are closed."""
        self._write_tasks()
        for key, films in self.films.items():
            height, width = self.features[key]["shape"][:2]
            self.features[key]["info"] = {
                "video.height": height, "video.width": width, "video.codec": "h264",
                "video.pix_fmt": pixel_format(height, width), "video.fps": self.fps, "video.channels": 3,
                "video.g": _EVERY, "video.crf": films.quality, "has_audio": False, "is_depth_map": False,
            }  # fmt: skip
        info = {
            "codebase_version": VERSION, "fps": self.fps, "features": self.features,
            "total_episodes": self.n_episodes, "total_frames": self.n_frames, "total_tasks": len(self.tasks),
            "chunks_size": FILES_PER_CHUNK, "data_files_size_in_mb": max(1, self.limits[0] // 2**20),
            "video_files_size_in_mb": max(1, self.limits[1] // 2**20), "data_path": _DATA,
            "video_path": _VIDEOS if self.films else None, "robot_type": self.robot_type,
            "splits": {"train": f"0:{self.n_episodes}"},
        }  # fmt: skip
        statistics = {key: each.to_plain(image=key in self.cameras) for key, each in self.statistics.items()}
        for name, content in (("info", info), ("stats", statistics)):
            (self.root / "meta" / f"{name}.json").write_text(json.dumps(content, indent=4))

    def _columns(self, episode: Episode) -> dict[str, np.ndarray]:
        """Every column but the images, a row for each step."""
        n = len(episode)
        task = self.tasks.setdefault(episode.instruction, len(self.tasks))
        steps = np.arange(n)
        columns = {OBS_STATE: episode.states, ACTION: episode.actions}
        columns |= {name: np.asarray(values) for name, values in episode.columns.items()}
        columns |= {"next.reward": episode.rewards, "next.success": episode.successes, "next.done": steps == n - 1}
        columns |= {
            "timestamp": steps / self.fps, "frame_index": steps, "episode_index": np.full(n, self.n_episodes),
            "index": self.n_frames + steps, "task_index": np.full(n, task),
        }  # fmt: skip
        return {key: value for key, value in columns.items() if key in self.features}

    def _write_tasks(self) -> None:
        # lerobot reads this table with pandas, and finds a task by the index that pandas' own note makes of a column
        table = pa.table({"task_index": list(self.tasks.values()), "task": list(self.tasks)})
        column = {"metadata": None, "field_name": "", "name": "", "numpy_type": "int64", "pandas_type": "int64"}
        text = {"numpy_type": "object", "pandas_type": "unicode"}
        note = {
            "index_columns": ["task"],
            "column_indexes": [],
            "columns": [column | {"name": "task_index", "field_name": "task_index"},
                        column | text | {"name": "task", "field_name": "task"}],
            "creator": {"library": "pyarrow", "version": pa.__version__},
            "pandas_version": "2.2.0",
        }  # fmt: skip
        pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(note)}), self.root / "meta/tasks.parquet")


def _features(episode: Episode) -> dict[str, dict[str, Any]]:
    """info.json's `features` for episodes like this one."""
    features: dict[str, dict[str, Any]] = {}
    for camera, images in episode.images.items():
        shape, names = list(images.shape[1:]), ["height", "width", "channels"]
        features[image_key(camera)] = {"dtype": "video", "shape": shape, "names": names}
    if episode.states.shape[1]:
        features[OBS_STATE] = {"dtype": "float32", "shape": [episode.states.shape[1]], "names": None}
    features[ACTION] = {"dtype": "float32", "shape": [episode.actions.shape[1]], "names": None}
    for name, values in episode.columns.items():
        if name in features or name in _COUNTERS or name in _OUTCOMES:
            raise ValueError(f"episode {episode.number}: the data set has a column {name!r} of its own")
        features[name] = {"dtype": _column_dtype(name, np.asarray(values)), "shape": [1], "names": None}
        if np.ndim(values) != 1:
            raise ValueError(f"episode {episode.number}: column {name!r} needs one value a step")
    for name, dtype in (_OUTCOMES | _COUNTERS).items():
        features[name] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def _column_dtype(name: str, values: np.ndarray) -> str:
    kinds = {"b": "bool", "i": "int64", "u": "int64", "f": "float32", "U": "string"}
    if values.dtype.kind not in kinds:
        raise ValueError(f"column {name!r} must hold numbers or strings, got {values.dtype}")
    return kinds[values.dtype.kind]


def _step_table(columns: Mapping[str, np.ndarray], features: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    arrays = {}
    for key, values in columns.items():
        kind, width = _ARROW[features[key]["dtype"]], features[key]["shape"][0]
        if values.ndim == 2 and width > 1:
            flat = pa.array(np.ascontiguousarray(values, np.float32).ravel(), kind)
            arrays[key] = pa.FixedSizeListArray.from_arrays(flat, width)
        else:
            arrays[key] = pa.array(values.ravel().tolist(), kind)
    return pa.table(arrays)


class _Tables:
    """Parquet files that go on in the next one when they have grown too large; one row group an addition."""

    def __init__(self, root: Path, template: str, limit: int) -> None:
        self.root, self.template, self.limit = root, template, limit
        self.number, self.n_bytes = -1, 0
        self._writer: pq.ParquetWriter | None = None

    def place(self, n_bytes: int) -> tuple[int, int]:
        """Chunk and file that so many bytes would go into."""
        if self.number < 0 or (self.n_bytes and self.n_bytes + n_bytes > self.limit):
            self.close()
            self.number, self.n_bytes = self.number + 1, 0
        return divmod(self.number, FILES_PER_CHUNK)

    def add(self, table: pa.Table) -> tuple[int, int]:
        """Append rows; chunk and file that they went into."""
        chunk, file = self.place(table.nbytes)
        if self._writer is None:
            path = self.root / self.template.format(chunk_index=chunk, file_index=file)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pq.ParquetWriter(path, table.schema, compression="snappy")
        self._writer.write_table(table.cast(self._writer.schema))
        self.n_bytes += table.nbytes
        return chunk, file

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._writer = None

    def __enter__(self) -> "_Tables":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Films:
    """One camera's films, each of many episodes one after the other."""

    def __init__(self, root: Path, key: str, fps: int, quality: int, limit: int) -> None:
        self.root, self.key, self.fps, self.quality, self.limit = root, key, fps, quality, limit
        self.number = -1
        self._film: Film | None = None

    def add(self, images: np.ndarray) -> dict[str, Any]:
        """Append an episode; where it is to be found."""
        if self._film is None or self._film.n_bytes > self.limit:
            self.close()
            self.number += 1
            chunk, file = divmod(self.number, FILES_PER_CHUNK)
            path = self.root / _VIDEOS.format(video_key=self.key, chunk_index=chunk, file_index=file)
            self._film = Film(path, self.fps, self.quality, _EVERY)
        start = self._film.n_frames
        for image in images:
            self._film.add(image)
        chunk, file = divmod(self.number, FILES_PER_CHUNK)
        return {"chunk_index": chunk, "file_index": file, "from_timestamp": start / self.fps,
                "to_timestamp": self._film.n_frames / self.fps}  # fmt: skip

    def close(self) -> None:
        if self._film is not None:
            self._film.close()
        self._film = None

    def __enter__(self) -> "_Films":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._film is not None:
            self._film.discard()
