"""Whether every number of a written report is the run's: of its tables, its settings, or the definition's text."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from hooked_vla.rollouts.experiments.definition import Definition

# versions have several points; a commit that begins with digits is none
_NUMBER = re.compile(r"(?<![\w.#])[-+−]?\d+(?:\.\d+)*(?:e[-+]?\d+)?(?!\w)")
# what words say and nobody measures: none, one, the confidence of intervals, a percentile of activations
DEFINED = {0.0, 1.0, -1.0, 95.0, 99.0}
# shares are shown as per cent, metres as millimetres or centimetres
_SCALES = (1.0, 100.0, 1000.0)
_SHOWN = 60


def unknown_numbers(folder: Path, definition: Definition) -> list[str]:
    """Lines of FOLDER/report.md with a number that neither tables nor settings nor the definition have, and cells of
    its tables that differ from the files."""
    lines = (folder / "report.md").read_text().splitlines()
    verdicts = json.loads((folder / "verdicts.json").read_text())["verdicts"]
    tables = {path: pd.read_parquet(folder / path) for path in _paths(folder)}
    rules = [
        f"| {_escaped(rule.text)} | {_escaped(verdicts[rule.id]['measured'])} | "
        f"{ {True: 'holds', False: '**does not hold**', None: 'not judged'}[verdicts[rule.id]['holds']] } |"
        for rule in definition.rules
    ]
    expected = {"| rule | measured | verdict |", "|---|---|---|", *rules}
    for path, table in tables.items():
        expected |= {*_rows(table), f"`{path}`", f"{len(table) - _SHOWN} more rows in `{path}`"}
    measured = [value for table in tables.values() for value in _values(table)]
    counts = [len(table) for table in tables.values()]
    said = _said(json.loads((folder / "experiment.json").read_text()), definition)
    found = []
    for line in lines:
        if line.startswith("|") or line.endswith(".parquet`"):
            found += [] if line in expected else [line]
            continue
        numbers = [each for each in _NUMBER.findall(line) if not _known(each, measured, counts, said)]
        found += [f"{numbers} in: {line}"] if numbers else []
    return found


def _paths(folder: Path) -> list[str]:
    return ["results.parquet", *(str(path.relative_to(folder)) for path in sorted(folder.glob("tables/*.parquet")))]


def _rows(table: pd.DataFrame) -> Iterator[str]:
    yield f"| {' | '.join(map(str, table.columns))} |"
    yield "|" + "---|" * len(table.columns)
    for row in table.head(_SHOWN).itertuples(index=False):
        yield f"| {' | '.join(map(_cell, row))} |"


def _cell(value: Any) -> str:
    if value is None or value is pd.NA or value != value:
        return ""
    number = isinstance(value, float) or getattr(getattr(value, "dtype", None), "kind", "") == "f"
    return f"{float(value):.3g}" if number else _escaped(str(value))


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _values(table: pd.DataFrame) -> Iterator[float]:
    for name in table.columns:
        column = table[name]
        if pd.api.types.is_numeric_dtype(column) and column.dtype != bool:
            yield from {float(each) for each in column.dropna()}


def _said(about: dict[str, Any], definition: Definition) -> set[str]:
    """Numbers in the run's description and the definition, as they are written there."""
    texts = [json.dumps(about), definition.title, definition.question, definition.published, definition.id]
    return {each for text in texts for each in re.findall(r"\d+(?:\.\d+)*", text)}


def _known(text: str, measured: list[float], counts: list[int], said: set[str]) -> bool:
    bare = text.lstrip("+-−")
    if bare in said:
        return True
    number = float(text.replace("−", "-")) if bare.count(".") < 2 else float("nan")
    if number in DEFINED or number in counts:
        return True
    digits = len(bare.partition("e")[0].partition(".")[2]) - int(bare.partition("e")[2] or 0)
    # as far as it was printed
    off = 0.5 * 10.0**-digits * (1 + 1e-9)
    values = [*measured, *(float(each) for each in said if each.count(".") < 2)]
    return any(abs(abs(value * scale) - abs(number)) <= off for value in values for scale in _SCALES)
