"""What one pathway's injection is set against: noise of the same size, token by token and step by step."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookFunction, HookPoint
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.injection import InjectionArm

# put into an episode: another task's run from the same start; one from another start; noise as large as the first
DONOR, RANDOM, NOISE = "donor", "random donor", "noise"


def matched_noise(change: Tensor, layout: Layout, seeds: Sequence[int]) -> Tensor:
    """Random directions, each token's as long as the change there; 0 where nothing changes.

    change: as the hook point has it. seeds: of the rows of the batch, of which each may have several of the value's.
    """
    flat = layout.flatten(change)
    each = len(flat) // len(seeds)
    drawn = [
        torch.randn(each, *flat.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        for seed in seeds
    ]
    noise = torch.cat(drawn).to(flat.device)
    scale = flat.float().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    return layout.restore((noise * scale).to(change.dtype), change)


@dataclass(frozen=True)
class MatchedNoiseArm(InjectionArm):
    """In place of what a donor would change, noise of the same size: of each token, at each step, from the episode's
    seed."""

    def describe(self) -> Mapping[str, Any]:
        return {**super().describe(), "kind": "noise as large as the injection"}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """As InjectionArm's, with noise in place of the donor's values. Raises as there."""
        return [(site, _Matched(fn, [cell.seed for cell in rows])) for site, fn in super().hooks(rows)]


class _Matched:
    """An injection's hook with noise in place of what it injects."""

    def __init__(self, inject: HookFunction, seeds: Sequence[int]) -> None:
        self.inject, self.seeds = inject, list(seeds)

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        injected = self.inject(value.clone(), hook)
        if injected is None:
            return None
        moment = zlib.crc32(f"{hook.name} {hook.run.env_step} {hook.denoise_step}".encode())
        seeds = [(seed * 2**32 + moment) % 2**63 for seed in self.seeds]
        change = injected - value
        noisy = value + matched_noise(change, Layout.of(hook), seeds)
        # what the injection leaves alone keeps its bits
        return torch.where(change == 0, value, noisy)
