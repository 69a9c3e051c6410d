"""A U-Net over time: convolutions along the action steps, halved level by level; FiLM tells every block what was seen.

Maps are [batch channel step] inside; points show them as [batch step channel]. Level i sees the chunk at 1 / 2^i of
its steps, in the token stream "expert.down.{i}" (level 0: "expert").
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.embed import cossin_bucket
from hooked_vla.hooks.point import HookPoint
from hooked_vla.spec import UNetSpec

# of the last convolution's norm, whatever n_groups says (LeRobot, as diffusion_policy: conditional_unet1d.py)
FINAL_GROUPS = 8

StepMap = Float[Tensor, "batch channel step"]


def level_stream(level: int) -> str:
    """Token stream of a level's steps."""
    return f"expert.down.{level}" if level else "expert"


def _show(point: HookPoint, x: StepMap) -> StepMap:
    if not point.listeners:
        return x
    return rearrange(point(rearrange(x, "b c t -> b t c")), "b t c -> b c t")


class ConvNorm(nn.Module):
    """mish(GroupNorm(conv(x))), as many steps out as in."""

    def __init__(self, d_in: int, d_out: int, kernel_size: int, n_groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(d_in, d_out, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(n_groups, d_out)

    def forward(self, x: Float[Tensor, "batch d_in step"]) -> Float[Tensor, "batch d_out step"]:
        return functional.mish(self.norm(self.conv(x)))


class FilmBlock(nn.Module):
    """conv2(scale · conv1(x) + shift) + shortcut(x); scale and shift are linear in the condition (no 1 + scale)."""

    def __init__(self, d_in: int, d_model: int, d_condition: int, spec: UNetSpec, level: int) -> None:
        super().__init__()
        self.d_model, self.film_scale = d_model, spec.film_scale
        self.conv1 = ConvNorm(d_in, d_model, spec.kernel_size, spec.n_groups)
        self.film = nn.Linear(d_condition, 2 * d_model if spec.film_scale else d_model)
        self.conv2 = ConvNorm(d_model, d_model, spec.kernel_size, spec.n_groups)
        self.shortcut = nn.Conv1d(d_in, d_model, 1) if d_in != d_model else nn.Identity()
        stream = level_stream(level)
        self.hook_conv1 = HookPoint("batch seq d_model", stream=stream)
        if spec.film_scale:
            self.hook_film_scale = HookPoint("batch d_model")
        self.hook_film_shift = HookPoint("batch d_model")
        self.hook_modulated = HookPoint("batch seq d_model", stream=stream)
        self.hook_conv2 = HookPoint("batch seq d_model", stream=stream)
        self.hook_resid_post = HookPoint("batch seq d_model", stream=stream)

    def forward(
        self, x: Float[Tensor, "batch d_in step"], condition: Float[Tensor, "batch d_condition"]
    ) -> Float[Tensor, "batch d_model step"]:
        hidden = _show(self.hook_conv1, self.conv1(x))
        film = self.film(condition)
        if self.film_scale:
            scale, film = film.chunk(2, dim=-1)
            hidden = self.hook_film_scale(scale)[..., None] * hidden
        hidden = _show(self.hook_modulated, hidden + self.hook_film_shift(film)[..., None])
        conv2 = _show(self.hook_conv2, self.conv2(hidden))
        return _show(self.hook_resid_post, conv2 + self.shortcut(x))


class Level(nn.Module):
    """Two blocks, "0" and "1". `resample`, where there is one, changes the number of steps after them to level `to`."""

    def __init__(
        self, d_in: int, d_model: int, d_condition: int, spec: UNetSpec, level: int, to: int,
        resample: nn.Module | None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.d_model = d_model
        self.add_module("0", FilmBlock(d_in, d_model, d_condition, spec, level))
        self.add_module("1", FilmBlock(d_model, d_model, d_condition, spec, level))
        self.resample = resample
        if resample is not None:
            self.hook_resampled = HookPoint("batch seq d_model", stream=level_stream(to))

    def forward(
        self, x: Float[Tensor, "batch d_in step"], condition: Float[Tensor, "batch d_condition"]
    ) -> Float[Tensor, "batch d_model step"]:
        """Before resampling."""
        for name in ("0", "1"):
            x = self.get_submodule(name)(x, condition)
        return x

    def change_steps(self, x: Float[Tensor, "batch d_model step"]) -> Float[Tensor, "batch d_model new_step"]:
        """Resampled, or as it is."""
        return x if self.resample is None else _show(self.hook_resampled, self.resample(x))


class UpLevel(Level):
    """A level whose input is what comes from below beside what the way down left at the same number of steps."""

    def __init__(
        self, d_in: int, d_model: int, d_condition: int, spec: UNetSpec, level: int, resample: nn.Module
    ) -> None:
        super().__init__(d_in, d_model, d_condition, spec, level, level - 1, resample)
        self.d_with_skip = d_in
        self.hook_with_skip = HookPoint("batch seq d_with_skip", stream=level_stream(level))


class UNet1d(nn.Module):
    """Prediction for a noisy action chunk, given the denoising step and a condition vector."""

    def __init__(self, spec: UNetSpec, d_action: int, chunk: int, d_condition: int, predicts_noise: bool) -> None:
        super().__init__()
        self.d_action, self.chunk, self.d_condition, self.d_time = d_action, chunk, d_condition, spec.d_time
        self.time_mlp_in = nn.Linear(spec.d_time, 4 * spec.d_time)
        self.time_mlp_out = nn.Linear(4 * spec.d_time, spec.d_time)
        widths, both = spec.widths, d_condition + spec.d_time
        last = len(widths) - 1
        self.down = nn.ModuleList(
            Level(d_in, width, both, spec, i, i + 1,
                  nn.Conv1d(width, width, 3, stride=2, padding=1) if i < last else None)
            for i, (d_in, width) in enumerate(zip((d_action, *widths), widths, strict=False))
        )  # fmt: skip
        self.mid = Level(widths[-1], widths[-1], both, spec, last, last, None)
        # the first level's output is never read again: upward levels take those of the levels below it
        self.up = nn.ModuleList(
            UpLevel(2 * widths[i], widths[i - 1], both, spec, i,
                    nn.ConvTranspose1d(widths[i - 1], widths[i - 1], 4, stride=2, padding=1))
            for i in range(last, 0, -1)
        )  # fmt: skip
        self.final = ConvNorm(widths[0], widths[0], spec.kernel_size, FINAL_GROUPS)
        self.action_out_proj = nn.Conv1d(widths[0], d_action, 1)
        self.predicts_noise = predicts_noise
        self.hook_noisy_actions = HookPoint("batch chunk d_action", dtype="float32", reused=True)
        self.hook_time = HookPoint("batch d_time")
        self.hook_condition = HookPoint("batch d_condition", per_chunk=True)
        if predicts_noise:
            self.hook_noise = HookPoint("batch chunk d_action", dtype="float32")
        self.hook_clean_actions = HookPoint("batch chunk d_action", dtype="float32")

    def embed_time(self, step: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_time"]:
        """Sines and cosines of the step through a two-layer MLP."""
        cos, sin = cossin_bucket(step, self.d_time).chunk(2, dim=-1)
        embedded = torch.cat([sin, cos], dim=-1).to(self.time_mlp_in.weight.dtype)
        return self.hook_time(self.time_mlp_out(functional.mish(self.time_mlp_in(embedded))))

    def forward(
        self,
        noisy: Float[Tensor, "batch chunk d_action"],
        step: Int[Tensor, " batch"],
        condition: Float[Tensor, "batch d_condition"],
    ) -> tuple[Float[Tensor, "batch chunk d_action"], Float[Tensor, "batch chunk d_action"]]:
        """The noisy actions as hooks left them, and the prediction: their noise, or the clean actions."""
        noisy = self.hook_noisy_actions(noisy)
        time = self.embed_time(step)
        told = functional.mish(torch.cat([time, self.hook_condition(condition)], dim=-1))
        x = rearrange(noisy.to(time.dtype), "b t a -> b a t")
        skips = []
        for level in self.down:
            assert isinstance(level, Level)
            x = level(x, told)
            skips.append(x)
            x = level.change_steps(x)
        x = self.mid(x, told)
        for level in self.up:
            assert isinstance(level, UpLevel)
            x = _show(level.hook_with_skip, torch.cat([x, skips.pop()], dim=1))
            x = level.change_steps(level(x, told))
        prediction = self.action_out_proj(self.final(x.to(self.action_out_proj.weight.dtype)))
        prediction = rearrange(prediction, "b a t -> b t a").float()
        return noisy, self.hook_noise(prediction) if self.predicts_noise else prediction
