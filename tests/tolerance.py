"""How closely numbers must agree, by dtype: one table for the whole project."""

import torch

# float32: against recorded values of the public implementation, same maths in another order of operations.
# bfloat16: against the same model in float32; 8 bits of mantissa through some 20 layers and 4 to 10 Euler steps.
RTOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
ATOL = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    torch.testing.assert_close(actual.float(), expected.float(), rtol=RTOL[dtype], atol=ATOL[dtype], check_device=False)
