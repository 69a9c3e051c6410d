"""The control of an injection: random directions, as large as what the injection would change, at every token and step.

A donor's values differ from the episode's own in a way that has a meaning, and in size. An arm of noise has the size
alone: what it does too is not owed to what was injected.

>>> arms = [BASELINE, *with_controls([InjectionArm("vlm", recording, injection, donors)])]   # "vlm", "noise: vlm"
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookFunction, HookPoint
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.injection import InjectionArm

# how long a direction lasts: a whole episode, or one call of the hook point
EPISODE, STEP = "episode", "step"
# how an arm of noise is called, before the name of what it stands in for
PREFIX = "noise: "


def matched_noise(change: Tensor, layout: Layout, seeds: Sequence[int], shared: bool = False) -> Tensor:
    """Random directions, each token's as long as the change there; 0 where nothing changes.

    change: as the hook point has it. seeds: of the rows of the batch, of which each may have several of the value's.
    shared: all tokens of a row have one direction.
    """
    flat = layout.flatten(change)
    each, n_places, n_channels = len(flat) // len(seeds), 1 if shared else flat.shape[1], flat.shape[2]
    drawn = [
        torch.randn(each, n_places, n_channels, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        for seed in seeds
    ]
    noise = torch.cat(drawn).to(flat.device)
    scale = flat.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return layout.restore((noise * scale).to(change.dtype), change)


@dataclass(frozen=True)
class MatchedNoiseArm(InjectionArm):
    """In place of what a donor would change, noise of the same size: of each token, at each step, from the episode's
    seed.

    lasts: "episode": each token keeps one direction at all steps of the episode, as a donor's difference goes on in
    one way; "step": another at every environment and denoise step, which averages out along an episode.
    """

    lasts: str = field(default=EPISODE, kw_only=True)

    def __post_init__(self) -> None:
        """Raises ValueError for no donors, and another word for `lasts`."""
        super().__post_init__()
        if self.lasts not in (EPISODE, STEP):
            raise ValueError(f"arm {self.name!r}: lasts must be {EPISODE!r} or {STEP!r}, got {self.lasts!r}")

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "kind": "noise as large as the injection", "lasts": self.lasts}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """As InjectionArm's, with noise in place of the donor's values. Raises as there."""
        seeds = [cell.seed for cell in rows]
        return [(site, NoiseHook(fn, seeds, self.lasts)) for site, fn in super().hooks(rows)]


def noise_of(arm: InjectionArm, lasts: str = EPISODE) -> MatchedNoiseArm:
    """An injection's control, named "noise: NAME"; for how long its directions last, see MatchedNoiseArm."""
    name = f"{PREFIX}{arm.name}"
    return MatchedNoiseArm(name, arm.recording, arm.injection, arm.donors, arm.told, arm.max_bytes, lasts=lasts)


def with_controls(arms: Sequence[InjectionArm], lasts: str = EPISODE) -> list[InjectionArm]:
    """Every injection, each followed by its control."""
    return [each for arm in arms for each in (arm, noise_of(arm, lasts))]


class NoiseHook:
    """A hook with noise in place of what another changes. seeds: of the rows; lasts: EPISODE or STEP, how long they
    keep a direction; shared: as `matched_noise` has it."""

    def __init__(self, fn: HookFunction, seeds: Sequence[int], lasts: str, shared: bool = False) -> None:
        self.fn, self.seeds, self.lasts, self.shared = fn, list(seeds), lasts, shared

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        changed = self.fn(value.clone(), hook)
        if changed is None:
            return None
        moment = f" {hook.run.env_step} {hook.denoise_step}" if self.lasts == STEP else ""
        # torch's generator on a CPU takes the lower 32 bits of a seed only: all that counts must be in them
        seeds = [zlib.crc32(f"{seed} {hook.name}{moment}".encode()) for seed in self.seeds]
        change = changed - value
        noisy = value + matched_noise(change, Layout.of(hook), seeds, self.shared)
        # what is left alone keeps its bits
        return torch.where(change == 0, value, noisy)
