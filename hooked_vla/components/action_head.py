"""How an expert's outputs become actions, and what training asks of one call of the expert."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_vla.components.losses import Term, pad_channels, sum_of_terms
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import Draws

Chunk = Float[Tensor, "batch chunk d_action"]
Target = Float[Tensor, "batch chunk d_real"]
StepLosses = Float[Tensor, "batch chunk"]

# training times are Beta(1.5, 1), squeezed so that they keep off the end that has no noise (openpi: pi0.py)
TIME_ALPHA, TIME_SPAN = 1.5, 0.999


class SamplingHead(nn.Module):
    """Makes actions of noise by calling an expert again and again; training calls it once, at a drawn time."""

    def __init__(self, n_steps: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.n_steps, self.chunk, self.d_action = n_steps, chunk, d_action
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(self, noise: Chunk, denoise: Callable[[Tensor, Tensor], Any], run: Run) -> Chunk:
        """The chunk that repeated calls of `denoise` make of noise."""
        raise NotImplementedError

    def draw_time(self, draws: Draws, batch: int) -> Float[Tensor, " batch"]:
        """The time of each row's training example."""
        raise NotImplementedError

    def losses(
        self, actions: Target, noise: Chunk, time: Float[Tensor, " batch"], denoise: Callable[[Tensor, Tensor], Any]
    ) -> StepLosses:
        """The training objective at every step of the chunk, from one call of `denoise`; channels that the target
        lacks are 0 in what the expert sees."""
        raise NotImplementedError


class FlowMatchingHead(SamplingHead):
    """Euler integration of a velocity field from noise at t = 1 to actions at t = 0."""

    def forward(self, noise: Chunk, denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], run: Run) -> Chunk:
        """`denoise(x, t)` returns the chunk it saw (after hooks) and the velocity there; t is [batch]."""
        x, dt = noise, -1.0 / self.n_steps
        for step in range(self.n_steps):
            run.denoise_step = step
            time = torch.full((noise.shape[0],), 1.0 + step * dt, dtype=torch.float32, device=noise.device)
            x, velocity = denoise(x, time)
            x = x + dt * velocity
        run.denoise_step = None
        return self.hook_actions(x)

    def draw_time(self, draws: Draws, batch: int) -> Float[Tensor, " batch"]:
        """0.001 + 0.999 · Beta(1.5, 1), whose second term is drawn (openpi: pi0.py)."""
        return 1 - TIME_SPAN + TIME_SPAN * draws.beta(TIME_ALPHA, (batch,))

    def losses(
        self,
        actions: Target,
        noise: Chunk,
        time: Float[Tensor, " batch"],
        denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> StepLosses:
        """Squared error of the velocity at t · noise + (1 - t) · actions, which is noise - actions, over the
        target's channels."""
        padded, mix = pad_channels(actions, self.d_action), time[:, None, None]
        _, velocity = denoise(mix * noise + (1 - mix) * padded, time)
        return (noise - padded - velocity)[..., : actions.shape[-1]].square().mean(-1)


class ForwardFlowHead(SamplingHead):
    """Euler integration of a velocity field from noise at t = 0 to actions at t = 1, t given in whole buckets.

    n_buckets: how many buckets the unit of time has; step k of n is in bucket floor(k / n · n_buckets).
    train_times: what the ends 0 and 1 of the Beta distribution that training draws from become.
    """

    def __init__(
        self, n_steps: int, n_buckets: int, chunk: int, d_action: int, train_times: tuple[float, float]
    ) -> None:
        super().__init__(n_steps, chunk, d_action)
        self.n_buckets, self.train_times = n_buckets, train_times

    def forward(self, noise: Chunk, denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], run: Run) -> Chunk:
        """`denoise(x, bucket)` returns the chunk it saw (after hooks) and the velocity there; bucket is [batch]."""
        x, dt = noise, 1.0 / self.n_steps
        for step in range(self.n_steps):
            run.denoise_step = step
            bucket = torch.full((noise.shape[0],), int(step / self.n_steps * self.n_buckets), device=noise.device)
            x, velocity = denoise(x, bucket)
            x = x + dt * velocity
        run.denoise_step = None
        return self.hook_actions(x)

    def draw_time(self, draws: Draws, batch: int) -> Float[Tensor, " batch"]:
        """A draw of Beta(1.5, 1), between the training times (Isaac-GR00T: flow_matching_action_head.py)."""
        at_0, at_1 = self.train_times
        return at_0 + (at_1 - at_0) * draws.beta(TIME_ALPHA, (batch,))

    def losses(
        self,
        actions: Target,
        noise: Chunk,
        time: Float[Tensor, " batch"],
        denoise: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    ) -> StepLosses:
        """Squared error of the velocity at (1 - t) · noise + t · actions, which is actions - noise, over the target's
        channels; the expert is told the bucket that t falls in."""
        padded, mix = pad_channels(actions, self.d_action), time[:, None, None]
        _, velocity = denoise((1 - mix) * noise + mix * padded, (time * self.n_buckets).long())
        return (padded - noise - velocity)[..., : actions.shape[-1]].square().mean(-1)


class LinearHead(nn.Module):
    """Each action token mapped linearly to its action, in float32 from there on."""

    def __init__(self, d_model: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.chunk, self.d_action = chunk, d_action
        self.proj = nn.Linear(d_model, d_action)
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(self, tokens: Float[Tensor, "batch chunk d_model"]) -> Chunk:
        return self.hook_actions(self.proj(tokens.to(self.proj.weight.dtype)).float())


class ResamplingHead(SamplingHead):
    """Clean actions predicted again and again, each time from the last prediction mixed with the same noise.

    grippers: channels whose last prediction is squashed to 0..1. terms: of the training objective.
    """

    def __init__(self, n_steps: int, chunk: int, d_action: int, grippers: Sequence[int], terms: Sequence[Term]) -> None:
        super().__init__(n_steps, chunk, d_action)
        self.grippers, self.terms = tuple(grippers), tuple(terms)

    def forward(self, noise: Chunk, predict: Callable[[Tensor, Tensor], Tensor], run: Run) -> Chunk:
        """`predict(x, t)` returns the clean chunk behind x = t · noise + (1 - t) · clean; t is [batch]."""
        clean = torch.zeros_like(noise)
        for step in range(self.n_steps):
            run.denoise_step = step
            time = torch.full(
                (noise.shape[0],), (self.n_steps - step) / self.n_steps, dtype=torch.float32, device=noise.device
            )
            mix = time[:, None, None]
            clean = predict(noise * mix + clean * (1 - mix), time)
        run.denoise_step = None
        squashed = torch.where(channel_mask(self.grippers, clean), clean.sigmoid(), clean)
        return self.hook_actions(squashed)

    def draw_time(self, draws: Draws, batch: int) -> Float[Tensor, " batch"]:
        """Spread evenly over 0..1, one offset drawn for the whole batch: row i of n is at (u + i / n) mod 1, short of
        1 itself (X-VLA: modeling_xvla.py)."""
        rows = torch.arange(batch, dtype=torch.float32, device=draws.device) / batch
        return (draws.uniform((1,)) + rows) % (1 - 1e-5)

    def losses(
        self, actions: Target, noise: Chunk, time: Float[Tensor, " batch"], denoise: Callable[[Tensor, Tensor], Tensor]
    ) -> StepLosses:
        """The terms, of the clean chunk predicted behind t · noise + (1 - t) · actions."""
        padded, mix = pad_channels(actions, self.d_action), time[:, None, None]
        return sum_of_terms(self.terms, denoise(noise * mix + padded * (1 - mix), time), padded)


def channel_mask(channels: Sequence[int], like: Float[Tensor, "*any d_action"]) -> Bool[Tensor, " d_action"]:
    """True at the given channels of the last axis."""
    places = torch.arange(like.shape[-1], device=like.device)
    mask = torch.zeros_like(places, dtype=torch.bool)
    for channel in channels:
        mask = mask | (places == channel)
    return mask
