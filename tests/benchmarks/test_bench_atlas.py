"""The benchmark of the Atlas opens a generated run, checks every answer, and says which targets are met."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_run_times_every_view(tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    command = [sys.executable, "benchmarks/bench_atlas.py", "--quick", "--episodes", "60", "--rounds", "1"]
    done = subprocess.run([*command, "--json", str(file)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    result = json.loads(file.read_text())
    assert result["episodes"] == 60 and 0 < result["open_s"] < 60
    names = [row["view"] for row in result["rows"]]
    assert {"an experiment", "its heat map", "a model", "its last page of episodes", "an episode"} <= set(names)
    assert all(row["ms"] > 0 and row["bytes"] > 0 for row in result["rows"])
    assert [target["view"] for target in result["targets"]] == ["open", *names]
    assert all(target["met"] == (target["ms"] <= 300) for target in result["targets"][1:])
