"""Which results name a place in a model: a hook point, a block, or a pathway, in whatever way tables write them."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb

from hooked_vla.atlas.run import Run
from hooked_vla.atlas.views.columns import HIGH, KEY, LOW, MEASURE, Column, roles
from hooked_vla.atlas.views.experiments import experiment_tables, model_name
from hooked_vla.atlas.views.tables import quoted, schema
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.interventions.injection_sites import choose_sites
from hooked_vla.rollouts.sae.duck import FILE_ROWS, NUMBERED_ROWS, exactly

# rows of a table that is looked through, and different values of one of its columns
MAX_ROWS, MAX_VALUES = 5000, 400
# measures that are shown with a result
SHOWN = 3
_DOTTED = re.compile(r"\b([a-z_]+(?:\.[A-Za-z0-9_]+)+)")
_CHOICE = re.compile(r"\b([a-z_]+(?:\.[a-z_]+)?:[a-z]+)\b")
_LAYER = re.compile(r"\b([a-z_]+) L(\d+)(?:H\d+)?\b")


def results_of(run: Run, model: str, built: HookedModel) -> list[dict[str, Any]]:
    """Every value of a key in the tables of a model's experiments that names a place of it.

    {"experiment", "key", "table", "column", "value", "rows", "places": hook points, blocks and pathways, "measured":
    [name, value, low, high] of its first measures where it has one row}.
    """
    found = []
    for folder in run.experiments.values():
        if model_name(folder) != model:
            continue
        for name, path in experiment_tables(folder).items():
            for each in _named(run, path, built):
                found.append({"experiment": str(folder.about.get("experiment", "")), "key": folder.key, "table": name,
                              **each})  # fmt: skip
    return found


def _named(run: Run, path: Path, built: HookedModel) -> Iterator[dict[str, Any]]:
    duck = run.duckdb()
    try:
        real = run.inside(path)
        columns = roles(schema(duck, real))
        measures = [each for each in columns if each.role == MEASURE][:SHOWN]
        counted = duck.execute(f"SELECT count(*) FROM {FILE_ROWS}", [exactly(real)]).fetchone()
        if counted is None or counted[0] > MAX_ROWS:
            return
        for column in columns:
            if column.role != KEY or column.type != "text":
                continue
            for value, rows, *numbers in _values(duck, real, column, columns, measures):
                places = places_in(str(value), built)
                if places:
                    measured = [[m.name, *numbers[3 * i : 3 * i + 3]] for i, m in enumerate(measures)]
                    yield {"column": column.name, "value": value, "rows": rows, "places": places,
                           "measured": measured if rows == 1 else []}  # fmt: skip
    except (duckdb.Error, FileNotFoundError):
        # it stands as damaged with its experiment
        return
    finally:
        duck.close()


def _values(
    duck: duckdb.DuckDBPyConnection, path: Path, column: Column, columns: list[Column], measures: list[Column]
) -> list[tuple[Any, ...]]:
    asked = []
    for measure in measures:
        ends = {each.role: each.name for each in columns if each.of == measure.name}
        for name in (measure.name, ends.get(LOW), ends.get(HIGH)):
            asked.append("NULL" if name is None else f"any_value({quoted(name)})")
    name = quoted(column.name)
    return duck.execute(
        f"SELECT {', '.join([name, 'count(*)', *asked])} FROM {NUMBERED_ROWS} "
        f"WHERE {name} IS NOT NULL GROUP BY {name} ORDER BY min(file_row_number) LIMIT {MAX_VALUES}",
        [exactly(path)],
    ).fetchall()


def places_in(text: str, built: HookedModel) -> list[str]:
    """Hook points, blocks ("vlm.blocks.3") and pathways that a text names.

    Understood: names of hook points, a block's name, "vlm L3" and "vlm L3H2", what `choose_sites` takes ("vlm:middle",
    "expert.attn_out:all", "prefix_kv"), and a pathway by itself.
    """
    points, found = built.points, dict[str, None]()
    ways = {hook_names.pathway(name) for name in points}
    for name in _DOTTED.findall(text):
        if name in points or any(point.startswith(f"{name}.") for point in points):
            found[name] = None
    for way, layer in _LAYER.findall(text):
        block = f"{way}.blocks.{layer}"
        if any(point.startswith(f"{block}.") for point in points):
            found[block] = None
    for choice in [*_CHOICE.findall(text), *(["prefix_kv"] if "prefix_kv" in text else [])]:
        # a text that only looks like a choice
        try:
            sites = choose_sites(built, choice)
        except ValueError:
            continue
        found |= dict.fromkeys(sites)
    if not found:
        found |= dict.fromkeys(word for word in re.findall(r"[a-z_]+", text) if word in ways and text.endswith(word))
    return list(found)
