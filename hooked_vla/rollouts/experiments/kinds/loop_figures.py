"""Figures of autoencoders in the loop: what is left of success, and what the explained variance says of it."""

from typing import Any

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure, success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import records

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure


def loop_figures(table: pd.DataFrame, baseline: str) -> dict[str, tuple[Figure, str]]:
    """Success of every arm by site, and success against explained variance."""
    return {
        "success": (
            success_bars(_by_site(table, baseline), "way", "site", "Success with an autoencoder in the loop", baseline),
            "Success with the autoencoder of one site in the loop, by how it is put there; noise has the size of the "
            "error at every token. The dashed line is the unedited policy.",
        ),
        "explained": (
            _explained(table),
            "Success over the unedited policy's against the explained variance of tokens, one point an arm: if that "
            "told what is kept of the behaviour, points would lie on one line. At the left edge: none, or less.",
        ),
    }  # fmt: skip


def _by_site(table: pd.DataFrame, baseline: str) -> pd.DataFrame:
    """Each site's rows, the unedited policy's first."""
    rows = records(table)
    [base] = [row for row in rows if row["arm"] == baseline]
    sites = dict.fromkeys(row["site"] for row in rows if row["site"])
    found: list[dict[str, Any]] = []
    for site in sites:
        found += [{**base, "site": site}, *(row for row in rows if row["site"] == site)]
    return pd.DataFrame(found)


def _explained(table: pd.DataFrame) -> Figure:
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    rows = [row for row in records(table) if row["site"]]
    for number, site in enumerate(dict.fromkeys(row["site"] for row in rows)):
        for noise in (False, True):
            mine = [row for row in rows if row["site"] == site and bool(row["noise"]) == noise]
            axes.scatter(
                [max(0.0, row["explained_variance"]) for row in mine], [row["ratio"] for row in mine], s=34,
                marker=MARKERS[number], color=COLOURS[number], facecolors="none" if noise else COLOURS[number],
                label=f"{site}{', noise' if noise else ''}",
            )  # fmt: skip
    axes.set_xlabel("explained variance of tokens", fontsize=9)
    axes.set_ylabel("success ÷ unedited success", fontsize=9)
    axes.set_ylim(-0.05, 1.15)
    axes.grid(color="#E5E5E5", linewidth=0.7)
    axes.legend(fontsize=7, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure
