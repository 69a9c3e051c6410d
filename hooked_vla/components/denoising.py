"""Diffusion samplers: from noise to an action chunk by ancestral (DDPM, arXiv 2006.11239) or deterministic (DDIM, arXiv
2010.02502) steps. Coefficients are computed in float32, as in diffusers: at the noisiest steps their rounding shows.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import Draws
from hooked_vla.spec import SamplerSpec

Chunk = Float[Tensor, "batch chunk d_action"]

# no step may remove more than this share of the signal (diffusers: betas_for_alpha_bar)
_MAX_BETA = 0.999
# least variance of a fresh draw (diffusers: DDPMScheduler)
_MIN_VARIANCE = 1e-20


def squared_cosine_betas(n: int) -> list[float]:
    """Share of the signal's variance that each of n steps removes (arXiv 2102.09672)."""

    def level(fraction: float) -> float:
        return math.cos((fraction + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - level((t + 1) / n) / level(t / n), _MAX_BETA) for t in range(n)]


def noise_schedule(spec: SamplerSpec) -> Float[Tensor, " n_train_steps"]:
    """The share of the signal's variance that is left after each training step, by diffusers' schedule names.

    Raises ValueError for an unknown schedule.
    """
    n, start, end = spec.n_train_steps, spec.beta_start, spec.beta_end
    if spec.schedule == "squaredcos_cap_v2":
        betas = torch.tensor(squared_cosine_betas(n), dtype=torch.float32, device="cpu")
    elif spec.schedule == "linear":
        betas = torch.linspace(start, end, n, device="cpu")
    elif spec.schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, n, device="cpu") ** 2
    elif spec.schedule == "sigmoid":
        betas = torch.linspace(-6, 6, n, device="cpu").sigmoid() * (end - start) + start
    else:
        known = "squaredcos_cap_v2, linear, scaled_linear, sigmoid"
        raise ValueError(f"unknown noise schedule {spec.schedule!r}; known: {known}")
    return (1 - betas).cumprod(0)


def add_noise(
    clean: Float[Tensor, "batch chunk d_action"],
    noise: Float[Tensor, "batch chunk d_action"],
    step: Int[Tensor, " batch"],
    signal: Float[Tensor, " n_steps"],
) -> Float[Tensor, "batch chunk d_action"]:
    """sqrt(signal) · clean + sqrt(1 - signal) · noise, with what is left of the signal at each row's step t."""
    left = signal[step][:, None, None]
    return left.sqrt() * clean + (1 - left).sqrt() * noise


class Step(NamedTuple):
    """One denoising step: x becomes of_clean · clean + of_x · x + of_noise · predicted noise + fresh · a draw.

    time: the training step that it undoes. signal, noise: what x is made of, sqrt(ᾱ) · clean + sqrt(1 - ᾱ) · noise.
    """

    time: int
    signal: float
    noise: float
    of_clean: float
    of_x: float
    of_noise: float
    fresh: float


def denoising_steps(spec: SamplerSpec) -> list[Step]:
    """The steps in order; the times are multiples of n_train_steps // n_steps, the last is 0.

    Raises ValueError for more steps than the model was trained with, and for unknown names.
    """
    if not 0 < spec.n_steps <= spec.n_train_steps:
        raise ValueError(f"{spec.n_steps} denoising steps, but the model was trained with {spec.n_train_steps}")
    if spec.kind not in ("ddpm", "ddim"):
        raise ValueError(f"unknown sampler {spec.kind!r}; known: ddpm, ddim")
    left, stride = noise_schedule(spec), spec.n_train_steps // spec.n_steps
    one = torch.ones((), device="cpu")
    return [
        _step(spec.kind, i * stride, left[i * stride], left[(i - 1) * stride] if i else one)
        for i in range(spec.n_steps - 1, -1, -1)
    ]


def _step(kind: str, time: int, left: Tensor, left_before: Tensor) -> Step:
    """left: share of the signal's variance now; left_before: at the step before, which this one goes to."""
    alpha = left / left_before
    beta, gone, gone_before = 1 - alpha, 1 - left, 1 - left_before
    if kind == "ddim":
        coefficients = (left_before.sqrt(), torch.zeros_like(left), gone_before.sqrt(), torch.zeros_like(left))
    else:
        variance = (gone_before / gone * beta).clamp(min=_MIN_VARIANCE)
        fresh = variance.sqrt() if time else torch.zeros_like(left)
        coefficients = (left_before.sqrt() * beta / gone, alpha.sqrt() * gone_before / gone, fresh * 0, fresh)
    return Step(time, *(float(each) for each in (left.sqrt(), gone.sqrt(), *coefficients)))


class DiffusionHead(nn.Module):
    """Denoises a chunk of `horizon` steps and hands out `chunk` of them, from step `start` on."""

    def __init__(self, spec: SamplerSpec, horizon: int, start: int, chunk: int, d_action: int) -> None:
        super().__init__()
        self.spec, self.horizon, self.start = spec, horizon, start
        self.chunk, self.d_action = chunk, d_action
        self.steps = denoising_steps(spec)
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(
        self,
        batch: int,
        draws: Draws,
        denoise: Callable[[Chunk, Int[Tensor, " batch"]], tuple[Tensor, Tensor]],
        show_clean: Callable[[Tensor], Tensor],
        run: Run,
    ) -> Chunk:
        """`denoise(x, time)` returns the chunk it saw (after hooks) and its prediction; `show_clean` sees the clean
        chunk that the prediction implies. Drawn: the starting noise, then the fresh noise of each step that has any."""
        shape = (batch, self.horizon, self.d_action)
        x = draws.normal(shape)
        for i, step in enumerate(self.steps):
            run.denoise_step = i
            x, prediction = denoise(x, torch.full((batch,), step.time, device=x.device))
            noise, clean = self._split(x, prediction, step)
            clean = show_clean(clean)
            x = step.of_clean * clean + step.of_x * x
            if step.of_noise:
                x = x + step.of_noise * noise
            if step.fresh:
                x = x + step.fresh * draws.normal(shape)
        run.denoise_step = None
        return self.hook_actions(x[:, self.start : self.start + self.chunk])

    def losses(
        self,
        actions: Chunk,
        draws: Draws,
        n_draws: int,
        denoise: Callable[[Chunk, Int[Tensor, " row"]], tuple[Tensor, Tensor]],
    ) -> Float[Tensor, "row horizon"]:
        """Squared error of the prediction at a drawn training step, over channels; n_draws batches in a row.

        Drawn for each: the noise, then each row's step, integers [batch].
        """
        n, batch = self.spec.n_train_steps, len(actions)
        drawn = [(draws.normal(actions.shape), draws.integers(n, (batch,))) for _ in range(n_draws)]
        noise, time = (torch.cat(each) for each in zip(*drawn, strict=True))
        clean = repeat(actions, "b t d -> (n b) t d", n=n_draws)
        _, prediction = denoise(add_noise(clean, noise, time, noise_schedule(self.spec).to(clean)), time)
        target = noise if self.spec.prediction == "epsilon" else clean
        return (prediction - target).square().mean(-1)

    def _split(self, x: Chunk, prediction: Chunk, step: Step) -> tuple[Chunk, Chunk]:
        """The noise in x as predicted, and the clean chunk, clipped."""
        if self.spec.prediction == "epsilon":
            noise, clean = prediction, (x - step.noise * prediction) / step.signal
        else:
            noise, clean = (x - step.signal * prediction) / step.noise, prediction
        return noise, clean if self.spec.clip is None else clean.clamp(-self.spec.clip, self.spec.clip)
