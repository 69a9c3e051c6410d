"""Taking instructions apart, and word lists by which prompts are changed.

The grammar is that of the manipulation suites: "<verb> the <object> [and place it] <on/in/to> the <target>", or
"<verb> the <object>" alone. What does not fit it has no such parts, and kinds that need them leave it as it is.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

_PREPOSITIONS = "on top of|onto|on|into|inside|in|to|under|beside|next to|at"
_VERB = r"(?P<verb>turn (?:on|off)|\w+(?: up| down)?)"
_PLACED = re.compile(
    rf"{_VERB} (?P<object>the .+?) (?P<joint>(?:and (?:place|put|set) it )?(?:{_PREPOSITIONS})) (?P<target>the .+)"
)
_ACTED = re.compile(rf"{_VERB} (?P<object>.+)")
_ARTICLES = ("the", "a", "an")

SYNONYMS = {
    "put": ("place", "set"),
    "place": ("put", "set"),
    "carry": ("bring",),
    "move": ("bring",),
    "pick": ("lift",),
    "push": ("press",),
    "press": ("push",),
    "open": ("unclose",),
    "block": ("cube", "brick"),
    "pad": ("square", "mat"),
    "on": ("onto",),
    "in": ("inside",),
    "bowl": ("dish",),
    "plate": ("platter",),
    "stove": ("cooker",),
    "basket": ("hamper",),
    "cabinet": ("cupboard",),
    "quickly": ("fast",),
    "slowly": ("gently",),
}
OPPOSITES = {
    "put": "take",
    "place": "take",
    "carry": "take",
    "move": "leave",
    "pick up": "put down",
    "open": "close",
    "close": "open",
    "push": "pull",
    "pull": "push",
    "insert": "remove",
    "turn on": "turn off",
    "on": "from",
    "onto": "from",
    "on top of": "from",
    "in": "from",
    "into": "from",
    "inside": "from",
    "to": "from",
    "quickly": "slowly",
    "slowly": "quickly",
    "high": "low",
    "low": "high",
    "above": "below",
}
# German, in the forms that instructions need
FOREIGN = {
    "a": "einen", "above": "über", "and": "und", "basket": "korb", "black": "schwarzen", "block": "klotz",
    "blue": "blauen", "bottle": "flasche", "bowl": "schale", "box": "schachtel", "bring": "bringe",
    "cabinet": "schrank", "carry": "trage", "close": "schließe", "cup": "tasse", "cyan": "türkisen",
    "door": "tür", "down": "ab", "drawer": "schublade", "green": "grünen", "high": "hoch", "in": "in", "it": "ihn",
    "left": "links", "low": "tief", "middle": "mittleren", "move": "bewege", "of": "von", "on": "auf", "open": "öffne",
    "orange": "orangefarbenen", "pad": "platte", "pick": "hebe", "place": "stelle", "plate": "teller",
    "purple": "violetten", "push": "schiebe", "put": "lege", "quickly": "schnell", "red": "roten", "right": "rechts",
    "slowly": "langsam", "stove": "herd", "table": "tisch", "the": "den", "to": "zu", "top": "oben", "turn": "drehe",
    "up": "auf", "white": "weißen", "wine": "wein", "yellow": "gelben",
}  # fmt: skip
# things that a prompt may name although no scene has them
ABSENT = ("the cup", "the banana", "the hammer", "the shoe")


@dataclass(frozen=True)
class Parts:
    """An instruction's parts: f"{verb} {object} {joint} {target}"; joint and target are empty where it has none."""

    verb: str
    object: str
    joint: str = ""
    target: str = ""

    def __str__(self) -> str:
        return " ".join(part for part in (self.verb, self.object, self.joint, self.target) if part)


def take_apart(instruction: str) -> Parts | None:
    """The parts of an instruction in lower case, without marks at its end; None where it has not even a verb and an
    object."""
    text = " ".join(instruction.lower().split()).rstrip(".!?")
    for pattern in (_PLACED, _ACTED):
        if found := pattern.fullmatch(text):
            return Parts(**found.groupdict())
    return None


def other_parts(part: str, instruction: str, instructions: Iterable[str]) -> list[str]:
    """What the other instructions have where this one has its "object" or "target", each once."""
    own = take_apart(instruction)
    found = [getattr(each, part) for text in instructions if (each := take_apart(text)) is not None]
    mine = getattr(own, part) if own is not None else ""
    return list(dict.fromkeys(text for text in found if text and text != mine))


def without_articles(text: str) -> str:
    return " ".join(word for word in text.split() if word not in _ARTICLES)
