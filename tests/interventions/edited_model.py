"""What tests of edits on a model share: sites, sources, autoencoders, and the value that a hook point holds."""

import warnings

import torch
from public_checkpoints import make_observation
from test_edits import make_sae
from torch import Tensor

from hooked_vla import HookedVLA
from hooked_vla.interventions import CutSetWarning, Edit

SITE, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post"
D = 64


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


V, BASIS, BANK = randn(D), randn(3, D, seed=1), randn(20, D, seed=2)
SAE, TOPK = make_sae(32, D), make_sae(32, D, k=4)
SOURCE = randn(2, 39, D, seed=3)


def value(model: HookedVLA, *edits: Edit, site: str = SITE, seed: int = 0) -> Tensor:
    """What the hook point holds under the edits; nothing behind it runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CutSetWarning)
        _, cache = model.run_with_cache(make_observation(seed=seed), site, stop_at=site, edits=edits)
    return cache[site]


def segment(model: HookedVLA, name: str) -> Tensor:
    return model.segments(model.prepare(make_observation()))["vlm"].mask(name)
