"""ACT. No language and no loop: image features, state and a latent go through a DETR-like encoder, and the decoder's
queries, which start as zeros, become a whole action chunk in one pass.

Wiring read from LeRobot 0.6.1, policies/act, and from tonyzhaozh/act. The latent is zero when acting: the VAE encoder
that draws it in training is kept as parameters, without hook points. Positions go into queries and keys only.
"""

from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components.action_head import LinearHead
from hooked_vla.components.block import Block, PostNormBlock
from hooked_vla.components.connector import ConvConnector
from hooked_vla.components.embed import sine_positions_2d
from hooked_vla.components.encoder_decoder import (
    DecoderBlock,
    PositionedCrossAttention,
    PositionedSelfAttention,
    PostNormDecoderBlock,
)
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm
from hooked_vla.components.resnet import ResNet
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import ACTION, ENVIRONMENT, LATENT, STATE, Draws, Segments, StepInputs, image_segment
from hooked_vla.lerobot import read_step_features, write_step_features
from hooked_vla.models.network import Network
from hooked_vla.models.sizes import layer_count, resnet_from_shapes, resnet_name
from hooked_vla.spec import ChunkTransformerSpec, EncoderDecoderSpec, FeatureSpec, LatentSpec


def _attention(spec: EncoderDecoderSpec) -> PositionedSelfAttention:
    return PositionedSelfAttention(spec.d_model, spec.n_heads, spec.n_heads, spec.d_model // spec.n_heads, bias=True)


def _norm(spec: EncoderDecoderSpec) -> LayerNorm:
    return LayerNorm(spec.d_model, spec.eps)


def _encoder_block(spec: EncoderDecoderSpec) -> nn.Module:
    mlp = MLP(spec.d_model, spec.d_mlp, spec.act)
    if spec.pre_norm:
        return Block(spec.d_model, _norm(spec), _attention(spec), _norm(spec), mlp)
    return PostNormBlock(spec.d_model, _attention(spec), _norm(spec), mlp, _norm(spec))


def _decoder_block(spec: EncoderDecoderSpec) -> nn.Module:
    mlp = MLP(spec.d_model, spec.d_mlp, spec.act)
    cross = PositionedCrossAttention(spec.d_model, spec.n_heads, spec.d_model // spec.n_heads, stream="encoder")
    if spec.pre_norm:
        return DecoderBlock(spec.d_model, _norm(spec), _attention(spec), _norm(spec), cross, _norm(spec), mlp)
    return PostNormDecoderBlock(spec.d_model, _attention(spec), _norm(spec), cross, _norm(spec), mlp, _norm(spec))


class ObservationEncoder(nn.Module):
    """Latent, state, environment and image tokens, and the encoder over them; every token sees every token."""

    def __init__(self, spec: EncoderDecoderSpec, features: FeatureSpec, d_latent: int) -> None:
        super().__init__()
        self.d_model, self.d_latent = spec.d_model, d_latent
        self.latent_proj = nn.Linear(d_latent, spec.d_model)
        self.singles = [LATENT]
        if features.d_state:
            self.state_proj = nn.Linear(features.d_state, spec.d_model)
            self.singles.append(STATE)
            self.hook_embed_state = HookPoint("batch 1 d_model")
        if features.d_environment:
            self.environment_proj = nn.Linear(features.d_environment, spec.d_model)
            self.singles.append(ENVIRONMENT)
            self.hook_embed_environment = HookPoint("batch 1 d_model")
        self.pos_embed = nn.Embedding(len(self.singles), spec.d_model)
        self.blocks = nn.ModuleList(_encoder_block(spec) for _ in range(spec.n_encoder_layers))
        self.ln_final = _norm(spec) if spec.pre_norm else nn.Identity()
        self.hook_latent = HookPoint("batch d_latent")
        self.hook_embed_latent = HookPoint("batch 1 d_model")
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_pos_embed = HookPoint("seq d_model")

    def embed(
        self, image_tokens: Float[Tensor, "batch image_seq d_model"] | None, inputs: StepInputs
    ) -> Float[Tensor, "batch seq d_model"]:
        """The encoder's input: one token each for latent, state and environment, then the images' in camera order."""
        dtype, device = self.latent_proj.weight.dtype, self.latent_proj.weight.device
        latent = self.hook_latent(torch.zeros(inputs.batch_size, self.d_latent, dtype=dtype, device=device))
        parts = [self.hook_embed_latent(self.latent_proj(latent)[:, None])]
        if inputs.state is not None:
            parts.append(self.hook_embed_state(self.state_proj(inputs.state[:, -1:].to(dtype))))
        if inputs.environment is not None:
            parts.append(self.hook_embed_environment(self.environment_proj(inputs.environment[:, -1:].to(dtype))))
        if image_tokens is not None:
            parts.append(image_tokens)
        return self.hook_tokens(torch.cat(parts, dim=1))

    def positions(self, grids: list[tuple[int, int]]) -> Float[Tensor, "seq d_model"]:
        """Learned for the single tokens, fixed sines for each camera's grid of (rows, columns)."""
        learned = self.pos_embed.weight
        fixed = [sine_positions_2d(*grid, self.d_model, learned.device).to(learned.dtype) for grid in grids]
        return self.hook_pos_embed(torch.cat([learned, *fixed]))

    def forward(
        self, tokens: Float[Tensor, "batch seq d_model"], positions: Float[Tensor, "seq d_model"]
    ) -> Float[Tensor, "batch seq d_model"]:
        x = tokens
        for block in self.blocks:
            x = block(x, positions)
        return self.ln_final(x)


class ActionDecoder(nn.Module):
    """Action queries: zeros with learned positions, which attend to each other and to the encoder's output."""

    def __init__(self, spec: EncoderDecoderSpec, chunk: int) -> None:
        super().__init__()
        self.d_model, self.chunk = spec.d_model, chunk
        self.pos_embed = nn.Embedding(chunk, spec.d_model)
        self.blocks = nn.ModuleList(_decoder_block(spec) for _ in range(spec.n_decoder_layers))
        self.ln_final = _norm(spec)
        self.hook_tokens = HookPoint("batch seq d_model")
        # the value is a parameter: hooks may not change it in place
        self.hook_pos_embed = HookPoint("seq d_model", reused=True)

    def forward(
        self, encoded: Float[Tensor, "batch prefix d_model"], encoded_positions: Float[Tensor, "prefix d_model"]
    ) -> Float[Tensor, "batch chunk d_model"]:
        x = self.hook_tokens(encoded.new_zeros(encoded.shape[0], self.chunk, self.d_model))
        positions = self.hook_pos_embed(self.pos_embed.weight)
        for block in self.blocks:
            x = block(x, (positions,), (positions, encoded, encoded_positions))
        return self.ln_final(x)


class LatentEncoder(nn.Module):
    """Parameters of the encoder that draws the latent from demonstrated actions in training; never run here."""

    pos_enc: Tensor

    def __init__(self, spec: EncoderDecoderSpec, features: FeatureSpec, latent: LatentSpec, chunk: int) -> None:
        super().__init__()
        self.cls_embed = nn.Embedding(1, spec.d_model)
        if features.d_state:
            self.state_proj = nn.Linear(features.d_state, spec.d_model)
        self.action_proj = nn.Linear(features.d_action, spec.d_model)
        # torch's layer has the public layout's parameters
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(spec.d_model, spec.n_heads, spec.d_mlp) for _ in range(latent.n_vae_layers)
        )
        self.norm = nn.LayerNorm(spec.d_model, spec.eps) if spec.pre_norm else nn.Identity()
        self.out_proj = nn.Linear(spec.d_model, 2 * latent.d_latent)
        n_tokens = 1 + bool(features.d_state) + chunk
        self.register_buffer("pos_enc", torch.zeros(1, n_tokens, spec.d_model))


class ACT(Network):
    """The whole network: images and state to a normalised action chunk."""

    def __init__(self, spec: ChunkTransformerSpec) -> None:
        super().__init__()
        self.spec = spec
        if spec.features.cameras:
            self.vision = ResNet(spec.vision, stream="vision")
            self.connector = ConvConnector(self.vision.d_model, spec.transformer.d_model)
        self.encoder = ObservationEncoder(spec.transformer, spec.features, spec.latent.d_latent)
        self.expert = ActionDecoder(spec.transformer, spec.chunk)
        self.head = LinearHead(spec.transformer.d_model, spec.chunk, spec.features.d_action)
        if spec.latent.n_vae_layers:
            self.vae = LatentEncoder(spec.transformer, spec.features, spec.latent, spec.chunk)

    @property
    def n_denoise_steps(self) -> int:
        return 1

    @property
    def dead_ends(self) -> list[str]:
        """The first decoder layer's values are one and the same for every query, whatever attends to them."""
        return [f"expert.blocks.0.attn.{leaf}" for leaf in ("hook_q", "hook_k", "hook_attn_scores")]

    def sample_actions(self, inputs: StepInputs, draws: Draws, run: Run) -> Float[Tensor, "batch chunk d_action"]:
        """Nothing is drawn."""
        image_tokens, grids = None, []
        if inputs.images is not None:
            n = len(inputs.cameras)
            features = self.vision(rearrange(inputs.images[:, -1], "b n c h w -> (b n) c h w"))
            image_tokens = rearrange(self.connector(features), "(b n) s d -> b (n s) d", n=n)
            grids = [tuple(features.shape[-2:])] * n
        positions = self.encoder.positions(grids)
        encoded = self.encoder(self.encoder.embed(image_tokens, inputs), positions)
        run.denoise_step = 0
        tokens = self.expert(encoded, positions)
        run.denoise_step = None
        return self.head(tokens)

    def segments(self, inputs: StepInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        batch, found = inputs.batch_size, dict[str, Segments]()
        singles = [(name, 1) for name in self.encoder.singles]
        images: list[tuple[str, int]] = []
        if inputs.images is not None:
            names = tuple(image_segment(camera) for camera in inputs.cameras)
            camera_of_row = torch.arange(len(names)).repeat(batch)
            found = self.vision.segments(names, camera_of_row, *inputs.images.shape[-2:])
            found["connector"] = found["vision"]
            images = [(name, found["vision"].labels.shape[1]) for name in names]
        return found | {
            "encoder": Segments.from_spans(singles + images, batch),
            "expert": Segments.from_spans([(ACTION, self.expert.chunk)], batch),
        }


NETWORK = ACT

# options that would change the computation, with the value under which they do not
_UNSUPPORTED = {"replace_final_stride_with_dilation": False, "n_obs_steps": 1, "temporal_ensemble_coeff": None}
_STAGES = ("layer1", "layer2", "layer3", "layer4")


def read_spec(base: ChunkTransformerSpec, checkpoint: Any) -> ChunkTransformerSpec:
    """`base` with the sizes of a LeRobot checkpoint (weights.Checkpoint).

    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    config = checkpoint.config
    for option, harmless in _UNSUPPORTED.items():
        if (config.get(option, harmless) or harmless) != harmless:
            raise ValueError(f"config.json sets {option}={config[option]!r}, which is not supported")
    features = read_step_features(config, base.features)
    chunk, d_model = checkpoint.shape("model.decoder_pos_embed.weight")
    n_heads = config.get("n_heads", base.transformer.n_heads)
    if d_model % n_heads:
        raise ValueError(f"width {d_model} does not divide into {n_heads} heads (n_heads in config.json)")
    act = config.get("feedforward_activation", base.transformer.act)
    if act not in ("relu", "gelu"):
        raise ValueError(f"config.json sets feedforward_activation={act!r}, which is not supported; known: relu, gelu")
    vision = base.vision
    if features.cameras:
        vision = resnet_from_shapes(base.vision, checkpoint, "model.backbone.", _STAGES, base.vision.norm)
    return replace(
        base,
        features=features,
        vision=vision,
        transformer=EncoderDecoderSpec(
            d_model=d_model,
            n_heads=n_heads,
            d_mlp=checkpoint.shape("model.decoder.layers.0.linear1.weight")[0],
            n_encoder_layers=layer_count(checkpoint, "model.encoder.layers."),
            n_decoder_layers=layer_count(checkpoint, "model.decoder.layers."),
            act=act,
            eps=base.transformer.eps,
            pre_norm=config.get("pre_norm", base.transformer.pre_norm),
        ),
        latent=LatentSpec(
            d_latent=checkpoint.shape("model.encoder_latent_input_proj.weight")[1],
            n_vae_layers=layer_count(checkpoint, "model.vae_encoder.layers."),
        ),
        chunk=chunk,
    )


def write_config(spec: ChunkTransformerSpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    sizes = spec.transformer
    return {
        "type": spec.config_type,
        **write_step_features(spec.features, spec.vision.image_size),
        "chunk_size": spec.chunk,
        "vision_backbone": resnet_name(spec.vision),
        "pretrained_backbone_weights": None,
        "replace_final_stride_with_dilation": False,
        "pre_norm": sizes.pre_norm,
        "dim_model": sizes.d_model,
        "n_heads": sizes.n_heads,
        "dim_feedforward": sizes.d_mlp,
        "feedforward_activation": sizes.act,
        "n_encoder_layers": sizes.n_encoder_layers,
        "n_decoder_layers": sizes.n_decoder_layers,
        "use_vae": spec.latent.n_vae_layers > 0,
        "latent_dim": spec.latent.d_latent,
        "n_vae_encoder_layers": spec.latent.n_vae_layers or 4,
        "temporal_ensemble_coeff": None,
    }
