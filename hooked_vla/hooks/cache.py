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
from hooked_vla.hooks.point import HookPoint, SegmentTable
from hooked_vla.inputs import Segments

TOKEN_AXES = ("seq", "query", "key", "prefix")
ROW_AXES = ("batch", "image")


if TYPE_CHECKING:

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
        Raises KeyError for an unknown segment, ValueError where an axis or pad_value is needed.
        """
        wanted = name if isinstance(name, Mapping) else {self._token_axis(axis): name}
        tensor = self._tensor
        for each, segment in wanted.items():
            tensor = self._cut(tensor, self._token_axis(each), segment, pad_value)
        return tensor

    def _cut(self, tensor: Tensor, axis: str, name: str, pad_value: float | None) -> Tensor:
        segments = self._table[self._entry.streams[axis]]
        positions = segments.positions(name)
        rows = [i for i, p in enumerate(positions) if len(p) or segments.row_axis == "batch"]
        lengths = [len(positions[i]) for i in rows]
        row_dim = next(i for i, each in enumerate(self._entry.axes) if each in ROW_AXES)
        token_dim = self._entry.axes.index(axis) - 1
        parts = [tensor.select(row_dim, i).index_select(token_dim, positions[i].to(tensor.device)) for i in rows]
        if len(set(lengths)) > 1:
            if pad_value is None:
                raise ValueError(
                    f"segment {name!r} of {self._site} has {lengths} tokens in rows {rows}; "
                    "pass pad_value= to pad them to one length, or slice the cache by row first"
                )
            parts = [_pad_to(part, token_dim, max(lengths), pad_value) for part in parts]
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

    Made by `run_with_cache` or `load`. batch_size is the number of batch rows (an "image" axis has one row per
    batch row and camera). Gradients of a run with `incl_bwd` stand under `<name>_grad`, as in TransformerLens.
    """

    parts: dict[str, list[Tensor]]
    entries: dict[str, Entry]
    aliases: dict[str, str]
    batch_size: int
    segments: SegmentTable = field(repr=False)

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
            self.parts[name] = parts = _Stacked(torch.stack(parts))
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

    def rows(self, rows: Sequence[int] | slice) -> "ActivationCache":
        """Some batch rows only, segments included."""
        wanted = list(range(self.batch_size))[rows] if isinstance(rows, slice) else list(rows)

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

    def denoise_steps(self, steps: Sequence[int]) -> "ActivationCache":
        """Some denoise steps only, by their number in the run; entries without a denoise axis stay whole.

        Raises KeyError for a step that was not cached.
        """
        parts, entries = dict(self.parts), dict(self.entries)
        for name, entry in self.entries.items():
            if entry.steps is None:
                continue
            missing = [step for step in steps if step not in entry.steps]
            if missing:
                raise KeyError(f"denoise steps {missing} of {name} are not cached; cached: {list(entry.steps)}")
            per_step = list(self._per_step(name))
            parts[name] = [per_step[entry.steps.index(step)] for step in steps] if len(per_step) > 1 else per_step
            entries[name] = replace(entry, steps=tuple(steps))
        return replace(self, parts=parts, entries=entries)

    def _per_step(self, name: str) -> Sequence[Tensor]:
        parts = self.parts[name]
        return parts.stacked.unbind(0) if isinstance(parts, _Stacked) else parts

    def stack(self, names_filter: hook_names.NamesFilter) -> Tensor:
        """The selected tensors along a new leading axis, in the order of the model; shapes must agree."""
        return torch.stack([self[name] for name in hook_names.resolve(names_filter, [*self.parts, *self.aliases])])

    def accumulated_resid(self, pathway: str, layer: int | None = None, incl_mid: bool = False) -> Tensor:
        """The residual stream entering each block up to `layer` (None: all, and the last block's output).

        Returns [component, ...] with the axes of the residual stream; `resid_labels` names the components.
        """
        return torch.stack([self[name] for name in self.resid_labels(pathway, layer, incl_mid)])

    def resid_labels(self, pathway: str, layer: int | None = None, incl_mid: bool = False) -> list[str]:
        """Names of what `accumulated_resid` stacks."""
        n_layers = self._n_layers(pathway)
        last = n_layers if layer is None else layer
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
        last = self._n_layers(pathway) if layer is None else layer
        labels = [f"{pathway}.hook_tokens"]
        for i in range(last):
            labels += [f"{pathway}.blocks.{i}.hook_attn_out", f"{pathway}.blocks.{i}.hook_mlp_out"]
        return torch.stack([self[name] for name in labels]), labels

    def _n_layers(self, pathway: str) -> int:
        layers = [hook_names.layer(name) for name in self.parts if hook_names.pathway(name) == pathway]
        numbers = [number for number in layers if number is not None]
        if not numbers:
            raise KeyError(f"no block of pathway {pathway!r} is cached")
        return max(numbers) + 1

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
    """Per-step views of a stacked tensor: the list stays iterable while the memory is held once."""

    def __init__(self, stacked: Tensor) -> None:
        super().__init__(stacked.unbind(0))
        self.stacked = stacked


def _stream_rows(size: int, batch: int, rows: Sequence[int], device: Any) -> Tensor:
    each = size // batch
    return torch.tensor([row * each + i for row in rows for i in range(each)], device=device, dtype=torch.long)


class Recorder:
    """Collects what points show during a run; `listen` makes the function that does it at one point."""

    def __init__(
        self, device: str | torch.device | None, dtype: torch.dtype | None, clone: bool, detect_inplace: bool
    ) -> None:
        self.device, self.dtype, self.clone, self.detect_inplace = device, dtype, clone, detect_inplace
        self.parts: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, dict[int | None, Tensor]] = {}
        self._last: tuple[Tensor, int, Tensor] | None = None
        self._seen: list[tuple[str, Tensor, int]] = []

    def listen(self, point: HookPoint) -> Callable[[Tensor, HookPoint], None]:
        """The capturing listener for one point."""
        # a failed run leaves keys only for points that fired
        if self.device is None and self.dtype is None and not self.clone and not self.detect_inplace:
            return self._keep
        return self._convert

    def _keep(self, value: Tensor, point: HookPoint) -> None:
        self.parts.setdefault(point.name, []).append(value)

    def _convert(self, value: Tensor, point: HookPoint) -> None:
        version = 0 if value.is_inference() else value._version
        if self.detect_inplace:
            self._seen.append((point.name, value, version))
        stored = self.parts.setdefault(point.name, [])
        # neighbouring points often show one tensor (resid_post, then the next resid_pre): convert it once
        if self._last is not None and self._last[0] is value and self._last[1] == version:
            stored.append(self._last[2])
            return
        kept = value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)
        if self.clone and kept is value:
            kept = value.clone()
        self._last = (value, version, kept)
        stored.append(kept)

    def keep_gradient(self, gradient: Tensor, point: HookPoint) -> None:
        """Gradient listener: the gradient at a point and step."""
        kept = gradient.to(device=self.device, dtype=self.dtype)
        self.gradients.setdefault(point.name, {})[point.denoise_step] = kept

    def check_inplace(self) -> None:
        """Raises RuntimeError naming the cached tensors that were changed in place after they were cached."""
        changed = list(dict.fromkeys(name for name, value, version in self._seen if value._version != version))
        if changed:
            raise RuntimeError(f"changed in place after they were cached: {changed}; cache with clone=True")

    def finish(
        self, points: Mapping[str, HookPoint], at_steps: Sequence[int], batch_size: int, segments: SegmentTable
    ) -> ActivationCache:
        """The cache of the run."""
        parts, entries, aliases = {}, {}, {}
        first_name: dict[int, str] = {}
        for name, tensors in self.parts.items():
            denoised = hook_names.is_denoised(name)
            if denoised and len(tensors) > 1 and all(tensor is tensors[0] for tensor in tensors):
                tensors = tensors[:1]
            twin = first_name.setdefault(id(tensors[0]), name)
            if twin != name and _same(parts[twin], tensors) and hook_names.is_denoised(twin) == denoised:
                aliases[name] = twin
                continue
            point = points[name]
            parts[name] = tensors
            steps = tuple(at_steps)[: len(self.parts[name])] if denoised else None
            axes = (hook_names.DENOISED[point.pathway], *point.axes) if denoised else point.axes
            entries[name] = Entry(axes, point.streams, steps)
        for name, by_step in self.gradients.items():
            if name not in parts:
                continue
            steps = [step for step in sorted(by_step, key=lambda step: -1 if step is None else step)]
            parts[f"{name}_grad"] = [by_step[step] for step in steps]
            found = tuple(step for step in steps if step is not None)
            entries[f"{name}_grad"] = replace(entries[name], steps=found or None)
        aliases |= {f"{name}_grad": f"{twin}_grad" for name, twin in aliases.items() if f"{twin}_grad" in parts}
        return ActivationCache(parts, entries, aliases, batch_size, segments)


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
