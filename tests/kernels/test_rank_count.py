"""rank_count: places in the order of the top k, ties by index, what it refuses."""

import pytest
import torch
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.rank_count import rank_count
from hooked_vla.kernels.sae_encode_topk import reference, sae_encode_topk

PATHS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def integers(n: int, d: int, m: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Small whole numbers: z is exact in every dtype and order, and most of its values occur many times."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-2, 3, (n, d), generator=generator).to(dtype)
    w_enc = torch.randint(-1, 2, (m, d), generator=generator).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return x, w_enc, torch.randint(-1, 2, (m,), generator=generator).to(wide)


def some(m: int, count: int) -> Tensor:
    """Features in no order, the first and the last among them."""
    return torch.linspace(m - 1, 0, count).round().int()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(7, 20, 300, 5), (1, 1, 1, 1), (9, 6, 40, 16)])
def test_is_the_place_in_the_order(dtype: torch.dtype, size: tuple[int, int, int, int], path: str) -> None:
    n, d, m, count = size
    given, features = integers(n, d, m, dtype), some(m, count)
    with use(path):
        counts = rank_count(*given, features)
    assert counts.shape == (n, count) and counts.dtype == torch.int32
    order = reference.select(reference.encode(*given), m)[1]
    for token, row in enumerate(counts.tolist()):
        assert [int(order[token, rank]) for rank in row] == features.tolist()


@pytest.mark.parametrize("k", [1, 9, 64])
def test_below_k_is_among_the_top_k(k: int) -> None:
    """Copies of features too, of which the earlier comes first."""
    generator = torch.Generator().manual_seed(3)
    x, w_enc = (torch.randn(size, 30, generator=generator) for size in (6, 150))
    w_enc[100:] = w_enc[50:100]
    b_enc, features = torch.zeros(150), some(150, 16)
    with use("reference"):
        _, indices = sae_encode_topk(x, w_enc, b_enc, k)
    among = (indices[:, :, None] == features).any(1)
    assert torch.equal(rank_count(x, w_enc, b_enc, features) < k, among)


@pytest.mark.parametrize("path", PATHS)
def test_nan_is_the_largest(path: str) -> None:
    x, w_enc, b_enc = integers(4, 12, 50, torch.float32)
    b_enc[[3, 30]] = torch.nan
    with use(path):
        counts = rank_count(x, w_enc, b_enc, torch.tensor([30, 3, 2], dtype=torch.int32), validate=False)
    assert (counts[:, 0] == 1).all() and (counts[:, 1] == 0).all() and (counts[:, 2] >= 2).all()


@pytest.mark.parametrize(("n", "count"), [(0, 3), (5, 0)])
def test_nothing_to_count(n: int, count: int) -> None:
    assert rank_count(*integers(n, 12, 40, torch.bfloat16), some(40, count)).shape == (n, count)


@unchecked_shapes()
def test_compiles_as_one_graph_with_features_that_change() -> None:
    torch._dynamo.reset()
    given, features = integers(5, 12, 40, torch.float32), some(40, 3)
    compiled = torch.compile(lambda x: rank_count(x, *given[1:], features) < 4, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(given[0]), rank_count(*given, features) < 4)
    with torch.compiler.set_stance("fail_on_recompile"):
        features.copy_(torch.tensor([7, 7, 8]))
        assert torch.equal(compiled(given[0]), rank_count(*given, features) < 4)


@unchecked_shapes()
def test_is_a_well_formed_torch_op() -> None:
    given = integers(4, 5, 9, torch.float32)
    torch.library.opcheck(torch.ops.hooked_vla.rank_count.default, (*given, some(9, 3)))


def test_carries_no_gradient() -> None:
    given = [each.requires_grad_() for each in integers(4, 5, 9, torch.float32)]
    assert not rank_count(*given, some(9, 3)).requires_grad


GOOD = dict(zip(("x", "w_enc", "b_enc"), integers(4, 5, 24, torch.float32), strict=True)) | {"features": some(24, 3)}
WRONG = {
    "x of integers": ({"x": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "x must be float32"),
    "w_enc of another width": ({"w_enc": torch.zeros(24, 4)}, ValueError, r"w_enc must have shape \[\*, 5\]"),
    "b_enc of another m": ({"b_enc": torch.zeros(23)}, ValueError, r"b_enc must have shape \[24\], got \[23\]"),
    "features long": ({"features": torch.zeros(3, dtype=torch.int64)}, TypeError, "features must be int32, got int64"),
    "features in a matrix": ({"features": torch.zeros(1, 3).int()}, ValueError, r"features must have shape \[\*\]"),
    "too many features": ({"features": torch.zeros(17).int()}, ValueError, "features must be at most 16, got 17"),
    "feature m": ({"features": torch.full((3,), 24).int()}, ValueError, r"features must lie in \[0, 24\), got 24"),
    "feature -1": ({"features": torch.full((3,), -1).int()}, ValueError, r"features must lie in \[0, 24\), got -1"),
    "w_enc a NaN": ({"w_enc": torch.full((24, 5), torch.nan)}, ValueError, "w_enc must hold finite values, got nan"),
}


@pytest.mark.parametrize("case", WRONG)
@unchecked_shapes()
def test_says_what_is_wrong(case: str) -> None:
    changed, error, message = WRONG[case]
    rank_count(**GOOD)
    with pytest.raises(error, match=f"^rank_count: {message}"):
        rank_count(**(GOOD | changed))
