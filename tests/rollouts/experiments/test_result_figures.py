"""Figures show the table that they are given: bars, intervals, cells and points stand where its numbers say."""

import io

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from hooked_vla.rollouts.experiments.figures import curve, heat_map, success_bars
from hooked_vla.rollouts.experiments.kinds.injection_figures import endpoint_figure


def drawn(figure: Figure) -> np.ndarray:
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=50)
    return np.asarray(Image.open(sink).convert("RGB"))


def results() -> pd.DataFrame:
    rows = [("goal", "baseline", 36, 1.0, 0.9, 1.0), ("goal", "null", 36, 0.25, 0.14, 0.41),
            ("object", "baseline", 30, 0.5, 0.33, 0.67)]  # fmt: skip
    return pd.DataFrame(rows, columns=["suite", "arm", "n", "success", "success_low", "success_high"])


def test_bars_have_the_length_of_their_success_and_whiskers_at_the_interval() -> None:
    figure = success_bars(results(), reference="baseline", title="A title")
    assert drawn(figure).std() > 10
    goal, other = figure.axes
    bars = [patch for patch in goal.patches if isinstance(patch, Rectangle)]
    assert [bar.get_width() for bar in bars] == [1.0, 0.25]
    whiskers = next(each for each in goal.collections if isinstance(each, LineCollection))
    ends = [[float(x) for x, _ in segment] for segment in whiskers.get_segments()]
    assert ends[1] == pytest.approx([0.14, 0.41])
    assert [label.get_text() for label in goal.get_yticklabels()] == ["baseline", "null"]
    assert goal.get_title() == "goal  (n = 36)" and other.get_title() == "object  (n = 30)"
    # the reference's own success
    assert np.array_equal(other.lines[-1].get_xdata(), [0.5, 0.5])
    assert len(success_bars(results(), label="arm", group=None).axes) == 1


def test_heat_maps_hold_the_value_of_every_pair_and_nothing_where_none_was_measured() -> None:
    table = pd.DataFrame({"layer": [0, 0, 1], "tokens": ["image", "state", "image"], "effect": [0.5, -1.0, 2.0]})
    figure = heat_map(table, "layer", "tokens", "effect", centre=0, unit="metres")
    assert drawn(figure).std() > 10
    axes = figure.axes[0]
    grid = axes.images[0].get_array()
    assert grid is not None and np.array_equal(np.ma.filled(grid, np.nan), [[0.5, -1.0], [2.0, np.nan]], equal_nan=True)
    assert [text.get_text() for text in axes.texts] == ["0.5", "-1", "2"]
    # the same distance from the centre has the same strength of colour
    assert axes.images[0].get_clim() == (-2, 2)
    assert figure.axes[1].get_ylabel() == "metres"
    assert heat_map(table, "layer", "tokens", "effect", limits=(0, 1), form="").axes[0].images[0].get_clim() == (0, 1)
    with pytest.raises(ValueError, match="layer 0 and tokens image come together more than once"):
        heat_map(pd.concat([table, table]), "layer", "tokens", "effect")


def test_curves_run_through_their_points_in_order_with_bands_and_floor() -> None:
    table = pd.DataFrame(
        {"k": [4, 1, 2, 1], "name": ["a", "a", "a", "b"], "y": [3.0, 1.0, 2.0, 5.0], "low": [2.0, 0.5, 1.0, 4.0],
         "high": [4.0, 1.5, 3.0, 6.0]}
    )  # fmt: skip
    figure = curve(table, "k", "y", "name", "low", "high", floor=0.1, log_x=True, xlabel="dimensions")
    assert drawn(figure).std() > 5
    axes = figure.axes[0]
    assert np.array_equal(axes.lines[0].get_xydata(), [[1, 1], [2, 2], [4, 3]])
    legend = axes.get_legend()
    assert legend is not None and [text.get_text() for text in legend.get_texts()] == ["a", "b", "rerun floor"]
    assert axes.get_xscale() == "log" and axes.get_xlabel() == "dimensions" and len(axes.collections) == 2
    words = curve(pd.DataFrame({"site": ["late", "early"], "y": [1.0, 2.0]}), "site", "y")
    assert [label.get_text() for label in words.axes[0].get_xticklabels()] == ["late", "early"]


def test_columns_that_lack_are_named() -> None:
    with pytest.raises(KeyError, match=r"no columns \['success', 'success_low'\]"):
        success_bars(results().drop(columns=["success", "success_low"]))
    with pytest.raises(KeyError, match=r"no columns \['depth'\]"):
        heat_map(results(), "depth", "arm", "success")
    with pytest.raises(ValueError, match="no rows: nothing to draw"):
        curve(results().iloc[:0], "n", "success")


def test_every_column_of_endpoints_has_its_scale_below() -> None:
    """Three arms in two columns: below the second one's only panel there is none."""
    rows = [{"arm": arm, "to_source": 0.1, "to_destination": 0.2} for arm in "abc"]
    figure = endpoint_figure(pd.DataFrame(rows), "Ends", columns=2)
    drawn(figure)
    shown = [any(label.get_visible() and label.get_text() for label in axes.get_xticklabels()) for axes in figure.axes]
    assert shown == [False, True, True, True] and not figure.axes[3].get_visible()
