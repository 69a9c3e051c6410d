"""Arms that make activations worse by a given share of their variance, at one site or at several together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Protocol

from torch import Tensor

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.arms import Arm
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.battery_runs import records
from hooked_vla.rollouts.matched_noise import NoiseHook
from hooked_vla.rollouts.sae.fidelity import FidelityWatcher
from hooked_vla.rollouts.sae.loop_arms import chosen_tokens
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import run_rollouts

with needs_analysis_extra():
    import pandas as pd


class PartArm(Arm, Protocol):
    """An arm of one site. tokens: the segments that it changes, None for all but padding."""

    @property
    def site(self) -> str: ...

    @property
    def tokens(self) -> tuple[str, ...] | None: ...


@dataclass(frozen=True)
class NoiseArm:
    """Every token but padding gets noise of `relative` times its length, in a random direction of its own. lasts: as
    MatchedNoiseArm has it."""

    name: str
    site: str
    relative: float
    lasts: str
    tokens: tuple[str, ...] | None = None

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "noise", "site": self.site, "relative": self.relative, "lasts": self.lasts}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return [(self.site, NoiseHook(self._longer, [cell.seed for cell in rows], self.lasts))]

    def _longer(self, value: Tensor, hook: HookPoint) -> Tensor:
        """What noise is to be as large as the change of."""
        layout = Layout.of(hook)
        flat = layout.flatten(value)
        mask = chosen_tokens(hook, flat, self.tokens)[..., None]
        return layout.restore(flat.where(~mask, flat * (1 + self.relative)), value)


@dataclass(frozen=True, eq=False)
class JointArm:
    """Several arms of different sites as one."""

    name: str
    parts: tuple[PartArm, ...]

    def describe(self) -> Mapping[str, Any]:
        return {"kind": "together", "parts": [dict(part.describe()) for part in self.parts]}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return [request for part in self.parts for request in part.hooks(rows)]


def level_sizes(
    context: Context, suite: str, sites: Sequence[str], levels: Sequence[float], lasts: str, options: Options,
    episodes: int,
) -> dict[str, dict[float, float]]:  # fmt: skip
    """How long noise must be, over the token's length, to leave a share of a site's variance, for every site and level.

    Measured on the unedited policy: the squared error grows with the square of the length.
    """

    def measure() -> pd.DataFrame:
        arms = [NoiseArm(site, site, 1.0, lasts) for site in sites]
        found = _watch(context, suite, arms, options, episodes)
        return pd.DataFrame([{"site": arm.site, "fvu": found[arm.name]["fvu"]} for arm in arms])

    fvu = {row["site"]: row["fvu"] for row in records(context.table("noise_sizes", measure))}
    return {site: {level: sqrt((1 - level) / fvu[site]) for level in levels} for site in sites}


def measured(
    context: Context, suite: str, arms: Sequence[JointArm], options: Options, episodes: int
) -> dict[str, list[dict[str, Any]]]:
    """How much every arm changes, site by site (`Fidelity`), on the unedited policy's activations."""

    def measure() -> pd.DataFrame:
        parts = [part for arm in arms for part in arm.parts]
        found = _watch(context, suite, parts, options, episodes)
        rows = [
            {"arm": arm.name, "site": part.site, **found[part.name]} for arm in arms for part in arm.parts
        ]  # fmt: skip
        return pd.DataFrame(rows)

    table: dict[str, list[dict[str, Any]]] = {}
    for row in records(context.table("fidelity", measure)):
        table.setdefault(row["arm"], []).append(row)
    return table


def _watch(
    context: Context, suite: str, arms: Sequence[PartArm], options: Options, episodes: int
) -> dict[str, dict[str, Any]]:
    watcher = FidelityWatcher(arms)  # pyright: ignore[reportArgumentType]
    run_rollouts(
        context.model, suite, min(episodes, options.n_envs), context.seed, options=options, name=context.model_name,
        watchers=[watcher],
    )  # fmt: skip
    return {name: found.to_json() for name, found in watcher.result().items()}
