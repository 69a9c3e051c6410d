"""Timing on a GPU: each variant in a CUDA graph, so that launches cost what they cost in a captured rollout.

A graph runs the variant once for each of several sets of inputs, together larger than the L2 cache: weights come from
memory, as they do when a model runs between two uses of them.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from harness import Times
from tqdm import tqdm

# of one set of inputs after another, before the first comes again; an H200's L2 holds 60 MB
ROTATED_BYTES = 200_000_000
MOST_SETS = 16


def sets_needed(n_bytes: int) -> int:
    """How many sets of inputs of so many bytes are rotated."""
    return max(2, min(MOST_SETS, -(-ROTATED_BYTES // max(1, n_bytes))))


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    """All calls as one graph, after a warm-up that compiles whatever is compiled at the first call."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def in_turns(variants: Mapping[str, Sequence[Callable[[], object]]], rounds: int, label: str) -> Times:
    """Seconds of a call, name -> one time per round: a variant's graph by events, over its number of calls."""
    graphs = {name: _capture(calls) for name, calls in variants.items()}
    times: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for i in tqdm(range(-3, rounds), desc=label, unit="round", leave=False, mininterval=1.0):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graphs[name].replay()
            end.record()
            end.synchronize()
            if i >= 0:
                times[name].append(start.elapsed_time(end) / 1e3 / len(variants[name]))
    return times
