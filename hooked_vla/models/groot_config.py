"""Reading and writing the public configuration of GR00T checkpoints.

NVIDIA's config.json has the action head. The sizes of the backbone (Eagle in N1.5, Qwen3-VL in N1.7) are in code, so
they come from tensors' shapes, from geometry.json or the backbone's own configuration in eagle/config.json or
vlm/config.json, else from the published model.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from hooked_vla.lerobot import read_features
from hooked_vla.models.sizes import decoder_from_shapes, layer_count, siglip_from_shapes, text_sizes
from hooked_vla.spec import (
    AdapterSpec,
    ChatSpec,
    DecoderSpec,
    DiTSpec,
    EmbodimentFlowSpec,
    FeatureSpec,
    FeatureVLASpec,
    PatchVisionSpec,
    VisionSpec,
)

_HEAD = "action_head."
_EAGLE = "backbone.eagle_model."
_VISION = _EAGLE + "vision_model.vision_model."
_TEXT = _EAGLE + "language_model.model."
_QWEN_VISION = "backbone.model.model.visual."
_QWEN_TEXT = "backbone.model.model.language_model."
# options that would change the computation, with the values under which they do not
_BACKBONE = {"project_to_dim": (None,), "reproject_vision": (False,)}
_ACTION_HEAD = {"expand_batch": (None,), "load_pretrained_det_decode_layer_path": (None,)}
_EAGLE_OPTIONS = {"select_layer": (-1,), "use_pixel_shuffle": (False,), "mlp_connector_layers": (1,),
                  "use_backbone_lora": (0,), "use_llm_lora": (0,)}  # fmt: skip
_QWEN_OPTIONS = {"reproject_vision": (False,), "apply_sincos_state_encoding": (False,), "exclude_state": (False,)}
_TRANSFORMER = {"positional_embeddings": (None,), "activation_fn": ("gelu-approximate",), "attention_bias": (True,)}
_DIT = _TRANSFORMER | {"norm_type": ("ada_norm",), "norm_elementwise_affine": (False,)}


class _Shapes:
    """Tensors' shapes under keys without LeRobot's `_groot_model.` prefix."""

    def __init__(self, checkpoint: Any) -> None:
        self.tensors = {key.removeprefix("_groot_model."): key for key in checkpoint.tensors}
        self._checkpoint = checkpoint

    def shape(self, key: str) -> tuple[int, ...]:
        return self._checkpoint.shape(self.tensors.get(key, key))

    def has(self, key: str) -> bool:
        return key in self.tensors


def read_spec(base: FeatureVLASpec, checkpoint: Any) -> FeatureVLASpec:
    """`base` with the sizes of a checkpoint (weights.Checkpoint).

    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    read = _read_eagle if isinstance(base.vision, VisionSpec) else _read_qwen
    return read(base, checkpoint, _Shapes(checkpoint), checkpoint.json("geometry.json") or {})


def _read_eagle(base: FeatureVLASpec, checkpoint: Any, shapes: _Shapes, geometry: Mapping[str, Any]) -> FeatureVLASpec:
    assert isinstance(base.vision, VisionSpec)
    config = checkpoint.config
    backbone, head = config.get("backbone_cfg") or {}, config.get("action_head_cfg") or {}
    eagle = checkpoint.json("eagle/config.json") or checkpoint.json(f"{backbone.get('eagle_path')}/config.json") or {}
    _refuse("backbone_cfg", backbone, _BACKBONE)
    _refuse("action_head_cfg", head, _ACTION_HEAD)
    _refuse("the Eagle config.json", eagle, _EAGLE_OPTIONS)
    vlm = _read_decoder(base.vlm, shapes, _TEXT, eagle, geometry.get("vlm", {}), backbone.get("select_layer"))
    vision = siglip_from_shapes(
        base.vision, shapes, _VISION, eagle.get("vision_config", {}), geometry.get("vision", {})
    )
    return replace(
        base,
        vision=vision,
        vision_pool=shapes.has(_VISION + "head.probe"),
        vlm=vlm,
        # NVIDIA's Eagle runs flash attention
        padding_attends_evenly=geometry.get(
            "padding_attends_evenly", eagle.get("_attn_implementation", "flash_attention_2") == "eager"
        ),
        image_token=_image_token(base, vlm, geometry.get("image_token", eagle.get("image_token_index"))),
        adapter=_read_adapter(base.adapter, shapes, head) if head.get("use_vlln", True) else None,
        expert=_read_dit(base.expert, shapes, head.get("diffusion_model_cfg") or {}, ("cross",)),
        flow=(flow := _read_flow(base.flow, shapes, head, 1, geometry)),
        chat=_read_chat(base.chat, geometry),
        features=_read_features(replace(base.features, resize=(vision.image_size,) * 2), config, geometry, flow),
    )


def _read_qwen(base: FeatureVLASpec, checkpoint: Any, shapes: _Shapes, geometry: Mapping[str, Any]) -> FeatureVLASpec:
    assert isinstance(base.vision, PatchVisionSpec)
    config, named = checkpoint.config, checkpoint.json("vlm/config.json") or {}
    _refuse("config.json", config, _QWEN_OPTIONS)
    vlm = _read_decoder(base.vlm, shapes, _QWEN_TEXT, named, geometry.get("vlm", {}), config.get("select_layer"))
    rope = named.get("text_config", {}).get("rope_parameters") or {}
    sections = geometry.get("rope_sections", rope.get("mrope_section", base.rope_sections))
    if sum(sections) != vlm.d_head // 2 or rope.get("mrope_interleaved", True) is not True:
        raise ValueError(f"rotary sections {list(sections)} do not fit heads of {vlm.d_head}, or are not interleaved")
    adapter = None
    if config.get("use_vlln", True):
        adapter = _read_adapter(base.adapter, shapes, config)
    elif layer_count(shapes, _HEAD + "vl_self_attention.transformer_blocks."):
        raise ValueError("config.json sets use_vlln=False with vl_self_attention layers, which is not supported")
    kinds = ("cross",)
    if config.get("use_alternate_vl_dit", True):
        kinds = ("cross:text", *("cross:image",) * (config.get("attend_text_every_n_blocks", 2) - 1))
    return replace(
        base,
        vision=_read_patch_vision(base.vision, shapes, named.get("vision_config", {}), geometry.get("vision", {})),
        vlm=vlm,
        rope_sections=tuple(sections),
        padding_attends_evenly=geometry.get("padding_attends_evenly", base.padding_attends_evenly),
        image_token=_image_token(base, vlm, geometry.get("image_token", named.get("image_token_id"))),
        adapter=adapter,
        expert=_read_dit(base.expert, shapes, config.get("diffusion_model_cfg") or {}, kinds),
        flow=(flow := _read_flow(base.flow, shapes, config, config.get("state_history_length", 1), geometry)),
        chat=_read_chat(base.chat, geometry),
        features=_read_features(base.features, config, geometry, flow),
    )


def write_config(spec: FeatureVLASpec) -> dict[str, Any]:
    """NVIDIA's config.json for a network that no checkpoint was read for."""
    flow, expert, adapter = spec.flow, spec.expert, spec.adapter
    blocks = {"dropout": 0.2, "final_dropout": True, "positional_embeddings": None}
    head = {
        "action_horizon": flow.chunk,
        "add_pos_embed": flow.n_positions > 0,
        "backbone_embedding_dim": spec.vlm.d_model,
        "hidden_size": flow.d_hidden,
        "input_embedding_dim": expert.d_model,
        "max_action_dim": flow.d_action,
        "max_state_dim": flow.d_state,
        "max_num_embodiments": flow.n_embodiments,
        "max_seq_len": flow.n_positions or 1024,
        "num_inference_timesteps": flow.n_steps,
        "num_timestep_buckets": flow.n_buckets,
        "use_vlln": adapter is not None,
        "diffusion_model_cfg": blocks | {
            "attention_head_dim": expert.d_head, "num_attention_heads": expert.n_heads,
            "num_layers": len(expert.schedule), "output_dim": expert.d_out,
            "interleave_self_attention": "self" in expert.schedule, "norm_type": "ada_norm",
        },
        "vl_self_attention_cfg": None if adapter is None else blocks | {
            "attention_head_dim": adapter.d_head, "num_attention_heads": adapter.n_heads,
            "num_layers": adapter.n_layers,
        },
    }  # fmt: skip
    if isinstance(spec.vision, PatchVisionSpec):
        cross = [kind for kind in expert.schedule if kind != "self"]
        return head | {
            "model_type": spec.config_type.split("|")[0], "model_dtype": "bfloat16", "select_layer": spec.vlm.n_layers,
            "state_history_length": flow.n_state_steps, "use_alternate_vl_dit": "cross" not in cross,
            "attend_text_every_n_blocks": [*cross[1:], "cross:text"].index("cross:text") + 1,
        }  # fmt: skip
    head |= {"action_dim": flow.d_action, "num_target_vision_tokens": flow.n_future}
    return {
        "architectures": ["GR00T_N1_5"], "model_type": spec.config_type.split("|")[0], "compute_dtype": "bfloat16",
        "hidden_size": spec.vlm.d_model, "action_dim": flow.d_action, "action_horizon": flow.chunk,
        "backbone_cfg": {
            "eagle_path": "./eagle", "load_bf16": False, "project_to_dim": None, "reproject_vision": False,
            "select_layer": spec.vlm.n_layers, "tune_llm": False, "tune_visual": True, "use_flash_attention": False,
        },
        "action_head_cfg": head,
    }  # fmt: skip


def _refuse(where: str, config: Mapping[str, Any], options: Mapping[str, tuple[Any, ...]]) -> None:
    for option, harmless in options.items():
        if option in config and config[option] not in harmless:
            raise ValueError(f"{where} sets {option}={config[option]!r}, which is not supported")


def _read_decoder(
    base: DecoderSpec, shapes: _Shapes, prefix: str, named: Mapping[str, Any], geometry: Mapping[str, Any],
    n_kept: int | None,
) -> DecoderSpec:  # fmt: skip
    text = named.get("text_config", {})
    # the width of a head is that of the norm of its queries
    given = {**text_sizes(named), **geometry, "d_head": shapes.shape(prefix + "layers.0.self_attn.q_norm.weight")[0]}
    n_layers = layer_count(shapes, prefix + "layers.")
    if n_kept not in (None, n_layers):
        raise ValueError(f"config.json keeps {n_kept} language-model layers, the weights have {n_layers}")
    vlm = decoder_from_shapes(base, shapes.shape, prefix, n_layers, given)
    rope = text.get("rope_parameters") or {}
    rope_base = geometry.get("rope_base", rope.get("rope_theta", text.get("rope_theta", base.rope_base)))
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"rope_type={rope['rope_type']!r} is not supported")
    return replace(vlm, rope_base=float(rope_base), d_vocab=shapes.shape(prefix + "embed_tokens.weight")[0])


def _read_patch_vision(
    base: PatchVisionSpec, shapes: _Shapes, named: Mapping[str, Any], geometry: Mapping[str, Any]
) -> PatchVisionSpec:
    d_model, _, frames, patch_size, _ = shapes.shape(_QWEN_VISION + "patch_embed.proj.weight")
    merge = math.isqrt(shapes.shape(_QWEN_VISION + "merger.linear_fc1.weight")[1] // d_model)
    n_taps = layer_count(shapes, _QWEN_VISION + "deepstack_merger_list.")
    n_layers = layer_count(shapes, _QWEN_VISION + "blocks.")
    taps = tuple(geometry.get("taps", named.get("deepstack_visual_indexes", base.taps)))
    # which layers are tapped is in code; the number of mergers only bounds it
    if len(taps) != n_taps or any(not 0 <= tap < n_layers for tap in taps):
        raise ValueError(
            f"deepstack taps {list(taps)}, but the weights have {n_taps} mergers and {n_layers} vision layers; "
            "state vision.taps in geometry.json"
        )
    n_heads = geometry.get("n_heads", named.get("num_heads", d_model // (base.d_model // base.n_heads)))
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(f"vision width {d_model} does not divide into {n_heads} heads; state n_heads in geometry.json")
    return replace(
        base,
        patch_size=patch_size,
        frames=frames,
        grid=math.isqrt(shapes.shape(_QWEN_VISION + "pos_embed.weight")[0]),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_mlp=shapes.shape(_QWEN_VISION + "blocks.0.mlp.linear_fc1.weight")[0],
        act=geometry.get("act", named.get("hidden_act", base.act)),
        merge=merge,
        taps=taps,
    )


def _image_token(base: FeatureVLASpec, vlm: DecoderSpec, given: int | None) -> int:
    if given is None and vlm.d_vocab == base.vlm.d_vocab:
        given = base.image_token
    if given is None or vlm.d_vocab is None or not 0 <= given < vlm.d_vocab:
        raise ValueError(
            f"image token {given} of a vocabulary of {vlm.d_vocab}: state its id as image_token in geometry.json"
        )
    return given


def _read_adapter(base: AdapterSpec | None, shapes: _Shapes, config: Mapping[str, Any]) -> AdapterSpec:
    """The adapter's sizes; `config` holds vl_self_attention_cfg."""
    assert base is not None
    options = config.get("vl_self_attention_cfg") or {}
    _refuse("vl_self_attention_cfg", options, _TRANSFORMER)
    prefix = _HEAD + "vl_self_attention.transformer_blocks."
    n_layers = layer_count(shapes, prefix)
    if not n_layers:
        return replace(base, n_layers=0, n_heads=0, d_head=0, d_mlp=0)
    n_heads, d_head = _heads("vl_self_attention_cfg", options, base, shapes.shape(f"{prefix}0.attn1.to_q.weight")[0])
    d_mlp = shapes.shape(f"{prefix}0.ff.net.0.proj.weight")[0]
    return replace(base, n_layers=n_layers, n_heads=n_heads, d_head=d_head, d_mlp=d_mlp)


def _read_dit(base: DiTSpec, shapes: _Shapes, options: Mapping[str, Any], kinds: tuple[str, ...]) -> DiTSpec:
    """The expert's sizes; kinds: what its cross-attention blocks read in turn.

    Raises ValueError where they read different things and no self-attention stands between them.
    """
    _refuse("diffusion_model_cfg", options, _DIT)
    prefix = _HEAD + "model.transformer_blocks."
    n_layers = layer_count(shapes, prefix)
    d_out, d_model = shapes.shape(_HEAD + "model.proj_out_2.weight")
    n_heads, d_head = _heads("diffusion_model_cfg", options, base, d_model)
    own = options.get("interleave_self_attention", "self" in base.schedule)
    if not own and kinds != ("cross",):
        raise ValueError("interleave_self_attention=False with use_alternate_vl_dit (the public model refuses it too)")
    return replace(
        base,
        schedule=tuple("self" if own and i % 2 else kinds[i // 2 % len(kinds)] for i in range(n_layers)),
        d_model=d_model,
        n_heads=n_heads,
        d_head=d_head,
        d_mlp=shapes.shape(f"{prefix}0.ff.net.0.proj.weight")[0],
        d_out=d_out,
        eps=options.get("norm_eps", base.eps),
    )  # fmt: skip


def _read_chat(base: ChatSpec, geometry: Mapping[str, Any]) -> ChatSpec:
    given = dict(geometry.get("chat", {}))
    if given.get("pixels") is not None:
        given["pixels"] = tuple(given["pixels"])
    return replace(base, **given)


def _read_features(
    base: FeatureSpec, config: Mapping[str, Any], geometry: Mapping[str, Any], flow: EmbodimentFlowSpec
) -> FeatureSpec:
    """The robot side of geometry.json, else of LeRobot's config.json; NVIDIA's states none but the padded widths."""
    given = dict(geometry.get("features", {}))
    if given:
        given |= {name: tuple(given[name]) for name in ("cameras", "resize") if given[name] is not None}
        return FeatureSpec(**given)
    base = replace(
        base, d_state=flow.d_state, d_action=flow.d_action, n_action_steps=min(base.n_action_steps, flow.chunk)
    )
    if not config.get("input_features"):
        return base
    features = read_features(config, base)
    return replace(features, resize=base.resize, n_action_steps=min(features.n_action_steps, flow.chunk))


def _heads(where: str, options: Mapping[str, Any], base: Any, width: int) -> tuple[int, int]:
    d_head = options.get("attention_head_dim", base.d_head)
    n_heads = options.get("num_attention_heads", width // d_head)
    if n_heads * d_head != width:
        raise ValueError(f"{where}: {n_heads} heads of {d_head} do not make the width {width} of the weights")
    return n_heads, d_head


def _read_flow(
    base: EmbodimentFlowSpec,
    shapes: _Shapes,
    config: Mapping[str, Any],
    n_state_steps: int,
    geometry: Mapping[str, Any],
) -> EmbodimentFlowSpec:
    """Sizes of the flow's encoders and decoders, and its options in `config`."""
    n, d_in, d_hidden = shapes.shape(_HEAD + "state_encoder.layer1.W")
    if d_in % n_state_steps:
        raise ValueError(f"the state encoder reads {d_in} numbers, which are not {n_state_steps} states")
    future, positions = _HEAD + "future_tokens.weight", _HEAD + "position_embedding.weight"
    chunk = config.get("action_horizon", base.chunk)
    flow = EmbodimentFlowSpec(
        n_steps=config.get("num_inference_timesteps") or base.n_steps,
        chunk=chunk,
        d_action=shapes.shape(_HEAD + "action_decoder.layer2.W")[2],
        d_state=d_in // n_state_steps,
        n_state_steps=n_state_steps,
        n_buckets=config.get("num_timestep_buckets", base.n_buckets),
        train_times=base.train_times,
        n_embodiments=n,
        embodiment=geometry.get("embodiment", min(base.embodiment, n - 1)),
        d_hidden=d_hidden,
        n_future=shapes.shape(future)[0] if shapes.has(future) else 0,
        n_positions=shapes.shape(positions)[0] if shapes.has(positions) else 0,
    )
    if flow.n_positions and flow.n_positions < chunk:
        raise ValueError(f"action_horizon={chunk}, but the table of positions has {flow.n_positions} rows")
    return flow
