"""Rows of activations on disk, for when they are to be read more often than made again.

FOLDER/manifest.json              what is there: see `StoreWriter`; written last, so that what it says is true
FOLDER/group-0/000000.safetensors     65,536 rows: "ids" int32 [row 6] (columns as in rows.IDS), and each site [row d]
FOLDER/group-0/000003.partial         the shard that is being written, of the same layout, its last rows still empty
FOLDER/lock                       held by the process that writes

Sites of one group have a row for the same tokens, and share shards and ids. The files are read through memory maps: a
store takes as much memory as its largest read.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor
from tqdm import tqdm

from hooked_vla.folders import read_manifest
from hooked_vla.hooks.names import nearest
from hooked_vla.sae.rows import IDS, Names, id_numbers

FORMAT = "hooked-vla token store 1"
MANIFEST = "manifest.json"
LOCK = "lock"
SHARD_ROWS = 65_536
IDS_TENSOR = "ids"
# names that the safetensors format gives to dtypes
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class ShardLayout:
    """Where the tensors of a shard lie. offsets: name -> byte in the file; n_bytes: of the whole file."""

    rows: int
    widths: Mapping[str, tuple[int, torch.dtype]]
    header: bytes
    offsets: Mapping[str, int]
    n_bytes: int

    @classmethod
    def of(cls, rows: int, sites: Mapping[str, tuple[int, torch.dtype]]) -> "ShardLayout":
        """A shard of so many rows. sites: site -> its width and dtype."""
        widths = {IDS_TENSOR: (len(IDS), torch.int32), **sites}
        header, starts, at = {}, {}, 0
        for name, (width, dtype) in widths.items():
            size = rows * width * dtype.itemsize
            header[name] = {"dtype": NAMES[dtype], "shape": [rows, width], "data_offsets": [at, at + size]}
            starts[name], at = at, at + size
        encoded = json.dumps({"__metadata__": {"format": FORMAT}, **header}).encode()
        encoded += b" " * (-len(encoded) % 8)
        start = 8 + len(encoded)
        head = len(encoded).to_bytes(8, "little") + encoded
        return cls(rows, widths, head, {name: start + offset for name, offset in starts.items()}, start + at)


@dataclass(frozen=True)
class Shard:
    """A file of a store. rows: that count, of those that the file has room for; sha256: "" while it is written."""

    path: Path
    rows: int
    layout: ShardLayout
    sha256: str

    def check(self) -> None:
        """Raises ValueError naming the file where it is missing, truncated, or not what the manifest says."""
        if not self.path.is_file():
            raise ValueError(f"{self.path} is missing, but the manifest names it")
        size = self.path.stat().st_size
        if size != self.layout.n_bytes:
            raise ValueError(
                f"{self.path} is truncated or was changed: it has {size} bytes, {self.layout.n_bytes} are expected"
            )
        with self.path.open("rb") as file:
            if file.read(len(self.layout.header)) != self.layout.header:
                raise ValueError(f"{self.path} is not the shard that the manifest describes: its header differs")

    def map(self, name: str) -> Tensor:
        """One of its tensors [row width], memory-mapped."""
        width, dtype = self.layout.widths[name]
        start, n_bytes = self.layout.offsets[name], self.layout.rows * width * dtype.itemsize
        # private: writing into it would change neither the file nor what others read
        whole = torch.from_file(str(self.path), shared=False, size=self.layout.n_bytes, dtype=torch.uint8)
        return whole[start : start + n_bytes].view(dtype).view(self.layout.rows, width)[: self.rows]


class TokenStore:
    """A store that `StoreWriter` wrote or is writing: what was committed is there.

    about: what its maker says of it. groups: sites that share rows. widths: site -> d. names: what ids count.
    complete: whether its maker finished it.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError for a folder that is not a store; ValueError naming the file that is damaged,
        truncated or missing (contents are checked by `verify`)."""
        self.folder = Path(folder)
        manifest = read_manifest(self.folder / MANIFEST, FORMAT, "a store of activations")
        self.about: Mapping[str, Any] = manifest["about"]
        self.complete: bool = manifest["complete"]
        self.episodes: Sequence[int] = manifest["episodes"]
        self.shard_rows: int = manifest["shard_rows"]
        self.names = Names(**manifest["names"])
        self.groups: Sequence[Sequence[str]] = [list(group["sites"]) for group in manifest["groups"]]
        self._group = {site: number for number, sites in enumerate(self.groups) for site in sites}
        self._sites: dict[str, tuple[int, torch.dtype]] = {}
        self.shards: list[list[Shard]] = []
        for number, group in enumerate(manifest["groups"]):
            self._sites |= (sites := read_sites(group))
            self.shards.append(group_shards(self.folder, number, group, sites, self.shard_rows))
        for shard in (each for shards in self.shards for each in shards):
            shard.check()
        self._maps: dict[tuple[Path, str], Tensor] = {}

    @property
    def sites(self) -> list[str]:
        return list(self._sites)

    @property
    def widths(self) -> Mapping[str, int]:
        return {site: width for site, (width, _) in self._sites.items()}

    def dtype(self, site: str) -> torch.dtype:
        """Raises KeyError with the nearest sites for one that is not there."""
        self.group(site)
        return self._sites[site][1]

    def group(self, site: str) -> int:
        """Number of the site's group. Raises KeyError with the nearest sites for one that is not there."""
        if site not in self._group:
            raise KeyError(f"{site!r} is not in the store {self.folder}; nearest: {nearest(site, self.sites)}")
        return self._group[site]

    def n_rows(self, site: str) -> int:
        """Raises KeyError for a site that is not there."""
        return sum(shard.rows for shard in self.shards[self.group(site)])

    def ids(self, site: str) -> Int32[Tensor, "n 6"]:
        """Ids of all rows of a site, columns as in rows.IDS; 24 bytes a row are read into memory."""
        parts = [self._map(shard, IDS_TENSOR) for shard in self.shards[self.group(site)]]
        return torch.cat([torch.empty(0, len(IDS), dtype=torch.int32), *parts])

    def find(self, site: str, where: Mapping[str, Collection[int | str]]) -> Int64[Tensor, " n"]:
        """Numbers of the rows of a site whose ids are among those given, in order.

        where: column of the ids -> numbers, or names and globs of segments and cameras: {"segment": ["image:*"]}.
        Raises KeyError for an unknown site or name, ValueError for an unknown column.
        """
        wanted = {IDS.index(column): id_numbers(self.names, column, each) for column, each in where.items()}
        found, start = [torch.empty(0, dtype=torch.int64)], 0
        for shard in self.shards[self.group(site)]:
            ids = self._map(shard, IDS_TENSOR)
            chosen = torch.ones(shard.rows, dtype=torch.bool)
            for column, numbers in wanted.items():
                chosen &= torch.isin(ids[:, column], torch.tensor(numbers, dtype=torch.int32))
            found.append(chosen.nonzero().flatten() + start)
            start += shard.rows
        return torch.cat(found)

    def read(self, site: str, rows: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Rows by number, in any order.

        Raises KeyError for a site that is not there, IndexError for a row that is not.
        """
        n, shards = self.n_rows(site), self.shards[self.group(site)]
        if len(rows) and (int(rows.min()) < 0 or int(rows.max()) >= n):
            raise IndexError(f"rows {int(rows.min())} to {int(rows.max())} of {site}, which has {n} in {self.folder}")
        width, dtype = self._sites[site]
        found, shard_of = torch.empty(len(rows), width, dtype=dtype), rows // self.shard_rows
        for number in shard_of.unique().tolist():
            here = (shard_of == number).nonzero().flatten()
            found[here] = self._map(shards[number], site)[rows[here] - number * self.shard_rows]
        return found

    def copy(self, site: str, start: int, into: Float[Tensor, "n d"]) -> None:
        """Successive rows from `start` on into a tensor: the fastest way to read.

        Raises KeyError for a site that is not there, IndexError for rows that are not.
        """
        if start < 0 or start + len(into) > self.n_rows(site):
            raise IndexError(f"rows {start} to {start + len(into)} of {site}, which has {self.n_rows(site)}")
        shards, at = self.shards[self.group(site)], 0
        while at < len(into):
            number, offset = divmod(start + at, self.shard_rows)
            part = self._map(shards[number], site)[offset : offset + len(into) - at]
            into[at : at + len(part)] = part
            at += len(part)

    @property
    def sha256(self) -> str:
        """Of the checksums of all shards and the rows of the one that is being written: of what is in the store."""
        listed = [[shard.sha256, shard.rows] for shards in self.shards for shard in shards]
        return hashlib.sha256(json.dumps([self.groups, listed]).encode()).hexdigest()

    def verify(self, progress: bool = False) -> None:
        """Read every finished shard and compare its checksum.

        Raises ValueError naming the first that differs.
        """
        shards = [shard for group in self.shards for shard in group if shard.sha256]
        for shard in tqdm(shards, desc="checking", unit="file", disable=not progress):
            shard.check()
            if (found := file_hash(shard.path)) != shard.sha256:
                raise ValueError(f"{shard.path} was changed: its SHA-256 is {found}, the manifest says {shard.sha256}")

    def _map(self, shard: Shard, name: str) -> Tensor:
        key = shard.path, name
        if key not in self._maps:
            self._maps[key] = shard.map(name)
        return self._maps[key]


def file_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shard_path(folder: Path, group: int, number: int, partial: bool = False) -> Path:
    return folder / f"group-{group}" / f"{number:06d}.{'partial' if partial else 'safetensors'}"


def read_sites(group: Mapping[str, Any]) -> dict[str, tuple[int, torch.dtype]]:
    """Site -> width and dtype, of a group of the manifest."""
    return {site: (each["d"], DTYPES[each["dtype"]]) for site, each in group["sites"].items()}


def group_shards(
    folder: Path, number: int, group: Mapping[str, Any], sites: Mapping[str, tuple[int, torch.dtype]], shard_rows: int
) -> list[Shard]:
    """The shards of a group that the manifest names; the last one may still be written."""
    shards = [
        Shard(folder / each["file"], each["rows"], ShardLayout.of(each["rows"], sites), each["sha256"])
        for each in group["shards"]
    ]
    if group["partial_rows"]:
        path = shard_path(folder, number, len(shards), partial=True)
        if not path.is_file():
            # it was full when its writer ended, before the manifest could say so
            path = shard_path(folder, number, len(shards))
        shards.append(Shard(path, group["partial_rows"], ShardLayout.of(shard_rows, sites), ""))
    return shards
