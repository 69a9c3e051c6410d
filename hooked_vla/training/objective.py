"""What is minimised: the family's own loss, plus a read-out of which image tokens show the meant block and pad.

The read-out looks at the language model's residual stream, token by token; it makes the tower's places and the
instruction meet early in training, and is thrown away afterwards.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.hooks import HookPoint
from hooked_vla.inputs import LANGUAGE, ModelInputs, Segments, image_segment
from hooked_vla.training.tower import PlaceHead, Seen, place_loss
from hooked_vla.vla import HookedVLA

GOALS = ("block", "pad")


@dataclass(frozen=True)
class Readout:
    """Where the meant objects are read from: a hook point with shape [batch seq d], the tokens of one camera in it, and
    how much the error counts. The tokens stand in rows from the top; before them, there may be some for the whole
    image.

    prompt_grid: where image tokens come before the instruction and cannot see it, the prompt's mean token and its last
    one are read instead, and say for every place of so many rows and columns what its image token would; 0: image
    tokens are read.
    """

    site: str
    weight: float
    camera: str = "top"
    prompt_grid: int = 0


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
            n_places = readout.prompt_grid**2 or 1
            self.norm, self.read = nn.LayerNorm(width), PlaceHead(width, n_places * len(GOALS))

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
        segments = model.segments(inputs)[self.readout.site.partition(".")[0]]
        read = self._prompt(segments, seen[0]) if self.readout.prompt_grid else [self._places(segments, seen[0])]
        error = torch.stack([place_loss(self._said(tokens), goals) for tokens in read]).mean()
        return loss + self.readout.weight * error, loss.detach(), error.detach()

    def _places(
        self, segments: Segments, stream: Float[Tensor, "batch seq d_model"]
    ) -> Float[Tensor, "batch place d_model"]:
        """The camera's tokens, of which each row has as many."""
        assert self.readout is not None
        tokens = stream[segments.mask(image_segment(self.readout.camera))].unflatten(0, (len(stream), -1))
        return tokens[:, -(math.isqrt(tokens.shape[1]) ** 2) :]

    def _prompt(
        self, segments: Segments, stream: Float[Tensor, "batch seq d_model"]
    ) -> list[Float[Tensor, "batch 1 d_model"]]:
        """The mean token of the prompt, to which each word may say its part, and the last one, which has gathered what
        the first action is made of."""
        said = segments.mask(LANGUAGE)
        # in training, the actions follow the prompt
        stream = stream[:, : said.shape[1]]
        mean = (stream * said[..., None]).sum(1, keepdim=True) / said.sum(1)[:, None, None]
        last = (said * torch.arange(said.shape[1], device=said.device)).argmax(1)
        return [mean, stream[torch.arange(len(stream), device=said.device), last][:, None]]

    def _said(self, tokens: Float[Tensor, "batch token d_model"]) -> Seen:
        """What the tokens say of every place."""
        near, offsets = self.read(self.norm(tokens))
        return near.reshape(len(near), -1, len(GOALS)), offsets.reshape(len(offsets), -1, len(GOALS), 2)
