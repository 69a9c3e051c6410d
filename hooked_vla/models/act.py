"""ACT. No language and no loop: image features, state and a latent go through a DETR-like encoder, and the decoder's
queries, which start as zeros, become a whole action chunk in one pass.

Wiring read from LeRobot 0.6.1, policies/act, and from tonyzhaozh/act. The latent is zero when acting: the VAE encoder
that draws it in training has no hook points. Positions go into queries and keys only.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.action_head import LinearHead
from hooked_vla.components.block import Block, PostNormBlock
from hooked_vla.components.connector import ConvConnector
from hooked_vla.components.embed import interleaved_sincos, sine_positions_2d
from hooked_vla.components.encoder_decoder import (
    DecoderBlock,
    PositionedCrossAttention,
    PositionedSelfAttention,
    PostNormDecoderBlock,
)
from hooked_vla.components.losses import check_targets, mean_of_draws, mean_of_steps
from hooked_vla.components.mlp import MLP, activation
from hooked_vla.components.norm import LayerNorm
from hooked_vla.components.resnet import ResNet
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import ACTION, ENVIRONMENT, LATENT, STATE, Draws, Segments, StepInputs, image_segment
from hooked_vla.lerobot import read_step_features, write_step_features
from hooked_vla.models.network import Network, pixels
from hooked_vla.models.sizes import layer_count, resnet_from_shapes, resnet_name
from hooked_vla.spec import ChunkTransformerSpec, EncoderDecoderSpec, FeatureSpec, LatentSpec

# of the VAE encoder's divergence in the training objective (LeRobot: ACTConfig.kl_weight)
KL_WEIGHT = 10.0


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
        self,
        image_tokens: Float[Tensor, "batch image_seq d_model"] | None,
        inputs: StepInputs,
        latent: Float[Tensor, "batch d_latent"] | None,
    ) -> Float[Tensor, "batch seq d_model"]:
        """The encoder's input: one token each for latent (None: 0), state and environment, then the images' in camera
        order."""
        dtype, device = self.latent_proj.weight.dtype, self.latent_proj.weight.device
        if latent is None:
            latent = torch.zeros(inputs.batch_size, self.d_latent, dtype=dtype, device=device)
        parts = [self.hook_embed_latent(self.latent_proj(self.hook_latent(latent.to(dtype)))[:, None])]
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
    """Demonstrated actions and state to the normal distribution that training draws the latent from."""

    pos_enc: Tensor

    def __init__(self, spec: EncoderDecoderSpec, features: FeatureSpec, latent: LatentSpec, chunk: int) -> None:
        super().__init__()
        self.pre_norm, self.act = spec.pre_norm, activation(spec.act)
        self.cls_embed = nn.Embedding(1, spec.d_model)
        self.state_proj = nn.Linear(features.d_state, spec.d_model) if features.d_state else None
        self.action_proj = nn.Linear(features.d_action, spec.d_model)
        # torch's layer has the public layout's parameters
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                spec.d_model, spec.n_heads, spec.d_mlp, dropout=0.0, layer_norm_eps=spec.eps, batch_first=True
            )
            for _ in range(latent.n_vae_layers)
        )
        self.norm = nn.LayerNorm(spec.d_model, spec.eps) if spec.pre_norm else nn.Identity()
        self.out_proj = nn.Linear(spec.d_model, 2 * latent.d_latent)
        n_tokens = 1 + bool(features.d_state) + chunk
        self.register_buffer("pos_enc", interleaved_sincos(n_tokens, spec.d_model)[None])

    def forward(
        self,
        actions: Float[Tensor, "batch chunk d_action"],
        state: Float[Tensor, "batch d_state"] | None,
        valid: Bool[Tensor, "batch chunk"] | None,
    ) -> tuple[Float[Tensor, "batch d_latent"], Float[Tensor, "batch d_latent"]]:
        """Mean and logarithm of the variance, in float32; steps that are not valid are not attended to."""
        dtype = self.out_proj.weight.dtype
        tokens = [repeat(self.cls_embed.weight, "1 d -> b 1 d", b=len(actions))]
        if self.state_proj is not None:
            assert state is not None
            tokens.append(self.state_proj(state.to(dtype))[:, None])
        n_before = len(tokens)
        x = torch.cat([*tokens, self.action_proj(actions.to(dtype))], dim=1)
        hidden = None if valid is None else functional.pad(~valid, (n_before, 0), value=False)
        for layer in self.layers:
            assert isinstance(layer, nn.TransformerEncoderLayer)
            x = self._layer(layer, x, hidden)
        mean, log_variance = self.out_proj(self.norm(x)[:, 0]).float().chunk(2, dim=-1)
        return mean, log_variance

    def _layer(self, layer: nn.TransformerEncoderLayer, x: Tensor, hidden: Tensor | None) -> Tensor:
        normed = layer.norm1(x) if self.pre_norm else x
        placed = normed + self.pos_enc
        x = x + layer.self_attn(placed, placed, normed, key_padding_mask=hidden, need_weights=False)[0]
        x = x if self.pre_norm else layer.norm1(x)
        mapped = layer.linear2(self.act(layer.linear1(layer.norm2(x) if self.pre_norm else x)))
        return x + mapped if self.pre_norm else layer.norm2(x + mapped)


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
        self.kl_weight = KL_WEIGHT
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
        encoded, positions = self.encode(inputs, None)
        run.denoise_step = 0
        tokens = self.expert(encoded, positions)
        run.denoise_step = None
        return self.head(tokens)

    def training_loss(
        self,
        inputs: StepInputs,
        actions: Float[Tensor, "batch chunk d_action"],
        valid: Bool[Tensor, "batch chunk"] | None,
        draws: Draws,
        run: Run,
        n_draws: int = 1,
    ) -> Float[Tensor, " batch"]:
        """As Network's: absolute error, and with a VAE encoder `kl_weight` times its divergence from the standard
        normal; drawn: [batch d_latent] for each draw. The latent is a token of the encoder, which sees every draw."""
        check_targets(actions, valid, (inputs.batch_size, self.expert.chunk, self.spec.features.d_action), n_draws)
        latent, divergence = None, None
        if self.spec.latent.n_vae_layers:
            state = None if inputs.state is None else inputs.state[:, -1]
            mean, log_variance = self.vae(actions, state, valid)
            # of each row's two distributions, in closed form (arXiv 1312.6114, appendix B)
            divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(-1)
            drawn = [draws.normal(mean.shape) for _ in range(n_draws)]
            latent = rearrange(mean + (log_variance / 2).exp() * torch.stack(drawn), "n b d -> (n b) d")
        else:
            n_draws = 1
        if n_draws > 1:
            features = self.vision_features(inputs) if self.spec.features.cameras else None
            inputs = replace(inputs, features=features, images=None).rows(list(range(inputs.batch_size)) * n_draws)
            actions = repeat(actions, "b c d -> (n b) c d", n=n_draws)
            valid = None if valid is None else repeat(valid, "b c -> (n b) c", n=n_draws)
        with self.inputs_replaced(lambda: inputs, run):
            errors = (self.head(self.expert(*self.encode(inputs, latent))) - actions).abs().mean(-1)
        losses = mean_of_draws(mean_of_steps(errors, valid), n_draws)
        return losses if divergence is None else losses + self.kl_weight * divergence

    def encode(
        self, inputs: StepInputs, latent: Float[Tensor, "batch d_latent"] | None
    ) -> tuple[Float[Tensor, "batch seq d_model"], Float[Tensor, "seq d_model"]]:
        """What the decoder reads, and its positions; the latent is 0 where it is None."""
        image_tokens, grids = None, []
        if self.spec.features.cameras:
            features = self.vision_features(inputs)[:, -1]
            n, rows, columns = features.shape[1:4]
            maps = rearrange(features, "b n h w d -> (b n) d h w").contiguous()
            image_tokens = rearrange(self.connector(maps), "(b n) s d -> b (n s) d", n=n)
            grids = [(rows, columns)] * n
        positions = self.encoder.positions(grids)
        return self.encoder(self.encoder.embed(image_tokens, inputs, latent), positions), positions

    def see(self, inputs: StepInputs) -> Float[Tensor, "batch 1 camera row column d_vision"]:
        """The last stage's map of each camera's last image."""
        maps = self.vision(rearrange(pixels(inputs)[:, -1], "b n c h w -> (b n) c h w"))
        return rearrange(maps, "(b n) d h w -> b 1 n h w d", n=len(inputs.cameras))

    @property
    def d_features(self) -> int:
        return self.vision.d_model

    def segments(self, inputs: StepInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        batch, found = inputs.batch_size, dict[str, Segments]()
        singles = [(name, 1) for name in self.encoder.singles]
        images: list[tuple[str, int]] = []
        if self.spec.features.cameras:
            names = tuple(image_segment(camera) for camera in inputs.cameras)
            camera_of_row = torch.arange(len(names)).repeat(batch)
            if inputs.features is None:
                found = self.vision.segments(names, camera_of_row, *pixels(inputs).shape[-2:])
            else:
                labels = repeat(camera_of_row, "i -> i s", s=math.prod(inputs.features.shape[-3:-1]))
                found["vision"] = Segments(names, labels, row_axis="image")
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
