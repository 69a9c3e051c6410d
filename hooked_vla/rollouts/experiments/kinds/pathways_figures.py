"""Figures of the comparison of pathways."""

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.pathways_arms import DONOR, NOISE, RANDOM

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
    """Expert ÷ the other pathway, by what displacement is counted per, a bar for each condition."""
    figure = new_figure(7.6, 3.6)
    axes = figure.subplots()
    by = {(row["condition"], row["per"]): row["ratio"] for row in records(gaps)}
    conditions = [each for each in (DONOR, RANDOM, NOISE) if any(key[0] == each for key in by)]
    for i, condition in enumerate(conditions):
        places = np.arange(len(PER)) + (i - (len(conditions) - 1) / 2) * 0.26
        heights = [by[condition, per] for per in PER]
        axes.bar(places, heights, width=0.24, color=COLOURS[i], label=condition)
        for place, height in zip(places, heights, strict=True):
            axes.annotate(f"{height:.2g}", (place, height), ha="center", va="bottom", fontsize=8)
    axes.axhline(1.0, color="#555555", linestyle="--", linewidth=1)
    axes.set_yscale("log")
    axes.margins(y=0.15)
    axes.set_xticks(range(len(PER)), list(PER.values()), fontsize=9)
    axes.set_ylabel(f"expert ÷ {other}", fontsize=9)
    axes.set_title("Displacement in closed loop", fontsize=11)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


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
