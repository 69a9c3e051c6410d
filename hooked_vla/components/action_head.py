"""How an expert's outputs become actions."""

from collections.abc import Callable

import torch
from jaxtyping import Float
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
