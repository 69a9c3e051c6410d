"""Activations of one run: a dictionary from hook name to tensor that knows its axes, rows, steps and token segments.

A tensor that several points share is held once: the later names are aliases, so `cache[name]` answers to all of
them while `cache.keys()` lists each tensor once. Entries of the expert have a leading denoise axis; its steps are
stacked when first asked for.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.point import SegmentTable
from hooked_vla.inputs import Segments

TOKEN_AXES = ("seq", "query", "key", "prefix")
ROW_AXES = ("batch", "image", "window")


if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from hooked_vla.hooks.attention_view import CircuitsVisAttention

    class Activation(Tensor):
        """A cached tensor: an ordinary torch.Tensor that carries three attributes."""

        site: str
        axes: tuple[str, ...]

        def segment(
            self, name: str | Mapping[str, str], axis: str | None = None, pad_value: float | None = None
        ) -> Tensor:
            """See SegmentView."""
            ...

else:
    # instance attributes rather than a subclass: a subclass would not pass through torch.compile
    Activation = Tensor


class SegmentView:
    """`activation.segment(...)`: the positions of one token segment of a cached tensor."""

    def __init__(self, tensor: Tensor, site: str, entry: "Entry", table: SegmentTable) -> None:
        self._tensor, self._site, self._entry, self._table = tensor, site, entry, table

    def __call__(
        self, name: str | Mapping[str, str], axis: str | None = None, pad_value: float | None = None
    ) -> Tensor:
        """The tokens of the segment, other axes unchanged.

        name: "language", "image:top", "image:*", ..., or for a pattern a segment per axis:
        {"query": "action", "key": "language"}. axis: which token axis, needed where there are several and one name.
        Rows whose segments differ in length are padded on the right with pad_value. In streams with a row per
        camera image, rows without the segment are left out.
        Raises KeyError for an unknown segment, ValueError where an axis or pad_value is needed or there are no rows.
        """
        wanted = name if isinstance(name, Mapping) else {self._token_axis(axis): name}
        row_dim = next((i for i, each in enumerate(self._entry.axes) if each in ROW_AXES), None)
        if row_dim is None:
            raise ValueError(f"{self._site} has axes {self._entry.axes}: no rows whose tokens could differ")
        tables = {each: self._table[self._entry.streams[self._token_axis(each)]] for each in wanted}
        positions = {each: tables[each].positions(segment) for each, segment in wanted.items()}
        partial = all(table.row_axis != "batch" for table in tables.values())
        everywhere = range(self._tensor.shape[row_dim])
        rows = [i for i in everywhere if not partial or all(len(p[i]) for p in positions.values())]
        parts = [self._tensor.select(row_dim, i) for i in rows]
        for each, found in positions.items():
            dim, lengths = self._entry.axes.index(each) - 1, [len(found[i]) for i in rows]
            parts = [part.index_select(dim, found[i].to(part.device)) for part, i in zip(parts, rows, strict=True)]
            if len(set(lengths)) > 1:
                if pad_value is None:
                    raise ValueError(
                        f"segment {wanted[each]!r} of {self._site} has {lengths} tokens in rows {rows}; "
                        "pass pad_value= to pad them to one length, or slice the cache by row first"
                    )
                parts = [_pad_to(part, dim, max(lengths), pad_value) for part in parts]
        return torch.stack(parts, dim=row_dim)

    def __reduce__(self) -> tuple[Any, ...]:
        # a saved or copied tensor leaves its run behind
        return (_no_segments, ())

    def _token_axis(self, axis: str | None) -> str:
        choices = sorted(self._entry.streams)
        if axis is None and len(choices) == 1:
            return choices[0]
        if axis not in choices:
            raise ValueError(f"{self._site} has axes {self._entry.axes}: pass axis=, one of its token axes {choices}")
        return axis


def _no_segments() -> None:
    return None


def _pad_to(part: Tensor, dim: int, length: int, value: float) -> Tensor:
    missing = list(part.shape)
    missing[dim] = length - part.shape[dim]
    return torch.cat([part, part.new_full(missing, value)], dim=dim)


@dataclass(frozen=True)
class Entry:
    """What is known of one cached tensor besides its values. steps: the denoise steps along its leading axis."""

    axes: tuple[str, ...]
    streams: Mapping[str, str]
    steps: tuple[int, ...] | None


@dataclass
class ActivationCache(Mapping[str, Activation]):
    """Name -> Activation, each tensor once.

    Made by `run_with_cache` or `load`. order has all points of the model, cached or not. batch_size is the number of
    batch rows (an "image" axis has one row per batch row and camera). Gradients of a run with `incl_bwd` stand under
    `<name>_grad`, as in TransformerLens.
    """

    parts: dict[str, list[Tensor]]
    entries: dict[str, Entry]
    aliases: dict[str, str]
    batch_size: int
    segments: SegmentTable = field(repr=False)
    order: tuple[str, ...] = field(repr=False)

    def __getitem__(self, name: str) -> Activation:
        """Raises KeyError with the nearest cached names."""
        name = self.aliases.get(name, name)
        if name not in self.parts:
            raise KeyError(f"{name!r} is not cached; nearest: {hook_names.nearest(name, self.parts)}")
        entry, stored = self.entries[name], self._tensor(name)
        # a view of its own: attributes on the stored tensor would refer back to it and keep it alive
        activation: Any = stored.view_as(stored)
        activation.site, activation.axes = name, entry.axes
        activation.segment = SegmentView(stored, name, entry, self.segments)
        return activation

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __contains__(self, name: object) -> bool:
        return name in self.parts or name in self.aliases

    def __repr__(self) -> str:
        return f"ActivationCache({len(self)} tensors, {self.nbytes / 1e6:.1f} MB, batch size {self.batch_size})"

    def _tensor(self, name: str) -> Tensor:
        parts, entry = self.parts[name], self.entries[name]
        if entry.steps is None:
            return parts[0]
        if len(parts) == 1:
            # one tensor served every step: shown along the denoise axis without being copied
            return parts[0].expand(len(entry.steps), *parts[0].shape)
        if not isinstance(parts, _Stacked):
            self.parts[name] = parts = _Stacked(parts)
        return parts.stacked

    @property
    def nbytes(self) -> int:
        """Bytes held, shared memory counted once."""
        seen: dict[tuple[str, int], int] = {}
        for parts in self.parts.values():
            for part in [parts.stacked] if isinstance(parts, _Stacked) else parts:
                seen[str(part.device), part.data_ptr()] = part.numel() * part.element_size()
        return sum(seen.values())

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> "ActivationCache":
        """A copy on another device, or of another floating dtype; what is there already is shared."""
        return self._map(lambda t, _: t.to(device=device, dtype=dtype if t.is_floating_point() else None))

    def cpu(self) -> "ActivationCache":
        """A copy in host memory."""
        return self.to("cpu")

    def detach(self) -> "ActivationCache":
        """The same values without their autograd graph."""
        return self._map(lambda t, _: t.detach())

    def _map(self, fn: Callable[[Tensor, Entry], Tensor]) -> "ActivationCache":
        done: dict[int, Tensor] = {}
        parts = {}
        for name, tensors in self.parts.items():
            for tensor in tensors:
                if id(tensor) not in done:
                    done[id(tensor)] = fn(tensor, self.entries[name])
            parts[name] = [done[id(tensor)] for tensor in tensors]
        return replace(self, parts=parts)

    def rows(self, rows: int | Sequence[int] | slice) -> "ActivationCache":
        """Some batch rows only, segments included; the batch axis stays. Booleans are a mask.

        Raises IndexError for a row that is not there.
        """
        wanted = _indices(rows, self.batch_size)

        def cut(tensor: Tensor, entry: Entry) -> Tensor:
            axes = entry.axes[1:] if entry.steps is not None else entry.axes
            dim = next((i for i, axis in enumerate(axes) if axis in ROW_AXES), None)
            if dim is None:
                return tensor
            return tensor.index_select(dim, _stream_rows(tensor.shape[dim], self.batch_size, wanted, tensor.device))

        def cut_segments() -> dict[str, Segments]:
            streams = {s for entry in self.entries.values() for s in entry.streams.values()}
            table = {stream: self.segments[stream] for stream in streams}
            return {
                stream: each.rows(_stream_rows(len(each.labels), self.batch_size, wanted, "cpu").tolist())
                for stream, each in table.items()
            }

        mapped = replace(self, parts={name: list(self._per_step(name)) for name in self.parts})._map(cut)
        return replace(mapped, batch_size=len(wanted), segments=SegmentTable(cut_segments))

    def denoise_steps(self, steps: int | Sequence[int]) -> "ActivationCache":
        """Some denoise steps only, by their number in the run; entries without a denoise axis stay whole.

        Raises KeyError for a step that was not cached.
        """
        steps = [steps] if isinstance(steps, int) else list(steps)
        parts, entries = dict(self.parts), dict(self.entries)
        for name, entry in self.entries.items():
            if entry.steps is None:
                continue
            missing = [step for step in steps if step not in entry.steps]
            if missing:
                raise KeyError(f"denoise steps {missing} of {name} are not cached; cached: {list(entry.steps)}")
            per_step = list(self._per_step(name))
            if len(per_step) > 1:
                # copies: views would keep the steps that were left out
                parts[name] = [per_step[entry.steps.index(step)].clone() for step in steps]
            entries[name] = replace(entry, steps=tuple(steps))
        return replace(self, parts=parts, entries=entries)

    def _per_step(self, name: str) -> Sequence[Tensor]:
        parts = self.parts[name]
        return parts.stacked.unbind(0) if isinstance(parts, _Stacked) else parts

    def stack(self, names_filter: hook_names.NamesFilter) -> Tensor:
        """The selected tensors along a new leading axis, in the order of the model; shapes must agree."""
        return torch.stack([self[name] for name in hook_names.resolve(names_filter, self._in_order())])

    def _in_order(self) -> list[str]:
        known = [name for name in self.order if name in self]
        return known + [name for name in (*self.parts, *self.aliases) if name not in self.order]

    def gradients(self, metric: Tensor, names_filter: hook_names.NamesFilter = None) -> "ActivationCache":
        """Gradients of a scalar at the cached points, under the points' own names; the graph stays usable.

        Points that the scalar does not depend on are left out. At a tensor that serves every denoise step this is
        the sum over steps; `run_with_cache(incl_bwd=...)` tells the steps apart.
        Raises ValueError when the scalar depends on no cached tensor: it has no graph, or the tensors were cached
        with device=, dtype= or clone= and are not those that the model went on with.
        """
        wanted = hook_names.resolve(names_filter, list(self.parts))
        places = [(name, i) for name in wanted for i in range(len(self.parts[name]))]
        found = gradients_at(metric, [self.parts[name][i] for name, i in places]) if metric.requires_grad else []
        parts: dict[str, list[Tensor]] = {}
        for (name, i), gradient in zip(places, found or [None] * len(places), strict=True):
            parts.setdefault(name, []).append(torch.zeros_like(self.parts[name][i]) if gradient is None else gradient)
        reached = {name for (name, _), gradient in zip(places, found, strict=False) if gradient is not None}
        if not reached:
            raise ValueError("the metric depends on no cached tensor through the autograd graph")
        aliases = {name: twin for name, twin in self.aliases.items() if twin in reached}
        return replace(self, parts={n: p for n, p in parts.items() if n in reached}, aliases=aliases,
                       entries={name: self.entries[name] for name in reached})  # fmt: skip

    def accumulated_resid(self, pathway: str, layer: int | None = None, incl_mid: bool = False) -> Tensor:
        """The residual stream entering each block up to `layer` (None: all, and the last block's output).

        Returns [component, ...] with the axes of the residual stream; `resid_labels` names the components.
        """
        return torch.stack([self[name] for name in self.resid_labels(pathway, layer, incl_mid)])

    def resid_labels(self, pathway: str, layer: int | None = None, incl_mid: bool = False) -> list[str]:
        """Names of what `accumulated_resid` stacks."""
        n_layers, last = self._layers(pathway, layer)
        labels = []
        for i in range(min(last + 1, n_layers)):
            labels.append(f"{pathway}.blocks.{i}.hook_resid_pre")
            if incl_mid and i < last:
                labels.append(f"{pathway}.blocks.{i}.hook_resid_mid")
        return labels + ([f"{pathway}.blocks.{n_layers - 1}.hook_resid_post"] if last == n_layers else [])

    def decompose_resid(self, pathway: str, layer: int | None = None) -> tuple[Tensor, list[str]]:
        """What has been written to the residual stream entering block `layer` (None: leaving the last block).

        Returns the components [component, ...] and their names; their sum is the residual stream.
        """
        _, last = self._layers(pathway, layer)
        labels = [f"{pathway}.hook_tokens"]
        for i in range(last):
            labels += [f"{pathway}.blocks.{i}.hook_attn_out", f"{pathway}.blocks.{i}.hook_mlp_out"]
            labels += [name for name in (f"{pathway}.blocks.{i}.hook_deepstack",) if name in self]
        return torch.stack([self[name] for name in labels]), labels

    def _layers(self, pathway: str, layer: int | None) -> tuple[int, int]:
        """How many blocks the pathway has, and the number of the block before which to stop; None, -1: after all."""
        layers = [hook_names.layer(name) for name in self.order if name.startswith(f"{pathway}.blocks.")]
        n_layers = max([number for number in layers if number is not None], default=-1) + 1
        if not n_layers:
            raise KeyError(f"the model has no blocks in a pathway {pathway!r}")
        last = n_layers if layer in (None, -1) else layer
        if not 0 <= last <= n_layers:
            raise ValueError(f"layer {layer}: {pathway} has blocks 0..{n_layers - 1}; None or -1 means all of them")
        return n_layers, last

    def attention(self, site: str, row: int = 0, step: int | None = None) -> "Figure":
        """A figure of one row's attention pattern at a hook_pattern, with a menu of heads, for notebooks (plotly).

        step: denoise step, the last cached where None. Raises KeyError for a pattern or step that is not cached,
        IndexError for a row that there is not, ValueError for a site that is no pattern of heads between tokens,
        ModuleNotFoundError without plotly.
        """
        from hooked_vla.hooks.attention_view import attention_figure, pattern_of

        at = "" if step is None else f", denoise step {step}"
        return attention_figure(pattern_of(self, site, row, step), f"{site}, row {row}{at}")

    def circuitsvis(
        self, sites: hook_names.NamesFilter, row: int = 0, step: int | None = None, tokens: Sequence[str] | None = None
    ) -> "CircuitsVisAttention":
        """One row's attention patterns as CircuitsVis draws them: names of tokens, and [layer head query key].

        sites: patterns between the same tokens, "vlm.blocks.*.attn.hook_pattern". step: as for `attention`. tokens:
        names to show instead of "language 0", .... Raises as `attention`, and ValueError for layers that differ in
        tokens or heads, and another number of names than there are tokens.
        """
        from hooked_vla.hooks.attention_view import circuitsvis

        known = [name for name in self._in_order() if hook_names.leaf(name) == "hook_pattern"]
        return circuitsvis(self, hook_names.resolve(sites, known), row, step, tokens)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, one tensor at a time; the file appears under its name when complete."""
        from hooked_vla.hooks.cache_file import save_cache

        save_cache(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "ActivationCache":
        """Read a file that `save` wrote.

        Raises ValueError for any other file, naming what is wrong with it.
        """
        from hooked_vla.hooks.cache_file import load_cache

        return load_cache(Path(path), device)


class _Stacked(list):
    """The steps of a stacked tensor: views of it, so that the memory is held once, or with gradients the originals."""

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.stacked = torch.stack(list(parts))
        super().__init__(parts if self.stacked.requires_grad else self.stacked.unbind(0))


def _indices(chosen: int | Sequence[int] | slice, size: int) -> list[int]:
    """0-based positions that an index, a slice, a list of indices or a mask chooses among `size`."""
    everything = list(range(size))
    if isinstance(chosen, slice):
        return everything[chosen]
    listed = [chosen] if isinstance(chosen, int) else list(chosen)
    if len(listed) == size and all(isinstance(each, bool) for each in listed):
        return [i for i, each in enumerate(listed) if each]
    wrong = [each for each in listed if not -size <= int(each) < size]
    if wrong:
        raise IndexError(f"rows {wrong}: the cache has rows 0..{size - 1}")
    return [everything[int(each)] for each in listed]


def _stream_rows(size: int, batch: int, rows: Sequence[int], device: Any) -> Tensor:
    each = size // batch
    return torch.tensor([row * each + i for row in rows for i in range(each)], device=device, dtype=torch.long)


def gradients_at(metric: Tensor, tensors: Sequence[Tensor]) -> list[Tensor | None]:
    """Gradient of a scalar at each tensor; None where there is no way to it."""
    on_graph = [tensor for tensor in tensors if tensor.requires_grad]
    found = torch.autograd.grad(metric, on_graph, retain_graph=True, allow_unused=True) if on_graph else ()
    by_id = {id(tensor): gradient for tensor, gradient in zip(on_graph, found, strict=True)}
    return [by_id.get(id(tensor)) for tensor in tensors]
