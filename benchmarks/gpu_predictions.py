"""What was worked out for an H200 before there was one, from 4.3 TB/s and 790 TFLOP/s, against what a card measures."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import gpu_clock
import torch
from op_cases import CASES, Inputs, Shape

from hooked_vla.kernels import encode_gmax, rank_count, select_topk

DTYPE = torch.bfloat16
ROUNDS = 30


@dataclass(frozen=True)
class Prediction:
    """unit: µs of one call in a graph, or a ratio of two such times; held: measured is at most the upper end."""

    what: str
    predicted: tuple[float, float]
    unit: str
    measured: float
    held: bool


def _microseconds(calls: dict[str, Callable[[Inputs], Any]], shape: Shape, op: str = "sae_splice") -> dict[str, float]:
    generator = torch.Generator(shape.device).manual_seed(0)
    make = next(case for case in CASES if case.op == op).make
    inputs = make(shape, generator)
    size = sum(each.numel() * each.element_size() for each in inputs.values() if isinstance(each, torch.Tensor))
    sets = [inputs, *(make(shape, generator) for _ in range(gpu_clock.sets_needed(size) - 1))]
    several = {name: [lambda call=call, i=i: call(i) for i in sets] for name, call in calls.items()}
    return {name: median(times) * 1e6 for name, times in gpu_clock.in_turns(several, ROUNDS, "predictions").items()}


def _prediction(what: str, low: float, high: float, unit: str, measured: float) -> dict[str, Any]:
    return asdict(Prediction(what, (low, high), unit, round(measured, 3), measured <= high))


def _linear(i: Inputs) -> torch.Tensor:
    return torch.nn.functional.linear(i["x"], i["w_enc"])


def _select(i: Inputs) -> object:
    """From z and its maxima, made once for each set of inputs, in the warm-up before the capture."""
    if "z" not in i:
        i["z"], i["maxima"] = encode_gmax(i["x"], i["w_enc"], i["b_enc"], 32)
    return select_topk(i["z"], i["maxima"], i["k"])


def _select_plainly(i: Inputs) -> object:
    if "z" not in i:
        i["z"], i["maxima"] = encode_gmax(i["x"], i["w_enc"], i["b_enc"], 32)
    return i["z"].topk(i["k"], dim=1)


def predictions() -> list[dict[str, Any]]:
    """Each with what was measured; needs a GPU."""
    few = Shape(50, 1024, 16384, 64, 16, DTYPE, "cuda")
    many = Shape(560, 2048, 16384, 64, 16, DTYPE, "cuda")
    delta, splice = (next(case for case in CASES if case.op == op) for op in ("delta_splice", "sae_splice"))
    small = _microseconds({"delta": delta.ours, "eager": splice.eager, "splice": splice.ours}, few)
    calls: dict[str, Callable[[Inputs], Any]] = {
        "topk": _select_plainly,
        "select": _select,
        "linear": _linear,
        "gmax": lambda i: encode_gmax(i["x"], i["w_enc"], i["b_enc"], 32),
        "rank": lambda i: rank_count(i["x"], i["w_enc"], i["b_enc"], i["features"]),
    }
    large = _microseconds(calls, many)
    small_size, large_size = "n=50 d=1024 m=16384", "n=560 d=2048 m=16384"
    gmax, rank = large["gmax"] / large["linear"], large["rank"] / large["linear"]
    return [
        _prediction(f"torch.topk, {large_size}", 0, 120, "µs", large["topk"]),
        _prediction(f"eager top-k splice, {small_size}", 0, 110, "µs", small["eager"]),
        _prediction(f"top-k splice with rank_count, {small_size}", 0, 14, "µs", small["splice"]),
        _prediction(f"delta_splice, {small_size}", 4, 8, "µs", small["delta"]),
        _prediction(f"encode_gmax over cuBLAS's linear, {large_size}", 1, 1.2, "ratio", gmax),
        _prediction(f"select_topk, {large_size}", 8, 15, "µs", large["select"]),
        _prediction(f"rank_count over cuBLAS's linear, {large_size}", 1, 1.15, "ratio", rank),
    ]
