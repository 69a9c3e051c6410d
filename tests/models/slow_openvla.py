"""OpenVLA and OFT once more, from their papers' formulas and the public key names, row by row and without a cache.

Nothing of the package is used here, so that sizes and options for which no recorded values exist have a second opinion.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as f

Weights = dict[str, Tensor]


def linear(w: Weights, name: str, x: Tensor) -> Tensor:
    return f.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def layer_norm(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return f.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def attention(q: Tensor, k: Tensor, v: Tensor, n_heads: int, causal: bool) -> Tensor:
    """q [S, H·d], k and v [S, G·d]: head by head."""
    d_head = q.shape[-1] // n_heads
    shared = n_heads // (k.shape[-1] // d_head)
    out = []
    for head in range(n_heads):
        own, group = slice(head * d_head, (head + 1) * d_head), head // shared
        theirs = slice(group * d_head, (group + 1) * d_head)
        scores = q[:, own] @ k[:, theirs].T / math.sqrt(d_head)
        if causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
        out.append(scores.softmax(-1) @ v[:, theirs])
    return torch.cat(out, dim=-1)


def tower(w: Weights, prefix: str, image: Tensor, n_heads: int, described: Tensor | None) -> Tensor:
    """Output of the next-to-last block at the patches, [patch, d]."""
    patch = w[f"{prefix}patch_embed.proj.weight"].shape[-1]
    x = f.conv2d(image[None], w[f"{prefix}patch_embed.proj.weight"], w[f"{prefix}patch_embed.proj.bias"], stride=patch)
    x = x[0].flatten(1).T + w[f"{prefix}pos_embed"][0]
    if f"{prefix}cls_token" in w:
        x = torch.cat([w[f"{prefix}cls_token"][0], w[f"{prefix}reg_token"][0], x])
    n_before = len(x) - w[f"{prefix}pos_embed"].shape[1]
    n_blocks = len(
        {key.removeprefix(f"{prefix}blocks.").split(".")[0] for key in w if key.startswith(f"{prefix}blocks.")}
    )
    for i in range(n_blocks - 1):
        outer = f"{prefix}blocks.{i}."
        block = outer + ("block." if f"{outer}block.norm1.weight" in w else "")
        q, k, v = linear(w, f"{block}attn.qkv", layer_norm(w, f"{block}norm1", x, 1e-6)).chunk(3, dim=-1)
        out = linear(w, f"{block}attn.proj", attention(q, k, v, n_heads, causal=False))
        x = x + out * w.get(f"{block}ls1.scale_factor", 1)
        if described is not None:
            x = x * (1 + linear(w, f"{outer}scale", described)) + linear(w, f"{outer}shift", described)
        hidden = f.gelu(linear(w, f"{block}mlp.fc1", layer_norm(w, f"{block}norm2", x, 1e-6)))
        x = x + linear(w, f"{block}mlp.fc2", hidden) * w.get(f"{block}ls2.scale_factor", 1)
    return x[n_before:]


def image_tokens(w: Weights, image: Tensor, n_heads: dict[str, int], described: Tensor | None) -> Tensor:
    """One image's tokens; image [3 · towers, side, side]; n_heads by the towers' public names."""
    start = "vision_backbone/vision_backbone." if described is not None else "vision_backbone."
    parts = [
        tower(w, f"{start}{name}.", image[3 * i : 3 * i + 3], heads, described)
        for i, (name, heads) in enumerate(n_heads.items())
    ]
    x = linear(w, "projector.fc1", torch.cat(parts, dim=-1))
    for name in ("projector.fc2", "projector.fc3"):
        x = linear(w, name, f.gelu(x)) if f"{name}.weight" in w else x
    return x


def rms(w: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * w[f"{name}.weight"]


def turn(x: Tensor, n_heads: int, base: float) -> Tensor:
    d_head = x.shape[-1] // n_heads
    angle = torch.arange(len(x))[:, None] / base ** (torch.arange(0, d_head, 2) / d_head)
    first, second = x.view(len(x), n_heads, 2, -1).unbind(2)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.stack([first * cos - second * sin, second * cos + first * sin], dim=2).flatten(1)


def llama(w: Weights, x: Tensor, n_heads: int, eps: float, base: float, causal: bool) -> Tensor:
    """Normed hidden states [S, d]."""
    i = 0
    while (layer := f"language_model.model.layers.{i}.") + "mlp.up_proj.weight" in w:
        h = rms(w, f"{layer}input_layernorm", x, eps)
        q, k, v = (linear(w, f"{layer}self_attn.{part}_proj", h) for part in "qkv")
        n_kv_heads = k.shape[-1] * n_heads // q.shape[-1]
        q, k = turn(q, n_heads, base), turn(k, n_kv_heads, base)
        x = x + linear(w, f"{layer}self_attn.o_proj", attention(q, k, v, n_heads, causal))
        h = rms(w, f"{layer}post_attention_layernorm", x, eps)
        h = f.silu(linear(w, f"{layer}mlp.gate_proj", h)) * linear(w, f"{layer}mlp.up_proj", h)
        x = x + linear(w, f"{layer}mlp.down_proj", h)
        i += 1
    return rms(w, "language_model.model.norm", x, eps)


def projector(w: Weights, name: str, x: Tensor) -> Tensor:
    return linear(w, f"{name}/module.fc2", f.gelu(linear(w, f"{name}/module.fc1", x)))


def resnet(w: Weights, name: str, x: Tensor) -> Tensor:
    x = f.relu(linear(w, f"{name}.fc1", layer_norm(w, f"{name}.layer_norm1", x, 1e-5)))
    i = 0
    while (block := f"{name}.mlp_resnet_blocks.{i}.ffn") + ".1.weight" in w:
        x = x + f.relu(linear(w, f"{block}.1", layer_norm(w, f"{block}.0", x, 1e-5)))
        i += 1
    return linear(w, f"{name}.fc2", layer_norm(w, f"{name}.layer_norm2", x, 1e-5))
