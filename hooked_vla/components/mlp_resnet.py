"""A residual network over the channels of each token: norm, linear map, residual blocks, norm, linear map."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.norm import LayerNorm
from hooked_vla.hooks.point import HookPoint

# PyTorch's default for nn.LayerNorm, which the source leaves as it is
_EPS = 1e-5


class ResidualLayer(nn.Module):
    """resid_post = resid_pre + ReLU(norm(resid_pre) W + b)."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.d_model = d_model
        self.ln2 = LayerNorm(d_model, _EPS)
        self.proj = nn.Linear(d_model, d_model)
        self.hook_resid_pre = HookPoint("batch seq d_model")
        self.hook_pre = HookPoint("batch seq d_model")
        self.hook_mlp_out = HookPoint("batch seq d_model")
        self.hook_resid_post = HookPoint("batch seq d_model")

    def forward(self, resid_pre: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        resid_pre = self.hook_resid_pre(resid_pre)
        mlp_out = self.hook_mlp_out(functional.relu(self.hook_pre(self.proj(self.ln2(resid_pre)))))
        return self.hook_resid_post(resid_pre + mlp_out)


class MLPResNet(nn.Module):
    """d_in channels of each token to d_out (OpenVLA-OFT: prismatic/models/action_heads.py)."""

    def __init__(self, d_in: int, d_model: int, n_layers: int, d_out: int, stream: str) -> None:
        super().__init__()
        self.d_in, self.d_model, self.d_out, self.stream = d_in, d_model, d_out, stream
        self.ln_in = LayerNorm(d_in, _EPS)
        self.proj_in = nn.Linear(d_in, d_model)
        self.blocks = nn.ModuleList(ResidualLayer(d_model) for _ in range(n_layers))
        self.ln_final = LayerNorm(d_model, _EPS)
        self.proj_out = nn.Linear(d_model, d_out)
        self.hook_in = HookPoint("batch seq d_in")
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(self, x: Float[Tensor, "batch seq d_in"]) -> Float[Tensor, "batch seq d_out"]:
        x = self.hook_tokens(functional.relu(self.proj_in(self.ln_in(self.hook_in(x)))))
        for block in self.blocks:
            x = block(x)
        return self.proj_out(self.ln_final(x)).to(torch.float32)
