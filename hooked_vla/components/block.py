"""Transformer blocks. Pre-norm: resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out; post-norm: norms
of those sums."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.attention import KeysValues
from hooked_vla.hooks.point import HookPoint


class Block(nn.Module):
    """A block around any attention, which is registered under `attn_name` so that hook names say what it is."""

    def __init__(self, d_model: int, ln1: nn.Module, attn: nn.Module, ln2: nn.Module, mlp: nn.Module,
                 attn_name: str = "attn") -> None:  # fmt: skip
        super().__init__()
        self.d_model, self.attn_name = d_model, attn_name
        self.ln1 = ln1
        self.add_module(attn_name, attn)
        self.ln2, self.mlp = ln2, mlp
        self.hook_resid_pre = HookPoint("batch seq d_model")
        self.hook_attn_out = HookPoint("batch seq d_model")
        self.hook_resid_mid = HookPoint("batch seq d_model")
        self.hook_mlp_out = HookPoint("batch seq d_model")
        self.hook_resid_post = HookPoint("batch seq d_model")

    def forward(self, resid_pre: Float[Tensor, "batch seq d_model"], *reads: Any) -> Float[Tensor, "batch seq d_model"]:
        """`reads` is whatever else the attention takes: rotation, mask, prefix."""
        return self.with_keys_values(resid_pre, *reads)[0]

    def with_keys_values(
        self, resid_pre: Float[Tensor, "batch seq d_model"], *reads: Any
    ) -> tuple[Float[Tensor, "batch seq d_model"], KeysValues | None]:
        """The block's output, and its attention's keys and values where the attention hands them out."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attended = getattr(self, self.attn_name)(self.ln1(resid_pre), *reads)
        attn_out, kv = attended if isinstance(attended, tuple) else (attended, None)
        attn_out = self.hook_attn_out(attn_out)
        resid_mid = self.hook_resid_mid(resid_pre + attn_out)
        mlp_out = self.hook_mlp_out(self.mlp(self.ln2(resid_mid)))
        return self.hook_resid_post(resid_mid + mlp_out), kv


class PostNormBlock(nn.Module):
    """resid_mid = ln1_post(resid_pre + attn_out), resid_post = ln2_post(resid_mid + mlp_out) (arXiv 1706.03762)."""

    def __init__(self, d_model: int, attn: nn.Module, ln1_post: nn.Module, mlp: nn.Module, ln2_post: nn.Module) -> None:
        super().__init__()
        self.d_model = d_model
        self.attn, self.ln1_post, self.mlp, self.ln2_post = attn, ln1_post, mlp, ln2_post
        self.hook_resid_pre = HookPoint("batch seq d_model")
        self.hook_attn_out = HookPoint("batch seq d_model")
        self.hook_pre_ln1 = HookPoint("batch seq d_model")
        self.hook_resid_mid = HookPoint("batch seq d_model")
        self.hook_mlp_out = HookPoint("batch seq d_model")
        self.hook_pre_ln2 = HookPoint("batch seq d_model")
        self.hook_resid_post = HookPoint("batch seq d_model")

    def forward(self, resid_pre: Float[Tensor, "batch seq d_model"], *reads: Any) -> Float[Tensor, "batch seq d_model"]:
        """`reads` is whatever else the attention takes."""
        resid_pre = self.hook_resid_pre(resid_pre)
        attn_out = self.hook_attn_out(self.attn(resid_pre, *reads))
        resid_mid = self.hook_resid_mid(self.ln1_post(self.hook_pre_ln1(resid_pre + attn_out)))
        mlp_out = self.hook_mlp_out(self.mlp(resid_mid))
        return self.hook_resid_post(self.ln2_post(self.hook_pre_ln2(resid_mid + mlp_out)))


class GatedBlock(Block):
    """A pre-norm block whose norms take a condition and give a gate for what their sublayer writes.

    hook_attn_ungated, hook_mlp_ungated: the sublayer's output; hook_attn_out, hook_mlp_out: after the gate, which is
    what the residual stream receives.
    """

    def __init__(self, d_model: int, ln1: nn.Module, attn: nn.Module, ln2: nn.Module, mlp: nn.Module) -> None:
        super().__init__(d_model, ln1, attn, ln2, mlp)
        self.hook_attn_ungated = HookPoint("batch seq d_model")
        self.hook_mlp_ungated = HookPoint("batch seq d_model")

    def forward(
        self, resid_pre: Float[Tensor, "batch seq d_model"], condition: Float[Tensor, "batch d_condition"], *reads: Any
    ) -> Float[Tensor, "batch seq d_model"]:
        """`reads` is whatever else the attention takes."""
        resid_pre = self.hook_resid_pre(resid_pre)
        normalized, gate = self.ln1(resid_pre, condition)
        ungated = self.hook_attn_ungated(self.get_submodule(self.attn_name)(normalized, *reads))
        resid_mid = self.hook_resid_mid(resid_pre + self.hook_attn_out(ungated * gate[:, None]))
        normalized, gate = self.ln2(resid_mid, condition)
        ungated = self.hook_mlp_ungated(self.mlp(normalized))
        return self.hook_resid_post(resid_mid + self.hook_mlp_out(ungated * gate[:, None]))
