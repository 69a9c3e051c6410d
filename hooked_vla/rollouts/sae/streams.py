"""Forward passes of a policy in closed loop, one at a time: what on-policy sources read from.

The runner is the same as for any rollouts, with the checkpoint's own preprocessing and noise that follows from the
episode's seed, so that a group of episodes run again gives the same rows.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vla.hooks.model import HookRequest
from hooked_vla.rollouts.cells import Cell, Group
from hooked_vla.rollouts.jobs import Job
from hooked_vla.rollouts.records import Part
from hooked_vla.rollouts.runner import Environments, GroupRunner, Watcher
from hooked_vla.rollouts.settings import torch_threads
from hooked_vla.sae.buffer import Position
from hooked_vla.sae.rows import NONE, Capture, Names, Rows, RowTaker, previous_rows
from hooked_vla.sae.source import PREVIOUS
from hooked_vla.vla import HookedVLA


def episodes_of(rows: Sequence[Cell]) -> list[int]:
    """Number of the episode in each row of a batch; NONE in rows that nobody has, which repeat the first."""
    seen: set[int] = set()
    numbers = [NONE if cell.id in seen or seen.add(cell.id) else cell.id for cell in rows]
    return numbers


class _Watch(Watcher):
    """Tells the taker which episodes are in the rows."""

    def __init__(self, taker: RowTaker) -> None:
        self.taker = taker
        self.episodes: list[int] = []

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        self.episodes = episodes_of(rows)
        self.taker.watch(self.episodes)
        return self.taker.requests()


class _PlanRunner(GroupRunner):
    """A runner that also stops after every plan, before its first action is taken: it then yields None."""

    def _carry_out(self, episodes: Sequence[Any], actions: np.ndarray, start: int) -> Iterator[Any]:
        yield None
        yield from super()._carry_out(episodes, actions, start)


class PolicyStream:
    """The forward passes of a job's policy, group by group of episodes.

    group(unit): the cells of a unit, None where there are no more. on_part: told every finished episode, once for
    each time that it runs. The model is the caller's again between two passes: its hooks and clocks are as if nothing
    ran, but for what stays attached and does nothing.
    """

    def __init__(
        self,
        job: Job,
        model: HookedVLA,
        capture: Capture,
        group: Callable[[int], Sequence[Cell] | None],
        previous: bool,
        device: str | torch.device = "cpu",
    ) -> None:
        """Raises as `RowTaker`."""
        self.job, self.model, self.group, self.previous = job, model, group, previous
        self.taker = RowTaker(model, capture, Names(), device)
        self.on_part: Callable[[Part], None] = lambda part: None

    @property
    def groups(self) -> list[list[str]]:
        """Groups of the names that come, see source.py."""
        return [[*sites, *(site + PREVIOUS for site in sites if self.previous)] for sites in self.taker.groups]

    def widths(self) -> dict[str, int]:
        """Width of every name that comes.

        Raises ValueError for a site whose width only its inputs decide.
        """
        found, described = {}, self.model.hook_points
        for site in self.taker.sites:
            known = described[site]
            sizes = known.shape[2:] if len(known.axes) > 2 else known.shape[1:]
            width = 1
            for size in sizes:
                if not isinstance(size, int):
                    raise ValueError(f"{site} is {list(known.shape)}: the width of its tokens is not fixed")
                width *= size
            found |= {site: width} | ({site + PREVIOUS: width} if self.previous else {})
        return {name: found[name] for names in self.groups for name in names}

    def __call__(self, position: Position) -> Iterator[tuple[Position, dict[str, Tensor]]]:
        """The passes from a position on; see buffer.RingBuffer."""
        unit, skip = position
        settings = self.job.settings
        with torch_threads(settings.threads):
            actor = self.job.actor(self.model)
        environments = Environments(
            self.job.suite, tuple(settings.cameras.values()), settings.image_size, 2 * settings.n_envs
        )
        watch = _Watch(self.taker)
        runner = _PlanRunner(
            actor, self.job.suite, self.job.name, settings.n_envs, settings.max_steps, environments, [watch]
        )
        try:
            while (cells := self.group(unit)) is not None:
                there: set[str] = set()
                for number, rows in enumerate(self._passes(runner, watch, Group(unit, tuple(cells)))):
                    there |= {site for site, values in rows.items() if len(values)}
                    if number >= skip:
                        yield (unit, number), rows
                if missing := [sites[0] for sites in self.taker.groups if not there & set(sites)]:
                    # it would be waited for in vain
                    raise ValueError(
                        f"nothing of {missing} came in a whole group of episodes: no token of "
                        f"{list(self.taker.capture.segments or ['any segment'])} at that site"
                    )
                unit, skip = unit + 1, 0
        finally:
            environments.close()

    def _passes(self, runner: GroupRunner, watch: _Watch, group: Group) -> Iterator[dict[str, Tensor]]:
        """Rows of every forward pass of one group of episodes."""
        events, before = runner.run(group), dict[str, Rows]()
        self.taker.take()
        try:
            while True:
                event = self._next(events, watch)
                if event is _OVER:
                    return
                if isinstance(event, Part):
                    self.on_part(event)
                    continue
                taken = self.taker.take()
                yield self._with_previous(before, taken) if self.previous else _values(taken)
                before = taken
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _next(self, events: Iterator[Any], watch: _Watch) -> Any:
        """Run on until the next plan or end of an episode; all that holds only then is undone."""
        state = self.model.run_state
        with torch_threads(self.job.settings.threads):
            if watch.episodes:
                self.taker.watch(watch.episodes)
            try:
                return next(events, _OVER)
            finally:
                self.taker.rest()
                state.env_step, state.in_use = None, None

    def _with_previous(self, before: dict[str, Rows], taken: dict[str, Rows]) -> dict[str, Tensor]:
        """Rows that have an earlier one, and these."""
        found: dict[str, Tensor] = {}
        for sites in self.taker.groups:
            ids = taken[sites[0]].ids
            earlier = torch.full((len(ids),), NONE)
            if before:
                earlier = previous_rows(before[sites[0]].ids, ids)
            kept = (earlier != NONE).nonzero().flatten()
            for site in sites:
                values = taken[site].values
                here = kept.to(values.device)
                found[site] = values[here]
                old = before[site].values if before else values[:0]
                found[site + PREVIOUS] = old[earlier[kept].to(old.device)]
        return found


_OVER = object()


def _values(rows: dict[str, Rows]) -> dict[str, Tensor]:
    return {site: each.values for site, each in rows.items()}
