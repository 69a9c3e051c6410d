"""Vision transformer: patches, learned positions, pre-norm blocks, a final norm."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.attention import SelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.embed import PatchEmbed, PositionTable
from hooked_vla.components.mlp import MLP, activation
from hooked_vla.components.norm import LayerNorm
from hooked_vla.hooks.point import HookPoint
from hooked_vla.spec import VisionSpec


class ViT(nn.Module):
    """Images in -1..1 to normed features of every patch."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.d_model, self.patch_size = spec.d_model, spec.patch_size
        self.patch_embed = PatchEmbed(spec.patch_size, spec.d_model)
        self.pos_embed = PositionTable(spec.image_size // spec.patch_size, spec.d_model)
        self.blocks = nn.ModuleList(_block(spec) for _ in range(spec.n_layers))
        self.ln_final = LayerNorm(spec.d_model, spec.eps)
        self.hook_patch_embed = HookPoint("batch seq d_model")
        self.hook_pos_embed = HookPoint("seq d_model")
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(self, images: Float[Tensor, "image 3 height width"]) -> Float[Tensor, "image seq d_model"]:
        patches = self.hook_patch_embed(self.patch_embed(images.to(self.patch_embed.weight.dtype)))
        positions = self.hook_pos_embed(self.pos_embed(*self.grid(*images.shape[-2:])))
        x = self.hook_tokens(patches + positions)
        for block in self.blocks:
            x = block(x)
        return self.ln_final(x)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches of an image; what does not fill a patch is dropped."""
        return height // self.patch_size, width // self.patch_size


def _block(spec: VisionSpec) -> Block:
    d_head = spec.d_model // spec.n_heads
    return Block(
        spec.d_model,
        ln1=LayerNorm(spec.d_model, spec.eps),
        attn=SelfAttention(spec.d_model, spec.n_heads, spec.n_heads, d_head, bias=True),
        ln2=LayerNorm(spec.d_model, spec.eps),
        mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
    )


class AttentionPool(nn.Module):
    """SigLIP's pooling head: a learned query attends to all patches, then an MLP; one vector an image.

    Checkpoints carry it although no policy reads it. It has no hook points and runs only when called.
    """

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__()
        self.act = activation(spec.act)
        self.probe = nn.Parameter(torch.randn(1, 1, spec.d_model))
        self.attention = nn.MultiheadAttention(spec.d_model, spec.n_heads, batch_first=True)
        self.ln = nn.LayerNorm(spec.d_model, eps=spec.eps)
        self.up_proj = nn.Linear(spec.d_model, spec.d_mlp)
        self.down_proj = nn.Linear(spec.d_mlp, spec.d_model)

    def forward(self, features: Float[Tensor, "image seq d_model"]) -> Float[Tensor, "image d_model"]:
        query = self.probe.expand(features.shape[0], -1, -1)
        pooled = self.attention(query, features, features, need_weights=False)[0]
        return (pooled + self.down_proj(self.act(self.up_proj(self.ln(pooled)))))[:, 0]
