"""What features are about, in words made from labels, and a search through such texts.

A description names the labels that a feature's activation falls on more than others do: "phase grasp 62 % (×3.1)" is
62 % of all that the feature adds up to, 3.1 times the share of steps that are of that phase.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

# what a label must have of a feature's activation, and how much more than of the steps, to be named
SHARE, LIFT = 0.2, 1.5
PER_KIND = 2
# Robertson & Zaragoza 2009, The Probabilistic Relevance Framework, section 3.5
_K1, _B = 1.2, 0.75
_WORD = re.compile(r"[+-]?\w+")


@dataclass(frozen=True)
class Share:
    """A label that a feature is active at. share: of the feature's activation, summed; lift: share over the label's
    share of all steps (tokens, for labels of tokens)."""

    kind: str
    value: str
    share: float
    lift: float

    def __str__(self) -> str:
        return f"{self.kind} {self.value} {self.share:.0%} (×{self.lift:.1f})".replace("%", " %")


def describe(shares: Sequence[Share], told: Sequence[str] = (), notes: Sequence[str] = ()) -> str:
    """A feature in words: the labels it stands out by, those of a kind by their lift, then concepts that it tells.

    told: such as "phase=grasp". notes: more to say. "no label stands out" where there is nothing.
    """
    kinds: dict[str, list[Share]] = {}
    for each in shares:
        if each.share >= SHARE and each.lift >= LIFT:
            kinds.setdefault(each.kind, []).append(each)
    parts = [
        str(each)
        for named in kinds.values()
        for each in sorted(named, key=lambda share: -share.lift * share.share)[:PER_KIND]
    ]
    parts += [f"tells {name}" for name in told]
    return "; ".join([*parts, *notes]) if parts else "; ".join(["no label stands out", *notes])


def words(text: str) -> list[str]:
    """Words and numbers of a text in lower case, parts of compounds each by itself; "+x" keeps its sign."""
    spread = re.sub(r"[_/:=]|(?<=\w)-(?=\w)", " ", text.lower())
    return _WORD.findall(spread)


class TextSearch:
    """A search for texts by words, ranked by BM25; the beginning of a word finds it too, for less.

    texts: by a number of their own, such as the feature that they describe.
    """

    def __init__(self, texts: Mapping[int, str]) -> None:
        self._counts = {number: Counter(words(text)) for number, text in texts.items()}
        self._mean = sum(sum(each.values()) for each in self._counts.values()) / max(len(self._counts), 1)
        self._in = Counter(word for each in self._counts.values() for word in each)

    def __call__(self, query: str, n: int) -> list[tuple[int, float]]:
        """Number and score of the n best texts, best first; only those that have some of the words.

        Raises ValueError for a query without words.
        """
        wanted = words(query)
        if not wanted:
            raise ValueError(f"nothing to search for in {query!r}")
        scores = {number: self._score(each, wanted) for number, each in self._counts.items()}
        found = [(number, score) for number, score in scores.items() if score > 0]
        return sorted(found, key=lambda each: (-each[1], each[0]))[:n]

    def _score(self, counts: Counter[str], wanted: Sequence[str]) -> float:
        length = sum(counts.values()) / max(self._mean, 1e-9)
        score = 0.0
        for word in wanted:
            matches = [(word, 1.0)] if word in counts else [(w, 0.5) for w in counts if w.startswith(word)]
            for found, weight in matches:
                n, f = self._in[found], counts[found]
                rarity = math.log(1 + (len(self._counts) - n + 0.5) / (n + 0.5))
                score += weight * rarity * f * (_K1 + 1) / (f + _K1 * (1 - _B + _B * length))
        return score
