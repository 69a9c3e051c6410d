"""Diffusion-transformer blocks: adaptive norm before the attention, which reads own tokens or another stream's.

What a block reads from another stream does not depend on the denoise step: its keys and values are projected once
for a chunk and handed to every step.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_vla.components.attention import Attention, KeysValues
from hooked_vla.components.block import Block
from hooked_vla.hooks.point import HookPoint


class ConditionedBlock(Block):
    """A pre-norm block whose first norm is adaptive."""

    def forward(
        self, resid_pre: Float[Tensor, "batch seq d_model"], condition: Float[Tensor, "batch d_condition"], *reads: Any
    ) -> Float[Tensor, "batch seq d_model"]:
        """`reads` is whatever else the attention takes."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(getattr(self, self.attn_name)(self.ln1(resid_pre, condition), *reads))
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out)


class SourceAttention(Attention):
    """Queries of one stream attend to keys and values of all tokens of another, the source.

    source: name of that stream.
    """

    def __init__(self, d_model: int, n_heads: int, d_head: int, d_source: int, bias: bool, source: str) -> None:
        super().__init__(d_model, n_heads, n_heads, d_head, d_source, bias)
        self.axis_streams = {"key": source, "prefix": source}
        self.hook_k = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)
        self.hook_v = HookPoint("batch prefix n_kv_heads d_head", per_chunk=True)

    def project(self, source: Float[Tensor, "batch prefix d_source"]) -> KeysValues:
        """Keys and values of the source's tokens, for every call of `forward` in this chunk."""
        return KeysValues(self.split_kv(self.k_proj(source)), self.split_kv(self.v_proj(source)))

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], kv: KeysValues, mask: Float[Tensor, "batch 1 1 prefix"] | None
    ) -> Float[Tensor, "batch seq d_model"]:
        return self.attend(self.queries(x), self.hook_k(kv.k), self.hook_v(kv.v), mask)
