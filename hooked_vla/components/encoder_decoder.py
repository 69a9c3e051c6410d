"""Encoder–decoder transformers as in DETR (arXiv 2005.12872): positions are added to queries and keys in every layer,
never to values; a decoder layer attends to its own stream, then to the encoder's output.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.attention import Attention, SelfAttention
from hooked_vla.hooks.point import HookPoint


class PositionedSelfAttention(SelfAttention):
    """Every token sees every token; positions go into queries and keys."""

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], positions: Float[Tensor, "seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        placed = x + positions
        q = self.queries(placed)
        k = self.hook_k(self.split_kv(self.k_proj(placed)))
        v = self.hook_v(self.split_kv(self.v_proj(x)))
        return self.attend(q, k, v, mask=None)


class PositionedCrossAttention(Attention):
    """Own tokens attend to another stream's; positions of both go into queries and keys.

    stream: the token stream that keys and values come from.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, stream: str) -> None:
        super().__init__(d_model, n_heads, n_heads, d_head, d_model, bias=True)
        self.axis_streams = {"key": stream, "prefix": stream}
        self.hook_k = HookPoint("batch prefix n_kv_heads d_head")
        self.hook_v = HookPoint("batch prefix n_kv_heads d_head")

    def forward(
        self,
        x: Float[Tensor, "batch seq d_model"],
        positions: Float[Tensor, "seq d_model"],
        other: Float[Tensor, "batch prefix d_model"],
        other_positions: Float[Tensor, "prefix d_model"],
    ) -> Float[Tensor, "batch seq d_model"]:
        q = self.queries(x + positions)
        k = self.hook_k(self.split_kv(self.k_proj(other + other_positions)))
        v = self.hook_v(self.split_kv(self.v_proj(other)))
        return self.attend(q, k, v, mask=None)


class DecoderBlock(nn.Module):
    """A pre-norm block with self-attention, cross-attention to another stream, and an MLP; each adds its output."""

    def __init__(self, d_model: int, ln1: nn.Module, attn: nn.Module, ln_cross: nn.Module, cross_attn: nn.Module,
                 ln2: nn.Module, mlp: nn.Module) -> None:  # fmt: skip
        super().__init__()
        self.d_model = d_model
        self.ln1, self.attn, self.ln_cross, self.cross_attn, self.ln2, self.mlp = (
            ln1, attn, ln_cross, cross_attn, ln2, mlp,
        )  # fmt: skip
        self.hook_resid_pre = HookPoint("batch seq d_model")
        self.hook_attn_out = HookPoint("batch seq d_model")
        self.hook_resid_mid = HookPoint("batch seq d_model")
        self.hook_cross_attn_out = HookPoint("batch seq d_model")
        self.hook_resid_mid_cross = HookPoint("batch seq d_model")
        self.hook_mlp_out = HookPoint("batch seq d_model")
        self.hook_resid_post = HookPoint("batch seq d_model")

    def forward(
        self, resid_pre: Float[Tensor, "batch seq d_model"], own: tuple[Any, ...], other: tuple[Any, ...]
    ) -> Float[Tensor, "batch seq d_model"]:
        """`own` and `other` are whatever else self- and cross-attention take."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(self.ln1(resid_pre), *own))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        cross_out = self.hook_cross_attn_out(self.cross_attn(self.ln_cross(resid_mid), *other))
        resid_mid_cross = self.hook_resid_mid_cross(resid_mid + cross_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_mid_cross)))
        return self.hook_resid_post(resid_mid_cross + mlp_out)


class PostNormDecoderBlock(nn.Module):
    """The same with the residual stream itself normed after each of the three."""

    def __init__(self, d_model: int, attn: nn.Module, ln1_post: nn.Module, cross_attn: nn.Module,
                 ln_cross_post: nn.Module, mlp: nn.Module, ln2_post: nn.Module) -> None:  # fmt: skip
        super().__init__()
        self.d_model = d_model
        self.attn, self.ln1_post, self.cross_attn, self.ln_cross_post, self.mlp, self.ln2_post = (
            attn, ln1_post, cross_attn, ln_cross_post, mlp, ln2_post,
        )  # fmt: skip
        self.hook_resid_pre = HookPoint("batch seq d_model")
        self.hook_attn_out = HookPoint("batch seq d_model")
        self.hook_pre_ln1 = HookPoint("batch seq d_model")
        self.hook_resid_mid = HookPoint("batch seq d_model")
        self.hook_cross_attn_out = HookPoint("batch seq d_model")
        self.hook_pre_ln_cross = HookPoint("batch seq d_model")
        self.hook_resid_mid_cross = HookPoint("batch seq d_model")
        self.hook_mlp_out = HookPoint("batch seq d_model")
        self.hook_pre_ln2 = HookPoint("batch seq d_model")
        self.hook_resid_post = HookPoint("batch seq d_model")

    def forward(
        self, resid_pre: Float[Tensor, "batch seq d_model"], own: tuple[Any, ...], other: tuple[Any, ...]
    ) -> Float[Tensor, "batch seq d_model"]:
        """`own` and `other` are whatever else self- and cross-attention take."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(resid_pre, *own))
        resid_mid = self.hook_resid_mid(self.ln1_post(self.hook_pre_ln1(resid_pre + attn_out)))
        cross_out = self.hook_cross_attn_out(self.cross_attn(resid_mid, *other))
        resid_mid_cross = self.hook_resid_mid_cross(self.ln_cross_post(self.hook_pre_ln_cross(resid_mid + cross_out)))
        mlp_out = self.hook_mlp_out(self.mlp(resid_mid_cross))
        return self.hook_resid_post(self.ln2_post(self.hook_pre_ln2(resid_mid_cross + mlp_out)))
