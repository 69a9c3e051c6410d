"""Activations of rollouts on disk: what a site held in an episode, at an environment step, at a denoise step.

FOLDER/recording.json                  the format, and what the caller says of the recording
FOLDER/shards/000/000000004.safetensors  tensors; rows of one site and shape lie together
FOLDER/index/000/000000004.parquet       one row a value of that shard: its key, and where it lies

A shard counts when its index is there. Values are what a hook at the site would see for a batch of one row: a leading
batch axis of 1 (or of as many images or windows as one row has). A value that comes again at the next denoise step is
kept once. An episode is there when it was finished: what a killed process recorded of others is never shown, and goes
when the folder is opened for recording again.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from hooked_vla.folders import lock, read_manifest, write_file, write_json
from hooked_vla.hooks.cache import ROW_AXES, ActivationCache
from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.inputs import Segments
from hooked_vla.rollouts import needs_sim_extra

with needs_sim_extra():
    import pyarrow as pa
    import pyarrow.parquet as pq

FORMAT = "hooked_vla activations 1"
RECORDING = "recording.json"
NOTE = b"hooked_vla"
_PER_FOLDER = 1000
SHARD_BYTES = 256 * 2**20
# denoise_step: null at sites that run once a chunk. tensor, row, n_rows: rows `row` to `row + n_rows` of that tensor of
# the shard; n_rows 0: all of it, at a site that all rows of a batch share. segments: for each token axis of the site,
# the number in the shard's table of segments
INDEX = pa.schema(
    [
        ("episode", pa.int64()),
        ("env_step", pa.int32()),
        ("denoise_step", pa.int32()),
        ("site", pa.string()),
        ("tensor", pa.string()),
        ("row", pa.int32()),
        ("n_rows", pa.int32()),
        ("segments", pa.list_(pa.int32())),
    ]
)


@dataclass
class _Shard:
    """What is not written yet. tables: token segments by content; tensors: parts by site and shape."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    names: dict[tuple[Any, ...], str] = field(default_factory=dict)
    lengths: dict[tuple[Any, ...], int] = field(default_factory=dict)
    tables: dict[tuple[Any, ...], int] = field(default_factory=dict)
    axes: dict[str, Sequence[str]] = field(default_factory=dict)
    token_axes: dict[str, Sequence[str]] = field(default_factory=dict)
    last: dict[tuple[Any, ...], tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    n_bytes: int = 0


class ActivationRecorder:
    """Records activations into a folder, one process at a time; a folder that was begun is gone on with.

    Values wait in memory until they come to shard_bytes, or an episode is finished; a shard is a little larger than
    that at most. dtype: what floating values are kept as, their own where None. about: plain values that say what is
    recorded; a folder that was begun must say the same.
    """

    def __init__(
        self,
        folder: str | Path,
        about: Mapping[str, Any] | None = None,
        dtype: torch.dtype | None = None,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Raises ValueError for a folder with other files or another recording, and for shard_bytes below 1;
        BlockingIOError where another process records there."""
        if shard_bytes < 1:
            raise ValueError(f"shard_bytes must be at least 1, got {shard_bytes}")
        self.folder, self.dtype, self.shard_bytes = Path(folder), dtype, shard_bytes
        self._lock = _claim(self.folder, json.loads(json.dumps(dict(about or {}))))
        self._next, self.finished = _clean(self.folder)
        self.session = self._next
        self._open: set[int] = set()
        self._ended: list[int] = []
        self._shard = _Shard()

    def put(
        self,
        episode: int,
        env_step: int,
        denoise_step: int | None,
        site: str,
        axes: Sequence[str],
        value: Tensor,
        segments: Mapping[str, Segments] | None = None,
    ) -> None:
        """Keep one value: what a hook at the site sees for one row of a batch, its axes named as the hook point's.

        segments: of the same row, for each of the value's token axes. The value is copied.
        Raises ValueError for an episode that is finished, or a number below 0.
        """
        if episode in self.finished:
            raise ValueError(f"episode {episode} is recorded and finished in {self.folder}")
        if min(episode, env_step, denoise_step or 0) < 0:
            raise ValueError(f"episode, env_step and denoise_step are 0 or more: {episode}, {env_step}, {denoise_step}")
        self._open.add(episode)
        shard, shared = self._shard, axes[0] not in ROW_AXES
        row: dict[str, Any] = {"episode": episode, "env_step": env_step, "denoise_step": denoise_step, "site": site}
        kept = value.detach().to("cpu", self.dtype if value.is_floating_point() else None)
        before = shard.last.get((episode, env_step, site))
        if before is None or not (kept.dtype == before[0].dtype and torch.equal(kept, before[0])):
            # a copy that holds nothing else alive
            kept = kept.clone(memory_format=torch.contiguous_format)
            row |= self._place(site, kept, shared)
            shard.last[episode, env_step, site] = (kept, row)
            shard.n_bytes += kept.numel() * kept.element_size()
        else:
            row |= {key: before[1][key] for key in ("tensor", "row", "n_rows")}
        given = segments or {}
        shard.axes[site], shard.token_axes[site] = tuple(axes), [axis for axis in axes if axis in given]
        row["segments"] = [self._table(given[axis]) for axis in shard.token_axes[site]]
        shard.rows.append(row)
        if shard.n_bytes >= self.shard_bytes:
            self.flush()

    def add_cache(self, cache: ActivationCache, episodes: Sequence[int], env_steps: Sequence[int]) -> None:
        """Keep all of a run's cache; batch row i is episode `episodes[i]` at environment step `env_steps[i]`.

        Raises ValueError for another number of rows than the cache has.
        """
        if not len(episodes) == len(env_steps) == cache.batch_size:
            raise ValueError(
                f"{len(episodes)} episodes and {len(env_steps)} env_steps for a cache of {cache.batch_size} rows"
            )
        for i, (episode, env_step) in enumerate(zip(episodes, env_steps, strict=True)):
            part = cache.rows(i)
            for site in [*part, *part.aliases]:
                entry, value = part.entries[part.aliases.get(site, site)], part[site]
                steps = [None] if entry.steps is None else list(entry.steps)
                axes = entry.axes if entry.steps is None else entry.axes[1:]
                segments = {axis: part.segments[stream] for axis, stream in entry.streams.items()}
                for number, step in enumerate(steps):
                    self.put(episode, env_step, step, site, axes, value if step is None else value[number], segments)

    def finish(self, episode: int) -> None:
        """The episode is over: what was recorded of it is written, and shown from now on.

        Raises ValueError where it was finished before, OSError when it cannot be written.
        """
        if episode in self.finished:
            raise ValueError(f"episode {episode} is recorded and finished in {self.folder}")
        self._ended.append(episode)
        self.flush()

    def flush(self) -> None:
        """Write what waits in memory.

        Raises OSError when it cannot be written: nothing of the shard is then in the folder, and it waits on.
        """
        shard = self._shard
        if not shard.rows and not self._ended:
            return
        path = _path(self.folder, "shards", self._next)
        tensors = [(shard.names[key], key[-1], _whole(parts), parts) for key, parts in shard.tensors.items()]
        labels = {number: torch.tensor(key[1]) for key, number in shard.tables.items()}
        content = [(name, dtype, shape, lambda parts=parts: torch.cat(parts)) for name, dtype, shape, parts in tensors]
        content += [(f"segments/{i}", t.dtype, tuple(t.shape), lambda t=t: t) for i, t in labels.items()]
        note = {
            "session": self.session,
            "finished": self._ended,
            "axes": {site: list(axes) for site, axes in shard.axes.items()},
            "token_axes": {site: list(axes) for site, axes in shard.token_axes.items()},
            "shapes": {name: list(shape) for name, _, shape, _ in tensors},
            "segments": [{"names": key[0], "row_axis": key[2]} for key in shard.tables],
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_safetensors(path, content, {"format": FORMAT})
        note["shard_bytes"] = path.stat().st_size
        table = pa.Table.from_pylist(shard.rows, INDEX).replace_schema_metadata({NOTE: json.dumps(note)})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        try:
            write_file(_path(self.folder, "index", self._next), sink.getvalue().to_pybytes())
        except OSError:
            path.unlink(missing_ok=True)
            raise
        self.finished.update(self._ended)
        self._open.difference_update(self._ended)
        self._next, self._ended, self._shard = self._next + 1, [], _Shard()

    def close(self) -> None:
        """Finish the episodes that are under way, and let go of the folder."""
        try:
            self._ended += sorted(self._open.difference(self._ended))
            self.flush()
        finally:
            self._lock.close()

    def discard(self) -> None:
        """Let go of the folder; the episodes that are under way are dropped."""
        self._shard, self._ended = _Shard(), []
        self._lock.close()

    def __enter__(self) -> "ActivationRecorder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close() if kind is None else self.discard()

    def _place(self, site: str, value: Tensor, shared: bool) -> dict[str, Any]:
        shard, rows = self._shard, value[None] if shared else value
        key = (site, tuple(rows.shape[1:]), shared, value.dtype)
        name = shard.names.setdefault(key, f"{site}/{sum(other[0] == site for other in shard.names)}")
        at = shard.lengths.get(key, 0)
        shard.tensors.setdefault(key, []).append(rows)
        shard.lengths[key] = at + len(rows)
        return {"tensor": name, "row": at, "n_rows": 0 if shared else len(rows)}

    def _table(self, segments: Segments) -> int:
        key = (tuple(segments.names), _nested(segments.labels), segments.row_axis)
        return self._shard.tables.setdefault(key, len(self._shard.tables))


def read_note(index: Path) -> dict[str, Any]:
    """What an index file says of its shard.

    Raises ValueError for one that is damaged.
    """
    try:
        return json.loads((pq.read_schema(index).metadata or {})[NOTE])
    except (pa.ArrowException, KeyError, ValueError, OSError) as error:
        raise ValueError(f"{index} is damaged: {error}") from error


def index_files(folder: Path) -> list[Path]:
    """The index files of a recording, in the order of their shards."""
    # a machine that lost power may leave names without content
    return sorted(file for file in folder.glob("index/*/*.parquet") if file.stat().st_size)


def shard_of(index: Path) -> Path:
    """The shard that an index file belongs to."""
    return _path(index.parent.parent.parent, "shards", int(index.stem))


def _path(folder: Path, kind: str, number: int) -> Path:
    ending = "safetensors" if kind == "shards" else "parquet"
    return folder / kind / f"{number // _PER_FOLDER:03d}" / f"{number:09d}.{ending}"


def _whole(parts: Sequence[Tensor]) -> tuple[int, ...]:
    return (sum(len(part) for part in parts), *parts[0].shape[1:])


def _nested(labels: Tensor) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(row) for row in labels.tolist())


def _claim(folder: Path, about: Mapping[str, Any]) -> Any:
    """The locked recording.json of the folder."""
    path = folder / RECORDING
    wanted = {"format": FORMAT, "about": dict(about)}
    if not path.is_file():
        if folder.is_dir() and (others := sorted(each.name for each in folder.iterdir())):
            raise ValueError(f"{folder} has no {RECORDING}, but holds {others[:5]}: choose an empty folder")
        write_json(path, wanted)
    found = read_manifest(folder / RECORDING, FORMAT, "a recording of activations")
    if found != wanted:
        raise ValueError(f"{folder} holds another recording: it says {found['about']}, not {wanted['about']}")
    opened = path.open()
    try:
        lock(opened, f"recording in {folder}")
    except BlockingIOError:
        opened.close()
        raise
    return opened


def _clean(folder: Path) -> tuple[int, set[int]]:
    """Removes what no finished episode needs; number of the next shard, and the finished episodes."""
    files = index_files(folder)
    notes = {index: read_note(index) for index in files}
    done = {(episode, note["session"]) for note in notes.values() for episode in note["finished"]}
    for index, note in notes.items():
        episodes = pq.read_table(index, columns=["episode"])["episode"].unique().to_pylist()
        if not note["finished"] and not any((episode, note["session"]) in done for episode in episodes):
            index.unlink()
            shard_of(index).unlink(missing_ok=True)
    kept = {shard_of(index) for index in index_files(folder)}
    for shard in folder.glob("shards/*/*"):
        if shard not in kept:
            shard.unlink()
    for left in set(folder.glob("index/*/*")) - set(index_files(folder)):
        left.unlink()
    return max((int(index.stem) + 1 for index in files), default=0), {episode for episode, _ in done}
