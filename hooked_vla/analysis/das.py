"""Distributed alignment search: the subspace of a site that carries one variable, learned from what swapping it does.

Geiger et al. 2024, "Finding alignments between interpretable causal variables and distributed neural representations"
(arXiv 2303.02536). A pair is a base input, a source input, and the counterfactual: what the model should do if the
variable alone had the source's value. The base run takes the source's part in the subspace of its tokens; the subspace
is turned until the actions are the counterfactual's. Actions are continuous here, so the loss is their squared error,
as a share of what no swap leaves. Gradients pass through the hooked model; its weights stay as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.subspaces import Subspace
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import ModelInputs

_ROWS = 32


@dataclass(frozen=True, eq=False)
class Pairs:
    """Inputs of pairs, row by row. counterfactual: an input on which the model itself does what a swap should lead to:
    the base's with the variable at the source's value. noise: every draw of a forward pass in order, the same in all
    three runs. source and counterfactual may be one.

    Raises ValueError where they differ in length, or a draw does not have a row for each pair.
    """

    base: ModelInputs
    source: ModelInputs
    counterfactual: ModelInputs
    noise: Sequence[Tensor]

    def __post_init__(self) -> None:
        sizes = [self.base.batch_size, self.source.batch_size, self.counterfactual.batch_size]
        if len({*sizes, *(len(draw) for draw in self.noise)}) != 1:
            raise ValueError(
                f"base, source and counterfactual have {sizes} rows, draws {[len(draw) for draw in self.noise]}: all "
                "need one for each pair"
            )

    def __len__(self) -> int:
        return self.base.batch_size

    def rows(self, rows: Sequence[int]) -> "Pairs":
        """Some of the pairs."""
        picked = list(rows)
        source, counterfactual = self.source.rows(picked), self.counterfactual.rows(picked)
        return Pairs(self.base.rows(picked), source, counterfactual, [draw[picked] for draw in self.noise])


class Interchange:
    """Interchange interventions at one site on fixed pairs: what is needed of the source runs is computed once.

    site: a hook point with a row for each batch row, then tokens; what a token holds besides (heads) is one vector.
    tokens: segment of the swapped ones, as edits have it; None: all. mask: [pair token], the swapped ones of the base.
    source: [step pair token channel], the source's value at each of them, one step where the site runs once a chunk.
    clean, target: normalised actions of the base and of the counterfactual, [pair step d_action].
    """

    def __init__(
        self, model: HookedModel, pairs: Pairs, site: str, tokens: str | None = None, rows: int = _ROWS
    ) -> None:
        """rows: of a forward pass.

        Raises KeyError for an unknown site or segment; ValueError for a site without a row and tokens for each input,
        a source with another number of tokens in the segment than its base, and counterfactuals that differ nowhere
        from what the base does anyway.
        """
        point = _token_point(model, site)
        self.model, self.site, self.tokens, self._batch = model, site, tokens, rows
        self._denoised = hook_names.is_denoised(site)
        with torch.no_grad():
            base, source = (_seen(model, each, site) for each in (pairs.base, pairs.source))
            self.pairs = replace(pairs, base=base, source=source)
            self.clean = self._actions(base)
            self.target = self._actions(source if pairs.counterfactual is pairs.source else pairs.counterfactual)
            self.mask = _token_mask(model, base, point, tokens)
            self.source = self._source(point)
        if not (self.clean - self.target).flatten(1).any(1).all():
            same = (~(self.clean - self.target).flatten(1).any(1)).nonzero().flatten().tolist()
            raise ValueError(f"the counterfactual of pairs {same[:5]} is what the base does anyway: they teach nothing")

    @property
    def d(self) -> int:
        """Numbers that the site holds for one token."""
        return self.source.shape[-1]

    def run(
        self, basis: Float[Tensor, "k d"] | None, rows: Sequence[int] | None = None
    ) -> Float[Tensor, "pair step d_action"]:
        """Actions of base runs that take the source's part in the span of an orthonormal basis; None: all of it.

        rows: which pairs, None for all. Gradients reach the basis where they are on.
        """
        chosen = list(range(len(self.pairs)) if rows is None else rows)
        parts = []
        for start in range(0, len(chosen), self._batch):
            part = chosen[start : start + self._batch]
            noise = [draw[part] for draw in self.pairs.noise]
            edit = self._edit(basis, torch.tensor(part))
            with self.model.hooks([(self.site, edit)]):
                parts.append(self.model(self.pairs.base.rows(part), noise).normalized)
        return torch.cat(parts)

    @torch.no_grad()
    def effect(self, subspace: Subspace | None, k: int | None = None) -> Float[Tensor, " pair"]:
        """How far the swap leads each pair from the base's actions (0) to the counterfactual's (1); `metrics.recovery`.

        subspace: None for all dimensions; k: only its first ones.
        Raises ValueError for a subspace of another width.
        """
        if subspace is not None and subspace.d != self.d:
            raise ValueError(f"{self.site} holds {self.d} numbers a token, the subspace is of {subspace.d}")
        basis = None if subspace is None else (subspace if k is None else subspace.first(k)).basis
        return recovery(self.run(None if basis is None else basis.to(self.source)), self.clean, self.target)

    def examples(self) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"], list[tuple[int, int]]]:
        """What swaps exchange, token by token: base runs' values, sources', and (pair, place among its swapped)."""
        with torch.no_grad():
            own = self._values(self.pairs.base)
        where = self.mask.nonzero()
        places = (self.mask.cumsum(1) - 1)[self.mask]
        keys = list(zip(where[:, 0].tolist(), places.tolist(), strict=True))
        return own[-1][self.mask], self.source[-1][self.mask], keys

    def _edit(self, basis: Tensor | None, rows: Tensor) -> Any:
        mask = self.mask[rows][..., None]

        def edit(value: Tensor, hook: HookPoint) -> Tensor:
            x = value.flatten(2)
            source = self.source[hook.denoise_step or 0 if self._denoised else 0][rows]
            swapped = source if basis is None else x + (source - x) @ basis.T @ basis
            return torch.where(mask, swapped, x).view_as(value)

        return edit

    def _actions(self, inputs: ModelInputs) -> Tensor:
        return torch.cat([
            self.model(inputs.rows(rows), [draw[rows] for draw in self.pairs.noise]).normalized
            for rows in _batches(len(self.pairs), self._batch)
        ])  # fmt: skip

    def _values(self, inputs: ModelInputs) -> Float[Tensor, "step pair token channel"]:
        parts = []
        for rows in _batches(len(self.pairs), self._batch):
            noise = [draw[rows] for draw in self.pairs.noise]
            stop = None if self._denoised else self.site
            _, cache = self.model.run_with_cache(inputs.rows(rows), [self.site], noise, stop_at=stop, clone=True)
            value = cache[self.site]
            parts.append((value if self._denoised else value[None]).flatten(3))
        return torch.cat(parts, dim=1)

    def _source(self, point: HookPoint) -> Tensor:
        """The source's tokens where the base has the tokens that take them."""
        values = self._values(self.pairs.source)
        theirs = _token_mask(self.model, self.pairs.source, point, self.tokens)
        wanted, there = self.mask.sum(1), theirs.sum(1)
        if not torch.equal(wanted, there):
            at = int((wanted != there).nonzero()[0])
            raise ValueError(
                f"pair {at}: the source has {int(there[at])} tokens of {self.tokens or 'all'} at {self.site}, the base "
                f"{int(wanted[at])}: swaps need as many"
            )
        aligned = torch.zeros(*values.shape[:2], self.mask.shape[1], values.shape[3], dtype=values.dtype)
        aligned[:, self.mask] = values[:, theirs]
        return aligned


@dataclass(frozen=True, eq=False)
class Learned:
    """subspace: what was found, its rows in the order of importance where `sizes` were several. losses: of every step,
    as a share of what no swap leaves: 1 is no effect, 0 the counterfactual's actions."""

    subspace: Subspace
    losses: tuple[float, ...]


def learn_subspace(
    interchange: Interchange,
    sizes: int | Sequence[int],
    steps: int = 200,
    batch: int = 16,
    lr: float = 0.05,
    seed: int = 0,
    start: Subspace | None = None,
) -> Learned:
    """Distributed alignment search on the interchange's pairs; hold others out to say what came of it.

    sizes: dimensions of the subspace. Of several, every step trains the span of the first rows of one of them, drawn at
    random (nested dropout: Rippel, Gelbart & Adams 2014, arXiv 1402.0915), so that one search serves a whole curve.
    batch: pairs a step. lr: of Adam, falling to 0 along a cosine. start: where to begin, a random basis where None.
    Raises ValueError for sizes that the site does not have, a start that is too small, or numbers below 1.
    """
    wanted = sorted({sizes} if isinstance(sizes, int) else set(sizes))
    if not wanted or not 1 <= wanted[0] <= wanted[-1] <= interchange.d:
        raise ValueError(f"sizes {wanted}: {interchange.site} holds {interchange.d} numbers a token")
    if min(steps, batch) < 1 or not lr > 0:
        raise ValueError(f"steps, batch and lr must be positive, got {steps}, {batch} and {lr}")
    generator = torch.Generator().manual_seed(seed)
    layer = _rotation(interchange, wanted[-1], generator, start)
    scale = (interchange.clean - interchange.target).square().mean()
    optimiser = torch.optim.Adam(layer.parameters(), lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    n, losses = len(interchange.pairs), []
    with frozen(interchange.model), torch.enable_grad():
        for step in range(steps):
            rows = torch.randperm(n, generator=generator)[:batch].tolist()
            size = wanted[int(torch.randint(len(wanted), (1,), generator=generator))]
            edited = interchange.run(layer.weight[:size], rows)
            loss = (edited - interchange.target[rows]).square().mean() / scale
            optimiser.zero_grad()
            loss.backward()
            if not loss.isfinite():
                raise ValueError(f"the loss is {float(loss)} at step {step}: lower lr ({lr})")
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
    center = interchange.source[-1][interchange.mask].double().mean(0)
    return Learned(Subspace(layer.weight.detach(), center.cpu(), "das", interchange.site), tuple(losses))


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Inside the block no parameter asks for a gradient, so that backward passes go no further than they must."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)


def _rotation(interchange: Interchange, k: int, generator: torch.Generator, start: Subspace | None) -> nn.Linear:
    """A layer whose weight [k d] has orthonormal rows, whatever its parameters are."""
    d = interchange.d
    if start is None:
        begin = torch.linalg.qr(torch.randn(d, k, generator=generator))[0].T
    elif start.d == d and start.k >= k:
        begin = start.first(k).basis.float()
    else:
        raise ValueError(f"start has {start.k} of {start.d} dimensions: {k} of {d} are needed")
    layer = nn.Linear(d, k, bias=False)
    # reflections of k rows; the other maps would complete the basis to d, and at random
    parametrizations.orthogonal(layer, orthogonal_map="householder", use_trivialization=False)
    layer.weight = begin.contiguous()
    return layer.to(interchange.source)


def _batches(n: int, size: int) -> Iterator[list[int]]:
    for start in range(0, n, size):
        yield list(range(start, min(start + size, n)))


def _token_point(model: HookedModel, site: str) -> HookPoint:
    found = hook_names.resolve(site, list(model.points))
    if len(found) != 1:
        raise ValueError(f"swaps are made at one hook point, {site!r} are {len(found)}")
    point = model.points[site]
    if point.axes[0] != "batch" or len(point.axes) < 3 or point.axes[1] not in point.streams:
        raise ValueError(f"{site} has axes {' '.join(point.axes)}: swaps need batch, then tokens, then channels")
    return point


def _token_mask(
    model: HookedModel, inputs: ModelInputs, point: HookPoint, tokens: str | None
) -> Bool[Tensor, "pair token"]:
    segments = model.segments(inputs)
    # "a+b" is stream a followed by b
    table = [segments[stream] for stream in point.streams[point.axes[1]].split("+")]
    whole = table[0] if len(table) == 1 else type(table[0]).concatenate(table[0], table[1])
    return torch.ones_like(whole.labels, dtype=torch.bool) if tokens is None else whole.mask(tokens)


def _seen(model: HookedModel, inputs: ModelInputs, site: str) -> ModelInputs:
    """The inputs with what the vision tower makes of their images: it lies before the site, and never changes."""
    if hook_names.pathway(site) == "vision" or not any(name.startswith("vision.") for name in model.points):
        return inputs
    with model.running(inputs):
        return replace(inputs, features=model.net.vision_features(inputs))
