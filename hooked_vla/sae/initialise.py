"""Where training starts: decoder rows drawn from the seed, the decoder's bias in the middle of the tokens."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from hooked_vla.sae.config import SAEConfig

# Weiszfeld's algorithm stops after so many rounds, or when it moves less than this share of the tokens' spread
ROUNDS, CLOSE = 100, 1e-5


def geometric_median(rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The point with the least sum of distances to the rows (Weiszfeld, 1937); outliers hardly move it.

    Raises ValueError for no rows.
    """
    if not len(rows):
        raise ValueError("the geometric median of no rows")
    wide = rows.double()
    median = wide.mean(0)
    close = CLOSE * float((wide - median).norm(dim=1).mean())
    for _ in range(ROUNDS):
        # a row at the very median has no direction; the bound keeps its weight finite
        weights = 1 / (wide - median).norm(dim=1).clamp_min(1e-12)
        moved = (weights @ wide) / weights.sum()
        done = float((moved - median).norm()) <= close
        median = moved
        if done:
            break
    return median.to(rows.dtype)


def initial_bias(kind: str, rows: Float[Tensor, "n d"]) -> Float[Tensor, " d"]:
    """The decoder's bias to start from; kind: one of config.BIASES."""
    if kind == "geometric_median":
        return geometric_median(rows)
    return rows.mean(0) if kind == "mean" else rows.new_zeros(rows.shape[1])


def initial_dictionary(config: SAEConfig) -> tuple[Float[Tensor, "m d"], Float[Tensor, "m d_out"]]:
    """(encoder, decoder): decoder rows of one length in directions drawn from the seed, the encoder their multiple.

    A transcoder's encoder has directions of its own. Zeros where training is not known: they are filled from a file.
    """
    if config.training is None:
        return torch.zeros(config.n_features, config.d_model), torch.zeros(config.n_features, config.d_decoded)
    generator = torch.Generator().manual_seed(config.training.seed)
    decoder = functional.normalize(torch.randn(config.n_features, config.d_decoded, generator=generator), dim=1)
    encoder = decoder
    if config.output_site is not None:
        encoder = functional.normalize(torch.randn(config.n_features, config.d_model, generator=generator), dim=1)
    length = config.training.decoder_length
    return encoder * (config.training.encoder_scale * length), decoder * length
