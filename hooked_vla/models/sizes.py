"""Sizes of a checkpoint, read from its tensors' shapes; what shapes cannot say comes from named configuration."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hooked_vla.spec import DecoderSpec, ResNetSpec, VisionSpec


def layer_count(checkpoint: Any, prefix: str) -> int:
    """How many numbers follow `prefix` among the checkpoint's keys."""
    numbers = {int(key[len(prefix) :].split(".")[0]) for key in checkpoint.tensors if key.startswith(prefix)}
    return len(numbers)


def text_sizes(named: Mapping[str, Any]) -> dict[str, Any]:
    """What a Hugging Face multimodal config.json says of its language model, in our words."""
    text = named.get("text_config", {})
    words = {"head_dim": "d_head", "rms_norm_eps": "eps", "hidden_act": "act"}
    sizes = {ours: text[theirs] for theirs, ours in words.items() if theirs in text}
    if "d_head" not in sizes and "num_attention_heads" in text:
        sizes["d_head"] = text["hidden_size"] // text["num_attention_heads"]
    return sizes


def decoder_from_shapes(
    base: DecoderSpec, shapes: Any, prefix: str, n_layers: int, given: Mapping[str, Any]
) -> DecoderSpec:
    """Sizes of a Llama-layout decoder whose keys start with `prefix`; `given` may state d_head, act and eps.

    Raises ValueError when the head width does not divide the projections.
    """
    d_head = given.get("d_head", base.d_head)
    d_q, d_model = shapes(f"{prefix}layers.0.self_attn.q_proj.weight")
    d_kv = shapes(f"{prefix}layers.0.self_attn.k_proj.weight")[0]
    if d_q % d_head or d_kv % d_head:
        raise ValueError(
            f"{prefix}: query width {d_q} and key width {d_kv} are not multiples of the head width {d_head}; "
            "state d_head in geometry.json"
        )
    return replace(
        base,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=d_q // d_head,
        n_kv_heads=d_kv // d_head,
        d_head=d_head,
        d_mlp=shapes(f"{prefix}layers.0.mlp.up_proj.weight")[0],
        act=given.get("act", base.act),
        eps=given.get("eps", base.eps),
    )


def siglip_from_shapes(
    base: VisionSpec, checkpoint: Any, prefix: str, named: Mapping[str, Any], given: Mapping[str, Any]
) -> VisionSpec:
    """Sizes of a SigLIP-layout tower; `given` (ours) and `named` (Hugging Face's) may state heads, act and eps.

    Raises ValueError when the number of heads does not divide the width.
    """
    d_model, _, patch_size, _ = checkpoint.shape(prefix + "embeddings.patch_embedding.weight")
    n_positions = checkpoint.shape(prefix + "embeddings.position_embedding.weight")[0]
    published_heads = d_model // (base.d_model // base.n_heads)
    n_heads = given.get("n_heads", named.get("num_attention_heads", published_heads))
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"vision width {d_model} does not divide into {n_heads} heads; state n_heads in geometry.json")
    return VisionSpec(
        image_size=math.isqrt(n_positions) * patch_size,
        patch_size=patch_size,
        d_model=d_model,
        n_layers=layer_count(checkpoint, prefix + "encoder.layers."),
        n_heads=n_heads,
        d_mlp=checkpoint.shape(prefix + "encoder.layers.0.mlp.fc1.weight")[0],
        act=given.get("act", named.get("hidden_act", base.act)),
        eps=given.get("eps", named.get("layer_norm_eps", base.eps)),
    )


def resnet_from_shapes(base: ResNetSpec, checkpoint: Any, prefix: str, stages: Sequence[str], norm: str) -> ResNetSpec:
    """Sizes of a ResNet whose keys start with `prefix`, its stages named `stages`; image size from config.json.

    Raises ValueError for a ResNet of bottleneck blocks (ResNet-50 and deeper) and for cameras of several sizes.
    """
    if f"{prefix}{stages[0]}.0.conv3.weight" in checkpoint.tensors:
        raise ValueError(
            f"{prefix}: bottleneck blocks (ResNet-50 and deeper) are not supported, only ResNet-18 and -34"
        )
    inputs = checkpoint.config["input_features"]
    sizes = {tuple(each["shape"][1:]) for each in inputs.values() if each["type"] == "VISUAL"}
    if len(sizes) != 1:
        raise ValueError(f"all cameras need one image size; config.json has {sorted(sizes)}")
    first, second, third, fourth = (f"{prefix}{stage}." for stage in stages)
    return replace(
        base,
        image_size=sizes.pop(),
        widths=tuple(checkpoint.shape(f"{stage}0.conv1.weight")[0] for stage in (first, second, third, fourth)),
        n_blocks=tuple(layer_count(checkpoint, stage) for stage in (first, second, third, fourth)),
        norm=norm,
    )


def resnet_name(spec: ResNetSpec) -> str:
    """torchvision's name of the trunk."""
    return "resnet34" if spec.n_blocks == (3, 4, 6, 3) else "resnet18"
