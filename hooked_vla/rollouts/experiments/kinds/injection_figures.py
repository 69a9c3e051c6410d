"""Figures of the experiments on injection."""

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure


def endpoint_figure(table: pd.DataFrame, title: str, columns: int = 4) -> Figure:
    """Distances of every episode's end from the source's end and from its own without injection, a panel for each arm.

    table: as `override` makes it.
    Raises ValueError for no rows.
    """
    rows = records(table)
    if not rows:
        raise ValueError("the table has no rows: nothing to draw")
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    height = -(-len(arms) // columns)
    figure = new_figure(2.4 * min(columns, len(arms)), 2.3 * height + 0.4)
    panels = figure.subplots(height, min(columns, len(arms)), squeeze=False, sharex=True, sharey=True).ravel()
    far = max(max(row["to_source"], row["to_destination"]) for row in rows) * 1.05 or 1.0
    for i, (axes, arm) in enumerate(zip(panels, arms, strict=False)):
        mine = [row for row in rows if row["arm"] == arm]
        axes.plot([0, far], [0, far], color="#BBBBBB", linewidth=1)
        own, source = ([row[name] for row in mine] for name in ("to_destination", "to_source"))
        look = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
        axes.plot(own, source, linestyle="none", markersize=4, alpha=0.7, **look)
        axes.set_title(arm, fontsize=8)
        axes.set_xlim(-0.01, far)
        axes.set_ylim(-0.01, far)
        axes.set_aspect("equal")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    figure.supxlabel("distance from the own end, m", fontsize=9)
    figure.supylabel("distance from the source's end, m", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure
