"""Makes Triton's interpreter (3.6 to 3.9) tell the truth, and tests notice what a kernel leaves unwritten.

A pytest plugin, loaded by __main__.py, which sets TRITON_INTERPRET=1 first.

- bfloat16: the interpreter keeps the raw 16 bits and multiplies those, without an exception. tl.dot is given float32
  operands instead (exact: a product of two bfloat16 fits), every other arithmetic on bfloat16 raises. Selecting is
  right as it is. Conversion from float32 truncates, and conversion to it gets subnormal numbers wrong; here the one
  rounds to the nearest, ties to even, as GPUs do, and the other is exact.
- tl.dot is numpy's matmul, whose bits depend on where in a block a row is, and on the processor: here every element is
  a sum in one order, as on tensor cores.
- Scalars are arrays of one element, which numpy >= 2.4 no longer turns into loop bounds.
- tl.sort and tl.topk go through a reduction with xor, a Python loop over elements: numpy has it in one call.
"""

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from hooked_vla.kernels import dispatch

# what an int tensor holds where nobody wrote: an index that no test's dictionary has
UNWRITTEN = -(2**30) + 7


def _widen(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def _convert_bfloat16() -> None:
    plain = interpreter._convert_float

    def convert(data, source, target, rounding):
        if (source, target) == (tl.bfloat16, tl.float32):
            return (data.astype(np.uint32) << 16).view(np.float32)
        if (source, target) != (tl.float32, tl.bfloat16) or rounding == interpreter._ir.ROUNDING_MODE.RTZ:
            return plain(data, source, target, rounding)
        bits = np.ascontiguousarray(data).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        # the carry would turn some NaN into an infinity
        return np.where(np.isnan(data), (bits >> 16) | 0x40, rounded).astype(np.uint16)

    interpreter._convert_float = convert


def _is_bfloat16(value: object) -> bool:
    return isinstance(value, interpreter.TensorHandle) and value.dtype.scalar == tl.bfloat16


def _dots_in_order(builder: type) -> None:
    def create_dot(self, a, b, accumulator, *rest):
        kind = accumulator.data.dtype
        left, right = (_widen(each).data.astype(kind) for each in (a, b))
        total = np.zeros_like(accumulator.data)
        # what is not a number stays so, as quietly as in matmul
        with np.errstate(invalid="ignore", over="ignore"):
            for k in range(left.shape[-1]):
                total += left[..., :, k, None] * right[..., None, k, :]
        return interpreter.TensorHandle(total + accumulator.data, accumulator.dtype.scalar)

    builder.create_dot = create_dot


def _refuse_bfloat16(builder: type, name: str) -> None:
    plain = getattr(builder, name)

    def guarded(self, *handles, **options):
        if any(_is_bfloat16(each) for each in (*handles, *options.values())):
            raise TypeError(f"{name} on bfloat16, which the interpreter gets wrong: convert with .to(tl.float32) first")
        return plain(self, *handles, **options)

    setattr(builder, name, guarded)


def _reduce_in_numpy() -> None:
    plain = interpreter.ReduceOps.apply_impl

    def apply_impl(self, inputs):
        if any(each.dtype.scalar == tl.bfloat16 for each in inputs):
            raise TypeError("reduction of bfloat16, wrong in the interpreter: convert with .to(tl.float32) first")
        if self.combine_fn is tl.standard._xor_combine:
            data = inputs[0].handle.data
            folded = np.bitwise_xor.reduce(data, axis=self.axis, keepdims=self.keep_dims)
            return self.to_tensor(folded, inputs[0].dtype)
        return plain(self, inputs)

    interpreter.ReduceOps.apply_impl = apply_impl


def _index_with_one_element() -> None:
    plain = interpreter._patch_lang_tensor

    def patch(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch


_convert_bfloat16()
_dots_in_order(interpreter.InterpreterBuilder)
for _name in ("binary_op", "unary_op", "create_clampf", "create_fma", "create_fabs"):
    _refuse_bfloat16(interpreter.InterpreterBuilder, _name)
_reduce_in_numpy()
_index_with_one_element()


def poison(made: torch.Tensor) -> torch.Tensor:
    """`made`, filled with what no result contains."""
    if made.is_floating_point():
        return made.fill_(float("nan"))
    if made.dtype in (torch.int32, torch.int64):
        return made.fill_(UNWRITTEN)
    return made


@pytest.fixture(autouse=True)
def _poisoned_allocations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written and did not comes out as NaN, not as a lucky zero."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        plain = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, _plain=plain, **kwargs: poison(_plain(*args, **kwargs)))


@pytest.fixture(autouse=True)
def _fused():
    """Every op takes its Triton kernels; a check that wants the reference says so."""
    torch.set_num_threads(1)
    with dispatch.use("fused"):
        yield
