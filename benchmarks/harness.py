"""Timing several variants of one computation against each other, on a machine that others may be using too.

Variants run in turns, one call each per round, so that whatever slows the machine slows all of them alike; on one
thread it is the processor's time that counts, so that waiting for a core does not. A ratio is the median over rounds
of variant / baseline within the round; a time is the median over rounds.
"""

import gc
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"

Times = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Row:
    """One variant against one baseline. low, high: quartiles of the ratio over rounds."""

    size: str
    variant: str
    baseline: str
    ratio: float
    low: float
    high: float
    baseline_ms: float
    ms: float


@dataclass(frozen=True)
class Target:
    """A limit on a ratio, and the ratio that was measured."""

    size: str
    variant: str
    baseline: str
    limit: float
    ratio: float
    met: bool


def clock(device: str = "cpu") -> tuple[str, Callable[[], float]]:
    """The time that is measured: the process's own on one thread, else what passes on the wall; on a GPU until all
    that it was given is done."""
    if device != "cpu":
        return "wall", _when_done
    return ("processor", time.process_time) if torch.get_num_threads() == 1 else ("wall", time.perf_counter)


def _when_done() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(
    variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int, label: str, turn_s: float = 0.0,
    device: str = "cpu",
) -> Times:  # fmt: skip
    """Seconds of every call, its result freed: name -> one time per round. Each round starts with another variant.

    turn_s: a variant that is faster is called again and again for that long in each of its turns, and the time is the
    mean of these calls; how often, the last round of the warm-up tells, which must then be there.
    """
    _, now = clock(device)
    names = list(variants)
    times: dict[str, list[float]] = {name: [] for name in names}
    calls = dict.fromkeys(names, 1)
    # what imports and models left behind is not searched for garbage within a timed call
    gc.collect()
    gc.freeze()
    try:
        for i in tqdm(range(-warmup, rounds), desc=label, unit="round", leave=False, mininterval=1.0):
            gc.collect()
            for name in names[i % len(names) :] + names[: i % len(names)]:
                start = now()
                for _ in range(calls[name]):
                    variants[name]()
                seconds = (now() - start) / calls[name]
                if i >= 0:
                    times[name].append(seconds)
                elif i == -1:
                    calls[name] = max(1, round(turn_s / max(seconds, 1e-6)))
    finally:
        gc.unfreeze()
    return times


def compare(times: Times, size: str, baselines: Sequence[str]) -> list[Row]:
    """Every variant against every baseline, and a baseline against those before it."""
    rows = []
    for i, baseline in enumerate(baselines):
        for variant, seconds in times.items():
            if variant in baselines[: i + 1]:
                continue
            ratios = [a / b for a, b in zip(seconds, times[baseline], strict=True)]
            low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            ms, baseline_ms = median(seconds) * 1e3, median(times[baseline]) * 1e3
            rows.append(Row(size, variant, baseline, median(ratios), low, high, baseline_ms, ms))
    return rows


def check_targets(rows: Sequence[Row], limits: Mapping[tuple[str, str], float]) -> list[Target]:
    """limits: (size, variant) -> the largest ratio allowed, to any baseline."""
    return [
        Target(row.size, row.variant, row.baseline, limit, row.ratio, row.ratio <= limit)
        for row in rows
        if (limit := limits.get((row.size, row.variant))) is not None
    ]


def per_call_us(fn: Callable[[Any], object], argument: object, calls: int = 100_000) -> float:
    """Microseconds of one call, the loop around it taken off; the least of five tries."""

    _, now = clock()

    def loop() -> float:
        start = now()
        for _ in range(calls):
            fn(argument)
        return now() - start

    def empty_loop() -> float:
        start = now()
        for _ in range(calls):
            pass
        return now() - start

    loop()
    return (min(loop() for _ in range(5)) - min(empty_loop() for _ in range(5))) / calls * 1e6


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """What was measured on, without names that belong to one machine."""
    gpu = {} if device == "cpu" else {"gpu": torch.cuda.get_device_name()}
    return gpu | {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.system(),
        "python": platform.python_version(),
        "threads": threads,
        "clock": clock(device)[0],
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def commit() -> str:
    """The commit that was measured, marked where the code differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "hooked_vla", "kernels", "model_specs")
        return git("rev-parse", "--short=10", "HEAD") + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"


def report(rows: Sequence[Row], targets: Sequence[Target], about: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a result file."""
    return {
        "machine": about["machine"],
        "torch": torch.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
        **{key: value for key, value in about.items() if key != "machine"},
        "rows": [_rounded(asdict(row)) for row in rows],
        "targets": [_rounded(asdict(target)) for target in targets],
    }


def _rounded(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def write_json(path: Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    """The file appears under its name when complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def show(console: Console, rows: Sequence[Row], targets: Sequence[Target]) -> None:
    """A table for each size, and one of the targets."""
    for size in dict.fromkeys(row.size for row in rows):
        here = [row for row in rows if row.size == size]
        baselines = list(dict.fromkeys(row.baseline for row in here))
        table = Table("variant", "ms", *(f"× {baseline}" for baseline in baselines), title=f"{size} size")
        table.add_row(baselines[0], f"{here[0].baseline_ms:.1f}")
        for variant in dict.fromkeys(row.variant for row in here):
            by_baseline = {row.baseline: row for row in here if row.variant == variant}
            cells = [
                f"{row.ratio:.3f} ({row.low:.3f}–{row.high:.3f})" if (row := by_baseline.get(baseline)) else ""
                for baseline in baselines
            ]
            table.add_row(variant, f"{next(iter(by_baseline.values())).ms:.1f}", *cells)
        console.print(table)
    verdicts = Table("target", "native reference", "limit", "ratio", "")
    for target in targets:
        word = "[green]met[/green]" if target.met else "[red]missed[/red]"
        name = f"{target.variant}, {target.size}"
        verdicts.add_row(name, target.baseline, f"{target.limit:.2f}", f"{target.ratio:.3f}", word)
    console.print(verdicts)
