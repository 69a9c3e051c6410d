"""Attention with TransformerLens's points on it, self-attention only; `joint` adds what reads a cached prefix.

Values between heads are [batch seq heads d_head]. Scores and pattern do not exist in the fused kernel: `attend`
computes them in the open exactly when somebody listens, here and nowhere else.
"""

import importlib.util
from functools import cache
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.norm import HeadRMSNorm
from hooked_vla.components.rope import Rotation, rotate
from hooked_vla.hooks.point import HookPoint


class KeysValues(NamedTuple):
    """Keys (after rotary positions) and values of one layer."""

    k: Float[Tensor, "batch seq n_kv_heads d_head"]
    v: Float[Tensor, "batch seq n_kv_heads d_head"]


@cache
def _flash_attention() -> Any:
    """flash-attn's function where the package is installed, else None."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    return importlib.import_module("flash_attn").flash_attn_func


def flash_takes(q: Tensor, mask: Tensor | None) -> bool:
    """Whether flash-attn can run this: half precision on a GPU, no mask."""
    return mask is None and q.is_cuda and q.dtype in (torch.float16, torch.bfloat16)


class Attention(nn.Module):
    """Multi-head attention; n_kv_heads < n_heads shares each key and value head between neighbouring query heads.

    d_in: width of the input; d_kv_in: width of what keys and values are projected from.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, d_kv_in: int, bias: bool) -> None:
        super().__init__()
        self.d_model, self.n_heads, self.n_kv_heads, self.d_head = d_model, n_heads, n_kv_heads, d_head
        self.scale = d_head**-0.5
        self.q_proj = nn.Linear(d_model, n_heads * d_head, bias=bias)
        self.k_proj = nn.Linear(d_kv_in, n_kv_heads * d_head, bias=bias)
        self.v_proj = nn.Linear(d_kv_in, n_kv_heads * d_head, bias=bias)
        self.o_proj = nn.Linear(n_heads * d_head, d_model, bias=bias)
        self.hook_q = HookPoint("batch seq n_heads d_head")
        self.hook_attn_scores = HookPoint("batch n_heads query key", dtype="float32")
        self.hook_pattern = HookPoint("batch n_heads query key")
        self.hook_z = HookPoint("batch seq n_heads d_head")

    def queries(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq n_heads d_head"]:
        return self.hook_q(rearrange(self.q_proj(x), "b s (h d) -> b s h d", h=self.n_heads))

    def split_kv(self, x: Float[Tensor, "batch seq flat"]) -> Float[Tensor, "batch seq n_kv_heads d_head"]:
        return rearrange(x, "b s (h d) -> b s h d", h=self.n_kv_heads)

    def attend(
        self,
        q: Float[Tensor, "batch query n_heads d_head"],
        k: Float[Tensor, "batch key n_kv_heads d_head"],
        v: Float[Tensor, "batch key n_kv_heads d_head"],
        mask: Float[Tensor, "batch 1 #query key"] | None,
    ) -> Float[Tensor, "batch query d_model"]:
        """softmax(q kᵀ / sqrt(d_head) + mask) v, projected out; softmax in float32."""
        z = self.mix(q, k, v, mask, self.scale)
        return self.o_proj(rearrange(self.hook_z(z), "b s h d -> b s (h d)"))

    def mix(
        self,
        q: Float[Tensor, "batch query n_heads d_head"],
        k: Float[Tensor, "batch key n_kv_heads d_head"],
        v: Float[Tensor, "batch key n_kv_heads d_head"],
        mask: Float[Tensor, "batch 1 #query key"] | None,
        scale: float,
    ) -> Float[Tensor, "batch query n_heads d_head"]:
        """softmax(q kᵀ · scale + mask) v for every head."""
        if self.hook_attn_scores.listeners or self.hook_pattern.listeners:
            return self._mix_in_the_open(q, k, v, mask, scale)
        if flash_takes(q, mask) and _flash_attention() is not None:
            return _flash_attention()(q, k, v, softmax_scale=scale)
        q, k, v = (rearrange(t, "b s h d -> b h s d") for t in (q, k, v))
        grouped = self.n_kv_heads != self.n_heads
        z = functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=grouped)
        return rearrange(z, "b h s d -> b s h d")

    def _mix_in_the_open(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        # r query heads share each of the g key and value heads
        q = rearrange(q.float(), "b s (g r) d -> b g r s d", g=self.n_kv_heads)
        scores = torch.einsum("bgrsd,btgd->bgrst", q, k.float()) * scale
        scores = rearrange(scores, "b g r s t -> b (g r) s t")
        scores = self.hook_attn_scores(scores if mask is None else scores + mask.float())
        # a query that sees nothing at all reads nothing; softmax alone would divide by nothing, in its gradient too
        blind = (scores == -torch.inf).all(-1, keepdim=True)
        pattern = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
        pattern = self.hook_pattern(pattern.to(v.dtype))
        pattern = rearrange(pattern, "b (g r) s t -> b g r s t", g=self.n_kv_heads)
        return rearrange(torch.einsum("bgrst,btgd->bsgrd", pattern, v), "b s g r d -> b s (g r) d")

    @property
    def W_Q(self) -> Float[Tensor, "n_heads d_model d_head"]:
        return rearrange(self.q_proj.weight, "(h d) m -> h m d", h=self.n_heads)

    @property
    def W_K(self) -> Float[Tensor, "n_kv_heads d_kv_in d_head"]:
        return rearrange(self.k_proj.weight, "(h d) m -> h m d", h=self.n_kv_heads)

    @property
    def W_V(self) -> Float[Tensor, "n_kv_heads d_kv_in d_head"]:
        return rearrange(self.v_proj.weight, "(h d) m -> h m d", h=self.n_kv_heads)

    @property
    def W_O(self) -> Float[Tensor, "n_heads d_head d_model"]:
        return rearrange(self.o_proj.weight, "m (h d) -> h d m", h=self.n_heads)


class SelfAttention(Attention):
    """Tokens of one stream attend to each other."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, d_model, bias)
        self.hook_k = HookPoint("batch seq n_kv_heads d_head")
        self.hook_v = HookPoint("batch seq n_kv_heads d_head")

    def keys_values(self, x: Float[Tensor, "batch seq d_model"]) -> KeysValues:
        k = self.hook_k(self.split_kv(self.k_proj(x)))
        v = self.hook_v(self.split_kv(self.v_proj(x)))
        return KeysValues(k, v)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """Every token sees every token, without rotary positions."""
        return self.attend(self.queries(x), *self.keys_values(x), mask=None)


class RotarySelfAttention(SelfAttention):
    """Masked self-attention with rotary positions; hands out its keys and values for others to read."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, bias: bool) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias)
        self.hook_rot_q = HookPoint("batch seq n_heads d_head")
        self.hook_rot_k = HookPoint("batch seq n_kv_heads d_head")

    def rotated(self, x: Float[Tensor, "batch seq d_model"], by: Rotation) -> tuple[Tensor, KeysValues]:
        """Queries, keys and values, the first two rotated."""
        q = self.hook_rot_q(rotate(self.queries(x), by))
        k, v = self.keys_values(x)
        return q, KeysValues(self.hook_rot_k(rotate(k, by)), v)

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], by: Rotation, mask: Float[Tensor, "batch 1 seq seq"] | None
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeysValues]:
        q, kv = self.rotated(x, by)
        return self.attend(q, kv.k, kv.v, mask), kv


class QKNormAttention(RotarySelfAttention):
    """Rotary self-attention whose queries and keys are normed head by head before they are rotated (Qwen3)."""

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, d_head: int, eps: float) -> None:
        super().__init__(d_model, n_heads, n_kv_heads, d_head, bias=False)
        self.q_norm = HeadRMSNorm(n_heads, d_head, eps)
        self.k_norm = HeadRMSNorm(n_kv_heads, d_head, eps)

    def rotated(self, x: Float[Tensor, "batch seq d_model"], by: Rotation) -> tuple[Tensor, KeysValues]:
        q = self.hook_rot_q(rotate(self.q_norm(self.queries(x)), by))
        k, v = self.keys_values(x)
        return q, KeysValues(self.hook_rot_k(rotate(self.k_norm(k), by)), v)
