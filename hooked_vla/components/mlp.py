"""Feed-forward networks, plain and gated."""

from collections.abc import Callable
from functools import partial

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.hooks.point import HookPoint

# Hugging Face's names of activations
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": partial(functional.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Raises KeyError with the known names."""
    if name not in ACTIVATIONS:
        raise KeyError(f"unknown activation {name!r}; known: {sorted(ACTIVATIONS)}")
    return ACTIVATIONS[name]


class MLP(nn.Module):
    """out = act(x W_in + b_in) W_out + b_out."""

    def __init__(self, d_model: int, d_mlp: int, act: str) -> None:
        super().__init__()
        self.d_model, self.d_mlp, self.act = d_model, d_mlp, activation(act)
        self.up_proj = nn.Linear(d_model, d_mlp)
        self.down_proj = nn.Linear(d_mlp, d_model)
        self.hook_pre = HookPoint("batch seq d_mlp")
        self.hook_post = HookPoint("batch seq d_mlp")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        pre = self.hook_pre(self.up_proj(x))
        post = self.hook_post(self.act(pre))
        return self.down_proj(post)

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return rearrange(self.up_proj.weight, "d_mlp d_model -> d_model d_mlp")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return rearrange(self.down_proj.weight, "d_model d_mlp -> d_mlp d_model")


class GatedMLP(nn.Module):
    """out = (act(x W_gate) · x W_in) W_out."""

    def __init__(self, d_model: int, d_mlp: int, act: str) -> None:
        super().__init__()
        self.d_model, self.d_mlp, self.act = d_model, d_mlp, activation(act)
        self.gate_proj = nn.Linear(d_model, d_mlp, bias=False)
        self.up_proj = nn.Linear(d_model, d_mlp, bias=False)
        self.down_proj = nn.Linear(d_mlp, d_model, bias=False)
        self.hook_pre = HookPoint("batch seq d_mlp")
        self.hook_pre_linear = HookPoint("batch seq d_mlp")
        self.hook_post = HookPoint("batch seq d_mlp")

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        pre = self.hook_pre(self.gate_proj(x))
        linear = self.hook_pre_linear(self.up_proj(x))
        post = self.hook_post(self.act(pre) * linear)
        return self.down_proj(post)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        return rearrange(self.gate_proj.weight, "d_mlp d_model -> d_model d_mlp")

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        return rearrange(self.up_proj.weight, "d_mlp d_model -> d_model d_mlp")

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        return rearrange(self.down_proj.weight, "d_model d_mlp -> d_mlp d_model")
