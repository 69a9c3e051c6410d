"""How much arms change a site, measured on what the unedited policy does there: nothing is changed meanwhile."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookFunction, HookPoint
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.sae.loop_arms import LoopArm, chosen_tokens


@dataclass(frozen=True)
class Fidelity:
    """Of the tokens that an arm changes. tokens: how many were measured.

    explained_variance: 1 - Σ Var(Δ) / Σ Var(x), Δ what changes and sums over channels; fvu: Σ|Δ|² / Σ|x - mean|²;
    relative: Σ|Δ| / Σ|x|. of_means: explained variance of the mean token of a row, which is what a pooled autoencoder
    is asked for; None where all means are equal.
    """

    tokens: int
    explained_variance: float
    fvu: float
    relative: float
    of_means: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class FidelityWatcher(Watcher):
    """Asks every arm what it would make of the values that come by; attach it to a run of the baseline alone."""

    def __init__(self, arms: Sequence[LoopArm]) -> None:
        self.arms = list(arms)
        self._sums = {arm.name: (_Moments(), _Moments()) for arm in arms}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return [(site, self._look(arm, fn)) for arm in self.arms for site, fn in arm.hooks(rows)]

    def result(self) -> dict[str, Fidelity]:
        """By arm. Raises ValueError where no token was seen, or all were equal."""
        return {arm.name: _fidelity(arm, *self._sums[arm.name]) for arm in self.arms}

    def _look(self, arm: LoopArm, fn: HookFunction) -> HookFunction:
        of_tokens, of_means = self._sums[arm.name]

        def look(value: Tensor, hook: HookPoint) -> None:
            with torch.no_grad():
                changed = fn(value.clone(), hook)
            if changed is None:
                return
            layout = Layout.of(hook)
            x, y = (layout.flatten(each).double() for each in (value, changed))
            mask = chosen_tokens(hook, x, arm.tokens)
            if hook.run.in_use is not None:
                in_use = torch.tensor(hook.run.in_use, device=mask.device)
                mask = mask & in_use.repeat_interleave(len(mask) // len(in_use))[:, None]
            of_tokens.add(x[mask], (y - x)[mask])
            there = mask.any(1)
            weights = mask[there].double() / mask[there].sum(1, keepdim=True)
            means = (torch.einsum("r p, r p c -> r c", weights, each[there]) for each in (x, y - x))
            of_means.add(*means)

        return look


class _Moments:
    """Sums over tokens and what changes of them."""

    def __init__(self) -> None:
        self.n = 0
        self.length = self.change = 0.0
        self.shift: Tensor | None = None

    def add(self, x: Float[Tensor, "n channel"], delta: Float[Tensor, "n channel"]) -> None:
        if not len(x):
            return
        if self.shift is None:
            # near the mean, so that the variance is not a difference of large numbers
            self.shift = x.mean(0)
            self.x, self.xx, self.d, self.dd = (torch.zeros_like(self.shift) for _ in range(4))
        centred = x - self.shift
        self.n += len(x)
        self.x += centred.sum(0)
        self.xx += centred.square().sum(0)
        self.d += delta.sum(0)
        self.dd += delta.square().sum(0)
        self.length += float(x.norm(dim=1).sum())
        self.change += float(delta.norm(dim=1).sum())

    @property
    def variance(self) -> float:
        """Of x, times n, summed over channels."""
        return float((self.xx - self.x.square() / self.n).sum()) if self.n else 0.0

    @property
    def explained(self) -> float:
        return 1 - float((self.dd - self.d.square() / self.n).sum()) / self.variance


def _fidelity(arm: LoopArm, tokens: _Moments, means: _Moments) -> Fidelity:
    if not tokens.variance > 0:
        raise ValueError(f"arm {arm.name!r}: {tokens.n} tokens were seen at {arm.site}, and all are equal")
    fvu, of_means = float(tokens.dd.sum()) / tokens.variance, means.explained if means.variance > 0 else None
    return Fidelity(tokens.n, tokens.explained, fvu, tokens.change / tokens.length, of_means)
