"""Image towers that are read before their end: the features are the next-to-last block's output, not normed.

What stands behind that block in the checkpoint (the last block, the final norm, a pooling head) is held as plain
parameters without hook points: nothing reads it. Several towers look at the same image side by side.
"""

from collections.abc import Mapping

import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.attention import SelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.embed import PatchEmbed
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm
from hooked_vla.hooks.point import HookPoint
from hooked_vla.spec import TowerSpec


class LayerScale(nn.Module):
    """y = x · scale, a learned factor for each channel (arXiv 2103.17239)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.scale = nn.Parameter(torch.ones(d_model))
        self.hook_unscaled = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "image seq d_model"]) -> Float[Tensor, "image seq d_model"]:
        return self.hook_unscaled(x) * self.scale


class FiLM(nn.Module):
    """y = x · (1 + gamma) + beta, both linear in a vector that describes the row (arXiv 1709.07871)."""

    def __init__(self, d_model: int, d_condition: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.scale = nn.Linear(d_condition, d_model)
        self.shift = nn.Linear(d_condition, d_model)
        self.hook_gamma = HookPoint("batch d_model")
        self.hook_beta = HookPoint("batch d_model")
        self.hook_out = HookPoint("batch seq d_model")

    def forward(
        self, x: Float[Tensor, "image seq d_model"], condition: Float[Tensor, "image d_condition"]
    ) -> Float[Tensor, "image seq d_model"]:
        gamma, beta = self.hook_gamma(self.scale(condition)), self.hook_beta(self.shift(condition))
        return self.hook_out(x * (1 + gamma[:, None]) + beta[:, None])


class TowerBlock(Block):
    """A pre-norm block with, where asked for, LayerScale on both outputs and FiLM between its halves.

    With FiLM, resid_post = film.hook_out + mlp_out.
    """

    def __init__(self, spec: TowerSpec, d_condition: int | None) -> None:
        d_head = spec.d_model // spec.n_heads
        super().__init__(
            spec.d_model,
            ln1=LayerNorm(spec.d_model, spec.eps),
            attn=SelfAttention(spec.d_model, spec.n_heads, spec.n_heads, d_head, bias=True),
            ln2=LayerNorm(spec.d_model, spec.eps),
            mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
        )
        # in the order of the forward pass, which is the order of the hook points
        ln2, mlp = self.ln2, self.mlp
        del self.ln2, self.mlp
        self.ls1 = LayerScale(spec.d_model) if spec.layer_scale else None
        self.film = FiLM(spec.d_model, d_condition) if d_condition else None
        self.ln2, self.mlp = ln2, mlp
        self.ls2 = LayerScale(spec.d_model) if spec.layer_scale else None

    def forward(
        self, resid_pre: Float[Tensor, "image seq d_model"], condition: Float[Tensor, "image d_condition"] | None = None
    ) -> Float[Tensor, "image seq d_model"]:
        resid_pre = self.hook_resid_pre(resid_pre)
        attended = self.get_submodule(self.attn_name)(self.ln1(resid_pre))
        attn_out = self.hook_attn_out(attended if self.ls1 is None else self.ls1(attended))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        if self.film is not None:
            assert condition is not None
            resid_mid = self.film(resid_mid, condition)
        mapped = self.mlp(self.ln2(resid_mid))
        mlp_out = self.hook_mlp_out(mapped if self.ls2 is None else self.ls2(mapped))
        return self.hook_resid_post(resid_mid + mlp_out)


class LatentPool(nn.Module):
    """Parameters of timm's attention pool (AttentionPoolLatent); held because checkpoints carry them, never run."""

    def __init__(self, d_model: int, d_mlp: int, eps: float) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, 1, d_model))
        self.q = nn.Linear(d_model, d_model)
        self.kv = nn.Linear(d_model, 2 * d_model)
        self.proj = nn.Linear(d_model, d_model)
        self.norm = nn.LayerNorm(d_model, eps=eps)
        self.fc1 = nn.Linear(d_model, d_mlp)
        self.fc2 = nn.Linear(d_mlp, d_model)


class Tower(nn.Module):
    """Images, normalised as this tower was trained, to raw features of every patch.

    Patches get positions, then the class token and registers are put before them without any (timm: no_embed_class).
    """

    def __init__(self, spec: TowerSpec, stream: str, d_condition: int | None) -> None:
        super().__init__()
        self.stream, self.d_model, self.grid = stream, spec.d_model, spec.image_size // spec.patch_size
        self.n_prefix = spec.n_prefix_tokens
        self.patch_embed = PatchEmbed(spec.patch_size, spec.d_model)
        self.pos_embed = nn.Parameter(torch.randn(1, self.grid**2, spec.d_model) * 0.02)
        if self.n_prefix:
            self.cls_token = nn.Parameter(torch.randn(1, 1, spec.d_model) * 0.02)
            self.reg_token = nn.Parameter(torch.randn(1, self.n_prefix - 1, spec.d_model) * 0.02)
        self.blocks = nn.ModuleList(TowerBlock(spec, d_condition) for _ in range(spec.n_layers))
        self.ln_final = LayerNorm(spec.d_model, spec.eps)
        for unread in (self.blocks[-1], self.ln_final):
            _without_points(unread)
        self.attn_pool = LatentPool(spec.d_model, spec.d_mlp, spec.eps) if spec.attention_pool else None
        # the patches alone, without the tokens before them
        self.hook_patch_embed = HookPoint("batch seq d_model", stream="vision")
        self.hook_pos_embed = HookPoint("seq d_model", stream="vision", reused=True)
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(
        self, images: Float[Tensor, "image 3 height width"], condition: Float[Tensor, "image d_condition"] | None = None
    ) -> Float[Tensor, "image patch d_model"]:
        patches = self.hook_patch_embed(self.patch_embed(images.to(self.pos_embed.dtype)))
        x = patches + self.hook_pos_embed(self.pos_embed[0])
        if self.n_prefix:
            before = torch.cat([self.cls_token, self.reg_token], dim=1)
            x = torch.cat([repeat(before, "1 n d -> i n d", i=x.shape[0]), x], dim=1)
        x = self.hook_tokens(x)
        for block in list(self.blocks)[:-1]:
            x = block(x, condition)
        return x[:, self.n_prefix :]


class Towers(nn.Module):
    """Towers that look at the same image; their features are put together channel by channel."""

    def __init__(self, specs: Mapping[str, TowerSpec], d_condition: int | None) -> None:
        super().__init__()
        self.names, self.n_patches = tuple(specs), next((s.image_size // s.patch_size) ** 2 for s in specs.values())
        for name, spec in specs.items():
            self.add_module(name, Tower(spec, f"vision.{name}", d_condition))
        self.d_concat = sum(spec.d_model for spec in specs.values())
        if len(specs) > 1:
            self.hook_concat = HookPoint("batch seq d_concat")

    def forward(
        self,
        images: Float[Tensor, "image channel height width"],
        condition: Float[Tensor, "image d_condition"] | None = None,
    ) -> Float[Tensor, "image patch d_concat"]:
        """Three channels for each tower, each normalised in its own way; `condition` describes the row for FiLM."""
        parts = images.split(3, dim=1)
        features = [self.get_submodule(name)(part, condition) for name, part in zip(self.names, parts, strict=True)]
        return self.hook_concat(torch.cat(features, dim=-1)) if len(features) > 1 else features[0]


def _without_points(module: nn.Module) -> None:
    for part in module.modules():
        for attribute, value in list(vars(part).items()):
            if isinstance(value, HookPoint):
                delattr(part, attribute)
