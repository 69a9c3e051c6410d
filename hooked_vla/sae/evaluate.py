"""How well an autoencoder does on rows that it was not trained on: numbers alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.source import Source, check_finite


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Figures over `rows` tokens, in the model's own units.

    explained_variance: 1 - Σ Var(x - x̂) / Σ Var(x), sums over channels; fvu: Σ|x - x̂|² / Σ|x - mean|². They add up to
    1 where x̂ is right in the mean. cosine: between x and x̂, the mean. relative_length: |x̂| over |x|, in the mean: a
    shrunken reconstruction is below 1. l0: active features of a token, the mean; density: share of tokens in which
    each feature is active; dead_share: share of features that none of these tokens has. negative_share: of what top-k
    without ReLU chose, below zero. Of a transcoder x is the site that it predicts.
    """

    rows: int
    explained_variance: float
    fvu: float
    cosine: float
    relative_length: float
    l0: float
    dead_share: float
    negative_share: float
    density: Float[Tensor, " m"]

    def to_json(self) -> dict[str, Any]:
        """All but the density, of which percentiles (0, 10, ... 100)."""
        percentiles = self.density.quantile(torch.linspace(0, 1, 11, dtype=self.density.dtype)).tolist()
        plain = {name: value for name, value in vars(self).items() if name != "density"}
        return plain | {"density_percentiles": percentiles}

    def __str__(self) -> str:
        return (
            f"explained variance {self.explained_variance:.3f}, FVU {self.fvu:.3f}, L0 {self.l0:.1f}, "
            f"dead {self.dead_share:.1%}, {self.rows:,} rows"
        )


def evaluate(
    sae: SparseAutoencoder,
    rows: Float[Tensor, "n d"] | Mapping[str, Float[Tensor, "n d"]] | Source,
    n_rows: int = 65_536,
    batch_size: int = 4096,
) -> Evaluation:
    """Evaluate on held-out rows: of a tensor or tensors by site, all; of a source, the next n_rows.

    Raises ValueError for rows of another site or width, that are not finite, or that are all equal.
    """
    if isinstance(rows, Tensor):
        if sae.config.output_site is not None:
            raise ValueError(
                f"{sae.config.label}: a transcoder needs rows of {sae.config.site} and {sae.config.target}"
            )
        rows = {sae.config.site: rows}
    return evaluate_all([sae], rows, n_rows, batch_size)[0]


@torch.no_grad()
def evaluate_all(
    saes: Sequence[SparseAutoencoder],
    rows: Mapping[str, Float[Tensor, "n d"]] | Source,
    n_rows: int = 65_536,
    batch_size: int = 4096,
) -> list[Evaluation]:
    """`evaluate` for several autoencoders in one pass over the rows."""
    given = rows if isinstance(rows, Mapping) else rows.widths
    for config in (sae.config for sae in saes):
        for site in (config.site, config.target):
            if site not in given:
                raise ValueError(f"{config.label}: no rows of {site}; there are {list(given)}")
    sums = [_Sums(sae) for sae in saes]
    for batch in _batches(rows, n_rows, batch_size):
        for each in sums:
            x, target = batch[each.sae.config.site], batch[each.sae.config.target]
            check_finite(each.sae.config.site, x)
            check_finite(each.sae.config.target, target)
            each.add(x.to(each.sae.w_enc.device), target.to(each.sae.w_enc.device))
    return [each.result() for each in sums]


def _batches(rows: Mapping[str, Tensor] | Source, n_rows: int, batch_size: int) -> Iterator[Mapping[str, Tensor]]:
    if isinstance(rows, Mapping):
        longest = max((len(each) for each in rows.values()), default=0)
        for start in range(0, longest, batch_size):
            yield {site: each[start : start + batch_size] for site, each in rows.items()}
        return
    left = n_rows
    for batch in rows.batches(min(batch_size, n_rows)):
        yield {site: each[:left] for site, each in batch.items()}
        left -= min(batch_size, n_rows)
        if left <= 0:
            return


class _Sums:
    """Sums over tokens, in float64."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae, m, d = sae, sae.config.n_features, sae.config.d_decoded
        new = sae.w_enc.new_zeros
        self.n = 0
        self.counts = new(m, dtype=torch.int64)
        self.shift: Tensor | None = None
        self.x, self.xx, self.missed, self.square = (new(d, dtype=torch.float64) for _ in range(4))
        self.cosine = self.length = self.active = self.negative = 0.0

    def add(self, x: Tensor, target: Tensor) -> None:
        if not len(x):
            return
        code = self.sae.encode_sparse(x)
        made = self.sae(x).double()
        y, on = target.double(), code.values != 0
        if self.shift is None:
            # near the mean, so that the variance is not a difference of large numbers
            self.shift = y.mean(0)
        missed, centred = y - made, y - self.shift
        self.n += len(x)
        self.counts += torch.bincount(code.indices[on].long(), minlength=len(self.counts))
        self.x += centred.sum(0)
        self.xx += centred.square().sum(0)
        self.missed += missed.sum(0)
        self.square += missed.square().sum(0)
        lengths = y.norm(dim=1).clamp_min(1e-30), made.norm(dim=1).clamp_min(1e-30)
        self.cosine += float(((y * made).sum(1) / (lengths[0] * lengths[1])).sum())
        self.length += float((lengths[1] / lengths[0]).sum())
        self.active += float(on.sum())
        self.negative += float((code.values < 0).sum())

    def result(self) -> Evaluation:
        if not self.n:
            raise ValueError(f"{self.sae.config.label}: no rows to evaluate on")
        variance = float((self.xx - self.x.square() / self.n).sum())
        if not variance > 0:
            raise ValueError(f"{self.sae.config.label}: all {self.n} rows are equal; there is no variance to explain")
        left = float((self.square - self.missed.square() / self.n).sum())
        density = self.counts.double() / self.n
        return Evaluation(
            rows=self.n, explained_variance=1 - left / variance, fvu=float(self.square.sum()) / variance,
            cosine=self.cosine / self.n, relative_length=self.length / self.n, l0=self.active / self.n,
            dead_share=float((density == 0).double().mean()), negative_share=self.negative / max(self.active, 1.0),
            density=density.cpu(),
        )  # fmt: skip
