"""From what hooks see to rows of width d, each with ids that say whose activation it is.

    episode        as the run numbers it
    env_step       environment step at which the policy planned
    denoise_step   of sites that run at every one; NONE elsewhere
    segment        number of the token segment's name; NONE for a mean over several, and at sites without segments
    camera         number of the camera's name, of image tokens; NONE elsewhere
    position       place of the token in one batch row's value, its row axis (images, windows) counted first:
                   value[of that row].flatten(0, 1)[position]; NONE for a mean

Padding, rows whose episode is over and rows that no episode has are left out. What a token holds besides channels
(heads) is one vector. Pooling: "token" keeps every token; "mean" one row, the mean of all tokens; "segment_mean" one
row a segment. Means are taken in float32.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int32, Int64
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ROW_AXES, TOKEN_AXES
from hooked_vla.hooks.model import HookedModel, HookRequest
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import PAD, Segments, image_segment
from hooked_vla.sae.source import check_finite

IDS = ("episode", "env_step", "denoise_step", "segment", "camera", "position")
NONE = -1
POOLING = ("token", "mean", "segment_mean")
_CAMERA = image_segment("")
_STEP, _SEGMENT, _CAMERA_COLUMN, _POSITION = 2, 3, 4, 5


class Rows(NamedTuple):
    """Rows of one site and their ids, columns as in IDS."""

    values: Float[Tensor, "n d"]
    ids: Int32[Tensor, "n 6"]


@dataclass
class Names:
    """Names that ids count, in the order in which they first came."""

    segment: list[str] = field(default_factory=list)
    camera: list[str] = field(default_factory=list)

    def number(self, kind: str, name: str) -> int:
        """The number of a name, a new one where it has none."""
        known: list[str] = getattr(self, kind)
        if name not in known:
            known.append(name)
        return known.index(name)

    def to_json(self) -> dict[str, list[str]]:
        return {"segment": list(self.segment), "camera": list(self.camera)}


@dataclass(frozen=True)
class Capture:
    """Which activations are taken, and how.

    sites: as `model.add_hook` takes them. pooling: see POOLING. segments: names or globs of the token segments that
    count, all where None. denoise_steps: only these, of sites that have them. dtype: of what is kept, the site's own
    where None.
    """

    sites: NamesFilter
    pooling: str = "token"
    segments: tuple[str, ...] | None = None
    denoise_steps: frozenset[int] | None = None
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for an unknown pooling, and for a dtype that is not floating."""
        if self.pooling not in POOLING:
            raise ValueError(f"unknown pooling {self.pooling!r}; choose one of {list(POOLING)}")
        if self.dtype is not None and not self.dtype.is_floating_point:
            raise ValueError(f"activations are kept in a floating dtype, got {self.dtype}")

    def to_json(self) -> dict[str, Any]:
        """For manifests; the sites are named there one by one."""
        return {
            "pooling": self.pooling,
            "segments": None if self.segments is None else list(self.segments),
            "denoise_steps": None if self.denoise_steps is None else sorted(self.denoise_steps),
            "dtype": None if self.dtype is None else str(self.dtype).removeprefix("torch."),
        }


def site_groups(model: HookedModel, sites: NamesFilter) -> list[list[str]]:
    """The selected sites by group: those of a group have a row for the same tokens in every forward pass.

    Raises KeyError with the nearest names for a site that the model does not have; ValueError for one whose values are
    not vectors of tokens that belong to a batch row, such as attention patterns.
    """
    groups: dict[tuple[str | None, ...], list[str]] = {}
    for name in hook_names.resolve(sites, list(model.points)):
        groups.setdefault(_kind(model.points[name]), []).append(name)
    return list(groups.values())


def _kind(point: HookPoint) -> tuple[str | None, ...]:
    """What sites of one group have in common: rows, tokens, and how often they run."""
    axes: list[str] = list(point.axes)
    streams = point.streams
    token = axes[1] if len(axes) > 2 else None
    vectors = set(axes[2:] if token else axes[1:]).isdisjoint({*TOKEN_AXES, "query_channel", "key_channel"})
    if axes[0] not in ROW_AXES or not vectors or (len(axes) > 3 and token not in streams):
        raise ValueError(
            f"{point.name} has axes {' '.join(axes)!r}: an autoencoder needs vectors, one for each token of a batch row"
        )
    looped = hook_names.pathway(point.name) if hook_names.is_denoised(point.name) else None
    return axes[0], token, streams.get(token or ""), looped


class _Places(NamedTuple):
    """Where a forward pass has rows in the values of a group's sites.

    index: into [row·token]. counts: tokens of each pooled row, None where tokens are kept as they are. ids: complete
    but for the denoise step.
    """

    index: Int64[Tensor, " tokens"]
    counts: Int64[Tensor, " n"] | None
    ids: Int32[Tensor, "n 6"]


class RowTaker:
    """Attached to a model's sites, takes their rows; `take` hands over those of the last forward pass.

    groups: see `site_groups`. widths: known once the sites were seen. It only looks on between `watch` and `rest`.
    """

    def __init__(self, model: HookedModel, capture: Capture, names: Names, device: str | torch.device = "cpu") -> None:
        """device: where rows are kept. Raises as `site_groups`; ValueError for denoise steps that are none of the
        model's, or that no site has."""
        self.capture, self.names, self.device = capture, names, torch.device(device)
        self.groups = site_groups(model, capture.sites)
        self._group = {site: number for number, sites in enumerate(self.groups) for site in sites}
        self._check_steps(model)
        self._episodes: Int64[Tensor, " batch"] | None = None
        self._seen: dict[str, list[Rows]] = {}
        self._places: dict[int, tuple[Segments | None, _Places]] = {}
        self._ids: dict[tuple[int, int | None], Tensor] = {}

    @property
    def sites(self) -> list[str]:
        return list(self._group)

    def requests(self) -> list[HookRequest]:
        """What `HookedModel.hooks` is to attach."""
        return [(self.sites, self._keep)]

    def watch(self, episodes: Sequence[int]) -> None:
        """Take rows from now on. episodes: number of the episode in each batch row, NONE where its rows are not
        wanted."""
        self._episodes = torch.tensor(episodes)

    def rest(self) -> None:
        """Take nothing until `watch` is called again."""
        self._episodes = None

    def take(self) -> dict[str, Rows]:
        """Rows of every site since this was last called; nothing where the model did not run."""
        taken, self._seen, self._places, self._ids = self._seen, {}, {}, {}
        if not taken:
            return {}
        if missing := [site for site in self._group if site not in taken]:
            raise RuntimeError(f"sites that did not run in a forward pass: {missing[:5]}")
        found = {}
        for sites in self.groups:
            parts = [each.ids for each in taken[sites[0]]]
            ids = torch.cat(parts)
            for site in sites:
                own = taken[site]
                if not all(each.ids is part for each, part in zip(own, parts, strict=True)):
                    raise RuntimeError(f"{site} ran at other steps than {sites[0]}")
                found[site] = Rows(torch.cat([each.values for each in own]), ids)
        return found

    def _check_steps(self, model: HookedModel) -> None:
        steps = self.capture.denoise_steps
        if steps is None:
            return
        if wrong := sorted(step for step in steps if not 0 <= step < model.n_denoise_steps):
            raise ValueError(f"no denoise steps {wrong}: the model has 0..{model.n_denoise_steps - 1}")
        if not any(hook_names.is_denoised(site) for site in self._group) or not steps:
            raise ValueError(f"denoise steps {sorted(steps)} of sites that have none: {self.sites[:5]}")

    @torch.no_grad()
    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        """Called by the model with a site's value."""
        episodes, step = self._episodes, hook.denoise_step
        wanted = self.capture.denoise_steps
        if episodes is None or (step is not None and wanted is not None and step not in wanted):
            return
        if not value.is_floating_point():
            raise ValueError(f"{hook.name} holds {value.dtype}: an autoencoder needs floating activations")
        flat = value.reshape(value.shape[0] * (value.shape[1] if value.ndim > 2 else 1), -1)
        places = self._places_of(value, hook, episodes)
        rows = flat.index_select(0, places.index.to(value.device))
        if places.counts is not None:
            # in order of the rows, without atomics: the same bits every time
            rows = torch.segment_reduce(rows.float(), "mean", lengths=places.counts.to(value.device), axis=0)
        rows = rows.to(self.device, self.capture.dtype or value.dtype)
        ids = self._ids_of(self._group[hook.name], step, places)
        try:
            check_finite(hook.name, rows)
        except ValueError as error:
            bad = int((~rows.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"{error} ({describe(ids[bad].tolist(), self.names)})") from None
        self._seen.setdefault(hook.name, []).append(Rows(rows, ids))

    def _ids_of(self, group: int, step: int | None, places: _Places) -> Int32[Tensor, "n 6"]:
        """The same tensor for all sites of a group."""
        if (group, step) not in self._ids:
            ids = places.ids.clone()
            ids[:, _STEP] = NONE if step is None else step
            self._ids[group, step] = ids
        return self._ids[group, step]

    def _places_of(self, value: Tensor, hook: HookPoint, episodes: Int64[Tensor, " batch"]) -> _Places:
        """The same for all sites of a group and all denoise steps of a forward pass, so it is worked out once."""
        group, stream = self._group[hook.name], hook.streams.get(hook.axes[1]) if value.ndim > 2 else None
        segments = None if stream is None else hook.run.segments[stream]
        known = self._places.get(group)
        if known is None or known[0] is not segments:
            n_tokens = value.shape[1] if value.ndim > 2 else 1
            if hook.run.env_step is None:
                raise RuntimeError(f"{hook.name} was seen outside a rollout: there is no environment step")
            in_use = torch.ones(len(episodes), dtype=torch.bool)
            if hook.run.in_use is not None:
                in_use = torch.tensor(hook.run.in_use)
            places = self._find((value.shape[0], n_tokens), segments, episodes, in_use, hook.run.env_step)
            known = self._places[group] = segments, places
        return known[1]

    def _find(
        self,
        shape: tuple[int, int],
        segments: Segments | None,
        episodes: Int64[Tensor, " batch"],
        in_use: Bool[Tensor, " batch"],
        env_step: int,
    ) -> _Places:
        """shape: of the value, rows and tokens."""
        n_rows, n_tokens = shape
        per_row = n_rows // len(episodes)
        row = torch.arange(n_rows)[:, None].expand(shape)
        position = (row % per_row) * n_tokens + torch.arange(n_tokens)
        batch_row = row // per_row
        label, camera, keep = self._owners(shape, segments)
        keep = keep & (in_use & (episodes != NONE))[batch_row]
        index = (row * n_tokens + torch.arange(n_tokens))[keep]
        columns = [episodes[batch_row[keep]], torch.full((len(index),), env_step), torch.full((len(index),), NONE),
                   label[keep], camera[keep], position[keep]]  # fmt: skip
        ids = torch.stack(columns, 1).to(torch.int32)
        if self.capture.pooling == "token":
            return _Places(index, None, ids)
        ids[:, _POSITION] = NONE
        if self.capture.pooling == "mean":
            ids[:, _SEGMENT : _CAMERA_COLUMN + 1] = NONE
        owner = batch_row[keep] * (len(self.names.segment) + 1) + ids[:, _SEGMENT] + 1
        order = owner.argsort(stable=True)
        _, counts = owner[order].unique_consecutive(return_counts=True)
        firsts = counts.cumsum(0) - counts
        return _Places(index[order], counts, ids[order][firsts])

    def _owners(
        self, shape: tuple[int, int], segments: Segments | None
    ) -> tuple[Int[Tensor, "row token"], Int[Tensor, "row token"], Bool[Tensor, "row token"]]:
        """Numbers of segment and camera of every token, and whether it counts."""
        wanted = self.capture.segments
        if segments is None:
            none = torch.full(shape, NONE)
            return none, none, torch.full(shape, wanted is None)
        labels = segments.labels.cpu()
        present = set(segments.present())
        table = {
            name: (
                self.names.number("segment", name) if name in present and name != PAD else NONE,
                self.names.number("camera", name.removeprefix(_CAMERA))
                if name in present and name.startswith(_CAMERA)
                else NONE,
                name != PAD and (wanted is None or any(fnmatchcase(name, glob) for glob in wanted)),
            )
            for name in segments.names
        }
        numbers, cameras, counts = (torch.tensor(column)[labels] for column in zip(*table.values(), strict=True))
        return numbers.expand(shape), cameras.expand(shape), counts.expand(shape)


def describe(ids: Sequence[int], names: Names) -> str:
    """A row's ids in words."""
    named: Mapping[str, Any] = dict(zip(IDS, ids, strict=True))
    texts = {"segment": names.segment, "camera": names.camera}
    return ", ".join(
        f"{key} {texts[key][number] if key in texts else number}" for key, number in named.items() if number != NONE
    )


def id_numbers(names: Names, column: str, wanted: Collection[int | str]) -> list[int]:
    """Numbers for a column of the ids; names or globs are looked up, of segments and cameras.

    Raises ValueError for an unknown column, KeyError for a name that nothing has.
    """
    if column not in IDS:
        raise ValueError(f"unknown id {column!r}; ids: {list(IDS)}")
    known: list[str] = getattr(names, column, [])
    found: list[int] = []
    for each in wanted:
        matches = [each] if isinstance(each, int) else [i for i, n in enumerate(known) if fnmatchcase(n, each)]
        if not matches:
            raise KeyError(f"no {column} {each!r}; there are {known or 'only numbers'}")
        found += matches
    return found


def previous_rows(earlier: Int32[Tensor, "m 6"], ids: Int32[Tensor, "n 6"]) -> Int64[Tensor, " n"]:
    """For every row, the number of the earlier row that is the same token of the same episode; NONE without one.

    The same token: equal in everything but env_step. Rows of `earlier` must differ in that.
    """
    if not len(earlier) or not len(ids):
        return torch.full((len(ids),), NONE)
    both = torch.cat([earlier, ids])[:, [0, 2, 3, 4, 5]].long()
    # mixed radix: the columns as digits of one number
    both = both - both.amin(0)
    sizes = (both.amax(0) + 1).tolist()
    key = both[:, 0]
    for column, size in zip(both.T[1:], sizes[1:], strict=True):
        key = key * size + column
    old, order = key[: len(earlier)].sort()
    place = torch.searchsorted(old, key[len(earlier) :]).clamp(max=len(old) - 1)
    return torch.where(old[place] == key[len(earlier) :], order[place], NONE)
