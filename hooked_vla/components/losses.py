"""What training objectives share: targets as wide as a network, and the mean error of a row's steps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional


def pad_channels(actions: Float[Tensor, "*any d_action"], width: int) -> Float[Tensor, "*any width"]:
    """Zeros behind the last channel up to `width` (LeRobot: vla_utils.pad_vector)."""
    return functional.pad(actions, (0, width - actions.shape[-1]))


class Term(NamedTuple):
    """One term of an objective: weight · the mean over some channels.

    kind: "square" (of the difference) or "logit" (the prediction is the logit of a probability, the target is one; its
    cross-entropy).
    """

    kind: str
    channels: tuple[int, ...]
    weight: float


def sum_of_terms(
    terms: Sequence[Term], predicted: Float[Tensor, "batch step channel"], target: Float[Tensor, "batch step channel"]
) -> Float[Tensor, "batch step"]:
    """The terms of every step, added."""
    total = torch.zeros_like(predicted[..., 0])
    for kind, channels, weight in terms:
        of, to = predicted[..., list(channels)], target[..., list(channels)]
        if kind == "square":
            errors = (of - to).square()
        else:
            assert kind == "logit", kind
            errors = functional.binary_cross_entropy_with_logits(of, to, reduction="none")
        total = total + weight * errors.mean(-1)
    return total


def mean_of_steps(
    losses: Float[Tensor, "batch step"], valid: Bool[Tensor, "batch step"] | None
) -> Float[Tensor, " batch"]:
    """Each row's mean over its valid steps (None: all of them); 0 for a row without any."""
    if valid is None:
        return losses.mean(1)
    return torch.where(valid, losses, 0.0).sum(1) / valid.sum(1).clamp(min=1)


def mean_of_draws(losses: Float[Tensor, " row"], n_draws: int) -> Float[Tensor, " batch"]:
    """Each row's mean over its draws, which stand one batch after the other."""
    return rearrange(losses, "(n b) -> n b", n=n_draws).mean(0)


def check_targets(
    actions: Float[Tensor, "..."], valid: Tensor | None, shape: tuple[int, int, int], n_draws: int
) -> None:
    """shape: the batch, the steps of a chunk, and the robot's channels.

    Raises ValueError for targets or a mask of another shape and for fewer draws than one, TypeError for a mask that is
    not boolean.
    """
    if tuple(actions.shape) != shape:
        raise ValueError(f"target actions must be {list(shape)} (batch, step, d_action), got {list(actions.shape)}")
    if n_draws < 1:
        raise ValueError(f"n_draws must be 1 or more, got {n_draws}")
    if valid is None:
        return
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be boolean, got {valid.dtype}")
    if tuple(valid.shape) != shape[:2]:
        raise ValueError(f"valid must be {list(shape[:2])} (batch, step), got {list(valid.shape)}")
