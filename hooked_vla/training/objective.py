"""What is minimised: the family's own loss, plus a linear read-out of where the meant block and pad are.

The read-out looks at the language model's residual stream; it makes the tower's places and the instruction meet early
in training, and is thrown away afterwards.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.hooks import HookPoint
from hooked_vla.inputs import ModelInputs
from hooked_vla.vla import HookedVLA

# metres: about the spread of places on the table
_SCALE = 0.15


@dataclass(frozen=True)
class Readout:
    """Where goals are read from: a hook point with shape [batch seq d], and how much the error counts."""

    site: str
    weight: float


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
            self.read = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4))

    def forward(
        self, inputs: ModelInputs, actions: Float[Tensor, "batch step d_action"], goals: Float[Tensor, "batch 4"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        model, seen = self._model[0], []

        def look(value: Tensor, hook: HookPoint) -> None:
            seen.append(value)

        if self.readout is None:
            loss = model.training_loss(inputs, actions, n_draws=self.n_draws).mean()
            return loss, loss.detach(), torch.zeros(())
        with model.hooks([(self.readout.site, look)]):
            loss = model.training_loss(inputs, actions, n_draws=self.n_draws).mean()
        # every position is asked, so that whichever the actions are read from knows
        error = functional.smooth_l1_loss(self.read(seen[0].mean(dim=1)), goals / _SCALE)
        return loss + self.readout.weight * error, loss.detach(), error.detach()
