"""Which features are active when: the few numbers above 0 of a code over whole episodes, feature by feature.

>>> steps = FeatureSteps.from_dense(sae.encode(x), episode)          # x [step d], episode by episode, in order of time
>>> steps = FeatureSteps.from_code(sae.encode_sparse(x), m, episode)
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int, Int64
from numpy.typing import ArrayLike
from torch import Tensor

from hooked_vla.sae.activations import Code


@dataclass(frozen=True, eq=False)
class FeatureSteps:
    """Features of n time steps. episode: number of each step's episode; every episode's steps stand together.

    row, feature, value: of everything above 0, sorted by feature, then row. n_features: all that there are.
    """

    episode: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " active"]
    feature: Int64[np.ndarray, " active"]
    value: Float32[np.ndarray, " active"]
    n_features: int

    @classmethod
    def of(
        cls, row: ArrayLike, feature: ArrayLike, value: ArrayLike, episode: ArrayLike, n_features: int
    ) -> "FeatureSteps":
        """From single entries in any order; of a feature and row that come several times, the largest counts.

        Raises ValueError for numbers out of range or not finite, no steps, and an episode whose steps are apart.
        """
        episodes = np.asarray(episode, np.int64)
        rows, features = np.asarray(row, np.int64), np.asarray(feature, np.int64)
        values = np.asarray(value, np.float32)
        if episodes.ndim != 1 or not len(episodes):
            raise ValueError(f"episode must be one number a step, got shape {list(episodes.shape)}")
        if not (rows.shape == features.shape == values.shape and rows.ndim == 1):
            raise ValueError(f"row, feature and value differ: {rows.shape}, {features.shape}, {values.shape}")
        starts = np.flatnonzero(np.diff(episodes)) + 1
        blocks = episodes[np.concatenate([[0], starts])]
        if len(blocks) != len(np.unique(blocks)):
            twice = sorted({int(each) for each in blocks if (blocks == each).sum() > 1})
            raise ValueError(f"the steps of an episode must stand together: those of {twice[:5]} do not")
        if not np.isfinite(values).all():
            raise ValueError(f"{int((~np.isfinite(values)).sum())} features are not finite")
        for name, each, end in (("row", rows, len(episodes)), ("feature", features, n_features)):
            if len(each) and not (each.min() >= 0 and each.max() < end):
                raise ValueError(f"{name} must be in 0..{end - 1}, got {each.min()} to {each.max()}")
        on = values > 0
        rows, features, values = rows[on], features[on], values[on]
        # largest first, of which the first stays
        order = np.lexsort((-values, rows, features))
        rows, features, values = rows[order], features[order], values[order]
        first = np.ones(len(rows), bool)
        first[1:] = (np.diff(rows) != 0) | (np.diff(features) != 0)
        return cls(episodes, rows[first], features[first], values[first], n_features)

    @classmethod
    def from_dense(cls, features: Float[Tensor, "n m"], episode: ArrayLike) -> "FeatureSteps":
        """From all features of every step. Raises as `of`, and ValueError for another number of steps."""
        if features.ndim != 2 or len(features) != len(np.asarray(episode)):
            raise ValueError(f"features must be [{len(np.asarray(episode))} m], got {list(features.shape)}")
        bad = ~features.isfinite()
        if bool(bad.any()):
            raise ValueError(f"{int(bad.sum())} features are not finite")
        row, feature = (features > 0).nonzero(as_tuple=True)
        value = features[row, feature].float()
        return cls.of(row.cpu(), feature.cpu(), value.detach().cpu(), episode, features.shape[1])

    @classmethod
    def from_code(cls, code: Code, n_features: int, episode: ArrayLike) -> "FeatureSteps":
        """From what `SparseAutoencoder.encode_sparse` gives, [n k]. Raises as `of`."""
        if len(code.values) != len(np.asarray(episode)):
            raise ValueError(f"{len(code.values)} steps are encoded, but {len(np.asarray(episode))} have an episode")
        row = torch.arange(len(code.values)).repeat_interleave(code.values.shape[1])
        values = code.values.detach().flatten().float().cpu()
        return cls.of(row, code.indices.flatten().cpu(), values, episode, n_features)

    @property
    def n_steps(self) -> int:
        return len(self.episode)

    @cached_property
    def lengths(self) -> Int64[np.ndarray, " episode"]:
        """Steps of every episode, in their order."""
        edges = np.flatnonzero(np.diff(self.episode, prepend=self.episode[0] - 1, append=self.episode[-1] + 1))
        return np.diff(edges)

    @cached_property
    def place(self) -> Int64[np.ndarray, " n"]:
        """Of every step, which of the episodes, counted from 0, it is of."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    @cached_property
    def frequency(self) -> np.ndarray:
        """Share of the steps in which each feature is active, [m]."""
        return np.bincount(self.feature, minlength=self.n_features) / self.n_steps

    def chosen(self, steps: Bool[np.ndarray, " n"]) -> "FeatureSteps":
        """Some of the steps. Raises ValueError for none."""
        if not steps.any():
            raise ValueError("no steps are left")
        number = np.cumsum(steps) - 1
        kept = steps[self.row]
        return FeatureSteps(
            self.episode[steps], number[self.row[kept]], self.feature[kept], self.value[kept], self.n_features
        )

    def shuffled(self, rng: np.random.Generator) -> "FeatureSteps":
        """The steps in random order over all episodes, which keep their lengths: each feature is as frequent and as
        large as before, and features of a step stay together, but nothing is left of when it happened."""
        moved: Int[np.ndarray, " n"] = rng.permutation(self.n_steps)[self.row]
        order = np.lexsort((moved, self.feature))
        return FeatureSteps(self.episode, moved[order], self.feature[order], self.value[order], self.n_features)
