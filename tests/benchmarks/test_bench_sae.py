"""The benchmark of training, and that it says what it lacks."""

import importlib
import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("bench_sae")


def test_quick_run_writes_every_ratio(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sae_lens", reason="needs: pip install 'sae-lens>=6.54,<7'")
    file = tmp_path / "bench.json"
    given = ["bench_sae.py", "--quick", "--rounds", "1", "--batch", "128", "--json", str(file)]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(bench, "EXPANSION", 1)
    monkeypatch.setattr(
        bench, "memory", lambda size, device: {"size": size.name, "formula_mb": 2.0, "measured_mb": 1.0}
    )
    bench.main()
    result = json.loads(file.read_text())
    sizes = {row["size"].partition(":")[0] for row in result["rows"]}
    assert sizes == {"trained", "collected and trained"}
    assert {row["baseline"] for row in result["rows"] if row["variant"] == "ours"} == {
        "sae-lens", "sae-lens, sparse activations",
    }  # fmt: skip
    assert all(0.01 < row["ratio"] < 10 for row in result["rows"])
    assert all(target["limit"] == 0.5 for target in result["targets"])
    assert all(target["met"] == (target["ratio"] <= 0.5) for target in result["targets"])
    assert all(each < 1e-2 for each in result["relative difference of gradients"].values())
    assert [each["measured_mb"] for each in result["memory"]] == [1.0]
    assert result["collected and trained"]["ours rows/s"] > 0


def test_memory_stays_within_its_formula(bench: ModuleType) -> None:
    measured = bench.memory(bench.Size(256, 128))
    assert 0.4 * measured["formula_mb"] < measured["measured_mb"] < measured["formula_mb"]


def test_nothing_is_timed_that_computes_something_else(
    bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("sae_lens", reason="needs: pip install 'sae-lens>=6.54,<7'")
    size = bench.Size(16, 64)
    rows = {"site": torch.randn(128, 16, generator=torch.Generator().manual_seed(0))}
    monkeypatch.setattr(bench, "K", 4)
    ours = bench.Ours(bench.TensorSource(rows), ["site"], size, tmp_path)
    theirs = bench.Theirs(lambda: rows, ours, size, False)
    assert bench.check_agreement(ours, theirs, rows) < 1e-4
    with torch.no_grad():
        ours.run.objectives[0].sae.b_enc.add_(0.1)
    with pytest.raises(ValueError, match="nothing is timed"):
        bench.check_agreement(ours, theirs, rows)


def test_without_sae_lens_it_says_what_to_install(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setattr(sys, "argv", ["bench_sae.py"])
    with pytest.raises(SystemExit, match="sae-lens is not installed: pip install"):
        bench.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu_it_says_so(bench: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_sae.py", "--device", "cuda"])
    with pytest.raises(SystemExit, match="no GPU on this machine"):
        bench.main()
