"""Reading recorded activations: one value by its key, a whole site with its keys, and who owns each token."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vla.folders import read_manifest
from hooked_vla.hooks.names import is_denoised, nearest
from hooked_vla.inputs import Segments
from hooked_vla.rollouts import needs_sim_extra
from hooked_vla.rollouts.activation_store import FORMAT, INDEX, RECORDING, index_files, read_note, shard_of

with needs_sim_extra():
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

Key = tuple[int, int, int | None]
# a tensor is read whole where more than one in so many of its rows is wanted
_FEW = 8


@dataclass(frozen=True)
class _Value:
    """Where a value lies."""

    index: Path
    tensor: str
    row: int
    n_rows: int
    segments: tuple[int, ...]


@dataclass(frozen=True)
class Stacked:
    """Values of one site. values: [row, ...], as a hook sees them for a batch of all of them: one row each, or as many
    as one batch row has images or windows. keys: (episode, env_step, denoise_step) of each, in the same order."""

    values: Tensor
    keys: tuple[Key, ...]


class ActivationRecording:
    """A folder that ActivationRecorder wrote; only episodes that were finished are shown.

    about: what the recording says of itself. sites: site -> its axes.
    """

    def __init__(self, folder: str | Path) -> None:
        """Raises FileNotFoundError for a folder that is not a recording, ValueError where its files are damaged."""
        self.folder = Path(folder)
        self.about: Mapping[str, Any] = read_manifest(self.folder / RECORDING, FORMAT, "a recording of activations")[
            "about"
        ]
        self._notes = {index: read_note(index) for index in index_files(self.folder)}
        self._finished = {(episode, note["session"]) for note in self._notes.values() for episode in note["finished"]}
        self.sites: dict[str, tuple[str, ...]] = {}
        for note in self._notes.values():
            self.sites.update({site: tuple(axes) for site, axes in note["axes"].items()})
        self._by_site: dict[str, dict[Key, _Value]] = {}
        self._tables: dict[tuple[Path, int], Segments] = {}

    @property
    def episodes(self) -> list[int]:
        """The finished episodes."""
        return sorted(episode for episode, _ in self._finished)

    @cached_property
    def index(self) -> pa.Table:
        """One row a value, columns as in activation_store.INDEX, in the order of recording."""
        tables = [self._rows(path) for path in self._notes]
        return pa.concat_tables([INDEX.empty_table(), *tables]).combine_chunks()

    def keys(self, site: str) -> list[Key]:
        """(episode, env_step, denoise_step) of every value of a site, in this order; denoise_step None where the site
        runs once a chunk.

        Raises KeyError with the nearest sites for one that was not recorded.
        """
        return sorted(self._values(site), key=lambda key: (key[0], key[1], -1 if key[2] is None else key[2]))

    def get(self, episode: int, env_step: int, site: str, denoise_step: int | None = None) -> Tensor:
        """One value, as a hook at the site sees it for a batch of one row.

        Raises KeyError for a site or key that was not recorded, ValueError where its shard is damaged.
        """
        value = self._find(site, (episode, env_step, denoise_step))
        return self._read(site, [value])[0]

    def stack(
        self,
        site: str,
        episodes: Sequence[int] | None = None,
        env_steps: Sequence[int] | None = None,
        denoise_steps: Sequence[int] | None = None,
    ) -> Stacked:
        """The values of a site, in the order of their keys, limited to some numbers where those are given.

        Raises KeyError for a site that was not recorded or where nothing is left, ValueError where values differ in
        shape (naming the first two that do) or a shard is damaged.
        """
        limits = [None if each is None else set(each) for each in (episodes, env_steps, denoise_steps)]

        def wanted(key: Key) -> bool:
            return all(limit is None or number in limit for limit, number in zip(limits, key, strict=True))

        keys = [key for key in self.keys(site) if wanted(key)]
        if not keys:
            raise KeyError(f"nothing of {site} in episodes {episodes}, env_steps {env_steps}, steps {denoise_steps}")
        return Stacked(self.fetch(site, keys), tuple(keys))

    def fetch(self, site: str, keys: Sequence[Key]) -> Tensor:
        """The values of a site for some keys (episode, env_step, denoise_step), one after the other along the first
        axis: what a hook at the site would see for a batch of these rows.

        Raises as `stack`.
        """
        values = self.fetch_each(site, keys)
        for key, value in zip(keys, values, strict=True):
            if (value.shape, value.dtype) != (values[0].shape, values[0].dtype):
                raise ValueError(
                    f"{site} has {list(values[0].shape)} {values[0].dtype} at {keys[0]}, but {list(value.shape)} "
                    f"{value.dtype} at {key}: fetch those of one shape; where text is padded to the longest of a batch "
                    "shapes depend on what shared it"
                )
        shared = self._find(site, keys[0]).n_rows == 0
        return torch.stack(values) if shared else torch.cat(values)

    def fetch_each(self, site: str, keys: Sequence[Key]) -> list[Tensor]:
        """The values of a site for some keys (episode, env_step, denoise_step), as `get` returns each.

        Raises as `get`.
        """
        return self._read(site, [self._find(site, key) for key in keys])

    def token_axes(self, episode: int, env_step: int, site: str, denoise_step: int | None = None) -> list[str]:
        """The axes of a value along which `segments` says who owns each token, in their order. Raises as `get`."""
        note = self._notes[self._find(site, (episode, env_step, denoise_step)).index]
        return [each for each in note["axes"][site] if each in note["token_axes"][site]]

    def segments(
        self, episode: int, env_step: int, site: str, denoise_step: int | None = None, axis: str | None = None
    ) -> Segments:
        """Who owns each token of a value, along one of its token axes (needed where there are several).

        Raises KeyError as `get`, ValueError for an axis that the site does not have or that is needed.
        """
        value = self._find(site, (episode, env_step, denoise_step))
        note, axes = self._notes[value.index], self.token_axes(episode, env_step, site, denoise_step)
        if axis is None and len(axes) == 1:
            axis = axes[0]
        if axis not in axes:
            raise ValueError(f"{site} has token axes {axes}: axis must be one of them, got {axis!r}")
        place = (value.index, value.segments[axes.index(axis)])
        if place not in self._tables:
            table = note["segments"][place[1]]
            with self._open(value.index) as file:
                labels = file.get_tensor(f"segments/{place[1]}")
            self._tables[place] = Segments(tuple(table["names"]), labels, table["row_axis"])
        return self._tables[place]

    def _find(self, site: str, key: Key) -> _Value:
        values = self._values(site)
        found = values.get(key)
        if found is not None:
            return found
        episode, env_step, step = key
        if is_denoised(site) != (step is not None):
            wants = (
                "belongs to a denoise step: say which" if step is None else "runs once a chunk: it has no denoise step"
            )
            raise KeyError(f"{site} {wants}")
        if episode not in {each[0] for each in values}:
            raise KeyError(f"episode {episode} is not recorded at {site}; recorded: {self.episodes[:20]}")
        there = sorted({each[1] for each in values if each[0] == episode})
        if env_step not in there:
            raise KeyError(
                f"{site} is not recorded at env_step {env_step} of episode {episode}; recorded: {there[:50]}"
            )
        steps = sorted(each[2] or 0 for each in values if each[:2] == (episode, env_step))
        raise KeyError(f"{site} is not recorded at denoise step {step} there; recorded: {steps}")

    def _values(self, site: str) -> dict[Key, _Value]:
        if site not in self.sites:
            raise KeyError(f"{site!r} is not recorded; nearest: {nearest(site, self.sites)}")
        if site not in self._by_site:
            found: dict[Key, _Value] = {}
            for path, note in self._notes.items():
                if site not in note["axes"]:
                    continue
                rows = self._rows(path)
                for row in rows.filter(pc.field("site") == site).to_pylist():
                    value = _Value(path, row["tensor"], row["row"], row["n_rows"], tuple(row["segments"]))
                    found[row["episode"], row["env_step"], row["denoise_step"]] = value
            self._by_site[site] = found
        return self._by_site[site]

    def _rows(self, path: Path) -> pa.Table:
        """The rows of an index file that belong to finished episodes."""
        session = self._notes[path]["session"]
        wanted = [episode for episode, number in self._finished if number == session]
        try:
            table = pq.ParquetFile(path).read()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
        return table.filter(pc.field("episode").isin(wanted)).replace_schema_metadata()

    def _read(self, site: str, values: Sequence[_Value]) -> list[Tensor]:
        """The values, each shard opened once."""
        found: dict[int, Tensor] = {}
        by_file: dict[Path, dict[str, list[int]]] = {}
        for i, value in enumerate(values):
            by_file.setdefault(value.index, {}).setdefault(value.tensor, []).append(i)
        for index, tensors in by_file.items():
            with self._open(index) as file:
                for name, places in tensors.items():
                    tensor, n = self._slice(file, index, site, name)
                    if len(places) * _FEW > n:
                        # most of it: one read instead of many
                        tensor = tensor[:]
                    for i in places:
                        found[i] = _rows(tensor, values[i], n, index, site)
        return [found[i] for i in range(len(values))]

    def _slice(self, file: Any, index: Path, site: str, name: str) -> tuple[Any, int]:
        """A tensor of a shard, to be cut, and its number of rows."""
        expected = self._notes[index]["shapes"].get(name)
        try:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
        except SafetensorError as error:
            raise ValueError(f"{shard_of(index)} does not hold {name!r}: {error}") from error
        if shape != expected:
            raise _apart(index, site, shape, expected)
        return tensor, shape[0]

    def _open(self, index: Path) -> Any:
        """A shard, opened."""
        path, expected = shard_of(index), self._notes[index]["shard_bytes"]
        if not path.is_file():
            raise ValueError(f"{path} is missing, but {index} names it")
        if (size := path.stat().st_size) != expected:
            raise ValueError(f"{path} is truncated or was changed: it has {size} bytes, its index says {expected}")
        try:
            return safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def _rows(tensor: Any, value: _Value, n: int, index: Path, site: str) -> Tensor:
    """A value's rows of the tensor that has it; n: rows of the tensor."""
    stop = value.row + max(value.n_rows, 1)
    if stop > n:
        raise _apart(index, site, n, f"{stop} rows at least")
    # a copy, where all of the tensor was read: the value must not keep the others alive
    rows = tensor[value.row : stop].clone() if isinstance(tensor, Tensor) else tensor[value.row : stop]
    return rows[0] if value.n_rows == 0 else rows


def _apart(index: Path, site: str, found: Any, expected: Any) -> ValueError:
    return ValueError(
        f"{shard_of(index)}: {site} has shape {found}, but its index says {expected}: the files do not belong together"
    )
