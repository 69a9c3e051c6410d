"""Statistics of a data set's columns as LeRobot keeps them: min, max, mean, std, count and quantiles.

Episode by episode, and merged over episodes: everything exactly, but quantiles as LeRobot does, by their mean weighted
with the episodes' lengths (lerobot 0.6.1: datasets/compute_stats.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, UInt8

# LeRobot's names: q01 is the first percentile
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


@dataclass(frozen=True)
class ColumnStatistics:
    """Of one column: `count` rows, and for every entry of a row the values by name."""

    count: int
    values: dict[str, Float64[np.ndarray, " entry"]]

    @classmethod
    def of_rows(cls, rows: np.ndarray) -> "ColumnStatistics":
        """Of numbers [row] or [row, entry]."""
        table = np.asarray(rows, np.float64).reshape(len(rows), -1)
        values = {"min": table.min(0), "max": table.max(0), "mean": table.mean(0), "std": table.std(0)}
        ordered, n = np.sort(table, axis=0), len(table)
        # the smallest value that so many rows do not exceed, as for images
        quantiles = {name: ordered[max(0, int(np.ceil(q * n)) - 1)] for name, q in QUANTILES.items()}
        return cls(n, values | quantiles)

    @classmethod
    def of_images(cls, images: UInt8[np.ndarray, "image height width 3"]) -> "ColumnStatistics":
        """Of every channel over all pixels, colours in 0..1; the rows are images."""
        counts = np.stack([np.bincount(images[..., i].ravel(), minlength=256) for i in range(3)]).astype(np.float64)
        levels, total = np.arange(256) / 255, counts.sum(1)
        mean = counts @ levels / total
        spread = (counts * (levels - mean[:, None]) ** 2).sum(1) / total
        present = [levels[row > 0] for row in counts]
        values = {"min": np.array([each[0] for each in present]), "max": np.array([each[-1] for each in present]),
                  "mean": mean, "std": np.sqrt(spread)}  # fmt: skip
        below = counts.cumsum(1)
        for name, q in QUANTILES.items():
            values[name] = levels[(below >= q * total[:, None]).argmax(1)]
        return cls(len(images), values)

    @classmethod
    def merge(cls, parts: Sequence["ColumnStatistics"]) -> "ColumnStatistics":
        """Of all rows together."""
        shares = np.array([part.count for part in parts], np.float64)
        shares /= shares.sum()
        stacked = {name: np.stack([part.values[name] for part in parts]) for name in parts[0].values}
        values = {name: shares @ each for name, each in stacked.items()}
        variance = shares @ (stacked["std"] ** 2 + (stacked["mean"] - values["mean"]) ** 2)
        values |= {"min": stacked["min"].min(0), "max": stacked["max"].max(0), "std": np.sqrt(variance)}
        return cls(sum(part.count for part in parts), values)

    def to_plain(self, image: bool) -> dict[str, list]:
        """As lists: [entry] for numbers, [3, 1, 1] for images, the count as [1]."""
        shape = (-1, 1, 1) if image else (-1,)
        return {name: each.reshape(shape).tolist() for name, each in self.values.items()} | {"count": [self.count]}
