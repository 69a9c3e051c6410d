"""Pre-norm transformer blocks: resid_mid = resid_pre + attn_out, resid_post = resid_mid + mlp_out."""

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
