"""x + delta on a CPU: rounded once, and x's own bits where delta is zero."""

import pytest
import torch
from bounds import same_bits

from hooked_vla.kernels.adding import added


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zero", [0.0, -0.0])
@pytest.mark.parametrize("with_minus_zero", [False, True])
def test_nothing_added_keeps_every_bit(dtype: torch.dtype, zero: float, with_minus_zero: bool) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1, 1], x[2, 2], x[3, 3], x[4, 4] = 0.0, torch.nan, -torch.inf, torch.finfo(dtype).smallest_normal
    if with_minus_zero:
        x[1, 2:] = -0.0
    before = x.clone()
    wide = torch.promote_types(dtype, torch.float32)
    nothing = torch.full((6, 5), zero, dtype=wide)
    assert same_bits(added(x, nothing), before) and same_bits(x, before)
    some = torch.where(torch.arange(5) % 2 == 0, torch.randn(6, 5, dtype=wide), zero)
    y = added(x, some.clone())
    assert same_bits(y[:, 1::2], before[:, 1::2]) and same_bits(x, before)
    assert same_bits(y[:, ::2], (before.to(wide) + some).to(dtype)[:, ::2])


def test_of_no_tokens() -> None:
    assert added(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0, 4)
