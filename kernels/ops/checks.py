"""Checks of arguments, before any kernel runs. Every message names the op, the argument, what was expected, what came.

Shape, dtype, device and contiguity are always checked. Values are checked only where `validates` says so: it takes a
host synchronisation, which a GPU would wait for and which neither a captured graph nor a compiled one may contain.
"""

import operator
import weakref
from collections.abc import Sequence
from math import isfinite
from typing import Any

import torch
from torch import Tensor

Dtypes = torch.dtype | tuple[torch.dtype, ...]

# id -> a parameter that was found in order, and what its contents were then: see `check_parameter`
_looked_at: dict[int, tuple[weakref.ref[Tensor], tuple[Any, ...]]] = {}


def wide(dtype: torch.dtype) -> torch.dtype:
    """What sums over tokens of a dtype are kept in: float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _shape(shape: Sequence[int | None]) -> str:
    return "[" + ", ".join("*" if size is None else str(size) for size in shape) + "]"


def check_dtype(op: str, name: str, t: Tensor, dtype: Dtypes) -> None:
    """Raises TypeError unless t is a tensor of the dtype, or of one of them."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if t.dtype not in allowed:
        wanted = " or ".join(dict.fromkeys(map(_name, allowed)))
        raise TypeError(f"{op}: {name} must be {wanted}, got {_name(t.dtype)}")


def check_matrix(
    op: str,
    name: str,
    t: Tensor,
    shape: Sequence[int | None],
    dtype: Dtypes | None = None,
    device: torch.device | None = None,
    contiguous: bool = True,
) -> None:
    """Checks a tensor of any rank; None in `shape` stands for any size, a tuple of dtypes for any of them.

    Raises TypeError for a wrong dtype (or no tensor), ValueError for a wrong shape, device or layout.
    """
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(t).__name__}")
    sizes = zip(t.shape, shape, strict=False)
    if t.dim() != len(shape) or any(want is not None and have != want for have, want in sizes):
        raise ValueError(f"{op}: {name} must have shape {_shape(shape)}, got {_shape(t.shape)}")
    if dtype is not None:
        check_dtype(op, name, t, dtype)
    if device is not None and t.device != device:
        raise ValueError(f"{op}: {name} must be on {device}, got {t.device}")
    if contiguous and not t.is_contiguous():
        raise ValueError(
            f"{op}: {name} must be contiguous, got shape {_shape(t.shape)} with strides {tuple(t.stride())}"
        )


def check_same(op: str, name: str, t: Tensor, x: Tensor) -> None:
    """Raises TypeError unless t has x's dtype, ValueError unless it is on x's device."""
    check_dtype(op, name, t, x.dtype)
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device} as x is, got {t.device}")


def validates(validate: bool | None, x: Tensor) -> bool:
    """Whether values are looked at: as asked, by default on a CPU; never while compiling or capturing a CUDA graph."""
    if torch.compiler.is_compiling() or x.is_meta:
        return False
    if x.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return x.device.type == "cpu" if validate is None else validate


def check_int(op: str, name: str, value: Any) -> int:
    """The number as Python has it. Raises TypeError unless it is a whole one: True, 2.0 and tensors are not."""
    # the second is a size that torch.compile leaves open
    if isinstance(value, int | torch.SymInt) and not isinstance(value, bool):
        return value  # pyright: ignore[reportReturnType]
    if isinstance(value, bool | Tensor) or not hasattr(type(value), "__index__"):
        raise TypeError(f"{op}: {name} must be a whole number, got {value!r} ({type(value).__name__})")
    return operator.index(value)


def check_range(op: str, name: str, indices: Tensor, upper: int, lower: int = 0) -> None:
    """Raises ValueError unless every index is in [lower, upper). Synchronises with the host."""
    if indices.numel() == 0:
        return
    smallest, largest = (int(each) for each in indices.aminmax())
    if smallest < lower or largest >= upper:
        outside = smallest if smallest < lower else largest
        raise ValueError(f"{op}: {name} must lie in [{lower}, {upper}), got {outside}")


def check_finite(op: str, name: str, t: Tensor, rows: Tensor | None = None, infinite: bool = False) -> None:
    """Raises ValueError if t holds a NaN, or an infinity unless `infinite` allows it. Synchronises with the host.

    rows: bool, one for each row of t; only those are looked at.
    """
    # a sum is finite only if every term is; it costs one pass and no temporary
    if isfinite(t.sum(dtype=wide(t.dtype)).item()):
        return
    bad = t.isnan() if infinite else ~t.isfinite()
    if rows is not None:
        bad &= rows.view(-1, *[1] * (t.dim() - 1))
    if bool(bad.any()):
        where = tuple(int(each) for each in bad.nonzero()[0])
        wanted = "no NaN" if infinite else "finite values"
        raise ValueError(f"{op}: {name} must hold {wanted}, got {t[where].item()} at {list(where)}")


def check_parameter(op: str, name: str, t: Tensor, infinite: bool = False) -> None:
    """`check_finite` of what stays the same from call to call: weights and tables of edits.

    A tensor that was found in order is looked at again only once PyTorch has counted a change in place, or its memory
    is another. What is written past PyTorch (through `.data` or NumPy) is not counted. Tensors made in inference mode
    count nothing: those are looked at every time.
    """
    if t.is_inference():
        check_finite(op, name, t, infinite=infinite)
        return
    key, state = id(t), (t._version, t.data_ptr(), t.dtype, infinite)
    held = _looked_at.get(key)
    if held is not None and held[0]() is t and held[1] == state:
        return
    check_finite(op, name, t, infinite=infinite)

    def forget(gone: weakref.ref[Tensor]) -> None:
        # its number may belong to another tensor by now
        if (entry := _looked_at.get(key)) is not None and entry[0] is gone:
            del _looked_at[key]

    _looked_at[key] = (weakref.ref(t, forget), state)
