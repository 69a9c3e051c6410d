"""sae_splice on the Triton kernels of its parts, against its reference in float64."""

from typing import Any

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor

from hooked_vla.kernels import sae_splice
from hooked_vla.kernels.sae_splice import reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(gate: str, error: bool, dtype: torch.dtype, n_features: int = 3) -> dict[str, Any]:
    """5 tokens of width 37, a dictionary of 131; two kinds of edit by row, one token outside the mask."""
    n, d, m, generator = 5, 37, 131, torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    b_enc = normal(m)
    return {
        "x": normal(n, d).to(dtype), "w_enc": (normal(m, d) / d**0.5).to(dtype), "b_enc": b_enc,
        "w_dec": (normal(m, d) / d**0.5).to(dtype), "b_dec": normal(d).to(dtype), "error": error,
        "k": 11 if gate == "topk" else None, "threshold": normal(m).abs() if gate == "threshold" else None,
        "features": b_enc.argsort(descending=True)[: 2 * n_features : 2].int(),
        "scale": normal(2, n_features), "shift": normal(2, n_features),
        "lo": torch.full((2, n_features), -1.5), "hi": torch.full((2, n_features), 2.0),
        "row": torch.tensor([0, 1, 1, 0, 1], dtype=torch.int32), "mask": torch.tensor([True, True, False, True, True]),
    }  # fmt: skip


def exact(case: dict[str, Any]) -> Tensor:
    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return reference.sae_splice(**{name: widened(value) for name, value in case.items()})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("gate", ["topk", "threshold"])
def test_against_float64(gate: str, error: bool, dtype: torch.dtype) -> None:
    case = make(gate, error, dtype)
    y = sae_splice(**case)
    assert y.dtype == dtype
    assert_within(y, exact(case), OUTPUT[dtype])
    assert same_bits(y[2], case["x"][2]) and not torch.equal(y[0], case["x"][0])


@pytest.mark.parametrize("n_features", [16, 17])
def test_counted_and_selected_members(n_features: int) -> None:
    """As many features as are ranked, and one more."""
    case = make("topk", True, torch.float32, n_features)
    assert_within(sae_splice(**case), exact(case), OUTPUT[torch.float32])


def test_of_equal_features_the_first_is_kept() -> None:
    case = make("topk", True, torch.float32, 2)
    copies = torch.tensor([3, 8, 57, 60, 130])
    case["w_enc"][copies], case["b_enc"][copies] = 0.0, 9.0
    case |= {"k": 3, "features": copies[2:4].int(), "scale": torch.zeros(1, 2), "row": None, "mask": None}
    case |= {"shift": None, "lo": None, "hi": None}
    change = sae_splice(**case) - case["x"]
    torch.testing.assert_close(change, -9.0 * case["w_dec"][57].expand_as(change), rtol=0, atol=1e-5)


def test_no_tokens() -> None:
    for gate in ("topk", "threshold"):
        for error in (False, True):
            case = make(gate, error, torch.float32)
            case |= {"x": case["x"][:0], "row": case["row"][:0], "mask": case["mask"][:0]}
            assert sae_splice(**case).shape == (0, 37)
