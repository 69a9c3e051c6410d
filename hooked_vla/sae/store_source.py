"""Training from a store: runs of 256 successive rows in random order, mixed in memory.

A pool takes the next runs of a pass through the store, of a permutation of all its runs, and hands out their rows in
random order. Reading is sequential within a run, and what is held is the pool:

pool_rows x (sum over sites of d x bytes a number + 8 x groups), and 8 bytes for every run of the store

and 8 bytes for every row that was chosen with `where`, 16 more with `previous`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hooked_vla.hooks.names import NamesFilter, resolve
from hooked_vla.sae.rows import IDS, NONE
from hooked_vla.sae.source import PREVIOUS, Batch, check_positive, check_same, shuffled
from hooked_vla.sae.store import TokenStore

RUN_ROWS = 256
POOL_ROWS = 65_536


class StoreSource:
    """Rows of a store: a `Source`, see source.py.

    sites: name, glob, ...; all where None. passes: through the store, None for endless. where: only rows with these
    ids, see `TokenStore.find`. previous: each site also comes as it was one planning step before, under its name with
    PREVIOUS behind it; rows that have no earlier one are left out. shuffle False: in the order of the store. dtype: of
    the batches. Groups of sites go through their rows on their own; a limited source ends with the first that is
    through, and its last batch may be smaller.
    """

    def __init__(
        self,
        store: TokenStore,
        sites: NamesFilter = None,
        seed: int = 0,
        passes: int | None = None,
        where: Mapping[str, Collection[int | str]] | None = None,
        previous: bool = False,
        shuffle: bool = True,
        pool_rows: int = POOL_ROWS,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Raises KeyError for sites or names that the store does not have, ValueError where no rows are left, a pool
        smaller than a run, and passes below 1."""
        if passes is not None:
            check_positive("passes", passes)
        if pool_rows < RUN_ROWS:
            raise ValueError(f"pool_rows must be at least {RUN_ROWS}, the rows of a run, got {pool_rows}")
        self.store, self.seed, self.passes, self.dtype = store, seed, passes, dtype
        chosen = resolve(sites, store.sites)
        self._readers: list[_Reader] = []
        for group in store.groups:
            if own := [site for site in group if site in chosen]:
                rows = _selected(store, own[0], where, previous)
                number = len(self._readers)
                self._readers.append(_Reader(store, own, rows, seed, number, passes, shuffle, pool_rows // RUN_ROWS))
        self._asked = {
            "sites": [site for reader in self._readers for site in reader.names], "seed": seed, "passes": passes,
            "shuffle": shuffle, "pool_rows": pool_rows, "n_rows": [reader.n_rows for reader in self._readers],
        }  # fmt: skip

    @property
    def widths(self) -> Mapping[str, int]:
        return {
            name: self.store.widths[name.removesuffix(PREVIOUS)] for reader in self._readers for name in reader.names
        }

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        return [list(reader.names) for reader in self._readers]

    @property
    def n_rows(self) -> Mapping[str, int]:
        """Rows of one pass, by site."""
        return {name: reader.n_rows for reader in self._readers for name in reader.names}

    @property
    def n_bytes(self) -> int:
        """Of the pools and what says which rows are read; see the formula above."""
        return sum(reader.n_bytes for reader in self._readers)

    def sample(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """See `Source.sample`; drawn from the whole store."""
        check_positive("n", n)
        found: Batch = {}
        for reader in self._readers:
            found |= reader.sample(n)
        return {name: values.to(self.dtype) for name, values in found.items()}

    def batches(self, batch_size: int) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
        """See `Source.batches`."""
        check_positive("batch_size", batch_size)
        return self._batches(batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {**self._asked, "places": [[reader.number, reader.pool, reader.row] for reader in self._readers]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Source.load_state_dict`."""
        check_same("StoreSource", state, self._asked)
        for reader, (number, pool, row) in zip(self._readers, state["places"], strict=True):
            reader.stand(int(number), int(pool), int(row))

    def _batches(self, batch_size: int) -> Iterator[Batch]:
        while True:
            batch: Batch = {}
            for reader in self._readers:
                batch |= reader.take(batch_size)
            n = min(map(len, batch.values()))
            if not n:
                return
            yield {name: values[:n].to(self.dtype) for name, values in batch.items()}


class _Reader:
    """Goes through the rows of one group. names: of its sites, and of these one step before; number: of the pass."""

    def __init__(
        self,
        store: TokenStore,
        sites: Sequence[str],
        rows: tuple[Int64[Tensor, " n"] | None, Int64[Tensor, " n"] | None],
        seed: int,
        group: int,
        passes: int | None,
        shuffle: bool,
        pool_runs: int,
    ) -> None:
        self.store, self.sites, self.seed, self.group = store, list(sites), seed, group
        self.passes, self.shuffle, self.pool_runs = passes, shuffle, pool_runs
        self.rows, self.earlier = rows
        self.n_rows = store.n_rows(sites[0]) if self.rows is None else len(self.rows)
        if not self.n_rows:
            raise ValueError(f"no rows of {sites[0]} in {store.folder} are left to read")
        self.n_runs = -(-self.n_rows // RUN_ROWS)
        self.n_pools = -(-self.n_runs // pool_runs)
        self._held: Batch = {}
        self._order = torch.empty(0, dtype=torch.int64)
        self._runs: tuple[int, Tensor] | None = None
        self.stand(0, 0, 0)

    @property
    def names(self) -> list[str]:
        return self.sites + ([] if self.earlier is None else [site + PREVIOUS for site in self.sites])

    @property
    def n_bytes(self) -> int:
        pool = min(self.pool_runs * RUN_ROWS, self.n_rows)
        numbers = sum(self.store.widths[site] * self.store.dtype(site).itemsize for site in self.sites)
        chosen = sum(0 if each is None else 8 * len(each) for each in (self.rows, self.earlier))
        return pool * (numbers * len(self.names) // len(self.sites) + 8) + 8 * self.n_runs + chosen

    def stand(self, number: int, pool: int, row: int) -> None:
        """Be at a row of a pool of a pass."""
        self.number, self.pool, self.row = number, pool, row
        self._loaded: tuple[int, int] | None = None

    def take(self, n: int) -> Batch:
        """The next n rows; fewer where the last pass ends."""
        parts: list[Batch] = [{name: self._empty(name) for name in self.names}]
        while n and (self.passes is None or self.number < self.passes):
            self._load()
            order = self._order[self.row : self.row + n]
            parts.append({name: held[order] for name, held in self._held.items()})
            self.row, n = self.row + len(order), n - len(order)
            if self.row == len(self._order):
                self.pool, self.row = self.pool + 1, 0
                if self.pool == self.n_pools:
                    self.number, self.pool = self.number + 1, 0
        if len(parts) == 2:
            return parts[1]
        return {name: torch.cat([part[name] for part in parts]) for name in self.names}

    def sample(self, n: int) -> Batch:
        """n rows drawn from all, without repeats."""
        if n >= self.n_rows:
            chosen = torch.arange(self.n_rows)
        else:
            draw = np.random.default_rng((self.seed, self.group))
            chosen = torch.from_numpy(draw.choice(self.n_rows, n, replace=False, shuffle=False)).sort().values
        return self._read(chosen)

    def _load(self) -> None:
        """Have the present pool in memory."""
        if self._loaded == (self.number, self.pool):
            return
        runs = self._run_order()[self.pool * self.pool_runs : (self.pool + 1) * self.pool_runs]
        self._fill(runs)
        n = len(next(iter(self._held.values())))
        self._order = torch.arange(n)
        if self.shuffle:
            self._order = shuffled(n, self.seed, self._draw(self.number * self.n_pools + self.pool, 1))
        self._loaded = self.number, self.pool

    def _fill(self, runs: Int64[Tensor, " run"]) -> None:
        starts = (runs * RUN_ROWS).tolist()
        lengths = [min(RUN_ROWS, self.n_rows - start) for start in starts]
        if self.rows is not None:
            self._held = {}
            spans = [torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)]
            self._held = self._read(torch.cat(spans))
            return
        n = sum(lengths)
        for site in self.sites:
            if site not in self._held or len(self._held[site]) != n:
                self._held[site] = torch.empty(n, self.store.widths[site], dtype=self.store.dtype(site))
            at = 0
            for start, length in zip(starts, lengths, strict=True):
                self.store.copy(site, start, self._held[site][at : at + length])
                at += length

    def _read(self, places: Int64[Tensor, " n"]) -> Batch:
        """Rows by their place among the chosen ones."""
        rows = places if self.rows is None else self.rows[places]
        found = {site: self.store.read(site, rows) for site in self.sites}
        if self.earlier is not None:
            found |= {site + PREVIOUS: self.store.read(site, self.earlier[places]) for site in self.sites}
        return found

    def _run_order(self) -> Int64[Tensor, " run"]:
        if self._runs is None or self._runs[0] != self.number:
            order = torch.arange(self.n_runs)
            if self.shuffle:
                order = shuffled(self.n_runs, self.seed, self._draw(self.number, 0))
            self._runs = self.number, order
        return self._runs[1]

    def _empty(self, name: str) -> Tensor:
        site = name.removesuffix(PREVIOUS)
        return torch.empty(0, self.store.widths[site], dtype=self.store.dtype(site))

    def _draw(self, number: int, kind: int) -> int:
        return (number * len(self.store.groups) + self.group) * 2 + kind


def _selected(
    store: TokenStore, site: str, where: Mapping[str, Collection[int | str]] | None, previous: bool
) -> tuple[Int64[Tensor, " n"] | None, Int64[Tensor, " n"] | None]:
    """Numbers of the rows to read, None for all, and of the same tokens one planning step before, None where nobody
    asks."""
    rows = None if where is None else store.find(site, where)
    if not previous:
        return rows, None
    earlier = _one_before(store, site)
    rows = torch.arange(store.n_rows(site)) if rows is None else rows
    rows = rows[earlier[rows] != NONE]
    return rows, earlier[rows]


def _one_before(store: TokenStore, site: str) -> Int64[Tensor, " n"]:
    """For every row, the number of the row that is the same token one planning step before; NONE where none is."""
    ids = store.ids(site).numpy()
    same = [ids[:, IDS.index(column)] for column in IDS if column != "env_step"]
    order = np.lexsort([ids[:, IDS.index("env_step")], *same])
    follows = np.ones(max(len(order) - 1, 0), dtype=bool)
    for column in same:
        follows &= column[order[1:]] == column[order[:-1]]
    earlier = np.full(len(ids), NONE, dtype=np.int64)
    earlier[order[1:][follows]] = order[:-1][follows]
    return torch.from_numpy(earlier)
