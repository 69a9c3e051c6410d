"""What a sweep patches and between which runs: cells (site × segment × denoise step), and a base run with a donor."""

import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vla.analysis.patching_resume import Noise, Tape, settled_noise
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ActivationCache
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.sites import HookSite
from hooked_vla.inputs import ModelInputs, Segments
from hooked_vla.interventions import CutSetWarning, DeadEndWarning, Patch, Values, cut_set

# (edited, base, donor), each [row ...] of what a run came to -> one number a row
Metric = Callable[[Tensor, Tensor, Tensor], Tensor]
Direction = Literal["denoising", "noising"]
RESIDUALS = ("*.hook_resid_pre", "*.hook_resid_mid", "*.hook_resid_post")


@dataclass(frozen=True)
class Cell:
    """One patch: at a site, in one segment of its tokens (None: all), at one denoise step (None: all)."""

    site: str
    segment: str | None
    denoise_step: int | None

    @property
    def steps(self) -> tuple[int, ...] | None:
        return None if self.denoise_step is None else (self.denoise_step,)

    def describe(self) -> dict[str, Any]:
        """As columns of a table."""
        return {
            "site": self.site,
            "pathway": hook_names.pathway(self.site),
            "layer": hook_names.layer(self.site),
            "point": hook_names.leaf(self.site).removeprefix("hook_"),
            "segment": "all" if self.segment is None else self.segment,
            "denoise_step": self.denoise_step,
        }


def plan_cells(
    model: HookedModel,
    segments: dict[str, Segments],
    sites: NamesFilter,
    wanted: Sequence[str | None] | None,
    denoise_steps: Sequence[int] | None,
) -> list[Cell]:
    """The cells of a sweep, in the order of the model.

    segments: of the base run's streams. wanted: segments, of which each site gets those that its stream has ("image:*":
    all cameras as one; None among them: all tokens); None: each of them. denoise_steps: a cell for each of these at
    sites that run repeatedly; None: one for all steps.
    Raises KeyError for an unknown site, ValueError for segments that no site has, steps that the model does not have,
    and sites that all rows of a batch share.
    """
    names = hook_names.resolve(sites, list(model.points))
    about = model.hook_points
    if shared := [name for name in names if about[name].axes[0] not in ("batch", "image", "window")]:
        raise ValueError(f"all rows of a batch share {shared[:3]}: they cannot be patched row by row")
    steps = None if denoise_steps is None else list(denoise_steps)
    if outside := [step for step in steps or [] if not 0 <= step < model.n_denoise_steps]:
        raise ValueError(f"denoise_steps {outside}: this model's are 0..{model.n_denoise_steps - 1}")
    cells, there = list[Cell](), set[str]()
    for name in names:
        own = _segments_of(model, name, segments)
        chosen = own if wanted is None else [each for each in wanted if each is None or _among(each, own)]
        there.update(each for each in own if each is not None)
        each_step = steps if steps is not None and about[name].denoised else [None]
        cells += [Cell(name, segment, step) for segment in chosen for step in each_step]
    if missing := [each for each in wanted or [] if each is not None and not _among(each, there)]:
        raise ValueError(f"segments {missing}: no site of the sweep has them; they have {sorted(there)}")
    if not cells:
        raise ValueError(f"nothing to patch: {names[:3]} have the segments {sorted(there)}, wanted were {wanted}")
    return cells


def _among(segment: str, own: Collection[str | None]) -> bool:
    """Whether a segment, or one of several under a name that ends in "*", is among a stream's."""
    prefix = segment.removesuffix("*")
    return segment in own or (prefix != segment and any(each is not None and each.startswith(prefix) for each in own))


def _segments_of(model: HookedModel, site: str, segments: dict[str, Segments]) -> Sequence[str | None]:
    """Segments along the site's token axis; [None] where it has none."""
    stream = _stream(model, site)
    return [None] if stream is None else segments[stream].present()


def _stream(model: HookedModel, site: str) -> str | None:
    streams = model.points[site].streams
    return next((streams[axis] for axis in ("seq", "query", "prefix") if axis in streams), None)


@dataclass
class Runs:
    """A base run, which is patched, and a donor run, which the patches come from: same noise, paired row by row.

    noise: every draw in order. read: the hook point that metrics compare, None: the normalised actions.
    """

    model: HookedModel
    base: ModelInputs
    donor: ModelInputs
    noise: tuple[Tensor, ...]
    read: str | None
    donor_cache: ActivationCache = field(init=False)
    donor_came_to: Tensor = field(init=False)
    _sources: dict[tuple[str, str | None, int], Values] = field(default_factory=dict, init=False, repr=False)
    _donor_rows: dict[int, ActivationCache] = field(default_factory=dict, init=False, repr=False)
    _replays: dict[str, str] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls, model: HookedModel, clean: Any, corrupted: Any, direction: Direction, noise: Noise, read: str | None
    ) -> "Runs":
        """denoising: the corrupted run is patched from the clean one; noising: the clean one from the corrupted.

        Raises ValueError for another direction, for different numbers of rows, and for a point `read` that rows share.
        """
        if direction not in ("denoising", "noising"):
            raise ValueError(f"direction must be 'denoising' or 'noising', got {direction!r}")
        base, donor = (corrupted, clean) if direction == "denoising" else (clean, corrupted)
        runs = cls(model, model.prepare(base), model.prepare(donor), settled_noise(noise), read)
        if runs.base.batch_size != runs.donor.batch_size:
            raise ValueError(
                f"clean and corrupted have to be paired row by row, but have {model.prepare(clean).batch_size} and "
                f"{model.prepare(corrupted).batch_size} rows"
            )
        for name in hook_names.resolve(runs.reads, list(model.points)):
            if model.points[name].axes[0] != "batch":
                raise ValueError(f"read: {name} has no row for each row of the batch")
        return runs

    @property
    def rows(self) -> int:
        """How many pairs of runs."""
        return self.base.batch_size

    @cached_property
    def segments(self) -> dict[str, Segments]:
        """Of the base run's streams."""
        return dict(self.model.segments(self.base))

    @cached_property
    def donor_segments(self) -> dict[str, Segments]:
        """Of the donor run's streams."""
        return dict(self.model.segments(self.donor))

    @property
    def reads(self) -> list[str]:
        """The hook point that metrics compare, if it is one."""
        return [] if self.read is None else [self.read]

    def run_donor(self, sites: Sequence[str]) -> None:
        """Run the donor, and keep what it has at the sites."""
        wanted = [*sites, *(name for name in self.reads if name not in sites)]
        with torch.no_grad():
            actions, cache = self.model.run_with_cache(self.donor, wanted, noise=list(self.noise))
        assert actions is not None
        self.donor_cache = cache
        self.donor_came_to = self.came_to(actions.normalized, cache)

    def came_to(self, actions: Tensor, cache: ActivationCache) -> Float[Tensor, "row ..."]:
        """What metrics compare of a run; rows first, then denoise steps."""
        if self.read is None:
            return actions
        value = cache[self.read]
        return value.movedim(1, 0) if hook_names.is_denoised(self.read) else value * 1

    def run(self, lists: Sequence[Sequence[Any]], tape: Tape | None) -> Float[Tensor, "row ..."]:
        """What metrics compare, for rows under their own edits; resumed from the tape where there is one."""
        n = len(lists) // self.rows
        inputs = self.base.rows(list(range(self.rows)) * n)
        noise = [each.repeat(n, *[1] * (each.ndim - 1)) for each in self.noise]
        listed = [list(each) for each in lists]
        with torch.no_grad(), quiet(), nullcontext() if tape is None else tape.resumed(n):
            actions, cache = self.model.run_with_cache(
                inputs, self.reads, noise=noise, edits=listed if any(listed) else []
            )
        assert actions is not None
        return self.came_to(actions.normalized, cache)

    def patches(self, cell: Cell, strength: float | None = None) -> list[list[Patch]]:
        """The cell's patch, for each pair of runs; none for a pair whose base run has no such tokens."""
        return [
            [Patch(cell.site, self.source(cell, pair), strength, tokens=cell.segment, denoise=cell.steps)]
            if self.has(cell, pair)
            else []
            for pair in range(self.rows)
        ]

    def has(self, cell: Cell, pair: int) -> bool:
        """Whether the base run of the pair has tokens of the segment."""
        mask = self.mask(cell, pair)
        return mask is None or bool(mask.any())

    def mask(self, cell: Cell, pair: int) -> Bool[Tensor, "row place"] | None:
        """The cell's tokens in the pair's rows of the base run's stream; None: all that there are."""
        stream = _stream(self.model, cell.site)
        if cell.segment is None or stream is None:
            return None
        mask = self.segments[stream].mask(cell.segment)
        each = len(mask) // self.rows
        return mask[pair * each : (pair + 1) * each]

    def source(self, cell: Cell, pair: int) -> Values:
        """What the donor of a pair has there: the whole stream where both runs' are equally long, so that tokens keep
        their places; else the segment's tokens, in their order.

        Raises ValueError where these are not equally many.
        """
        stream, row_axis = _stream(self.model, cell.site), self.model.points[cell.site].axes[0]
        segment = cell.segment
        whole = segment is None or stream is None
        if segment is not None and stream is not None and row_axis == "batch":
            tables = self.segments[stream], self.donor_segments[stream]
            whole = tables[0].labels.shape[1] == tables[1].labels.shape[1]
            counts = [int(table.mask(segment)[pair].sum()) for table in tables]
            if not whole and counts[0] != counts[1]:
                raise ValueError(
                    f"{cell.site}: the segment {cell.segment!r} has {counts[0]} tokens in the run that is patched and "
                    f"{counts[1]} in the one that the patch comes from (pair {pair}): use prompts of equal length"
                )
        key = (cell.site, None if whole else cell.segment, pair)
        if key not in self._sources:
            if pair not in self._donor_rows:
                self._donor_rows[pair] = self.donor_cache.rows(pair)
            value: Any = self._donor_rows[pair][cell.site]
            self._sources[key] = Values(value if whole else value.segment(cell.segment), "source")
        return self._sources[key]

    def caveats(self, cell: Cell) -> dict[str, Any]:
        """Whether the patch can reach the action, and whether it leaves nothing but the donor (replay)."""
        stream = _stream(self.model, cell.site)
        whole = cell.segment is None or (stream is not None and self.segments[stream].present() == [cell.segment])
        replaces_all = whole and (cell.denoise_step is None or self.model.n_denoise_steps == 1)
        return {
            "reaches_action": self._sites[cell.site].reaches_action,
            "replay": self._replay(cell.site) if replaces_all else "",
        }

    @cached_property
    def _sites(self) -> dict[str, HookSite]:
        return self.model.hook_points

    def _replay(self, site: str) -> str:
        """Why replacing all of a site is replay; empty where it is not."""
        if site not in self._replays:
            # the model would work out all of its points anew for every site
            known: Any = SimpleNamespace(points=self.model.points, hook_points=self._sites)
            self._replays[site] = cut_set(known, {site}) or ""
        return self._replays[site]


@contextmanager
def quiet() -> Iterator[None]:
    """No warnings of dead ends and cut sets: tables say so cell by cell."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadEndWarning)
        warnings.simplefilter("ignore", CutSetWarning)
        yield
