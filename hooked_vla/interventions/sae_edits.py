"""Edits through a sparse autoencoder; what they share with all others stands at the head of `edits.py`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite, isnan
from typing import Any

from hooked_vla.interventions.edits import SAE, TABLE, Edit, Number, as_number
from hooked_vla.interventions.where import Places, places, whole_numbers
from hooked_vla.sae.splice import SpliceSAE

POOLS = ("token", "segment")


@dataclass(frozen=True)
class SAEReconstruct(Edit):
    """x becomes what a sparse autoencoder makes of it. pool: "token": every token by itself; "segment": the mean token
    of each of `tokens` (of all edited tokens, where that is None) is reconstructed, and what that changes is added to
    every token of it.
    """

    sae: SpliceSAE = field(metadata={"as": SAE})
    pool: str = "token"
    fixed = (*Edit.fixed, "sae", "pool")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sae(self)

    def what(self) -> str:
        return f"{self.sae!r}" + ("" if self.pool == "token" else " of the segment's mean")


@dataclass(frozen=True)
class SAEFeatureEdit(Edit):
    """Features f of a sparse autoencoder become clamp(scale·f + shift, low, high), and what that changes is added to x.

    features: their numbers. scale, shift, low, high: a number for all, or one for each (None: no bound). Ablate:
    scale 0. Set to v: scale 0, shift v. steer(1 + s): scale 1 + s. add_mean: shift s·mean.
    keep_error: what the autoencoder misses of x is kept; otherwise x becomes the reconstruction with edited features.
    pool: as in SAEReconstruct.
    """

    sae: SpliceSAE = field(metadata={"as": SAE})
    features: Places
    scale: Number | Sequence[Number] = field(default=1.0, metadata={"as": TABLE})
    shift: Number | Sequence[Number] = field(default=0.0, metadata={"as": TABLE})
    low: Number | Sequence[Number | None] | None = field(default=None, metadata={"as": TABLE})
    high: Number | Sequence[Number | None] | None = field(default=None, metadata={"as": TABLE})
    keep_error: bool = True
    pool: str = "token"
    fixed = (*Edit.fixed, "sae", "keep_error", "pool")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_sae(self)
        listed = whole_numbers(self.features, "features")
        places(listed, "features")
        if len(set(listed)) != len(listed):
            raise ValueError(f"features come more than once: {sorted({f for f in listed if listed.count(f) > 1})}")
        if outside := [each for each in listed if each >= self.sae.n_features]:
            raise ValueError(f"features {outside[:5]}: the SAE has features 0..{self.sae.n_features - 1}")
        object.__setattr__(self, "features", listed)
        for each in ("scale", "shift", "low", "high"):
            object.__setattr__(self, each, self._table(each))
        for i, (low, high) in enumerate(zip(self.column("low"), self.column("high"), strict=True)):
            if low > high:
                raise ValueError(f"low must be at most high, got {low:g} and {high:g} for feature {listed[i]}")
            if low == high and not isfinite(low):
                raise ValueError(f"low and high must leave a finite number, got {low:g} twice for feature {listed[i]}")

    def _table(self, name: str) -> float | tuple[float | None, ...] | None:
        given: Any = getattr(self, name)
        if given is None or as_number(given) is not None:
            return self._checked(name, given)
        try:
            listed = [self._checked(name, each) for each in given]
        except TypeError as error:
            raise TypeError(f"{name} must be a number or one for each feature, got {given!r}") from error
        if len(listed) != len(self.numbers):
            raise ValueError(f"{name} has {len(listed)} numbers for {len(self.numbers)} features")
        return tuple(listed)

    def _checked(self, name: str, given: Any) -> float | None:
        """One number of a table."""
        bound, number = name in ("low", "high"), as_number(given)
        if given is None and bound:
            return None
        if number is None or isnan(number) or not (bound or isfinite(number)):
            raise ValueError(f"{name} must be finite numbers{' or None' if bound else ''}, got {given!r}")
        return number

    @property
    def numbers(self) -> tuple[int, ...]:
        """The features' numbers."""
        return whole_numbers(self.features, "features")

    def column(self, name: str) -> list[float]:
        """scale, shift, low or high, one number for each feature; no bound is an infinite one."""
        given, none = getattr(self, name), float("-inf") if name == "low" else float("inf")
        listed = list(given) if isinstance(given, tuple) else [given] * len(self.numbers)
        return [none if each is None else each for each in listed]

    def what(self) -> str:
        changed = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} of each"
            for name, value in (("scale", self.scale), ("shift", self.shift), ("low", self.low), ("high", self.high))
            if value is not None and (name, value) not in (("scale", 1.0), ("shift", 0.0))
        ]
        shown = ",".join(map(str, self.numbers[:8])) + (f",… ({len(self.numbers)})" if len(self.numbers) > 8 else "")
        kept = "" if self.keep_error else ", error dropped"
        return f"features {shown} of {self.sae!r}: {', '.join(changed) or 'as they are'}{kept}"


def _check_sae(edit: "SAEReconstruct | SAEFeatureEdit") -> None:
    if not isinstance(edit.sae, SpliceSAE):
        raise TypeError(f"sae must be a SpliceSAE, got {type(edit.sae).__name__}")
    if edit.pool not in POOLS:
        raise ValueError(f"pool must be one of {', '.join(POOLS)}, got {edit.pool!r}")
