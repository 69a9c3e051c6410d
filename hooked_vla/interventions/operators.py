"""What edits do to values [rows places channels]. All that may change between calls is in tensors that stay in place.

An operator runs one edit, or several of one kind on different rows: then it holds one entry of parameters for each.
Running, it never looks at the contents of its tensors, so that compiled code and captured graphs go on working when
`load` and `place` write new ones. What an edit leaves as it is keeps its bits.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vla.interventions.edits import (
    Ablate,
    Add,
    AddRelative,
    Clamp,
    Edit,
    Overwrite,
    Patch,
    ProjectOut,
    Scale,
    SubspacePatch,
)
from hooked_vla.interventions.places import Scene, Site, channel_mask, pair_tokens, token_mask
from hooked_vla.interventions.sources import bank_table, orthonormal, overwrite_table, source_table, vector
from hooked_vla.interventions.values import Values
from hooked_vla.kernels import lowrank_edit

Tokens = Float[Tensor, "row place channel"]
Masks = Sequence[Bool[Tensor, "row place"]]


class Made(NamedTuple):
    """Parameters of edits by name; shapes: rows and places of each edit's source, which stand one after the other."""

    tensors: dict[str, Tensor]
    shapes: Sequence[tuple[int, int]] = ()


class Operator:
    """Base of all. edits: of one kind, on different rows; labels: what messages call each.

    steps: the denoise steps at which it runs, None for all. mask: which places change, None for all. row_of: which of
    the edits each row has, and `row` the same for each token; None where there is one edit.
    Raises ValueError for edits that do not fit the site.
    """

    def __init__(self, edits: Sequence[Edit], labels: Sequence[str], site: Site) -> None:
        self.site, self.labels = site, list(labels)
        self.steps = edits[0].where.denoise
        self.masked = any(edit.where.is_masked for edit in edits)
        self.mask: Tensor | None = None
        self.row_of: Tensor | None = None
        self.row: Tensor | None = None
        # placed tensors by the shape of the value that they are for: captured graphs refer to them
        self._placed: dict[tuple[int, ...], dict[str, tuple[Tensor, Tensor]]] = {}
        self.edits: list[Edit] = []
        self._loaded: set[str] = set()
        self.load(edits)

    def load(self, edits: Sequence[Edit]) -> None:
        """Take the parameters of the edits, which are of the kinds and shapes that the operator was made with.

        Raises ValueError otherwise, and then nothing has changed.
        """
        made, who = self.parameters(edits), ", ".join(self.labels)
        if self.edits and (other := set(made.tensors) ^ self._loaded):
            raise ValueError(f"{who}: {', '.join(sorted(other))} cannot be given or left out later: make a new EditSet")
        for name, value in made.tensors.items():
            held = getattr(self, name) if self.edits else value
            if held.shape != value.shape or held.dtype != value.dtype:
                raise ValueError(
                    f"{who}: {name} would be {list(value.shape)} in place of {list(held.shape)}: make a new EditSet"
                )
        with torch.inference_mode(False), torch.no_grad():
            for name, value in made.tensors.items():
                if self.edits:
                    getattr(self, name).copy_(value)
                else:
                    setattr(self, name, value.to(self.site.device, copy=True).contiguous())
        self.edits, self.shapes, self._loaded = list(edits), made.shapes, set(made.tensors)

    def parameters(self, edits: Sequence[Edit]) -> Made:
        """What `load` takes."""
        raise NotImplementedError

    @property
    def needs_placing(self) -> bool:
        """Whether which tokens change, or what they take, depends on the inputs or the clock."""
        return self.masked or len(self.edits) > 1

    def place(self, scene: Scene, env_step: int | None) -> None:
        """Find the tokens to change for the inputs and the environment step at hand. Raises as `token_mask`."""
        masks = [token_mask(edit.where, scene, label) for edit, label in zip(self.edits, self.labels, strict=True)]
        key = scene.sizes
        if self.masked:
            active = [edit.where.is_active(env_step) for edit in self.edits]
            chosen = [mask for mask, now in zip(masks, active, strict=True) if now]
            self.put("mask", torch.stack(chosen).any(0) if chosen else torch.zeros_like(masks[0]), key)
        if len(masks) > 1:
            row_of = torch.stack([mask.any(1) for mask in masks]).int().argmax(0)
            self.put("row_of", row_of, key)
            self.put("row", row_of.int().repeat_interleave(scene.places), key)
        self.place_parts(masks, scene)

    def place_parts(self, masks: Masks, scene: Scene) -> None:
        """The rest of `place`. masks: of each edit, whatever the clock says."""

    def put(self, name: str, value: Tensor, key: tuple[int, ...]) -> None:
        """Set an attribute to a tensor with this content, the same one whenever the key is the same."""
        held = self._placed.setdefault(key, {})
        if name in held and held[name][1].shape == value.shape:
            kept, last = held[name]
            if not torch.equal(last, value):
                with torch.inference_mode(False), torch.no_grad():
                    kept.copy_(value)
                held[name] = (kept, value)
        else:
            with torch.inference_mode(False):
                held[name] = (value.to(self.site.device, copy=True).contiguous(), value)
        setattr(self, name, held[name][0])

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        raise NotImplementedError

    def per_row(self, values: Tensor) -> Tensor:
        """Parameters [edit ...] as they stand beside values [row place ...]."""
        chosen = values if self.row_of is None else values.index_select(0, self.row_of)
        return chosen.reshape(len(chosen), 1, -1)

    def flat_mask(self) -> Tensor | None:
        return None if self.mask is None else self.mask.flatten()


class Elementwise(Operator):
    """An operator that may be limited to some channels. channel: which change in each row, None for all."""

    channel: Tensor | None = None

    @property
    def needs_placing(self) -> bool:
        where = self.edits[0].where
        return super().needs_placing or any(each is not None for each in (where.heads, where.channels, where.keys))

    def place_parts(self, masks: Masks, scene: Scene) -> None:
        # edits that run together have the same heads, channels and keys
        channels = channel_mask(self.edits[0].where, scene, self.labels[0])
        if channels is not None:
            self.put("channel", channels[:, None], scene.sizes)

    def keep(self, x: Tokens, y: Tensor) -> Tokens:
        """y where the edit acts, x elsewhere."""
        mask = None if self.mask is None else self.mask[:, :, None]
        if self.channel is not None:
            mask = self.channel if mask is None else mask & self.channel
        if mask is None:
            return y if y.shape == x.shape else y.expand(x.shape).clone()
        return torch.where(mask, y, x)


class Replace(Elementwise):
    """Patch, Ablate and Overwrite: y = source, or x + strength·(source - x)."""

    table: Tensor
    strength: Tensor | None = None
    pair: Tensor | None = None

    def parameters(self, edits: Sequence[Edit]) -> Made:
        tables = [self._table(edit, f"{label}: source") for edit, label in zip(edits, self.labels, strict=True)]
        made = {"table": joined(tables, self.site)}
        strengths = [edit.strength for edit in edits if isinstance(edit, Patch) and edit.strength is not None]
        if strengths:
            made["strength"] = torch.tensor(strengths, dtype=self.site.wide, device="cpu")
        return Made(made, table_shapes(tables))

    @property
    def needs_placing(self) -> bool:
        return super().needs_placing or max(self.table.shape[1:]) > 1

    def _table(self, edit: Edit, label: str) -> Tensor:
        if isinstance(edit, Patch):
            assert isinstance(edit.source, Values)
            return source_table(edit.source, self.site, edit.where.denoise, label)
        if isinstance(edit, Overwrite):
            assert isinstance(edit.value, float | Values)
            return overwrite_table(edit.value, self.site, edit.where.channels, label.replace("source", "value"))
        assert isinstance(edit, Ablate)
        if edit.source is None:
            return torch.zeros(1, 1, 1, 1, device="cpu")
        assert isinstance(edit.source, Values)
        if edit.ablation == "resample":
            return bank_table(edit.source, self.site, label)
        return source_table(edit.source, self.site, edit.where.denoise, label)

    def place_parts(self, masks: Masks, scene: Scene) -> None:
        super().place_parts(masks, scene)
        width = self.table.shape[2]
        if width not in (1, scene.width):
            raise ValueError(f"{self.labels[0]}: source is {width} wide, but {scene.layout.name} now is {scene.width}")
        if self.table.shape[1] > 1:
            pairs = pair_all(self.edits, self.labels, masks, self.shapes)
            self.put("pair", pairs.flatten(), scene.sizes)

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        table = self.table[step_index(self.table, self.steps, step)]
        source = table if self.pair is None else table.index_select(0, self.pair).view(*x.shape[:2], -1)
        if self.strength is None:
            return self.keep(x, source)
        strength, wide = self.per_row(self.strength), x.to(self.site.wide)
        delta = strength * (source.to(self.site.wide) - wide)
        blended = torch.where(delta == 0, x, (wide + delta).to(x.dtype))
        # x + (source - x) would round
        return self.keep(x, torch.where(strength == 1, source, blended))


class ScaleBy(Elementwise):
    """y = factor·x."""

    factor: Tensor

    def parameters(self, edits: Sequence[Edit]) -> Made:
        factors = [edit.factor for edit in edits if isinstance(edit, Scale)]
        return Made({"factor": torch.tensor(factors, dtype=self.site.wide, device="cpu")})

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        factor = self.per_row(self.factor)
        return self.keep(x, torch.where(factor == 1, x, (x.to(self.site.wide) * factor).to(x.dtype)))


class ClampTo(Elementwise):
    """y = x, but low where x is lower and high where it is higher."""

    low: Tensor
    high: Tensor

    def parameters(self, edits: Sequence[Edit]) -> Made:
        clamps = [edit for edit in edits if isinstance(edit, Clamp)]
        low = [-torch.inf if edit.low is None else edit.low for edit in clamps]
        high = [torch.inf if edit.high is None else edit.high for edit in clamps]
        # in x's dtype, so that what is compared is what is written
        bounds = {"low": low, "high": high}
        return Made({name: torch.tensor(each, dtype=self.site.dtype, device="cpu") for name, each in bounds.items()})

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        low, high = self.per_row(self.low), self.per_row(self.high)
        return self.keep(x, torch.where(x < low, low, torch.where(x > high, high, x)))


class AddLength(Operator):
    """AddRelative: y = x + strength·‖x‖·direction, the direction of length 1."""

    direction: Tensor
    strength: Tensor

    def parameters(self, edits: Sequence[Edit]) -> Made:
        directions, strengths = [], []
        for edit, label in zip(edits, self.labels, strict=True):
            assert isinstance(edit, AddRelative) and isinstance(edit.direction, Values)
            direction = vector(edit.direction, self.site, f"{label}: direction").double().to(self.site.device)
            directions.append(direction / direction.norm())
            strengths.append(edit.strength)
        strength = torch.tensor(strengths, dtype=self.site.wide, device="cpu")
        return Made({"direction": torch.stack(directions).to(self.site.wide), "strength": strength})

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        wide = x.to(self.site.wide)
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        delta = self.per_row(self.strength) * length * self.per_row(self.direction)
        if self.mask is not None:
            delta = torch.where(self.mask[:, :, None], delta, 0)
        return torch.where(delta == 0, x, (wide + delta).to(x.dtype))


class LowRank(Operator):
    """Add, ProjectOut and SubspacePatch: `kernels.lowrank_edit`."""

    a: Tensor
    alpha: Tensor
    beta: Tensor
    add: Tensor | None = None
    table: Tensor | None = None
    pair: Tensor | None = None

    def parameters(self, edits: Sequence[Edit]) -> Made:
        zeros = torch.zeros(len(edits), dtype=self.site.wide, device="cpu")
        if isinstance(edits[0], Add):
            added = torch.stack([
                edit.strength * self._vector(edit.direction, f"{label}: direction")
                for edit, label in zip(edits, self.labels, strict=True)
                if isinstance(edit, Add)
            ]).to(self.site.wide)  # fmt: skip
            return Made({"a": added.new_zeros(0, added.shape[1]), "alpha": zeros, "beta": zeros, "add": added})
        return self._projection(edits, zeros)

    def _projection(self, edits: Sequence[Edit], zeros: Tensor) -> Made:
        first = edits[0]
        assert isinstance(first, ProjectOut | SubspacePatch) and isinstance(first.basis, Values)
        basis = orthonormal(first.basis, self.site, f"{self.labels[0]}: basis").to(self.site.device)
        strengths = [edit.strength for edit in edits if isinstance(edit, ProjectOut | SubspacePatch)]
        strength = torch.tensor(strengths, dtype=torch.float64, device=self.site.device)
        made = {"a": basis.to(weights_dtype(self.site)), "alpha": strength.to(self.site.wide), "beta": zeros}
        if isinstance(first, SubspacePatch):
            tables = [
                source_table(edit.source, self.site, edit.where.denoise, f"{label}: source")
                for edit, label in zip(edits, self.labels, strict=True)
                if isinstance(edit, SubspacePatch) and isinstance(edit.source, Values)
            ]
            made |= {"beta": made["alpha"], "table": joined(tables, self.site)}
            return Made(made, table_shapes(tables))
        if first.center is not None:
            centers = torch.stack([
                self._vector(edit.center, f"{label}: center")
                for edit, label in zip(edits, self.labels, strict=True)
                if isinstance(edit, ProjectOut)
            ])  # fmt: skip
            made["add"] = (strength[:, None] * (centers @ basis.T @ basis)).to(self.site.wide)
        return Made(made)

    def _vector(self, given: object, label: str) -> Tensor:
        assert isinstance(given, Values)
        return vector(given, self.site, label).double().to(self.site.device)

    @property
    def needs_placing(self) -> bool:
        return super().needs_placing or self.table is not None

    def place_parts(self, masks: Masks, scene: Scene) -> None:
        if self.table is not None:
            pairs = pair_all(self.edits, self.labels, masks, self.shapes)
            self.put("pair", pairs.flatten().int(), scene.sizes)

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        source = None if self.table is None else self.table[step_index(self.table, self.steps, step)]
        y = lowrank_edit(
            x.flatten(0, 1).contiguous(), source, self.a, self.a, self.alpha, self.beta, self.add,
            pair=self.pair, row=self.row, mask=self.flat_mask(),
        )  # fmt: skip
        return y.view(x.shape)


def weights_dtype(site: Site) -> torch.dtype:
    """Of directions that tokens are multiplied with: the wide one, but for tokens that a GPU has bfloat16 products for.

    A basis that is rounded to bfloat16 moves an edit by less than the token's own rounding; what it is multiplied with
    is not rounded (`kernels.lowrank_edit`).
    """
    return torch.bfloat16 if site.device.type == "cuda" and site.dtype == torch.bfloat16 else site.wide


def table_shapes(tables: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Rows and places of each."""
    return [(each.shape[1], each.shape[2]) for each in tables]


def joined(tables: Sequence[Tensor], site: Site) -> Tensor:
    """Sources [step row place channel] one after the other, [step row·place channel], as values of the site."""
    steps, width = (max(each.shape[i] for each in tables) for i in (0, 3))
    whole = [each.expand(steps, -1, -1, width).flatten(1, 2) for each in tables]
    return torch.cat([each.to(site.device, site.dtype) for each in whole], dim=1)


def step_index(table: Tensor, steps: tuple[int, ...] | None, step: int | None) -> int:
    """Where a denoise step stands in a table that has one entry, one a step of the model, or one an edited step.

    Raises ValueError where it has too few.
    """
    if len(table) == 1 or step is None:
        return 0
    index = steps.index(step) if steps is not None and len(table) == len(steps) else step
    if index >= len(table):
        raise ValueError(f"source has {len(table)} denoise steps, but the model is at step {step}")
    return index


def pair_all(edits: Sequence[Edit], labels: Sequence[str], masks: Masks, shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Which row of the edits' tables, one after the other, each place takes; shapes: rows and places of each table."""
    pairs, offset = torch.zeros_like(masks[0], dtype=torch.long), 0
    for edit, label, mask, (rows, places) in zip(edits, labels, masks, shapes, strict=True):
        if isinstance(edit, Ablate) and edit.ablation == "resample":
            # the same in every row, so that a row's does not depend on which other rows there are
            generator = torch.Generator().manual_seed(edit.seed)
            pair = torch.randint(places, (mask.shape[1],), generator=generator, device="cpu").expand(mask.shape)
        else:
            pair = pair_tokens(mask, (rows, places), label)
        pairs = torch.where(mask, pair + offset, pairs)
        offset += rows * places
    return pairs


OPERATORS: dict[type[Edit], type[Operator]] = {
    Patch: Replace,
    Ablate: Replace,
    Overwrite: Replace,
    Scale: ScaleBy,
    Clamp: ClampTo,
    AddRelative: AddLength,
    Add: LowRank,
    ProjectOut: LowRank,
    SubspacePatch: LowRank,
}
