"""Arms that give a policy part of what it would hold in the same place if it had been told something else.

At every plan the same model looks at the same observation with the donor's instruction, up to the site; the acting
run's tokens take the donor's part in a subspace. Nothing but the instruction differs between the two.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vla import registry
from hooked_vla.analysis.subspaces import Subspace
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import Segments
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.settings import Settings, constant_text
from hooked_vla.vla import HookedVLA


def twin_of(model: HookedVLA) -> HookedVLA:
    """The same model with hook points of its own, so that it can run while the other does; weights are shared."""
    net = registry.build_network(model.spec).eval()
    net.load_state_dict(model.net.state_dict(), assign=True)
    return HookedVLA(model.spec, net, model.processor)


@dataclass(frozen=True, eq=False)
class DonorArm:
    """Tokens at a site take the donor's part in a subspace, at every plan.

    donors: the donor's instruction, by task. site: one hook point that runs once a chunk. tokens: segment of the
    tokens, all where None. subspace: None for all dimensions. strength: how far towards the donor, 1 being there.
    twin: what looks at the donor's observation (`twin_of`). settings: those of the rollouts.
    Raises ValueError for a site that runs at denoise steps.
    """

    name: str
    donors: Mapping[str, str]
    site: str
    tokens: str | None
    subspace: Subspace | None
    strength: float
    twin: HookedVLA = field(repr=False)
    settings: Settings = field(repr=False)
    _seen: dict[int, tuple[int, Mapping[str, Any]]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if hook_names.is_denoised(self.site):
            raise ValueError(f"{self.site} runs at every denoise step: donors are made at sites that run once a chunk")

    def describe(self) -> Mapping[str, Any]:
        space = self.subspace
        about = None if space is None else {"k": space.k, "method": space.method, "basis": _digest(space.basis)}
        return {"kind": "donor", "site": self.site, "tokens": self.tokens, "subspace": about,
                "strength": self.strength, "donors": dict(self.donors)}  # fmt: skip

    def observe(self, cell: Cell, env_step: int, frame: Mapping[str, Any]) -> Mapping[str, Any]:
        """The frame as it is; the donor's is made of it when the site's value comes."""
        self._seen[cell.id] = (env_step, frame)
        return frame

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return [(self.site, _Swap(self, rows))]

    def donated(self, cells: Sequence[Cell], env_step: int | None) -> tuple[Tensor, Segments]:
        """What the site holds for each cell's last observation with the donor's instruction, and whose tokens are
        whose.

        Raises RuntimeError for a cell that was not observed at this step.
        """
        frames = []
        for cell in cells:
            step, frame = self._seen.get(cell.id, (None, None))
            if frame is None or step != env_step:
                raise RuntimeError(f"arm {self.name!r}: {cell} was last observed at step {step}, not {env_step}")
            frames.append({**frame, "instruction": self.donors[cell.task]})
        point = self.twin.points[self.site]
        # what the run draws on its way must not move anybody's random numbers
        with (
            constant_text(self.twin.processor, self.settings.constant_text),
            torch.no_grad(),
            torch.random.fork_rng([]),
        ):
            inputs = prepare(self.twin, self.settings, frames)
            _, cache = self.twin.run_with_cache(inputs, [self.site], stop_at=self.site)
            return cache[self.site], self.twin.segments(inputs)[point.streams[point.axes[1]]]


class _Swap:
    """The hook function of a DonorArm in one group."""

    def __init__(self, arm: DonorArm, rows: Sequence[Cell]) -> None:
        self.arm, self.rows = arm, rows
        self.own = [i for i, cell in enumerate(rows) if cell.arm == arm.name]

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor:
        donor, theirs = self.arm.donated([self.rows[i] for i in self.own], hook.run.env_step)
        segments = hook.segments
        if segments is None or hook.axes[0] != "batch":
            raise ValueError(f"{hook.name} has axes {' '.join(hook.axes)}: donors need batch, then tokens")
        mine, theirs_mask = token_mask(segments.rows(self.own), self.arm.tokens), token_mask(theirs, self.arm.tokens)
        if not torch.equal(mine.sum(1), theirs_mask.sum(1)):
            raise ValueError(
                f"arm {self.arm.name!r}: the donors have {theirs_mask.sum(1).tolist()} tokens of "
                f"{self.arm.tokens or 'all'} at {hook.name}, the rows {mine.sum(1).tolist()}: swaps need as many"
            )
        result = value.clone()
        part = result[self.own].flatten(2)
        part[mine] = swapped(part[mine], donor.flatten(2)[theirs_mask], self.arm.subspace, self.arm.strength)
        result[self.own] = part.view_as(value[self.own])
        return result


def swapped(
    x: Float[Tensor, "n d"], source: Float[Tensor, "n d"], subspace: Subspace | None, strength: float = 1.0
) -> Float[Tensor, "n d"]:
    """x + strength·P·(source - x), P the projection onto the subspace; all of it where None."""
    if subspace is None:
        return source if strength == 1 else x + strength * (source - x)
    basis = subspace.basis.to(x)
    return x + strength * ((source - x) @ basis.T @ basis)


def token_mask(segments: Segments, tokens: str | None) -> Bool[Tensor, "row token"]:
    """Where the tokens of a segment are, all of them where None."""
    return torch.ones_like(segments.labels, dtype=torch.bool) if tokens is None else segments.mask(tokens)


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]
