"""The whole of `sample_actions` compiled, edits included: by Inductor, or as a CUDA graph.

Attached edits are part of what is compiled, their parameters and masks are not: those stand in tensors that are read at
every call. So `EditSet.set`, another environment step and other inputs of the same shapes run what was compiled
before; other edits, other shapes and other denoise steps compile again.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hooked_vla.hooks.model import HookedModel
from hooked_vla.inputs import ModelInputs
from hooked_vla.interventions.inductor import exact_options, fused_options, unfused_options
from hooked_vla.interventions.program import Program

logger = logging.getLogger(__name__)

MODES = ("exact", "fused")
# shapes and sets of edits that are kept; each holds the memory of a forward pass
LIMIT = 16
_WARM_UP = 3

Sample = Callable[[ModelInputs, Any], Tensor]


class Compiled:
    """Stands in for a model's `sample_actions` until `remove`; as a context manager, until the end of the block."""

    def __init__(self, model: HookedModel, sample: Sample, mode: str, on_remove: Callable[[], None]) -> None:
        """sample: the plain function of inputs and noise.

        Raises ValueError for an unknown mode.
        """
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        self.model, self.mode = model, mode
        self._sample, self._on_remove, self._warned = sample, on_remove, False
        self._runs: OrderedDict[Hashable, InductorRun | CapturedGraph] = OrderedDict()
        self._forgotten = 0

    def remove(self) -> None:
        """Go back to the plain function."""
        self._runs.clear()
        self._on_remove()

    def __enter__(self) -> "Compiled":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __call__(self, inputs: ModelInputs, noise: Any) -> Float[Tensor, "batch step d_padded"]:
        """What the plain function returns.

        Hook functions and captures, and runs whose gradients are recorded, take the plain function.
        """
        attached = [(name, listener.fn) for name, p in self.model.points.items() for listener in p.listeners]
        if functions := sorted({name for name, fn in attached if not isinstance(fn, Program)}):
            return self._plain(inputs, noise, f"functions are attached to {', '.join(functions[:3])}")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            return self._plain(inputs, noise, "gradients are recorded")
        draws = None if noise is None else [noise] if isinstance(noise, Tensor) else list(noise)
        key = (_signature(inputs), _signature(draws), tuple((name, id(fn)) for name, fn in attached))
        with torch.no_grad():
            if key not in self._runs:
                # the programs in the key live as long as the entry, so that their ids stay theirs
                self._runs[key] = self._make(inputs, draws, attached)
                while len(self._runs) > LIMIT:
                    self._forgotten += self._runs.popitem(last=False)[1].n_compilations
            self._runs.move_to_end(key)
            return self._runs[key](inputs, draws)

    def _plain(self, inputs: ModelInputs, noise: Any, why: str) -> Tensor:
        if not self._warned:
            logger.warning("the compiled model runs uncompiled, because %s", why)
            self._warned = True
        return self._sample(inputs, noise)

    def _make(
        self, inputs: ModelInputs, draws: Any, attached: Sequence[tuple[str, Any]]
    ) -> "InductorRun | CapturedGraph":
        on_gpu = next((p.is_cuda for p in self.model.parameters() if not p.is_meta), False)
        if on_gpu and self.mode == "exact":
            return CapturedGraph(self._sample, inputs, draws, attached)
        return InductorRun(self._sample, self.mode == "exact", attached)

    @property
    def n_fallbacks(self) -> int:
        """How many of the compilations that are kept had to do without fusion, to have eager's bits."""
        return sum(run.is_unfused for run in self._runs.values())

    @property
    def n_compilations(self) -> int:
        """How often something was compiled, or captured, since the model is compiled."""
        return self._forgotten + sum(run.n_compilations for run in self._runs.values())


class InductorRun:
    """`sample` compiled by Inductor, for inputs of fixed shapes.

    exact: the first call is compared with `sample` itself, bit for bit; where they differ after all, Inductor fuses
    nothing. kept: what must live as long as the compiled code. n_compilations: graphs compiled so far.
    """

    def __init__(self, sample: Sample, exact: bool, kept: object) -> None:
        self.sample, self.kept, self.n_compilations = sample, kept, 0
        self._left = [exact_options, unfused_options] if exact else [fused_options]
        self._is_checked, self.is_unfused = not exact, False
        self._compile()

    def _compile(self) -> None:
        options = self._left.pop(0)()
        self._compiled = torch.compile(self.sample, fullgraph=True, dynamic=False, options=options)

    def __call__(self, inputs: ModelInputs, draws: Any) -> Tensor:
        if self._is_checked:
            return self._run(inputs, draws)
        before = torch.get_rng_state()
        expected = self.sample(inputs, draws)
        torch.set_rng_state(before)
        while not _same_bits(self._run(inputs, draws), expected):
            if not self._left:
                raise RuntimeError("the compiled model computes other bits than the model")
            logger.warning("what Inductor fused changes bits: compiling again without fusion")
            self.is_unfused = True
            self._compile()
            torch.set_rng_state(before)
        self._is_checked = True
        return expected

    def _run(self, inputs: ModelInputs, draws: Any) -> Tensor:
        from torch._dynamo import config
        from torch._dynamo.exc import Unsupported, UserError
        from torch._dynamo.utils import counters

        before = counters["stats"]["unique_graphs"]
        # every entry has graphs of its own, and all of them belong to one function
        with config.patch(recompile_limit=4 * LIMIT, accumulated_recompile_limit=1024):
            try:
                actions = self._compiled(inputs, draws)
            except (UserError, Unsupported) as error:
                raise RuntimeError(
                    "this model does not compile as one graph: what it computes next depends on what it has computed, "
                    f"as where it generates tokens until one of them is the last; run it uncompiled. PyTorch: {error}"
                ) from error
        self.n_compilations += counters["stats"]["unique_graphs"] - before
        return actions


def _same_bits(first: Tensor, second: Tensor) -> bool:
    return torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8))


class CapturedGraph:
    """One CUDA graph: `sample` on inputs of fixed shapes, replayed after copying new ones into place."""

    n_compilations, is_unfused = 1, False

    def __init__(self, sample: Sample, inputs: ModelInputs, draws: Any, kept: object) -> None:
        """draws: every random draw, or None for fresh ones at every replay. kept: what must live as long as the graph.

        Raises RuntimeError, from CUDA, where the model does what a graph cannot hold, such as waiting for the host.
        """
        self.kept = kept
        self.inputs = replace(inputs, **{name: t.clone() for name, t in _tensors(inputs).items()})
        device = next(iter(_tensors(inputs).values())).device
        self.draws = None if draws is None else [draw.to(device, copy=True) for draw in draws]
        constants = _Constants()
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                with constants.recording():
                    sample(self.inputs, self.draws)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.constants, self.graph = constants, torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), constants.replaying():
            self.actions = sample(self.inputs, self.draws)

    def __call__(self, inputs: ModelInputs, draws: Any) -> Tensor:
        for name, held in _tensors(self.inputs).items():
            held.copy_(getattr(inputs, name), non_blocking=True)
        for held, draw in zip(self.draws or (), draws or (), strict=True):
            held.copy_(draw, non_blocking=True)
        self.graph.replay()
        # the next replay writes over it
        return self.actions.clone()


class _Constants(TorchFunctionMode):
    """Tensors made of Python numbers on a GPU: copies from the host, which a graph cannot hold, so kept from before."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.taken: int | None = None

    def recording(self) -> "_Constants":
        self.made, self.taken = [], None
        return self

    def replaying(self) -> "_Constants":
        self.taken = 0
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if func is not torch.tensor or device is None or torch.device(device).type == "cpu":
            return func(*args, **kwargs)
        if self.taken is None:
            self.made.append(func(*args, **kwargs))
            return self.made[-1]
        self.taken += 1
        return self.made[self.taken - 1]


def _tensors(inputs: ModelInputs) -> dict[str, Tensor]:
    named = {each.name: getattr(inputs, each.name) for each in fields(inputs)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def _signature(value: Any) -> Hashable:
    """What compiled code depends on: everything but the contents of tensors."""
    if isinstance(value, Tensor):
        return (tuple(value.shape), value.dtype, str(value.device), tuple(value.stride()))
    if isinstance(value, ModelInputs):
        return (type(value), *((each.name, _signature(getattr(value, each.name))) for each in fields(value)))
    if isinstance(value, list | tuple):
        return tuple(_signature(each) for each in value)
    return value
