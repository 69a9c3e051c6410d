"""The table of episodes of one folder of rollouts, kept as one file in the user's cache.

A folder has one small file an episode, so that reading 10,000 of them takes seconds: that happens once, in the
background, in batches of which each is there to be seen. Recorded episodes never change (rollouts/records.py), so an
index is gone on with as a run grows; another manifest begins a new one.
"""

import hashlib
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import RolloutFolder, Run
from hooked_vla.folders import stamp
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.sae.duck import exactly

with needs_sim_extra():
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

# from rollouts/records.py: how episodes are numbered into folders
PER_FOLDER = 1000
# files that are read at a time: between two batches progress is seen, and whoever asks for rows goes first
_BATCH, _PAUSE_S = 50, 0.005
# how long an answer waits for an index that is nearly there, which it is with so many episodes left to read
_PATIENCE_S, _NEARLY, _GLANCE_S = 0.15, 300, 0.02

COLUMNS = ("episode", "arm", "task", "seed", "success", "ending", "n_steps", "instruction")
_SCHEMA = pa.schema(
    [("episode", pa.int64()), ("arm", pa.string()), ("task", pa.string()), ("seed", pa.int64()),
     ("success", pa.bool_()), ("ending", pa.string()), ("n_steps", pa.int32()), ("instruction", pa.string()),
     ("damage", pa.string())]
)  # fmt: skip


@dataclass(frozen=True)
class State:
    """How far an index is. file: the index, None while it is made; done: episodes read of `of`; error: why there is
    none."""

    file: Path | None
    done: int
    of: int
    error: str | None = None

    @property
    def ready(self) -> bool:
        return self.file is not None


class EpisodeIndex:
    """The index of one folder; made by the first who asks, in the background."""

    def __init__(self, run: Run, folder: RolloutFolder) -> None:
        self.run, self.folder = run, folder
        self._lock, self._reading = threading.Lock(), threading.Lock()
        self._thread: threading.Thread | None = None
        self._done = self._of = 0
        self._error: str | None = None
        self._stop = threading.Event()

    @classmethod
    def of(cls, run: Run, rollout: str) -> "EpisodeIndex":
        """The index of the run's folder of that key. Raises NotThere."""
        folder = find_rollout(run, rollout)
        return run.keep(f"episodes of {rollout}", lambda: cls(run, folder))

    def state(self, patience: float = _PATIENCE_S) -> State:
        """The index, or how far it is, after waiting so many seconds at most for one that is nearly there."""
        file = self._file()
        if file.is_file():
            return State(file, self._of, self._of)
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                if self._error is not None and self._wanted == file:
                    return State(None, self._done, self._of, self._error)
                self._wanted, self._error = file, None
                self._thread = threading.Thread(target=self._make, args=(file,), daemon=True)
                self._thread.start()
            thread = self._thread
        ends = time.monotonic() + patience
        while thread.is_alive() and (left := ends - time.monotonic()) > 0 and self._of - self._done <= _NEARLY:
            thread.join(min(left, _GLANCE_S))
        if file.is_file():
            return State(file, self._done, self._of)
        return State(None, self._done, self._of, self._error)

    def wait(self) -> State:
        """The index, however long it takes."""
        state = self.state(0.0)
        while not state.ready and state.error is None:
            if self._thread is not None:
                self._thread.join(1.0)
            state = self.state(0.0)
        return state

    def rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        """The rows of some episodes, straight from their files; those of a damaged file say so in "damage"."""
        with self._reading:
            return self._read(numbers).to_pylist()

    def numbers(self) -> list[int]:
        """The recorded episodes' numbers, in order, by their files' names."""
        found = []
        for folder in self._folders():
            with suppress(OSError), os.scandir(folder) as entries:
                found += [
                    int(entry.name[:9]) for entry in entries
                    if len(entry.name) == 17 and entry.name.endswith(".parquet") and entry.name[:9].isdecimal()
                    and entry.is_file(follow_symlinks=False)
                ]  # fmt: skip
        return sorted(found)

    def close(self) -> None:
        """Stop what is under way."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def _folders(self) -> list[Path]:
        with suppress(OSError), os.scandir(self.folder.path / "episodes") as entries:
            return sorted(
                Path(each.path) for each in entries if each.is_dir(follow_symlinks=False) and each.name.isdecimal()
            )
        return []

    def _file(self) -> Path:
        """Where the index of the folder as it is now belongs: a file that appears or goes changes its folder's time."""
        with suppress(OSError):
            stem = _digest(self.folder.key, *stamp(self.folder.path / "manifest.json"))
            times = [(folder.name, folder.stat().st_mtime_ns) for folder in self._folders()]
            return self.run.cache / "episodes" / f"{stem}-{_digest(*times)}.parquet"
        raise NotThere(f"{self.run.shown(self.folder.path)} is not there any more")

    def _make(self, file: Path) -> None:
        try:
            # one folder at a time: they would only wait for the same disk
            with self.run.keep("indexing episodes", threading.Lock):
                self._build(file)
        except (OSError, ValueError, pa.ArrowException) as error:
            self._error = f"the table of episodes cannot be kept in {file.parent}: {error}"

    def _build(self, file: Path) -> None:
        numbers = self.numbers()
        self._of, self._done = len(numbers), 0
        stem = file.name.partition("-")[0]
        older = [each for each in file.parent.glob(f"{stem}-*.parquet") if each != file]
        known = _known(older, numbers)
        tables = [known]
        have = set(known["episode"].to_pylist())
        missing = [number for number in numbers if number not in have]
        self._done = len(have)
        for start in range(0, len(missing), _BATCH):
            if self._stop.is_set():
                return
            with self._reading:
                tables.append(self._read(missing[start : start + _BATCH]))
            time.sleep(_PAUSE_S)
            self._done = len(have) + min(start + _BATCH, len(missing))
        table = pa.concat_tables(tables).sort_by("episode")
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            pq.write_table(table, temporary)
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)
        for each in older:
            each.unlink(missing_ok=True)

    def _read(self, numbers: Sequence[int]) -> pa.Table:
        files = [self.episode_file("episodes", number) for number in numbers]
        there = [(number, file) for number, file in zip(numbers, files, strict=True) if file is not None]
        gone = [_damaged(n, "its file is a link out of the run") for n in set(numbers) - {n for n, _ in there}]
        try:
            tables = [self._select([file for _, file in there])] if there else []
            if sum(table.num_rows for table in tables) != len(there):
                raise ValueError("not one row a file")
        except Exception:  # one bad file fails them all: which one, only each by itself can tell
            tables = [self._select_one(number, file) for number, file in there]
        return pa.concat_tables([_SCHEMA.empty_table(), *tables, *gone])

    def _select(self, files: Sequence[Path]) -> pa.Table:
        columns = ", ".join(
            f"{name}::{_DUCKDB[name]} AS {name}" for name in COLUMNS if name != "episode"
        )  # the names are this file's own
        found = self.run.duckdb().sql(
            f"SELECT regexp_extract(filename, '(\\d{{9}})\\.parquet$', 1)::BIGINT AS episode, {columns}, "
            "NULL::VARCHAR AS damage FROM read_parquet(?, hive_partitioning = false, filename = true)",
            params=[[exactly(file) for file in files]],
        )
        return found.to_arrow_table().cast(_SCHEMA)

    def _select_one(self, number: int, file: Path) -> pa.Table:
        try:
            table = self._select([file])
            if table.num_rows != 1:
                return _damaged(number, f"its file has {table.num_rows} rows, expected 1")
            return table
        except Exception as error:  # whatever a file that somebody made can do to a reader
            return _damaged(number, f"its file is damaged: {str(error).splitlines()[0][:200]}")

    def episode_file(self, kind: str, number: int) -> Path | None:
        """A file of an episode, "steps" or "episodes"; None where it is none of this run."""
        path = self.folder.path / kind / f"{number // PER_FOLDER:03d}" / f"{number:09d}.parquet"
        with suppress(FileNotFoundError):
            return self.run.inside(path)
        return None


_DUCKDB = {"arm": "VARCHAR", "task": "VARCHAR", "seed": "BIGINT", "success": "BOOLEAN", "ending": "VARCHAR",
           "n_steps": "INTEGER", "instruction": "VARCHAR"}  # fmt: skip


def find_rollout(run: Run, key: str) -> RolloutFolder:
    """The run's folder of rollouts by its key. Raises NotThere."""
    if key not in run.rollouts:
        raise NotThere(f"no rollouts {key!r} in this run")
    return run.rollouts[key]


def episode_number(text: str) -> int:
    """An episode's number from an address. Raises NotThere for what is no such number."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 9):
        raise NotThere(f"{text!r} is no episode's number")
    return int(text)


def _damaged(number: int, why: str) -> pa.Table:
    row: dict[str, Any] = {name: None for name in _SCHEMA.names}
    return pa.Table.from_pylist([row | {"episode": number, "damage": why}], _SCHEMA)


def _known(files: Iterable[Path], numbers: Sequence[int]) -> pa.Table:
    """What earlier indexes know of these episodes; what was damaged is read again."""
    for file in sorted(files, key=lambda each: each.stat().st_size, reverse=True):
        with suppress(OSError, ValueError, KeyError, pa.ArrowException):
            table = pq.read_table(file).cast(_SCHEMA)
            return table.filter(pc.field("episode").isin(list(numbers)) & pc.field("damage").is_null())
    return _SCHEMA.empty_table()


def _digest(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
