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


# n, d, m -> µs of a top-k splice: the eager idiom, and with rank_count in place of the selection
SPLICES = {
    (50, 1024, 16384): (111, 12), (256, 1024, 16384): (164, 16), (560, 2048, 16384): (341, 53),
    (1024, 1024, 32768): (777, 93),
}  # fmt: skip


def _splices() -> list[dict[str, Any]]:
    delta, splice = (next(case for case in CASES if case.op == op) for op in ("delta_splice", "sae_splice"))
    found = []
    for (n, d, m), (eager, rank) in SPLICES.items():
        calls = {"delta": delta.ours, "eager": splice.eager, "splice": splice.ours}
        times, size = _microseconds(calls, Shape(n, d, m, 64, 16, DTYPE, "cuda")), f"n={n} d={d} m={m}"
        found += [
            _prediction(f"eager top-k splice, {size}", 0, eager, "µs", times["eager"]),
            _prediction(f"top-k splice with rank_count, {size}", 0, rank, "µs", times["splice"]),
            _prediction(f"delta_splice, {size}", 4, 8, "µs", times["delta"]),
        ]
    return found


def predictions() -> list[dict[str, Any]]:
    """Each with what was measured; needs a GPU."""
    many, training = (Shape(n, d, m, 64, 16, DTYPE, "cuda") for n, d, m in ((560, 2048, 16384), (8192, 1024, 32768)))
    calls: dict[str, Callable[[Inputs], Any]] = {
        "topk": _select_plainly,
        "select": _select,
        "linear": _linear,
        "gmax": lambda i: encode_gmax(i["x"], i["w_enc"], i["b_enc"], 32),
        "rank": lambda i: rank_count(i["x"], i["w_enc"], i["b_enc"], i["features"]),
    }
    times, size = _microseconds(calls, many), "n=560 d=2048 m=16384"
    gmax, rank = times["gmax"] / times["linear"], times["rank"] / times["linear"]
    backward = next(case for case in CASES if case.op == "sparse_backward")
    step = _microseconds({"ours": backward.ours, "eager": backward.eager}, training, backward.op)
    return [
        *_splices(),
        _prediction(f"torch.topk, {size}", 0, 120, "µs", times["topk"]),
        _prediction(f"encode_gmax over cuBLAS's linear, {size}", 1, 1.2, "ratio", gmax),
        _prediction(f"select_topk, {size}", 8, 15, "µs", times["select"]),
        _prediction(f"rank_count over cuBLAS's linear, {size}", 1, 1.15, "ratio", rank),
        _prediction("sparse_backward over the eager idiom, n=8192 d=1024 m=32768", 0, 1 / 3.8, "ratio",
                    step["ours"] / step["eager"]),
    ]  # fmt: skip
