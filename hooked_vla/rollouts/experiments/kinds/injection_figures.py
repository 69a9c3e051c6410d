"""Figures of the experiments on injection."""

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.matched_noise import PREFIX

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# checks of types at run time tell whole numbers from others
Number = float | int
# how wide the marks of one place lie apart, as part of the distance between places
_SPREAD = 0.36


def endpoint_figure(table: pd.DataFrame, title: str, columns: int = 6) -> Figure:
    """Distances of every episode's end from the source's end and from its own without injection, a panel for each arm,
    noise as large in grey in the panel of what it stands in for.

    table: as `override` makes it.
    Raises ValueError for no rows.
    """
    rows = records(table)
    if not rows:
        raise ValueError("the table has no rows: nothing to draw")
    there = list(dict.fromkeys(row["arm"] for row in rows))
    arms = [arm for arm in there if arm.removeprefix(PREFIX) == arm or arm.removeprefix(PREFIX) not in there]
    height = -(-len(arms) // columns)
    figure = new_figure(2.4 * min(columns, len(arms)), 2.3 * height + 0.4)
    panels = figure.subplots(height, min(columns, len(arms)), squeeze=False, sharex=True, sharey=True).ravel()
    far = max(max(row["to_source"], row["to_destination"]) for row in rows) * 1.05 or 1.0
    for i, (axes, arm) in enumerate(zip(panels, arms, strict=False)):
        axes.plot([0, far], [0, far], color="#BBBBBB", linewidth=1)
        look = {"marker": MARKERS[i % len(MARKERS)], "color": COLOURS[i % len(COLOURS)]}
        for name, style in ((PREFIX + arm, {"marker": "x", "color": "#999999"}), (arm, look)):
            mine = [row for row in rows if row["arm"] == name]
            own, source = ([row[column] for row in mine] for column in ("to_destination", "to_source"))
            axes.plot(own, source, linestyle="none", markersize=4, alpha=0.7, **style)
        axes.set_title(arm, fontsize=8)
        axes.set_xlim(-0.01, far)
        axes.set_ylim(-0.01, far)
        axes.set_aspect("equal")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    for axes in panels[max(0, len(arms) - columns) : len(arms)]:
        # below some of them there is no panel
        axes.tick_params(labelbottom=True)
    for axes in panels[len(arms) :]:
        axes.set_visible(False)
    figure.supxlabel("distance from the own end, m", fontsize=9)
    figure.supylabel("distance from the source's end, m", fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def dodged(
    table: pd.DataFrame, x: str, y: str, group: str, low: str, high: str, title: str = "", xlabel: str = "",
    ylabel: str = "", floor: Number | None = None, floor_label: str = "",
) -> Figure:  # fmt: skip
    """`y` over the places of `x`, with intervals from column `low` to column `high`; series lie side by side, so that
    none hides another. floor: a horizontal line under everything.

    Raises ValueError for no rows.
    """
    ticks = list(dict.fromkeys(row[x] for row in records(table)))
    figure = new_figure(max(6.4, 1.6 + 0.6 * len(ticks)), 4.0)
    axes = figure.subplots()
    draw_dodged(axes, table, x, y, group, low, high)
    if floor is not None:
        axes.axhline(floor, color="#555555", linestyle=":", linewidth=1.2, label=floor_label)
    axes.set_xlabel(xlabel or x, fontsize=9)
    axes.set_ylabel(ylabel or y, fontsize=9)
    axes.set_title(title, fontsize=11)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def draw_dodged(axes: Axes, table: pd.DataFrame, x: str, y: str, group: str, low: str, high: str) -> None:
    """The marks of `dodged`, in axes that are there. Raises ValueError for no rows."""
    rows = records(table)
    if not rows:
        raise ValueError("the table has no rows: nothing to draw")
    ticks, names = (list(dict.fromkeys(row[column] for row in rows)) for column in (x, group))
    for i, name in enumerate(names):
        mine = [row for row in rows if row[group] == name]
        places = [ticks.index(row[x]) + _SPREAD * ((i + 0.5) / len(names) - 0.5) for row in mine]
        at, ends = (np.array([[row[each] for row in mine] for each in columns], float)
                    for columns in ((y,), (low, high)))  # fmt: skip
        axes.errorbar(
            places, at[0], yerr=np.nan_to_num(np.abs(ends - at)), label=name, color=COLOURS[i % len(COLOURS)],
            marker=MARKERS[i % len(MARKERS)], markersize=5, linewidth=0.8, elinewidth=1.2, capsize=2,
        )  # fmt: skip
    turned = {"rotation": 45, "ha": "right"} if max(len(str(tick)) for tick in ticks) > 8 else {}
    axes.set_xticks(range(len(ticks)), [str(tick) for tick in ticks], fontsize=8, **turned)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    axes.spines[["top", "right"]].set_visible(False)
