"""How an expert's outputs become actions."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooked_vla.hooks.point import HookPoint, Run

Chunk = Float[Tensor, "batch chunk d_action"]


class FlowMatchingHead(nn.Module):
    """Euler integration of a velocity field from noise at t = 1 to actions at t = 0."""

    def __init__(self, n_steps: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.n_steps, self.chunk, self.d_action = n_steps, chunk, d_action
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

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


class ForwardFlowHead(nn.Module):
    """Euler integration of a velocity field from noise at t = 0 to actions at t = 1, t given in whole buckets.

    n_buckets: how many buckets the unit of time has; step k of n is in bucket floor(k / n · n_buckets).
    """

    def __init__(self, n_steps: int, n_buckets: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.n_steps, self.n_buckets, self.chunk, self.d_action = n_steps, n_buckets, chunk, d_action
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

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


class LinearHead(nn.Module):
    """Each action token mapped linearly to its action, in float32 from there on."""

    def __init__(self, d_model: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.chunk, self.d_action = chunk, d_action
        self.proj = nn.Linear(d_model, d_action)
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(self, tokens: Float[Tensor, "batch chunk d_model"]) -> Chunk:
        return self.hook_actions(self.proj(tokens.to(self.proj.weight.dtype)).float())


class ResamplingHead(nn.Module):
    """Clean actions predicted again and again, each time from the last prediction mixed with the same noise.

    grippers: channels whose last prediction is squashed to 0..1.
    """

    def __init__(self, n_steps: int, chunk: int, d_action: int, grippers: Sequence[int]) -> None:
        super().__init__()
        self.n_steps, self.chunk, self.d_action, self.grippers = n_steps, chunk, d_action, tuple(grippers)
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

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


def channel_mask(channels: Sequence[int], like: Float[Tensor, "*any d_action"]) -> Bool[Tensor, " d_action"]:
    """True at the given channels of the last axis."""
    places = torch.arange(like.shape[-1], device=like.device)
    mask = torch.zeros_like(places, dtype=torch.bool)
    for channel in channels:
        mask = mask | (places == channel)
    return mask
