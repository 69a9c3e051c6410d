"""Reading and writing LeRobot's configuration of X-VLA checkpoints; `florence_config` in it comes in Microsoft's words
or in those of transformers."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from hooked_vla.components.losses import Term
from hooked_vla.lerobot import read_features, write_features
from hooked_vla.models.sizes import layer_count
from hooked_vla.spec import ConvTowerSpec, EncoderSpec, FeatureSpec, KeyTarget, PromptedExpertSpec, PromptedVLASpec

# action space -> (width in the network, gripper channels, width that the robot gets); None: as config.json says
# LeRobot 0.6.1: xvla/action_hub.py
_ACTION_SPACES: dict[str, tuple[int | None, tuple[int, ...], int | None]] = {
    "ee6d": (20, (9, 19), 20),
    "joint": (14, (6, 13), 14),
    "agibot_ee6d": (20, (), 20),
    "franka_joint7": (20, (), 7),
    "so101_bimanual": (20, (5, 11), 12),
    "auto": (None, (), None),
}
# action space -> its training objective, where that is not the mean square over the robot's channels
# LeRobot 0.6.1: xvla/action_hub.py, compute_loss
_TERMS: dict[str, tuple[Term, ...]] = {
    "ee6d": (
        Term("square", (0, 1, 2), 500.0), Term("square", (10, 11, 12), 500.0),
        Term("square", (3, 4, 5, 6, 7, 8), 10.0), Term("square", (13, 14, 15, 16, 17, 18), 10.0),
        Term("logit", (9, 19), 1.0),
    ),
    "joint": (
        Term("square", (0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12), 1.0), Term("logit", (6, 13), 0.1),
    ),
    "agibot_ee6d": (
        Term("square", (0, 1, 2), 500.0), Term("square", (10, 11, 12), 500.0),
        Term("square", (3, 4, 5, 6, 7, 8), 10.0), Term("square", (13, 14, 15, 16, 17, 18), 10.0),
        Term("square", (9, 19), 10.0),
    ),
    # both arms, each arm, and the grippers once more
    "so101_bimanual": (
        Term("square", tuple(range(12)), 1.0), Term("square", tuple(range(6)), 1.0),
        Term("square", tuple(range(6, 12)), 1.0), Term("square", (5, 11), 1.0),
    ),
}  # fmt: skip
_VISION = "model.vlm.vision_tower."
_SHARED, _EMBED = "shared.weight", "encoder.embed_tokens.weight"
# options that would change the computation, with the values under which they do not
_OPTIONS = {"use_proprio": (True,), "n_obs_steps": (1,), "tokenizer_padding_side": ("right",)}
_VISION_OPTIONS = {
    "model_type": ("davit", "florence_vision"),
    "in_channels": (3,),
    "qkv_bias": (True,),
    "image_feature_source": (["spatial_avg_pool", "temporal_avg_pool"],),
}
_TEXT_OPTIONS = {"scale_embedding": (False,)}


def read_spec(base: PromptedVLASpec, checkpoint: Any) -> PromptedVLASpec:
    """`base` with the sizes of a LeRobot checkpoint (weights.Checkpoint): widths and depths from the tensors' shapes,
    the rest from config.json, or from geometry.json where both say it.

    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    config, geometry = checkpoint.config, checkpoint.json("geometry.json") or {}
    florence = config.get("florence_config") or {}
    vision, text = florence.get("vision_config") or {}, florence.get("text_config") or {}
    _refuse("config.json", config, _OPTIONS)
    _refuse("vision_config", vision, _VISION_OPTIONS)
    _refuse("text_config", text, _TEXT_OPTIONS)
    layout = _Layout(checkpoint)
    vlm = _read_encoder(base.vlm, layout, text | {"pad_token_id": _pad_token(florence, text)}, geometry.get("vlm", {}))
    d_vlm = layout.image_projection[0]
    if d_vlm != vlm.d_model:
        raise ValueError(f"image tokens of width {d_vlm} do not fit the encoder's width {vlm.d_model}")
    expert = _read_expert(base.expert, config, layout, geometry.get("expert", {}))
    mode = str(config.get("action_mode", base.sampler.mode)).lower()
    d_action, grippers, d_real = _action_space(
        mode, config, layout.shape("model.transformer.action_decoder.bias.weight")
    )
    d_state = layout.shape("model.transformer.action_encoder.fc.weight")[1] // expert.d_model - d_action - expert.d_time
    if d_state <= max(grippers, default=0):
        raise ValueError(f"action_mode {mode!r} has grippers at {grippers}, but the network reads a state of {d_state}")
    features = _read_features(config, base.features, d_real)
    return replace(
        base,
        vision=_read_vision(base.vision, layout, vision, geometry.get("vision", {})),
        grid_positions=layout.projector("image_position_embed", "image_pos_embed", ".row_embeddings.weight")[0],
        n_times=layout.projector("visual_temporal_embed", "visual_temporal_embed", ".pos_idx_to_embed")[0],
        vlm=vlm,
        expert=expert,
        sampler=replace(
            base.sampler,
            n_steps=max(1, config.get("num_denoising_steps", base.sampler.n_steps)),
            chunk=config.get("chunk_size", base.sampler.chunk),
            d_action=d_action,
            d_state=d_state,
            mode=mode,
            grippers=grippers,
        ),
        n_views=max(config.get("num_image_views") or 0, len(features.cameras)),
        domain_key=config.get("domain_feature_key") or base.domain_key,
        features=features,
        keys=_keys(base, checkpoint),
    )


class _Layout:
    """Shapes of the checkpoint's tensors in either layout: transformers' or Microsoft's (`vendored`)."""

    def __init__(self, checkpoint: Any) -> None:
        self.checkpoint = checkpoint
        self.shape = checkpoint.shape
        self.vendored = "model.vlm.image_projection" in checkpoint.tensors
        self.text = "model.vlm.language_model.model." if self.vendored else "model.vlm.language_model."
        shape = self.projector("image_projection.weight", "image_projection", "")
        # (d_model, d_vision); Microsoft's is the other way round
        self.image_projection = shape[::-1] if self.vendored else shape

    def projector(self, native: str, vendored: str, rest: str) -> tuple[int, ...]:
        prefix = f"model.vlm.{vendored}" if self.vendored else f"model.vlm.multi_modal_projector.{native}"
        return self.shape(prefix + rest)

    def conv(self, stage: int) -> tuple[int, ...]:
        return self.shape(f"{_VISION}convs.{stage}.{'proj' if self.vendored else 'conv'}.weight")

    def d_mlp(self, stage: int) -> int:
        name = "ffn.fn.net.fc1" if self.vendored else "ffn.fc1"
        return self.shape(f"{_VISION}blocks.{stage}.0.spatial_block.{name}.weight")[0]


def _refuse(place: str, config: Mapping[str, Any], options: Mapping[str, Sequence[Any]]) -> None:
    for option, harmless in options.items():
        if config.get(option, harmless[0]) not in harmless:
            raise ValueError(f"{place} sets {option}={config[option]!r}, which is not supported")


def _read_vision(
    base: ConvTowerSpec, layout: _Layout, config: Mapping[str, Any], given: Mapping[str, Any]
) -> ConvTowerSpec:
    """Widths and depths from shapes; heads, groups, strides and the window side from config, else as published."""
    stages = range(layer_count(layout.checkpoint, _VISION + "convs."))
    d_model = tuple(layout.conv(stage)[0] for stage in stages)
    words = {"num_heads": "n_heads", "num_groups": "n_groups", "patch_stride": "stride", "patch_padding": "padding",
             "patch_prenorm": "prenorm", "window_size": "window", "activation_function": "act"}  # fmt: skip
    named = {ours: config[theirs] for theirs, ours in words.items() if theirs in config}
    sizes = {name: value for name, value in {**named, **given}.items() if name in asdict(base)}
    read = replace(base, **{name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})
    read = replace(
        read,
        d_model=d_model,
        n_layers=tuple(layer_count(layout.checkpoint, f"{_VISION}blocks.{stage}.") for stage in stages),
        kernel=tuple(layout.conv(stage)[2] for stage in stages),
        d_mlp=tuple(layout.d_mlp(stage) for stage in stages),
    )
    uneven = [name for name, value in asdict(read).items() if isinstance(value, tuple) and len(value) != len(stages)]
    if uneven:
        raise ValueError(f"the weights have {len(stages)} vision stages, but config.json lists others for {uneven}")
    wrong = [
        d for d, heads, groups in zip(d_model, read.n_heads, read.n_groups, strict=True) if d % heads or d % groups
    ]
    if wrong or read.prenorm[0]:
        raise ValueError(f"vision widths {d_model} do not divide into their heads, or patch_prenorm starts with True")
    return read


def _read_encoder(
    base: EncoderSpec, layout: _Layout, config: Mapping[str, Any], given: Mapping[str, Any]
) -> EncoderSpec:
    prefix = layout.text + "encoder."
    n_positions, d_model = layout.shape(prefix + "embed_positions.weight")
    n_heads = given.get("n_heads", config.get("encoder_attention_heads", base.n_heads))
    if d_model % n_heads:
        raise ValueError(f"encoder width {d_model} does not divide into {n_heads} heads")
    shared = layout.text + _SHARED
    embed = shared if shared in layout.checkpoint.tensors else layout.text + _EMBED
    return replace(
        base,
        d_model=d_model,
        n_layers=layer_count(layout.checkpoint, prefix + "layers."),
        n_heads=n_heads,
        d_mlp=layout.shape(prefix + "layers.0.fc1.weight")[0],
        act=given.get("act", config.get("activation_function", base.act)),
        d_vocab=layout.shape(embed)[0],
        n_positions=n_positions,
        pad_token=given.get("pad_token", config["pad_token_id"]),
    )


def _pad_token(florence: Mapping[str, Any], text: Mapping[str, Any]) -> int:
    # 1: BART's
    return text.get("pad_token_id", florence.get("pad_token_id", 1))


def _read_expert(
    base: PromptedExpertSpec, config: Mapping[str, Any], layout: _Layout, given: Mapping[str, Any]
) -> PromptedExpertSpec:
    prefix = "model.transformer."
    _, n_positions, d_model = layout.shape(prefix + "pos_emb")
    n_heads = given.get("n_heads", config.get("num_heads", base.n_heads))
    if d_model % n_heads:
        raise ValueError(f"expert width {d_model} does not divide into {n_heads} heads")
    hub = prefix + "soft_prompt_hub.weight"
    return replace(
        base,
        d_model=d_model,
        n_layers=layer_count(layout.checkpoint, prefix + "blocks."),
        n_heads=n_heads,
        d_mlp=layout.shape(prefix + "blocks.0.mlp.fc1.weight")[0],
        n_positions=n_positions,
        n_domains=layout.shape(prefix + "action_decoder.bias.weight")[0],
        n_prompts=layout.shape(hub)[1] // d_model if hub in layout.checkpoint.tensors else 0,
        d_time=config.get("dim_time", given.get("d_time", base.d_time)),
        domain_projections=prefix + "vlm_proj.fc.weight" in layout.checkpoint.tensors,
    )


def loss_terms(mode: str, d_real: int) -> tuple[Term, ...]:
    """The training objective of an action space, in which the robot has d_real channels."""
    return _TERMS.get(mode, (Term("square", tuple(range(d_real)), 1.0),))


def _action_space(
    mode: str, config: Mapping[str, Any], decoder: tuple[int, ...]
) -> tuple[int, tuple[int, ...], int | None]:
    if mode not in _ACTION_SPACES:
        raise ValueError(f"config.json sets action_mode={mode!r}; supported: {sorted(_ACTION_SPACES)}")
    d_action, grippers, d_real = _ACTION_SPACES[mode]
    d_action = config.get("max_action_dim", decoder[1]) if d_action is None else d_action
    if decoder[1] != d_action:
        raise ValueError(f"action_mode {mode!r} has {d_action} channels, but the weights make {decoder[1]}")
    return d_action, grippers, d_real


def _read_features(config: Mapping[str, Any], base: FeatureSpec, d_real: int | None) -> FeatureSpec:
    features = read_features(config, base)
    # LeRobot stores (height, width) for this policy
    resize = None if features.resize is None else (features.resize[1], features.resize[0])
    d_action = features.d_action if d_real is None else d_real
    return replace(features, resize=resize, d_action=d_action, tokenizer=config.get("tokenizer_name", base.tokenizer))


def _keys(base: PromptedVLASpec, checkpoint: Any) -> Mapping[str, Mapping[str, KeyTarget]]:
    """The key table; of the token embedding's two names the one that the file has, where it has one only."""
    table = {prefix: dict(rules) for prefix, rules in base.keys.items()}
    for prefixes, rules in table.items():
        if _EMBED in rules and not any(prefix + _EMBED in checkpoint.tensors for prefix in prefixes.split("|")):
            rules[_SHARED], rules[_EMBED] = rules[_EMBED], None
    return table


def write_config(spec: PromptedVLASpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    vision, vlm, expert, sampler, features = spec.vision, spec.vlm, spec.expert, spec.sampler, spec.features
    width, height = features.resize or (224, 224)
    written = write_features(features, (height, width))
    del written["vlm_model_name"]
    return {
        "type": spec.config_type,
        "n_obs_steps": 1,
        **written,
        "resize_imgs_with_padding": (height, width) if features.resize else None,
        "tokenizer_name": features.tokenizer,
        "tokenizer_padding_side": "right",
        "chunk_size": sampler.chunk,
        "num_denoising_steps": sampler.n_steps,
        "action_mode": sampler.mode,
        "max_action_dim": sampler.d_action,
        "max_state_dim": sampler.d_state,
        "use_proprio": True,
        "num_image_views": spec.n_views,
        "domain_feature_key": spec.domain_key,
        "hidden_size": expert.d_model,
        "depth": expert.n_layers,
        "num_heads": expert.n_heads,
        "mlp_ratio": expert.d_mlp / expert.d_model,
        "num_domains": expert.n_domains,
        "len_soft_prompts": expert.n_prompts,
        "dim_time": expert.d_time,
        "max_len_seq": expert.n_positions,
        "use_hetero_proj": expert.domain_projections,
        "florence_config": {
            "pad_token_id": vlm.pad_token,
            "projection_dim": vlm.d_model,
            "vision_config": {
                "model_type": "davit",
                "patch_size": vision.kernel,
                "patch_stride": vision.stride,
                "patch_padding": vision.padding,
                "patch_prenorm": vision.prenorm,
                "dim_embed": vision.d_model,
                "depths": vision.n_layers,
                "num_heads": vision.n_heads,
                "num_groups": vision.n_groups,
                "window_size": vision.window,
                "mlp_ratio": vision.d_mlp[0] / vision.d_model[0],
                "activation_function": vision.act,
                "projection_dim": vlm.d_model,
                "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": spec.grid_positions},
                "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": spec.n_times},
            },
            "text_config": {
                "model_type": "florence2_language",
                "vocab_size": vlm.d_vocab,
                "d_model": vlm.d_model,
                "encoder_layers": vlm.n_layers,
                "encoder_ffn_dim": vlm.d_mlp,
                "encoder_attention_heads": vlm.n_heads,
                # BART's table has two rows that no position uses
                "max_position_embeddings": vlm.n_positions - 2,
                "activation_function": vlm.act,
                "pad_token_id": vlm.pad_token,
            },
        },
    }
