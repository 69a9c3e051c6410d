"""HookedModel: running a network with listeners attached to its hook points.

Nothing here knows a model. A subclass says how an observation becomes inputs and actions; its network's modules
carry HookPoints, which are named by their path when the model is built.
"""

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ActivationCache
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.point import CAPTURE, EDIT, GRADIENT, HookFunction, HookPoint, Listener, Run, SegmentTable
from hooked_vla.hooks.recorder import Recorder
from hooked_vla.hooks.sites import HookSite, describe_points, name_points, runtime_size
from hooked_vla.inputs import Actions, ModelInputs, Segments

HookRequest = tuple[NamesFilter, HookFunction]


class Hook:
    """Handle of an attached function; `remove()` detaches it, `with` detaches it at the end of the block."""

    def __init__(self, request: object, attached: Sequence[tuple[HookPoint, Listener]]) -> None:
        self.request = request
        self.attached = list(attached)

    def remove(self) -> None:
        """Detach; nothing happens the second time."""
        for point, listener in self.attached:
            point.remove(listener)

    @property
    def fired(self) -> bool:
        return any(listener.fired for _, listener in self.attached)

    def __enter__(self) -> "Hook":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


class _Stop(Exception):
    """Ends a forward pass at the point that `stop_at` names."""


class HookedModel(nn.Module):
    """A policy whose activations have names; see `run_with_cache`, `run_with_hooks`, `hooks`."""

    net: Any

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.run_state = Run()
        self._points = name_points(net, self.run_state)
        self._n_runs = 0
        # told the inputs of every forward pass when it has begun and nothing has run
        self.before_run: list[Callable[[ModelInputs], None]] = []

    # What a subclass says about itself.

    def prepare_raw(self, obs: Any, unnorm_key: str | None = None) -> tuple[ModelInputs, bool]:
        """Preprocess an observation or the public entry point's batch; say whether it was raw, so that its actions
        are to be un-normalised. unnorm_key: which statistics, for checkpoints that have several sets."""
        raise NotImplementedError

    def act(self, inputs: ModelInputs, noise: Any, raw: bool, unnorm_key: str | None = None) -> Actions:
        """Run the network on preprocessed inputs."""
        raise NotImplementedError

    def segments(self, inputs: ModelInputs) -> Mapping[str, Segments]:
        """Token segments of every stream."""
        raise NotImplementedError

    @property
    def dead_ends(self) -> Sequence[str]:
        """Names and globs of the points whose values reach no action."""
        raise NotImplementedError

    @property
    def n_denoise_steps(self) -> int:
        """How often the expert runs per action chunk."""
        raise NotImplementedError

    def edits(self, edits: Any) -> AbstractContextManager[Any]:
        """Declarative edits for a block."""
        raise NotImplementedError

    # Running.

    def forward(self, obs: Any, noise: Any = None, unnorm_key: str | None = None, edits: Any = ()) -> Actions:
        """One action chunk for an observation, gradients as the ambient grad mode says.

        noise: the starting noise [batch, chunk, d_action], or a list with every random draw in order; None draws.
        unnorm_key: which statistics to normalise by, for checkpoints that have several sets. edits: for this run, as
        the method `edits` takes them.
        """
        with self._under(edits):
            return self._run(*self.prepare_raw(obs, unnorm_key), noise, unnorm_key)

    def prepare(self, obs: Any, unnorm_key: str | None = None) -> ModelInputs:
        """Preprocess an observation or batch; inputs that are ready pass through."""
        return self.prepare_raw(obs, unnorm_key)[0]

    def _run(self, inputs: ModelInputs, raw: bool, noise: Any, unnorm_key: str | None = None) -> Actions:
        with self.running(inputs):
            return self.act(inputs, noise, raw, unnorm_key)

    def _under(self, edits: Any) -> AbstractContextManager[Any]:
        return self.edits(edits) if len(edits) else nullcontext()

    @contextmanager
    def running(self, inputs: ModelInputs) -> Iterator[None]:
        """A forward pass on `inputs`: hooks know its token segments, and what surrounds it comes back afterwards."""
        outer = self.run_state.begin(lambda: self.segments(inputs))
        try:
            self._begin(inputs)
            yield
        finally:
            self.run_state.end(outer)

    def _begin(self, inputs: ModelInputs) -> None:
        """Say to whoever wants to know that a forward pass begins, and count it unless they object."""
        for tell in self.before_run:
            tell(inputs)
        self._n_runs += 1
        self.run_state.n_denoise_steps = self.n_denoise_steps

    @property
    def n_runs(self) -> int:
        """How many forward passes have begun."""
        return self._n_runs

    @property
    def points(self) -> Mapping[str, HookPoint]:
        """Every hook point by name, in the order of the model."""
        return self._points

    @property
    def hook_points(self) -> dict[str, HookSite]:
        """Every hook point with its shape, dtype, axes and meaning."""
        dead_ends = set(hook_names.resolve(self.dead_ends, list(self._points))) if self.dead_ends else set()
        return describe_points(self.net, self._points, dead_ends)

    def add_hook(
        self,
        site: NamesFilter,
        fn: HookFunction,
        dir: str = "fwd",
        at_steps: Sequence[int] | None = None,
        is_permanent: bool = False,
        prepend: bool = False,
    ) -> Hook:
        """Attach `fn(tensor, hook)` to every point that `site` selects, until removed.

        A returned tensor replaces the value (dir="bwd": the gradient), None keeps it. at_steps limits points of
        the expert to some denoise steps. Permanent hooks survive `reset_hooks`.
        Raises KeyError for an unknown site, ValueError for a bad direction or step.
        """
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        order = EDIT if dir == "fwd" else GRADIENT
        return self._attach(site, lambda _: fn, order, self._check_steps(at_steps), is_permanent, prepend)

    def add_perma_hook(self, site: NamesFilter, fn: HookFunction, dir: str = "fwd") -> Hook:
        """Attach a hook that `reset_hooks` leaves in place."""
        return self.add_hook(site, fn, dir, is_permanent=True)

    def reset_hooks(self, including_permanent: bool = False) -> None:
        """Detach every hook; permanent ones only when asked."""
        for point in self._points.values():
            point.listeners = tuple(each for each in point.listeners if each.permanent and not including_permanent)
            point.ctx.clear()

    @contextmanager
    def hooks(
        self,
        fwd_hooks: Sequence[HookRequest] = (),
        bwd_hooks: Sequence[HookRequest] = (),
        at_steps: Sequence[int] | None = None,
    ) -> Iterator["HookedModel"]:
        """Hooks for the block only: whatever ends it, they are gone; other hooks are left alone.

        Raises RuntimeError at the end of the block when the model ran and a hook never fired.
        """
        attached: list[Hook] = []
        runs = self._n_runs
        try:
            for requests, dir in ((fwd_hooks, "fwd"), (bwd_hooks, "bwd")):
                for site, fn in requests:
                    attached.append(self.add_hook(site, fn, dir, at_steps))
            yield self
            if self._n_runs > runs:
                _check_fired(attached)
        finally:
            for hook in attached:
                hook.remove()

    def run_with_hooks(
        self,
        obs: Any,
        fwd_hooks: Sequence[HookRequest] = (),
        bwd_hooks: Sequence[HookRequest] = (),
        noise: Any = None,
        at_steps: Sequence[int] | None = None,
        unnorm_key: str | None = None,
        edits: Any = (),
    ) -> Actions:
        """One action chunk with hooks, and edits before them, attached for this run only.

        Backward hooks act on the graph of this run, so they also serve a `backward()` called afterwards; one at a
        point that no gradient reaches is never called.
        """
        with self._under(edits), self.hooks(fwd_hooks, bwd_hooks, at_steps):
            return self(obs, noise, unnorm_key)

    def run_with_cache(
        self,
        obs: Any,
        names_filter: NamesFilter = None,
        noise: Any = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        incl_bwd: bool | Callable[[Actions], Tensor] = False,
        stop_at: str | None = None,
        at_steps: Sequence[int] | None = None,
        clone: bool = False,
        detect_inplace: bool = False,
        max_bytes: int | None = None,
        unnorm_key: str | None = None,
        edits: Any = (),
    ) -> tuple[Actions | None, ActivationCache]:
        """One action chunk and the activations of the selected points.

        Points see the values after other hooks, and after `edits`, which act in this run. device, dtype: where and how
        to keep them. incl_bwd: also keep gradients, of the sum of the chunk (True) or of the scalar that the function
        makes of the actions. stop_at: name of the point after which the run ends (the actions are then None). at_steps:
        only these denoise steps.
        clone: keep copies, safe from hooks that edit in place; detect_inplace: raise when that happened.
        max_bytes: raise MemoryError beforehand if the cache would be larger.
        Cached tensors keep their autograd graph; run under `torch.no_grad()` if no gradients are wanted. Gradients
        of one's own metrics: `cache.gradients(metric)`.
        """
        wanted = hook_names.resolve(names_filter, list(self._points))
        steps = self._check_steps(at_steps)
        if incl_bwd and (stop_at is not None or not torch.is_grad_enabled()):
            raise ValueError("incl_bwd needs the whole run with gradients on: no stop_at, no torch.no_grad()")
        if device is not None:
            torch.empty(0, device=device)
        inputs, raw = self.prepare_raw(obs, unnorm_key)
        if max_bytes is not None:
            self._cache_size(inputs, wanted, steps, dtype, max_bytes)
        recorder = Recorder(device, dtype, clone, detect_inplace, gradients=bool(incl_bwd))
        attached = [self._attach(wanted, recorder.listen, CAPTURE, steps)]
        if incl_bwd:
            # makes every point and step a node of its own in the graph, whose gradient is then asked for
            attached.append(self._attach(wanted, lambda _: _watch, GRADIENT, steps))
        if stop_at is not None:
            attached.append(self._attach(stop_at, lambda _: _stop, CAPTURE, steps))
        actions, segments = None, SegmentTable(lambda: self.segments(inputs)).settle()
        try:
            with self._under(edits), self.running(inputs):
                actions = self.act(inputs, noise, raw, unnorm_key)
        except _Stop:
            pass
        finally:
            for hook in attached:
                hook.remove()
        missing = [name for name in wanted if name not in recorder.parts]
        if stop_at is not None:
            missing = [name for name in missing if name in _literal_names(names_filter, self._points)]
        if missing:
            raise RuntimeError(f"asked to be cached but never fired: {missing[:10]} ({len(missing)} points)")
        recorder.check_inplace()
        if incl_bwd:
            assert actions is not None
            recorder.take_gradients(incl_bwd(actions) if callable(incl_bwd) else actions.chunk.sum())
            unreached = [name for name in _literal_names(names_filter, self._points) if name not in recorder.gradients]
            if unreached:
                raise RuntimeError(f"no gradient reaches {unreached}")
        cached_steps = range(self.n_denoise_steps) if steps is None else sorted(steps)
        return actions, recorder.finish(self._points, list(cached_steps), inputs.batch_size, segments)

    def cache_size(
        self,
        obs: Any,
        names_filter: NamesFilter = None,
        at_steps: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        max_bytes: int | None = None,
        unnorm_key: str | None = None,
    ) -> int:
        """Bytes that `run_with_cache` would hold, from shapes alone.

        Raises MemoryError when that is more than max_bytes.
        """
        wanted = hook_names.resolve(names_filter, list(self._points))
        return self._cache_size(self.prepare(obs, unnorm_key), wanted, self._check_steps(at_steps), dtype, max_bytes)

    def _cache_size(
        self,
        inputs: ModelInputs,
        wanted: Sequence[str],
        steps: frozenset[int] | None,
        dtype: torch.dtype | None,
        max_bytes: int | None,
    ) -> int:
        segments = self.segments(inputs)
        sizes = {stream: each.labels.shape for stream, each in segments.items()}
        chosen, n_steps = set(wanted), self.n_denoise_steps if steps is None else len(steps)
        total, sites = 0, self.hook_points
        for name in wanted:
            if hook_names.same_tensor_as(name) in chosen:
                continue
            site, point = sites[name], self._points[name]
            elements = n_steps if site.denoised and not point.per_chunk else 1
            for axis, size in zip(site.axes, site.shape, strict=True):
                elements *= size if isinstance(size, int) else runtime_size(axis, point, sizes, inputs.batch_size)
            total += elements * (dtype or site.dtype).itemsize
        if max_bytes is not None and total > max_bytes:
            raise MemoryError(
                f"the cache of {len(wanted)} points would hold {total:,} bytes, more than the limit of "
                f"{max_bytes:,}; cache fewer points or steps, or a smaller dtype"
            )
        return total

    def _attach(
        self,
        site: NamesFilter,
        make: Callable[[HookPoint], HookFunction],
        order: int,
        at_steps: frozenset[int] | None,
        permanent: bool = False,
        prepend: bool = False,
    ) -> Hook:
        attached = []
        for name in hook_names.resolve(site, list(self._points)):
            point = self._points[name]
            steps = at_steps if hook_names.is_denoised(name) else None
            listener = Listener(make(point), order, steps, permanent)
            point.add(listener, prepend)
            attached.append((point, listener))
        return Hook(site, attached)

    def _check_steps(self, at_steps: Sequence[int] | None) -> frozenset[int] | None:
        if at_steps is None:
            return None
        at_steps = [at_steps] if isinstance(at_steps, int) else [int(step) for step in at_steps]
        outside = [step for step in at_steps if not 0 <= step < self.n_denoise_steps]
        if outside or not at_steps:
            raise ValueError(f"at_steps {list(at_steps)}: this model's denoise steps are 0..{self.n_denoise_steps - 1}")
        return frozenset(at_steps)


def _stop(value: Tensor, point: HookPoint) -> None:
    raise _Stop


def _watch(gradient: Tensor, point: HookPoint) -> None:
    """A gradient listener that changes nothing."""


def _literal_names(names_filter: Any, points: Container[str]) -> list[str]:
    """The points that a filter asks for by name rather than by pattern."""
    listed = [names_filter] if isinstance(names_filter, str) else names_filter
    return [str(each) for each in listed if each in points] if isinstance(listed, list | tuple) else []


def _check_fired(attached: Sequence[Hook]) -> None:
    silent = [hook.request for hook in attached if not hook.fired]
    if silent:
        raise RuntimeError(
            f"hooks that never fired: {silent}; a backward hook needs gradients to be on where the model runs"
        )
