"""What each kernel is timed on: inputs at a shape, our call, and how other libraries write the same in PyTorch.

The eager idioms are theirs: encode the whole dictionary, select, spread out, decode, decode again for the error term;
a projection matrix; products with a dense code for gradients. Widths come from model_specs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vla import get_spec
from hooked_vla.kernels import (
    delta_splice,
    lowrank_edit,
    rank_count,
    sae_encode_topk,
    sae_splice,
    segment_mean_delta,
    sparse_backward,
    sparse_decode,
)
from hooked_vla.spec import FlowVLASpec, JointFlowVLASpec, LanguageVLASpec

Inputs = dict[str, Any]
# how many tokens share a segment: an image's, at 64 tokens a camera
SEGMENT = 64
# of these inputs, a token has a row of its own
PER_TOKEN = ("x", "src", "values", "indices", "grad", "segment")


@dataclass(frozen=True)
class Shape:
    """n tokens of width d, m features of which k are active (lowrank_edit: rank k) and S are edited."""

    n: int
    d: int
    m: int
    k: int
    S: int
    dtype: torch.dtype
    device: str

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"n={self.n} d={self.d} m={self.m} k={self.k} S={self.S} {dtype} {self.device}"


@dataclass(frozen=True)
class Case:
    """One op. make: inputs at a shape. ours, eager: what is timed, the same result. cost: (elements, operations) that
    any way of computing it must move and do, but for _topk_edit_cost; elements have the tokens' dtype."""

    op: str
    make: Callable[[Shape, torch.Generator], Inputs]
    ours: Callable[[Inputs], Tensor | tuple[Tensor | None, ...]]
    eager: Callable[[Inputs], Tensor | tuple[Tensor | None, ...]]
    cost: Callable[[Shape], tuple[int, int]]


def widths() -> Mapping[str, int]:
    """The streams that kernels are made for: name -> width of their tokens."""
    smolvla, pi05, openvla = (get_spec(name) for name in ("smolvla", "pi05", "openvla"))
    assert isinstance(smolvla, FlowVLASpec) and isinstance(pi05, JointFlowVLASpec)
    assert isinstance(openvla, LanguageVLASpec)
    return {
        "smolvla expert": smolvla.expert.decoder.d_model,
        "smolvla vlm": smolvla.vlm.d_model,
        "pi05 expert": pi05.expert.d_model,
        "pi05 vlm": pi05.vlm.d_model,
        "openvla": openvla.vlm.d_model,
    }


def chunk() -> int:
    """Tokens of π0.5's action expert at each denoise step."""
    spec = get_spec("pi05")
    assert isinstance(spec, JointFlowVLASpec)
    return spec.flow.chunk


def _normal(shape: Shape, generator: torch.Generator, *size: int, dtype: torch.dtype | None = None) -> Tensor:
    made = torch.randn(size, generator=generator, device=shape.device, dtype=torch.float32)
    return made.to(dtype or shape.dtype)


def _dictionary(shape: Shape, generator: torch.Generator) -> Inputs:
    """Pre-activations of about unit size, k of m above the threshold; S features, half of them ablated, half set."""
    m, d, wide = shape.m, shape.d, torch.float32
    level = torch.distributions.Normal(0.0, 1.0).icdf(torch.tensor(1 - shape.k / m)).item()
    half = torch.arange(shape.S, device=shape.device) < shape.S // 2
    inputs = {
        "x": _normal(shape, generator, shape.n, d),
        "w_enc": _normal(shape, generator, m, d).div_(d**0.5),
        "b_enc": _normal(shape, generator, m, dtype=wide).mul_(0.1),
        "w_dec": _normal(shape, generator, m, d).div_(d**0.5),
        "b_dec": _normal(shape, generator, d),
        "threshold": torch.full((m,), level, device=shape.device),
        "features": torch.randperm(m, generator=generator, device=shape.device)[: shape.S].int(),
        "scale": torch.zeros(1, shape.S, device=shape.device),
        "shift": torch.where(half, 0.0, 4.0)[None],
        "lo": torch.full((1, shape.S), -torch.inf, device=shape.device),
        "hi": torch.full((1, shape.S), torch.inf, device=shape.device),
        "k": shape.k,
    }
    chosen = inputs["features"].long()
    copied = {f"edited_{name}": inputs[name][chosen] for name in ("w_enc", "b_enc", "threshold", "w_dec")}
    return inputs | copied


def _with_segments(shape: Shape, generator: torch.Generator) -> Inputs:
    segment = (torch.arange(shape.n, device=shape.device) // SEGMENT).int()
    return _dictionary(shape, generator) | {"segment": segment, "n_segments": -(-shape.n // SEGMENT)}


def _code(shape: Shape, generator: torch.Generator) -> Inputs:
    inputs = _dictionary(shape, generator)
    n, m, k = shape.n, shape.m, shape.k
    draws = torch.rand(n, m, generator=generator, device=shape.device)
    values = _normal(shape, generator, n, k, dtype=torch.float32).abs()
    grad = _normal(shape, generator, n, shape.d)
    return inputs | {"values": values, "indices": draws.topk(k, dim=1).indices.int(), "grad": grad}


def _subspace(shape: Shape, generator: torch.Generator) -> Inputs:
    """A patch of a subspace of rank k; the eager idiom has its projection matrix ready."""
    square = _normal(shape, generator, shape.d, shape.k, dtype=torch.float32)
    basis = torch.linalg.qr(square).Q.T.contiguous()
    one = torch.ones(1, device=shape.device)
    return {
        "x": _normal(shape, generator, shape.n, shape.d),
        "src": _normal(shape, generator, shape.n, shape.d),
        "basis": basis.to(shape.dtype),
        "projection": (basis.T @ basis).to(shape.dtype),
        "one": one,
    }


def _encode(i: Inputs) -> Tensor:
    return torch.nn.functional.linear(i["x"], i["w_enc"], i["b_enc"].to(i["x"].dtype))


def _jumprelu(i: Inputs) -> Tensor:
    z = _encode(i)
    return z * (z > i["threshold"])


def _topk(i: Inputs) -> Tensor:
    values, indices = _encode(i).topk(i["k"], dim=1)
    return torch.zeros(len(values), len(i["w_enc"]), dtype=values.dtype, device=values.device).scatter_(
        1, indices, values.relu()
    )


def _eager_splice(i: Inputs, f: Tensor) -> Tensor:
    """Reconstruct for the error term, edit, reconstruct."""
    x, w_dec, b_dec, features = i["x"], i["w_dec"], i["b_dec"], i["features"].long()
    error = x - (f @ w_dec + b_dec)
    g = f.clone()
    g[:, features] = torch.clamp(i["scale"] * f[:, features] + i["shift"], i["lo"], i["hi"]).to(f.dtype)
    return g @ w_dec + b_dec + error


def _eager_segments(i: Inputs) -> Tensor:
    x, segment = i["x"], i["segment"].long()
    sums = torch.zeros(i["n_segments"], x.shape[1], dtype=x.dtype, device=x.device).index_add_(0, segment, x)
    sizes = torch.zeros_like(sums[:, 0]).index_add_(0, segment, torch.ones_like(x[:, 0]))
    mean = sums / sizes[:, None]
    pooled = i | {"x": mean}
    return x + (_eager_splice(pooled, _jumprelu(pooled)) - mean)[segment]


def _eager_decode(i: Inputs) -> Tensor:
    values, w_dec = i["values"].to(i["w_dec"].dtype), i["w_dec"]
    code = torch.zeros(len(values), len(w_dec), dtype=w_dec.dtype, device=w_dec.device)
    return code.scatter_(1, i["indices"].long(), values) @ w_dec + i["b_dec"]


def _eager_backward(i: Inputs) -> tuple[Tensor, ...]:
    """What autograd does behind scatter, decoder, relu and encoder."""
    x, grad, w_dec, indices = i["x"], i["grad"], i["w_dec"], i["indices"].long()
    values = i["values"].to(grad.dtype)
    code = torch.zeros(len(grad), len(w_dec), dtype=grad.dtype, device=grad.device).scatter_(1, indices, values)
    d_values = (grad @ w_dec.T).gather(1, indices) * (values > 0)
    d_code = torch.zeros_like(code).scatter_(1, indices, d_values)
    return d_values, code.T @ grad, d_code.T @ x, d_code.sum(0)


def _eager_members(i: Inputs) -> Tensor:
    indices = _encode(i).topk(i["k"], dim=1).indices
    return (indices[:, :, None] == i["features"]).any(1).float()


def _tables(i: Inputs) -> tuple[Tensor, ...]:
    return tuple(i[name] for name in ("scale", "shift", "lo", "hi"))


def _edited_rows(i: Inputs) -> tuple[Tensor, ...]:
    return tuple(i[f"edited_{name}"] for name in ("w_enc", "b_enc", "threshold", "w_dec"))


def _splice_topk(i: Inputs) -> Tensor:
    weights = tuple(i[name] for name in ("x", "w_enc", "b_enc", "w_dec", "b_dec"))
    scale, shift, lo, hi = _tables(i)
    return sae_splice(*weights, error=True, k=i["k"], features=i["features"], scale=scale, shift=shift, lo=lo, hi=hi)


def _segments(i: Inputs) -> Tensor:
    return segment_mean_delta(i["x"], i["segment"], i["n_segments"], *_edited_rows(i), *_tables(i))


def _rows_touched(s: Shape) -> int:
    return min(s.n * s.k, s.m) * s.d


def _edit_cost(s: Shape) -> tuple[int, int]:
    """Of the edited features alone."""
    return 2 * s.n * s.d + 2 * s.S * s.d, 4 * s.n * s.d * s.S


def _topk_edit_cost(s: Shape) -> tuple[int, int]:
    """With an encoding of the whole dictionary, which says what is among the k. Ours on a CPU may do with less: a
    feature at or below zero is not active whatever the others are, and k larger ones settle it too."""
    return 2 * s.n * s.d + (s.m + s.S) * s.d, 2 * s.n * s.d * (s.m + s.S)


CASES = (
    Case(
        "delta_splice",
        _dictionary,
        lambda i: delta_splice(i["x"], *_edited_rows(i), *_tables(i)),
        lambda i: _eager_splice(i, _jumprelu(i)),
        _edit_cost,
    ),
    Case(
        "sae_splice",
        _dictionary,
        _splice_topk,
        lambda i: _eager_splice(i, _topk(i)),
        _topk_edit_cost,
    ),
    Case(
        "lowrank_edit",
        _subspace,
        lambda i: lowrank_edit(i["x"], i["src"], i["basis"], i["basis"], i["one"], i["one"], None),
        lambda i: i["x"] + (i["src"] - i["x"]) @ i["projection"],
        lambda s: (3 * s.n * s.d + 2 * s.d * s.k, 4 * s.n * s.d * s.k),
    ),
    Case(
        "segment_mean_delta",
        _with_segments,
        _segments,
        _eager_segments,
        lambda s: (2 * s.n * s.d + 2 * s.S * s.d, 4 * -(-s.n // SEGMENT) * s.d * s.S),
    ),
    Case(
        "sae_encode_topk",
        _dictionary,
        lambda i: sae_encode_topk(i["x"], i["w_enc"], i["b_enc"], i["k"])[0],
        lambda i: _encode(i).topk(i["k"], dim=1).values.relu(),
        lambda s: (s.n * s.d + s.m * s.d, 2 * s.n * s.d * s.m),
    ),
    Case(
        "sparse_decode",
        _code,
        lambda i: sparse_decode(i["values"], i["indices"], i["w_dec"], i["b_dec"]),
        _eager_decode,
        lambda s: (s.n * s.d + _rows_touched(s), 2 * s.n * s.d * s.k),
    ),
    Case(
        "rank_count",
        _dictionary,
        lambda i: (rank_count(i["x"], i["w_enc"], i["b_enc"], i["features"]) < i["k"]).float(),
        _eager_members,
        lambda s: (s.n * s.d + s.m * s.d, 2 * s.n * s.d * s.m),
    ),
    Case(
        "sparse_backward",
        _code,
        lambda i: sparse_backward(i["grad"], i["x"], i["values"], i["indices"], i["w_dec"], relu=True),
        _eager_backward,
        lambda s: (2 * s.n * s.d + _rows_touched(s) + 2 * s.m * s.d, 6 * s.n * s.d * s.k),
    ),
)


def first_tokens(inputs: Inputs, n: int) -> Inputs:
    """The same inputs for their first n tokens."""
    return {name: value[:n].contiguous() if name in PER_TOKEN else value for name, value in inputs.items()}


def in_float64(inputs: Inputs) -> Inputs:
    """The same numbers, and what is made of them made again."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    if "basis" in wide:
        wide["projection"] = wide["basis"].T @ wide["basis"]
    return wide
