"""Words of the tabletop: a tokenizer of one token a word, and the ways in which an instruction may be said."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from hooked_vla.rollouts.tabletop import TASKS

SYNONYMS = {
    "put": ("place", "move", "set"),
    "block": ("cube", "brick"),
    "on": ("onto",),
    "pad": ("square", "mat"),
    "carry": ("bring",),
}
# a line break, a word, or a mark
_TOKEN = r"\n|\w+(?:'\w+)*|[^\w\s]"
_PLACED = re.compile(r"(?P<verb>\w+ the \w+ \w+) (?P<place>on(?:to)? the \w+ \w+)")
# words that users and prompt batteries try, beside those of the tasks
_MORE_WORDS = (
    "a an and do not don't never no stop nothing pick up grasp lift release drop push pull turn take it then with from "
    "to in of near far left right middle front back up down forward backward above below under over slowly fast slow "
    "high low quickly slower faster gently first second robot arm gripper hand table cup ball bowl plate drawer "
    "apple object thing black white gray grey pink brown task please now random wait stay still"
)


def vocabulary(extra: Iterable[str] = ()) -> list[str]:
    """Every word that the shipped models know, in a fixed order; `extra` comes after the words of the tasks."""
    said = [word for tasks in TASKS.values() for task in tasks for word in task.instruction.split()]
    said += [word for words in SYNONYMS.values() for word in words] + _MORE_WORDS.split()
    return list(dict.fromkeys(["<pad>", "<unk>", "\n", *sorted(set(said)), *extra]))


def split(text: str) -> list[str]:
    """The words of a text, as `word_tokenizer` tells them apart."""
    return re.findall(_TOKEN, text.lower())


def lay_out(words: Iterable[str], last: Sequence[str], size: int) -> list[str]:
    """`size` words: those given, unused ones, and `last` at the very end, where a pretrained vocabulary has its own.

    Raises ValueError where there are too many.
    """
    known = list(dict.fromkeys(words))
    n_unused = size - len(known) - len(last)
    if n_unused < 0:
        raise ValueError(f"{len(known)} words and {len(last)} special ones do not fit a vocabulary of {size}")
    return [*known, *(f"<unused {i}>" for i in range(n_unused)), *last]


def word_tokenizer(words: Sequence[str], whole: Iterable[str] = ()) -> Any:
    """A Hugging Face tokenizer with one token for each of `words` and each line break; anything else is <unk>.

    whole: those of the words that are not to be split into words and marks, such as <|im_start|>.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_TOKEN), "removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(word, normalized=False, special=True) for word in whole])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


def paraphrase(instruction: str, rng: np.random.Generator) -> str:
    """The instruction in other words: synonyms, and now and then the place named first."""
    words = [
        rng.choice((word, *SYNONYMS[word])) if word in SYNONYMS and rng.random() < 0.5 else word
        for word in instruction.split()
    ]
    text = " ".join(words)
    placed = _PLACED.fullmatch(text)
    return f"{placed['place']} {placed['verb']}" if placed and rng.random() < 0.15 else text


def prompt_variants(instruction: str, n: int, rng: np.random.Generator, share: float, dropped: float) -> list[str]:
    """`n` prompts for an instruction: a share of them paraphrased, a share dropped (empty), the others as they are."""
    draws = rng.random(n)
    return [
        "" if draw < dropped else paraphrase(instruction, rng) if draw < dropped + share else instruction
        for draw in draws
    ]
