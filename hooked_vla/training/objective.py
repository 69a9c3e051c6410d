"""What is minimised: the family's own loss, plus a read-out of which image tokens show the meant block and pad.

The read-out looks at the language model's residual stream, token by token; it makes the tower's places and the
instruction meet early in training, and is thrown away afterwards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.hooks import HookPoint
from hooked_vla.inputs import ModelInputs, image_segment
from hooked_vla.training.tower import PlaceHead, place_loss
from hooked_vla.vla import HookedVLA

GOALS = ("block", "pad")


@dataclass(frozen=True)
class Readout:
    """Where the meant objects are read from: a hook point with shape [batch seq d], the tokens of one camera in it, in
    rows from the top, and how much the error counts."""

    site: str
    weight: float
    camera: str = "top"


class Objective(nn.Module):
    """Loss of a batch: (total, the family's loss, the read-out's error)."""

    def __init__(self, model: HookedVLA, n_draws: int, readout: Readout | None) -> None:
        super().__init__()
        self.net, self.n_draws, self.readout = model.net, n_draws, readout
        # not a submodule: its parameters are those of `net`
        self._model = [model]
        if readout is not None:
            width = model.hook_points[readout.site].shape[-1]
            assert isinstance(width, int)
            self.norm, self.read = nn.LayerNorm(width), PlaceHead(width, len(GOALS))

    def forward(
        self,
        inputs: ModelInputs,
        actions: Float[Tensor, "batch step d_action"],
        goals: Float[Tensor, "batch goal 2"],
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        model, seen = self._model[0], []

        def look(value: Tensor, hook: HookPoint) -> None:
            seen.append(value)

        if self.readout is None:
            loss = model.training_loss(inputs, actions, n_draws=self.n_draws).mean()
            return loss, loss.detach(), torch.zeros(())
        with model.hooks([(self.readout.site, look)]):
            loss = model.training_loss(inputs, actions, n_draws=self.n_draws).mean()
        stream = self.readout.site.partition(".")[0]
        # the camera's tokens have the same places in every row
        tokens = model.segments(inputs)[stream].positions(image_segment(self.readout.camera))[0]
        error = place_loss(self.read(self.norm(seen[0][:, tokens])), goals)
        return loss + self.readout.weight * error, loss.detach(), error.detach()
