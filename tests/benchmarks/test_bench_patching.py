"""The benchmark of patching sweeps runs, and keeps its target."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_run_writes_every_ratio(tmp_path: Path) -> None:
    file = tmp_path / "results" / "bench.json"
    command = [sys.executable, "benchmarks/bench_patching.py", "--quick", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    result = json.loads(file.read_text())
    assert set(result) == {"machine", "torch", "commit", "date", "batch_rows", "sizes", "rows", "targets"}
    (size,) = result["sizes"].values()
    assert size["cells"] > 50 and size["max_effect_difference"] < 1e-3
    ratios = {row["variant"]: row["ratio"] for row in result["rows"]}
    assert set(ratios) == {"rows of a batch", "rows of a batch, resumed"}
    assert all(0 < ratio < 1 / 3 for ratio in ratios.values())
    (target,) = result["targets"]
    assert target["limit"] == round(1 / 3, 4) and target["met"] == (target["ratio"] <= 1 / 3)
