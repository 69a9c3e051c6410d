"""Whether a change of what is observed reaches the model: compared behind the checkpoint's own preprocessing.

A prompt may come out of the tokenizer as it was (capitals, unknown words of equal number), and a picture of a camera
that the model does not read changes nothing. Such an arm is a second baseline and must not count as "no effect".
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_vla.inputs import ModelInputs
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.settings import Settings, constant_text
from hooked_vla.vla import HookedVLA

Frame = Mapping[str, Any]


@dataclass(frozen=True)
class Reach:
    """What of a changed observation reaches the model.

    tokens: positions of the text that hold another id, those that one text alone has included. pixels: share of the
    numbers that the vision tower reads which differ; pixel_change: mean of their absolute difference, in the model's
    units. text: ids of the changed text, without padding.
    """

    tokens: int
    pixels: float
    pixel_change: float
    text: tuple[int, ...]

    @property
    def changed(self) -> bool:
        return self.tokens > 0 or self.pixels > 0


def reaches(model: HookedVLA, settings: Settings, before: Frame, after: Frame) -> Reach:
    """Compares two observations of a suite as the model gets them under these settings of a rollout.

    Raises KeyError or ValueError as `acting.prepare`: also for text of more tokens than the model takes.
    """
    with constant_text(model.processor, settings.constant_text):
        first, second = (prepare(model, settings, [frame]) for frame in (before, after))
    images = [_images(each) for each in (first, second)]
    texts = [_text(each) for each in (first, second)]
    differ = images[0] != images[1]
    return Reach(
        tokens=_differing(texts[0], texts[1]),
        pixels=float(differ.float().mean()) if differ.numel() else 0.0,
        pixel_change=float((images[0] - images[1]).abs().mean()) if differ.numel() else 0.0,
        text=tuple(texts[1]),
    )


def check_reach(name: str, model: HookedVLA, settings: Settings, cell: Cell, before: Frame, after: Frame) -> Reach:
    """What of an arm's change of an observation reaches the model. name: the arm's.

    Raises ValueError where nothing does, naming the arm and the episode.
    """
    found = reaches(model, settings, before, after)
    if not found.changed:
        raise ValueError(
            f"arm {name!r} changes nothing that reaches the model in {cell}: neither a token nor a pixel differs "
            "behind the preprocessing, so this episode is the baseline's. Leave the arm out, or run it as it is with "
            "inert='run'"
        )
    return found


def reads_text(model: HookedVLA, settings: Settings, frame: Frame) -> bool:
    """Whether the model reads instructions at all."""
    return hasattr(prepare(model, settings, [frame]), "tokens")


def known_tokens(model: HookedVLA, text: str) -> tuple[int, int]:
    """How many tokens of a text the model's tokenizer knows, of how many; begin and end marks aside.

    Raises TypeError for a model that reads no text.
    """
    tokenizer = getattr(model.processor, "tokenizer", None)
    if tokenizer is None:
        raise TypeError(f"{model.spec.name} reads no text")
    loaded = tokenizer.load()
    ids, unknown = loaded(text)["input_ids"], loaded.unk_token_id
    ids = [each for each in ids if each == unknown or each not in loaded.all_special_ids]
    return sum(each != unknown for each in ids), len(ids)


def _images(inputs: ModelInputs) -> Tensor:
    images = getattr(inputs, "images", None)
    return torch.empty(0) if images is None else images


def _text(inputs: ModelInputs) -> list[int]:
    """Ids of the one row's text, without padding; none for a model that reads no text."""
    tokens = getattr(inputs, "tokens", None)
    if tokens is None:
        return []
    return tokens[0][inputs.token_mask[0]].tolist()  # pyright: ignore[reportAttributeAccessIssue]


def _differing(first: Sequence[int], second: Sequence[int]) -> int:
    same = sum(a == b for a, b in zip(first, second, strict=False))
    return max(len(first), len(second)) - same
