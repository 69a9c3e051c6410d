"""Vision transformer over patches that come as vectors, and the mergers that make language-model tokens of them.

Merge order: the merge × merge patches that will become one token follow each other, and the tokens run row by row.
"""

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.attention import RotarySelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm
from hooked_vla.components.rope import Rotation, grid_rotation
from hooked_vla.hooks.point import HookPoint
from hooked_vla.spec import PatchVisionSpec


class PatchProjection(nn.Conv3d):
    """A patch's pixels, [channel frame row column] flattened, mapped linearly to d_model."""

    def __init__(self, frames: int, patch_size: int, d_model: int) -> None:
        size = (frames, patch_size, patch_size)
        super().__init__(3, d_model, kernel_size=size, stride=size)

    def forward(self, patches: Float[Tensor, "image seq d_patch"]) -> Float[Tensor, "image seq d_model"]:
        return functional.linear(patches, self.weight.flatten(1), self.bias)


class InterpolatedPositions(nn.Embedding):
    """Learned positions of a square grid, bilinearly interpolated; the grid's corners are the image's corners."""

    def __init__(self, grid: int, d_model: int) -> None:
        super().__init__(grid * grid, d_model)
        self.grid = grid

    def forward(self, places: Int[Tensor, "seq 2"], height: int, width: int) -> Float[Tensor, "seq d_model"]:
        """Positions for the rows and columns `places` of a grid of height × width patches."""
        sides = [torch.linspace(0, self.grid - 1, n, device=places.device) for n in (height, width)]
        y, x = (side[places[:, axis]] for axis, side in enumerate(sides))
        total = torch.zeros(1, dtype=self.weight.dtype, device=places.device)
        for row, row_weight in _neighbours(y, self.grid):
            for column, column_weight in _neighbours(x, self.grid):
                weight = (row_weight * column_weight).to(self.weight.dtype)
                total = total + super().forward(row * self.grid + column) * weight[:, None]
        return total


def _neighbours(place: Float[Tensor, " seq"], grid: int) -> list[tuple[Int[Tensor, " seq"], Float[Tensor, " seq"]]]:
    below = place.long()
    above = (below + 1).clamp(max=grid - 1)
    return [(below, 1 - (place - below)), (above, place - below)]


def merge_order(height: int, width: int, merge: int, device: torch.device) -> Int[Tensor, "seq 2"]:
    """Row and column of every patch of a grid, in merge order."""
    rows, columns = torch.meshgrid(
        torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij"
    )
    places = torch.stack([rows, columns], dim=-1)
    return rearrange(places, "(h dh) (w dw) two -> (h w dh dw) two", dh=merge, dw=merge)


class PatchViT(nn.Module):
    """Patches in merge order to features of every patch, without a final norm, and the features at the taps."""

    def __init__(self, spec: PatchVisionSpec) -> None:
        super().__init__()
        self.d_model, self.merge, self.taps, self.rope_base = spec.d_model, spec.merge, spec.taps, spec.rope_base
        self.d_head = spec.d_model // spec.n_heads
        self.patch_embed = PatchProjection(spec.frames, spec.patch_size, spec.d_model)
        self.pos_embed = InterpolatedPositions(spec.grid, spec.d_model)
        self.blocks = nn.ModuleList(_block(spec, self.d_head) for _ in range(spec.n_layers))
        self.hook_patch_embed = HookPoint("batch seq d_model")
        self.hook_pos_embed = HookPoint("seq d_model")
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(
        self, patches: Float[Tensor, "image seq d_patch"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "image seq d_model"], list[Tensor]]:
        embedded = self.hook_patch_embed(self.patch_embed(patches.to(self.patch_embed.weight.dtype)))
        places = merge_order(*grid, self.merge, patches.device)
        x = self.hook_tokens(embedded + self.hook_pos_embed(self.pos_embed(places, *grid)))
        by = grid_rotation(places, self.d_head, self.rope_base)
        tapped = {}
        for i, block in enumerate(self.blocks):
            x = block(x, by, None)
            tapped[i] = x
        return x, [tapped[i] for i in self.taps]


def _block(spec: PatchVisionSpec, d_head: int) -> Block:
    return Block(
        spec.d_model,
        ln1=LayerNorm(spec.d_model, spec.eps),
        attn=RotarySelfAttention(spec.d_model, spec.n_heads, spec.n_heads, d_head, bias=True),
        ln2=LayerNorm(spec.d_model, spec.eps),
        mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
    )


class PatchMerger(nn.Module):
    """merge × merge neighbouring patches become one token: a norm, then two linear maps with a GELU between.

    norm_merged: the norm is over all features of a token, not over those of each patch.
    """

    def __init__(self, d_vision: int, d_model: int, merge: int, eps: float, norm_merged: bool) -> None:
        super().__init__()
        self.d_model, self.d_shuffled, self.merge, self.norm_merged = d_model, d_vision * merge**2, merge, norm_merged
        self.ln = nn.LayerNorm(self.d_shuffled if norm_merged else d_vision, eps=eps)
        self.up_proj = nn.Linear(self.d_shuffled, self.d_shuffled)
        self.down_proj = nn.Linear(self.d_shuffled, d_model)
        self.hook_shuffled = HookPoint("batch seq d_shuffled")
        self.hook_pre = HookPoint("batch seq d_shuffled")
        self.hook_post = HookPoint("batch seq d_shuffled")
        self.hook_out = HookPoint("batch seq d_model")

    def forward(self, features: Float[Tensor, "image patch d_vision"]) -> Float[Tensor, "image seq d_model"]:
        features = features if self.norm_merged else self.ln(features)
        merged = rearrange(features, "i (s m) d -> i s (m d)", m=self.merge**2)
        merged = self.hook_shuffled(self.ln(merged) if self.norm_merged else merged)
        post = self.hook_post(functional.gelu(self.hook_pre(self.up_proj(merged))))
        return self.hook_out(self.down_proj(post))


class DeepstackConnector(PatchMerger):
    """The merger of a tower's last features; `deepstack` holds those of its taps (DeepStack, arXiv 2406.04334)."""

    def __init__(self, d_vision: int, d_model: int, merge: int, eps: float, n_taps: int) -> None:
        super().__init__(d_vision, d_model, merge, eps, norm_merged=False)
        self.deepstack = nn.ModuleList(
            PatchMerger(d_vision, d_model, merge, eps, norm_merged=True) for _ in range(n_taps)
        )


class DeepstackBlock(Block):
    """A block that adds a tap's features at image tokens to what it writes:
    resid_post = resid_mid + mlp_out + deepstack."""

    def __init__(self, d_model: int, ln1: nn.Module, attn: nn.Module, ln2: nn.Module, mlp: nn.Module) -> None:
        super().__init__(d_model, ln1, attn, ln2, mlp)
        self.hook_deepstack = HookPoint("batch seq d_model")

    def forward(
        self,
        resid_pre: Float[Tensor, "batch seq d_model"],
        by: Rotation,
        mask: Float[Tensor, "batch 1 seq seq"],
        deepstack: Float[Tensor, "batch seq d_model"],
    ) -> Float[Tensor, "batch seq d_model"]:
        """deepstack: the features to add, zero where there is no image."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.get_submodule("attn")(self.ln1(resid_pre), by, mask)[0])
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out + self.hook_deepstack(deepstack))
