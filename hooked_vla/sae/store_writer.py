"""Writing a store of activations: in order, in place, and so that a process that was killed can go on exactly.

Rows go to their place in the shard that is open as they come, so that nothing but one forward pass is in memory. What
counts is what the manifest says, and that changes only at a commit, when whole episodes are over: a process that goes
on begins where the last commit left the shard, and writes over what came after it.
"""

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from hooked_vla.folders import lock, read_manifest, write_json
from hooked_vla.sae.rows import IDS, Names, Rows
from hooked_vla.sae.store import (
    FORMAT,
    IDS_TENSOR,
    LOCK,
    MANIFEST,
    NAMES,
    SHARD_ROWS,
    ShardLayout,
    file_hash,
    group_shards,
    read_sites,
    shard_path,
)


class StoreWriter:
    """Writes a store, one process at a time; one that was begun is gone on with.

    about: plain values that say what the rows are; a store that was begun must say the same. episodes: those that are
    committed. names: what ids count.
    """

    def __init__(self, folder: str | Path, about: Mapping[str, Any], shard_rows: int = SHARD_ROWS) -> None:
        """Raises ValueError for a folder with other files or another store, a shard that is missing or truncated, and
        shard_rows below 1; BlockingIOError where another process writes there; NotADirectoryError for a file."""
        if shard_rows < 1:
            raise ValueError(f"shard_rows must be at least 1, got {shard_rows}")
        self.folder = Path(folder)
        about = json.loads(json.dumps(dict(about)))
        self._lock = _claim(self.folder)
        try:
            self._manifest = _begin(self.folder, about, shard_rows)
            self.names = Names(**self._manifest["names"])
            self.episodes: set[int] = set(self._manifest["episodes"])
            self._groups = [_Group(self.folder, i, each, shard_rows) for i, each in enumerate(self._manifest["groups"])]
        except BaseException:
            self._lock.close()
            raise

    @property
    def complete(self) -> bool:
        return self._manifest["complete"]

    @property
    def n_rows(self) -> int:
        """Rows of all groups, those that are not committed included."""
        return sum(group.n_rows for group in self._groups)

    def add(self, rows: Mapping[str, Rows], groups: Sequence[Sequence[str]]) -> None:
        """Write rows; they count when they are committed. groups: the sites that share ids.

        Raises ValueError for a finished store, other sites, widths, dtypes or groups than before, and sites of one
        group with different ids; OSError where they cannot be written.
        """
        if self.complete:
            raise ValueError(f"{self.folder} is finished: write into another folder")
        if not self._groups:
            shard_rows = self._manifest["shard_rows"]
            self._groups = [_Group(self.folder, i, _new_group(each, rows), shard_rows) for i, each in enumerate(groups)]
        found = [list(group.sites) for group in self._groups]
        if [list(each) for each in groups] != found:
            raise ValueError(f"{self.folder} holds the sites {found}, got {[list(each) for each in groups]}")
        for group in self._groups:
            group.add(rows)

    def commit(self, episodes: Collection[int]) -> None:
        """Whole episodes are over: what was added counts from now on.

        Raises ValueError for an episode that was committed before, OSError where the manifest cannot be written.
        """
        if again := sorted(self.episodes & set(episodes)):
            raise ValueError(f"episodes {again[:5]} are in {self.folder} already")
        self.episodes |= set(episodes)
        self._write()

    def finish(self) -> None:
        """Close the last shards; the store is complete, and takes nothing more.

        Raises OSError where they cannot be written.
        """
        if not self.complete:
            left = [group.close() for group in self._groups]
            self._write(complete=True)
            for path in left:
                if path is not None:
                    path.unlink()

    def close(self) -> None:
        """Let go of the folder; what was not committed is dropped."""
        for group in self._groups:
            group.let_go()
        self._lock.close()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write(self, complete: bool = False) -> None:
        self._manifest |= {
            "names": self.names.to_json(),
            "groups": [group.to_json() for group in self._groups],
            "episodes": sorted(self.episodes),
            "complete": complete,
        }
        write_json(self.folder / MANIFEST, self._manifest)


class _Group:
    """The shards of one group. shards: as the manifest lists those that are full; at: rows in the one that is open."""

    def __init__(self, folder: Path, number: int, described: Mapping[str, Any], shard_rows: int) -> None:
        self.folder, self.number, self.shard_rows = folder, number, shard_rows
        self.sites = read_sites(described)
        self.shards: list[dict[str, Any]] = list(described["shards"])
        self.at: int = described["partial_rows"]
        self.layout = ShardLayout.of(shard_rows, self.sites)
        self._file: BinaryIO | None = None
        for shard in group_shards(folder, number, described, self.sites, shard_rows):
            shard.check()
        self._clean()

    @property
    def n_rows(self) -> int:
        return len(self.shards) * self.shard_rows + self.at

    def to_json(self) -> dict[str, Any]:
        sites = {site: {"d": width, "dtype": NAMES[dtype]} for site, (width, dtype) in self.sites.items()}
        return {"sites": sites, "shards": self.shards, "partial_rows": self.at}

    def add(self, rows: Mapping[str, Rows]) -> None:
        """Raises ValueError for rows that are not like those before, OSError."""
        first = rows[next(iter(self.sites))]
        for site, (width, dtype) in self.sites.items():
            values, ids = rows[site]
            if values.shape[1] != width or values.dtype != dtype:
                raise ValueError(
                    f"{site}: rows of {values.dtype} [{values.shape[1]}], but {self.folder} has {dtype} [{width}]"
                )
            if ids is not first.ids and not torch.equal(ids, first.ids):
                raise ValueError(f"{site}: its rows are of other tokens than those of {next(iter(self.sites))}")
        tensors = {IDS_TENSOR: first.ids, **{site: rows[site].values for site in self.sites}}
        start = 0
        while start < len(first.ids):
            n = min(self.shard_rows - self.at, len(first.ids) - start)
            for name, tensor in tensors.items():
                width, dtype = self.layout.widths[name]
                self._put(tensor[start : start + n], self.layout.offsets[name] + self.at * width * dtype.itemsize)
            self.at, start = self.at + n, start + n
            if self.at == self.shard_rows:
                self._complete(self._path(partial=True), self.shard_rows)

    def close(self) -> Path | None:
        """Make a shard of the rows of the open one; the file that nobody needs then."""
        self.let_go()
        if not self.at:
            return None
        partial, temporary = self._path(partial=True), self._path().with_suffix(".tmp")
        layout, n = ShardLayout.of(self.at, self.sites), self.at
        try:
            with partial.open("rb") as old, temporary.open("wb") as new:
                new.write(layout.header)
                for name, (width, dtype) in layout.widths.items():
                    old.seek(self.layout.offsets[name])
                    _copy(old, new, n * width * dtype.itemsize)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
        self._complete(temporary, n)
        return partial

    def let_go(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def _complete(self, path: Path, n: int) -> None:
        """The file is a shard from now on."""
        self.let_go()
        final = self._path()
        path.replace(final)
        self.shards.append(
            {"file": str(final.relative_to(self.folder)), "rows": n, "bytes": final.stat().st_size,
             "sha256": file_hash(final)}
        )  # fmt: skip
        self.at = 0

    def _put(self, rows: Tensor, offset: int) -> None:
        """Write rows at a place of the open shard."""
        left = memoryview(rows.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        try:
            file = self._file or self._open()
            while left:
                written = os.pwrite(file.fileno(), left, offset)
                left, offset = left[written:], offset + written
        except OSError as error:
            # writing, unlike opening, does not say which file it was
            error.filename = error.filename or str(self._path(partial=True))
            raise

    def _open(self) -> BinaryIO:
        """The open shard's file, as long as it will be: rows that are to come take no room on the disk."""
        path = self._path(partial=True)
        path.parent.mkdir(exist_ok=True)
        self._file = path.open("r+b" if path.exists() else "w+b")
        os.pwrite(self._file.fileno(), self.layout.header, 0)
        os.truncate(self._file.fileno(), self.layout.n_bytes)
        return self._file

    def _path(self, partial: bool = False) -> Path:
        return shard_path(self.folder, self.number, len(self.shards), partial)

    def _clean(self) -> None:
        """Removes what came after the last commit; a shard that was full by then is open again."""
        if self.at and not self._path(partial=True).is_file():
            self._path().replace(self._path(partial=True))
        kept = {Path(each["file"]).name for each in self.shards}
        if self.at:
            kept.add(self._path(partial=True).name)
        for path in (self.folder / f"group-{self.number}").glob("*"):
            if path.name not in kept:
                path.unlink()


def _copy(old: BinaryIO, new: BinaryIO, n: int, at_once: int = 2**24) -> None:
    while n:
        part = old.read(min(n, at_once))
        if not part:
            raise ValueError(f"{old.name} is truncated: {n} bytes are missing")
        new.write(part)
        n -= len(part)


def _new_group(sites: Sequence[str], rows: Mapping[str, Rows]) -> dict[str, Any]:
    """A group of the manifest, as its first rows are."""
    described = {}
    for site in sites:
        values = rows[site].values
        if values.dtype not in NAMES or rows[site].ids.shape[1] != len(IDS):
            raise ValueError(f"{site}: rows of {values.dtype} with ids {list(rows[site].ids.shape)} cannot be stored")
        described[site] = {"d": values.shape[1], "dtype": NAMES[values.dtype]}
    return {"sites": described, "shards": [], "partial_rows": 0}


def _begin(folder: Path, about: Mapping[str, Any], shard_rows: int) -> dict[str, Any]:
    """The manifest of the store, a new one where there is none."""
    if not (folder / MANIFEST).is_file():
        new = {"format": FORMAT, "about": about, "ids": list(IDS), "shard_rows": shard_rows,
               "names": Names().to_json(), "groups": [], "episodes": [], "complete": False}  # fmt: skip
        write_json(folder / MANIFEST, new)
    found = read_manifest(folder / MANIFEST, FORMAT, "a store of activations")
    now = {**about, "shard_rows": shard_rows}
    then = {**found["about"], "shard_rows": found["shard_rows"]}
    differ = [key for key in {**then, **now} if then.get(key, "nothing") != now.get(key, "nothing")]
    if differ:
        told = "; ".join(f"{key}: {_short(then.get(key))} there, {_short(now.get(key))} now" for key in differ)
        raise ValueError(f"{folder} holds another store: {told}. Go on with its settings, or choose another folder")
    return found


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]}…"


def _claim(folder: Path) -> Any:
    """The folder's locked lock file."""
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; a store is a folder")
    folder.mkdir(parents=True, exist_ok=True)
    others = sorted(each.name for each in folder.iterdir() if not each.name.startswith("."))
    if MANIFEST not in others and (others := [name for name in others if name != LOCK]):
        raise ValueError(f"{folder} has no {MANIFEST}, but holds {others[:5]}: choose an empty folder")
    opened = (folder / LOCK).open("a")
    try:
        lock(opened, f"writing the store {folder}")
    except BlockingIOError:
        opened.close()
        raise
    return opened
