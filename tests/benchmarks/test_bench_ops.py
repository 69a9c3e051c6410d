"""The benchmark of kernels runs, writes what it says, and tells no speed of what is red."""

import json
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_ops
import gpu_chunk
from harness import Row
from op_cases import CASES, Inputs, Shape, widths

from hooked_vla import HookedVLA, kernels

ROOT = Path(__file__).parents[2]
SMALL = Shape(70, 48, 300, 12, 4, torch.float32, "cpu")


def inputs_of(case: Any, shape: Shape = SMALL) -> Inputs:
    return case.make(shape, torch.Generator().manual_seed(0))


def test_quick_run_writes_the_list(tmp_path: Path) -> None:
    file = tmp_path / "results" / "ops.json"
    command = [sys.executable, "benchmarks/bench_ops.py", "--quick", "--op", "sparse_decode", "--rounds", "2"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    (entry,) = json.loads(file.read_text())
    # no bound on how fast: what fits a processor's cache comes faster than the copy that the floor is made of
    assert entry.pop("ratio") > 0 and entry.pop("floor_ratio") > 0
    assert entry == {
        "op": "sparse_decode", "n": 50, "d": 720, "m": 5760, "k": 64, "dtype": "float32", "device": "cpu",
        "baseline": "eager idiom",
    }  # fmt: skip


def test_every_op_is_timed() -> None:
    ops = {name for name in kernels.__all__ if (ROOT / "kernels" / "ops" / name).is_dir()}
    assert {case.op for case in CASES} == ops


def test_shapes_are_those_of_the_models() -> None:
    assert widths() == {
        "smolvla expert": 720, "smolvla vlm": 960, "pi05 expert": 1024, "pi05 vlm": 2048, "openvla": 4096,
    }  # fmt: skip
    timed = list(bench_ops.shapes("sae_splice", "cuda", quick=False))
    assert {shape.d for shape in timed} == set(widths().values())
    assert {shape.n for shape in timed} == {1, 50, 256, 1024}
    assert {shape.m // shape.d for shape in timed} == {8, 32}
    assert len(set(timed)) == len(timed)
    targets = bench_ops.limits([(case, shape) for case in CASES for shape in bench_ops.shapes(case.op, "cpu", True)])
    assert len(targets) == 3


def test_times_in_a_graph_are_targets_on_a_gpu() -> None:
    case = next(case for case in CASES if case.op == "delta_splice")
    sizes = [(256, 1024, 32768), (50, 1024, 8192), (50, 2048, 16384), (1024, 1024, 8192)]
    for device, n_targets in (("cuda", 2), ("cpu", 0)):
        cases = [(case, Shape(*size, 64, 16, torch.bfloat16, device)) for size in sizes]
        rows = [Row(f"delta_splice {shape}", bench_ops.OURS, "x", 1, 1, 1, 1, 0.0081) for _, shape in cases]
        found = bench_ops.time_targets(cases, rows)
        assert len(found) == n_targets
        assert all((target.limit, target.ratio, target.met) == (8.0, 8.1, False) for target in found)


def test_what_was_measured_is_kept_and_what_was_not_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """After each op; a shape that fails loses nothing, and past the limit none is begun."""
    cases = [case for case in CASES if case.op in ("delta_splice", "sparse_decode", "rank_count")]
    queue = [(case, replace(SMALL, n=n)) for case in cases for n in (3, 4)]
    now, kept = iter(range(100)), []

    def timed(case: Any, shape: Shape, rounds: int, quick: bool) -> tuple[list[Row], float]:
        if case.op == "rank_count" and shape.n == 4:
            raise RuntimeError("late")
        return [Row(f"{case.op} {shape}", bench_ops.OURS, bench_ops.EAGER, 0.5, 0.5, 0.5, 2.0, 1.0)], 0.0

    monkeypatch.setattr(bench_ops, "time_case", timed)
    monkeypatch.setattr(bench_ops.time, "monotonic", lambda: next(now))
    found = bench_ops.Measured((1e9, 1e9))
    with pytest.raises(RuntimeError, match="late"):
        bench_ops.measure(found, queue, 1, True, 100.0, lambda: kept.append(len(found.entries)))
    assert kept == [2, 4] and len(found.entries) == 5 and not found.left_out
    found, now = bench_ops.Measured((1e9, 1e9)), iter(range(100))
    bench_ops.measure(found, queue, 1, True, 2.5, lambda: kept.append(len(found.entries)))
    assert [f"{case.op} {shape}" for case, shape in queue[3:]] == found.left_out and len(found.entries) == 3


def test_the_share_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLA.from_spec("pi05", "tiny").requires_grad_(False)
    edits = gpu_chunk.edits_of(model, expansion=4)
    layers = [name for name in model.hook_points if name.startswith("expert.blocks.") and "resid_post" in name]
    assert [edit.site for edit in edits] == layers and len(layers) > 1
    monkeypatch.setattr(model, "compile", lambda mode: nullcontext())
    clock = iter([0.0, 1.0, 0.0, 1.02] * 10)
    monkeypatch.setattr(gpu_chunk.time, "perf_counter", lambda: next(clock))
    seconds, cost = gpu_chunk.share(model, edits, rounds=2)
    assert seconds == 1.0 and cost == pytest.approx(0.02)
    idle = [replace(edit, scale=1.0) for edit in edits]
    with pytest.raises(RuntimeError, match="the edits change no action"):
        gpu_chunk.share(model, idle, rounds=1)


def test_shares_of_a_copys_speed_are_targets_on_a_gpu() -> None:
    cases = [(case, Shape(n, 1024, 8192, 64, 16, torch.bfloat16, "cuda")) for case in CASES for n in (256, 1024)]
    details = {f"{case.op} {shape}": {"copy_share": 0.59} for case, shape in cases}
    (target,) = bench_ops.share_targets(cases, details)
    assert target.size.startswith("lowrank_edit n=1024 ") and (target.limit, target.ratio, target.met) == (
        0.6,
        0.59,
        False,
    )
    details[target.size]["copy_share"] = 0.6
    assert bench_ops.share_targets(cases, details)[0].met


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.op)
def test_ours_and_the_idiom_compute_the_same(case: Any) -> None:
    assert bench_ops.check(case, SMALL, inputs_of(case)) < 2e-6
    elements, operations = case.cost(SMALL)
    assert elements > 0 and operations > 0


def test_wrong_results_are_not_timed() -> None:
    case = next(case for case in CASES if case.op == "sparse_decode")
    inputs = inputs_of(case)

    def inexact(i: Inputs) -> Any:
        right = case.ours(i)
        return right if right.dtype == torch.float64 else right * (1 + 1e-4)

    with pytest.raises(ValueError, match=r"^sparse_decode at n=70 .*: off by 1.*e-04 of a row; not timed"):
        bench_ops.check(replace(case, ours=inexact), SMALL, inputs)
    with pytest.raises(ValueError, match="the eager idiom computes something else; not timed"):
        bench_ops.check(replace(case, eager=lambda i: case.eager(i) * 2), SMALL, inputs)
    counter = iter(range(10))
    with pytest.raises(ValueError, match="two runs differ; not timed"):
        bench_ops.check(replace(case, ours=lambda i: case.ours(i) + next(counter) * 1e-7), SMALL, inputs)


def test_red_tests_are_named(tmp_path: Path) -> None:
    (tmp_path / "test_good_op.py").write_text("def test_numbers(): pass\n")
    (tmp_path / "test_bad_op.py").write_text("def test_numbers(): assert 1 == 2\ndef test_more(): pass\n")
    (tmp_path / "test_broken_op.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "test_empty_op.py").write_text("def test_compiles(): pass\n")
    wrong = bench_ops.green(["good_op", "bad_op", "broken_op", "empty_op", "no_op"], quick=True, folder=tmp_path)
    assert wrong.pop("bad_op") == "1 of 2 tests fail, test_numbers first"
    assert wrong.pop("broken_op").startswith("1 of 1 tests fail")
    assert wrong.pop("empty_op") == "none of its tests ran"
    assert wrong.pop("no_op").endswith("test_no_op.py")
    assert not wrong


def test_unknown_ops_and_devices_are_refused() -> None:
    with pytest.raises(typer.BadParameter, match="'sparse_decoder' is unknown; there are delta_splice, "):
        bench_ops.main(ops=["sparse_decoder"], device="cpu")
    with pytest.raises(typer.BadParameter, match="'tpu': must be cpu, or cuda where there is one"):
        bench_ops.main(device="tpu")
