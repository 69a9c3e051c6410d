"""Pretraining of a small vision tower: every patch says which objects are near it, and where they are.

The public VLAs start from towers that were trained on images elsewhere and freeze them; this one learns to see the
tabletop, and its features carry places to a fraction of a patch. It is the model's own `vision`, whatever that is: what
`Network.see` makes of images is read out patch by patch.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.resnet import FrozenBatchNorm
from hooked_vla.inputs import Observation, StepInputs
from hooked_vla.training.frames import OBJECTS, Frames
from hooked_vla.vla import HookedVLA

# an object is "near" a patch whose centre is within so many patches of it, along both sides
NEAR = 1.0

Seen = tuple[Float[Tensor, "image patch object"], Float[Tensor, "image patch object 2"]]


class PlaceHead(nn.Module):
    """For every patch and object: a logit of being near, and the offset from the patch's centre, in patches."""

    def __init__(self, d_model: int, n_objects: int = len(OBJECTS)) -> None:
        super().__init__()
        self.n_objects = n_objects
        self.proj = nn.Linear(d_model, 3 * n_objects)

    def forward(self, features: Float[Tensor, "image patch d_model"]) -> Seen:
        near, offsets = self.proj(features).split((self.n_objects, 2 * self.n_objects), dim=-1)
        return near, offsets.unflatten(-1, (-1, 2))


def see(model: HookedVLA, images: UInt8[np.ndarray, "frame camera height width 3"]) -> Float[Tensor, "image patch d"]:
    """The tower's features of every camera of every frame, after the model's own preprocessing; patches row by row."""
    features = model.spec.features
    shown = {camera: images[:, i] for i, camera in enumerate(features.cameras)}
    inputs = model.prepare(Observation(shown, np.zeros((len(images), features.d_state), np.float32), "see"))
    seen = model.net.see(inputs)
    # a policy of several observation steps has an axis for them
    seen = seen[:, 0] if isinstance(inputs, StepInputs) else seen
    return seen.reshape(len(images) * len(shown), -1, seen.shape[-1])


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


def place_loss(seen: Seen, places: Float[Tensor, "image object 2"]) -> Float[Tensor, ""]:
    """Cross-entropy of nearness, and the mean absolute error of offsets where an object is near."""
    near, offsets = seen
    is_near, target = place_targets(places, side=int(near.shape[1] ** 0.5))
    seen_loss = functional.binary_cross_entropy_with_logits(near, is_near.float()) * is_near.shape[-1]
    return seen_loss + ((offsets - target).abs().sum(-1) * is_near).sum() / is_near.sum().clamp(min=1)


def train_tower(
    model: HookedVLA,
    batches: Iterator[Frames],
    n_steps: int,
    peak_rate: float = 2e-3,
) -> Iterator[tuple[float, PlaceHead]]:
    """Train the model's tower in place on images and places; yields each step's loss, and the head that reads it."""
    tower, head = model.net.get_submodule("vision"), PlaceHead(model.net.d_features)
    with thawed(tower):
        parameters = [*tower.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(parameters, peak_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, n_steps, pct_start=0.05)
        for _ in range(n_steps):
            frames = next(batches)
            loss = place_loss(head(see(model, frames.images)), torch.from_numpy(frames.places).flatten(0, 1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            yield loss.item(), head


@contextmanager
def thawed(tower: nn.Module) -> Iterator[None]:
    """For the block, frozen batch norms are batch norms that learn; afterwards they hold what these learned."""
    frozen = {name: each for name, each in tower.named_modules() if isinstance(each, FrozenBatchNorm)}
    for name, norm in frozen.items():
        tower.set_submodule(name, nn.BatchNorm2d(len(norm.weight), norm.eps))
    try:
        yield
    finally:
        for name, norm in frozen.items():
            learned = tower.get_submodule(name).state_dict()
            norm.load_state_dict({key: learned[key] for key in norm.state_dict()})
            tower.set_submodule(name, norm)
