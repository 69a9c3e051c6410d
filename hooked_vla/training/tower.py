"""Pretraining of a small vision tower: every patch says which objects are near it, and where they are.

The public VLAs start from towers that were trained on images elsewhere and freeze them; this one learns to see the
tabletop, and its features carry places to a fraction of a patch.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.training.frames import OBJECTS

# an object is "near" a patch whose centre is within so many patches of it, along both sides
NEAR = 1.0


class PlaceHead(nn.Module):
    """For every patch and object: a logit of being near, and the offset from the patch's centre, in patches."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.proj = nn.Linear(d_model, 3 * len(OBJECTS))

    def forward(
        self, features: Float[Tensor, "image patch d_model"]
    ) -> tuple[Float[Tensor, "image patch object"], Float[Tensor, "image patch object 2"]]:
        near, offsets = self.proj(features).split((len(OBJECTS), 2 * len(OBJECTS)), dim=-1)
        return near, offsets.unflatten(-1, (-1, 2))


def patch_centres(side: int) -> Float[Tensor, "patch 2"]:
    """Column and row of the centres of side × side patches, row by row, 0..1."""
    along = (torch.arange(side) + 0.5) / side
    return torch.stack([along.repeat(side), along.repeat_interleave(side)], dim=-1)


def place_targets(
    places: Float[Tensor, "image object 2"], side: int
) -> tuple[Bool[Tensor, "image patch object"], Float[Tensor, "image patch object 2"]]:
    """What PlaceHead is to say: near or not, and offsets (0 where not near)."""
    offsets = (places[:, None] - patch_centres(side)[:, None].to(places)) * side
    near = (offsets.abs() < NEAR).all(dim=-1)
    return near, torch.where(near[..., None], offsets, 0)


def place_loss(
    near: Float[Tensor, "image patch object"],
    offsets: Float[Tensor, "image patch object 2"],
    places: Float[Tensor, "image object 2"],
    side: int,
) -> Float[Tensor, ""]:
    """Cross-entropy of nearness, and the mean absolute error of offsets where an object is near."""
    is_near, target = place_targets(places, side)
    seen = functional.binary_cross_entropy_with_logits(near, is_near.float()) * len(OBJECTS)
    return seen + ((offsets - target).abs().sum(-1) * is_near).sum() / is_near.sum().clamp(min=1)


def read_places(
    near: Float[Tensor, "image patch object"], offsets: Float[Tensor, "image patch object 2"]
) -> Float[Tensor, "image object 2"]:
    """Places as the tower's patches vote for them, weighted by how near they say to be."""
    side = int(near.shape[1] ** 0.5)
    votes = patch_centres(side)[:, None].to(offsets) + offsets / side
    weights = (4 * near).softmax(dim=1)
    return (weights[..., None] * votes).sum(dim=1)


def as_pixels(images: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "image 3 height width"]:
    """Bytes to the -1..1 that the tower takes."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def train_tower(
    tower: nn.Module,
    head: PlaceHead,
    batches: Iterator[tuple[UInt8[Tensor, "image height width 3"], Float[Tensor, "image object 2"]]],
    n_steps: int,
    peak_rate: float = 2e-3,
) -> Iterator[float]:
    """Train on batches of images and places; yields the loss of every step."""
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, peak_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, n_steps, pct_start=0.05)
    for _ in range(n_steps):
        images, places = next(batches)
        near, offsets = head(tower(as_pixels(images)))
        loss = place_loss(near, offsets, places, side=int(near.shape[1] ** 0.5))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        yield float(loss)
