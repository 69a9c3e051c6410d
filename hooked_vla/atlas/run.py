"""What a folder of results holds: experiments, rollouts, feature indexes and steered runs, found by their manifests.

Opening reads names and small JSON files, never a table. A damaged folder is listed with what is wrong with it.
Every view looks folders up here by key: no path is ever made of what a browser sends.
"""

import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from hooked_vla.extras import needs_packages
from hooked_vla.folders import user_cache
from hooked_vla.rollouts.sae.duck import Shared, confined

with needs_packages(("duckdb",), "the Atlas needs: pip install 'hooked-vla[atlas]'"):
    import duckdb

T = TypeVar("T")

EXPERIMENT, MANIFEST, STEERED = "experiment.json", "manifest.json", "steered.csv"
MAX_DEPTH = 4
# of one manifest: one of 10,000 episodes is about 2 MB
MAX_JSON = 64 * 2**20
# of a folder that somebody opens by mistake, such as their home
MAX_FOLDERS = 20_000
_NUMBERED = re.compile(r"\d+")
_FORMATS = {"hooked-vla rollouts": "rollouts", "hooked-vla feature index": "indexes"}


@dataclass(frozen=True)
class Found:
    """A folder of the run. key: its name in addresses; about: what its manifest says, {} where that is damaged, and
    error then says why."""

    key: str
    path: Path
    about: Mapping[str, Any] = field(repr=False)
    error: str | None = None


class ExperimentFolder(Found):
    """What `experiment run` wrote; about is experiment.json."""


class RolloutFolder(Found):
    """A folder of episodes; about is manifest.json."""

    @property
    def manifest(self) -> Mapping[str, Any]:
        return self.about


class IndexFolder(Found):
    """A feature index; about is manifest.json."""


class SteeringFolder(Found):
    """What steering a feature left: steered.csv, with rollouts beside it; about is {}."""


@dataclass(eq=False)
class Run:
    """An opened folder. experiments, rollouts, indexes, steering: its parts by key, in the order of their paths;
    cache: where what is derived from it may be kept, never inside it."""

    root: Path
    cache: Path
    experiments: dict[str, ExperimentFolder] = field(default_factory=dict)
    rollouts: dict[str, RolloutFolder] = field(default_factory=dict)
    indexes: dict[str, IndexFolder] = field(default_factory=dict)
    steering: dict[str, SteeringFolder] = field(default_factory=dict)
    _kept: dict[str, Any] = field(default_factory=dict, repr=False)
    _locks: dict[str, threading.Lock] = field(default_factory=dict, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @classmethod
    def open(cls, folder: str | Path, cache: str | Path | None = None) -> "Run":
        """Find what a folder holds, down to depth MAX_DEPTH; links are not followed.

        cache: None for a folder of this run in the user's cache directory.
        Raises FileNotFoundError or NotADirectoryError for what is not a folder, ValueError for one that holds more than
        MAX_FOLDERS others besides those of episodes.
        """
        root = Path(folder).resolve()
        if not root.exists():
            raise FileNotFoundError(f"there is no folder {folder}")
        if not root.is_dir():
            raise NotADirectoryError(f"{folder} is a file; the Atlas opens folders")
        run = cls(root, Path(cache).resolve() if cache is not None else _cache_of(root))
        run._search(root, 0, count())
        return run

    @property
    def empty(self) -> bool:
        return not (self.experiments or self.rollouts or self.indexes or self.steering)

    def inside(self, path: Path) -> Path:
        """The path, if it is a regular file within the run.

        Raises FileNotFoundError for what is not there, and for what a link leads out to.
        """
        try:
            real = path.resolve(strict=True)
            regular = stat.S_ISREG(real.stat().st_mode)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{self.shown(path)} is not there") from error
        if not real.is_relative_to(self.root) or not regular:
            raise FileNotFoundError(f"{self.shown(path)} is not a file of this run")
        return real

    def shown(self, path: Path) -> str:
        """A path as pages show it: relative to the run."""
        return path.relative_to(self.root).as_posix() if path.is_relative_to(self.root) else path.name

    def duckdb(self) -> "duckdb.DuckDBPyConnection":
        """A cursor of its own for one answer; it reads files of the run and of its cache alone, and no network."""
        return self.keep("duckdb", self._connect).cursor()

    def keep(self, name: str, make: Callable[[], T]) -> T:
        """What `make` gave the first time, kept for as long as the run is open; made once, whichever thread asks.

        What has a close() is closed with the run.
        """
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if name not in self._kept:
                self._kept[name] = make()
            return self._kept[name]

    def close(self) -> None:
        """Close what was kept."""
        with self._lock:
            kept, self._kept = list(self._kept.values()), {}
        for each in reversed(kept):
            if callable(close := getattr(each, "close", None)):
                close()

    def _connect(self) -> Shared:
        base = confined([self.root, self.cache], "1GB", threads=2)
        base.execute("SET lock_configuration = true")
        return Shared(base)

    def _search(self, folder: Path, depth: int, looked_at: Iterator[int]) -> None:
        if next(looked_at) > MAX_FOLDERS:
            raise ValueError(f"{self.root} holds more than {MAX_FOLDERS} folders: open one that holds results alone")
        try:
            with os.scandir(folder) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
            files = {entry.name for entry in listed if entry.is_file(follow_symlinks=False)}
            folders = [entry.name for entry in listed if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return
        leaf = self._take(folder, files)
        if leaf or depth == MAX_DEPTH:
            return
        for name in folders:
            # numbered folders hold episodes, hidden ones are not finished
            if not name.startswith(".") and not _NUMBERED.fullmatch(name):
                self._search(folder / name, depth + 1, looked_at)

    def _take(self, folder: Path, files: set[str]) -> bool:
        """Register a folder by its manifests; whether its inside is nobody else's."""
        if EXPERIMENT in files:
            about, error = _read(folder / EXPERIMENT)
            key = self._key(folder, self.experiments)
            self.experiments[key] = ExperimentFolder(key, folder, about, error)
        if STEERED in files:
            key = self._key(folder, self.steering)
            self.steering[key] = SteeringFolder(key, folder, {})
        if MANIFEST not in files:
            return False
        about, error = _read(folder / MANIFEST)
        kind = _kind(folder, about)
        if kind == "rollouts":
            key = self._key(folder, self.rollouts)
            self.rollouts[key] = RolloutFolder(key, folder, about, error)
        elif kind == "indexes":
            key = self._key(folder, self.indexes)
            self.indexes[key] = IndexFolder(key, folder, about, error)
        return kind is not None

    def _key(self, folder: Path, taken: Mapping[str, Any]) -> str:
        name = folder.relative_to(self.root).as_posix()
        key = (
            "run" if name == "." else re.sub(r"[^A-Za-z0-9._-]", lambda c: f"_{ord(c[0]):x}_", name.replace("/", "--"))
        )
        if len(key) > 120 or key in taken:
            key = f"{key[:100]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"
        return key


def _kind(folder: Path, about: Mapping[str, Any]) -> str | None:
    said = about.get("format")
    if isinstance(said, str):
        return next((kind for start, kind in _FORMATS.items() if said.startswith(start)), None)
    # damaged: what lies beside says what it was
    if (folder / "episodes").is_dir() and (folder / "steps").is_dir():
        return "rollouts"
    return "indexes" if (folder / "features.parquet").is_file() else None


def _read(path: Path) -> tuple[dict[str, Any], str | None]:
    """A manifest and None, or {} and what is wrong with it."""
    try:
        if path.stat().st_size > MAX_JSON:
            return {}, f"{path.name} is larger than {MAX_JSON >> 20} MB"
        found = json.loads(path.read_text())
    except OSError as error:
        return {}, f"{path.name} cannot be read: {error.strerror}"
    except (ValueError, RecursionError) as error:
        return {}, f"{path.name} is damaged: {error}"
    if not isinstance(found, dict):
        return {}, f"{path.name} is damaged: it holds no object"
    return found, None


def _cache_of(root: Path) -> Path:
    """A folder of this run alone in the user's cache directory; not made yet."""
    return user_cache() / "atlas" / hashlib.sha256(os.fsencode(root)).hexdigest()[:24]
