"""Norms. hook_scale is what the centred (LayerNorm) or plain (RMSNorm) input is divided by."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.hooks.point import HookPoint


class LayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) · weight + bias."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.bias = nn.Parameter(torch.zeros(d_model))
        self.hook_scale = HookPoint("batch seq 1", dtype="float32")
        self.hook_normalized = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        # the fused kernel never shows its scale: divide in the open only when somebody watches it
        if not self.hook_scale.listeners:
            return self.hook_normalized(functional.layer_norm(x, (self.d_model,), self.weight, self.bias, self.eps))
        centred = x.float() - x.float().mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((centred / scale * self.weight + self.bias).to(x.dtype))


class StreamLayerNorm(LayerNorm):
    """A LayerNorm over the tokens of another stream than that of the module around it."""

    def __init__(self, d_model: int, eps: float, stream: str) -> None:
        super().__init__(d_model, eps)
        self.stream = stream


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · weight, the division in float32, the product in the stream's dtype."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.d_model, self.eps = d_model, eps
        self.weight = nn.Parameter(torch.ones(d_model))
        self.hook_scale = HookPoint("batch seq 1", dtype="float32")
        self.hook_normalized = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        wide = x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(self.weight * (wide / scale).to(x.dtype))


class UnitLayerNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps), nothing learned."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.d_model, self.eps = d_model, eps
        self.hook_scale = HookPoint("batch seq 1", dtype="float32")
        self.hook_normalized = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        return self.hook_normalized(self.divide(x))

    def divide(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """x without its mean, over its standard deviation."""
        if not self.hook_scale.listeners:
            return functional.layer_norm(x, (self.d_model,), None, None, self.eps)
        centred = x.float() - x.float().mean(-1, keepdim=True)
        scale = self.hook_scale((centred.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return (centred / scale).to(x.dtype)


class AdaLayerNorm(UnitLayerNorm):
    """y = LayerNorm(x) · (1 + scale) + shift, both linear in silu(condition) (DiT, arXiv 2212.09748).

    shift_first: the linear map's first half is the shift, its second the scale; else the other way round.
    """

    def __init__(self, d_model: int, d_condition: int, eps: float, shift_first: bool) -> None:
        super().__init__(d_model, eps)
        self.shift_first = shift_first
        self.linear = nn.Linear(d_condition, 2 * d_model)
        self.hook_ada_scale = HookPoint("batch d_model")
        self.hook_ada_shift = HookPoint("batch d_model")

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], condition: Float[Tensor, "batch d_condition"]
    ) -> Float[Tensor, "batch seq d_model"]:
        first, second = self.linear(functional.silu(condition)).chunk(2, dim=-1)
        scale, shift = (second, first) if self.shift_first else (first, second)
        scale, shift = self.hook_ada_scale(scale), self.hook_ada_shift(shift)
        return self.hook_normalized(self.divide(x) * (1 + scale[:, None]) + shift[:, None])


class HeadRMSNorm(RMSNorm):
    """RMSNorm over the dimensions of each head, one weight for all heads."""

    def __init__(self, n_heads: int, d_head: int, eps: float) -> None:
        super().__init__(d_head, eps)
        self.n_heads, self.d_head = n_heads, d_head
        self.hook_scale = HookPoint("batch seq n_heads 1", dtype="float32")
        self.hook_normalized = HookPoint("batch seq n_heads d_head")

    def forward(self, x: Float[Tensor, "batch seq n_heads d_head"]) -> Float[Tensor, "batch seq n_heads d_head"]:
        wide = x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized(self.weight * (wide / scale).to(x.dtype))


class OneCentredRMSNorm(RMSNorm):
    """y = x / sqrt(mean(x²) + eps) · (1 + weight), all in float32, rounded once (Gemma)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__(d_model, eps)
        nn.init.zeros_(self.weight)

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        wide = x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale * (1 + self.weight.float())).to(x.dtype))


class AdaRMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · (1 + scale) + shift; scale, shift and a gate are linear in a condition (π0.5).

    The gate is for what a block makes of y; without `gated` it is left out (its weights stay).
    """

    def __init__(self, d_model: int, d_condition: int, eps: float, gated: bool) -> None:
        super().__init__()
        self.d_model, self.eps, self.gated = d_model, eps, gated
        self.linear = nn.Linear(d_condition, 3 * d_model)
        self.hook_scale = HookPoint("batch seq 1", dtype="float32")
        self.hook_ada_scale = HookPoint("batch d_model", dtype="float32")
        self.hook_ada_shift = HookPoint("batch d_model", dtype="float32")
        self.hook_normalized = HookPoint("batch seq d_model")
        if gated:
            self.hook_ada_gate = HookPoint("batch d_model")

    def forward(
        self, x: Float[Tensor, "batch seq d_model"], condition: Float[Tensor, "batch d_condition"]
    ) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "batch d_model"] | None]:
        ada_scale, ada_shift, gate = self.linear(condition).float().chunk(3, dim=-1)
        ada_scale, ada_shift = self.hook_ada_scale(ada_scale), self.hook_ada_shift(ada_shift)
        wide = x.float()
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        y = self.hook_normalized((wide / scale * (1 + ada_scale[:, None]) + ada_shift[:, None]).to(x.dtype))
        return y, self.hook_ada_gate(gate.to(x.dtype)) if self.gated else None
