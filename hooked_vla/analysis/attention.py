"""Attention to camera images: which head looks where, for whom, at which denoise step; how well it points at an object;
and what happens without the head.

>>> actions, cache = model.run_with_cache(obs, "*.hook_pattern", noise)
>>> views = camera_views(model, obs)
>>> seen = camera_attention(cache, "vlm.blocks.2.attn.hook_pattern", views["top"], queries="language")
>>> pointing_score(seen.weights, views["top"], mask_of_the_red_block)          # [batch step head]; 1 is chance
>>> model(obs, noise, edits=[knock_out("vlm.blocks.2.attn.hook_pattern", head=3)])

A map says what is read, not what it is used for: in a language model whose last block's attention reaches no action,
that block's maps cannot matter however well they point (`model.hook_points[site].reaches_action`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_vla.analysis.attention_geometry import CameraView, camera_views
from hooked_vla.hooks import ActivationCache, HookedModel
from hooked_vla.hooks.cache import Entry
from hooked_vla.hooks.names import leaf, nearest, resolve
from hooked_vla.inputs import LANGUAGE, ModelInputs, Observation, Segments
from hooked_vla.interventions import Ablate

__all__ = [
    "CameraAttention",
    "CameraView",
    "attention_shares",
    "camera_attention",
    "camera_views",
    "heads_of",
    "knock_out",
    "pattern_sites",
    "pointing_chance",
    "pointing_hit",
    "pointing_score",
    "token_locality",
    "word_positions",
]

Queries = str | Sequence[Int[Tensor, " query"]] | None


@dataclass(frozen=True, eq=False)
class CameraAttention:
    """What the heads of one site pay to one camera's tokens, mean over query tokens.

    weights: each token's share of the attention, at its place. step: denoise steps, one where the pathway runs once.
    uniform: what the token would get if every query attended evenly to all tokens that some head of it attends to.
    before: share of the camera's tokens that have no place (a pooled token).
    """

    site: str
    camera: str
    weights: Float[Tensor, "batch step head row column"]
    uniform: Float[Tensor, "batch step row column"]
    before: Float[Tensor, "batch step head"]

    @property
    def relative(self) -> Float[Tensor, "batch step head row column"]:
        """As multiples of uniform attention."""
        return self.weights / self.uniform[:, :, None]

    @property
    def share(self) -> Float[Tensor, "batch step head"]:
        """Of all attention, how much goes to the camera."""
        return self.weights.sum((-2, -1)) + self.before


def pattern_sites(model: HookedModel, pathway: str, only_live: bool = True) -> list[str]:
    """The attention patterns of a pathway between tokens, in the model's order.

    only_live: leave out those that no action depends on.
    """
    sites = [
        name for name, site in model.hook_points.items()
        if site.pathway == pathway and leaf(name) == "hook_pattern" and {"query", "key"} <= set(site.axes)
        and "window" not in site.axes and (site.reaches_action or not only_live)
    ]  # fmt: skip
    if not sites:
        ways = dict.fromkeys(site.pathway for name, site in model.hook_points.items() if leaf(name) == "hook_pattern")
        raise ValueError(f"no attention between tokens in the pathway {pathway!r}; pathways with any: {list(ways)}")
    return sites


def camera_attention(cache: ActivationCache, site: str, view: CameraView, queries: Queries = None) -> CameraAttention:
    """Attention of `queries` to a camera's tokens, from a cached pattern.

    site: a hook_pattern. view: of the tokens that the pattern's keys are: inside the vision tower `camera_views(...,
    tower=True)`, behind it the others. queries: a token segment ("language", "action", ...), or positions along the
    query axis for each row; None: all tokens that are not padding, and always so inside the tower.
    Raises KeyError for a pattern that is not cached, ValueError for one that is not between tokens of whole images, for
    a row without query tokens, and for queries inside the tower.
    """
    axes, streams, pattern = _pattern(cache, site)
    if "window" in axes or not {"query", "key"} <= set(axes):
        raise ValueError(f"{site} ({' '.join(axes)}) is not attention between the tokens of whole images")
    keys = cache.segments[streams["key"]]
    if keys.row_axis == "image":
        if queries is not None:
            raise ValueError(f"{site} is inside the vision tower, whose patches all ask: leave queries out")
        rows = [i for i, found in enumerate(keys.positions(view.segment)) if len(found)]
        pattern, keys = pattern[rows], keys.rows(rows)
        asking = _query_positions(cache.segments[streams["query"]].rows(rows), None, site)
    else:
        asking = _query_positions(cache.segments[streams["query"]], queries, site)
    at = keys.positions(view.segment)
    weights, uniform, before = [], [], []
    for row, (q, k) in enumerate(zip(asking, at, strict=True)):
        # [step head query key]: what no head of a query attends to is taken to be hidden from it
        asked = pattern[row][:, :, q.to(pattern.device)].float()
        visible = (asked > 0).any(1).float()
        even = visible / visible.sum(-1, keepdim=True).clamp(min=1)
        mine = asked[..., k.to(pattern.device)].mean(2)
        weights.append(view.on_grid(mine))
        uniform.append(view.on_grid(even[..., k.to(pattern.device)].mean(1)))
        before.append(mine[..., : view.n_before].sum(-1))
    return CameraAttention(site, view.camera, torch.stack(weights), torch.stack(uniform), torch.stack(before))


def attention_shares(
    cache: ActivationCache, site: str, queries: Queries = None
) -> dict[str, Float[Tensor, "batch step head"]]:
    """Share of the attention of `queries` that goes to every token segment of the keys; together they are 1.

    queries: as for `camera_attention`. Raises as that.
    """
    axes, streams, pattern = _pattern(cache, site)
    if "window" in axes or not {"query", "key"} <= set(axes):
        raise ValueError(f"{site} ({' '.join(axes)}) is not attention between the tokens of whole images")
    asking = _query_positions(cache.segments[streams["query"]], queries, site)
    keys = cache.segments[streams["key"]]
    rows = [pattern[row][:, :, at.to(pattern.device)].float().mean(2) for row, at in enumerate(asking)]
    received = torch.stack(rows)
    found = {}
    for name in keys.present():
        mine = keys.mask(name).to(received)[:, None, None]
        found[name] = (received * mine).sum(-1)
    return found


def _pattern(
    cache: ActivationCache, site: str
) -> tuple[tuple[str, ...], Any, Float[Tensor, "batch step head query key"]]:
    """Axes and streams of a cached pattern, and its values with a step axis behind the rows."""
    if leaf(site) != "hook_pattern":
        raise ValueError(f"{site} is no attention pattern; nearest: {nearest(site, [*cache], 1)}")
    value = cache[site]
    entry: Entry = cache.entries[value.site]
    if entry.steps is None:
        return entry.axes, entry.streams, value.detach()[:, None]
    return entry.axes[1:], entry.streams, value.detach().movedim(0, 1)


def _query_positions(segments: Segments, queries: Queries, site: str) -> list[Int[Tensor, " query"]]:
    if queries is None:
        valid = torch.ones_like(segments.labels, dtype=torch.bool)
        if "pad" in segments.names:
            valid &= ~segments.mask("pad")
        found = [row.nonzero().flatten() for row in valid]
    elif isinstance(queries, str):
        found = segments.positions(queries)
    else:
        found = list(queries)
        if len(found) != len(segments.labels):
            raise ValueError(f"{site} has {len(segments.labels)} rows, but queries are given for {len(found)}")
    if empty := [i for i, each in enumerate(found) if not len(each)]:
        raise ValueError(f"{site}: no query tokens {queries!r} in rows {empty}; there are {segments.present()}")
    return found


def word_positions(model: Any, inputs: ModelInputs, words: Sequence[Sequence[str]]) -> list[Int[Tensor, " token"]]:
    """Where words of each row's instruction stand in the language model's tokens.

    model: a HookedVLA, whose processor has the tokenizer. words: for each row. A word counts where a token, without
    spaces and in lower case, is the word or begins it.
    Raises ValueError where none of a row's words is found.
    """
    tokenizer = model.processor.tokenizer.load()
    segments = model.segments(inputs)["vlm"]
    found = []
    for row, (at, wanted) in enumerate(zip(segments.positions(LANGUAGE), words, strict=True)):
        tokens: Any = inputs
        ids = tokens.tokens[row]
        if segments.labels.shape[1] == len(ids):
            # image tokens have their places in the text
            ids = ids[at.to(ids.device)]
        else:
            valid = ids[tokens.token_mask[row]]
            ids = valid[len(valid) - len(at) :]
        texts = [tokenizer.decode([int(each)]).strip().lower() for each in ids]
        sought = [word.lower() for word in wanted]
        hits = [i for i, text in enumerate(texts) if any(text and (text == s or s.startswith(text)) for s in sought)]
        if not hits:
            raise ValueError(f"row {row}: none of {list(wanted)} among the tokens {texts}")
        found.append(at[torch.tensor(hits, device=at.device)])
    return found


def pointing_score(
    weights: Float[Tensor, "*any row column"], view: CameraView, mask: Bool[np.ndarray, "height width"]
) -> Float[Tensor, "*any"]:
    """Share of the attention to the camera that falls on a mask, over the mask's share of the image; 1 is chance.

    A token's attention is spread evenly over the pixels of its cell; cells without a pixel of the camera count as
    attention to nothing that is seen, and are left out.
    mask: pixels of the camera's image. Raises ValueError for an empty mask, or one of which no pixel is seen.
    """
    inside, all_pixels = _counts(view, mask)
    covered = torch.from_numpy(inside / np.maximum(all_pixels, 1)).to(weights)
    seen = torch.from_numpy(all_pixels > 0).to(weights)
    total = (weights * seen).sum((-2, -1))
    area = inside.sum() / all_pixels.sum()
    return (weights * covered).sum((-2, -1)) / total / float(area)


def pointing_hit(
    weights: Float[Tensor, "*any row column"], view: CameraView, mask: Bool[np.ndarray, "height width"]
) -> Bool[Tensor, "*any"]:
    """Whether the cell that gets most attention shows a part of the mask (the pointing game, arXiv 1608.00507).

    Raises as `pointing_score`.
    """
    inside, all_pixels = _counts(view, mask)
    hidden = torch.from_numpy(all_pixels == 0).to(weights.device)
    best = weights.masked_fill(hidden, -torch.inf).flatten(-2).argmax(-1)
    return torch.from_numpy(inside.reshape(-1) > 0).to(weights.device)[best]


def pointing_chance(view: CameraView, mask: Bool[np.ndarray, "height width"]) -> float:
    """How often a cell drawn at random would hit. Raises as `pointing_score`."""
    inside, all_pixels = _counts(view, mask)
    return float((inside > 0).sum() / (all_pixels > 0).sum())


def _counts(view: CameraView, mask: Bool[np.ndarray, "height width"]) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of the mask, and of the camera's image, in each cell."""
    inside = view.counts(mask)
    if not inside.any():
        raise ValueError(
            f"camera {view.camera!r}: the mask has {int(mask.sum())} pixels, none of which the model sees: there is "
            "nothing to point at"
        )
    return inside, view.counts(np.ones_like(mask))


@torch.no_grad()
def token_locality(
    model: HookedModel, obs: Observation, view: CameraView, site: str = "connector.hook_out", level: int = 128
) -> Bool[Tensor, "row column"]:
    """Whether covering a cell of the camera's image changes that cell's token more than any other of the camera.

    Where it does not, the tower has moved what the pixels show to other tokens, and a map over tokens is not a map
    over pixels, however well its cells are placed.
    obs: one observation, its images in bytes. site: what the language model is handed of each image; level: of the
    grey that covers, 0..255. Cells without a pixel count as not local. Raises ValueError for anything but bytes.
    """
    image = np.asarray(obs.images[view.source])
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ValueError(
            f"camera {view.source!r}: one image of bytes [H W 3] is needed, got {image.dtype} {image.shape}"
        )
    cells = [(row, column) for row in range(view.grid[0]) for column in range(view.grid[1])]
    covered = np.repeat(image[None], 1 + len(cells), axis=0)
    for i, cell in enumerate(cells, start=1):
        top, bottom, left, right = view.box(*cell)
        covered[i, top:bottom, left:right] = level
    images = {name: np.repeat(np.asarray(each)[None], len(covered), axis=0) for name, each in obs.images.items()}
    state = torch.as_tensor(np.asarray(obs.state)).reshape(1, -1).expand(len(covered), -1)
    text = obs.instruction if isinstance(obs.instruction, str) else obs.instruction[0]
    many = Observation({**images, view.source: covered}, state, [text] * len(covered))
    _, cache = model.run_with_cache(many, site, stop_at=site)
    segments = cache.segments[cache.entries[site].streams["seq"]]
    mine = [i for i, found in enumerate(segments.positions(view.segment)) if len(found)]
    tokens = cache[site][mine]
    changes = view.on_grid((tokens[1:] - tokens[:1]).norm(dim=-1)).flatten(-2)
    return (changes.argmax(-1) == torch.arange(len(cells), device=changes.device)).reshape(view.grid) & torch.tensor(
        [[view.box(row, column)[1] > view.box(row, column)[0] for column in range(view.grid[1])]
         for row in range(view.grid[0])], device=changes.device
    )  # fmt: skip


def knock_out(
    site: str, head: int | Sequence[int], ablation: str = "zero", source: Tensor | None = None, **where: Any
) -> Ablate:
    """The edit that takes heads out: what they would write is 0, or with "mean" and a source always that.

    site: a hook_pattern, or the hook_z beside it. where: `tokens`, `denoise`, `env`, `rows`, `name`, as in every edit.
    Raises ValueError for another site, and as Ablate.
    """
    if leaf(site) not in ("hook_pattern", "hook_z"):
        raise ValueError(f"heads are taken out at hook_z or by their hook_pattern, got {site!r}")
    place = site.rpartition(".")[0]
    return Ablate(f"{place}.hook_z", ablation, source, heads=head, **where)


def heads_of(model: HookedModel, sites: Sequence[str]) -> list[tuple[str, int]]:
    """Every (site, head) of patterns, in order."""
    points = model.hook_points
    found = []
    for site in resolve(list(sites), list(points)):
        n = points[site].shape[points[site].axes.index("n_heads")]
        found += [(site, head) for head in range(int(n))]
    return found
