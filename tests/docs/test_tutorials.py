"""Tutorials: the stored notebooks are those of the scripts, and the scripts run with the code as it is."""

import base64
import re
import subprocess
import sys

import pytest
from pages import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import notebooks  # pyright: ignore[reportMissingImports]

NAMES = notebooks.names()


def test_there_are_six() -> None:
    assert len(NAMES) == 6


@pytest.mark.parametrize("name", NAMES)
def test_stored_notebook_is_the_script_executed(name: str) -> None:
    notebook = notebooks.read_notebook(name)
    assert notebooks.cells_of(notebook) == notebooks.read_cells(name), f"{name} is out of date: run `make docs`"
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert any("image/png" in each.get("data", {}) for each in notebooks.outputs(notebook))
    for output in notebooks.outputs(notebook):
        assert output["output_type"] != "error" and output.get("name") != "stderr", output
        text = "".join(output.get("text", "")) + "".join(output.get("data", {}).get("text/plain", ""))
        # neither places of a machine nor addresses of its memory
        assert not re.search(r"(?<![\w.])/(tmp|home|root|usr|work|var)/|0x[0-9a-f]{6}", text), text
        picture = output.get("data", {}).get("image/png")
        assert picture is not None or "<Figure" not in text, f"{name}: a figure that is not shown"
        assert picture is None or len(base64.b64decode(picture)) <= notebooks.MOST_PNG


def test_they_run() -> None:
    """One after another in one process of their own, which Triton has to be told of beforehand."""
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "notebooks.py", "--run", *NAMES], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("ran ")] == [f"ran {name}" for name in NAMES]


def test_a_script_with_text_outside_of_cells_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(notebooks, "TUTORIALS", tmp_path)
    (tmp_path / "one.py").write_text("x = 1\n# %%\n")
    with pytest.raises(ValueError, match="text before the first cell: 'x = 1'"):
        notebooks.read_cells("one")
    (tmp_path / "one.py").write_text("# %% [markdown]\n# fine\nx = 1\n")
    with pytest.raises(ValueError, match="a line of a markdown cell is no comment: 'x = 1'"):
        notebooks.read_cells("one")
