"""Where training takes its activations from: batches of rows, for several sites from one pass over the model.

A row is one token's activation (or a mean over tokens), of width d. Rows come shuffled, the same for the same seed,
and go on exactly where they stopped: `state_dict` after a batch, loaded into a source made alike, gives the batch that
would have come next. Nothing is normalised here.

Sites that share their tokens (the layers of one stream) are a group: row i of a batch is the same token at all of
them, as a transcoder needs. A site's name with PREVIOUS behind it is the same token one planning step before, as a
temporal autoencoder needs; it is in the group of its site.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

PREVIOUS = "@previous"
Batch = dict[str, Tensor]
# apart from the seeds of passes, which count from 0
_SAMPLE = -1


@runtime_checkable
class Source(Protocol):
    """What training needs of a source; any object with these will do.

    widths: site -> d. groups: sites whose rows belong together; every site is in exactly one.
    """

    @property
    def widths(self) -> Mapping[str, int]: ...

    @property
    def groups(self) -> Sequence[Sequence[str]]: ...

    def sample(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """Rows for normalisation and initialisation: the same every time; batches come as if nobody had asked.

        At most n of each site: fewer where there are fewer. Raises ValueError for n below 1.
        """
        ...

    def batches(self, batch_size: int) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
        """Batches of batch_size rows of every site, from where the source stands; endless unless the source says so.

        Raises ValueError for batch_size below 1.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where the source stands, after the last batch that was taken: numbers, strings and tensors."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where another source stood; iterators from before go on from there.

        Raises ValueError for the state of a source that was made differently.
        """
        ...


class TensorSource:
    """Activations that are in memory, one tensor a site; row i is the same token in all of them.

    Every pass goes through all rows in an order of its own, drawn from the seed (as they stand with shuffle=False).
    passes: how many there are, None for endless; the last batch of a limited source may be smaller.
    """

    def __init__(
        self,
        tensors: Mapping[str, Float[Tensor, "n d"]],
        seed: int = 0,
        passes: int | None = None,
        shuffle: bool = True,
    ) -> None:
        """Raises ValueError for no tensors, no rows, other shapes than [n d] with one n, passes below 1, and values
        that are not finite floating numbers."""
        if not tensors:
            raise ValueError("a source needs a tensor for at least one site")
        if passes is not None:
            check_positive("passes", passes)
        for site, tensor in tensors.items():
            if tensor.ndim != 2 or not tensor.numel() or not tensor.is_floating_point():
                raise ValueError(
                    f"{site}: activations must be floating [n d] with n, d > 0, got {tensor.dtype} {list(tensor.shape)}"
                )
            check_finite(site, tensor)
        lengths = {site: len(tensor) for site, tensor in tensors.items()}
        if len(set(lengths.values())) > 1:
            raise ValueError(f"all sites need the same number of rows, got {lengths}")
        self.tensors = {site: tensor.detach() for site, tensor in tensors.items()}
        self.seed, self.passes, self.shuffle = seed, passes, shuffle
        self.n_rows = next(iter(lengths.values()))
        self._pass = self._row = 0
        self._orders: dict[int, Tensor] = {}

    @property
    def widths(self) -> Mapping[str, int]:
        return {site: tensor.shape[1] for site, tensor in self.tensors.items()}

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        return [list(self.tensors)]

    def sample(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """See `Source.sample`."""
        check_positive("n", n)
        chosen = shuffled(self.n_rows, self.seed, _SAMPLE)[:n]
        return self._rows(chosen)

    def batches(self, batch_size: int) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
        """See `Source.batches`; a batch of an endless source may go over the end of a pass."""
        check_positive("batch_size", batch_size)
        return self._batches(batch_size)

    def state_dict(self) -> dict[str, Any]:
        return {"n_rows": self.n_rows, "seed": self.seed, "pass": self._pass, "row": self._row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Source.load_state_dict`."""
        check_same("TensorSource", state, {"n_rows": self.n_rows, "seed": self.seed})
        self._pass, self._row = int(state["pass"]), int(state["row"])

    def _batches(self, batch_size: int) -> Iterator[Batch]:
        while len(rows := self._take(batch_size)):
            yield self._rows(rows)

    def _take(self, n: int) -> Int64[Tensor, " n"]:
        """Numbers of the next n rows."""
        taken: list[Tensor] = [torch.empty(0, dtype=torch.int64)]
        while n and (self.passes is None or self._pass < self.passes):
            part = self._order()[self._row : self._row + n]
            taken.append(part)
            n, self._row = n - len(part), self._row + len(part)
            if self._row == self.n_rows:
                self._pass, self._row = self._pass + 1, 0
        return torch.cat(taken)

    def _order(self) -> Int64[Tensor, " n_rows"]:
        if self._pass not in self._orders:
            order = shuffled(self.n_rows, self.seed, self._pass) if self.shuffle else torch.arange(self.n_rows)
            self._orders = {self._pass: order}
        return self._orders[self._pass]

    def _rows(self, rows: Int64[Tensor, " n"]) -> Batch:
        return {site: tensor[rows.to(tensor.device)] for site, tensor in self.tensors.items()}


def shuffled(n: int, seed: int, number: int) -> Int64[Tensor, " n"]:
    """The numbers below n in an order drawn from a seed; number: which order, of many that have nothing in common."""
    # a generator's seed has 64 bits; the constant (2⁶⁴/φ, made odd: Knuth's multiplicative hashing) keeps pairs apart
    mixed = (seed * 0x9E3779B97F4A7C15 + number + 1) % 2**63
    return torch.randperm(n, generator=torch.Generator().manual_seed(mixed))


def check_positive(name: str, value: int) -> None:
    """Raises ValueError for a number below 1."""
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def check_finite(site: str, rows: Float[Tensor, "n d"]) -> None:
    """Raises ValueError naming the site and the first row that holds NaN or infinity."""
    # the sum is finite only where every number is; that the sum of finite numbers overflows is ruled out below
    if bool(rows.sum(dtype=torch.float64).isfinite()):
        return
    bad = (~rows.isfinite()).any(1).nonzero()
    if len(bad):
        row = int(bad[0])
        channel = int((~rows[row].isfinite()).nonzero()[0])
        raise ValueError(
            f"{site}: {len(bad)} of {len(rows)} rows are not finite, first row {row}, channel {channel}: "
            f"{float(rows[row, channel])}"
        )


def check_same(what: str, state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError where a state is not that of a source that was made like this one, naming what differs."""
    differ = {
        key: (state.get(key, "nothing"), value) for key, value in own.items() if key not in state or state[key] != value
    }
    if differ:
        named = ", ".join(f"{key} {theirs!r} instead of {ours!r}" for key, (theirs, ours) in differ.items())
        raise ValueError(f"{what}: the state is of a source made differently: {named}")
