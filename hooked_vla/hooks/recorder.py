"""What a run with a cache listens with: points' values as they come, and the cache that they become."""

import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ActivationCache, Entry, gradients_at
from hooked_vla.hooks.point import HookPoint, SegmentTable


class Recorder:
    """Collects what points show during a run; `listen` makes the function that does it at one point."""

    def __init__(
        self,
        device: str | torch.device | None,
        dtype: torch.dtype | None,
        clone: bool,
        detect_inplace: bool,
        gradients: bool,
    ) -> None:
        self.device, self.dtype, self.clone, self.detect_inplace = device, dtype, clone, detect_inplace
        self.parts: dict[str, list[Tensor]] = {}
        self.gradients: dict[str, list[Tensor | None]] = {}
        self._sources: dict[str, list[Tensor]] | None = {} if gradients else None
        # what was converted, by identity, for as long as it lives: points often show one tensor
        self._converted: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}
        self._seen: list[tuple[str, Tensor, int]] = []

    def listen(self, point: HookPoint) -> Callable[[Tensor, HookPoint], None]:
        """The capturing listener for one point."""
        plain = self.device is None and self.dtype is None and not self.clone and not self.detect_inplace
        return self._keep if plain and self._sources is None else self._convert

    def _keep(self, value: Tensor, point: HookPoint) -> None:
        self.parts.setdefault(point.name, []).append(value)

    def _convert(self, value: Tensor, point: HookPoint) -> None:
        if self.detect_inplace and value.is_inference():
            raise RuntimeError("detect_inplace needs version counters, which torch.inference_mode() switches off")
        version = 0 if value.is_inference() else value._version
        if self.detect_inplace:
            self._seen.append((point.name, value, version))
        if self._sources is not None:
            self._sources.setdefault(point.name, []).append(value)
        stored = self.parts.setdefault(point.name, [])
        known = self._converted.get(id(value))
        if known is not None and known[0]() is value and known[1] == version:
            stored.append(known[2])
            return
        kept = value.to(device=self.device, dtype=self.dtype if value.is_floating_point() else None)
        if self.clone and kept is value:
            kept = value.clone()
        self._converted[id(value)] = (weakref.ref(value), version, kept)
        stored.append(kept)

    def take_gradients(self, metric: Tensor) -> None:
        """Gradients of a scalar at every point and step; parameters' own `.grad` stays as it was."""
        assert self._sources is not None
        places = [(name, i) for name, values in self._sources.items() for i in range(len(values))]
        tensors = [self._sources[name][i] for name, i in places]
        for (name, _), gradient in zip(places, gradients_at(metric, tensors), strict=True):
            if gradient is not None:
                gradient = gradient.to(device=self.device, dtype=self.dtype)
            self.gradients.setdefault(name, []).append(gradient)
        self.gradients = {name: g for name, g in self.gradients.items() if any(each is not None for each in g)}

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
        for name, gradients in self.gradients.items():
            if name in parts:
                # a step that the metric does not depend on has gradient zero
                like = next(each for each in gradients if each is not None)
                parts[f"{name}_grad"] = [torch.zeros_like(like) if each is None else each for each in gradients]
                entries[f"{name}_grad"] = entries[name]
        return ActivationCache(parts, entries, aliases, batch_size, segments, tuple(points))


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    return len(first) == len(second) and all(a is b for a, b in zip(first, second, strict=True))
