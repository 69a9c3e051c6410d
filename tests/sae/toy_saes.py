"""Tokens with a known sparse structure, and small settings, for tests of autoencoders."""

from typing import Any

import torch
from torch import Tensor

from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.presets import preset
from hooked_vla.sae.source import PREVIOUS, TensorSource

MIXING = torch.randn(24, 12, generator=torch.Generator().manual_seed(4))
SITE, D, HIDDEN = "expert.blocks.1.hook_resid_post", 24, 40


def tokens(n: int, seed: int) -> Tensor:
    """Sums of about four of forty directions, off the origin, with a little noise."""
    directions = torch.nn.functional.normalize(
        torch.randn(HIDDEN, D, generator=torch.Generator().manual_seed(0)), dim=1
    )
    generator = torch.Generator().manual_seed(100 + seed)
    present = torch.rand(n, HIDDEN, generator=generator) < 0.1
    strength = 1 + torch.rand(n, HIDDEN, generator=generator)
    noise = torch.randn(n, D, generator=generator)
    return (strength * present) @ directions * 5 + 2 + 0.05 * noise


def source() -> TensorSource:
    rows = tokens(4000, seed=1)
    before = rows + 0.3 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    return TensorSource({SITE: rows, SITE + PREVIOUS: before, "other": rows @ MIXING}, seed=3)


def settings(architecture: str, **changes: Any) -> SAEConfig:
    """Small and quick: 64 features, 4 of them active, 90 steps of 64 tokens."""
    own: dict[str, Any] = {
        "architecture": architecture, "n_features": 64, "k": 4, "steps": 90, "batch_size": 64, "rate": 5e-3,
        "init_rows": 500,
    }  # fmt: skip
    if architecture in ("relu", "gated", "jumprelu"):
        own["k"] = None
    return preset("hooked", "model", changes.pop("site", SITE), changes.pop("d_model", D), **{**own, **changes})
