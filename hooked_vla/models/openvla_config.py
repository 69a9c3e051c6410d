"""Reading and writing the public configuration of OpenVLA and OpenVLA-OFT checkpoints.

config.json names the backbones and holds little of their sizes, which come from tensors' shapes. What OFT adds is in
files of its own, `action_head--<step>_checkpoint.pt` and others, and nothing but their presence announces it.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import product
from math import isqrt
from typing import Any

from hooked_vla.models.sizes import decoder_from_shapes, layer_count, text_sizes
from hooked_vla.spec import KeyTarget, LanguageVLASpec, ReadoutSpec, Split, TowerSpec

_LLM = "language_model.model."
_FIRST, _SECOND = "vision_backbone.featurizer.", "vision_backbone.fused_featurizer."
# where OFT stores towers with FiLM, whole; it says of each block's original weights that they are `block`'s
_FILM = "vision_backbone/"
_HEADS = {"regress": "model.", "diffuse": "noise_predictor.mlp_resnet."}
# OpenVLA v0.1 speaks to Vicuna (openvla: vla-scripts/deploy.py)
_VICUNA_PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What action should the robot take to {}? ASSISTANT:"
)
# options that would change the computation, with the values under which they do not
_OPTIONS = {"model_type": ("openvla",), "image_resize_strategy": ("resize-naive",)}
_TEXT_OPTIONS = {
    "model_type": ("llama",), "rope_scaling": (None,), "attention_bias": (False,), "mlp_bias": (False,),
    "tie_word_embeddings": (False,), "sliding_window": (None,),
}  # fmt: skip


def read_spec(base: LanguageVLASpec, checkpoint: Any) -> LanguageVLASpec:
    """`base` with the sizes of a checkpoint (weights.Checkpoint).

    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    config, shapes = checkpoint.config, checkpoint.shape
    geometry, text = checkpoint.json("geometry.json") or {}, config.get("text_config") or {}
    _refuse("config.json", config, _OPTIONS)
    _refuse("text_config", text, _TEXT_OPTIONS)
    if any(config.get("timm_override_act_layers") or ()):
        raise ValueError(f"timm_override_act_layers {config['timm_override_act_layers']} are not supported")
    fused = config.get("use_fused_vision_backbone", True)
    film = any(key.startswith(_FILM) for key in checkpoint.tensors)
    towers, keys = dict(base.towers), base.keys
    if not fused:
        last = list(towers)[-1]
        towers, keys = {last: towers[last]}, _without_first_tower(keys)
    sizes = {
        name: _read_tower(tower, checkpoint, prefix, film, (geometry.get("vision") or {}).get(name) or {})
        for prefix, (name, tower) in zip((_FIRST, _SECOND), towers.items(), strict=False)
    }
    given = {**text_sizes(config), **_given(geometry, "vlm")}
    vlm = replace(
        decoder_from_shapes(base.vlm, shapes, _LLM, layer_count(checkpoint, _LLM + "layers."), given),
        rope_base=given.get("rope_base", text.get("rope_theta", base.vlm.rope_base)),
        d_vocab=shapes(_LLM + "embed_tokens.weight")[0],
    )
    readout = _read_readout(base.readout, checkpoint, _given(geometry, "readout"))
    prompt = replace(base.prompt, **_only(base.prompt, _given(geometry, "prompt")))
    if "prompt" not in geometry and str(config.get("llm_backbone_id", "")).startswith("vicuna"):
        prompt = replace(prompt, template=_VICUNA_PROMPT)
    side = next(iter(sizes.values())).image_size
    return replace(
        base,
        towers=sizes,
        connector=tuple(shapes(f"projector.fc{i + 1}.weight")[0] for i in range(2 if fused else 1)),
        film=film,
        vlm=vlm,
        prompt=prompt,
        readout=readout,
        keys=with_film(keys) if film else keys,
        tied=base.tied if readout.kind == "generate" else {},
        features=replace(
            base.features,
            cameras=tuple(geometry.get("cameras", base.features.cameras)),
            d_state=readout.d_state,
            d_action=readout.d_action,
            resize=(side, side),
            n_action_steps=min(geometry.get("n_action_steps", readout.chunk), readout.chunk),
            max_text=config.get("llm_max_length", base.features.max_text),
            pad_text=geometry.get("pad_text", base.features.pad_text),
            tokenizer=geometry.get("tokenizer", base.features.tokenizer),
        ),
    )


def write_config(spec: LanguageVLASpec) -> dict[str, Any]:
    """A public config.json for a network that no checkpoint was read for."""
    side = spec.features.resize[0] if spec.features.resize else 0
    return {
        "architectures": ["OpenVLAForActionPrediction"],
        "model_type": spec.config_type,
        "use_fused_vision_backbone": len(spec.towers) > 1,
        "image_sizes": [side] * len(spec.towers),
        "timm_override_act_layers": [None] * len(spec.towers),
        "image_resize_strategy": "resize-naive",
        "llm_max_length": spec.features.max_text,
        "n_action_bins": spec.readout.n_bins,
        "pad_to_multiple_of": spec.readout.n_padding_ids,
        "norm_stats": {},
        "text_config": {
            "model_type": "llama",
            "hidden_size": spec.vlm.d_model,
            "intermediate_size": spec.vlm.d_mlp,
            "num_hidden_layers": spec.vlm.n_layers,
            "num_attention_heads": spec.vlm.n_heads,
            "num_key_value_heads": spec.vlm.n_kv_heads,
            "head_dim": spec.vlm.d_head,
            "hidden_act": spec.vlm.act,
            "rms_norm_eps": spec.vlm.eps,
            "rope_theta": spec.vlm.rope_base,
            "vocab_size": spec.vlm.d_vocab,
        },
    }


def _refuse(where: str, config: Mapping[str, Any], known: Mapping[str, tuple[Any, ...]]) -> None:
    for name, values in known.items():
        if config.get(name, values[0]) not in values:
            raise ValueError(f"{where}: {name}={config[name]!r} is not supported, only {list(values)}")


def _given(geometry: Mapping[str, Any], part: str) -> dict[str, Any]:
    return dict(geometry.get(part) or {})


def _only(spec: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    names = {each.name for each in fields(spec)}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if name in names}


def _read_tower(base: TowerSpec, checkpoint: Any, prefix: str, film: bool, given: Mapping[str, Any]) -> TowerSpec:
    prefix, block = (f"{_FILM}{prefix}", "block.") if film else (prefix, "")
    d_model, _, patch_size, _ = checkpoint.shape(f"{prefix}patch_embed.proj.weight")
    n_positions = checkpoint.shape(f"{prefix}pos_embed")[1]
    n_heads = given.get("n_heads", d_model // (base.d_model // base.n_heads))
    if n_heads < 1 or d_model % n_heads:
        raise ValueError(
            f"{prefix}: width {d_model} does not divide into {n_heads} heads; state n_heads in geometry.json"
        )
    registers = checkpoint.tensors.get(f"{prefix}reg_token")
    return replace(
        base,
        image_size=isqrt(n_positions) * patch_size,
        patch_size=patch_size,
        d_model=d_model,
        n_layers=layer_count(checkpoint, f"{prefix}blocks."),
        n_heads=n_heads,
        d_mlp=checkpoint.shape(f"{prefix}blocks.0.{block}mlp.fc1.weight")[0],
        act=given.get("act", base.act),
        eps=given.get("eps", base.eps),
        n_prefix_tokens=0 if registers is None else 1 + registers.shape[1],
        layer_scale=f"{prefix}blocks.0.{block}ls1.scale_factor" in checkpoint.tensors,
        attention_pool=f"{prefix}attn_pool.latent" in checkpoint.tensors,
    )


def _read_readout(base: ReadoutSpec, checkpoint: Any, given: Mapping[str, Any]) -> ReadoutSpec:
    kind, prefix = given.get("kind", base.kind), ""
    for head, start in product(_HEADS, ("action_head/module.", "action_head/")):
        if f"{start}{_HEADS[head]}fc1.weight" in checkpoint.tensors:
            kind, prefix = head, start + _HEADS[head]
    if not prefix and any(key.startswith("action_head/") for key in checkpoint.tensors):
        raise ValueError(f"the action head in {checkpoint.folder} is neither of the known ones: {sorted(_HEADS)}")
    if not prefix and kind in _HEADS:
        # an OFT checkpoint without a head reads the language model's own logits
        kind = "parallel"
    if kind not in ("generate", "parallel", *_HEADS) or (kind == "generate" and base.kind != "generate"):
        raise ValueError(f"geometry.json: readout kind {kind!r} does not go with the files in {checkpoint.folder}")
    state = [key for key in checkpoint.tensors if key.startswith("proprio_projector/") and key.endswith("fc1.weight")]
    config = checkpoint.config
    readout = replace(
        base,
        kind=kind,
        d_action=given.get("d_action", _action_width(base, checkpoint)),
        d_state=checkpoint.shape(state[0])[1] if state else 0,
        n_bins=config.get("n_action_bins", base.n_bins),
        n_padding_ids=config.get("pad_to_multiple_of", base.n_padding_ids),
        bounds=tuple(given.get("bounds", base.bounds)),
        d_hidden=checkpoint.shape(prefix + "fc1.weight")[0] if prefix else 0,
        n_layers=layer_count(checkpoint, prefix + "mlp_resnet_blocks.") if prefix else 0,
        n_steps=given.get("n_steps", 50) if kind == "diffuse" else 1,
    )
    if prefix:
        readout = replace(readout, d_action=checkpoint.shape(prefix + "fc2.weight")[0])
    if kind == "generate":
        return replace(readout, chunk=given.get("chunk", 1))
    if "chunk" not in given and readout.d_action != base.d_action:
        raise ValueError(
            f"this checkpoint has {readout.d_action} action dimensions, not LIBERO's {base.d_action}, and its files do "
            'not say how many steps a chunk has: state {"readout": {"chunk": ..., "bounds": [...]}} in geometry.json '
            '(for ALOHA 25 and ["min", "max"])'
        )
    return replace(readout, chunk=given.get("chunk", base.chunk))


def _action_width(base: ReadoutSpec, checkpoint: Any) -> int:
    stats = checkpoint.json("dataset_statistics.json") or checkpoint.config.get("norm_stats") or {}
    widths = {name: len(each["action"]["q01"]) for name, each in stats.items() if "q01" in each.get("action", {})}
    if len(set(widths.values())) > 1:
        raise ValueError(f"datasets with actions of different widths in one checkpoint: {widths}")
    return next(iter(widths.values()), base.d_action)


Keys = Mapping[str, Mapping[str, KeyTarget]]


def _without_first_tower(keys: Keys) -> Keys:
    """The layout of a single tower, which takes the first's place, and of a connector with one hidden layer."""
    projector = {
        f"fc{i}.{kind}": f"connector.{place}.{kind}"
        for i, place in ((1, "layers.0.proj"), (2, "proj")) for kind in ("weight", "bias")
    }  # fmt: skip
    return {**keys, _FIRST: keys[_SECOND], _SECOND: {}, "projector.": projector}


def with_film(keys: Keys) -> Keys:
    """The key rules of a checkpoint with FiLM: its towers stand in a file of their own, and replace those among the
    other weights."""
    found = dict(keys)
    for prefix in (_FIRST, _SECOND):
        rules = {key.replace("blocks.{}.", "blocks.{}.block."): target for key, target in keys[prefix].items()}
        for tower in {_tower(target) for target in keys[prefix].values()}:
            for part, kind in ((part, kind) for part in ("scale", "shift") for kind in ("weight", "bias")):
                rules[f"blocks.{{}}.{part}.{kind}"] = f"vision.{tower}.blocks.{{}}.film.{part}.{kind}"
        found[prefix] = dict.fromkeys(keys[prefix])
        found[f"{_FILM}{prefix}"] = rules
    return found


def _tower(target: KeyTarget) -> str:
    name = target.targets[0] if isinstance(target, Split) else target
    assert isinstance(name, str)
    return name.split(".")[1]
