"""Sizes of π0, π0.5 and π0-FAST checkpoints in LeRobot's layout, with openpi's keys or LeRobot's, and back."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from hooked_vla.lerobot import OBS_STATE, read_features, write_features
from hooked_vla.models.sizes import decoder_from_shapes, layer_count, siglip_from_shapes
from hooked_vla.spec import FastVLASpec, FeatureSpec, FlowSpec, JointFlowVLASpec, PrefixVLASpec

Spec = TypeVar("Spec", bound=PrefixVLASpec)

_PALIGEMMA = "paligemma_with_expert.paligemma."
_EXPERT = "paligemma_with_expert.gemma_expert."
_EMBED, _UNEMBED = "vlm.embed.weight", "vlm.unembed.weight"
# options that would change the computation, with the value under which they do not
_UNSUPPORTED = {
    "use_relative_actions": False,
    "adapt_to_pi_aloha": False,
    "use_delta_joint_actions_aloha": False,
    "use_visual_memory": False,
    "use_proprioceptive_memory": False,
    "temperature": 0.0,
}
# fields of LeRobot's other policies
_NOT_IN_CONFIG = ("resize_imgs_with_padding", "pad_language_to", "vlm_model_name")


def read_spec(base: JointFlowVLASpec, checkpoint: Any) -> JointFlowVLASpec:
    """`base` with the sizes of a checkpoint (weights.Checkpoint) of a policy with an action expert.

    Widths and depths come from the tensors' shapes; head widths from geometry.json, else they are the published ones.
    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    spec, config, shapes = _read_prefix(base, checkpoint), checkpoint.config, checkpoint.shape
    lead = _lead(checkpoint)
    given = {"d_head": spec.vlm.d_head, "act": spec.vlm.act, "eps": spec.vlm.eps, **_geometry(checkpoint, "expert")}
    n_layers = layer_count(checkpoint, f"{lead}{_EXPERT}model.layers.")
    expert = decoder_from_shapes(base.expert, shapes, f"{lead}{_EXPERT}model.", n_layers, given)
    unembed = f"{lead}{_EXPERT}lm_head.weight"
    expert = replace(expert, d_vocab=shapes(unembed)[0] if unembed in checkpoint.tensors else None)
    for size in ("n_layers", "n_kv_heads", "d_head"):
        ours, theirs = getattr(expert, size), getattr(spec.vlm, size)
        if ours != theirs:
            raise ValueError(
                f"expert and language model share keys and values, but their {size} is {ours} and {theirs}"
            )
    token = base.state_input == "token"
    return replace(
        spec,
        expert=expert,
        flow=FlowSpec(
            n_steps=config.get("num_inference_steps", base.flow.n_steps),
            chunk=config.get("chunk_size", base.flow.chunk),
            d_action=shapes(f"{lead}action_in_proj.weight")[1],
            d_state=shapes(f"{lead}state_proj.weight")[1] if token else config.get("max_state_dim", base.flow.d_state),
            min_period=config.get("min_period", base.flow.min_period),
            max_period=config.get("max_period", base.flow.max_period),
        ),
    )


def read_fast_spec(base: FastVLASpec, checkpoint: Any) -> FastVLASpec:
    """`base` with the sizes of a checkpoint (weights.Checkpoint) of a policy that generates action tokens.

    The ids of the start and end tokens come from geometry.json, else from tokenizer.json in the folder, else they are
    the published vocabulary's; with another vocabulary and neither file, no token ends the actions early.
    Raises ValueError as `read_spec`.
    """
    spec, config = _read_prefix(base, checkpoint), checkpoint.config
    ids = {"start": base.fast.start, "end": base.fast.end if spec.vlm.d_vocab == base.vlm.d_vocab else None}
    vocabulary = _vocabulary(checkpoint, spec.features.tokenizer)
    ids |= {name: vocabulary[text] for name, text in (("start", "<bos>"), ("end", "|")) if text in vocabulary}
    ids |= _geometry(checkpoint, "fast")
    return replace(
        spec,
        fast=replace(
            base.fast,
            start=ids["start"],
            end=ids["end"],
            max_tokens=config.get("max_decoding_steps", base.fast.max_tokens),
            skip=config.get("fast_skip_tokens", base.fast.skip),
            tokenizer=config.get("action_tokenizer_name", base.fast.tokenizer),
            required=config.get("validate_action_token_prefix", base.fast.required),
        ),
        d_state=config.get("max_state_dim", base.d_state),
        d_action=config.get("max_action_dim", base.d_action),
        chunk=config.get("chunk_size", base.chunk),
    )


def write_config(spec: JointFlowVLASpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    return {
        **_write_prefix(spec),
        "chunk_size": spec.flow.chunk,
        "max_state_dim": spec.flow.d_state,
        "max_action_dim": spec.flow.d_action,
        "num_inference_steps": spec.flow.n_steps,
        "min_period": spec.flow.min_period,
        "max_period": spec.flow.max_period,
    }


def write_fast_config(spec: FastVLASpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    return {
        **_write_prefix(spec),
        "chunk_size": spec.chunk,
        "max_state_dim": spec.d_state,
        "max_action_dim": spec.d_action,
        "max_decoding_steps": spec.fast.max_tokens,
        "fast_skip_tokens": spec.fast.skip,
        "text_tokenizer_name": spec.features.tokenizer,
        "action_tokenizer_name": spec.fast.tokenizer,
        "validate_action_token_prefix": spec.fast.required,
    }


def _read_prefix(base: Spec, checkpoint: Any) -> Spec:
    """`base` with what all of these policies have: vision tower, language model, features, ties."""
    config, shapes = checkpoint.config, checkpoint.shape
    for option, harmless in _UNSUPPORTED.items():
        if config.get(option, harmless) != harmless:
            raise ValueError(f"config.json sets {option}={config[option]!r}, which is not supported")
    start = f"{_lead(checkpoint)}{_PALIGEMMA}"
    tower = f"{start}model.vision_tower."
    if f"{tower}vision_model.post_layernorm.weight" in checkpoint.tensors:
        tower += "vision_model."
    vision = siglip_from_shapes(base.vision, checkpoint, tower, {}, _geometry(checkpoint, "vision"))
    text = f"{start}model.language_model."
    n_layers = layer_count(checkpoint, f"{text}layers.")
    vlm = decoder_from_shapes(base.vlm, shapes, text, n_layers, _geometry(checkpoint, "vlm"))
    tables = {_EMBED: f"{text}embed_tokens.weight", _UNEMBED: f"{start}lm_head.weight"}
    held = [name for name, key in tables.items() if key in checkpoint.tensors]
    if not held:
        raise ValueError(f"the checkpoint has neither of {sorted(tables.values())}")
    # a file that holds one table uses it for both purposes; one that holds both uses each for its own
    ties = {name: other for name, other in base.tied.items() if name != _EMBED}
    ties |= {name: held[0] for name in tables if name not in held}
    return replace(
        base,
        vision=vision,
        vlm=replace(vlm, d_vocab=shapes(tables[held[0]])[0]),
        features=_read_features(config, base.features, vision.image_size, _geometry(checkpoint, "text")),
        tied=ties,
    )


def _read_features(
    config: Mapping[str, Any], base: FeatureSpec, image_size: int, text: Mapping[str, Any]
) -> FeatureSpec:
    height, width = config.get("image_resolution") or (image_size, image_size)
    if (height, width) != (image_size, image_size):
        raise ValueError(f"image_resolution is {[height, width]}, but the tower's positions are for {image_size}")
    inputs, outputs = config.get("input_features") or {}, config.get("output_features") or {}
    # as LeRobot does: a policy whose data has no state still has a place for one
    state = {OBS_STATE: {"type": "STATE", "shape": [config.get("max_state_dim", base.d_state)]}}
    features = read_features({**config, "input_features": state | inputs, "output_features": outputs}, base)
    tokenizer = text.get("tokenizer", config.get("text_tokenizer_name", base.tokenizer))
    return replace(features, resize=(width, height), tokenizer=tokenizer, pad_text=text.get("pad", base.pad_text))


def _write_prefix(spec: PrefixVLASpec) -> dict[str, Any]:
    size = (spec.vision.image_size, spec.vision.image_size)
    features = write_features(spec.features, size)
    return {
        "type": spec.config_type,
        "n_obs_steps": 1,
        **{field: value for field, value in features.items() if field not in _NOT_IN_CONFIG},
        "image_resolution": list(size),
    }


def _lead(checkpoint: Any) -> str:
    """What stands before every key: LeRobot's training adds "model." to openpi's names."""
    return "model." if any(key.startswith(f"model.{_PALIGEMMA}") for key in checkpoint.tensors) else ""


def _geometry(checkpoint: Any, part: str) -> Mapping[str, Any]:
    return (checkpoint.json("geometry.json") or {}).get(part, {})


def _vocabulary(checkpoint: Any, tokenizer: str) -> Mapping[str, int]:
    for name in ("tokenizer.json", f"{tokenizer}/tokenizer.json"):
        content = checkpoint.json(name)
        if content is not None:
            added = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
            return {**content.get("model", {}).get("vocab", {}), **added}
    return {}
