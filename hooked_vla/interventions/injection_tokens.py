"""Which of a donor's tokens goes to which of the target's.

Prompts of different lengths do not correspond by position in the stream. Within a segment they are paired by `align`:

"equal"   the segment must have as many tokens in both, which correspond in their order; else an error
"start"   by position from the segment's start, as far as both reach; the target's other tokens are left alone
{segment: [(donor, target), ...]}   by position within the segment, for those segments that are named; all others must
          have equal lengths, and the target's tokens that no pair names are left alone
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vla.inputs import Segments

if TYPE_CHECKING:
    from hooked_vla.interventions.injection import Held, Injection

EQUAL, START = "equal", "start"
Align = str | Mapping[str, Sequence[tuple[int, int]]]
# places in the donor's token axis, and in the target's, in the same order
Pairs = tuple[Int[Tensor, " place"], Int[Tensor, " place"]]


def check_align(given: Align, by_segment: bool) -> Align:
    """The token map in its normal form. by_segment: segments are chosen, which it could apply to.

    Raises ValueError for an unknown word, pairs that are negative or give one token twice, or a map without segments.
    """
    if isinstance(given, str):
        if given not in (EQUAL, START):
            raise ValueError(f"align must be {EQUAL!r}, {START!r}, or pairs by segment, got {given!r}")
        if given == START and not by_segment:
            raise ValueError("align pairs the tokens of segments: say which, with tokens=")
        return given
    if not by_segment:
        raise ValueError("align pairs the tokens of segments: say which, with tokens=")
    normal = {name: tuple((int(a), int(b)) for a, b in pairs) for name, pairs in given.items()}
    for name, pairs in normal.items():
        if not pairs or min(min(pair) for pair in pairs) < 0:
            raise ValueError(f"align[{name!r}] must be pairs of positions counted from 0, got {list(pairs)}")
        targets = [target for _, target in pairs]
        if len(set(targets)) != len(targets):
            raise ValueError(f"align[{name!r}] gives a token of the target twice: {list(pairs)}")
    return normal


def describe_align(align: Align) -> Any:
    """As JSON-serialisable data."""
    return align if isinstance(align, str) else {name: [list(pair) for pair in pairs] for name, pairs in align.items()}


def pair_places(
    injection: "Injection", held: "Held | None", here: Segments | None, row: int, held_row: int, length: int, label: str
) -> Pairs:
    """Places of the donor's value and of the target's that correspond, in one row.

    here: segments of the target's stream, on the CPU; row: of it; held_row: of the donor's value; length: of the
    target's place axis. label: what messages call the injection and its site.
    Raises ValueError for unknown segments, segments that do not correspond, and places out of range.
    """
    assert held is not None
    if injection.tokens is None:
        ours = torch.arange(length)
        theirs = ours
    else:
        if here is None or held.segments is None:
            raise ValueError(f"{label} has no token segments")
        parts = [_segment(injection.align, name, held.segments, here, row, held_row, label)
                 for name in _names(injection.tokens, held.segments, here, label)]  # fmt: skip
        theirs, ours = (torch.cat([part[i] for part in parts]) for i in (0, 1))
    if injection.positions is not None:
        wanted = torch.tensor(list(injection.positions))  # pyright: ignore[reportArgumentType]
        if int(wanted.max()) >= length:
            raise ValueError(
                f"{label}: positions {wanted[wanted >= length].tolist()[:5]}: it has places 0..{length - 1}"
            )
        kept = torch.isin(ours, wanted)
        if bool((theirs[kept] != ours[kept]).any()):
            raise ValueError(f"{label}: positions stand for the same places in both, but align moves some of them")
        theirs, ours = theirs[kept], ours[kept]
    return theirs, ours


def _names(wanted: Any, there: Segments, here: Segments, label: str) -> list[str]:
    """The segments that names and globs choose, in both streams."""
    found: list[str] = []
    for name in wanted:
        for segments, whose in ((there, "recording"), (here, "target")):
            try:
                segments.mask(name)
            except KeyError as error:
                raise ValueError(f"{label}: {error.args[0]} (the {whose})") from None
            if name.endswith("*"):
                found += [each for each in segments.names if each.startswith(name[:-1])]
            else:
                found.append(name)
    return list(dict.fromkeys(found))


def _segment(align: Align, name: str, there: Segments, here: Segments, row: int, held_row: int, label: str) -> Pairs:
    """The pairs of one segment."""
    theirs, ours = there.positions(name)[held_row].cpu(), here.positions(name)[row]
    if isinstance(align, Mapping) and name in align:
        pairs = align[name]
        far = [pair for pair in pairs if pair[0] >= len(theirs) or pair[1] >= len(ours)]
        if far:
            raise ValueError(
                f"{label}: align pairs {far[:5]} of {name!r}, which has {len(theirs)} tokens in the recording and "
                f"{len(ours)} in the target"
            )
        first, second = (torch.tensor([pair[i] for pair in pairs]) for i in (0, 1))
        return theirs[first], ours[second]
    if align == START:
        n = min(len(theirs), len(ours))
        return theirs[:n], ours[:n]
    if len(theirs) != len(ours):
        raise ValueError(
            f"{label}: {name!r} has {len(theirs)} tokens in the recording, but {len(ours)} in the target: prompts of "
            f"unequal length need align={START!r}, or pairs of tokens"
        )
    return theirs, ours
