"""Experiments as they were recorded: rules and verdicts, tables, figures; and which rows a number comes from."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hooked_vla.atlas.routes import Media, NotThere, Route, once
from hooked_vla.atlas.run import ExperimentFolder, Run
from hooked_vla.atlas.views.columns import MEASURE
from hooked_vla.atlas.views.measured_on import measured_on
from hooked_vla.atlas.views.tables import PAGE_ROWS, describe, grid, page_of, size_of

RESULTS, VERDICTS, REPORT = "results.parquet", "verdicts.json", "report.md"
_FIGURE = re.compile(r"^!\[(?P<caption>.*)\]\(figures/(?P<name>[\w.-]+)\.png\)$", re.MULTILINE)
# of a report or verdicts; the longest is under 100 kB
_MAX_TEXT = 8 * 2**20


def all_experiments(run: Run) -> list[dict[str, Any]]:
    """What there is, one entry an experiment: what it asked, of whom, and which of its rules hold."""
    return [_entry(run, folder) for folder in run.experiments.values()]


def experiment(run: Run, key: str) -> dict[str, Any]:
    """One experiment: its entry, question, rules, tables, figures and limits.

    Raises NotThere for a key that the run does not have.
    """
    folder = _folder(run, key)
    report, error = _text(run, folder.path / REPORT)
    sections = _sections(report)
    figures = {found["name"]: found["caption"] for found in _FIGURE.finditer(report)}
    return {
        **_entry(run, folder),
        "question": sections.get("question", ""),
        "published": sections.get("published", ""),
        "limits": sections.get("Limits", ""),
        "report_error": error,
        "settings": folder.about.get("settings", {}),
        "seed": folder.about.get("seed"),
        "versions": folder.about.get("versions", {}),
        "tables": [_table_entry(run, path) for path in experiment_tables(folder).values()],
        "figures": [
            {"name": path.stem, "caption": figures.get(path.stem, ""), "file": run.shown(path)}
            for path in _figures(folder).values()
        ],
        "alike": [
            {"key": other.key, "model": model_name(other)}
            for other in run.experiments.values()
            if other.about.get("experiment") == folder.about.get("experiment") and other.about
        ],
    }


def table(run: Run, key: str, table: str) -> dict[str, Any]:
    """`describe` of a table. Raises NotThere."""
    return describe(run, _table_path(run, _folder(run, key), table))


def table_page(run: Run, key: str, table: str, page: str) -> dict[str, Any]:
    """PAGE_ROWS rows of a table, and the episodes that each was measured on; page: from 0. Raises NotThere."""
    path = _table_path(run, _folder(run, key), table)
    return _with_episodes(run, key, table, page_of(run, path, _number(page)))


def heat_map(run: Run, key: str, table: str, measure: str, rows: str, columns: str) -> dict[str, Any]:
    """`grid` of a table; measure, rows, columns: numbers of its columns. Raises NotThere."""
    path = _table_path(run, _folder(run, key), table)
    return grid(run, path, _number(measure), _number(rows), _number(columns))


def _number(text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise NotThere(f"{text!r} is no number")
    return int(text)


def figure(run: Run, key: str, name: str) -> Media:
    """A figure of the report. Raises NotThere."""
    paths = _figures(_folder(run, key))
    if name not in paths:
        raise NotThere(f"experiment {key!r} has no figure {name!r}")
    return Media(run.inside(paths[name]).read_bytes(), "image/png")


def rows(run: Run, key: str, table: str, where: str, page: str) -> dict[str, Any]:
    """The rows of a table that have some values, as `table_page` has them.

    where: a JSON object of column and value, null for what is blank.
    Raises NotThere; ValueError for a `where` that is none, or names a column that the table does not have.
    """
    path = _table_path(run, _folder(run, key), table)
    try:
        wanted = json.loads(where or "{}")
    except ValueError as error:
        raise ValueError(f"`where` is not JSON: {error}") from error
    if not isinstance(wanted, dict) or not all(isinstance(v, str | int | float | None) for v in wanted.values()):
        raise ValueError("`where` must be an object of columns and plain values")
    return _with_episodes(run, key, table, page_of(run, path, _number(page or "0"), wanted))


def _with_episodes(run: Run, key: str, table: str, page: dict[str, Any]) -> dict[str, Any]:
    return page | {"episodes": measured_on(run, _folder(run, key), table, page["columns"], page["rows"])}


def _entry(run: Run, folder: ExperimentFolder) -> dict[str, Any]:
    verdicts, error = _verdicts(run, folder)
    judged, stated = verdicts.get("verdicts"), folder.about.get("rules")
    judged = judged if isinstance(judged, dict) else {}
    stated = stated if isinstance(stated, list) else []
    rules = []
    for rule in stated:
        said = judged.get(rule.get("id"), {}) if isinstance(rule, dict) else {}
        if isinstance(rule, dict) and isinstance(said, dict):
            rules.append({"id": rule.get("id"), "text": rule.get("text", ""), "threshold": rule.get("threshold"),
                          "verdict": _word(said), "measured": said.get("measured", "")})  # fmt: skip
    labels = verdicts.get("labels")
    return {
        "key": folder.key,
        "experiment": str(folder.about.get("experiment", folder.path.name)),
        "title": str(verdicts.get("title", "")),
        "model": model_name(folder),
        "quick": bool(folder.about.get("quick", False)),
        "finished": bool(verdicts),
        "labels": [str(label) for label in labels] if isinstance(labels, list) else [],
        "rules": rules,
        "path": run.shown(folder.path),
        "error": folder.error or error,
    }


def _word(said: Mapping[str, Any]) -> str:
    if "holds" not in said:
        return "not finished"
    return {True: "holds", False: "does not hold"}.get(said["holds"], "not judged")


def model_name(folder: ExperimentFolder) -> str:
    """Of which model an experiment is; "" where that is not said."""
    model = folder.about.get("model")
    return Path(str(model.get("name", ""))).name if isinstance(model, dict) else ""


def _verdicts(run: Run, folder: ExperimentFolder) -> tuple[dict[str, Any], str | None]:
    text, error = _text(run, folder.path / VERDICTS)
    if not text:
        return {}, error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as problem:
        return {}, f"{VERDICTS} is damaged: {problem}"
    return (found, None) if isinstance(found, dict) else ({}, f"{VERDICTS} is damaged: it holds no object")


def _text(run: Run, path: Path) -> tuple[str, str | None]:
    """A small file and None; "" and why it cannot be shown, or None where it is not there yet."""
    if not path.is_file():
        return "", None
    try:
        file = run.inside(path)
        if file.stat().st_size > _MAX_TEXT:
            return "", f"{path.name} is larger than {_MAX_TEXT >> 20} MB"
        return file.read_text(encoding="utf-8"), None
    except (OSError, UnicodeDecodeError) as error:
        return "", f"{path.name} cannot be read: {error}"


def _sections(report: str) -> dict[str, str]:
    """Question and published claim from the head of a report, and its sections by their titles."""
    head, *rest = re.split(r"^## ", report, flags=re.MULTILINE)
    found = {title.strip(): body.strip() for title, _, body in (part.partition("\n") for part in rest)}
    parts = [part.strip() for part in head.split("\n\n")[1:]]
    plain = [part for part in parts if part and not part.startswith((">", "**Published.**"))]
    published = [part.removeprefix("**Published.**").strip() for part in parts if part.startswith("**Published.**")]
    return {**found, "question": " ".join(" ".join(plain).split()), "published": " ".join(published)}


def _folder(run: Run, key: str) -> ExperimentFolder:
    if key not in run.experiments:
        raise NotThere(f"this run has no experiment {key!r}")
    return run.experiments[key]


def experiment_tables(folder: ExperimentFolder) -> dict[str, Path]:
    """An experiment's tables by name, "results" first."""
    main = folder.path / RESULTS
    listed = sorted(_listing(folder.path / "tables", ".parquet"))
    found = {"results": main} if main.is_file() else {}
    # a name is one segment of an address, and one of a file in an export
    return found | {path.stem: path for path in listed if path.stem != "results"}


def _figures(folder: ExperimentFolder) -> dict[str, Path]:
    return {path.stem: path for path in sorted(_listing(folder.path / "figures", ".png"))}


def _listing(folder: Path, suffix: str) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.suffix == suffix and re.fullmatch(r"\w[\w.-]*", path.stem)]
    except OSError:
        return []


def _table_path(run: Run, folder: ExperimentFolder, table: str) -> Path:
    paths = experiment_tables(folder)
    if table not in paths:
        raise NotThere(f"experiment {folder.key!r} has no table {table!r}")
    return run.inside(paths[table])


def _table_entry(run: Run, path: Path) -> dict[str, Any]:
    total, error = size_of(run, path)
    return {"name": path.stem, "file": run.shown(path), "total": total, "error": error}


def _keys(run: Run) -> Iterator[Mapping[str, str]]:
    for key in run.experiments:
        yield {"key": key}


def _pages(run: Run) -> Iterator[Mapping[str, str]]:
    for key, folder in run.experiments.items():
        for name, path in experiment_tables(folder).items():
            total, error = size_of(run, path)
            # a damaged table has no page, and its error stands with the experiment
            for page in range(0 if error else max(1, -(-total // PAGE_ROWS))):
                yield {"key": key, "table": name, "page": str(page)}


def _table_names(run: Run) -> Iterator[Mapping[str, str]]:
    for key, folder in run.experiments.items():
        yield from ({"key": key, "table": name} for name in experiment_tables(folder))


def _grids(run: Run) -> Iterator[Mapping[str, str]]:
    """Every measure over the keys that a heat map begins with."""
    for key, folder in run.experiments.items():
        for name, path in experiment_tables(folder).items():
            about = describe(run, path)
            for measure, column in enumerate(about["columns"]):
                if about["grid"] and column["role"] == MEASURE:
                    rows, columns = (str(about["grid"][side]) for side in ("rows", "columns"))
                    yield {"key": key, "table": name, "measure": str(measure), "rows": rows, "columns": columns}


def _pictures(run: Run) -> Iterator[Mapping[str, str]]:
    for key, folder in run.experiments.items():
        yield from ({"key": key, "name": name} for name in _figures(folder))


ROUTES = [
    Route("experiments", all_experiments, listing=once),
    Route("experiments/{key}", experiment, listing=_keys),
    Route("experiments/{key}/table/{table}", table, listing=_table_names),
    Route("experiments/{key}/table/{table}/page/{page}", table_page, listing=_pages),
    Route("experiments/{key}/grid/{table}/{measure}/{rows}/{columns}", heat_map, listing=_grids),
    Route("experiments/{key}/rows/{table}", rows, query=("where", "page")),
    Route("experiments/{key}/figure/{name}", figure, listing=_pictures, media="image/png"),
]
