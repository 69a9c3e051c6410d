"""Deterministic denoising (DDIM, arXiv 2010.02502) along the squared-cosine schedule (arXiv 2102.09672)."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from torch import Tensor

from hooked_vla.components.denoising import squared_cosine_betas


def squared_cosine_signal(n_steps: int) -> list[float]:
    """Share of the signal's variance left after step t = 0 .. n_steps - 1, in float32 as the source stores it."""
    alphas = 1 - np.array(squared_cosine_betas(n_steps), dtype=np.float32)
    return alphas.cumprod(dtype=np.float64).astype(np.float32).tolist()


def ddim_step(
    x: Float[Tensor, "batch chunk d_action"],
    noise: Float[Tensor, "batch chunk d_action"],
    step: int,
    signal: Sequence[float],
) -> Float[Tensor, "batch chunk d_action"]:
    """From step t to t - 1, without fresh noise: the clean chunk that `noise` implies is clipped to -1..1."""
    here, before = signal[step], signal[step - 1] if step else 1.0
    clean = ((x - math.sqrt(1 - here) * noise) / math.sqrt(here)).clamp(-1, 1)
    return math.sqrt(before) * clean + math.sqrt(1 - before) * noise
