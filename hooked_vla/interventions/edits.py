"""The edits: frozen dataclasses that say where a value is changed and how, and nothing of how that is computed.

x stands for the value of one token, everything that the hook point holds for it. All edits take the same keywords:

site: a hook point's name or glob, or several. tokens: segments of the token axis ("language", "image:*", ...); for
attention patterns that is the query axis, and `keys` names segments of the key axis. positions: places along the token
axis, counted from 0; with `tokens`, those of them that are in both. denoise: denoise steps (generated tokens, in
`decode`). env: environment steps at which the chunk is planned: numbers, ranges, Windows. rows: rows of the batch.
name: what `EditSet.set` and messages call it. None stands for all.

Edits at one point act in the order of the list, each on what the ones before it made.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from math import isfinite, isnan
from numbers import Real
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from hooked_vla.interventions.values import Numbers, Values
from hooked_vla.interventions.where import Names, Places, Steps, Where, names, places, windows

Given = Values | Tensor | Numbers
Number = float | int

# how a field is written in JSON; fields without one are plain
VALUES, NUMBER, TABLE, SCALAR_OR_VALUES, SAE, WINDOWS = (
    "values",
    "number",
    "table",
    "number or values",
    "sae",
    "windows",
)
KINDS = ("zero", "mean", "resample")


def as_number(given: Any) -> float | None:
    """A number of Python's or NumPy's, or a tensor without axes, as a float; None for anything else, and for True."""
    if getattr(given, "ndim", None) == 0 and hasattr(given, "item"):
        given = given.item()
    return float(given) if isinstance(given, Real) and not isinstance(given, bool) else None


@dataclass(frozen=True)
class Edit:
    """What all edits have: see the head of this file. Raises ValueError and TypeError naming the field."""

    site: Names
    tokens: Names | None = field(default=None, kw_only=True)
    keys: Names | None = field(default=None, kw_only=True)
    positions: Places | None = field(default=None, kw_only=True)
    denoise: Places | None = field(default=None, kw_only=True)
    env: Steps | None = field(default=None, kw_only=True, metadata={"as": WINDOWS})
    rows: Places | None = field(default=None, kw_only=True)
    name: str = field(default="", kw_only=True)

    # fields whose change needs another EditSet
    fixed: ClassVar[tuple[str, ...]] = ("site", "denoise", "name")

    def __post_init__(self) -> None:
        heads, channels = getattr(self, "heads", None), getattr(self, "channels", None)
        where = Where(
            sites=names(self.site, "site") or (),
            tokens=names(self.tokens, "tokens"),
            keys=names(self.keys, "keys"),
            positions=places(self.positions, "positions"),
            heads=places(heads, "heads"),
            channels=places(channels, "channels"),
            denoise=places(self.denoise, "denoise"),
            env=windows(self.env),
            rows=places(self.rows, "rows"),
        )
        if not where.sites:
            raise ValueError(f"{type(self).__name__}: site is missing")
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, got {self.name!r}")
        normal = {"site": where.sites[0] if len(where.sites) == 1 else where.sites}
        normal |= {each: getattr(where, each) for each in ("tokens", "keys", "positions", "denoise", "env", "rows")}
        if isinstance(self, _Elementwise):
            normal |= {"heads": where.heads, "channels": where.channels}
        for key, value in normal.items():
            object.__setattr__(self, key, value)
        object.__setattr__(self, "_where", where)
        for each in fields(self):
            given = getattr(self, each.name)
            if each.metadata.get("as") == VALUES and given is not None:
                object.__setattr__(self, each.name, Values(given, each.metadata["what"]))
            if each.metadata.get("as") == NUMBER and (given is not None or each.default is not None):
                number = as_number(given)
                if number is None or isnan(number):
                    raise ValueError(f"{each.name} must be a number, got {given!r}")
                object.__setattr__(self, each.name, number)

    @property
    def where(self) -> Where:
        """Site, tokens, steps and rows in their normal form."""
        return getattr(self, "_where")  # noqa: B009

    @property
    def kind(self) -> str:
        return type(self).__name__

    def what(self) -> str:
        """What the edit does, in a few words and symbols."""
        raise NotImplementedError

    def __str__(self) -> str:
        label = f"{self.name}: " if self.name else ""
        return f"{label}{self.kind} {self.what()} at {self.where}"


@dataclass(frozen=True)
class _Elementwise(Edit):
    """Edits that can be limited to some heads and channels. channels: along the value's last axis."""

    heads: Places | None = field(default=None, kw_only=True)
    channels: Places | None = field(default=None, kw_only=True)


def _check_finite(edit: Edit, *numbers: str) -> None:
    for each in numbers:
        value = getattr(edit, each)
        if value is not None and not isfinite(value):
            raise ValueError(f"{each} must be finite, got {value}")


@dataclass(frozen=True)
class Patch(_Elementwise):
    """x becomes that of another run: y = source, or y = x + strength·(source - x).

    source: shaped as the hook point's value, with or without its leading axes: [channels], the same for every token;
    [seq channels], the same for every row; [row seq channels]; [denoise row seq channels]. Where seq is not the whole
    stream's length, it must be the number of edited tokens of each row, which take it in order. What `cache[site]` and
    `cache[site].segment(...)` return fits.
    strength: None replaces x bit for bit; a number blends, and can be changed.
    """

    source: Given = field(metadata={"as": VALUES, "what": "source"})
    strength: Number | None = field(default=None, metadata={"as": NUMBER})
    fixed = (*Edit.fixed, "heads", "channels", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "strength")

    def what(self) -> str:
        return f"source{self.source}" + ("" if self.strength is None else f" × {self.strength:g}")


@dataclass(frozen=True)
class Add(Edit):
    """y = x + strength·direction. direction: [channels], of the length that it is given."""

    direction: Given = field(metadata={"as": VALUES, "what": "direction"})
    strength: Number = field(metadata={"as": NUMBER})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "strength")

    def what(self) -> str:
        return f"{self.strength:g} × direction{self.direction}"


@dataclass(frozen=True)
class AddRelative(Edit):
    """y = x + strength·‖x‖·direction/‖direction‖: of the token's own length if strength is 1."""

    direction: Given = field(metadata={"as": VALUES, "what": "direction"})
    strength: Number = field(metadata={"as": NUMBER})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "strength")
        if not bool(_given(self.direction).tensor.any()):
            raise ValueError("direction must not be zero: only its direction counts")

    def what(self) -> str:
        return f"{self.strength:g} × ‖x‖ × direction{self.direction}"


@dataclass(frozen=True)
class Scale(_Elementwise):
    """y = factor·x."""

    factor: Number = field(metadata={"as": NUMBER})
    fixed = (*Edit.fixed, "heads", "channels", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "factor")

    def what(self) -> str:
        return f"x × {self.factor:g}"


@dataclass(frozen=True)
class Clamp(_Elementwise):
    """Every number of x is kept between low and high; None: no such bound. Raises ValueError for neither."""

    low: Number | None = field(default=None, metadata={"as": NUMBER})
    high: Number | None = field(default=None, metadata={"as": NUMBER})
    fixed = (*Edit.fixed, "heads", "channels", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.low is None and self.high is None:
            raise ValueError("Clamp needs low, high or both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low must be at most high, got {self.low:g} and {self.high:g}")

    def what(self) -> str:
        low, high = ("" if each is None else f"{each:g}" for each in (self.low, self.high))
        return f"to {low}..{high}"


@dataclass(frozen=True)
class Ablate(_Elementwise):
    """What a value says of this input is taken out.

    ablation: "zero": y = 0. "mean": y = source, a mean over other inputs; shapes as in `Patch`. "resample": each place
    of a row takes a token of `source`, [n channels], activations of other inputs; `seed` says which, the same in every
    row and at every step.
    """

    ablation: str
    source: Given | None = field(default=None, metadata={"as": VALUES, "what": "source"})
    seed: int = 0
    fixed = (*Edit.fixed, "heads", "channels", "keys", "ablation")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ablation not in KINDS:
            raise ValueError(f"ablation must be one of {', '.join(KINDS)}, got {self.ablation!r}")
        if (self.ablation == "zero") != (self.source is None):
            need = "takes no source" if self.ablation == "zero" else "needs a source"
            raise ValueError(f"Ablate: ablation {self.ablation!r} {need}")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {self.seed!r}")

    def what(self) -> str:
        drawn = f" (seed {self.seed})" if self.ablation == "resample" else ""
        return self.ablation + ("" if self.source is None else f" source{self.source}") + drawn


@dataclass(frozen=True)
class ProjectOut(Edit):
    """y = x - strength·P·(x - center), P the projection onto the span of `basis`.

    basis: [channels], or [r channels] with r at most 512, of full rank; it need not be orthonormal. strength 1 takes
    the subspace out. center: [channels], what is left in it; None: nothing.
    """

    basis: Given = field(metadata={"as": VALUES, "what": "basis"})
    strength: Number = field(default=1.0, metadata={"as": NUMBER})
    center: Given | None = field(default=None, metadata={"as": VALUES, "what": "center"})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "strength")

    def what(self) -> str:
        return f"basis{self.basis}" + ("" if self.strength == 1 else f" × {self.strength:g}")


@dataclass(frozen=True)
class SubspacePatch(Edit):
    """y = x + strength·P·(source - x), P the projection onto the span of `basis`: another run's x, in a subspace.

    source: as in `Patch`. basis: as in `ProjectOut`.
    """

    source: Given = field(metadata={"as": VALUES, "what": "source"})
    basis: Given = field(metadata={"as": VALUES, "what": "basis"})
    strength: Number = field(default=1.0, metadata={"as": NUMBER})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_finite(self, "strength")

    def what(self) -> str:
        times = "" if self.strength == 1 else f" × {self.strength:g}"
        return f"source{self.source} in basis{self.basis}{times}"


@dataclass(frozen=True)
class Overwrite(_Elementwise):
    """y = value: one number for all, or [channels]; beside `channels`, one for each of those, in ascending order."""

    value: Given = field(metadata={"as": SCALAR_OR_VALUES, "what": "value"})
    fixed = (*Edit.fixed, "heads", "channels", "keys")

    def __post_init__(self) -> None:
        super().__post_init__()
        number = as_number(self.value)
        if number is not None:
            if isnan(number):
                raise ValueError("value must be a number, got NaN")
            # minus infinity hides an attention score
            object.__setattr__(self, "value", number)
        else:
            object.__setattr__(self, "value", Values(self.value, "value"))

    def what(self) -> str:
        return f"with {self.value:g}" if isinstance(self.value, float) else f"with value{self.value}"


def _given(value: Given) -> Values:
    assert isinstance(value, Values)
    return value


AnyEdit = TypeVar("AnyEdit", bound=Edit)


def per_row(sets: Sequence[Sequence[AnyEdit]]) -> list[AnyEdit]:
    """The edits of a batch whose row i has the edits `sets[i]`: each is limited to its row.

    Raises ValueError for an edit that names rows itself.
    """
    from dataclasses import replace

    found = []
    for row, edits in enumerate(sets):
        for edit in edits:
            if edit.rows is not None:
                raise ValueError(f"row {row} has an edit for rows of its own choice: {edit}")
            found.append(replace(edit, rows=row))
    return found
