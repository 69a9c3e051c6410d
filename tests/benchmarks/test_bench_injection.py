"""The benchmark of injection runs, and refuses to tell times of variants that act otherwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_run_writes_every_ratio(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "benchmarks/bench_injection.py", "--quick", "--rounds", "1", "--episodes", "2"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    rows = {row["variant"]: row for row in result["rows"]}
    injected = ["every residual", "expert's residual stream", "one residual of the expert", "language tokens"]
    assert list(rows) == [*injected, "no injection, again"]
    assert all(row["baseline"] == "no injection" and 0.1 < row["ratio"] < 20 for row in rows.values())
    assert [(target["variant"], target["limit"]) for target in result["targets"]] == [(name, 1.15) for name in injected]
    assert all(target["met"] == (target["ratio"] <= target["limit"]) for target in result["targets"])
    assert result["recorded_bytes"]["smolvla-tabletop"] > 100_000
