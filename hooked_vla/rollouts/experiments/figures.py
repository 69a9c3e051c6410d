"""Figures of tables of results: bars, heat maps and curves, always with their intervals where the table has them.

Colours are Okabe and Ito's (2008, "Color universal design"), which colour-blind readers tell apart; heat maps use
viridis, or a blue-white-red map around a centre. Figures are made without pyplot, so no window and no global state is
involved.
"""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import Normalize, TwoSlopeNorm
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

# checks of types at run time tell whole numbers from others
Number = float | int

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_GREY = "#555555"
# cells with more text than this have no room for it
_MOST_CELLS = 400


def new_figure(width: Number, height: Number) -> Figure:
    """An empty figure; width and height in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def success_bars(
    table: pd.DataFrame, label: str = "arm", group: str | None = "suite", title: str = "", reference: str | None = None
) -> Figure:
    """Success of every row as a horizontal bar with its interval; one panel for each value of `group`.

    table: columns `label`, success, success_low, success_high (as `compare` and `by_task` make them), and n.
    reference: the label whose success is drawn as a line through its panel.
    Raises KeyError for columns that the table lacks.
    """
    _require(table, [label, "success", "success_low", "success_high", "n", *([group] if group else [])])
    parts = [("", table)] if group is None else [(str(name), part) for name, part in table.groupby(group, sort=False)]
    longest = max(len(part) for _, part in parts)
    figure = new_figure(1.2 + 4.2 * len(parts), 1.3 + 0.27 * longest)
    panels = figure.subplots(1, len(parts), squeeze=False, sharex=True)[0]
    for number, (axes, (name, part)) in enumerate(zip(panels, parts, strict=True)):
        names, places = [str(each) for each in part[label]], np.arange(len(part))
        success = part["success"].to_numpy(float)
        spread = np.abs(np.stack([success - part["success_low"], part["success_high"] - success]))
        axes.barh(places, success, color=COLOURS[number % len(COLOURS)], height=0.7)
        axes.errorbar(success, places, xerr=spread, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        if reference in names:
            axes.axvline(success[names.index(reference)], color=_GREY, linestyle="--", linewidth=1)
        axes.set_yticks(places, names, fontsize=9)
        axes.set_ylim(len(part) - 0.4, -0.6)
        axes.set_xlim(0, 1.02)
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        n = sorted({int(each) for each in part["n"]})
        axes.set_title(f"{name}  (n = {'-'.join(map(str, dict.fromkeys((n[0], n[-1]))))})".strip(), fontsize=10)
        axes.set_xlabel("success, 95 % interval", fontsize=9)
        _plain(axes)
    if title:
        figure.suptitle(title, fontsize=11)
    return figure


def heat_map(
    table: pd.DataFrame,
    rows: str,
    columns: str,
    value: str,
    title: str = "",
    unit: str = "",
    centre: Number | None = None,
    limits: tuple[Number, Number] | None = None,
    form: str = ".2g",
) -> Figure:
    """The column `value` by two others, in the order of the table; what was not measured is hatched.

    centre: the value that is drawn white, between blue and red; None: viridis. limits: ends of the colours, else the
    smallest and largest value. form: of the numbers in the cells, "" for none.
    Raises KeyError for columns that the table lacks, ValueError for a pair of row and column that comes twice.
    """
    _require(table, [rows, columns, value])
    if table.duplicated([rows, columns]).any():
        first = table[table.duplicated([rows, columns])].iloc[0]
        raise ValueError(f"{rows} {first[rows]} and {columns} {first[columns]} come together more than once")
    y, x = list(dict.fromkeys(table[rows])), list(dict.fromkeys(table[columns]))
    grid = np.full((len(y), len(x)), np.nan)
    for row, column, number in zip(table[rows], table[columns], table[value], strict=True):
        grid[y.index(row), x.index(column)] = np.nan if pd.isna(number) else float(number)
    figure = new_figure(2.6 + 0.5 * len(x), 1.7 + 0.36 * len(y))
    axes = figure.subplots()
    norm = _norm(grid, centre, limits)
    axes.set_facecolor("white")
    axes.patch.set(hatch="///", edgecolor="#BBBBBB")
    drawn = axes.imshow(grid, aspect="auto", cmap="viridis" if centre is None else "RdBu_r", norm=norm)
    if form and grid.size <= _MOST_CELLS:
        _write_cells(axes, grid, form, drawn)
    axes.set_xticks(
        range(len(x)), [str(each) for each in x], rotation=45, ha="right", rotation_mode="anchor", fontsize=8
    )
    axes.set_yticks(range(len(y)), [str(each) for each in y], fontsize=8)
    axes.set_xlabel(columns.replace("_", " "), fontsize=9)
    axes.set_ylabel(rows.replace("_", " "), fontsize=9)
    figure.colorbar(drawn, ax=axes).set_label(unit or value.replace("_", " "), fontsize=9)
    if title:
        axes.set_title(title, fontsize=11)
    return figure


def curve(
    table: pd.DataFrame,
    x: str,
    y: str,
    group: str | None = None,
    low: str | None = None,
    high: str | None = None,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    floor: Number | None = None,
    floor_label: str = "rerun floor",
    log_x: bool = False,
) -> Figure:
    """`y` over `x`, one line for each value of `group`, with a band from column `low` to column `high`.

    floor: a horizontal line under everything, such as the rerun's displacement. Lines differ by colour and marker.
    Raises KeyError for columns that the table lacks.
    """
    _require(table, [each for each in (x, y, group, low, high) if each is not None])
    figure = new_figure(6.4, 4.0)
    axes = figure.subplots()
    parts = [("", table)] if group is None else [(str(name), part) for name, part in table.groupby(group, sort=False)]
    numeric = pd.api.types.is_numeric_dtype(table[x])
    ticks = list(dict.fromkeys(table[x]))
    for i, (name, part) in enumerate(parts):
        part = part.sort_values(x) if numeric else part
        places = part[x].to_numpy(float) if numeric else np.array([ticks.index(each) for each in part[x]], float)
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(places, part[y].to_numpy(float), color=colour, marker=MARKERS[i % len(MARKERS)], markersize=5,
                  linewidth=1.5, label=name)  # fmt: skip
        if low is not None and high is not None:
            axes.fill_between(places, part[low].to_numpy(float), part[high].to_numpy(float), color=colour, alpha=0.18,
                              linewidth=0)  # fmt: skip
    if floor is not None:
        axes.axhline(floor, color=_GREY, linestyle=":", linewidth=1.2, label=floor_label)
    if not numeric:
        axes.set_xticks(range(len(ticks)), [str(each) for each in ticks], rotation=45, ha="right", fontsize=8)
    if log_x:
        axes.set_xscale("log")
    axes.set_xlabel(xlabel or x.replace("_", " "), fontsize=9)
    axes.set_ylabel(ylabel or y.replace("_", " "), fontsize=9)
    if group is not None or floor is not None:
        axes.legend(fontsize=8, frameon=False, loc="best")
    if title:
        axes.set_title(title, fontsize=11)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    _plain(axes)
    return figure


def _write_cells(axes: Axes, grid: np.ndarray, form: str, drawn: Any) -> None:
    """Each cell's number, black on light colours and white on dark ones."""
    for (row, column), number in np.ndenumerate(grid):
        if isfinite(number):
            red, green, blue, _ = drawn.to_rgba(number)
            # relative luminance, ITU-R BT.709
            light = 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5
            axes.text(column, row, format(number, form), ha="center", va="center", fontsize=7,
                      color="black" if light else "white")  # fmt: skip


def _norm(grid: np.ndarray, centre: Number | None, limits: tuple[Number, Number] | None) -> Normalize:
    finite = grid[np.isfinite(grid)]
    low, high = limits or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    if centre is None:
        return Normalize(low, high)
    # the same colour means the same distance from the centre on both sides
    reach = max(high - centre, centre - low, 1e-12)
    return TwoSlopeNorm(centre, centre - reach, centre + reach)


def _require(table: pd.DataFrame, columns: Sequence[str]) -> None:
    if missing := [each for each in columns if each not in table.columns]:
        raise KeyError(f"the table has no columns {missing}; it has {list(table.columns)}")
    if not len(table):
        raise ValueError("the table has no rows: nothing to draw")


def _plain(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
