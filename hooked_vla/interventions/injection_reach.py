"""What an injection can show: whether it is replay, or a dead end, by the graph of hook points and by running.

Names tell what leads where (`cut_set`, and each hook point's `reaches_action`); running two observations under the same
donor tells what names cannot: masks, tokens, and steps.
"""

from dataclasses import dataclass
from typing import Any

import torch

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.kept import kept
from hooked_vla.hooks.model import HookedModel
from hooked_vla.interventions.injection import Donor, Injection, Injector
from hooked_vla.interventions.reach import cut_set

REPLAY, CUT_SET, DEAD_END, OPEN = "replay", "cut set", "dead end", "open"


@dataclass(frozen=True)
class Reach:
    """What was found of an injection.

    cut: what it replaces, of which alone the actions are made, as names tell; None: not known to. dead_end: no action
    depends on what it replaces, as names tell. replays: two observations led to the same actions under it, bit for bit.
    inert: actions were those without it, bit for bit, at both. cuts_prompt: so they were of two observations that
    differ in the prompt alone; None: that was not tried.
    """

    cut: str | None
    dead_end: bool
    replays: bool
    inert: bool
    cuts_prompt: bool | None = None

    @property
    def label(self) -> str:
        """What running shows: "replay", where nothing but the donor counts; "cut set", where nothing that is seen does,
        but the prompt does: masks, which no injection reaches, tell how long it is; "dead end"; or "open", where both
        observation and donor count."""
        if self.replays:
            return CUT_SET if self.cuts_prompt is False else REPLAY
        return DEAD_END if self.inert else OPEN

    @property
    def agrees(self) -> bool:
        """Whether running confirms what names tell. Names need not know every cut."""
        return (self.cut is None or self.replays) and (not self.dead_end or self.inert)


@torch.no_grad()
def find_reach(
    model: Any,
    injection: Injection,
    donor: Donor,
    first: Any,
    second: Any,
    noise: Any,
    env_step: int,
    prompted: Any = None,
) -> Reach:
    """What an injection from `donor` at an environment step can show.

    model: a HookedVLA; first, second: observations of one row that differ in images, state and instruction, but not in
    how many tokens the instruction has, and neither of which is the donor's own; noise: for all runs. prompted: the
    first one with another prompt, of another length where masks shall be tried too; None: prompts are not tried.
    Raises ValueError where the two lead to the same actions without injection, or the injection does not act at
    env_step: nothing could be told.
    """
    if not injection.is_active(env_step):
        raise ValueError(f"the injection does nothing at env_step {env_step}")
    sites = hook_names.resolve(list(injection.sites), list(model.points))
    plain = [model(obs, noise).normalized for obs in (first, second)]
    if torch.equal(*plain):
        raise ValueError("both observations lead to the same actions without injection: they can show nothing")
    with kept(model.run_state, "env_step"), model.hooks(Injector(injection, [donor]).requests()):
        model.run_state.env_step = env_step
        injected = [model(obs, noise).normalized for obs in (first, second)]
        other = None if prompted is None else model(prompted, noise).normalized
    return Reach(
        cut=cut_set(model, sites) if injection.is_whole else None,
        dead_end=is_dead_end(model, sites),
        replays=torch.equal(*injected),
        inert=all(torch.equal(a, b) for a, b in zip(plain, injected, strict=True)),
        cuts_prompt=None if other is None else torch.equal(injected[0], other),
    )


def is_dead_end(model: HookedModel, sites: list[str]) -> bool:
    """Whether no action depends on any of these hook points, as their names tell."""
    return not any(model.hook_points[site].reaches_action for site in sites)
