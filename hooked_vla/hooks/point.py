"""Hook points: where a value can be watched or replaced, and what its listeners know about the run.

A HookPoint is a plain object, not an nn.Module: calling one that nobody listens to costs a fraction of a
microsecond, it never shows in a state_dict, and torch.compile goes through it without a graph break.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooked_vla.hooks import names
from hooked_vla.inputs import Segments

HookFunction = Callable[[Tensor, "HookPoint"], Tensor | None]


class SegmentTable:
    """Segments of every token stream of one forward pass, made on first use; "a+b" is stream a followed by b."""

    def __init__(self, make: Callable[[], Mapping[str, Segments]]) -> None:
        self._make: Callable[[], Mapping[str, Segments]] | None = make
        self._made: dict[str, Segments] = {}

    def settle(self) -> "SegmentTable":
        """Make the segments now, and let go of the inputs that they are made from."""
        if self._make is not None:
            self._made, self._make = dict(self._make()), None
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.settle().__dict__

    def __getitem__(self, stream: str) -> Segments:
        """Raises KeyError for a stream that the model does not have, or outside a forward pass."""
        self.settle()
        if not self._made:
            raise KeyError(f"token segments of {stream!r} are known while the model runs, and in the cache of a run")
        if stream not in self._made and "+" in stream:
            first, second = stream.split("+", 1)
            self._made[stream] = Segments.concatenate(self[first], self[second])
        return self._made[stream]


class Run:
    """State of the forward pass in progress, shared by all hook points of a model.

    denoise_step: 0-based step of the loop in progress (the expert's denoise steps, or the tokens that `decode`
    generates after the first), None outside it. env_step: the environment step, set by
    whoever drives a rollout. n_denoise_steps: how many a pass has at most. in_use: by batch row, whether anything comes
    of its actions (an episode that is over keeps its row), set by whoever drives a rollout; None: of all. segments: who
    owns each token of each stream.
    """

    def __init__(self) -> None:
        self.denoise_step: int | None = None
        self.env_step: int | None = None
        self.n_denoise_steps: int | None = None
        self.in_use: Sequence[bool] | None = None
        self.segments = SegmentTable(dict)

    def begin(self, make_segments: Callable[[], Mapping[str, Segments]]) -> tuple[int | None, SegmentTable]:
        """Start a forward pass; returns what `end` restores, so that a hook may run the model itself."""
        outer = self.denoise_step, self.segments
        self.denoise_step, self.segments = None, SegmentTable(make_segments)
        return outer

    def end(self, outer: tuple[int | None, SegmentTable]) -> None:
        """Return to the state before `begin`; nothing of the inputs is held on to."""
        self.denoise_step, self.segments = outer


# Listeners at one point run in this order: edits see the value first, captures last.
EDIT, GRADIENT, CAPTURE = 0, 1, 2


@dataclass(eq=False)
class Listener:
    """One function attached to one point.

    order: EDIT, GRADIENT or CAPTURE. fired: it has been called (for a gradient: attached to the backward graph).
    """

    fn: HookFunction
    order: int = EDIT
    at_steps: frozenset[int] | None = None
    permanent: bool = False
    fired: bool = field(default=False, init=False)


class HookPoint:
    """A named place in the forward pass.

    axes: names of the value's axes, separated by spaces; those that are sizes of the owning module (d_model,
    n_heads, ...) resolve to numbers in `model.hook_points`.
    dtype: "stream" when the value has its pathway's parameter dtype, else the name of a torch dtype.
    stream: the token stream along the "seq" axis, the pathway's own where None.
    per_chunk: unless edited, the value is one tensor for all denoise steps.
    reused: the forward pass reads the value again later, so a hook gets a copy that it may change in place.
    """

    def __init__(
        self,
        axes: str,
        dtype: str = "stream",
        stream: str | None = None,
        per_chunk: bool = False,
        reused: bool = False,
    ) -> None:
        self.axes = tuple(axes.split())
        self.stream = stream
        self.dtype = dtype
        self.per_chunk = per_chunk
        self.reused = reused or per_chunk
        self.name = ""
        self.streams: dict[str, str] = {}
        self.run = Run()
        self.ctx: dict[str, Any] = {}
        self.listeners: tuple[Listener, ...] = ()

    def __call__(self, value: Tensor) -> Tensor:
        return self._visit(value) if self.listeners else value

    def __repr__(self) -> str:
        return f"HookPoint({self.name!r}, {' '.join(self.axes)!r})"

    @property
    def pathway(self) -> str:
        return names.pathway(self.name)

    @property
    def layer(self) -> int | None:
        return names.layer(self.name)

    @property
    def denoise_step(self) -> int | None:
        """0-based denoise step of the value being seen; None in what runs once per chunk."""
        return self.run.denoise_step if names.is_denoised(self.name) else None

    @property
    def segments(self) -> Segments | None:
        """Who owns each position along the value's token axis (patterns: the query axis); None without one."""
        stream = next((self.streams[axis] for axis in ("seq", "query", "prefix") if axis in self.streams), None)
        return self.run.segments[stream] if stream is not None else None

    @property
    def key_segments(self) -> Segments | None:
        """Who owns each position along a pattern's key axis; None for other values."""
        return self.run.segments[self.streams["key"]] if "key" in self.streams else None

    def add(self, listener: Listener, prepend: bool = False) -> None:
        """Attach a listener after (or before) the others of its order."""
        group = (listener, *self.listeners) if prepend else (*self.listeners, listener)
        self.listeners = tuple(sorted(group, key=lambda each: each.order))

    def remove(self, listener: Listener) -> None:
        """Detach a listener; nothing happens if it is gone already."""
        self.listeners = tuple(each for each in self.listeners if each is not listener)

    def _visit(self, value: Tensor) -> Tensor:
        step = self.run.denoise_step
        now = [each for each in self.listeners if each.at_steps is None or step in each.at_steps]
        # listeners stand in this order, and most often there is one, which captures
        if now and now[0].order != CAPTURE:
            value = self._change(value, now)
        for listener in now:
            if listener.order == CAPTURE:
                listener.fired = True
                self._call(listener.fn, value)
        return value

    def _change(self, value: Tensor, now: Sequence[Listener]) -> Tensor:
        edits = [each for each in now if each.order == EDIT]
        if edits:
            value = self._edit(value, edits)
        watches = [each for each in now if each.order == GRADIENT]
        if watches and value.requires_grad:
            # a node of its own in the backward graph: the tensor itself may pass several points or steps
            value = value.view_as(value)
            for listener in watches:
                self._watch_gradient(value, listener)
        return value

    def _edit(self, value: Tensor, edits: Sequence[Listener]) -> Tensor:
        original = value
        # what is read again later must not change: hooks get a copy, used only if one of them changes it
        spare = value.clone() if self.reused else value
        value = spare
        for listener in edits:
            listener.fired = True
            result = self._call(listener.fn, value)
            if result is not None:
                self._check(result, value)
                value = result
        untouched = self.reused and value is spare and not spare.is_inference() and spare._version == 0
        return original if untouched else value

    def _watch_gradient(self, value: Tensor, listener: Listener) -> None:
        listener.fired = True
        step, segments = self.run.denoise_step, self.run.segments

        def on_gradient(gradient: Tensor) -> Tensor | None:
            outer = self.run.denoise_step, self.run.segments
            self.run.denoise_step, self.run.segments = step, segments
            try:
                result = self._call(listener.fn, gradient)
            finally:
                self.run.end(outer)
            if result is not None:
                self._check(result, gradient)
            return result

        value.register_hook(on_gradient)

    def _call(self, fn: HookFunction, value: Tensor) -> Any:
        # a compiled graph has no Python frame to annotate
        if torch.compiler.is_compiling():
            return fn(value, self)
        try:
            return fn(value, self)
        except Exception as error:
            step = "" if self.denoise_step is None else f", denoise step {self.denoise_step}"
            error.add_note(f"raised by hook {getattr(fn, '__name__', repr(fn))!r} at {self.name}{step}")
            raise

    def _check(self, result: Any, value: Tensor) -> None:
        if not isinstance(result, Tensor):
            raise TypeError(
                f"hook at {self.name} returned {type(result).__name__}; expected a Tensor, or None to keep the value"
            )
        if result.shape != value.shape:
            raise ValueError(
                f"hook at {self.name} returned shape {tuple(result.shape)}; "
                f"expected {tuple(value.shape)} ({' '.join(self.axes)})"
            )
        if result.dtype != value.dtype:
            raise ValueError(f"hook at {self.name} returned dtype {result.dtype}; expected {value.dtype}")
        if result.device != value.device:
            raise ValueError(f"hook at {self.name} returned a tensor on {result.device}; expected {value.device}")
