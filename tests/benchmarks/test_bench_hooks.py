"""The benchmark of hooks runs, and writes what the documentation reads."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_quick_run_writes_every_ratio(tmp_path: Path) -> None:
    file = tmp_path / "results" / "bench.json"
    command = [sys.executable, "benchmarks/bench_hooks.py", "--quick", "--rounds", "2", "--baseline", "stripped"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    result = json.loads(file.read_text())
    assert set(result) == {"machine", "torch", "commit", "date", "sizes", "idle_call", "rows", "targets"}
    assert set(result["machine"]) == {"cpu", "cores", "memory_gb", "system", "python", "threads", "clock"}
    tiny = result["sizes"]["tiny"]
    assert tiny["reference"] == "no hook points"
    assert tiny["max_action_difference"] < 1e-5
    assert tiny["taps_per_chunk"] > tiny["hook_points"] > 100
    assert 0 < result["idle_call"]["hook_point_us"] < 100
    rows = {row["variant"]: row for row in result["rows"]}
    assert list(rows) == [
        "no hooks", "all residuals cached", "everything but scores and patterns cached", "everything cached",
        "one patch", "reference again",
    ]  # fmt: skip
    for row in rows.values():
        assert set(row) == {"size", "variant", "baseline", "ratio", "low", "high", "baseline_ms", "ms"}
        assert row["size"] == "tiny" and row["baseline"] == "no hook points"
        assert 0.1 < row["ratio"] < 20 and row["ms"] > 0 and row["baseline_ms"] > 0
    for target in result["targets"]:
        assert target["met"] == (target["ratio"] <= target["limit"])
    limits = {(target["size"], target["variant"]): target["limit"] for target in result["targets"]}
    assert limits == {("tiny", "no hooks"): 1.05, ("tiny", "everything cached"): 1.2}
    assert "no hook points" in done.stdout
