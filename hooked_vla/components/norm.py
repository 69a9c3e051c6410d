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
