"""Tutorials: scripts in cells (`# %%`), which are what one edits, and the executed notebooks made from them.

python docs/notebooks.py [NAME ...]     # executes docs/tutorials/NAME.py into docs/tutorials/NAME.ipynb
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).parent / "tutorials"
# what a reader's browser loads for one picture
MOST_PNG = 100_000
# what kernels are told before they start: fast pictures and one thread, as in the tests; tqdm's bars need no widgets
SETTINGS = {"HOOKED_VLA_RENDER": "fast", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore:IProgress not found"}


@dataclass(frozen=True)
class Cell:
    """markdown or code; source without the marks of the script."""

    kind: str
    source: str


def names() -> list[str]:
    """Of the tutorials."""
    return sorted(file.stem for file in TUTORIALS.glob("*.py"))


def read_cells(name: str) -> list[Cell]:
    """The cells of docs/tutorials/NAME.py: `# %% [markdown]`, every line a comment, or `# %%` for code.

    Raises ValueError for text before the first cell and for code in a markdown cell.
    """
    before, *parts = re.split(r"^# %%", (TUTORIALS / f"{name}.py").read_text(), flags=re.MULTILINE)
    if before.strip():
        raise ValueError(f"{name}.py: text before the first cell: {before.strip().splitlines()[0]!r}")
    return [_cell(name, part) for part in parts]


def _cell(name: str, part: str) -> Cell:
    head, _, body = part.partition("\n")
    body = body.strip("\n")
    if head.strip() != "[markdown]":
        return Cell("code", body)
    wrong = [line for line in body.split("\n") if line and line != "#" and not line.startswith("# ")]
    if wrong:
        raise ValueError(f"{name}.py: a line of a markdown cell is no comment: {wrong[0]!r}")
    return Cell("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n")))


def execute(name: str) -> dict[str, Any]:
    """The notebook of a tutorial, every cell run in a kernel of its own, without what depends on the machine.

    Raises nbclient's CellExecutionError, and ValueError for a picture above MOST_PNG bytes.
    """
    import nbclient
    import nbformat

    fresh = nbformat.v4.new_notebook()
    for i, cell in enumerate(read_cells(name)):
        make = nbformat.v4.new_markdown_cell if cell.kind == "markdown" else nbformat.v4.new_code_cell
        fresh.cells.append(make(cell.source, id=f"{name.replace('_', '-')}-{i}"))
    os.environ.update(SETTINGS)
    client = nbclient.NotebookClient(
        fresh, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(TUTORIALS)}}, record_timing=False
    )
    client.execute()
    fresh.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    notebook = json.loads(nbformat.writes(fresh))
    for output in outputs(notebook):
        for kind, data in output.get("data", {}).items():
            if kind == "image/png" and len(base64.b64decode(data)) > MOST_PNG:
                raise ValueError(f"{name}: a picture is larger than {MOST_PNG:,} bytes; draw it smaller")
    return notebook


def outputs(notebook: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Every output of every cell."""
    for cell in notebook["cells"]:
        yield from cell.get("outputs", ())


def cells_of(notebook: Mapping[str, Any]) -> list[Cell]:
    """What its script had when it was executed."""
    return [Cell(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]


def read_notebook(name: str) -> dict[str, Any]:
    """The stored, executed notebook."""
    return json.loads((TUTORIALS / f"{name}.ipynb").read_text())


def as_markdown(name: str) -> tuple[str, dict[str, bytes]]:
    """(page, pictures): the stored notebook as Markdown, and the pictures by name that it links to."""
    parts, pictures = [], {}
    for cell in read_notebook(name)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = {kind: "".join(text) for kind, text in output.get("data", {}).items()}
            if "image/png" in data:
                picture = f"{name}_{len(pictures)}.png"
                pictures[picture] = base64.b64decode(data["image/png"])
                parts.append(f"![Output of the cell above.]({picture})")
            elif "text/html" in data:
                # pandas brings a style of its own
                parts.append(re.sub(r"<style.*?</style>|^\s+", "", data["text/html"], flags=re.DOTALL | re.MULTILINE))
            else:
                text = "".join(output["text"]) if "text" in output else data.get("text/plain", "")
                parts.append(f"```text\n{text.rstrip()}\n```")
    parts.append(f"[This page as a notebook]({name}.ipynb)")
    return "\n\n".join(parts) + "\n", pictures


def run(name: str) -> None:
    """Run a tutorial's code in this process. Errors name its cell."""
    names: dict[str, Any] = {"__name__": name}
    for i, cell in enumerate(read_cells(name)):
        if cell.kind == "code":
            exec(compile(cell.source, f"{name}, cell {i}", "exec"), names)


def main(arguments: Sequence[str]) -> None:
    """Execute and store, or only run."""
    only_run = "--run" in arguments
    for name in [each for each in arguments if each != "--run"] or names():
        if only_run:
            # kernels in Triton's interpreter say so themselves, but to a process that has not imported it
            os.environ.update(SETTINGS, MPLBACKEND="Agg", TRITON_INTERPRET="1")
            run(name)
            print(f"ran {name}")
            continue
        text = json.dumps(execute(name), indent=1, ensure_ascii=False) + "\n"
        target = TUTORIALS / f"{name}.ipynb"
        temporary = target.with_name(f".{target.name}.new")
        temporary.write_text(text)
        temporary.replace(target)


if __name__ == "__main__":
    main(sys.argv[1:])
