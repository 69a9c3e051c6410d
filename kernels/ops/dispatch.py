"""Which implementation of an op runs: the one that `use` names, else the best one for the device of its input.

An override holds for the whole process, not for a thread: backward passes run in threads of autograd's own.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from importlib import import_module
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

PATHS = ("reference", "fused", "cpu")
FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Triton's tl.dot takes bfloat16 from here on
OLDEST_FUSED_CUDA = (8, 0)

_override: str | None = None
_logged: set[tuple[str, str, str]] = set()


class use:
    """Makes every op take one path: "reference", "fused", "cpu", or None for each op's own choice.

    As a function it holds until the next `use`; as a context manager until the block ends:

        use("reference")
        with use("fused"):
            ...

    Compiled functions and captured graphs follow it only as far as they call the op again: a compiled function does,
    a captured CUDA graph replays what it recorded. An op without the path raises ValueError when it is called.
    """

    def __init__(self, path: str | None) -> None:
        global _override
        if path is not None and path not in PATHS:
            raise ValueError(f"use: path must be one of {', '.join(map(repr, PATHS))} or None, got {path!r}")
        self.path, self._is_entered = path, False
        # what to go back to, for each block that is open
        self._before = [_override]
        _override = path

    def __enter__(self) -> None:
        global _override
        # of the first block it was noted when the object was made
        if self._is_entered:
            self._before.append(_override)
        self._is_entered = True
        _override = self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _override
        _override = self._before.pop()


@cache
def has_triton() -> bool:
    """Whether `import triton` would find something; does not import it."""
    return importlib.util.find_spec("triton") is not None


@cache
def _old_cuda(index: int) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(index) < OLDEST_FUSED_CUDA


def _interpreting() -> bool:
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _choose(op: str, paths: Mapping[str, object], x: Tensor) -> tuple[str, str]:
    """(path, why) when nothing overrides it."""
    if x.device.type == "cuda" and "fused" in paths:
        if x.dtype not in FUSED_DTYPES:
            return "reference", f"the fused path does not take {x.dtype}"
        if not has_triton():
            return "reference", "Triton is not installed"
        if _old_cuda(x.device.index or 0):
            return "reference", f"the fused path needs compute capability {OLDEST_FUSED_CUDA[0]}.0 or newer"
        return "fused", "a GPU and Triton are there"
    if x.device.type == "cpu" and "cpu" in paths:
        return "cpu", "it is the fast path on a CPU"
    return "reference", f"it is the only path for {x.device.type} tensors"


def _check_override(op: str, path: str, paths: Mapping[str, object], x: Tensor) -> None:
    if path not in paths:
        raise ValueError(f"{op}: no {path!r} path; it has {', '.join(map(repr, paths))}")
    if path == "cpu" and x.device.type != "cpu":
        raise ValueError(f"{op}: the 'cpu' path takes CPU tensors, got x on {x.device}")
    if path == "fused":
        if x.dtype not in FUSED_DTYPES:
            raise ValueError(f"{op}: the 'fused' path takes float32, bfloat16 or float16, got x of {x.dtype}")
        if not has_triton():
            raise ValueError(f"{op}: the 'fused' path needs Triton, which is not installed")
        if x.device.type != "cuda" and not _interpreting():
            raise ValueError(
                f"{op}: the 'fused' path takes {x.device.type} tensors only in Triton's interpreter: "
                "set TRITON_INTERPRET=1 before Triton is imported"
            )


def _there(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`run` with `device` as the current one: Triton launches on that, wherever its arguments are."""

    def on_device(*args: Any) -> Any:
        with torch.cuda.device(device):
            return run(*args)

    return on_device


def _is_autocast(device: torch.device) -> bool:
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def _as_declared(run: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`run` without torch.autocast, which would make its matrix products in another dtype than the op promises."""

    def without_autocast(*args: Any) -> Any:
        with torch.autocast(device.type, enabled=False):
            return run(*args)

    return without_autocast


def without_autocast(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A gradient formula (ctx, gradients...) in the dtypes that it states, whatever torch.autocast is around it."""

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor | None) -> Any:
        device = next((each.device for each in grads if each is not None), None)
        if device is None or not _is_autocast(device):
            return backward(ctx, *grads)
        return _as_declared(backward, device)(ctx, *grads)

    return run


def paths_of(package: str, function: str, paths: Sequence[str] = PATHS) -> dict[str, Callable[[], Callable[..., Any]]]:
    """What `implementation` takes, for a package with a module for each path, which is imported when it is taken."""
    return {path: lambda path=path: getattr(import_module(f"{package}.{path}"), function) for path in paths}


def implementation(op: str, paths: Mapping[str, Callable[[], Callable[..., Any]]], x: Tensor) -> Callable[..., Any]:
    """The function that computes `op` for inputs like `x`.

    paths: path -> a function without arguments that imports and returns the implementation; it must have "reference".
    Logs (INFO) the path and the reason the first time that an op takes it on a device type.
    Raises ValueError when an override asks for a path that the op has not, or that cannot take x.
    """
    if _override is None:
        path, why = _choose(op, paths, x)
    else:
        path, why = _override, 'use("' + _override + '")'
        _check_override(op, path, paths, x)
    key = (op, x.device.type, path)
    if key not in _logged:
        _logged.add(key)
        logger.info("%s on %s: %s path, because %s", op, x.device.type, path, why)
    run = paths[path]()
    if _is_autocast(x.device):
        run = _as_declared(run, x.device)
    if path == "fused" and x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return _there(run, x.device)
    return run
