"""openpi's message format: msgpack in which a numpy array is a map of its bytes, dtype and shape.

Read from openpi-client 0.1.2 (`openpi_client/msgpack_numpy.py`). Numbers only: arrays of Python objects, which the
format could carry as pickles, are refused on both sides, so nothing that comes in is ever run.
"""

import math
from typing import Any

import numpy as np

from hooked_vla.serving import needs_serve_extra

with needs_serve_extra():
    import msgpack

# dtype kinds that travel: bool, integers, floats
_KINDS = "biuf"
_MAX_NDIM = 8


class WireError(ValueError):
    """Bytes that are not a message of this format."""


def pack(message: Any) -> bytes:
    """A message of numbers, strings, lists, maps and numpy arrays as bytes.

    Raises WireError for arrays of anything but numbers, TypeError for other objects.
    """
    return bytes(msgpack.packb(message, default=_encode) or b"")


def unpack(data: bytes) -> Any:
    """The message that `pack`, or openpi's client, made these bytes of; its arrays may be changed.

    Raises WireError, saying what is wrong with them.
    """
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except WireError:
        raise
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise WireError(f"{len(data)} bytes are not a msgpack message: {type(error).__name__}: {error}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        kind = _check_kind(value.dtype)
        return {b"__ndarray__": True, b"data": value.tobytes(), b"dtype": kind.str, b"shape": value.shape}
    if isinstance(value, np.generic):
        kind = _check_kind(value.dtype)
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": kind.str}
    raise TypeError(f"a message holds numbers, strings, lists, maps and numpy arrays, not {type(value).__name__}")


def _decode(value: dict[Any, Any]) -> Any:
    if b"__ndarray__" in value:
        return _array(value)
    if b"__npgeneric__" in value:
        number = value.get(b"data")
        if not isinstance(number, bool | int | float):
            raise WireError(f"a numpy number of type {type(number).__name__}")
        try:
            return _dtype(value).type(number)
        except OverflowError as error:
            raise WireError(f"{number} does not fit into {_dtype(value)}") from error
    return value


def _array(value: dict[Any, Any]) -> np.ndarray:
    dtype, data, shape = _dtype(value), value.get(b"data"), value.get(b"shape")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape) or len(shape) > _MAX_NDIM:
        raise WireError(f"an array's shape is a list of at most {_MAX_NDIM} sizes, got {shape!r}")
    wanted = math.prod(shape) * dtype.itemsize
    if not isinstance(data, bytes) or len(data) != wanted:
        got = f"{len(data)} bytes" if isinstance(data, bytes) else type(data).__name__
        raise WireError(f"an array of {dtype} {shape} has {wanted} bytes, got {got}")
    return np.frombuffer(data, dtype).reshape(shape).copy()


def _dtype(value: dict[Any, Any]) -> np.dtype:
    name = value.get(b"dtype")
    if not isinstance(name, str):
        raise WireError(f"an array's dtype is a string such as '<f4', got {name!r}")
    try:
        return _check_kind(np.dtype(name))
    except (TypeError, SyntaxError) as error:
        raise WireError(f"unknown dtype {name!r}: {error}") from error


def _check_kind(dtype: np.dtype) -> np.dtype:
    if dtype.kind not in _KINDS:
        raise WireError(f"arrays hold numbers; dtype {dtype} is refused")
    return dtype
