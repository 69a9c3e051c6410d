"""What the kernels gain: ours against the eager idiom of other libraries, and how far from what the machine could do.

Nothing is timed whose tests are red, nor whose result at the very shape differs from float64.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from xml.etree import ElementTree

import gpu_clock
import torch
import typer
from gpu_chunk import chunk_target
from gpu_predictions import predictions
from harness import RESULTS, ROOT, Row, Target, check_targets, clock, compare, in_turns, machine, report, write_json
from op_cases import CASES, Case, Inputs, Shape, chunk, first_tokens, in_float64, widths
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hooked_vla.kernels import use

TESTS = ROOT / "tests" / "kernels"
sys.path.append(str(TESTS))
from bounds import OUTPUT  # noqa: E402  # pyright: ignore[reportMissingImports]

OURS, EAGER, REFERENCE, COMPILED = "ours", "eager idiom", "reference", "eager idiom, torch.compile"
# tests of other things than the numbers of a forward pass; left out by --quick, which takes under a minute
NOT_NUMBERS = ("compile", "torch_op", "differences", "gradients", "says")
# tokens that are computed in float64 as well
CHECKED = 8
# rounding of float64, in another order of operations
EQUAL = 1e-9
# the eager idiom's operations at one call, beyond which a shape is left to GPUs
MOST_CPU_OPERATIONS = 80e9
ROUNDS = {"cpu": 7, "cuda": 30}
QUICK_ROUNDS = 3
# some ops take less time than a clock and cold caches blur
TURN_S = 0.03
TARGET_SHAPE = {"n": 256, "d": 1024, "m": 32768}
# ours / eager idiom, on a CPU at the target's shape; on a GPU a top-k splice at any
CPU_LIMITS = {"delta_splice": 1 / 100, "sae_splice": 1 / 2.5, "lowrank_edit": 1 / 4}
GPU_LIMITS = {"sae_splice": 1 / 4}
# of a copy's speed, on a GPU with at least so many tokens
LEAST_SHARE, SHARE_FROM = {"lowrank_edit": 0.6}, 1024
# µs of one call in a CUDA graph, at the target's shape and for a chunk of π0.5's expert
MOST_US = {"delta_splice": 8.0}


def _last(case: ElementTree.Element, attribute: str) -> str:
    """Of a dotted name; that of a file which cannot be imported stands where others have the test's."""
    return case.get(attribute, "").split(".")[-1]


def _red(cases: Sequence[ElementTree.Element]) -> list[str]:
    return [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]


def green(ops: Sequence[str], quick: bool, device: str = "cpu", folder: Path = TESTS) -> dict[str, str]:
    """Op -> what is wrong with its tests, for those that are red or have none; runs them in a process of their own.

    On a GPU also those of test_on_gpu.py, whose cases are named after ops.
    """
    missing = {op: f"no {folder.name}/test_{op}.py" for op in ops if not (folder / f"test_{op}.py").is_file()}
    files = [str(folder / f"test_{op}.py") for op in ops if op not in missing]
    if not files:
        return missing
    if device != "cpu":
        files.append(str(folder / "test_on_gpu.py"))
    with tempfile.TemporaryDirectory() as temporary:
        verdicts = Path(temporary) / "tests.xml"
        # as users call the ops: without the runtime shape checks that pytest's own options switch on
        # and what tests share is beside their folder
        shared = f"--override-ini=pythonpath={TESTS.parent}"
        plain = ["--override-ini=addopts=", shared, "--confcutdir", str(folder), "-p", "no:cacheprovider"]
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--continue-on-collection-errors",
            *plain,
            f"--junit-xml={verdicts}",
        ]
        if quick:
            command += ["-k", " and ".join(f"not {each}" for each in NOT_NUMBERS)]
        else:
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run([*command, *files], cwd=ROOT, capture_output=True, text=True, env=environment)
        if not verdicts.is_file():
            return missing | dict.fromkeys(ops, done.stdout[-2000:] + done.stderr[-2000:])
        cases = list(ElementTree.parse(verdicts).iter("testcase"))
    wrong = dict(missing)
    for op in ops:
        own = [case for case in cases if f"test_{op}" in (_last(case, "classname"), _last(case, "name"))]
        on_gpu = [case for case in cases if case.get("name", "").endswith((f"-{op}]", f"[{op}]"))]
        if red := _red(own + on_gpu):
            wrong[op] = f"{len(red)} of {len(own + on_gpu)} tests fail, {red[0]} first"
        elif op not in wrong and (not own or (device != "cpu" and not on_gpu)):
            wrong[op] = "none of its tests ran"
    return wrong


def shapes(op: str, device: str, quick: bool) -> Iterator[Shape]:
    """What is timed: the target's shape, and the streams of real models."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    n_edited, active = 16, 64
    target = Shape(**TARGET_SHAPE, k=active, S=n_edited, dtype=dtype, device=device)
    small = widths()["smolvla expert"]
    small_shape = Shape(chunk(), small, 8 * small, active, n_edited, dtype, device)
    if quick:
        yield small_shape
        if op in CPU_LIMITS:
            yield target
        return
    yield target
    few = chunk()
    for d in widths().values():
        for n, expansion in ((1, 8), (few, 8), (few, 32), (256, 8), (1024, 8)):
            if op == "lowrank_edit" and expansion == 32:
                continue
            # encode, decode and decode once more; or a product with a projection matrix
            rows = d if op == "lowrank_edit" else 3 * expansion * d
            if device != "cpu" or 2 * n * d * rows <= MOST_CPU_OPERATIONS:
                yield Shape(n, d, expansion * d, active, n_edited, dtype, device)


def at_target(shape: Shape) -> bool:
    return all(getattr(shape, name) == value for name, value in TARGET_SHAPE.items())


def _tensors(result: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    return [each for each in (result if isinstance(result, tuple) else (result,)) if each is not None]


def error_of(actual: Tensor, exact: Tensor) -> float:
    """The longest difference of two rows over the length of the longest row; NaN counts as infinite.

    Not over its own length: a row may be short because its terms cancel, as a gradient's do.
    """
    actual, exact = (each.double().reshape(-1, each.shape[-1]) for each in (actual, exact))
    longest = exact.norm(dim=1).max().clamp_min(torch.finfo(torch.float64).tiny)
    return float(((actual - exact).norm(dim=1).max() / longest).nan_to_num(nan=torch.inf))


def check(case: Case, shape: Shape, inputs: Inputs) -> float:
    """The worst error for the first tokens against the reference in float64.

    Raises ValueError when it is more than the bound of its dtype, when two runs differ, and when the eager idiom in
    float64 is something else.
    """
    few = first_tokens(inputs, CHECKED)
    with use("reference"):
        exact = _tensors(case.ours(in_float64(few)))
    for idiom, right in zip(_tensors(case.eager(in_float64(few))), exact, strict=True):
        if error_of(idiom, right) > EQUAL:
            raise ValueError(f"{case.op} at {shape}: the eager idiom computes something else; not timed")
    first, second = _tensors(case.ours(few)), _tensors(case.ours(few))
    worst = 0.0
    for mine, again, right in zip(first, second, exact, strict=True):
        if not torch.equal(mine, again):
            raise ValueError(f"{case.op} at {shape}: two runs differ; not timed")
        error = error_of(mine, right)
        if error > OUTPUT[mine.dtype]:
            raise ValueError(f"{case.op} at {shape}: off by {error:.1e} of a row; not timed")
        worst = max(worst, error)
    return worst


def _in_reference(call: Callable[[Inputs], Any]) -> Callable[[Inputs], Any]:
    def run(inputs: Inputs) -> Any:
        with use("reference"):
            return call(inputs)

    return run


def time_case(case: Case, shape: Shape, rounds: int, quick: bool) -> tuple[list[Row], float]:
    """Rows of every variant against the eager idiom, and the error that was found before."""
    generator = torch.Generator(shape.device).manual_seed(0)
    inputs = case.make(shape, generator)
    error = check(case, shape, inputs)
    variants: dict[str, Callable[[Inputs], Any]] = {EAGER: case.eager, OURS: case.ours}
    if not quick and at_target(shape):
        torch._dynamo.reset()
        variants |= {REFERENCE: _in_reference(case.ours), COMPILED: torch.compile(case.eager, dynamic=False)}
    label = f"{case.op} {shape}"
    with torch.no_grad():
        if shape.device == "cpu":
            calls = {name: lambda run=run: run(inputs) for name, run in variants.items()}
            times = in_turns(calls, rounds, 2, label, TURN_S)
        else:
            size = sum(each.numel() * each.element_size() for each in inputs.values() if isinstance(each, Tensor))
            sets = [inputs, *(case.make(shape, generator) for _ in range(gpu_clock.sets_needed(size) - 1))]
            several = {name: [lambda run=run, i=i: run(i) for i in sets] for name, run in variants.items()}
            times = gpu_clock.in_turns(several, rounds, label)
    return compare(times, label, [EAGER]), error


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second of a large copy, read and written; operations per second of a large matrix product)."""
    side, n_bytes = (2048, 128_000_000) if device == "cpu" else (8192, 2_000_000_000)
    source = torch.ones(n_bytes // 4, device=device)
    a, b = torch.randn(2, side, side, device=device).to(dtype)
    target, product = torch.empty_like(source), torch.empty_like(a)
    calls = {"copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}
    if device == "cpu":
        times = in_turns(calls, 3, 1, "ceilings")
    else:
        times = gpu_clock.in_turns({name: [call] for name, call in calls.items()}, 10, "ceilings")
    return 2 * n_bytes / median(times["copy"]), 2 * side**3 / median(times["product"])


def floor_seconds(case: Case, shape: Shape, bytes_rate: float, operations_rate: float) -> float:
    """What no way of computing it can beat on this machine."""
    elements, operations = case.cost(shape)
    return max(elements * shape.dtype.itemsize / bytes_rate, operations / operations_rate)


def entry(case: Case, shape: Shape, ours: Row, floor: float) -> dict[str, Any]:
    """One line of the list that --json writes. ratio: how many times faster; floor_ratio: time over the floor."""
    return {
        "op": case.op,
        "n": shape.n,
        "d": shape.d,
        "m": None if case.op == "lowrank_edit" else shape.m,
        "k": shape.k,
        "dtype": str(shape.dtype).removeprefix("torch."),
        "device": shape.device,
        "baseline": ours.baseline,
        "ratio": round(1 / ours.ratio, 3),
        "floor_ratio": round(ours.ms / 1e3 / floor, 3),
    }


def copy_share(case: Case, shape: Shape, ours: Row, bytes_rate: float) -> float:
    """Bytes that must be moved, over those that a copy would have moved in the same time."""
    return round(case.cost(shape)[0] * shape.dtype.itemsize / bytes_rate / (ours.ms / 1e3), 3)


def share_targets(cases: Sequence[tuple[Case, Shape]], details: Mapping[str, dict[str, float]]) -> list[Target]:
    """Whether ops that only move memory come near a copy, on a GPU. ratio: their share of its speed."""
    found = []
    for case, shape in cases:
        least, label = LEAST_SHARE.get(case.op), f"{case.op} {shape}"
        if least is not None and shape.device != "cpu" and shape.n >= SHARE_FROM:
            share = details[label]["copy_share"]
            found.append(Target(label, OURS, "copy", least, share, share >= least))
    return found


def time_targets(cases: Sequence[tuple[Case, Shape]], rows: Sequence[Row]) -> list[Target]:
    """Whether ops are as fast in a CUDA graph as they are meant to be. ratio: µs of one call."""
    ours = {row.size: row.ms * 1e3 for row in rows if row.variant == OURS}
    found = []
    for case, shape in cases:
        most, label = MOST_US.get(case.op), f"{case.op} {shape}"
        in_a_chunk = (shape.n, shape.d) == (chunk(), widths()["pi05 expert"])
        if most is not None and shape.device != "cpu" and (at_target(shape) or in_a_chunk):
            found.append(Target(label, OURS, "µs in a graph", most, ours[label], ours[label] <= most))
    return found


def show(console: Console, entries: Sequence[dict[str, Any]], rows: Sequence[Row], met: dict[str, bool]) -> None:
    table = Table("op", "n", "d", "m", "k", "dtype", "eager ms", "ours ms", "× faster", "× floor", "target")
    ours = [row for row in rows if row.variant == OURS]
    for each, row in zip(entries, ours, strict=True):
        shape = ("" if each[name] is None else str(each[name]) for name in ("n", "d", "m", "k", "dtype"))
        verdict = {True: "[green]met[/green]", False: "[red]missed[/red]", None: ""}[met.get(row.size)]
        numbers = (f"{row.baseline_ms:.3f}", f"{row.ms:.3f}", f"{each['ratio']:.1f}", f"{each['floor_ratio']:.1f}")
        table.add_row(each["op"], *shape, *numbers, verdict)
    console.print(table)


def limits(cases: Sequence[tuple[Case, Shape]]) -> dict[tuple[str, str], float]:
    """(label, variant) -> the largest ratio to the eager idiom that meets a target."""
    found = {}
    for case, shape in cases:
        limit = (CPU_LIMITS if shape.device == "cpu" else GPU_LIMITS).get(case.op)
        if limit is not None and (shape.device != "cpu" or at_target(shape)):
            found[(f"{case.op} {shape}", OURS)] = limit
    return found


@dataclass
class Measured:
    """What has been timed so far. left_out: labels of shapes for which there was no time."""

    rates: tuple[float, float]
    entries: list[dict[str, Any]] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    details: dict[str, dict[str, float]] = field(default_factory=dict)
    timed: list[tuple[Case, Shape]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, case: Case, shape: Shape, rounds: int, quick: bool) -> None:
        found, error = time_case(case, shape, rounds, quick)
        ours = next(row for row in found if row.variant == OURS)
        self.rows += found
        self.details[ours.size] = {"error": error, "copy_share": copy_share(case, shape, ours, self.rates[0])}
        self.timed.append((case, shape))
        self.entries.append(entry(case, shape, ours, floor_seconds(case, shape, *self.rates)))

    def targets(self) -> list[Target]:
        return [
            *check_targets(self.rows, limits(self.timed)),
            *share_targets(self.timed, self.details),
            *time_targets(self.timed, self.rows),
        ]


def measure(
    found: Measured, queue: Sequence[tuple[Case, Shape]], rounds: int, quick: bool, until: float,
    keep: Callable[[], None],
) -> None:  # fmt: skip
    """Times everything in the queue, op after op; `keep` is called after each of them. until: time.monotonic()."""
    for i, (case, shape) in enumerate(queue):
        if time.monotonic() > until:
            found.left_out.append(f"{case.op} {shape}")
            continue
        found.add(case, shape, rounds, quick)
        if i + 1 == len(queue) or queue[i + 1][0] is not case:
            keep()


def main(
    quick: Annotated[bool, typer.Option("--quick", help="few shapes, in under a minute")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="where the list of ratios goes")] = None,
    report_file: Annotated[Path | None, typer.Option("--report", help="where everything measured goes")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    ops: Annotated[list[str] | None, typer.Option("--op", help="only these; may be given several times")] = None,
    threads: Annotated[int, typer.Option(help="of torch")] = 1,
    rounds: Annotated[int | None, typer.Option(help="in place of the device's own number")] = None,
    within: Annotated[float, typer.Option(help="seconds after which no shape is begun; left out ones are named")] = (
        float("inf")
    ),
) -> None:
    """Time the kernels, once their tests are green."""
    until = time.monotonic() + within
    known = [case.op for case in CASES]
    if unknown := sorted(set(ops or ()) - set(known)):
        raise typer.BadParameter(f"op {unknown[0]!r} is unknown; there are {', '.join(known)}")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise typer.BadParameter(f"device {device!r}: must be cpu, or cuda where there is one")
    torch.set_num_threads(threads)
    # a file has no width of its own
    console = Console(width=None if sys.stdout.isatty() else 120)
    chosen = [case for case in CASES if case.op in (ops or known)]
    if wrong := green([case.op for case in chosen], quick, device):
        for op, why in wrong.items():
            console.print(f"[red]{op}[/red]: {why}; no speeds are told", soft_wrap=True)
        raise typer.Exit(1)

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rates = ceilings(device, dtype)
    count = rounds or (QUICK_ROUNDS if quick else ROUNDS[device])
    where = report_file or (None if quick else RESULTS / f"bench_ops_{device}.json")
    about: dict[str, Any] = {
        "machine": machine(threads, device),
        "rounds": count,
        "clock": clock()[0] if device == "cpu" else "events around graph replays",
        "copy_gb_per_s": round(rates[0] / 1e9, 1),
        "product_tflop_per_s": round(rates[1] / 1e12, 2),
        "complete": False,
    }
    found, extra = Measured(rates), list[Target]()

    def keep() -> None:
        """What there is so far: whatever stops the run later, this was measured."""
        about.update(entries=found.entries, details=found.details, left_out=found.left_out)
        if where is not None:
            write_json(where, report(found.rows, [*found.targets(), *extra], about))

    queue = [(case, shape) for case in chosen for shape in shapes(case.op, device, quick)]
    measure(found, queue, count, quick, until, keep)
    if device != "cpu" and not quick:
        about["predictions"] = predictions()
        keep()
        extra.append(chunk_target())
    about["complete"] = not found.left_out
    keep()
    show(console, found.entries, found.rows, {target.size: target.met for target in found.targets()})
    if found.left_out:
        console.print(f"no time was left for {len(found.left_out)} shapes: {', '.join(found.left_out)}")
    if where is not None:
        console.print(f"written: {where}")
    if json_file is not None:
        write_json(json_file, found.entries)
        console.print(f"written: {json_file}")


if __name__ == "__main__":
    typer.run(main)
