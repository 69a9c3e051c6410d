"""A ring of rows between a model that makes them forward pass by forward pass and autoencoders that want them shuffled.

The ring has `n_blocks` blocks, filled one after the other in the order in which rows come; a new block takes the place
of the oldest. A block's rows are cut at random into `n_blocks` slices, and while block w is the newest, what is handed
out is slice 0 of it, slice 1 of the one before, and so on, shuffled: a window. So a row comes at most once, among rows
of `n_blocks` successive blocks; the first batch comes when one block is full; and all state is where the oldest block
began in the stream, which is run again to resume.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hooked_vla.sae.source import Batch, check_positive, check_same, shuffled

CAPACITY = 2**20
N_BLOCKS = 8
# where a stream stands: how many units (groups of episodes) are over, and how many forward passes of the present one
Position = tuple[int, int]
# of every forward pass: where the stream stands before it, and the rows of every site
Stream = Iterator[tuple[Position, dict[str, Tensor]]]


class RingBuffer:
    """Shuffled rows of several sites from one stream of forward passes: a `Source`, see source.py.

    stream(position): the forward passes from there on, the same whenever it is called; where it ends, so do batches.
    widths: site -> d. groups: sites whose rows of a forward pass belong together. capacity: rows of each site; a block
    (an n_blocks-th of it) must hold what one forward pass brings. dtype, device: of the ring.

    A block ends where one of the groups has no room for the next forward pass; of groups that bring more rows than
    others, a random part is handed out.
    """

    def __init__(
        self,
        stream: Callable[[Position], Stream],
        widths: Mapping[str, int],
        groups: Sequence[Sequence[str]],
        seed: int,
        capacity: int = CAPACITY,
        n_blocks: int = N_BLOCKS,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        """Raises ValueError for numbers below 1, a capacity that n_blocks does not divide, and groups that do not hold
        every site once."""
        grouped = [site for sites in groups for site in sites]
        if sorted(grouped) != sorted(widths):
            raise ValueError(f"the groups hold {grouped}, but the widths are of {list(widths)}")
        check_positive("capacity", capacity)
        check_positive("n_blocks", n_blocks)
        if capacity % n_blocks:
            raise ValueError(f"a buffer of {capacity} rows cannot be cut into {n_blocks} blocks of one size")
        self.widths: Mapping[str, int] = dict(widths)
        self.groups: Sequence[Sequence[str]] = [list(sites) for sites in groups]
        self.seed, self.capacity, self.n_blocks, self.dtype = seed, capacity, n_blocks, dtype
        self.block_rows, self.device = capacity // n_blocks, torch.device(device)
        self._make = stream
        self._stream: Stream | None = None
        self._ring: dict[str, Tensor] = {}
        self._stand(0, 0, (0, 0))

    @property
    def n_bytes(self) -> int:
        """Memory of the full ring:

        capacity x (sum over sites of d x bytes a number + 8 x groups) + 8 x groups x capacity / n_blocks

        for rows, the order of every block, and that of the window. Besides, there are one forward pass and one batch.
        """
        orders = 8 * len(self.groups) * (self.capacity + self.block_rows)
        return self.capacity * sum(self.widths.values()) * self.dtype.itemsize + orders

    def sample(self, n: int) -> dict[str, Float[Tensor, "n d"]]:
        """See `Source.sample`; of the stream's first block, which is run again where the ring has gone on."""
        check_positive("n", n)
        if not self._blocks and self._window == 0:
            self._enter()
        if 0 not in self._blocks:
            with _Closing(RingBuffer(
                self._make, self.widths, self.groups, self.seed, self.block_rows, 1, self.dtype, self.device
            )) as first:  # fmt: skip
                return first.sample(n)
        orders = self._blocks[0][1]
        return {
            site: self._ring[site][order[:n]]
            for sites, order in zip(self.groups, orders, strict=True)
            for site in sites
        }

    def batches(self, batch_size: int) -> Iterator[dict[str, Float[Tensor, "n d"]]]:
        """See `Source.batches`; the last one of a stream that ends may be smaller.

        Raises what the stream raises; ValueError where a forward pass has more rows than a block, or a site has none.
        """
        check_positive("batch_size", batch_size)
        return self._batches(batch_size)

    def state_dict(self) -> dict[str, Any]:
        oldest = self._blocks[min(self._blocks)][0] if self._blocks else self._oldest
        place = {"window": self._window, "taken": self._taken, "oldest": list(oldest)}
        return {**self._made(), **place, "over": self._over and not self._blocks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See `Source.load_state_dict`; the next batch then waits until the ring is filled again."""
        check_same("RingBuffer", state, self._made())
        unit, forward = state["oldest"]
        self._stand(int(state["window"]), int(state["taken"]), (int(unit), int(forward)))
        self._over = bool(state["over"])

    def close(self) -> None:
        """End the stream; a later batch would go on with it."""
        state = self.state_dict()
        self.load_state_dict(state)

    def _made(self) -> dict[str, Any]:
        groups = [list(sites) for sites in self.groups]
        return {"seed": self.seed, "capacity": self.capacity, "n_blocks": self.n_blocks, "groups": groups}

    def _stand(self, window: int, taken: int, oldest: Position) -> None:
        """Be at a place, with nothing loaded."""
        close = getattr(self._stream, "close", None)
        if close is not None:
            close()
        self._stream, self._pending = None, None
        self._window, self._taken, self._oldest, self._over = window, taken, oldest, False
        # block -> where it begins in the stream, and its rows in the ring, shuffled, of every group
        self._blocks: dict[int, tuple[Position, list[Tensor]]] = {}
        self._orders: list[Tensor] = []

    def _batches(self, batch_size: int) -> Iterator[Batch]:
        while True:
            parts: list[Batch] = []
            missing = batch_size
            while missing and self._ready():
                span = slice(self._taken, self._taken + missing)
                rows = {
                    site: self._ring[site][order[: self._n_window][span]]
                    for sites, order in zip(self.groups, self._orders, strict=True)
                    for site in sites
                }
                n = len(next(iter(rows.values())))
                parts.append(rows)
                self._taken, missing = self._taken + n, missing - n
            if not parts:
                return
            yield parts[0] if len(parts) == 1 else {s: torch.cat([part[s] for part in parts]) for s in self.widths}

    @property
    def _n_window(self) -> int:
        return min(map(len, self._orders), default=0)

    def _ready(self) -> bool:
        """Whether the window has rows left, after the next one was entered if need be."""
        if not self._orders and not self._enter():
            return False
        while self._taken >= self._n_window:
            self._window, self._taken = self._window + 1, 0
            if not self._enter():
                return False
        return True

    def _enter(self) -> bool:
        """Load the blocks of the present window, and draw its order; False where nothing is left."""
        first = max(0, self._window - self.n_blocks + 1)
        for block in range(max(first, max(self._blocks, default=first - 1) + 1), self._window + 1):
            if not self._over:
                self._load(block)
        self._blocks = {block: each for block, each in self._blocks.items() if block >= first}
        self._orders = []
        if not self._blocks:
            return False
        orders = []
        for number in range(len(self.groups)):
            slices = [
                _slice(each[1][number], self._window - block, self.n_blocks) for block, each in self._blocks.items()
            ]
            rows = torch.cat(slices)
            order = shuffled(len(rows), self.seed, self._draw(self._window, number, 1))
            orders.append(rows[order.to(self.device)])
        self._orders = orders
        return True

    def _load(self, block: int) -> None:
        """Fill a block; where the stream has ended, there is none."""
        self._blocks.pop(block - self.n_blocks, None)
        offset = block % self.n_blocks * self.block_rows
        lengths = [0] * len(self.groups)
        began: Position | None = None
        while (forward := self._peek()) is not None:
            position, rows = forward
            sizes = [len(rows[sites[0]]) for sites in self.groups]
            if any(length + size > self.block_rows for length, size in zip(lengths, sizes, strict=True)):
                if began is None:
                    raise ValueError(
                        f"one forward pass brings {max(sizes)} rows, but a block of the buffer holds "
                        f"{self.block_rows}: its capacity must be at least {self.n_blocks * max(sizes)}"
                    )
                break
            began, self._pending = began or position, None
            for number, sites in enumerate(self.groups):
                at = offset + lengths[number]
                for site in sites:
                    self._place(site)[at : at + sizes[number]].copy_(rows[site])
                lengths[number] += sizes[number]
        self._over = self._pending is None
        if began is None:
            return
        if empty := [sites[0] for sites, length in zip(self.groups, lengths, strict=True) if not length]:
            raise ValueError(f"no rows of {empty} came with {max(lengths)} rows of other sites: nothing to train on")
        orders = [shuffled(length, self.seed, self._draw(block, number, 0)) for number, length in enumerate(lengths)]
        self._blocks[block] = began, [(offset + order).to(self.device) for order in orders]

    def _peek(self) -> tuple[Position, dict[str, Tensor]] | None:
        """The next forward pass, which stays the next until `_pending` is cleared; None at the end."""
        if self._stream is None:
            self._stream = self._make(self._oldest)
        if self._pending is None:
            self._pending = next(self._stream, None)
        return self._pending

    def _place(self, site: str) -> Tensor:
        if site not in self._ring:
            shape = self.capacity, self.widths[site]
            self._ring[site] = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._ring[site]

    def _draw(self, number: int, group: int, kind: int) -> int:
        return (number * len(self.groups) + group) * 2 + kind


class _Closing:
    """A ring that is closed, and its memory let go, at the end of a block."""

    def __init__(self, ring: RingBuffer) -> None:
        self.ring = ring

    def __enter__(self) -> RingBuffer:
        return self.ring

    def __exit__(self, *_: object) -> None:
        self.ring.close()


def _slice(rows: Int64[Tensor, " n"], number: int, of: int) -> Int64[Tensor, " part"]:
    """One of the parts that rows are cut into, as equal as can be."""
    return rows[len(rows) * number // of : len(rows) * (number + 1) // of]
