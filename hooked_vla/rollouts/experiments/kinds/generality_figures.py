"""The share of memorised features over the number of tasks, and P(general) over frequency."""

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.concepts_arms import short

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter


def figures(table: pd.DataFrame, features: pd.DataFrame, most: int) -> dict[str, tuple[Figure, str]]:
    """By name, each with its caption. most: the largest number of tasks."""
    return {
        "memorised": (
            _shares(table),
            "Share of the features that the metric calls memorised, by the number of tasks that the autoencoder has "
            "seen, at equal frames; dashed: where steps are shuffled over all episodes. Bands: 95 % intervals over "
            "draws.",
        ),
        "frequency": (
            _scatter(features, most),
            "P(general) of every feature over how often it is active, on the autoencoder's own episodes (first draw); "
            "hollow: mean where steps are shuffled. Features above the line are called general.",
        ),
    }


def _shares(table: pd.DataFrame) -> Figure:
    rows = records(table)
    sites, numbers = list(dict.fromkeys(row["site"] for row in rows)), sorted({row["tasks"] for row in rows})
    figure = new_figure(1.0 + 4.2 * len(sites), 4.0)
    for axes, site in zip(figure.subplots(1, len(sites), squeeze=False, sharey=True)[0], sites, strict=True):
        for i, judged in enumerate(dict.fromkeys(row["judged_on"] for row in rows)):
            mine = [row for row in rows if (row["site"], row["judged_on"]) == (site, judged)]
            x = [row["tasks"] for row in mine]
            for name, style, label in (("memorised", "-", judged), ("memorised_null", "--", f"{judged}, shuffled")):
                y, low, high = ([row[f"{name}{end}"] for row in mine] for end in ("", "_low", "_high"))
                axes.plot(x, y, style, color=COLOURS[i], marker=MARKERS[i], markersize=4, label=label)
                axes.fill_between(x, low, high, color=COLOURS[i], alpha=0.15, linewidth=0)
        axes.set_xscale("log")
        axes.set_xticks(numbers, [str(each) for each in numbers])
        axes.minorticks_off()
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(short(site), fontsize=10)
        axes.set_xlabel("tasks", fontsize=9)
        _plain(axes)
    first = figure.axes[0]
    first.set_ylabel("memorised features", fontsize=9)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def _scatter(features: pd.DataFrame, most: int) -> Figure:
    rows = records(features)
    sites = list(dict.fromkeys(row["site"] for row in rows))
    figure = new_figure(1.0 + 4.2 * len(sites), 4.0)
    for axes, site in zip(figure.subplots(1, len(sites), squeeze=False, sharey=True)[0], sites, strict=True):
        mine = [row for row in rows if row["site"] == site]
        for i, n in enumerate(sorted({row["tasks"] for row in mine})):
            part = [row for row in mine if row["tasks"] == n]
            x = np.array([row["frequency"] for row in part])
            colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
            label = f"{n} task{'s' if n > 1 else ''}{' (all)' if n == most else ''}"
            axes.scatter(x, [row["general"] for row in part], s=14, color=colour, marker=marker, label=label)
            axes.scatter(x, [row["general_null"] for row in part], s=14, facecolors="none", edgecolors=colour,
                         marker=marker, linewidths=0.6)  # fmt: skip
        axes.axhline(0.5, color="#555555", linestyle=":", linewidth=1.2)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_title(short(site), fontsize=10)
        axes.set_xlabel("share of the frames in which it is active", fontsize=9)
        _plain(axes)
    figure.axes[0].set_ylabel("P(general)", fontsize=9)
    figure.axes[0].legend(fontsize=8, frameon=False, loc="best")
    return figure


def _plain(axes: Axes) -> None:
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
