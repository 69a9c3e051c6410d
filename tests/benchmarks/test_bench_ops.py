"""The benchmark of kernels runs, writes what it says, and tells no speed of what is red."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import bench_ops
from op_cases import CASES, Inputs, Shape, widths

from hooked_vla import kernels

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
    assert entry.pop("ratio") > 0 and entry.pop("floor_ratio") > 0.5
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
