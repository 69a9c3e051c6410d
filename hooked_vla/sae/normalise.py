"""Normalisations by name: what is taken off tokens and what they are divided by, found once and stored.

All but `token_norm` are the same for every token, y = (x - mean) / scale, and fold into the weights (`splice`).
"""

import logging

import torch
from jaxtyping import Float
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# the least length that token_norm divides by (DrVLA: 1e-8)
LEAST = 1e-8


class Normalisation(nn.Module):
    """Tokens of width d into what an autoencoder is trained on, and back. kind: one of config.NORMALISATIONS.

    mean: [d], scale: [d] for zscore and [1] elsewhere; for token_norm they are 0 and 1, what it divides by is each
    token's own (`of_token`).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, kind: str, d: int) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("mean", torch.zeros(d))
        self.register_buffer("scale", torch.ones(d if kind == "zscore" else 1))

    @torch.no_grad()
    def fit(self, rows: Float[Tensor, "n d"], label: str) -> None:
        """Find mean and scale on rows of the model.

        Raises ValueError where all rows are equal, so that there is nothing to learn.
        """
        wide = rows.double()
        mean = wide.mean(0)
        spread = (wide - mean).square().mean(0).sqrt()
        if not bool((spread > 0).any()):
            raise ValueError(f"{label}: activations are constant over {len(rows)} rows; there is nothing to encode")
        if self.kind == "zscore":
            constant = spread == 0
            if bool(constant.any()):
                logger.warning("%s: %d of %d channels are constant", label, int(constant.sum()), len(spread))
            self.mean.copy_(mean)
            self.scale.copy_(torch.where(constant, 1.0, spread))
        elif self.kind == "mean_norm":
            self.scale.fill_(float(wide.norm(dim=1).mean()) / wide.shape[1] ** 0.5)
        elif self.kind == "mean_square":
            self.scale.fill_(float(wide.square().sum(1).mean()) ** 0.5)

    def normalise(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What the autoencoder sees of x; for token_norm, as it is."""
        if self.kind in ("none", "token_norm"):
            return x
        return (x - self.mean) / self.scale if self.kind == "zscore" else x / self.scale

    def undo(self, y: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """Back into the model's own units."""
        if self.kind in ("none", "token_norm"):
            return y
        return y * self.scale + self.mean if self.kind == "zscore" else y * self.scale


def of_token(x: Float[Tensor, "*batch d"]) -> tuple[Float[Tensor, "*batch 1"], Float[Tensor, "*batch 1"]]:
    """(mean of its channels, length without it) of each token, which token_norm takes off and divides by."""
    mean = x.mean(-1, keepdim=True)
    return mean, (x - mean).norm(dim=-1, keepdim=True).clamp_min(LEAST)
