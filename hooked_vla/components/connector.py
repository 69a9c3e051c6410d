"""From image features to language-model tokens."""

from math import isqrt

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

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
