"""Tables of experiments, queried where they lie: a page of rows, the rows of one cell, and a heat map's cells."""

from collections.abc import Mapping
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import duckdb

from hooked_vla.atlas.routes import NotThere
from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.columns import HIGH, KEY, LOW, MEASURE, Column, roles
from hooked_vla.rollouts.sae.duck import FILE_ROWS, NUMBERED_ROWS, exactly

PAGE_ROWS = 200
# of a heat map's rows or columns
MAX_SIDE = 300
# keys that are tried for a heat map
_MAX_KEYS = 8
# keys over which one rather takes means
_REPLICATES = {"seed", "source_seed", "episode", "pair", "env_step", "source_task"}
_TEXT = ("VARCHAR", "STRING")
_WHOLE = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
_WHOLE += tuple(f"U{name}" for name in _WHOLE)


def schema(duck: duckdb.DuckDBPyConnection, path: Path) -> list[tuple[str, str]]:
    """Names of a table's columns, and what is in them: number, integer, text, bool or other."""
    found = duck.execute(f"SELECT * FROM {FILE_ROWS} LIMIT 0", [exactly(path)]).description
    return [(str(column[0]), _kind(str(column[1]).upper())) for column in found or ()]


def describe(run: Run, path: Path) -> dict[str, Any]:
    """A table's columns with their roles, ranges and numbers of values; how many rows; "error" where it is damaged.

    Also "grid": the numbers of the columns that make a heat map's rows and columns, and its quality from 0 to 1; None
    where fewer than two fit.
    """
    entry: dict[str, Any] = {"name": path.stem, "file": run.shown(path), "columns": [], "total": 0, "grid": None,
                             "error": None}  # fmt: skip
    duck = run.duckdb()
    try:
        real = run.inside(path)
        columns = roles(schema(duck, real))
        asked = [_summary(column) for column in columns]
        found = duck.execute(
            f"SELECT count(*), {', '.join(asked) or '0'} FROM {FILE_ROWS}",
            [exactly(real)],
        ).fetchone()
        total, summaries = (found[0], found[1:]) if found else (0, ())
        entry["total"] = total
        for column, summary in zip(columns, summaries, strict=False):
            entry["columns"].append({**asdict(column), **(summary or {})})
        entry["grid"] = _grid_columns(duck, real, entry["columns"])
    except (duckdb.Error, FileNotFoundError) as error:
        entry["error"] = f"{run.shown(path)} cannot be read: {error}"
    finally:
        duck.close()
    return entry


def _summary(column: Column) -> str:
    name = quoted(column.name)
    if column.type in ("number", "integer"):
        # isfinite: NaN would be the largest number
        least, most = (f"{each}({name}) FILTER (isfinite({name}::DOUBLE))" for each in ("min", "max"))
        return f"{{'low': {least}::DOUBLE, 'high': {most}::DOUBLE, 'distinct': count(DISTINCT {name})}}"
    return f"{{'distinct': count(DISTINCT {name})}}" if column.type == "text" else "NULL"


def _grid_columns(duck: duckdb.DuckDBPyConnection, path: Path, columns: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The two keys over which a heat map is full and has one row a cell, as far as any two do that."""
    keys = [i for i, each in enumerate(columns) if each["role"] == KEY and 1 < each["distinct"] <= MAX_SIDE]
    keys = [i for i in keys if columns[i]["name"] not in _REPLICATES] or keys
    pairs = list(combinations(keys[:_MAX_KEYS], 2))
    if not pairs or not any(each["role"] == MEASURE for each in columns):
        return None
    counts = [f"count(DISTINCT ({quoted(columns[a]['name'])}, {quoted(columns[b]['name'])}))" for a, b in pairs]
    found = duck.execute(f"SELECT count(*), {', '.join(counts)} FROM {FILE_ROWS}", [exactly(path)]).fetchone()
    total, *cells = found or (0,)

    def quality(at: int) -> float:
        a, b = (columns[i]["distinct"] for i in pairs[at])
        return cells[at] / (a * b) * cells[at] / max(total, 1)

    best = max(range(len(pairs)), key=lambda at: (quality(at), cells[at]))
    a, b = pairs[best]
    # a page is higher than wide
    rows, across = (a, b) if columns[a]["distinct"] >= columns[b]["distinct"] else (b, a)
    return {"rows": rows, "columns": across, "quality": quality(best)}


def size_of(run: Run, path: Path) -> tuple[int, str | None]:
    """How many rows a table has and None; or 0 and what is wrong with it."""
    duck = run.duckdb()
    try:
        found = duck.execute("SELECT num_rows FROM parquet_file_metadata(?)", [exactly(run.inside(path))]).fetchone()
        return (int(found[0]) if found else 0), None
    except (duckdb.Error, FileNotFoundError) as error:
        return 0, f"{run.shown(path)} cannot be read: {error}"
    finally:
        duck.close()


def page_of(run: Run, path: Path, page: int, where: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """PAGE_ROWS rows in the file's order; page: from 0. where: values that they have, None for none.

    Raises ValueError for a column that the table does not have.
    """
    duck, where = run.duckdb(), dict(where or {})
    try:
        names = [name for name, _ in schema(duck, path)]
        if unknown := sorted(set(where) - set(names)):
            raise ValueError(f"{run.shown(path)} has no columns {unknown}; it has {names}")
        tests = " AND ".join(f"{quoted(name)} IS NOT DISTINCT FROM ?" for name in where) or "true"
        bound = [exactly(path), *where.values()]
        counted = duck.execute(f"SELECT count(*) FROM {FILE_ROWS} WHERE {tests}", bound).fetchone()
        rows = duck.execute(
            f"SELECT * FROM {NUMBERED_ROWS} WHERE {tests} ORDER BY file_row_number LIMIT ? OFFSET ?",
            [*bound, PAGE_ROWS, page * PAGE_ROWS],
        ).fetchall()
    finally:
        duck.close()
    return {
        "file": run.shown(path), "columns": names, "rows": [list(row[:-1]) for row in rows],
        "numbers": [row[-1] for row in rows], "total": counted[0] if counted else 0, "page": page, "size": PAGE_ROWS,
    }  # fmt: skip


def grid(run: Run, path: Path, measure: int, rows: int, columns: int) -> dict[str, Any]:
    """A heat map of a measure over two keys, all by the numbers of their columns.

    "cells": [row, column, mean, least low, greatest high, rows of the table]; those without a row are not among them.
    An interval is given for cells of one row alone: that of a mean is not the mean of intervals.
    Raises NotThere for columns that the table does not have, or that are no measure or key.
    """
    duck = run.duckdb()
    try:
        known = roles(schema(duck, path))
        if not all(0 <= each < len(known) for each in (measure, rows, columns)):
            raise NotThere(f"{run.shown(path)} has {len(known)} columns")
        value, down, across = (known[each] for each in (measure, rows, columns))
        if value.role != MEASURE or {down.role, across.role} != {KEY} or rows == columns:
            raise NotThere(f"{value.name!r} over {down.name!r} and {across.name!r} is no heat map")
        ends = {each.role: each.name for each in known if each.of == value.name and each.role in (LOW, HIGH)}
        low, high = (f"any_value({quoted(ends[end])})" if end in ends else "NULL" for end in (LOW, HIGH))
        names = {"a": quoted(down.name), "b": quoted(across.name), "x": quoted(value.name)}
        found = duck.execute(
            "SELECT {a}, {b}, avg({x}) FILTER (isfinite({x}::DOUBLE)), count(*), {low}, {high}, min(file_row_number) "
            f"FROM {NUMBERED_ROWS} GROUP BY 1, 2 ORDER BY min(file_row_number)".format(**names, low=low, high=high),
            [exactly(path)],
        ).fetchall()
    finally:
        duck.close()
    sides = [list(dict.fromkeys(row[i] for row in found)) for i in (0, 1)]
    if max(map(len, sides), default=0) > MAX_SIDE:
        raise NotThere(f"more than {MAX_SIDE} rows or columns: choose other keys")
    for side in sides:
        if all(isinstance(each, int | float) for each in side):
            side.sort()
    at = [{value: i for i, value in enumerate(side)} for side in sides]
    cells = [[at[0][row[0]], at[1][row[1]], row[2], row[3], *(row[4:6] if row[3] == 1 else (None, None))]
             for row in found]  # fmt: skip
    return {"file": run.shown(path), "measure": value.name, "row_key": down.name, "column_key": across.name,
            "rows": sides[0], "columns": sides[1], "cells": cells}  # fmt: skip


def quoted(name: str) -> str:
    """A column's name as SQL has it; names come from a file's schema, never from a request."""
    return '"' + name.replace('"', '""') + '"'


def _kind(said: str) -> str:
    if said in ("BOOLEAN", "BOOL"):
        return "bool"
    if said in _TEXT:
        return "text"
    if said in _WHOLE:
        return "integer"
    return "number" if said in ("FLOAT", "DOUBLE") or said.startswith("DECIMAL") else "other"
