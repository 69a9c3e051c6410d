"""Success over how many features are ablated, over how much of a token they are, and how far episodes get without the
features of a concept.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, heat_map, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.experiments.kinds.concepts_arms import ALL, FREQUENT, RANDOM, TARGETED, Ablation, short
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

_LABELS = {TARGETED: "features that tell concepts", FREQUENT: "the most frequent", RANDOM: "random, alive"}
SUCCESS = "success"


def phases_reached(rollouts: Rollouts, arms: Sequence[tuple[str, Ablation]]) -> pd.DataFrame:
    """Share of the episodes that are ever in each phase, and that succeed: one row for each arm of a concept, its
    control, and the baseline. Phases are in the order in which the baseline's episodes come to them.

    Raises ValueError for rollouts that kept nothing.
    """
    if rollouts.folder is None:
        raise ValueError("these rollouts were not kept: run them with a folder")
    episodes = rollouts.episodes.to_pandas()
    steps = read_steps(rollouts.folder).select(["episode", "env_step", "phase"]).to_pandas().dropna()
    base = steps[steps["episode"].isin(episodes[episodes["arm"] == BASELINE.name]["episode"])]
    first = base.groupby(["episode", "phase"])["env_step"].min().groupby("phase").mean().sort_values()
    been = {(int(a), str(b)) for a, b in steps[["episode", "phase"]].drop_duplicates().itertuples(index=False)}
    rows = []
    for name, what in [(BASELINE.name, None), *arms]:
        mine = episodes[episodes["arm"] == name]
        row: dict[str, Any] = {"arm": name, "site": what.site if what else "", "concept": what.set if what else ""}
        numbers = [int(each) for each in mine["episode"]]
        row |= {phase: float(np.mean([(each, phase) in been for each in numbers])) for phase in map(str, first.index)}
        rows.append(row | {SUCCESS: float(mine["success"].mean())})
    return pd.DataFrame(rows)


def figures(table: pd.DataFrame, phases: pd.DataFrame) -> dict[str, tuple[Figure, str]]:
    """By name, each with its caption."""
    found = {
        "titration": (
            _curves(table, "n_features", "features ablated"),
            "Success without n features of the autoencoder, in the order of how well they tell concepts, of how "
            "frequent they are, and at random (mean over draws); bars: Wilson's 95 % intervals; dashed: none ablated; "
            "dotted: all that are ever active.",
        ),
        "amount": (
            _curves(table, "taken_away", "share of a token's length that is taken away"),
            "The same over how much of a token the ablated features are. Orders that lie on one curve differ in amount "
            "alone.",
        ),
    }
    if len(phases) > 1:
        names = [name for name in phases.columns if name not in ("arm", "site", "concept")]
        long = phases.melt(id_vars=["arm"], value_vars=names, var_name="phase", value_name="share")
        found["phases"] = (
            heat_map(long, "arm", "phase", "share", "Episodes that get there", limits=(0.0, 1.0), form=".2f"),
            "Share of the episodes that are ever in each phase, and that succeed, without a concept's features, and "
            "without as many of the same frequency that do not tell it (matched).",
        )
    return found


def _curves(table: pd.DataFrame, x: str, label: str) -> Figure:
    rows = records(table)
    sites = list(dict.fromkeys(row["site"] for row in rows if row["kind"] == FREQUENT))
    base = next(row["success"] for row in rows if row["kind"] == BASELINE.name)
    none_left = {row["site"]: row["success"] for row in rows if row["kind"] == ALL}
    figure = new_figure(1.0 + 4.4 * len(sites), 4.0)
    for axes, site in zip(figure.subplots(1, len(sites), squeeze=False, sharey=True)[0], sites, strict=True):
        for i, kind in enumerate(_LABELS):
            mine = [row for row in rows if (row["site"], row["kind"]) == (site, kind)]
            if mine:
                _draw(axes, mine, x, i, _LABELS[kind])
        axes.axhline(base, color="#555555", linestyle="--", linewidth=1)
        axes.axhline(none_left[site], color="#555555", linestyle=":", linewidth=1)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set_title(short(site), fontsize=10)
        axes.set_xlabel(label, fontsize=9)
        axes.grid(axis="y", color="#E5E5E5", linewidth=0.7)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    first = figure.axes[0]
    first.set_ylabel("success", fontsize=9)
    figure.legend(*first.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return figure


def _draw(axes: Axes, rows: Sequence[dict[str, Any]], x: str, number: int, label: str) -> None:
    """Points with intervals, and a line through their means at each number of features."""
    offset = 0.97 + 0.03 * number
    places = np.array([row[x] for row in rows], float) * (offset if x == "n_features" else 1.0)
    success = np.array([row["success"] for row in rows])
    spread = np.abs(np.stack([success - [row["success_low"] for row in rows],
                              [row["success_high"] for row in rows] - success]))  # fmt: skip
    axes.errorbar(places, success, yerr=spread, fmt=MARKERS[number], color=COLOURS[number], markersize=4,
                  elinewidth=0.8, alpha=0.6)  # fmt: skip
    n = np.array([row["n_features"] for row in rows])
    means = np.array([[places[n == each].mean(), success[n == each].mean()] for each in np.unique(n)])
    axes.plot(means[:, 0], means[:, 1], color=COLOURS[number], marker=MARKERS[number], markersize=5, label=label)
