"""The prompt battery: 23 named ways to change an instruction, each a function of the instruction, the suite's other
instructions and a seed.

Kinds and their number follow Action Atlas (arXiv 2603.19233); the wording is ours. A kind that does not apply (no other
target in the suite, no word with a synonym) leaves the instruction as it is: whether anything reached the model is for
`reaches` to say, since that also depends on the tokenizer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from hooked_vla.rollouts.batteries.phrases import (
    ABSENT,
    FOREIGN,
    OPPOSITES,
    SYNONYMS,
    other_parts,
    take_apart,
    without_articles,
)

# what a kind does to the goal that the prompt names
NO_GOAL, OTHER_GOAL, SAME_GOAL, CONTRADICTED, CORRUPTED = (
    "no goal",
    "other goal",
    "same goal",
    "contradicted",
    "corrupted",
)
_SYLLABLES = ("bla", "dro", "fim", "gul", "kle", "mor", "nix", "pla", "rup", "sko", "tev", "wub", "zan")

Make = Callable[[str, Sequence[str], np.random.Generator], str]


@dataclass(frozen=True)
class PromptKind:
    """One way to change a prompt. effect: what it does to the goal that is named. make(instruction, others, rng): the
    prompt; others: the suite's other instructions."""

    name: str
    effect: str
    description: str
    make: Make


def change_prompt(kind: str, instruction: str, instructions: Sequence[str], seed: int) -> str:
    """The instruction, changed; the same arguments give the same prompt.

    instructions: all of the suite's. Raises ValueError for an unknown kind, with those that there are.
    """
    if kind not in PROMPT_KINDS:
        raise ValueError(f"unknown kind {kind!r} of prompt; kinds: {list(PROMPT_KINDS)}")
    others = [text for text in dict.fromkeys(instructions) if text != instruction]
    # one stream of numbers for each kind, so that adding a kind changes no other
    rng = np.random.default_rng([seed, *kind.encode()])
    return PROMPT_KINDS[kind].make(instruction, others, rng)


def _nonsense(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    return " ".join("".join(rng.choice(_SYLLABLES, 2)) for _ in text.split())


def _random_words(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    known = sorted({word for each in (text, *others) for word in each.split()})
    return " ".join(rng.choice(known, len(text.split())))


def _opposite(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    parts = take_apart(text)
    if parts is None:
        return text
    lead, _, preposition = parts.joint.rpartition("it ")
    joint = f"{lead}{'it ' if lead else ''}{OPPOSITES.get(preposition, preposition)}"
    target = " ".join(OPPOSITES.get(word, word) for word in parts.target.split())
    verb = OPPOSITES.get(parts.verb, parts.verb)
    return " ".join(each for each in (verb, parts.object, joint, target) if each)


def _wrong(part: str) -> Make:
    def make(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
        own, choices = take_apart(text), other_parts(part, text, others)
        if own is None or not choices or not getattr(own, part):
            return text
        chosen = str(rng.choice(choices))
        return str(type(own)(**vars(own) | {part: chosen}))

    return make


def _other_task(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    return str(rng.choice(list(others))) if others else text


def _absent_object(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    own = take_apart(text)
    said = " ".join((text, *others)).lower().split()
    absent = next((each for each in ABSENT if each.split()[-1] not in said), None)
    return text if own is None or absent is None else str(type(own)(**vars(own) | {"object": absent}))


def _paraphrase(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    own = take_apart(text)
    if own is None or not own.target:
        return f"your task is to {text}"
    preposition = own.joint.rpartition("it ")[2]
    return f"{preposition} {own.target} {own.verb} {own.object}"


def _synonyms(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    return " ".join(str(rng.choice(SYNONYMS[word])) if word in SYNONYMS else word for word in text.split())


def _typo(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    """Two neighbouring letters inside of up to two words change places."""
    words = text.split()
    # letters that are alike would change nothing
    places = {
        i: [j for j in range(1, len(word) - 1) if word[j] != word[j + 1]]
        for i, word in enumerate(words)
        if len(word) > 3
    }
    able = [i for i, found in places.items() if found]
    for i in rng.permutation(able)[:2] if able else []:
        j = int(rng.choice(places[int(i)]))
        word = words[int(i)]
        words[int(i)] = word[:j] + word[j + 1] + word[j] + word[j + 2 :]
    return " ".join(words)


def _shuffled(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    words = text.split()
    if len(set(words)) < 2:
        return text
    shuffled = words
    while shuffled == words:
        shuffled = [words[i] for i in rng.permutation(len(words))]
    return " ".join(shuffled)


def _only_verb(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    own = take_apart(text)
    return text if own is None else own.verb


def _only_noun(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    own = take_apart(text)
    return text if own is None else without_articles(f"{own.object} {own.target}".strip())


def _foreign(text: str, others: Sequence[str], rng: np.random.Generator) -> str:
    return " ".join(FOREIGN.get(word, word) for word in text.lower().split())


def _said(words: str) -> Make:
    return lambda text, others, rng: words


def _around(before: str, after: str = "") -> Make:
    return lambda text, others, rng: f"{before}{text}{after}"


PROMPT_KINDS = {
    kind.name: kind
    for kind in (
        PromptKind("null", NO_GOAL, "no text at all, through the tokenizer", _said("")),
        PromptKind("nonsense", NO_GOAL, "as many invented words", _nonsense),
        PromptKind("random_words", CORRUPTED, "as many words of the suite, at random", _random_words),
        PromptKind("negation", CONTRADICTED, '"do not" before the instruction', _around("do not ")),
        PromptKind("opposite", CONTRADICTED, "verb and preposition turned round: take ... from", _opposite),
        PromptKind("stop", NO_GOAL, '"stop"', _said("stop")),
        PromptKind("wrong_object", OTHER_GOAL, "another task's object, the own target", _wrong("object")),
        PromptKind("wrong_target", OTHER_GOAL, "the own object, another task's target", _wrong("target")),
        PromptKind("other_task", OTHER_GOAL, "another task's instruction", _other_task),
        PromptKind("absent_object", OTHER_GOAL, "an object that no scene has", _absent_object),
        PromptKind("left", NO_GOAL, '"move left"', _said("move left")),
        PromptKind("right", NO_GOAL, '"move right"', _said("move right")),
        PromptKind("up", NO_GOAL, '"move up"', _said("move up")),
        PromptKind("down", NO_GOAL, '"move down"', _said("move down")),
        PromptKind("paraphrase", SAME_GOAL, "the place named first", _paraphrase),
        PromptKind("synonyms", SAME_GOAL, "every word that has a synonym by one", _synonyms),
        PromptKind("typo", CORRUPTED, "neighbouring letters exchanged in two words", _typo),
        PromptKind("shuffled", CORRUPTED, "the same words in another order", _shuffled),
        PromptKind("upper_case", SAME_GOAL, "in capital letters", lambda text, others, rng: text.upper()),
        PromptKind("only_verb", NO_GOAL, "the verb alone", _only_verb),
        PromptKind("only_noun", SAME_GOAL, "object and target alone, without articles", _only_noun),
        PromptKind("filler", SAME_GOAL, '"please" before and "now" after it', _around("please ", " now")),
        PromptKind("foreign", SAME_GOAL, "German, word by word", _foreign),
    )
}
