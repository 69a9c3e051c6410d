"""Which part of which values an edit changes: what users write in several ways, code reads in one normal form."""

import difflib
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex


@dataclass(frozen=True, order=True)
class Window:
    """Environment steps start, start + 1, ... up to stop, which is not among them; None: for ever."""

    start: int
    stop: int | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for a negative start or no steps."""
        if self.start < 0 or (self.stop is not None and self.stop <= self.start):
            raise ValueError(f"env: no environment steps from {self.start} to before {self.stop}")

    def __contains__(self, step: int) -> bool:
        return self.start <= step and (self.stop is None or step < self.stop)

    def __str__(self) -> str:
        if self.stop is None:
            return f"{self.start}–"
        return str(self.start) if self.stop == self.start + 1 else f"{self.start}–{self.stop - 1}"


Names = str | Sequence[str]
# also tensors and NumPy arrays
Places = SupportsIndex | Iterable[SupportsIndex]
Steps = int | range | Window | Sequence[int | range | Window]


@dataclass(frozen=True)
class Where:
    """The normal form. None stands for all; numbers are sorted and come once, segments stand in the user's order."""

    sites: tuple[str, ...]
    tokens: tuple[str, ...] | None = None
    keys: tuple[str, ...] | None = None
    positions: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    denoise: tuple[int, ...] | None = None
    env: tuple[Window, ...] | None = None
    rows: tuple[int, ...] | None = None

    @property
    def is_masked(self) -> bool:
        """Whether what is edited depends on the inputs or on the clock."""
        return any(each is not None for each in (self.tokens, self.positions, self.env, self.rows))

    def is_active(self, env_step: int | None) -> bool:
        """Whether the environment step is one of those that are edited."""
        return self.env is None or any(env_step in window for window in self.env if env_step is not None)

    def __str__(self) -> str:
        parts = [" + ".join(self.sites)]
        for label, chosen in (
            ("tokens", self.tokens), ("keys", self.keys), ("positions", self.positions), ("heads", self.heads),
            ("channels", self.channels), ("denoise steps", self.denoise), ("env steps", self.env), ("rows", self.rows),
        ):  # fmt: skip
            if chosen is not None:
                parts.append(f"{label} {_shortened(chosen)}")
        return ", ".join(parts)


def _shortened(values: Sequence[Any]) -> str:
    """Values separated by commas; whole numbers in runs."""
    if len(values) > 2 and all(isinstance(each, int) for each in values):
        values = [Window(each.start, each.stop) for each in merged([Window(v, v + 1) for v in values])]
    text = [str(each) for each in values]
    return ",".join(text if len(text) <= 8 else [*text[:7], f"… ({len(text)})"])


def names(given: Names | None, what: str) -> tuple[str, ...] | None:
    """Raises TypeError for anything but strings, ValueError for none of them or an empty one."""
    if given is None:
        return None
    listed = (given,) if isinstance(given, str) else tuple(given)
    if not all(isinstance(each, str) for each in listed):
        raise TypeError(f"{what} must be a string or several, got {given!r}")
    if not listed or not all(listed):
        raise ValueError(f"{what} is empty, so that nothing is edited; None stands for all")
    return tuple(dict.fromkeys(listed))


def places(given: Places | None, what: str) -> tuple[int, ...] | None:
    """Raises TypeError for anything but whole numbers, ValueError for none of them or a negative one."""
    if given is None:
        return None
    listed = whole_numbers(given, what)
    if not listed:
        raise ValueError(f"{what} is empty, so that nothing is edited; None stands for all")
    if min(listed) < 0:
        raise ValueError(f"{what} are counted from 0, got {min(listed)}")
    return tuple(sorted(set(listed)))


def whole_numbers(given: Places, what: str) -> tuple[int, ...]:
    """One number or several as Python's own, in their order; given may be a tensor or a NumPy array of any shape.

    Raises TypeError for anything but whole numbers.
    """
    plain: Any = given
    if hasattr(plain, "flatten") and hasattr(plain, "tolist"):
        plain = plain.flatten().tolist()
    several = tuple(plain) if isinstance(plain, Iterable) else (plain,)
    listed = tuple(each.item() if getattr(each, "ndim", None) == 0 else each for each in several)
    if not all(hasattr(type(each), "__index__") and not isinstance(each, bool) for each in listed):
        raise TypeError(f"{what} must be a whole number or several, got {given!r}")
    return tuple(operator.index(each) for each in listed)


def windows(given: Steps | None) -> tuple[Window, ...] | None:
    """Environment steps as windows that neither overlap nor touch.

    Raises TypeError for anything but whole numbers, ranges and windows, ValueError for none.
    """
    if given is None:
        return None
    listed = [given] if isinstance(given, int | range | Window) else list(given)
    found: list[Window] = []
    for each in listed:
        if isinstance(each, Window):
            found.append(each)
        elif isinstance(each, range) and each.step == 1:
            found.append(Window(each.start, each.stop))
        elif isinstance(each, int | range) and not isinstance(each, bool):
            found += [Window(step, step + 1) for step in (each if isinstance(each, range) else [each])]
        else:
            raise TypeError(f"env must be environment steps, ranges or Windows, got {each!r}")
    if not found:
        raise ValueError("env is empty, so that nothing is edited; None stands for all")
    return merged(found)


def merged(found: Sequence[Window]) -> tuple[Window, ...]:
    """The same steps in as few windows as possible."""
    joined: list[Window] = []
    for window in sorted(found, key=lambda each: each.start):
        last = joined[-1] if joined else None
        if last is None or (last.stop is not None and window.start > last.stop):
            joined.append(window)
        elif last.stop is not None:
            joined[-1] = Window(last.start, None if window.stop is None else max(last.stop, window.stop))
    return tuple(joined)


def windows_from_json(data: Any) -> tuple[Window, ...] | None:
    """What JSON holds of windows: pairs [start, stop], stop null for ever.

    Raises ValueError for anything else.
    """
    if data is None:
        return None
    if not isinstance(data, Sequence) or not all(isinstance(each, Sequence) and len(each) == 2 for each in data):
        raise ValueError(f"env must be a list of pairs [start, stop], got {data!r}")
    return windows([Window(start, stop) for start, stop in data])


def check_mapping(data: Any, known: Sequence[str], required: Sequence[str], what: str) -> Mapping[str, Any]:
    """Raises ValueError unless the JSON is an object with all of the required keys and none that is unknown."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} must be a JSON object, got {type(data).__name__}")
    for key in data:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"{what}: unknown key {key!r}{hint}; known: {', '.join(known)}")
    if missing := [key for key in required if key not in data]:
        raise ValueError(f"{what}: missing {', '.join(missing)}")
    return data
