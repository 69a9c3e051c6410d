"""A feature as a page for notebooks: `FeatureIndex(folder).feature(12).show()`."""

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_vla.notebook import Html, bars, cells, h, table

if TYPE_CHECKING:
    from hooked_vla.rollouts.sae.feature_index import FeatureIndex, HeatMap

_FIGURES = {
    "density": "share of rows", "frames": "share of plans", "coverage": "share of episodes", "maximum": "maximum",
    "mean": "mean where active", "general": "generality", "general_null": "of shuffled episodes",
}  # fmt: skip
_LABELS = 12
_SIDE_BY_SIDE = "display:flex;flex-wrap:wrap;align-items:flex-start"


def feature_page(index: "FeatureIndex", feature: Mapping[str, Any], n: int) -> Html:
    """See `Feature.show`."""
    if n < 0:
        raise ValueError(f"n must not be negative, got {n}")
    number = int(feature["feature"])
    figures = [(said, float(feature[name])) for name, said in _FIGURES.items()]
    counts, maximum = index.histogram(number)
    edges = np.linspace(0, maximum, len(counts) + 1)
    labels = [f"{low:.3g} to {high:.3g}" for low, high in pairwise(edges)]
    histogram = bars(counts.tolist(), labels, f"histogram of feature {number}")
    parts = [
        h("h3", f"Feature {number} of {index.site}"),
        h("p", str(feature["description"]), style="font-size:15px"),
        h("div", table(("figure", ""), figures, "Figures"),
          h("figure", h("figcaption", f"Rows by value, 0 to {maximum:.3g} (logarithm of counts)"), histogram,
            style="margin:0 24px 12px 0;font-size:13px"),
          _labels(index, number), *_neighbours(index, number), style=_SIDE_BY_SIDE),
    ]  # fmt: skip
    for row in index.top_frames(number, n, per_episode=1).to_dict("records"):
        parts.append(_plan(index, number, {str(name): value for name, value in row.items()}))
    return h("div", *parts, style="font-family:system-ui,sans-serif")


def _labels(index: "FeatureIndex", number: int) -> Html:
    shares = index.shares(number).sort_values("lift", ascending=False).head(_LABELS)
    rows = [(f"{row['kind']} {row['value']}", f"{row['share']:.0%}", float(row["lift"]))
            for row in shares.to_dict("records")]  # fmt: skip
    return table(("label", "share", "times its share of steps"), rows, "Where it is active")


def _neighbours(index: "FeatureIndex", number: int) -> list[Html]:
    said = {"decoder": "Like it by direction (cosine)", "coactive": "Active in the same tokens (Jaccard)"}
    found = []
    for kind, caption in said.items():
        near = index.neighbours(number, kind).head(5).to_dict("records")
        rows = [(int(row["neighbour"]), float(row["value"]), str(row["description"])) for row in near]
        found.append(table(("feature", "", "description"), rows, caption))
    return found


def _plan(index: "FeatureIndex", number: int, row: Mapping[str, Any]) -> Html:
    said = [f"{name} {row[name]}" for name in ("task", "phase") if name in row]
    title = f"episode {row['episode']}, step {row['env_step']}: {row['maximum']:.3g}"
    head = h("h4", ", ".join([title, *said]), style="margin:8px 0")
    if index.manifest["pooling"] != "token":
        return head
    maps = index.heat_map(number, int(row["episode"]), int(row["env_step"]))
    return h("div", head, h("div", *(_segment(each, float(row["maximum"])) for each in maps), style=_SIDE_BY_SIDE))


def _segment(found: "HeatMap", top: float) -> Html:
    """An image's tokens as a square, those of other segments as a strip with a row for each denoise step."""
    value = found.value
    places = np.arange(value.shape[1])[None].repeat(len(value), 0)
    side = round(value.shape[1] ** 0.5)
    if found.camera is not None and side * side == value.shape[1]:
        value, places = found.grid().max(0), places[0].reshape(side, side)
    labels = [[f"{found.segment} {place}: {each:.3g}" for place, each in zip(*pair, strict=True)]
              for pair in zip(places.tolist(), value.tolist(), strict=True)]  # fmt: skip
    drawn = cells(value, top, labels, f"{found.segment}, token by token")
    return h("figure", h("figcaption", found.segment), drawn, style="margin:0 16px 8px 0;font-size:12px")
