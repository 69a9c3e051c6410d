"""From image features to language-model tokens."""

from collections.abc import Sequence
from itertools import pairwise
from math import isqrt

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.embed import interleaved_sincos
from hooked_vla.components.mlp import activation
from hooked_vla.components.norm import LayerNorm
from hooked_vla.hooks.point import HookPoint


class PixelShuffleConnector(nn.Module):
    """Folds scale × scale neighbouring patches into the channels of one token, then maps to d_model.

    Channels of a token run over its patches row by row, each patch's features together (SmolVLM, Idefics3).
    The patches are taken as a square whatever the image's shape was, as the public implementation does.
    """

    def __init__(self, d_vision: int, d_model: int, scale: int, bias: bool) -> None:
        super().__init__()
        self.d_model, self.d_shuffled, self.scale = d_model, d_vision * scale**2, scale
        self.proj = nn.Linear(self.d_shuffled, d_model, bias=bias)
        self.hook_shuffled = HookPoint("batch seq d_shuffled")
        self.hook_out = HookPoint("batch seq d_model")

    def forward(self, features: Float[Tensor, "image patch d_vision"]) -> Float[Tensor, "image seq d_model"]:
        side = isqrt(features.shape[1])
        self.n_tokens(features.shape[1])
        shuffled = rearrange(
            features, "i (h dh w dw) d -> i (h w) (dh dw d)",
            h=side // self.scale, dh=self.scale, w=side // self.scale, dw=self.scale,
        )  # fmt: skip
        return self.hook_out(self.proj(self.hook_shuffled(shuffled)))

    def n_tokens(self, n_patches: int) -> int:
        """Tokens made of so many patches.

        Raises ValueError when the patches are not a square that `scale` divides.
        """
        side = isqrt(n_patches)
        if side * side != n_patches or side % self.scale:
            raise ValueError(f"{n_patches} patches are not a square whose side {self.scale} divides")
        return (side // self.scale) ** 2


class ConvConnector(nn.Module):
    """A 1 × 1 convolution: each position of a feature map becomes one token."""

    def __init__(self, d_vision: int, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.proj = nn.Conv2d(d_vision, d_model, kernel_size=1)
        self.hook_out = HookPoint("batch seq d_model")

    def forward(self, features: Float[Tensor, "image d_vision height width"]) -> Float[Tensor, "image seq d_model"]:
        tokens = self.proj(features.to(self.proj.weight.dtype))
        return self.hook_out(rearrange(tokens, "i d h w -> i (h w) d"))


class LinearConnector(nn.Module):
    """One linear map from image features to d_model, patch by patch."""

    def __init__(self, d_vision: int, d_model: int, bias: bool) -> None:
        super().__init__()
        self.d_model = d_model
        self.proj = nn.Linear(d_vision, d_model, bias=bias)
        self.hook_out = HookPoint("batch seq d_model")

    def forward(self, features: Float[Tensor, "image patch d_vision"]) -> Float[Tensor, "image patch d_model"]:
        return self.hook_out(self.proj(features))


class HiddenLayer(nn.Module):
    """post = act(x W + b)."""

    def __init__(self, d_in: int, d_hidden: int, act: str) -> None:
        super().__init__()
        self.d_hidden, self.act = d_hidden, activation(act)
        self.proj = nn.Linear(d_in, d_hidden)
        self.hook_pre = HookPoint("batch seq d_hidden")
        self.hook_post = HookPoint("batch seq d_hidden")

    def forward(self, x: Float[Tensor, "image seq d_in"]) -> Float[Tensor, "image seq d_hidden"]:
        return self.hook_post(self.act(self.hook_pre(self.proj(x))))


class MLPConnector(nn.Module):
    """Each patch through hidden layers of the given widths, then one linear map to d_model."""

    def __init__(self, d_vision: int, hidden: Sequence[int], d_model: int, act: str) -> None:
        super().__init__()
        self.d_model = d_model
        widths = [d_vision, *hidden]
        self.layers = nn.ModuleList(HiddenLayer(d_in, d_out, act) for d_in, d_out in pairwise(widths))
        self.proj = nn.Linear(widths[-1], d_model)
        self.hook_out = HookPoint("batch seq d_model")

    def forward(self, features: Float[Tensor, "image patch d_vision"]) -> Float[Tensor, "image patch d_model"]:
        x = features
        for layer in self.layers:
            x = layer(x)
        return self.hook_out(self.proj(x))


class GridConnector(nn.Module):
    """Florence-2's: learned places added to features on a grid, their mean as a first token, a linear map, a norm.

    A place is its column's vector followed by its row's. `times` is a table of sines and cosines for images in a
    sequence, of which single images take the first row; a buffer, since public files hold it.
    """

    def __init__(self, d_vision: int, d_model: int, n_positions: int, n_times: int, eps: float) -> None:
        super().__init__()
        self.d_vision, self.d_model, self.n_positions = d_vision, d_model, n_positions
        self.rows = nn.Embedding(n_positions, d_vision // 2)
        self.columns = nn.Embedding(n_positions, d_vision - d_vision // 2)
        self.times: Tensor
        self.register_buffer("times", interleaved_sincos(n_times, d_vision))
        self.proj = nn.Linear(d_vision, d_model, bias=False)
        self.ln_out = LayerNorm(d_model, eps)
        self.hook_pos_embed = HookPoint("seq d_vision", stream="vision")
        self.hook_pooled = HookPoint("batch 1 d_vision")
        self.hook_out = HookPoint("batch seq d_model")

    def forward(
        self, features: Float[Tensor, "image place d_vision"], grid: tuple[int, int]
    ) -> Float[Tensor, "image seq d_model"]:
        x = features + self.hook_pos_embed(self.places(*grid, features.device)) + self.times[0].to(features)
        pooled = self.hook_pooled(x.mean(1, keepdim=True))
        return self.hook_out(self.ln_out(self.proj(torch.cat([pooled, x], dim=1))))

    def places(self, height: int, width: int, device: torch.device) -> Float[Tensor, "place d_vision"]:
        """Vectors of the places of a grid, row by row.

        Raises ValueError for a grid larger than the tables."""
        if max(height, width) > self.n_positions:
            raise ValueError(
                f"image features of {height} × {width} places, but there are {self.n_positions} rows and columns"
            )
        columns = repeat(self.columns(torch.arange(width, device=device)), "w d -> (h w) d", h=height)
        rows = repeat(self.rows(torch.arange(height, device=device)), "h d -> (h w) d", w=width)
        return torch.cat([columns, rows], dim=-1)
