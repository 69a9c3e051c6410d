"""What goes into a policy and what comes out: observations, model inputs, actions, and who owns each token.

Observation and Actions are what a user holds; ModelInputs, with its subclasses, is what a network's forward pass
reads, after the checkpoint's own preprocessing. Segments says, for one token stream, which positions are which
camera's image tokens, language, state, action or padding; caches and edits select by it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PAD = "pad"
LANGUAGE = "language"
STATE = "state"
ACTION = "action"
SPECIAL = "special"
FUTURE = "future"
SOFT_PROMPT = "soft_prompt"
LATENT = "latent"
ENVIRONMENT = "environment"


Inputs = TypeVar("Inputs", bound="ModelInputs")


def image_segment(camera: str) -> str:
    """Segment name of one camera's tokens, e.g. `image:top`."""
    return f"image:{camera}"


@dataclass(frozen=True)
class Observation:
    """One raw observation, or a batch of them, as a robot or simulator gives it.

    images: camera name -> uint8 [H W 3] or [B H W 3] in 0..255, or float [3 H W] or [B 3 H W] in 0..1.
    state: proprioception in the robot's own units, [d_state] or [B d_state].
    instruction: one string for every row, or one string a row.
    image_masks: camera name -> bool [B]; False hides that camera from the model in that row.
    """

    images: Mapping[str, Any]
    state: Any
    instruction: str | Sequence[str]
    image_masks: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Actions:
    """A chunk of actions.

    chunk: [batch step d_action] in the robot's units, or normalised when the batch came already preprocessed.
    normalized: the same steps as the network produced them, before un-normalisation; its channels may be others.
    """

    chunk: Float[Tensor, "batch step d_action"]
    normalized: Float[Tensor, "batch step d_network"]


@dataclass(frozen=True)
class ModelInputs:
    """A preprocessed batch, everything on the model's device; rows are independent.

    Each kind of network has its own subclass; tensors with as many rows as the batch are cut by `rows`.
    raw: made from a raw observation, so that the actions are to be un-normalised.
    features: what `Network.vision_features` made of the images; the vision tower is then not run, its hook points do
    not fire, and images may be None. The axes before the places are those of the images.
    """

    raw: bool = field(default=False, kw_only=True)
    features: Float[Tensor, "batch *place d_vision"] | None = field(default=None, kw_only=True)

    @property
    def batch_size(self) -> int:
        raise NotImplementedError

    def rows(self: Inputs, rows: Sequence[int] | slice) -> Inputs:
        """The same inputs for some batch rows only; a row may come more than once."""
        pick = rows if isinstance(rows, slice) else list(rows)
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return replace(self, **{name: value[pick] for name, value in values.items() if isinstance(value, Tensor)})


@dataclass(frozen=True)
class VLAInputs(ModelInputs):
    """Inputs of a model that reads camera images, text and proprioception."""

    images: Float[Tensor, "batch camera channel height width"] | None
    image_mask: Bool[Tensor, "batch camera"]
    tokens: Int[Tensor, "batch text"]
    token_mask: Bool[Tensor, "batch text"]
    state: Float[Tensor, "batch d_state"]
    cameras: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class DomainInputs(VLAInputs):
    """Inputs of a model with weights for each domain. cameras: those that are there; the model has places for more."""

    domain: Int[Tensor, " batch"]


@dataclass(frozen=True)
class PromptedInputs(VLAInputs):
    """Inputs of a model that answers a prompt with action tokens, one chunk's at a time.

    action_tokens: the answer, if it is given: the model reads it in the same pass as the prompt instead of
    generating (teacher forcing), and what it would have said at each place becomes the actions.
    """

    action_tokens: Int[Tensor, "batch token"] | None = None


@dataclass(frozen=True)
class EmbodiedInputs(ModelInputs):
    """Inputs of a model in whose text image tokens have their places, and which has weights for each embodiment.

    images: what the vision tower reads, the same for every camera: [channel height width], or [patch d_patch].
    grid: rows and columns of patches of every image. tokens are padded anywhere; token_mask says where they are not.
    """

    images: Float[Tensor, "batch camera *image"] | None
    tokens: Int[Tensor, "batch text"]
    token_mask: Bool[Tensor, "batch text"]
    state: Float[Tensor, "batch d_state"]
    embodiment: Int[Tensor, " batch"]
    cameras: tuple[str, ...]
    grid: tuple[int, int]

    @property
    def batch_size(self) -> int:
        return self.tokens.shape[0]


@dataclass(frozen=True)
class StepInputs(ModelInputs):
    """Inputs of a policy without language: what the last observation steps showed, the present one last.

    environment: `observation.environment_state`, such as the places of objects. None: the policy does not read it.
    """

    images: Float[Tensor, "batch step camera 3 height width"] | None
    state: Float[Tensor, "batch step d_state"] | None
    environment: Float[Tensor, "batch step d_environment"] | None
    cameras: tuple[str, ...]

    @property
    def batch_size(self) -> int:
        given = (self.images, self.features, self.state, self.environment)
        return next(len(each) for each in given if each is not None)

    def follow(self, history: "Sequence[StepInputs]") -> "StepInputs":
        """The last step of each of `history`, then this one's, as successive steps."""
        steps = [*history, self]

        def join(name: str) -> Tensor | None:
            parts = [getattr(each, name) for each in steps]
            return None if parts[0] is None else torch.cat([part[:, -1:] for part in parts], dim=1)

        return replace(self, **{name: join(name) for name in ("images", "features", "state", "environment")})


class Draws:
    """The random numbers of one forward pass: those given, in order, or fresh ones from the global generator."""

    def __init__(self, given: Tensor | Sequence[Tensor] | None, device: torch.device) -> None:
        self.device = device
        self.given = None if given is None else [given] if isinstance(given, Tensor) else list(given)
        self.n_taken = 0

    def normal(self, shape: Sequence[int]) -> Tensor:
        """A standard-normal float32 draw.

        Raises ValueError when the next given draw has another shape, or there is none.
        """
        if self.given is None:
            return torch.randn(tuple(shape), device=self.device)
        return self._shaped(shape)

    def uniform(self, shape: Sequence[int]) -> Tensor:
        """A float32 draw from 0..1.

        Raises ValueError when the next given draw has another shape or other values, or there is none.
        """
        if self.given is None:
            return torch.rand(tuple(shape), device=self.device)
        return self._share(shape)

    def beta(self, alpha: float, shape: Sequence[int]) -> Tensor:
        """A float32 draw from Beta(alpha, 1), which lies in 0..1 and has the distribution function x^alpha.

        Raises ValueError when the next given draw has another shape or other values, or there is none.
        """
        if self.given is None:
            return torch.rand(tuple(shape), device=self.device) ** (1 / alpha)
        return self._share(shape)

    def integers(self, n: int, shape: Sequence[int]) -> Int[Tensor, "*shape"]:
        """A draw of whole numbers 0..n-1, each equally likely.

        Raises ValueError when the next given draw has another shape or dtype or other values, or there is none.
        """
        if self.given is None:
            return torch.randint(n, tuple(shape), device=self.device)
        draw = self._next()
        if draw.is_floating_point() or tuple(draw.shape) != tuple(shape) or draw.min() < 0 or draw.max() >= n:
            raise ValueError(
                f"draw {self.n_taken} must be integers 0..{n - 1} {list(shape)}, got {draw.dtype} {list(draw.shape)}"
            )
        self.n_taken += 1
        return draw.to(self.device).long()

    def choice(self, weights: Float[Tensor, "row option"]) -> Int[Tensor, "row 1"]:
        """One option a row, with probabilities in proportion to the weights.

        A given draw is either the options themselves, integers [row 1], which then hold whatever the weights are;
        or float [row option], exponentially distributed: the option with the largest weight / draw wins, which has
        the right probabilities and lets runs with different weights share their draws.
        Raises ValueError when the next given draw is neither, or there is none.
        """
        if self.given is None:
            return torch.multinomial(weights, num_samples=1)
        draw, (rows, options) = self._next().to(self.device), weights.shape
        if draw.is_floating_point() and draw.shape == weights.shape:
            chosen = (weights / draw).argmax(-1, keepdim=True)
        elif (
            tuple(draw.shape) == (rows, 1) and not draw.is_floating_point() and draw.min() >= 0 and draw.max() < options
        ):
            chosen = draw.long()
        else:
            raise ValueError(
                f"draw {self.n_taken} must be options 0..{options - 1} as integers [{rows}, 1], or exponential draws "
                f"[{rows}, {options}]; got {draw.dtype} {list(draw.shape)}"
            )
        self.n_taken += 1
        return chosen

    def _share(self, shape: Sequence[int]) -> Tensor:
        draw = self._shaped(shape)
        if not bool(((draw >= 0) & (draw <= 1)).all()):
            raise ValueError(
                f"draw {self.n_taken - 1} must be in 0..1, got {float(draw.min()):.3g}..{float(draw.max()):.3g}"
            )
        return draw

    def _shaped(self, shape: Sequence[int]) -> Tensor:
        draw = self._next()
        if tuple(draw.shape) != tuple(shape):
            raise ValueError(f"noise must be {list(shape)} (draw {self.n_taken}), got {list(draw.shape)}")
        self.n_taken += 1
        # a copy: the caller may use its buffer again while a cache holds this
        return draw.to(device=self.device, dtype=torch.float32, copy=True)

    def _next(self) -> Tensor:
        assert self.given is not None
        if self.n_taken == len(self.given):
            raise ValueError(f"noise has {len(self.given)} draws, but the model needs more")
        return torch.as_tensor(self.given[self.n_taken])

    def check_used_up(self) -> None:
        """Raises ValueError when given draws are left over."""
        if self.given is not None and self.n_taken != len(self.given):
            raise ValueError(f"noise has {len(self.given)} draws, but the model used {self.n_taken}")


@dataclass(frozen=True, eq=False)
class Segments:
    """Which token positions of a stream belong to what, for every row.

    names: the segments of the stream, in order of first position; "pad" marks positions that are masked.
    labels: index into `names` for each row and position.
    row_axis: "batch", or "image" where each row of the stream is one camera's image of one batch row.
    """

    names: tuple[str, ...]
    labels: Int[Tensor, "rows seq"]
    row_axis: str = "batch"

    @classmethod
    def from_spans(
        cls, spans: Sequence[tuple[str, int]], batch: int, valid: Bool[Tensor, "batch seq"] | None = None
    ) -> "Segments":
        """Segments of a stream laid out as consecutive (name, length) spans; where `valid` is False, "pad"."""
        names = tuple(dict.fromkeys([*(name for name, _ in spans), PAD]))
        index = torch.cat([torch.full((length,), names.index(name)) for name, length in spans])
        labels = index.expand(batch, -1)
        if valid is not None:
            labels = labels.to(valid.device).masked_fill(~valid, names.index(PAD))
        return cls(names, labels)

    @classmethod
    def concatenate(cls, first: "Segments", second: "Segments") -> "Segments":
        """The stream that has the tokens of `first` followed by those of `second`."""
        names = tuple(dict.fromkeys(first.names + second.names))
        parts = []
        for part in (first, second):
            lookup = torch.tensor([names.index(name) for name in part.names], device=part.labels.device)
            parts.append(lookup[part.labels].to(first.labels.device))
        return cls(names, torch.cat(parts, dim=1), first.row_axis)

    def present(self) -> list[str]:
        """The segments that own at least one position in some row."""
        return [name for i, name in enumerate(self.names) if bool((self.labels == i).any())]

    def mask(self, name: str) -> Bool[Tensor, "rows seq"]:
        """True where a position belongs to the segment `name`; a name ending in "*" takes every match.

        Raises KeyError, with the stream's segments, when there is no such segment.
        """
        if name.endswith("*"):
            chosen = [i for i, other in enumerate(self.names) if other.startswith(name[:-1])]
        else:
            chosen = [i for i, other in enumerate(self.names) if other == name]
        if not chosen:
            raise KeyError(f"no token segment {name!r} in this stream; it has {list(self.names)}")
        mask = torch.zeros_like(self.labels, dtype=torch.bool)
        for i in chosen:
            mask |= self.labels == i
        return mask

    def positions(self, name: str) -> list[Int[Tensor, " n"]]:
        """Positions of the segment in each row; rows may differ in number."""
        return [row.nonzero().flatten() for row in self.mask(name)]

    def spans(self, row: int = 0) -> list[tuple[str, int, int]]:
        """Runs of equal label in one row as (name, start, stop)."""
        labels = self.labels[row].tolist()
        starts = [i for i in range(len(labels)) if i == 0 or labels[i] != labels[i - 1]]
        return [
            (self.names[labels[start]], start, stop)
            for start, stop in zip(starts, [*starts[1:], len(labels)], strict=True)
        ]

    def to(self, device: torch.device) -> "Segments":
        """The same segments with their labels on a device."""
        return replace(self, labels=self.labels.to(device))

    def rows(self, rows: Sequence[int] | slice) -> "Segments":
        """The same segments for some rows only."""
        return replace(self, labels=self.labels[rows if isinstance(rows, slice) else list(rows)])
