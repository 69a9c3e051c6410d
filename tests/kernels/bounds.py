"""How closely the ops must agree with their reference in float64, and what tests of ops share.

An error is a row's norm of the difference over the row's norm of the expected values; the worst row counts.
"""

import torch
from torch import Tensor

# float32 accumulation, rounded once to the output's dtype. A rounding to bfloat16 (8 bits) is at most 2^-9 = 2e-3 of a
# value, to float16 (11 bits) at most 2^-12 = 2.4e-4; twice that, and the order of float32 sums, is allowed.
OUTPUT = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 7e-4, torch.float64: 1e-13}
# of y - x, where the rounding of y is large beside a small edit: for an edit about as long as its token
EDIT = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-12}


def row_error(actual: Tensor, expected: Tensor) -> float:
    """The largest ‖actual - expected‖ / ‖expected‖ of any row; NaN anywhere counts as infinite."""
    difference = (actual.double() - expected.double()).norm(dim=-1)
    scale = expected.double().norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    error = torch.where(difference == 0, 0.0, difference / scale)
    return float(error.nan_to_num(nan=float("inf")).max()) if error.numel() else 0.0


def assert_within(actual: Tensor, expected: Tensor, bound: float) -> None:
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error = row_error(actual, expected)
    assert error <= bound, f"worst row is off by {error:.2e} of its norm, allowed {bound:.0e}"


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal bit for bit: -0.0 is not 0.0, a NaN equals itself."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(ints), b.contiguous().view(ints))
