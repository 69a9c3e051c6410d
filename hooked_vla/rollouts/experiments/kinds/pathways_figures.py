"""Figures of the comparison of pathways."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.pathways_arms import CONDITIONS, DONOR, NOISE, RANDOM

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure

PER = {
    "displacement": "raw",
    "per_change": "per unit of ‖Δh‖",
    "per_change_and_call": "per unit of ‖Δh‖ and call",
    "per_relative_and_call": "per ‖Δh‖/‖h‖ and call",
}


def ratios(gaps: pd.DataFrame, other: str) -> Figure:
    """Expert ÷ the other pathway, by what displacement is counted per: a point with its interval for each condition,
    on a logarithmic axis on which one half is as far from 1 as twice."""
    figure = new_figure(8.2, 4.0)
    axes = figure.subplots()
    by = {(row["condition"], row["per"]): row for row in records(gaps)}
    conditions = [each for each in CONDITIONS if any(key[0] == each for key in by)]
    for i, condition in enumerate(conditions):
        places = np.arange(len(PER)) + (i - (len(conditions) - 1) / 2) * 0.19
        rows = [by[condition, per] for per in PER]
        ratio = np.array([row["ratio"] for row in rows])
        spread = np.abs([[row[end] for row in rows] for end in ("low", "high")] - ratio)
        axes.errorbar(places, ratio, yerr=np.nan_to_num(spread), fmt=MARKERS[i], color=COLOURS[i], capsize=3,
                      markersize=6, label=condition)  # fmt: skip
        for place, row in zip(places, rows, strict=True):
            axes.annotate(f"{row['ratio']:.2g}", (place, row["ratio"]), xytext=(5, 5), textcoords="offset points",
                          va="center", fontsize=7)  # fmt: skip
    axes.axhline(1.0, color="#555555", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    reach = 1.3 * max(max(high, 1 / low) for low, high in _ends(by.values()))
    axes.set_ylim(1 / reach, reach)
    axes.yaxis.set_major_formatter(lambda ratio, _: f"{ratio:g}")
    axes.set_xticks(range(len(PER)), list(PER.values()), fontsize=9)
    axes.set_ylabel(f"expert ÷ {other}, 95 % interval", fontsize=9)
    axes.set_title("Displacement in closed loop", fontsize=11)
    axes.legend(fontsize=8, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _ends(rows: Iterable[dict[str, Any]]) -> list[tuple[float, float]]:
    """Where each ratio's interval ends; where it has none, the ratio itself."""
    return [(np.nanmin([row["low"], row["ratio"]]), np.nanmax([row["high"], row["ratio"]])) for row in rows]


def by_distance(chunks: pd.DataFrame) -> Figure:
    """Displacement of first chunks over the blocks behind the site: raw with intervals, and per unit and call."""
    figure = new_figure(9.0, 4.2)
    panels = figure.subplots(1, 2)
    ways = list(dict.fromkeys(chunks["pathway"]))
    for i, way in enumerate(ways):
        for j, condition in enumerate((DONOR, RANDOM, NOISE)):
            rows = [row for row in records(chunks) if (row["pathway"], row["condition"]) == (way, condition)]
            rows.sort(key=lambda row: row["blocks_after"])
            x = [row["blocks_after"] for row in rows]
            moved = np.array([row["displacement"] for row in rows]) * 1000
            spread = np.abs([[row[end] * 1000 for row in rows] for end in ("low", "high")] - moved)
            style = {"color": COLOURS[i], "marker": MARKERS[j], "linestyle": ("-", "--", ":")[j], "markersize": 5}
            panels[0].errorbar(x, moved, yerr=np.nan_to_num(spread), capsize=2, label=f"{way}, {condition}", **style)
            counted = [row["displacement"] * 1000 / max(row["change"] * row["calls"], 1e-12) for row in rows]
            panels[1].plot(x, counted, **style)
    for axes, title in zip(panels, ("raw, mm", "per unit of ‖Δh‖ and call, mm"), strict=True):
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("blocks behind the site", fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("displacement of the first chunk", fontsize=9)
    panels[1].set_yscale("log")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return figure
