"""Runs of one input that differ in their edits, each gone on with from its first edit instead of from the start.

A forward pass is a fixed sequence of module calls. Whatever ends before the first edited value exists cannot depend on
an edit, so its output is taken from a tape that was recorded once: the vision tower of an edit in the language model,
the blocks before an edited block, the prefix and all earlier denoise steps of an edit in the expert. Nothing about a
model needs to be known for that but the order in which its modules run.

Outputs come in as many copies as the batch has rows for each recorded row. Recording runs the input once as it is and
once with its rows doubled: an axis that doubles is the one to repeat. A module whose output does not fit that, or which
changes what it is given, is never skipped.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import Actions, ModelInputs

Noise = Tensor | Sequence[Tensor]
# what the pass at the doubled rows may differ by, as part of the largest number: other kernels, the same formula
_SAME = 0.05
_NOTE = "tape"
_PLAIN = (Tensor, str, bytes, int, float, bool, type(None), torch.dtype, torch.device, nn.Module)


@dataclass
class _Call:
    """One module call. start, stop: on the tape's clock. after: number of the first call that is not inside it.
    repeat: for every tensor of the output the axis to repeat, None where all rows share it."""

    module: nn.Module
    step: int | None
    start: int
    stop: int = 0
    after: int = 0
    pure: bool = True
    output: Any = None
    kept: bool = False
    versions: tuple[int, ...] = ()
    repeat: tuple[int | None, ...] | None = None


class _Noted(HookPoint):
    """A hook point while a tape is recorded: it says when it is passed, which listening there might change."""

    def __call__(self, value: Tensor) -> Tensor:
        self.ctx[_NOTE](self)
        return super().__call__(value)


class _EndOfTape(Exception):
    """Ends a recording behind the last value that anybody will edit."""


@dataclass
class Tape:
    """What modules returned in a run of `inputs` without edits, up to the last of the sites that are to be edited.

    >>> tape = Tape.record(model, obs, noise, ["vlm.blocks.1.hook_resid_post", "vlm.blocks.2.hook_resid_post"])
    >>> actions = tape.run([[], [edit_of_row_1], [edit_of_row_2]])

    calls: module calls in their order. passed: hook point -> (time, denoise step) of every value that it saw. end: the
    time at which recording ended. n_skipped: module calls that were answered from the tape so far.
    """

    model: HookedModel
    inputs: ModelInputs
    noise: tuple[Tensor, ...]
    calls: list[_Call] = field(default_factory=list)
    passed: dict[str, list[tuple[int, int | None]]] = field(default_factory=dict)
    end: int = 0
    n_skipped: int = 0

    @classmethod
    def record(
        cls, model: HookedModel, obs: Any, noise: Noise, sites: Collection[str], n_steps: int | None = None
    ) -> "Tape":
        """Record the run of an observation with its noise; no gradients.

        noise: what the model draws, in order, for as many rows as the observation has; empty for one that draws
        nothing. sites: names of hook points, those that will be edited: the tape serves any edits, but is made for
        these. n_steps: of these sites, the first so many denoise steps count; None: all.
        Raises TypeError for noise None, RuntimeError where the model runs compiled.
        """
        tape = cls(model, model.prepare(obs), settled_noise(noise))
        if getattr(model, "_compiled", None) is not None:
            raise RuntimeError("the model runs compiled, where module calls cannot be skipped: remove() the handle")
        with torch.no_grad():
            recorder = _Recorder(model, tape.passed, sites, n_steps)
            recorder.run(tape.inputs, tape.noise)
            tape.calls, tape.end = recorder.calls, recorder.clock
            doubled = _Comparer(model, tape.calls)
            doubled.run(*tape.copies(2))
        return tape

    @property
    def rows(self) -> int:
        """Rows of the recorded observation."""
        return self.inputs.batch_size

    @property
    def nbytes(self) -> int:
        """Bytes that the tape holds."""
        kept = [leaf for call in self.calls if call.kept for leaf in pytree.tree_leaves(call.output)]
        found = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage().nbytes() for leaf in _tensors(kept)}
        return sum(found.values())

    def copies(self, n: int) -> tuple[ModelInputs, list[Tensor]]:
        """The inputs, all rows n times one after the other, and their noise."""
        return self.inputs.rows(list(range(self.rows)) * n), [_repeated(each, 0, n) for each in self.noise]

    def first(self, site: str, steps: Collection[int] | None = None) -> int:
        """The tape's time at which the site is first passed in one of the denoise steps (None: any).

        A site that exists only while somebody listens changes how its module computes, at every step: it is as early
        as that module's first call. One whose module is not on the tape is at 0.
        """
        seen = self.passed.get(site)
        if seen is None:
            owner = self.model.net.get_submodule(site.rpartition(".")[0])
            return min((call.start for call in self.calls if call.module is owner), default=0)
        times = [time for time, step in seen if steps is None or step is None or step in steps]
        # other steps come after everything on the tape
        return min(times, default=self.end)

    def run(self, edits: Sequence[Sequence[Any]], grad: bool = False) -> Actions:
        """The actions of as many rows as there are lists of edits, each row under its own.

        With an observation of several rows, the lists count through them: first all rows once, then again.
        grad: record gradients; what is taken from the tape is where they end.
        Raises ValueError for a number of lists that is no multiple of the observation's rows; as `model.edits`.
        """
        n, rest = divmod(len(edits), self.rows)
        if rest or not n:
            raise ValueError(f"{len(edits)} lists of edits for an observation of {self.rows} rows: no multiple of it")
        inputs, noise = self.copies(n)
        listed = [list(each) for each in edits]
        # rows without edits alone are no edits at all
        under = listed if any(listed) else []
        with torch.set_grad_enabled(grad), self.resumed(n):
            return self.model(inputs, noise, edits=under)

    @contextmanager
    def resumed(self, n: int) -> Iterator[None]:
        """In the block, the model's forward passes are of `copies(n)`, and skip what comes before the first listener.

        Raises ValueError where a forward pass has other inputs, RuntimeError where it takes another way than recorded,
        or where a tensor of the tape was changed.
        """
        player = _Player(self, n)
        self.model.before_run.append(player.begin)
        try:
            with _watched(self.model.net, player.call):
                yield
        finally:
            self.model.before_run.remove(player.begin)
            self.n_skipped += player.n_skipped


def settled_noise(noise: Noise | None) -> tuple[Tensor, ...]:
    """Every draw in order. Raises TypeError for None: what is compared must share its noise."""
    if noise is None:
        raise TypeError("noise is missing: runs that are compared share it; [] for a model that draws nothing")
    return (noise,) if isinstance(noise, Tensor) else tuple(noise)


@contextmanager
def _watched(net: nn.Module, call: Callable[[nn.Module, Callable[..., Any], tuple, dict], Any]) -> Iterator[None]:
    """Every call of a module goes through `call(module, forward, args, kwargs)`."""
    before = {module: vars(module).get("forward") for module in net.modules()}

    def wrapped(module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        return lambda *args, **kwargs: call(module, forward, args, kwargs)

    try:
        for module in before:
            module.forward = wrapped(module)
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                vars(module).pop("forward", None)
            else:
                module.forward = forward


class _Recorder:
    """Writes a tape: what is called when, and of the outputs those that a later run may take."""

    def __init__(
        self,
        model: HookedModel,
        passed: dict[str, list[tuple[int, int | None]]],
        sites: Collection[str],
        n_steps: int | None,
    ) -> None:
        self.model, self.passed, self.calls = model, passed, list[_Call]()
        self.sites, self.n_steps = set(sites), n_steps
        owners = {name.rpartition(".")[0] for name in sites}
        self._owners = {model.net.get_submodule(name) for name in owners}
        self.clock, self._cuts = 0, list[int]()
        self._missing = self._last_visits()

    def _last_visits(self) -> int:
        """How often sites must have been passed until nothing more needs to be recorded."""
        steps = self.model.n_denoise_steps if self.n_steps is None else self.n_steps
        return sum(steps if hook_names.is_denoised(name) else 1 for name in self.sites)

    def run(self, inputs: ModelInputs, noise: Sequence[Tensor]) -> None:
        points = list(self.model.points.values())
        try:
            for point in points:
                point.ctx[_NOTE], point.__class__ = self._note, _Noted
            with _watched(self.model.net, self.call):
                self.model(inputs, list(noise))
        except _EndOfTape:
            pass
        finally:
            for point in points:
                point.__class__ = HookPoint
                point.ctx.pop(_NOTE, None)
        for call in self.calls:
            # calls that the end of the tape cut short
            if not call.stop:
                call.stop, call.after, call.pure = self._tick(), len(self.calls), False
            if call.kept and tuple(leaf._version for leaf in _leaves(call.output)) != call.versions:
                call.kept, call.output = False, None

    def _tick(self) -> int:
        self.clock += 1
        return self.clock

    def _note(self, point: HookPoint) -> None:
        time, step = self._tick(), point.run.denoise_step
        self.passed.setdefault(point.name, []).append((time, step))
        if point.name in self.sites:
            self._cuts.append(time)
            self._missing -= 1
            if not self._missing:
                raise _EndOfTape

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        number = len(self.calls)
        call = _Call(module, self.model.run_state.denoise_step, self._tick())
        self.calls.append(call)
        if module in self._owners:
            # its sites may exist only while somebody listens
            self._cuts.append(call.start)
        given = [each for each in pytree.tree_leaves((args, kwargs)) if not isinstance(each, _PLAIN)]
        state = [_state(each) for each in given]
        output = forward(*args, **kwargs)
        call.stop, call.after = self._tick(), len(self.calls)
        inside = self.calls[number + 1 :]
        call.pure = state == [_state(each) for each in given] and all(each.pure for each in inside)
        leaves = pytree.tree_leaves(output)
        if call.pure and all(isinstance(leaf, _PLAIN) for leaf in leaves):
            call.output, call.kept = output, True
            call.versions = tuple(leaf._version for leaf in _tensors(leaves))
            if not self._cuts or self._cuts[-1] < call.start:
                # no edit will ever fall between this call's beginning and end
                for each in inside:
                    each.kept, each.output = False, None
        return output


class _Comparer:
    """Runs the doubled rows along a tape, and finds in every output the axis that the rows are on."""

    def __init__(self, model: HookedModel, calls: Sequence[_Call]) -> None:
        self.model, self.calls, self._next = model, calls, 0

    def run(self, inputs: ModelInputs, noise: Sequence[Tensor]) -> None:
        try:
            with _watched(self.model.net, self.call):
                self.model(inputs, list(noise))
        except _EndOfTape:
            pass
        for call in self.calls:
            if call.kept and call.repeat is None:
                call.kept, call.output = False, None

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        if self._next == len(self.calls):
            raise _EndOfTape
        call = self.calls[self._next]
        self._next += 1
        output = forward(*args, **kwargs)
        if call.module is module and call.kept:
            ours, theirs = _leaves(call.output), _leaves(output)
            axes = [_row_axis(a, b) for a, b in zip(ours, theirs, strict=True)] if len(ours) == len(theirs) else [-1]
            call.repeat = None if -1 in axes else tuple(axes)
        return output


class _Player:
    """Answers module calls from a tape for as long as nothing has been listened to."""

    def __init__(self, tape: Tape, n: int) -> None:
        self.tape, self.n = tape, n
        self.n_skipped = 0
        self._cut, self._next = 0, len(tape.calls)

    def begin(self, inputs: ModelInputs) -> None:
        """A forward pass begins: with which inputs, and who listens where?"""
        _check_copies(self.tape.inputs, inputs, self.n)
        listened = [
            self.tape.first(name, listener.at_steps)
            for name, point in self.tape.model.points.items()
            for listener in point.listeners
        ]
        self._cut, self._next = min(listened, default=self.tape.end), 0

    def call(self, module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        calls = self.tape.calls
        if self._next >= len(calls):
            return forward(*args, **kwargs)
        call = calls[self._next]
        if call.start >= self._cut:
            self._next = len(calls)
            return forward(*args, **kwargs)
        if call.module is not module:
            raise RuntimeError("the model takes another way through its modules than it did when it was recorded")
        if call.kept and call.stop < self._cut:
            self._next = call.after
            self.n_skipped += 1
            return self._output(call)
        self._next += 1
        return forward(*args, **kwargs)

    def _output(self, call: _Call) -> Any:
        leaves, spec = pytree.tree_flatten(call.output)
        if tuple(leaf._version for leaf in _tensors(leaves)) != call.versions:
            raise RuntimeError(f"a tensor that {type(call.module).__name__} returned was changed in place: record anew")
        axes = iter(call.repeat or ())
        repeated = [_repeated(leaf, next(axes), self.n) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        if torch.is_grad_enabled():
            # gradients are asked for at what follows, whether or not parameters want any
            repeated = [_differentiable(each) for each in repeated]
        return pytree.tree_unflatten(repeated, spec)


def _tensors(leaves: Sequence[Any]) -> list[Tensor]:
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _leaves(output: Any) -> list[Tensor]:
    return _tensors(pytree.tree_leaves(output))


def _state(thing: Any) -> Any:
    """What tells that an object was changed: its attributes, and how long those are that can grow."""
    held: Mapping[str, Any] = getattr(thing, "__dict__", {})
    return {
        name: (id(value), len(value) if isinstance(value, list | dict | set) else 0) for name, value in held.items()
    }


def _row_axis(one: Tensor, two: Tensor) -> int | None:
    """The axis that doubled, None for none; -1 where the shapes or the numbers fit neither."""
    if one.ndim != two.ndim or one.dtype != two.dtype:
        return -1
    grown = [i for i, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b]
    if len(grown) > 1 or any(two.shape[i] != 2 * one.shape[i] for i in grown):
        return -1
    axis = grown[0] if grown else None
    expected = _repeated(one, axis, 2)
    if not one.is_floating_point():
        return axis if torch.equal(expected, two) else -1
    scale = torch.linalg.vector_norm(expected, torch.inf)
    if not bool(scale.isfinite()):
        # minus infinity stands in masks, which must then be the same
        return axis if torch.equal(expected, two) else -1
    return axis if bool(torch.linalg.vector_norm(expected - two, torch.inf) <= _SAME * scale) else -1


def _repeated(tensor: Tensor, axis: int | None, n: int) -> Tensor:
    if axis is None or n == 1:
        return tensor
    return tensor.repeat([n if i == axis else 1 for i in range(tensor.ndim)])


def _differentiable(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
        return leaf
    # no leaf of the graph itself: hooks may change it in place
    return leaf.detach().requires_grad_().clone()


def _check_copies(recorded: ModelInputs, given: ModelInputs, n: int) -> None:
    rows = recorded.batch_size
    wrong = given.batch_size != rows * n or any(
        not torch.equal(value.repeat(n, *[1] * (value.ndim - 1)), getattr(given, name))
        for name, value in vars(recorded).items()
        if isinstance(value, Tensor)
    )
    if wrong:
        raise ValueError(f"a resumed run must be of the {n} copies of the {rows} rows that were recorded")
