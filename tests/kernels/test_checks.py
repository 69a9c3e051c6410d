"""Every message names the op, the argument, what was expected and what came."""

import gc

import numpy as np
import pytest
import torch
from unchecked import unchecked_shapes

from hooked_vla.kernels import checks
from hooked_vla.kernels.checks import (
    check_finite,
    check_int,
    check_matrix,
    check_parameter,
    check_range,
    check_same,
    validates,
)

X = torch.zeros(3, 4)


@unchecked_shapes()
def test_a_fitting_tensor_passes() -> None:
    check_matrix("op", "x", X, (3, None), torch.float32, torch.device("cpu"))
    check_matrix("op", "x", X, (None, 4), (torch.bfloat16, torch.float32))
    check_matrix("op", "x", X.T, (4, 3), contiguous=False)
    check_matrix("op", "x", torch.zeros(0, 4), (0, 4))
    check_same("op", "base", X, X)
    check_range("op", "row", torch.tensor([0, 2]), 3)
    check_range("op", "row", torch.tensor([], dtype=torch.int32), 0)
    check_range("op", "segment", torch.tensor([-1, 2]), 3, lower=-1)


@unchecked_shapes()
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check_matrix("op", "w", X, (3, 5)), ValueError, r"op: w must have shape \[3, 5\], got \[3, 4\]"),
        (lambda: check_matrix("op", "w", X, (None,)), ValueError, r"op: w must have shape \[\*\], got \[3, 4\]"),
        (lambda: check_matrix("op", "w", None, (3,)), TypeError, r"op: w must be a tensor, got NoneType"),
        (
            lambda: check_matrix("op", "w", X, (3, 4), (torch.bfloat16, torch.float16)),
            TypeError,
            r"op: w must be bfloat16 or float16, got float32",
        ),
        (
            lambda: check_matrix("op", "w", X, (3, 4), device=torch.device("meta")),
            ValueError,
            r"op: w must be on meta, got cpu",
        ),
        (
            lambda: check_matrix("op", "w", X.T, (4, 3)),
            ValueError,
            r"op: w must be contiguous, got shape \[4, 3\] with strides \(1, 4\)",
        ),
        (lambda: check_same("op", "w", X.half(), X), TypeError, r"op: w must be float32, got float16"),
        (lambda: check_same("op", "w", X.to("meta"), X), ValueError, r"op: w must be on cpu as x is, got meta"),
        (lambda: check_range("op", "row", torch.tensor([0, 3]), 3), ValueError, r"op: row .* \[0, 3\), got 3"),
        (lambda: check_range("op", "row", torch.tensor([-2, 1]), 3, -1), ValueError, r"\[-1, 3\), got -2"),
    ],
)
def test_an_unfitting_one_is_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


@unchecked_shapes()
def test_values_that_are_not_finite() -> None:
    bad = X.clone()
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match=r"op: x must hold finite values, got nan at \[1, 2\]"):
        check_finite("op", "x", bad)
    check_finite("op", "x", bad, rows=torch.tensor([True, False, True]))
    with pytest.raises(ValueError, match=r"got nan at \[1, 2\]"):
        check_finite("op", "x", bad, rows=torch.tensor([False, True, False]))
    bad[1, 2] = float("inf")
    with pytest.raises(ValueError, match=r"got inf at \[1, 2\]"):
        check_finite("op", "x", bad)
    check_finite("op", "hi", bad, infinite=True)
    bad[0, 0] = -float("inf")
    check_finite("op", "hi", bad, infinite=True)
    # a sum that overflows, of terms that do not
    check_finite("op", "x", torch.full((4,), torch.finfo(torch.float32).max))


@unchecked_shapes()
def test_values_are_looked_at_on_a_cpu_unless_told() -> None:
    assert validates(None, X) and validates(True, X) and not validates(False, X)
    assert not validates(True, X.to("meta"))
    seen = []

    def traced(x):
        seen.append(validates(True, x))
        return x + 1

    torch._dynamo.reset()
    torch.compile(traced, backend="eager")(X)
    assert seen in ([], [False])


@unchecked_shapes()
def test_parameters_are_looked_at_again_when_they_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def look(op: str, name: str, t: torch.Tensor, infinite: bool = False) -> None:
        looked.append(name)
        check_finite(op, name, t, infinite=infinite)

    monkeypatch.setattr(checks, "check_finite", look)
    weights = torch.zeros(3, 4)
    for _ in range(3):
        check_parameter("op", "w", weights)
    check_parameter("op", "another", weights.clone())
    assert looked == ["w", "another"]
    # allowing infinity is another question
    check_parameter("op", "w", weights, infinite=True)
    check_parameter("op", "w", weights)
    assert len(looked) == 4
    part = weights[1]
    with torch.no_grad():
        part[2] = torch.nan
    for _ in range(2):
        with pytest.raises(ValueError, match=r"op: w must hold finite values, got nan at \[1, 2\]"):
            check_parameter("op", "w", weights)
    weights.zero_()
    check_parameter("op", "w", weights)
    weights.data = torch.full((2,), torch.inf)
    with pytest.raises(ValueError, match="w must hold finite values, got inf"):
        check_parameter("op", "w", weights)
    with torch.inference_mode():
        uncounted = torch.zeros(2)
    check_parameter("op", "w", uncounted)
    with torch.inference_mode():
        uncounted[0] = torch.nan
    with pytest.raises(ValueError, match="w must hold finite values, got nan"):
        check_parameter("op", "w", uncounted)


@unchecked_shapes()
def test_parameters_that_are_gone_are_forgotten() -> None:
    weights = torch.zeros(5)
    number = id(weights)
    check_parameter("op", "w", weights)
    assert number in checks._looked_at
    del weights
    gc.collect()
    assert number not in checks._looked_at


@unchecked_shapes()
def test_whole_numbers() -> None:
    for good in (3, np.int64(3), np.uint8(3)):
        found = check_int("op", "k", good)
        assert found == 3 and type(found) is int
    for bad in (2.0, 2.5, "3", True, np.float32(2), None, torch.tensor(2)):
        with pytest.raises(TypeError, match=r"^op: k must be a whole number, got "):
            check_int("op", "k", bad)
