"""torch.autocast around an op changes nothing: not its result, nor its gradients, on any path."""

import pytest
import torch
from bounds import same_bits
from test_refusals import OPS, good
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla import kernels
from hooked_vla.kernels.dispatch import use


def results(op: str, dtype: torch.dtype) -> list[Tensor]:
    """What the op returns and, where it is differentiable, its gradients."""
    arguments = good(op)
    if op == "sae_splice":
        arguments |= {"error": False}
    for name in ("x", "src", "w_enc", "w_dec", "a", "b", "grad", "base"):
        if name in arguments and op != "fold_bias":
            arguments[name] = arguments[name].to(dtype)
    leaves = {}
    if op not in ("rank_count", "encode_gmax", "select_topk", "sparse_backward", "fold_bias"):
        leaves = {
            name: arguments[name].requires_grad_()
            for name in ("x", "w_enc", "w_dec", "a", "shift", "values", "delta") if name in arguments
        }  # fmt: skip
    made = getattr(kernels, op)(**arguments)
    found = [each for each in (made if isinstance(made, tuple) else (made,)) if each is not None]
    if leaves:
        sum(each.float().square().sum() for each in found if each.is_floating_point()).backward()
        found += [leaf.grad for leaf in leaves.values()]
    return [each.detach() for each in found]


@pytest.mark.parametrize("path", ["reference", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", OPS)
@unchecked_shapes()
def test_autocast_changes_no_bit(op: str, dtype: torch.dtype, path: str | None) -> None:
    with use(path):
        expected = results(op, dtype)
        with torch.autocast("cpu", torch.bfloat16):
            found = results(op, dtype)
            # and it is on again
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16
    assert [each.dtype for each in found] == [each.dtype for each in expected]
    assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("path", ["reference", None])
@unchecked_shapes()
def test_autocast_changes_no_top_k_splice(path: str | None) -> None:
    for error in (False, True):
        arguments = good("sae_splice") | {"threshold": None, "k": 4, "error": error}
        with use(path):
            expected = kernels.sae_splice(**arguments)
            with torch.autocast("cpu", torch.bfloat16):
                assert same_bits(kernels.sae_splice(**arguments), expected)
