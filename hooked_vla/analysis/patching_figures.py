"""Figures of patching sweeps: for paper (matplotlib), and for notebooks (plotly)."""

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.notebook import needs_plotly

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

# with more cells than that, numbers in them cannot be read
_NUMBERED = 240
DEAD_END, REPLAY = "∅", "†"


def site_label(site: str) -> str:
    """A site in few words: pathway, block, point."""
    leaf = hook_names.leaf(site)
    return f"{site.removesuffix(f'.{leaf}').replace('.blocks.', ' ')} {leaf.removeprefix('hook_')}"


class _Grid(NamedTuple):
    """Sites × columns. values: means, NaN where nothing was measured; counts: of what; marks: by site and column;
    limit: the largest number, whatever its sign."""

    sites: Sequence[str]
    across: Sequence[str]
    values: Float[np.ndarray, "site column"]
    counts: dict[tuple[str, str], int]
    marks: dict[tuple[str, str], str]
    limit: float


def _grid(table: pd.DataFrame, columns: str, value: str) -> _Grid:
    if unknown := sorted({columns, value} - set(table)):
        raise ValueError(f"the table has no columns {unknown}; it has {list(table)}")
    numbers, marks = _cells(table, columns, value)
    sites, across = (list(dict.fromkeys(key[i] for key in numbers)) for i in (0, 1))
    grid = np.full((len(sites), len(across)), np.nan)
    for (site, column), found in numbers.items():
        grid[sites.index(site), across.index(column)] = np.mean(found)
    counts = {key: len(found) for key, found in numbers.items()}
    return _Grid(sites, across, grid, counts, marks, max(float(np.nanmax(np.abs(grid))), 1e-12))


def heatmap(table: pd.DataFrame, columns: str, value: str, title: str) -> "PlotlyFigure":
    """`draw` for notebooks: pointing at a cell tells its site, its numbers, and what cannot show anything."""
    found = _grid(table, columns, value)
    with needs_plotly():
        from plotly import graph_objects
    said = {"": "", DEAD_END: "<br>dead end", REPLAY: "<br>replay", DEAD_END + REPLAY: "<br>dead end, replay"}
    text = [
        [f"{html.escape(site)}<br>{html.escape(column)}{said[found.marks.get((site, column), '')]}"
         f"<br>mean of {found.counts.get((site, column), 0)}" for column in found.across]
        for site in found.sites
    ]  # fmt: skip
    figure = graph_objects.Figure(graph_objects.Heatmap(
        z=found.values, text=text, colorscale="PuOr", zmid=0, zmin=-found.limit, zmax=found.limit,
        colorbar={"title": html.escape(value)}, hovertemplate="%{text}<br>%{z:.3g}<extra></extra>", hoverongaps=False,
    ))  # fmt: skip
    marked = [(i, j, mark) for i, site in enumerate(found.sites) for j, column in enumerate(found.across)
              if (mark := found.marks.get((site, column), ""))]  # fmt: skip
    for i, j, mark in marked:
        dark = abs(found.values[i, j]) > 0.6 * found.limit
        figure.add_annotation(x=j, y=i, text=mark, showarrow=False, font={"color": "white" if dark else "black"})
    figure.update_layout(
        title={"text": html.escape(title)}, height=140 + 22 * len(found.sites),
        xaxis={"title": columns.replace("_", " "), "tickvals": list(range(len(found.across))),
               "ticktext": [html.escape(each) for each in found.across]},
        yaxis={"tickvals": list(range(len(found.sites))), "autorange": "reversed", "automargin": True,
               "ticktext": [html.escape(site_label(each)) for each in found.sites]},
    )  # fmt: skip
    return figure


def draw(table: pd.DataFrame, columns: str, value: str, title: str) -> Figure:
    """Sites in the order of the table × the values of `columns`, the mean of `value` as colour and number.

    Dead ends are marked ∅, replay †. Raises ValueError for a column that the table does not have.
    """
    sites, across, grid, _, marks, limit = _grid(table, columns, value)
    figure = Figure(figsize=(2.8 + 0.85 * len(across), 1.2 + 0.24 * len(sites)), layout="constrained")
    axes = figure.subplots()
    # orange and purple can be told apart with any colour vision
    image = axes.imshow(grid, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_xticks(range(len(across)), across, rotation=30, ha="right")
    axes.set_yticks(range(len(sites)), [site_label(site) for site in sites], fontsize=8)
    axes.set_xlabel(columns.replace("_", " "))
    for (site, column), mark in marks.items() if grid.size <= _NUMBERED else ():
        i, j = sites.index(site), across.index(column)
        color = "white" if abs(grid[i, j]) > 0.6 * limit else "black"
        axes.text(j, i, f"{grid[i, j]:.2f}{mark}", ha="center", va="center", fontsize=7, color=color)
    figure.colorbar(image, ax=axes, label=value)
    shown = "".join(marks.values())
    legend = [f"{mark} {said}" for mark, said in ((DEAD_END, "dead end"), (REPLAY, "replay")) if mark in shown]
    axes.set_title("\n".join(filter(None, [title, ", ".join(legend)])), fontsize=9)
    return figure


def _cells(
    table: pd.DataFrame, columns: str, value: str
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], str]]:
    """(site, column) -> the numbers there, and marks where they cannot show anything."""
    numbers: dict[tuple[str, str], list[float]] = {}
    marks: dict[tuple[str, str], str] = {}
    for row in table.to_dict("records"):
        key = str(row["site"]), "all" if pd.isna(row[columns]) else str(row[columns])
        numbers.setdefault(key, []).append(float(row[value]))
        dead, replay = not row.get("reaches_action", True), bool(row.get("replay", ""))
        marks[key] = DEAD_END * dead + REPLAY * replay
    return numbers, marks
