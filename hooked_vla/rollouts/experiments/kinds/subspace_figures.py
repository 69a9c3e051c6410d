"""Figures of subspace injection: what episodes did under every arm, and the whole patch at every site."""

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, curve, heat_map, new_figure

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

_SAID = {"switched": "donor's goal done", "own": "told goal done", "lifted": "some block lifted"}


def what_was_done(table: pd.DataFrame) -> Figure:
    """Shares of episodes by arm, with their intervals. table: arm, and for each share its low and high."""
    places = np.arange(len(table))
    figure = new_figure(7.2, 1.4 + 0.46 * len(table))
    axes = figure.subplots()
    for number, (column, said) in enumerate(_SAID.items()):
        values = table[column].to_numpy(float)
        spread = np.abs(np.stack([values - table[f"{column}_low"], table[f"{column}_high"] - values]))
        at = places + 0.26 * (number - 1)
        axes.barh(at, values, height=0.24, color=COLOURS[number], label=said)
        axes.errorbar(values, at, xerr=spread, fmt="none", ecolor="black", elinewidth=0.8, capsize=1.5)
    axes.set_yticks(places, [str(each) for each in table["arm"]], fontsize=9)
    axes.set_ylim(len(table) - 0.4, -0.6)
    axes.set_xlim(0, 1.02)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel(f"share of episodes (n = {max(table['n'])}), 95 % interval", fontsize=9)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def effects(table: pd.DataFrame, full: float, site: str) -> Figure:
    """The curve of effects over dimensions by method."""
    return curve(
        table, "k", "effect", "method", "low", "high", title=f"swaps at {site}", xlabel="dimensions",
        ylabel="way to the other goal's actions", floor=full, floor_label="all dimensions",
    )  # fmt: skip


def site_map(sites: pd.DataFrame) -> Figure:
    """Recovery of the whole patch by site and segment."""
    return heat_map(sites, "site", "tokens", "recovery", unit="way to the other goal's actions", limits=(0, 1))
