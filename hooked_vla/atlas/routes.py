"""What a view offers to the page: paths, what answers them, and which of them an export holds."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.atlas.run import Run

_AS_THEY_ARE = {type(None), str, bool, int}


class NotThere(LookupError):
    """What was asked for is not in the run; its text is shown to the reader."""


class Conflict(RuntimeError):
    """It cannot be done now, as something else is going on; its text is shown to the reader."""


@dataclass(frozen=True)
class Media:
    """A file for the page. kind: its media type, one of SUFFIXES."""

    content: bytes
    kind: str


@dataclass(frozen=True)
class Events:
    """A stream of JSON values, each an event; None keeps the connection alive.

    source must give something at least once a second: a browser that went away is noticed between two values, and
    source.close() is then called.
    """

    source: Iterator[Any]


SUFFIXES = {"image/png": "png", "image/jpeg": "jpg", "video/mp4": "mp4"}


@dataclass(frozen=True)
class Route:
    """One path of the page's data, under /api/.

    path: with parameters in braces, each one segment: "rollouts/{rollout}/page/{page}".
    get: get(run, **parameters as str) -> JSON-able, Media or Events. Raises NotThere (404), Conflict (409), ValueError
    (400, for what was asked wrongly); anything else is told as a fault of the run's files (500).
    listing: the parameters that an export writes; None for what only a server answers.
    query: names of the query string's parameters that get takes too, "" where absent; never exported.
    media: the media type, where get gives Media.
    replays: its answers run a policy or a simulator, which takes seconds each: an export can be made without them.
    method: "POST" for what changes something: get then takes `body`, the JSON object that was sent.
    """

    path: str
    get: Callable[..., Any]
    listing: Callable[[Run], Iterator[Mapping[str, str]]] | None = None
    query: tuple[str, ...] = ()
    media: str | None = None
    replays: bool = False
    method: str = "GET"

    def __post_init__(self) -> None:
        if self.method not in ("GET", "POST"):
            raise ValueError(f"{self.path}: a route's method is GET or POST, got {self.method!r}")
        if self.media is not None and self.media not in SUFFIXES:
            raise ValueError(f"{self.path}: media must be one of {sorted(SUFFIXES)}, got {self.media!r}")
        if self.listing is not None and (self.query or self.method == "POST"):
            raise ValueError(f"{self.path}: an export holds no answers to queries or posts")

    @property
    def suffix(self) -> str:
        """Of its file in an export."""
        return "js" if self.media is None else SUFFIXES[self.media]


def once(run: Run) -> Iterator[Mapping[str, str]]:
    """The listing of a route without parameters."""
    yield {}


def plain(value: Any) -> Any:
    """A value as JSON has it: numbers that are none are None, arrays are lists, bytes and other things are text."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        # long columns of one kind are not walked through
        kinds = set(map(type, value))
        if kinds <= _AS_THEY_ARE or (kinds == {float} and all(map(math.isfinite, value))):
            return list(value)
        return [plain(each) for each in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value).decode(errors="replace")
    # pandas' missing values say that they are not themselves
    return None if value != value else str(value)
