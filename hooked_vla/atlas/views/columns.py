"""What the columns of an experiment's table are: what a row is of, what was measured, its interval, and its floors.

Tables name them alike: `x`, with `x_low` and `x_high`; counts begin with n; probabilities end with p.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

KEY, MEASURE, LOW, HIGH, REFERENCE, COUNT, CHANCE, FLAG, LABEL, NOTE = (
    "key", "measure", "low", "high", "reference", "count", "p", "flag", "label", "note",
)  # fmt: skip
# what a measure would be without the effect, by the measures that it stands beside
_REFERENCES = {
    "floor": ("displacement",),
    "no_op_floor": ("within", "displacement"),
    "baseline_success": ("success",),
    "chance": ("hits", "hit", "score"),
    "shuffled": ("target", "score"),
    "other": ("target",),
    "other_scenes": ("target",),
    "other_objects": ("target",),
    "random_weights": ("score",),
    "time": ("score",),
    "proprioception": ("score",),
    "pictures": ("score",),
    "noise": ("donor",),
    "cos_src_dst": ("cos_src",),
}
# numbers that say where or how much something was done, and not what came of it
_PLACES = {
    "layer", "head", "seed", "source_seed", "episode", "env_step", "denoise_step", "step", "rank", "token", "neuron",
    "feature", "start", "stop", "k", "depth", "pair", "cluster", "blocks_after", "strength", "dose", "rho", "stretch",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """name, type: as in the file, the latter one of number, integer, text, bool, other. role: one of the above; of: the
    measure that an interval's end or a reference belongs to."""

    name: str
    type: str
    role: str
    of: str | None = None


def roles(schema: Sequence[tuple[str, str]]) -> list[Column]:
    """The columns of a table, in their order; schema: name and type of each."""
    types = dict(schema)
    found: list[Column] = []
    for name, kind in schema:
        role, of = _role(name, kind, types, [each.name for each in found if each.role == MEASURE])
        found.append(Column(name, kind, role, of))
    return found


def _role(name: str, kind: str, types: dict[str, str], measures: Sequence[str]) -> tuple[str, str | None]:
    numeric = kind in ("number", "integer")
    if name == "label" and kind == "text":
        return LABEL, None
    if kind == "text":
        return KEY, None
    if kind == "bool":
        return FLAG, None
    if not numeric:
        return NOTE, None
    for end, role in (("low", LOW), ("high", HIGH)):
        if name == end and measures:
            return role, measures[-1]
        if name.endswith(f"_{end}") and name.removesuffix(f"_{end}") in types:
            return role, name.removesuffix(f"_{end}")
    for measure in _REFERENCES.get(name, ()):
        if measure in types:
            return REFERENCE, measure
    if name == "p" or name.endswith("_p"):
        return CHANCE, None
    if name in _PLACES:
        return KEY, None
    return (COUNT, None) if kind == "integer" and re.match(r"n($|_)", name) else (MEASURE, None)
