"""SmolVLA. The prefix (images, language, state) runs once and only its keys and values reach the action expert;
the expert's layers alternate between joint attention over prefix and actions, and cross-attention to the prefix.

Wiring read from LeRobot 0.6.1, policies/smolvla. Two rules that surprise: actions attend to each other causally,
and cross-attention layers restart rotary positions at 0.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components import mask as masks
from hooked_vla.components.action_head import FlowMatchingHead
from hooked_vla.components.attention import KeysValues, RotarySelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.connector import PixelShuffleConnector
from hooked_vla.components.embed import sincos_time
from hooked_vla.components.joint import CrossAttention, JointAttention, PrefixLayer
from hooked_vla.components.mlp import GatedMLP
from hooked_vla.components.norm import RMSNorm
from hooked_vla.components.rope import Rotation, rotation
from hooked_vla.components.vit import ViT
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import ACTION, LANGUAGE, PAD, SPECIAL, STATE, Segments, VLAInputs, image_segment
from hooked_vla.lerobot import positive, read_features, write_features
from hooked_vla.models.network import ExpertNetwork, count_patches
from hooked_vla.models.sizes import decoder_from_shapes, layer_count, siglip_from_shapes, text_sizes
from hooked_vla.spec import DecoderSpec, ExpertSpec, FlowSpec, FlowVLASpec, PrefixSpec


def _rms_block(spec: DecoderSpec, attn: nn.Module, attn_name: str = "attn") -> Block:
    return Block(
        spec.d_model,
        ln1=RMSNorm(spec.d_model, spec.eps),
        attn=attn,
        ln2=RMSNorm(spec.d_model, spec.eps),
        mlp=GatedMLP(spec.d_model, spec.d_mlp, spec.act),
        attn_name=attn_name,
    )


@dataclass(frozen=True)
class PrefixLayout:
    """Where the prefix's tokens stand: (segment, length) spans, which are valid, where attention blocks start."""

    spans: list[tuple[str, int]]
    valid: Bool[Tensor, "batch seq"]
    starts_block: Bool[Tensor, " seq"]


class LanguageModel(nn.Module):
    """The prefix: embeddings of every modality and the decoder over them. Its residual stream ends here."""

    def __init__(self, spec: DecoderSpec, prefix: PrefixSpec, d_state: int) -> None:
        super().__init__()
        assert spec.d_vocab is not None
        self.d_model, self.d_head, self.rope_base, self.prefix = spec.d_model, spec.d_head, spec.rope_base, prefix
        self.embed = nn.Embedding(spec.d_vocab, spec.d_model)
        self.state_proj = nn.Linear(d_state, spec.d_model)
        self.blocks = nn.ModuleList(
            _rms_block(spec, RotarySelfAttention(spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head, bias=False))
            for _ in range(spec.n_layers)
        )
        self.ln_final = RMSNorm(spec.d_model, spec.eps)
        # unused by the policy; the logit lens reads it
        self.unembed = nn.Linear(spec.d_model, spec.d_vocab, bias=False)
        self.hook_embed_image = HookPoint("batch seq d_model", stream="vlm.image")
        self.hook_embed_language = HookPoint("batch seq d_model", stream="vlm.language")
        self.hook_embed_state = HookPoint("batch seq d_model", stream="vlm.state")
        self.hook_tokens = HookPoint("batch seq d_model")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return rearrange(self.unembed.weight, "v m -> m v")

    def layout(self, inputs: VLAInputs, n_image_tokens: int) -> PrefixLayout:
        """Images in order, then language, then the state token, alone in a block of its own, then padding."""
        batch, n_text = inputs.tokens.shape
        spans, valid = [], []
        true = torch.ones(batch, 1, dtype=torch.bool, device=inputs.tokens.device)
        for i, camera in enumerate(inputs.cameras):
            for name, length, seen in (
                (SPECIAL, len(self.prefix.image_start), true),
                (image_segment(camera), n_image_tokens, inputs.image_mask[:, i : i + 1]),
                (SPECIAL, len(self.prefix.image_end), true),
            ):
                spans.append((name, length))
                valid.append(seen.expand(-1, length))
        n_before_state = sum(length for _, length in spans) + n_text
        n_pad = max(0, self.prefix.min_length - n_before_state - 1)
        spans += [(LANGUAGE, n_text), (STATE, 1), (PAD, n_pad)]
        valid += [inputs.token_mask, true, ~true.expand(-1, n_pad)]
        starts_block = torch.zeros(n_before_state + 1 + n_pad, dtype=torch.bool, device=inputs.tokens.device)
        starts_block[n_before_state] = True
        return PrefixLayout([span for span in spans if span[1]], torch.cat(valid, dim=1), starts_block)

    def embed_prefix(
        self, image_tokens: Float[Tensor, "batch camera token d_model"], inputs: VLAInputs, length: int
    ) -> Float[Tensor, "batch seq d_model"]:
        """The decoder's input. Image and language tokens are scaled by sqrt(d_model), state and specials are not."""
        dtype, scale = self.embed.weight.dtype, math.sqrt(self.d_model)
        # the source rounds the image factor to the stream's dtype, the language factor not
        image_tokens = image_tokens * torch.tensor(scale, dtype=dtype, device=image_tokens.device)
        n_cameras = image_tokens.shape[1]
        flat = self.hook_embed_image(rearrange(image_tokens, "b n s d -> b (n s) d"))
        language = self.hook_embed_language(self.embed(inputs.tokens) * scale)
        state = self.hook_embed_state(self.state_proj(inputs.state)[:, None].to(dtype))
        parts = [flat]
        if self.prefix.image_start or self.prefix.image_end:
            start, end = (self._special(ids, inputs) for ids in (self.prefix.image_start, self.prefix.image_end))
            parts = [part for image in flat.chunk(n_cameras, dim=1) for part in (start, image, end)]
        tokens = torch.cat([*parts, language, state], dim=1)
        return self.hook_tokens(functional.pad(tokens, (0, 0, 0, length - tokens.shape[1])))

    def _special(self, ids: tuple[int, ...], inputs: VLAInputs) -> Float[Tensor, "batch n d_model"]:
        token_ids = torch.tensor(ids, dtype=torch.long, device=inputs.tokens.device)
        return repeat(self.embed(token_ids), "n d -> b n d", b=inputs.batch_size)

    def forward(
        self, tokens: Float[Tensor, "batch seq d_model"], layout: PrefixLayout
    ) -> tuple[Float[Tensor, "batch seq d_model"], list[KeysValues]]:
        """Final hidden states (which no action depends on), and each layer's keys and values."""
        by = rotation(masks.positions(layout.valid), self.d_head, self.rope_base)
        mask = masks.additive(masks.block_mask(layout.valid, layout.starts_block), tokens.dtype)
        caches = []
        x = tokens
        for block in self.blocks:
            assert isinstance(block, Block)
            x, kv = block.with_keys_values(x, by, mask)
            caches.append(kv)
        return self.ln_final(x), caches


@dataclass(frozen=True)
class PrefixReads:
    """What the expert reads of the prefix, the same at every denoise step; per schedule: rotation and mask."""

    layers: list[PrefixLayer]
    rotations: Mapping[str, Rotation]
    masks: Mapping[str, Float[Tensor, "batch 1 chunk key"]]

    def repeat(self, n: int) -> "PrefixReads":
        """The same for n batches in a row."""
        return PrefixReads(
            layers=[layer.repeat(n) for layer in self.layers],
            rotations={kind: by.repeat(n) for kind, by in self.rotations.items()},
            masks={kind: repeat(mask, "b ... -> (n b) ...", n=n) for kind, mask in self.masks.items()},
        )


class ActionExpert(nn.Module):
    """Velocity of a noisy action chunk, given the prefix."""

    def __init__(self, spec: ExpertSpec, flow: FlowSpec, n_prefix_heads: int) -> None:
        super().__init__()
        sizes = spec.decoder
        self.d_model, self.d_head, self.rope_base = sizes.d_model, sizes.d_head, sizes.rope_base
        self.flow, self.schedule, self.chunk, self.d_action = flow, spec.schedule, flow.chunk, flow.d_action
        self.action_in_proj = nn.Linear(flow.d_action, sizes.d_model)
        self.time_mlp_in = nn.Linear(2 * sizes.d_model, sizes.d_model)
        self.time_mlp_out = nn.Linear(sizes.d_model, sizes.d_model)
        heads = (sizes.d_model, sizes.n_heads, sizes.n_kv_heads, sizes.d_head)
        self.blocks = nn.ModuleList(
            _rms_block(sizes, JointAttention(*heads, bias=False))
            if kind == "joint"
            else _rms_block(sizes, CrossAttention(*heads, n_prefix_heads, bias=False), "cross_attn")
            for kind in spec.schedule
        )
        self.ln_final = RMSNorm(sizes.d_model, sizes.eps)
        self.action_out_proj = nn.Linear(sizes.d_model, flow.d_action)
        self.hook_noisy_actions = HookPoint("batch chunk d_action", dtype="float32", reused=True)
        self.hook_time = HookPoint("batch d_model", dtype="float32")
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_velocity = HookPoint("batch chunk d_action", dtype="float32")

    def reads(self, caches: list[KeysValues], valid: Bool[Tensor, "batch seq"]) -> PrefixReads:
        """Positions and masks of the action tokens against a prefix whose valid tokens are given."""
        batch, dtype = valid.shape[0], self.ln_final.weight.dtype
        steps = torch.ones(batch, self.chunk, dtype=torch.bool, device=valid.device)
        own = masks.positions(steps)
        sees_prefix = repeat(valid, "b key -> b query key", query=self.chunk)
        sees_own = masks.block_mask(steps, steps[0])
        after_prefix = valid.long().sum(1, keepdim=True) + own
        return PrefixReads(
            layers=[PrefixLayer(kv) for kv in caches],
            rotations={
                "joint": rotation(after_prefix, self.d_head, self.rope_base),
                "cross": rotation(own, self.d_head, self.rope_base),
            },
            masks={
                "joint": masks.additive(torch.cat([sees_prefix, sees_own], dim=2), dtype),
                "cross": masks.additive(sees_prefix, dtype),
            },
        )

    def embed_actions(
        self, noisy: Float[Tensor, "batch chunk d_action"], time: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch chunk d_model"]:
        """One token per action step: action and time through a two-layer MLP, in float32."""
        embedded = sincos_time(time, self.d_model, self.flow.min_period, self.flow.max_period)
        embedded = self.hook_time(embedded.to(self.action_in_proj.weight.dtype))
        actions = self.action_in_proj(noisy)
        both = torch.cat([actions, repeat(embedded, "b d -> b c d", c=self.chunk)], dim=-1)
        tokens = self.time_mlp_out(functional.silu(self.time_mlp_in(both)))
        return self.hook_tokens(tokens.to(self.ln_final.weight.dtype))

    def forward(
        self, noisy: Float[Tensor, "batch chunk d_action"], time: Float[Tensor, " batch"], reads: PrefixReads
    ) -> tuple[Float[Tensor, "batch chunk d_action"], Float[Tensor, "batch chunk d_action"]]:
        """The noisy actions as hooks left them, and the velocity there."""
        noisy = self.hook_noisy_actions(noisy)
        x = self.embed_actions(noisy, time)
        for block, kind, prefix in zip(self.blocks, self.schedule, reads.layers, strict=True):
            x = block(x, prefix, reads.rotations[kind], reads.masks[kind])
        velocity = self.action_out_proj(self.ln_final(x).to(self.action_out_proj.weight.dtype))
        return noisy, self.hook_velocity(velocity)


class SmolVLA(ExpertNetwork):
    """The whole network: images, tokens, state and noise to a normalised action chunk at its padded width."""

    def __init__(self, spec: FlowVLASpec) -> None:
        super().__init__()
        self.spec = spec
        self.vision = ViT(spec.vision)
        self.connector = PixelShuffleConnector(
            spec.vision.d_model, spec.vlm.d_model, spec.connector.scale, spec.connector.bias
        )
        self.vlm = LanguageModel(spec.vlm, spec.prefix, spec.flow.d_state)
        self.expert = ActionExpert(spec.expert, spec.flow, spec.vlm.n_kv_heads)
        self.head = FlowMatchingHead(spec.flow.n_steps, spec.flow.chunk, spec.flow.d_action)

    @property
    def dead_ends(self) -> list[str]:
        """Only keys and values of the prefix reach the expert: of its last layer, nothing else matters."""
        last = f"vlm.blocks.{len(self.vlm.blocks) - 1}"
        after_kv = ["hook_q", "hook_rot_q", "hook_attn_scores", "hook_pattern", "hook_z"]
        return [
            *(f"{last}.attn.{leaf}" for leaf in after_kv),
            *(f"{last}.{rest}" for rest in ("hook_attn_out", "hook_resid_mid", "ln2.*", "mlp.*", "hook_mlp_out")),
            f"{last}.hook_resid_post",
            "vlm.ln_final.*",
        ]

    @property
    def d_features(self) -> int:
        return self.vision.d_model

    def prefill(self, inputs: VLAInputs) -> PrefixReads:
        """Everything that does not depend on the denoise step."""
        features = rearrange(self.vision_features(inputs), "b n s d -> (b n) s d")
        image_tokens = rearrange(self.connector(features), "(b n) s d -> b n s d", n=len(inputs.cameras))
        layout = self.vlm.layout(inputs, image_tokens.shape[2])
        tokens = self.vlm.embed_prefix(image_tokens, inputs, layout.valid.shape[1])
        _, caches = self.vlm(tokens, layout)
        return self.expert.reads(caches, layout.valid)

    def segments(self, inputs: VLAInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        n_patches = count_patches(self.vision, inputs)
        n_tokens = self.connector.n_tokens(n_patches)
        layout = self.vlm.layout(inputs, n_tokens)
        names = tuple(image_segment(camera) for camera in inputs.cameras)
        camera_of_row = torch.arange(len(names)).repeat(inputs.batch_size)[:, None]
        return {
            "vision": Segments(names, camera_of_row.expand(-1, n_patches), row_axis="image"),
            "connector": Segments(names, camera_of_row.expand(-1, n_tokens), row_axis="image"),
            "vlm": Segments.from_spans(layout.spans, inputs.batch_size, layout.valid),
            "vlm.image": Segments.from_spans([(name, n_tokens) for name in names], inputs.batch_size),
            "vlm.language": Segments.from_spans(
                [(LANGUAGE, inputs.tokens.shape[1])], inputs.batch_size, inputs.token_mask
            ),
            "vlm.state": Segments.from_spans([(STATE, 1)], inputs.batch_size),
            "expert": Segments.from_spans([(ACTION, self.expert.chunk)], inputs.batch_size),
        }


NETWORK = SmolVLA

_VISION = "model.vlm_with_expert.vlm.model.vision_model."
_TEXT = "model.vlm_with_expert.vlm.model.text_model."
_EXPERT = "model.vlm_with_expert.lm_expert."
# token strings around images in SmolVLM2's tokenizer
_IMAGE_START = ("<fake_token_around_image>", "<global-img>")
_IMAGE_END = ("<fake_token_around_image>",)
# options that would change the computation, with the value under which they do not
_UNSUPPORTED = {"adapt_to_pi_aloha": False, "use_delta_joint_actions_aloha": False}


def read_spec(base: FlowVLASpec, checkpoint: Any) -> FlowVLASpec:
    """`base` with the sizes of a LeRobot checkpoint (weights.Checkpoint).

    Widths and depths come from the tensors' shapes; numbers of heads from geometry.json, else from the vision and
    text configuration in the folder that `vlm_model_name` names, else from the published head width.
    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    config = checkpoint.config
    for option, harmless in _UNSUPPORTED.items():
        if config.get(option, harmless) != harmless:
            raise ValueError(f"config.json sets {option}={config[option]!r}, which is not supported")
    if (config.get("rtc_config") or {}).get("enabled"):
        raise ValueError("config.json enables rtc_config (real-time chunking), which is not supported")
    if config.get("n_action_steps", 1) > config.get("chunk_size", base.flow.chunk):
        raise ValueError(f"config.json: n_action_steps {config['n_action_steps']} is more than chunk_size")
    geometry = checkpoint.json("geometry.json") or {}
    named = checkpoint.json(f"{config.get('vlm_model_name', '')}/config.json") or {}
    shapes = checkpoint.shape
    # num_vlm_layers may ask for more than there are; what was cut off is not in the file
    n_vlm, n_expert = layer_count(checkpoint, _TEXT + "layers."), config.get("num_expert_layers", -1)
    if n_expert > 0 and n_expert != n_vlm:
        raise ValueError(
            f"num_expert_layers={n_expert} with {n_vlm} language-model layers: the expert must have as many layers as "
            "the language model (with fewer, the public implementation fails too)"
        )
    given = {**text_sizes(named), **geometry.get("vlm", {})}
    vlm = decoder_from_shapes(base.vlm, shapes, _TEXT, n_vlm, given)
    vlm = replace(vlm, d_vocab=shapes(_TEXT + "embed_tokens.weight")[0])
    # the expert's configuration is a narrower copy of the language model's
    given = {"d_head": vlm.d_head, "act": vlm.act, "eps": vlm.eps, **geometry.get("expert", {})}
    expert = decoder_from_shapes(base.expert.decoder, shapes, _EXPERT, n_vlm, given)
    return replace(
        base,
        vision=siglip_from_shapes(
            base.vision, checkpoint, _VISION, named.get("vision_config", {}), geometry.get("vision", {})
        ),
        connector=replace(base.connector, scale=_connector_scale(shapes)),
        vlm=vlm,
        expert=ExpertSpec(expert, _schedule(config, expert.n_layers)),
        flow=FlowSpec(
            n_steps=positive(config, "num_steps", base.flow.n_steps),
            chunk=positive(config, "chunk_size", base.flow.chunk),
            d_action=shapes("model.action_in_proj.weight")[1],
            d_state=shapes("model.state_proj.weight")[1],
            min_period=positive(config, "min_period", base.flow.min_period, float),
            max_period=positive(config, "max_period", base.flow.max_period, float),
        ),
        prefix=_read_prefix(base, checkpoint, geometry.get("prefix", {}), vlm.d_vocab),
        features=read_features(config, base.features),
    )


def write_config(spec: FlowVLASpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    width, height = spec.features.resize or (spec.vision.image_size, spec.vision.image_size)
    return {
        "type": spec.config_type,
        "n_obs_steps": 1,
        **write_features(spec.features, (height, width)),
        "chunk_size": spec.flow.chunk,
        "max_state_dim": spec.flow.d_state,
        "max_action_dim": spec.flow.d_action,
        "num_steps": spec.flow.n_steps,
        "num_vlm_layers": spec.vlm.n_layers,
        "num_expert_layers": -1,
        "attention_mode": "cross_attn" if "cross" in spec.expert.schedule else "self_attn",
        "self_attn_every_n_layers": _self_attn_every(spec.expert.schedule),
        "expert_width_multiplier": spec.expert.decoder.d_model / spec.vlm.d_model,
        "add_image_special_tokens": bool(spec.prefix.image_start),
        "prefix_length": spec.prefix.min_length,
        "min_period": spec.flow.min_period,
        "max_period": spec.flow.max_period,
    }


def _schedule(config: Mapping[str, Any], n_layers: int) -> tuple[str, ...]:
    every = config.get("self_attn_every_n_layers", 2)
    if "cross" not in config.get("attention_mode", "cross_attn"):
        return ("joint",) * n_layers
    return tuple("joint" if every > 0 and i % every == 0 else "cross" for i in range(n_layers))


def _self_attn_every(schedule: tuple[str, ...]) -> int:
    for every in (-1, *range(1, len(schedule) + 1)):
        if _schedule({"self_attn_every_n_layers": every}, len(schedule)) == schedule:
            return every
    raise ValueError(f"no self_attn_every_n_layers gives the schedule {schedule}")


def _connector_scale(shapes: Any) -> int:
    d_shuffled = shapes("model.vlm_with_expert.vlm.model.connector.modality_projection.proj.weight")[1]
    return math.isqrt(d_shuffled // shapes(_VISION + "embeddings.patch_embedding.weight")[0])


def _read_prefix(base: FlowVLASpec, checkpoint: Any, given: Mapping[str, Any], d_vocab: int | None) -> PrefixSpec:
    min_length = checkpoint.config.get("prefix_length", base.prefix.min_length)
    if not checkpoint.config.get("add_image_special_tokens", False):
        return PrefixSpec(min_length=min_length)
    if "image_start" in given:
        return PrefixSpec(tuple(given["image_start"]), tuple(given["image_end"]), min_length)
    for name in ("tokenizer.json", f"{checkpoint.config.get('vlm_model_name', '')}/tokenizer.json"):
        tokenizer = checkpoint.json(name) or {}
        ids = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
        if all(text in ids for text in (*_IMAGE_START, *_IMAGE_END)):
            start, end = (tuple(ids[text] for text in texts) for texts in (_IMAGE_START, _IMAGE_END))
            return PrefixSpec(start, end, min_length)
    if d_vocab == base.vlm.d_vocab:
        # SmolVLM2-500M's ids of those strings
        return PrefixSpec((49189, 49152), (49189,), min_length)
    raise ValueError(
        "config.json sets add_image_special_tokens: put tokenizer.json beside it, or the ids as "
        '{"prefix": {"image_start": [...], "image_end": [...]}} into geometry.json'
    )
