"""Injection: what hook points held in one episode (the donor) is put into another one while that runs.

Values find each other by environment step, denoise step, hook point and token. Nothing is skipped in silence: a donor
that lacks a step, a value of another shape or dtype, and segments of different lengths are errors; what happens when
the donor's recording has ended is always said.

>>> _, cache = model.run_with_cache(other_obs, "vlm.blocks.*.hook_resid_post", noise)
>>> donor = Donor.from_caches("other", {0: cache})
>>> injection = Injection("vlm.blocks.*.hook_resid_post", "error", tokens="language")
>>> with model.hooks(Injector(injection, [donor]).requests()):
...     model.run_state.env_step = 0
...     model(obs, noise)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ActivationCache
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import Segments
from hooked_vla.interventions.injection_tokens import EQUAL, Align, Pairs, check_align, describe_align, pair_places
from hooked_vla.interventions.places import Layout
from hooked_vla.interventions.where import Names, Places, Steps, Window, names, places, windows

# what happens at environment steps after the donor's last one
STOP, HOLD, ERROR = "stop", "hold", "error"
EXHAUSTION = (STOP, HOLD, ERROR)


class ExhaustedError(RuntimeError):
    """The donor's recording has ended, and the injection says that this is an error."""


@dataclass(frozen=True)
class Injection:
    """What is taken from a donor, and when.

    sites: hook points, by names or globs. exhaustion: at environment steps after the donor's last one, "stop" injects
    nothing any more, "hold" goes on with its last values, "error" raises ExhaustedError.
    tokens: segments of the token axis ("language", "image:*", ...); positions: places along it, the same in both
    episodes; with both, those that are in both. align: which of the donor's tokens goes where when a segment has
    another number of tokens there; see injection_tokens.py.
    denoise: denoise steps. env: environment steps at which a chunk is planned, as edits have them (`range(0, 8)`,
    `Window(8)`), not forward passes. None stands for all.
    Raises ValueError and TypeError naming the field.
    """

    sites: Names
    exhaustion: str
    tokens: Names | None = field(default=None, kw_only=True)
    positions: Places | None = field(default=None, kw_only=True)
    align: Align = field(default=EQUAL, kw_only=True)
    denoise: Places | None = field(default=None, kw_only=True)
    env: Steps | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.exhaustion not in EXHAUSTION:
            raise ValueError(f"exhaustion must be one of {', '.join(EXHAUSTION)}, got {self.exhaustion!r}")
        normal = {
            "sites": names(self.sites, "sites"),
            "tokens": names(self.tokens, "tokens"),
            "positions": places(self.positions, "positions"),
            "align": check_align(self.align, self.tokens is not None),
            "denoise": places(self.denoise, "denoise"),
            "env": windows(self.env),
        }
        if normal["sites"] is None:
            raise ValueError("sites is missing")
        for key, value in normal.items():
            object.__setattr__(self, key, value)

    @property
    def windows(self) -> tuple[Window, ...] | None:
        """The environment steps, in as few windows as possible."""
        return self.env  # pyright: ignore[reportReturnType]

    def is_active(self, env_step: int) -> bool:
        """Whether anything is injected into a chunk that is planned at this environment step."""
        return self.windows is None or any(env_step in window for window in self.windows)

    @property
    def is_whole(self) -> bool:
        """Whether nothing of a value is left, in any place, at any denoise step."""
        return self.tokens is None and self.positions is None and self.denoise is None

    def describe(self) -> dict[str, Any]:
        """As JSON-serialisable data."""
        env = None if self.windows is None else [[window.start, window.stop] for window in self.windows]
        listed = {key: None if (value := getattr(self, key)) is None else list(value)
                  for key in ("sites", "tokens", "positions", "denoise")}  # fmt: skip
        return {**listed, "exhaustion": self.exhaustion, "align": describe_align(self.align), "env": env}


@dataclass(frozen=True)
class Held:
    """What a hook point held at one environment step, for a batch of one row.

    value: [step, ...], the hook point's axes behind; one entry where the value is the same at every step. steps: the
    denoise steps that were recorded, None at a point that runs once a chunk. segments: of its place axis, if any.
    """

    value: Shaped[Tensor, " step *value"]
    steps: tuple[int, ...] | None
    segments: Segments | None

    def index(self, step: int | None) -> int:
        """Where `value` has a denoise step. Raises KeyError for one that was not recorded."""
        if self.steps is None:
            return 0
        if step not in self.steps:
            raise KeyError(f"denoise step {step} was not recorded; recorded: {list(self.steps)}")
        return 0 if len(self.value) == 1 else self.steps.index(step)

    @property
    def nbytes(self) -> int:
        return self.value.numel() * self.value.element_size()


@dataclass(frozen=True, eq=False)
class Donor:
    """An episode that values are taken from. name: what messages call it; held: hook point -> env step -> value."""

    name: str
    held: Mapping[str, Mapping[int, Held]]

    @classmethod
    def from_caches(cls, name: str, caches: Mapping[int, ActivationCache], row: int = 0) -> "Donor":
        """One batch row of caches; caches: environment step -> what was cached there."""
        held: dict[str, dict[int, Held]] = {}
        for env_step, cache in caches.items():
            part = cache.rows(row)
            for site in [*part, *part.aliases]:
                entry, value = part.entries[part.aliases.get(site, site)], part[site]
                axes = entry.axes if entry.steps is None else entry.axes[1:]
                streams = [entry.streams[axis] for axis in ("seq", "query", "prefix") if axis in axes]
                segments = part.segments[streams[0]] if streams else None
                if entry.steps is None:
                    value = value[None]
                elif value.stride(0) == 0:
                    # one tensor served every step
                    value = value[:1]
                held.setdefault(site, {})[env_step] = Held(value, entry.steps, segments)
        return cls(name, held)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for steps in self.held.values() for each in steps.values())

    def find(self, site: str, env_step: int, exhaustion: str) -> Held | None:
        """What the site held at the environment step; None where the recording has ended and the policy is "stop".

        Raises ExhaustedError where it has ended and the policy is "error"; KeyError for a site that was not recorded,
        or a step that was not although later ones were.
        """
        at = self.held.get(site)
        if not at:
            raise KeyError(f"{site} was not recorded of {self.name}; nearest: {hook_names.nearest(site, self.held)}")
        if env_step in at:
            return at[env_step]
        last = max(at)
        if env_step < last:
            raise KeyError(
                f"{site} was not recorded at env_step {env_step} of {self.name}; recorded: {sorted(at)[:50]}: donor "
                "and target must plan at the same steps (n_action_steps)"
            )
        if exhaustion == ERROR:
            raise ExhaustedError(
                f"the recording of {self.name} ends at env_step {last}, but the target goes on at {env_step}: choose "
                f"exhaustion={STOP!r} or {HOLD!r}, or a longer donor"
            )
        return at[last] if exhaustion == HOLD else None


@dataclass(frozen=True)
class _Plan:
    """What happens at one hook point in one forward pass. chosen: which places change, None for all of the value."""

    values: Sequence[Tensor]
    steps: Held
    chosen: Bool[Tensor, "..."] | None


class Injector:
    """An injection into a batch, as hook functions.

    donors: of every batch row; None: nothing is injected into that row. Rows whose episode is over are left alone
    (`run_state.in_use`). While it acts, `run_state.env_step` must say the environment step.
    """

    def __init__(self, injection: Injection, donors: Sequence[Donor | None], label: str = "injection") -> None:
        """label: what messages call it. Raises ValueError for no donor at all."""
        if not any(donor is not None for donor in donors):
            raise ValueError(f"{label}: no row has a donor")
        self.injection, self.donors, self.label = injection, tuple(donors), label
        self._plans: dict[str, _Plan | None] = {}
        self._placed_for: object = None

    def requests(self) -> list[HookRequest]:
        """Hook patterns and functions, as `model.hooks` takes them."""
        return [(list(self.injection.sites), self)]

    def __repr__(self) -> str:
        return self.label

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        step, denoise = hook.denoise_step, self.injection.denoise
        if denoise is not None:
            if step is None:
                raise ValueError(f"{self.label}: denoise: {hook.name} runs once per chunk, not at denoise steps")
            if step not in denoise:  # pyright: ignore[reportOperatorIssue]
                return None
        plan = self._plan(value, hook)
        if plan is None:
            return None
        try:
            index = plan.steps.index(step)
        except KeyError as error:
            raise KeyError(f"{self.label}: {hook.name}: {error.args[0]}") from None
        source = plan.values[min(index, len(plan.values) - 1)]
        # a copy: hooks that follow may change it in place
        return source.clone() if plan.chosen is None else torch.where(plan.chosen, source, value)

    def _plan(self, value: Tensor, hook: HookPoint) -> _Plan | None:
        """What to do at this point in this forward pass; made when it is first reached."""
        run = hook.run
        if self._placed_for is not run.segments:
            self._plans, self._placed_for = {}, run.segments
        if hook.name not in self._plans:
            if run.env_step is None:
                raise RuntimeError(
                    f"{self.label}: the environment step is not known; whoever drives the rollout sets "
                    "model.run_state.env_step"
                )
            active = self.injection.is_active(run.env_step)
            self._plans[hook.name] = self._make(value, hook, run.env_step) if active else None
        return self._plans[hook.name]

    def _make(self, value: Tensor, hook: HookPoint, env_step: int) -> _Plan | None:
        layout, found = Layout.of(hook), self._find(hook, env_step)
        if not any(held is not None for held in found):
            return None
        if not layout.has_rows:
            raise ValueError(f"{self.label}: all rows share {hook.name} ({' '.join(hook.axes)}): it cannot be injected")
        each = value.shape[0] // len(self.donors)
        there = [held for held in found if held is not None]
        if any(held.steps != there[0].steps for held in there):
            raise ValueError(f"{self.label}: {hook.name}: donors were recorded at different denoise steps")
        recorded, n = there[0].steps, hook.run.n_denoise_steps
        if recorded is not None and n is not None and max(recorded) >= n:
            raise ValueError(
                f"{self.label}: {hook.name} was recorded at denoise step {max(recorded)}, but the target has {n}: "
                "donor and target must denoise in as many steps"
            )
        for donor, held in zip(self.donors, found, strict=True):
            if held is not None:
                self._check(value, hook, held, each, donor)
        if self.injection.tokens is None and self.injection.positions is None:
            return self._whole(value, found, each, there[0])
        return self._placed(value, hook, layout, found, each, there[0])

    def _find(self, hook: HookPoint, env_step: int) -> list[Held | None]:
        """What each batch row gets."""
        in_use = hook.run.in_use
        if in_use is None or len(in_use) != len(self.donors):
            in_use = [True] * len(self.donors)
        found: list[Held | None] = []
        for donor, used in zip(self.donors, in_use, strict=True):
            try:
                held = None if donor is None or not used else donor.find(hook.name, env_step, self.injection.exhaustion)
            except (KeyError, ExhaustedError) as error:
                raise type(error)(f"{self.label}: {error.args[0]}") from None
            found.append(held)
        return found

    def _check(self, value: Tensor, hook: HookPoint, held: Held, each: int, donor: Donor | None) -> None:
        """Raises ValueError where the donor's value does not fit; its token axes may differ if tokens are chosen."""
        here, there = [each, *value.shape[1:]], list(held.value.shape[1:])
        differ = {i for i, (a, b) in enumerate(zip(here, there, strict=False)) if a != b}
        if self.injection.tokens is not None:
            differ.discard(Layout.of(hook).place or 0)
        name = "" if donor is None else f" of {donor.name}"
        if len(here) != len(there) or differ:
            raise ValueError(
                f"{self.label}: {hook.name} ({' '.join(hook.axes)}) is {here} for a row of the target, but {there} in "
                f"the recording{name}"
            )
        if held.value.dtype != value.dtype:
            raise ValueError(
                f"{self.label}: {hook.name} is {value.dtype} in the target, but {held.value.dtype} in the recording"
                f"{name}: record it as it is"
            )

    def _whole(self, value: Tensor, found: Sequence[Held | None], each: int, first: Held) -> _Plan:
        """All places of the rows that have a donor."""
        n = max(len(held.value) for held in found if held is not None)
        blank = torch.zeros(1, each, *value.shape[1:], dtype=value.dtype, device=value.device)
        parts = [(blank if held is None else held.value.to(value.device)).expand(n, -1, *value.shape[1:])
                 for held in found]  # fmt: skip
        chosen = None
        if any(held is None for held in found):
            rows = torch.tensor([held is not None for held in found], device=value.device).repeat_interleave(each)
            chosen = rows.view(-1, *[1] * (value.ndim - 1))
        return _Plan(torch.cat(parts, dim=1).unbind(0), first, chosen)

    def _placed(
        self, value: Tensor, hook: HookPoint, layout: Layout, found: Sequence[Held | None], each: int, first: Held
    ) -> _Plan:
        """The tokens that segments and positions choose, each from where the donor has its partner."""
        pairs = self._pairs(hook, layout, found, each, value)
        flat = layout.flatten(value)
        n = max(len(held.value) for held in found if held is not None)
        sources = flat.new_zeros(n, *flat.shape)
        mask = torch.zeros(flat.shape[:2], dtype=torch.bool, device=flat.device)
        for row, (held, of_row) in enumerate(zip(found, pairs, strict=True)):
            if held is not None:
                given = layout.flatten(held.value.flatten(0, 1).to(flat.device)).unflatten(0, (-1, each))
                for i, (theirs, ours) in enumerate(of_row):
                    mask[row * each + i, ours] = True
                    sources[:, row * each + i, ours] = given[:, i, theirs]
        chosen = layout.restore(mask[..., None].expand_as(flat).to(value.dtype), value).bool()
        return _Plan([layout.restore(source, value) for source in sources], first, chosen)

    def _pairs(
        self, hook: HookPoint, layout: Layout, found: Sequence[Held | None], each: int, value: Tensor
    ) -> list[list[Pairs]]:
        """Of every batch row and each of its rows in the value: the donor's places and the target's."""
        if layout.place is None:
            raise ValueError(f"{self.label}: {hook.name} ({' '.join(hook.axes)}) has no places to choose from")
        axis, length, here = layout.axes[layout.place], value.shape[layout.place], None
        if axis in hook.streams:
            here = hook.run.segments[hook.streams[axis]].to(torch.device("cpu"))
        label, listed = f"{self.label}: {hook.name}", []
        for row, held in enumerate(found):
            rows = range(0 if held is None else each)
            listed.append([pair_places(self.injection, held, here, row * each + i, i, length, label) for i in rows])
        if not any(len(ours) for of_row in listed for _, ours in of_row):
            present = "" if here is None else f"; its stream has {here.present()}"
            raise ValueError(
                f"{self.label}: nothing is left to inject at {hook.name} of tokens {self.injection.tokens}, positions "
                f"{self.injection.positions}{present}"
            )
        return listed
