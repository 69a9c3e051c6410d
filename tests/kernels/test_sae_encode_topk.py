"""sae_encode_topk: the exact and always the same choice, its two halves, its gradients, what it refuses."""

import pytest
import torch
from bounds import OUTPUT, assert_within, same_bits
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla.kernels.dispatch import use
from hooked_vla.kernels.sae_encode_topk import cpu, encode_gmax, packed, reference, sae_encode_topk, select_topk

PATHS = ("reference", "cpu")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# how far apart two float32 sums of the same numbers may be: z of about 1, d of about 100
MARGIN = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


@pytest.fixture(autouse=True)
def _runs_are_used_at_small_sizes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "RUNS_FROM", 8)


def make(n: int, d: int, m: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x, w_enc, b_enc."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator).to(dtype)
    w_enc = torch.randn(m, d, generator=generator).div(d**0.5).to(dtype)
    return x, w_enc, torch.randn(m, generator=generator).to(torch.promote_types(dtype, torch.float32)) * 0.1


def integers(n: int, m: int, seed: int = 0) -> Tensor:
    """z in which most values occur many times, both zeros among them."""
    z = torch.randint(-3, 4, (n, m), generator=torch.Generator().manual_seed(seed)).float()
    return torch.where((z == 0) & (torch.arange(m) % 2 == 0), -0.0, z)


def by_python(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Sorted as tuples (NaN first, larger value, smaller index)."""
    indices = []
    for row in z.tolist():
        keyed = [(0.0, -torch.inf, i) if v != v else (1.0, -v, i) for i, v in enumerate(row)]
        indices.append([i for *_, i in sorted(keyed)[:k]])
    chosen = torch.tensor(indices, dtype=torch.int32).view(z.shape[0], k)
    return z.gather(1, chosen.long()), chosen


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [(13, 33, 301, 7), (1, 1, 1, 1), (4, 20, 40, 40), (9, 100, 2000, 16)])
@pytest.mark.parametrize("relu", [True, False])
def test_nothing_larger_is_left_out(path: str, dtype: torch.dtype, size: tuple[int, int, int, int], relu: bool) -> None:
    *shape, k = size
    given = make(*shape, dtype)
    with use(path):
        values, indices = sae_encode_topk(*given, k, relu=relu)
    assert indices.dtype == torch.int32 and values.dtype == given[2].dtype and values.shape == indices.shape
    assert values.is_contiguous() and indices.is_contiguous()
    z = reference.encode(*(each.double() for each in given))
    chosen = z.gather(1, indices.long())
    assert ((chosen.relu() if relu else chosen) - values).abs().max() < MARGIN[dtype]
    assert (values[:, :-1] >= values[:, 1:]).all()
    assert all(len(set(row.tolist())) == k for row in indices)
    left = z.scatter(1, indices.long(), -torch.inf).amax(1)
    assert (left <= chosen.amin(1) + MARGIN[dtype]).all()


def test_float32_weights_of_narrow_tokens() -> None:
    x, w_enc, b_enc = make(5, 30, 200)
    values, indices = sae_encode_topk(x.bfloat16(), w_enc, b_enc, 4)
    expected = reference.select(reference.encode(x.bfloat16().double(), w_enc.double(), b_enc.double()), 4)
    assert torch.equal(indices, expected[1])
    assert_within(values, expected[0].relu(), OUTPUT[torch.float32])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("m", "group", "k"), [(256, 32, 5), (4096, 32, 64), (96, 1, 7), (128, 128, 128), (64, 2, 1), (7, 1, 7)]
)
def test_ties_go_to_the_smaller_index(path: str, m: int, group: int, k: int) -> None:
    for dtype in (torch.float32, torch.float64):
        z = integers(6, m).to(dtype)
        # one token without any tie, which the fast way may answer
        z[3] = torch.randperm(m, generator=torch.Generator().manual_seed(1)).to(dtype)
        with use(path):
            values, indices = select_topk(z, reference.group_maxima(z, group), k)
        expected_values, expected = by_python(z, k)
        assert torch.equal(indices, expected) and torch.equal(values, expected_values)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_nan_is_the_largest_and_infinities_have_their_places(path: str, dtype: torch.dtype) -> None:
    z = integers(5, 128).to(dtype)
    z[0, 77] = torch.nan
    z[0, 78] = -torch.nan
    z[1, [5, 90]] = torch.inf
    z[2] = -torch.inf
    z[2, 100] = -1e38
    z[4] = torch.arange(128)
    z[4, 100] = torch.nan
    with use(path):
        values, indices = select_topk(z, reference.group_maxima(z, 16), 4, validate=False)
    expected_values, expected = by_python(z, 4)
    assert torch.equal(indices, expected)
    assert torch.equal(values.nan_to_num(nan=1e30), expected_values.nan_to_num(nan=1e30))


@pytest.mark.parametrize("m", [1, 31, 33, 1000])
def test_runs_need_not_fill_the_dictionary(m: int) -> None:
    """The fast CPU path's last run is shorter, and the places after it are never chosen, not even before -inf."""
    z = torch.full((3, m), -torch.inf)
    z[1, -1] = 0.0
    z[2] = torch.arange(m).float()
    k = min(m, 5)
    values, indices = cpu.select_topk(z, reference.group_maxima(z, 32), 32, k)
    expected_values, expected = by_python(z, k)
    assert torch.equal(indices, expected) and torch.equal(values, expected_values)


def test_keys_are_in_the_order_of_the_values() -> None:
    z = torch.tensor([[-torch.inf, -1e30, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 1e30, torch.inf, torch.nan, -torch.nan]])
    keys = packed.keys(z)[0]
    order = keys >> 32
    assert (order[:4] < order[1:5]).all() and order[4] == order[5] and (order[5:10] < order[6:11]).all()
    assert order[10] == order[11] and keys[4] > keys[5] and keys[10] > keys[11]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_halves_are_the_whole(path: str, dtype: torch.dtype) -> None:
    given = make(7, 20, 320, dtype)
    with use(path):
        z, maxima = encode_gmax(*given, 32)
        values, indices = sae_encode_topk(*given, 6, relu=False)
        halves = select_topk(z, maxima, 6)
    assert_within(z, reference.encode(*(each.double() for each in given)), OUTPUT[given[2].dtype])
    assert same_bits(maxima, z.view(7, 10, 32).amax(2))
    assert same_bits(halves[0], values) and torch.equal(halves[1], indices)


@pytest.mark.parametrize(("m", "k"), [(320, 2), (96, 16)])
def test_looking_at_runs_first_changes_nothing(monkeypatch: pytest.MonkeyPatch, m: int, k: int) -> None:
    given = make(7, 20, m)
    chosen = []
    for least in (0, m):
        monkeypatch.setattr(cpu, "RUNS_FROM", least)
        chosen.append(sae_encode_topk(*given, k))
    assert same_bits(chosen[0][0], chosen[1][0]) and torch.equal(chosen[0][1], chosen[1][1])


def test_blocks_of_tokens_and_of_features_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    given = make(9, 24, 64, torch.bfloat16)
    whole = sae_encode_topk(*given, 5)
    monkeypatch.setattr(cpu, "Z_BLOCK", 256)
    monkeypatch.setattr(cpu, "W_BLOCK", 24 * 10)
    parts = sae_encode_topk(*given, 5)
    assert torch.equal(parts[1], whole[1])
    assert_within(parts[0], whole[0], OUTPUT[torch.float32])


@pytest.mark.parametrize("path", PATHS)
def test_relu_keeps_k_values(path: str) -> None:
    x, w_enc, b_enc = make(3, 20, 70)
    with use(path):
        values, indices = sae_encode_topk(x, w_enc, b_enc - 100, 5)
        raw, same = sae_encode_topk(x, w_enc, b_enc - 100, 5, relu=False)
    assert torch.equal(values, torch.zeros(3, 5)) and torch.equal(indices, same) and (raw < -90).all()


@pytest.mark.parametrize("path", PATHS)
def test_no_tokens(path: str) -> None:
    with use(path):
        values, indices = sae_encode_topk(*make(0, 24, 64, torch.bfloat16), 5)
        z, maxima = encode_gmax(*make(0, 24, 64, torch.bfloat16), 16)
        chosen = select_topk(z, maxima, 3)
    assert values.shape == indices.shape == (0, 5) and z.shape == (0, 64) and maxima.shape == (0, 4)
    assert chosen[0].shape == chosen[1].shape == (0, 3)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("relu", [True, False])
def test_gradients_by_differences(path: str, relu: bool) -> None:
    """Some chosen values are below zero; none is so near zero or another that a step changes the choice."""
    x, w_enc, b_enc = make(5, 7, 9, torch.float64, seed=2)
    z = reference.encode(x, w_enc, b_enc)
    assert z.abs().min() > 1e-4 and z.sort(1).values.diff(dim=1).min() > 1e-4
    assert (z.topk(6).values < 0).any()
    inputs = [each.requires_grad_() for each in (x, w_enc, b_enc)]
    with use(path):
        assert torch.autograd.gradcheck(lambda *given: sae_encode_topk(*given, 6, relu=relu)[0], inputs, nondet_tol=0.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_gradients_are_the_dense_encoders(path: str, dtype: torch.dtype) -> None:
    given = make(31, 17, 50, dtype)
    slope = torch.randn(31, 50, generator=torch.Generator().manual_seed(4))
    mine = [each.clone().requires_grad_() for each in given]
    theirs = [each.double().requires_grad_() for each in given]
    with use(path):
        values, indices = sae_encode_topk(*mine, 8)
        values.backward(slope.gather(1, indices.long()))
    code = reference.encode(*theirs).relu()
    kept = torch.zeros_like(code).scatter(1, indices.long(), 1.0)
    (code * kept).backward(slope.double())
    for ours, exact in zip(mine, theirs, strict=True):
        assert ours.grad is not None and exact.grad is not None and ours.grad.dtype == ours.dtype
        assert_within(ours.grad.flatten(), exact.grad.flatten(), 1e-6 if ours.dtype == torch.float32 else 5e-3)


def test_indices_carry_no_gradient_and_halves_none_either() -> None:
    x, w_enc, b_enc = (each.requires_grad_() for each in make(4, 7, 32))
    values, indices = sae_encode_topk(x, w_enc, b_enc, 3)
    assert values.requires_grad and not indices.requires_grad
    z, _ = encode_gmax(x, w_enc, b_enc, 8)
    with pytest.raises(RuntimeError, match="encode_gmax"):
        z.sum().backward()


@unchecked_shapes()
def test_compiles_as_one_graph_with_its_gradients() -> None:
    torch._dynamo.reset()
    given = make(6, 8, 40)

    def run(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = sae_encode_topk(x * 2, w, b, 5)
        return values.square(), indices + 1

    def halves(x: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return select_topk(*encode_gmax(x, w, b, 8), 5)

    results = []
    for each in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        inputs = [t.clone().requires_grad_() for t in given]
        values, indices = each(*inputs)
        values.sum().backward()
        results.append([values, indices, *(t.grad for t in inputs)])
    assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
    compiled = torch.compile(halves, fullgraph=True, backend="aot_eager")
    assert all(same_bits(a, b) for a, b in zip(halves(*given), compiled(*given), strict=True))


@unchecked_shapes()
def test_are_well_formed_torch_ops() -> None:
    ops, given = torch.ops.hooked_vla, make(4, 5, 24)
    z, maxima = encode_gmax(*given, 8)
    torch.library.opcheck(ops.encode_gmax.default, (*given, 8))
    torch.library.opcheck(ops.select_topk.default, (z, maxima, 8, 3))
    torch.library.opcheck(ops.sae_encode_topk.default, (*(each.requires_grad_() for each in given), 3, True))


GOOD = {**dict(zip(("x", "w_enc", "b_enc"), make(4, 5, 24), strict=True)), "k": 3}
WRONG = {
    "x of integers": ({"x": torch.zeros(4, 5, dtype=torch.int32)}, TypeError, "x must be float32"),
    "x not contiguous": ({"x": torch.zeros(5, 4).T}, ValueError, "x must be contiguous"),
    "w_enc of another width": ({"w_enc": torch.zeros(24, 4)}, ValueError, r"w_enc must have shape \[\*, 5\]"),
    "w_enc not transposed": ({"w_enc": torch.zeros(5, 24).T}, ValueError, "w_enc must be contiguous"),
    "w_enc too coarse": ({"w_enc": torch.zeros(24, 5).half()}, TypeError, "w_enc must be float32.* got float16"),
    "w_enc without rows": ({"w_enc": torch.zeros(0, 5)}, ValueError, "w_enc must have at least one row"),
    "w_enc elsewhere": ({"w_enc": torch.zeros(24, 5, device="meta")}, ValueError, "w_enc must be on cpu, got meta"),
    "b_enc of another m": ({"b_enc": torch.zeros(23)}, ValueError, r"b_enc must have shape \[24\], got \[23\]"),
    "b_enc too coarse": ({"b_enc": torch.zeros(24).half()}, TypeError, "b_enc must be float32, got float16"),
    "k above m": ({"k": 25}, ValueError, r"k must lie in \[1, 24\], the number of features, got 25"),
    "k zero": ({"k": 0}, ValueError, r"k must lie in \[1, 24\], the number of features, got 0"),
    "x a NaN": ({"x": torch.full((4, 5), torch.nan)}, ValueError, "x must hold finite values, got nan"),
    "b_enc infinite": ({"b_enc": torch.full((24,), torch.inf)}, ValueError, "b_enc must hold finite values, got inf"),
    "w_enc a NaN": ({"w_enc": torch.full((24, 5), torch.nan)}, ValueError, "w_enc must hold finite values, got nan"),
    "w_enc a row": (
        {"w_enc": torch.zeros(24, 5).index_fill(0, torch.tensor(3), -torch.inf), "k": 24, "relu": False}, ValueError,
        r"w_enc must hold finite values, got -inf at \[3, 0\]",
    ),
    "too large a product": (
        {"x": torch.full((4, 5), 1e30), "w_enc": torch.full((24, 5), -1e30), "k": 24, "relu": False}, ValueError,
        "w_enc's product with x must hold finite values, got -inf",
    ),
    "k a fraction": ({"k": 2.5}, TypeError, "k must be a whole number, got 2.5"),
    "k a float": ({"k": 3.0}, TypeError, "k must be a whole number, got 3.0"),
    "k a word": ({"k": "3"}, TypeError, "k must be a whole number, got '3'"),
    "k a truth": ({"k": True}, TypeError, "k must be a whole number, got True"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
@unchecked_shapes()
def test_says_what_is_wrong(case: str) -> None:
    changed, error, message = WRONG[case]
    sae_encode_topk(**GOOD)
    with pytest.raises(error, match=f"^sae_encode_topk: {message}"):
        sae_encode_topk(**(GOOD | changed))


@pytest.mark.parametrize("group", [0, 3, 16, 256])
@unchecked_shapes()
def test_runs_must_fit(group: int) -> None:
    with pytest.raises(ValueError, match=f"^encode_gmax: group must be a power of 2 up to 128 .*got {group}"):
        encode_gmax(*make(4, 5, 24), group)


@unchecked_shapes()
def test_the_choice_says_what_is_wrong() -> None:
    z = torch.zeros(4, 24)
    for wrong, message in (
        ((z, torch.zeros(4, 7), 3), "maxima must have a column for each run of z's 24 features, got 7"),
        ((z, torch.zeros(4, 2), 3), "z's columns over maxima's must be a power of 2"),
        ((z, torch.zeros(3, 3), 3), r"maxima must have shape \[4, \*\], got \[3, 3\]"),
        ((z, torch.zeros(4, 3), 25), r"k must lie in \[1, 24\]"),
        ((z / 0, torch.zeros(4, 3), 2), "z must hold no NaN, got nan"),
    ):
        with pytest.raises(ValueError, match=f"^select_topk: {message}"):
            select_topk(*wrong)
    with pytest.raises(TypeError, match="^select_topk: z must be float32 or float64, got bfloat16"):
        select_topk(z.bfloat16(), z, 2)
    with pytest.raises(TypeError, match="^select_topk: k must be a whole number, got 2.0"):
        select_topk(z, torch.zeros(4, 3), 2.0)
    with pytest.raises(TypeError, match="^encode_gmax: group must be a whole number, got 8.0"):
        encode_gmax(*make(4, 5, 24), 8.0)


def test_values_are_looked_at_only_when_asked() -> None:
    x, w_enc, b_enc = make(3, 20, 70)
    w_enc[50, 3] = torch.nan
    values, indices = sae_encode_topk(x, w_enc, b_enc, 4, validate=False)
    assert values[:, 0].isnan().all() and (indices[:, 0] == 50).all() and values[:, 1:].isfinite().all()
