"""Whatever is wrong with an argument, the op says which one it is, and nothing has run."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from unchecked import unchecked_shapes

from hooked_vla import kernels
from hooked_vla.kernels import dispatch

N, D, M, S, K, R, G = 6, 8, 64, 3, 4, 2, 2


def good(name: str) -> dict[str, Any]:
    """Arguments that the op takes, by name, every optional tensor among them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    row, mask = torch.arange(N, dtype=torch.int32) % R, torch.arange(N) % 2 == 0
    encoder = {"x": normal(N, D), "w_enc": normal(M, D), "b_enc": normal(M)}
    tables = {"scale": normal(R, S), "shift": normal(R, S), "lo": -torch.ones(R, S), "hi": torch.ones(R, S)}
    edited = {
        "w_enc": normal(S, D), "b_enc": normal(S), "threshold": normal(S).abs(), "w_dec": normal(S, D), **tables,
    }  # fmt: skip
    features = torch.tensor([5, 0, 63], dtype=torch.int32)
    segment = torch.arange(N, dtype=torch.int32) % G
    code = {"values": normal(N, K), "indices": torch.arange(N * K, dtype=torch.int32).view(N, K), "w_dec": normal(M, D)}
    z = normal(N, M)
    return {
        "delta_splice": {"x": normal(N, D), **edited, "row": row, "mask": mask},
        "delta_splice_features": {"x": normal(N, D), **edited, "row": row, "mask": mask},
        "encode_gmax": {**encoder, "group": 16},
        "fold_bias": {"w_enc": normal(S, D), "b_enc": normal(S), "b_dec": normal(D)},
        "lowrank_edit": {
            "x": normal(N, D), "src": normal(5, D), "a": normal(S, D), "b": normal(S, D), "alpha": normal(R),
            "beta": normal(R), "add": normal(R, D), "pair": torch.arange(N, dtype=torch.int32) % 5, "row": row,
            "mask": mask,
        },
        "rank_count": {**encoder, "features": features},
        "sae_encode_topk": {**encoder, "k": K},
        "sae_splice": {
            **encoder, "w_dec": normal(M, D), "b_dec": normal(D), "error": True, "threshold": normal(M),
            "features": features, **tables, "row": row, "mask": mask,
        },
        "segment_add": {"x": normal(N, D), "delta": normal(G, D), "segment": segment},
        "segment_mean": {"x": normal(N, D), "segment": segment, "n_segments": G},
        "segment_mean_delta": {
            "x": normal(N, D), "segment": segment, "n_segments": G, **edited, "row": torch.arange(G, dtype=torch.int32),
        },
        "select_topk": {"z": z, "maxima": z.view(N, 4, 16).amax(2), "k": K},
        "sparse_backward": {"grad": normal(N, D), "x": normal(N, D), **code, "relu": True},
        "sparse_decode": {**code, "base": normal(N, D)},
    }[name]  # fmt: skip


OPS = sorted(set(kernels.__all__) - {"use"})
# the argument that the others must fit: where it is elsewhere or of another dtype, one of those is named
LEADING = {"select_topk": "z", "sparse_backward": "w_dec", "sparse_decode": "w_dec", "fold_bias": "w_enc"}
# what fold_bias makes, every op looks at; of a dictionary sae_splice reads edited features' rows, here not the first
NOT_SEARCHED = {"fold_bias": ("w_enc", "b_enc", "b_dec"), "sae_splice": ("w_enc", "w_dec")}


def spread(t: Tensor) -> Tensor:
    """The same numbers, not side by side in memory."""
    return torch.stack([t, t], dim=-1)[..., 0]


def with_nan(t: Tensor) -> Tensor:
    return t.clone().index_fill_(0, torch.tensor(0), torch.nan)


# whether it must be the spoiled argument itself that is named, and how to spoil it
SPOILED: dict[str, tuple[bool, Callable[[Tensor], object]]] = {
    "no tensor": (True, lambda t: t.tolist()),
    "width": (False, lambda t: t[..., :-1].contiguous()),
    "rank": (False, lambda t: t[None]),
    "dtype": (False, lambda t: t.long() if t.dtype == torch.int32 else t.to(torch.uint8) if t.dtype == torch.bool
              else t.to(torch.complex64)),
    "another float": (False, lambda t: t.double()),
    "device": (False, lambda t: t.to("meta")),
    "layout": (True, spread),
    "NaN": (True, with_nan),
    "range": (True, lambda t: t + 100),
    "negative": (True, lambda t: t - 100),
}  # fmt: skip


# what an op takes after all: any number of features, a width of its own, any float dtype
ALLOWED = {
    ("rank_count", "features"): ("width",), ("segment_mean", "x"): ("width", "another float"),
    ("sparse_backward", "grad"): ("another float",), ("sparse_backward", "x"): ("another float",),
}  # fmt: skip


def spoilable(op: str, name: str, value: Tensor) -> Iterator[str]:
    for what in SPOILED:
        if what in ("NaN", "another float") and not value.is_floating_point():
            continue
        if what in ("range", "negative") and value.dtype != torch.int32:
            continue
        if what == "NaN" and name in NOT_SEARCHED.get(op, ()):
            continue
        if op == "fold_bias" and what in ("layout", "dtype", "another float"):
            continue
        if what not in ALLOWED.get((op, name), ()):
            yield what


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a kernel was about to run")

    monkeypatch.setattr(dispatch, "_choose", refuse)


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op in OPS for name, value in good(op).items() if isinstance(value, Tensor)]
)
@unchecked_shapes()
def test_names_the_argument_before_anything_runs(op: str, name: str, nothing_runs: None) -> None:
    for what in spoilable(op, name, good(op)[name]):
        exactly, spoil = SPOILED[what]
        arguments = good(op)
        arguments[name] = spoil(arguments[name])
        with pytest.raises((TypeError, ValueError), match=f"^{op}: ") as caught:
            getattr(kernels, op)(**arguments)
            pytest.fail(f"{what} of {name} is not refused")
        named = str(caught.value).removeprefix(f"{op}: ").split()[0]
        assert named in arguments, f"{what} of {name}: {caught.value}"
        if exactly or (what == "device" and name != LEADING.get(op, "x")):
            assert named == name, f"{what} of {name}: {caught.value}"


@pytest.mark.parametrize("op", OPS)
@unchecked_shapes()
def test_good_arguments_run(op: str) -> None:
    arguments = good(op)
    getattr(kernels, op)(**arguments)
    optional = set(inspect.signature(getattr(kernels, op)).parameters) - set(arguments)
    assert optional <= {"validate", "relu", "k"}


@pytest.mark.parametrize("gate", ["k", "threshold"])
@unchecked_shapes()
def test_what_is_read_of_a_dictionary_is_searched(gate: str, nothing_runs: None) -> None:
    arguments = good("sae_splice") | {"error": False}
    if gate == "k":
        arguments |= {"threshold": None, "k": K}
    for name in ("w_enc", "w_dec"):
        # neither the first nor an edited feature
        spoiled = arguments[name].clone()
        spoiled[7, 2] = torch.nan
        with pytest.raises(ValueError, match=rf"^sae_splice: {name} must hold finite values, got nan at \[7, 2\]"):
            kernels.sae_splice(**(arguments | {name: spoiled}))
        spoiled = arguments[name].clone()
        spoiled[63] = torch.nan
        kept = arguments | {name: spoiled, "error": True}
        with pytest.raises(ValueError, match=f"^sae_splice: {name}.* must hold finite values, got nan"):
            kernels.sae_splice(**kept)


@pytest.mark.parametrize("op", [op for op in OPS if "lo" in good(op)])
@unchecked_shapes()
def test_bounds_leave_a_finite_number(op: str, nothing_runs: None) -> None:
    for name, bad in (("lo", torch.inf), ("hi", -torch.inf)):
        bounds = {each: torch.full((R, S), bad) for each in ("lo", "hi")}
        with pytest.raises(ValueError, match=rf"^{op}: {name} must leave a finite number, got {bad} at \[0, 0\]"):
            getattr(kernels, op)(**(good(op) | bounds))


@pytest.mark.parametrize("op", ["segment_mean", "segment_mean_delta"])
@unchecked_shapes()
def test_numbers_of_segments_are_whole(op: str, nothing_runs: None) -> None:
    for bad in (2.0, True, "2"):
        with pytest.raises(TypeError, match=f"^{op}: n_segments must be a whole number, got {bad!r}"):
            getattr(kernels, op)(**(good(op) | {"n_segments": bad}))


@unchecked_shapes()
def test_a_wrong_mask_is_named_whatever_the_tokens_hold(nothing_runs: None) -> None:
    arguments = good("sae_splice")
    arguments["x"] = arguments["x"] * torch.nan
    for mask, error in ((torch.ones(N - 1, dtype=torch.bool), ValueError), (torch.ones(N), TypeError)):
        with pytest.raises(error, match="^sae_splice: mask must"):
            kernels.sae_splice(**(arguments | {"mask": mask}))


@pytest.mark.parametrize(("op", "k"), [("sae_encode_topk", M + 1), ("select_topk", 0), ("sae_splice", M + 1)])
@unchecked_shapes()
def test_k_is_a_number_of_features(op: str, k: int, nothing_runs: None) -> None:
    arguments = good(op) | {"k": k} | ({"threshold": None} if op == "sae_splice" else {})
    with pytest.raises(ValueError, match=rf"^{op}: k must lie in \[1, {M}\]"):
        getattr(kernels, op)(**arguments)
