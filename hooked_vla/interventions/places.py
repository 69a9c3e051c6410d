"""Where edits land in a hook point's value: every value is looked at as [rows places channels].

rows: batch rows, or camera images or attention windows, of which each batch row has several. places: the token axis
(queries, for patterns), or the steps of an action chunk; one where there is none. channels: all that is left.
Masks are made on the CPU, from token segments, before the network runs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int32
from torch import Tensor

from hooked_vla.hooks.cache import ROW_AXES
from hooked_vla.hooks.point import HookPoint, SegmentTable
from hooked_vla.inputs import Segments
from hooked_vla.interventions.edits import Edit
from hooked_vla.interventions.where import Where
from hooked_vla.kernels.checks import wide

_PLACE_AXES = ("seq", "query", "prefix", "chunk")
_HEAD_AXES = ("n_heads", "n_kv_heads", "n_prefix_heads")
Size = int | str


@dataclass(frozen=True)
class Layout:
    """How the axes of a hook point are rows, places and channels. place: index of the place axis, if there is one."""

    name: str
    axes: tuple[str, ...]
    has_rows: bool
    place: int | None

    @classmethod
    def of(cls, point: HookPoint) -> "Layout":
        place = next((i for axis in _PLACE_AXES for i, each in enumerate(point.axes) if each == axis), None)
        return cls(point.name, point.axes, point.axes[0] in ROW_AXES, place)

    @property
    def channels(self) -> list[int]:
        """Indices of the channel axes."""
        return [i for i in range(self.has_rows, len(self.axes)) if i != self.place]

    def head_axis(self) -> int | None:
        return next((i for i in self.channels if self.axes[i] in _HEAD_AXES), None)

    def flatten(self, value: Float[Tensor, "..."]) -> Float[Tensor, "row place channel"]:
        """A view where the place axis comes first, as it does but for patterns and the like."""
        if not self.has_rows:
            value = value[None]
        place = None if self.place is None else self.place + (not self.has_rows)
        if place is None:
            return value.reshape(value.shape[0], 1, -1)
        if place != 1:
            value = value.movedim(place, 1)
        return value.reshape(value.shape[0], value.shape[1], -1)

    def restore(self, flat: Float[Tensor, "row place channel"], value: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Undo `flatten`; value: what was flattened. The result lies in memory as it does."""
        place = None if self.place is None else self.place + (not self.has_rows)
        if place is None or place == 1:
            restored = flat.reshape(value.shape)
        else:
            shape = value.shape if self.has_rows else (1, *value.shape)
            others = [size for i, size in enumerate(shape) if i not in (0, place)]
            moved = flat.reshape(shape[0], shape[place], *others).movedim(1, place)
            restored = moved.reshape(value.shape)
        if restored.stride() == value.stride():
            return restored
        # sums that read it would be made in another order, and round otherwise
        return torch.empty_like(value).copy_(restored)


@dataclass(frozen=True)
class Site:
    """A hook point as operators need it before any run.

    sizes: of its axes where the model fixes them, else their names. n_steps: denoise steps of the model, if known.
    """

    point: HookPoint
    layout: Layout
    sizes: tuple[Size, ...]
    n_steps: int | None
    dtype: torch.dtype
    device: torch.device

    @property
    def name(self) -> str:
        return self.layout.name

    @property
    def axes(self) -> str:
        return " ".join(self.layout.axes)

    @property
    def wide(self) -> torch.dtype:
        """What sums are made in."""
        return wide(self.dtype)

    @property
    def channel_shape(self) -> tuple[Size, ...]:
        return tuple(self.sizes[i] for i in self.layout.channels)

    @property
    def width(self) -> int | None:
        """Numbers that a place has; None where only a run knows."""
        sizes = [size for size in self.channel_shape if isinstance(size, int)]
        return prod(sizes) if len(sizes) == len(self.channel_shape) else None


@dataclass(frozen=True)
class Scene:
    """What decides, besides the edits, where they land at one hook point in one forward pass.

    sizes: of the value's axes. batch: rows of the batch. labels: stream -> who owns its places, on the CPU.
    """

    point: HookPoint
    layout: Layout
    sizes: tuple[int, ...]
    batch: int
    labels: Callable[[str], Segments]

    @property
    def rows(self) -> int:
        return self.sizes[0] if self.layout.has_rows else 1

    @property
    def places(self) -> int:
        return 1 if self.layout.place is None else self.sizes[self.layout.place]

    @property
    def width(self) -> int:
        """Numbers that a place has."""
        return prod(self.sizes[i] for i in self.layout.channels)

    def segments(self, wanted: Sequence[str], axis: str, label: str) -> Bool[Tensor, "row place"]:
        """The places along a token axis that belong to any of the segments; one row where all rows share the value.

        Raises ValueError for a segment that the stream does not have.
        """
        name, axes = self.layout.name, " ".join(self.layout.axes)
        if axis not in self.point.streams:
            raise ValueError(f"{label} {list(wanted)}: {name} ({axes}) has no token segments along {axis!r}")
        try:
            owners = self.labels(self.point.streams[axis])
            mask = torch.stack([owners.mask(each) for each in wanted]).any(0)
        except KeyError as error:
            raise ValueError(f"{label}: at {name}, {error.args[0]}") from error
        if self.layout.has_rows:
            return mask
        if not bool((mask == mask[:1]).all()):
            raise ValueError(f"{label} {list(wanted)}: all rows share {name}, but own different tokens of it")
        return mask[:1]

    def present(self) -> str:
        """The segments that have a place, for messages."""
        axis = None if self.layout.place is None else self.layout.axes[self.layout.place]
        if axis not in self.point.streams:
            return ""
        return f"; the stream has {self.labels(self.point.streams[axis]).present()}"


class Scenes:
    """The scenes of one forward pass. batch: rows of the batch."""

    def __init__(self, table: SegmentTable, batch: int) -> None:
        self.table, self.batch = table, batch
        self._labels: dict[str, Segments] = {}

    def labels(self, stream: str) -> Segments:
        """Raises KeyError for a stream that the model does not have."""
        if stream not in self._labels:
            self._labels[stream] = self.table[stream].to(torch.device("cpu"))
        return self._labels[stream]

    def scene(self, point: HookPoint, layout: Layout, sizes: Sequence[Size]) -> Scene:
        """The scene at a point; sizes: of its axes where the model fixes them, else their names.

        Raises ValueError where neither the model nor its token streams tell a size.
        """
        found = []
        for axis, size in zip(layout.axes, sizes, strict=True):
            if isinstance(size, int):
                found.append(size)
            elif axis in ROW_AXES:
                found.append(self._rows(point))
            elif axis in point.streams:
                found.append(self.labels(point.streams[axis]).labels.shape[1])
            else:
                raise ValueError(f"{layout.name} ({' '.join(layout.axes)}): how long {axis!r} is, only a run tells")
        return Scene(point, layout, tuple(found), self.batch, self.labels)

    def _rows(self, point: HookPoint) -> int:
        if point.axes[0] == "batch":
            return self.batch
        if point.axes[0] == "window":
            return len(self.labels(next(iter(point.streams.values()))).labels)
        try:
            # a tower for one camera sees fewer images than the whole pathway
            return len(self.labels(point.stream or point.pathway).labels)
        except KeyError:
            return len(self.labels(point.pathway).labels)


def token_mask(where: Where, scene: Scene, label: str) -> Bool[Tensor, "row place"]:
    """The places that an edit changes, whatever the clock says. label: what messages call the edit.

    Raises ValueError for an unknown segment, for positions and rows out of range, and where nothing is left.
    """
    layout = scene.layout
    mask = torch.ones(scene.rows, scene.places, dtype=torch.bool, device="cpu")
    if where.tokens is not None:
        assert layout.place is not None
        mask &= scene.segments(where.tokens, layout.axes[layout.place], f"{label}: tokens")
    if where.positions is not None:
        mask &= _chosen(where.positions, scene.places, f"{label}: positions", f"{layout.name} has places")
    if where.rows is not None:
        rows = _chosen(where.rows, scene.batch, f"{label}: rows", "the batch has rows")
        mask &= rows.repeat_interleave(scene.rows // scene.batch)[:, None]
    if not bool(mask.any()):
        raise ValueError(f"{label} reaches no value at {layout.name}: nothing is left of {where}{scene.present()}")
    return mask


def _chosen(wanted: Sequence[int], size: int, label: str, has: str) -> Bool[Tensor, " size"]:
    if wanted[-1] >= size:
        raise ValueError(f"{label} {[each for each in wanted if each >= size][:5]}: {has} 0..{size - 1}")
    chosen = torch.zeros(size, dtype=torch.bool, device="cpu")
    chosen[list(wanted)] = True
    return chosen


def channel_mask(where: Where, scene: Scene, label: str) -> Bool[Tensor, "#row channel"] | None:
    """The channels that heads, channels and keys choose, flattened; one row where they are the same in all. None: all.

    Raises ValueError for an unknown segment of keys.
    """
    if where.heads is None and where.channels is None and where.keys is None:
        return None
    layout = scene.layout
    chosen = {layout.head_axis(): where.heads, len(layout.axes) - 1: where.channels}
    mask = torch.ones(1, 1, dtype=torch.bool, device="cpu")
    for i in layout.channels:
        here = torch.ones(1, scene.sizes[i], dtype=torch.bool, device="cpu")
        if chosen.get(i) is not None:
            here = _chosen(chosen[i] or (), scene.sizes[i], label, f"{layout.name} has")[None]
        if layout.axes[i] == "key" and where.keys is not None:
            here = scene.segments(where.keys, "key", f"{label}: keys")
        mask = rearrange(mask[:, :, None] & here[:, None], "r before here -> r (before here)")
    return mask


def pair_tokens(mask: Bool[Tensor, "row place"], table: tuple[int, int], label: str) -> Int[Tensor, "row place"]:
    """Which entry of a source [R K channels], flattened to [R·K channels], each edited place takes; 0 elsewhere.

    R is 1, or the number of rows or of edited rows; K is 1, or the number of places or of each row's edited places.
    Raises ValueError for any other R and K.
    """
    n_rows, n_places = table
    edited = mask.any(1)
    rows, n_edited = len(mask), int(edited.sum())
    if n_rows == 1:
        row = torch.zeros(rows, dtype=torch.long, device="cpu")
    elif n_rows == rows:
        row = torch.arange(rows, device="cpu")
    elif n_rows == n_edited:
        row = edited.long().cumsum(0) - 1
    else:
        raise ValueError(f"{label}: source has {n_rows} rows, but {n_edited} of {rows} rows are edited")
    if n_places == mask.shape[1]:
        place = torch.arange(n_places, device="cpu").expand(rows, -1)
    elif n_places == 1:
        place = torch.zeros_like(mask, dtype=torch.long)
    else:
        counts = mask.sum(1)[edited]
        if bool((counts != n_places).any()):
            raise ValueError(
                f"{label}: source has {n_places} tokens, but rows have {counts.unique().tolist()} edited tokens of "
                f"{mask.shape[1]}"
            )
        place = mask.long().cumsum(1) - 1
    return (row[:, None] * n_places + place).masked_fill(~mask, 0)


def segment_numbers(
    where: Where, mask: Bool[Tensor, "row place"], scene: Scene, label: str
) -> tuple[Int32[Tensor, "row place"], int]:
    """Each edited place's segment, numbered over rows and, where tokens are named, over names; -1 elsewhere.

    A place that belongs to several of the names counts for the first one.
    """
    wanted = where.tokens or ("",)
    numbers = torch.full(mask.shape, -1, dtype=torch.int32, device="cpu")
    row = torch.arange(len(mask), dtype=torch.int32, device="cpu")[:, None] * len(wanted)
    for i, name in enumerate(wanted):
        here = mask & (numbers < 0)
        if name:
            here &= scene.segments([name], scene.layout.axes[scene.layout.place or 0], f"{label}: tokens")
        numbers = torch.where(here, row + i, numbers)
    return numbers, len(mask) * len(wanted)


def check_site(edit: Edit, label: str, site: Site) -> None:
    """Raises ValueError where the edit asks of a hook point what it does not have."""
    where, layout, axes = edit.where, site.layout, site.axes
    if not site.dtype.is_floating_point:
        raise ValueError(f"{label}: {site.name} holds {site.dtype}; edits change floating-point values")
    if where.rows is not None and not layout.has_rows:
        raise ValueError(f"{label}: rows: all rows share {site.name} ({axes}), so it cannot be edited for some")
    if where.tokens is not None and (layout.place is None or layout.axes[layout.place] == "chunk"):
        raise ValueError(f"{label}: tokens {list(where.tokens)}: {site.name} ({axes}) has no token segments")
    if where.positions is not None and layout.place is None:
        raise ValueError(f"{label}: positions: {site.name} ({axes}) has no places")
    if where.keys is not None and "key" not in layout.axes:
        raise ValueError(f"{label}: keys: {site.name} ({axes}) is no attention pattern")
    if where.heads is not None:
        axis = layout.head_axis()
        if axis is None:
            raise ValueError(f"{label}: heads: {site.name} ({axes}) has no heads")
        _check_indices(where.heads, site.sizes[axis], f"{label}: heads", site.name)
    if where.channels is not None:
        if len(layout.axes) - 1 not in layout.channels or not isinstance(site.sizes[-1], int):
            raise ValueError(f"{label}: channels: the last axis of {site.name} ({axes}) is not one of channels")
        _check_indices(where.channels, site.sizes[-1], f"{label}: channels", site.name)


def _check_indices(chosen: Sequence[int], size: Size, label: str, name: str) -> None:
    if isinstance(size, int) and chosen[-1] >= size:
        raise ValueError(f"{label} {[each for each in chosen if each >= size][:5]}: {name} has 0..{size - 1}")
