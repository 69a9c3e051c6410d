"""VQ-BeT. A causal transformer reads [image, state, action query] of every observation step, then queries for chunks to
come; each query draws the codes of an action chunk, and the present step's chunk is executed.

Wiring read from LeRobot 0.6.1, policies/vqbet. Surprises: the transformer's token embedding is a linear map, its output
no vocabulary; codes are drawn for every query though one is used; the quantiser's encoder is never run when acting.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.components import mask as masks
from hooked_vla.components.attention import SelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.code_head import CodeHead
from hooked_vla.components.keypoints import FeatureConnector, KeypointResNet, encoder_segments, image_size
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import ACTION, STATE, Draws, Segments, StepInputs, image_segment
from hooked_vla.lerobot import OBS_STATE, read_step_features, write_step_features
from hooked_vla.models.diffusion import read_keypoints, write_encoder_config
from hooked_vla.models.network import Network, pixels
from hooked_vla.models.sizes import layer_count, resnet_from_shapes
from hooked_vla.spec import CausalSpec, CodePolicySpec, CodeSpec

logger = logging.getLogger(__name__)


class CausalSelfAttention(SelfAttention):
    """Every token sees itself and those before it, as the checkpoint's mask says: 1 where it may see, 0 elsewhere."""

    mask: Tensor

    def __init__(self, d_model: int, n_heads: int, n_positions: int) -> None:
        super().__init__(d_model, n_heads, n_heads, d_model // n_heads, bias=True)
        self.register_buffer("mask", torch.ones(1, 1, n_positions, n_positions).tril())

    def forward(self, x: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        seq = x.shape[1]
        visible = self.mask[:, 0, :seq, :seq] != 0
        additive = masks.additive(visible, x.dtype).expand(len(x), -1, -1, -1)
        return self.attend(self.queries(x), *self.keys_values(x), mask=additive)


def _block(spec: CausalSpec) -> Block:
    return Block(
        spec.d_model,
        ln1=LayerNorm(spec.d_model, spec.eps),
        attn=CausalSelfAttention(spec.d_model, spec.n_heads, spec.n_positions),
        ln2=LayerNorm(spec.d_model, spec.eps),
        mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
    )


class QueryTransformer(nn.Module):
    """Observation tokens and action queries in, one vector a query out."""

    def __init__(self, spec: CausalSpec, d_image: int, d_state: int, n_obs_steps: int, n_ahead: int) -> None:
        super().__init__()
        self.d_in, self.d_model, self.d_out = spec.d_in, spec.d_model, spec.d_out
        self.n_obs_steps, self.n_ahead = n_obs_steps, n_ahead
        self.image_proj = nn.Linear(d_image, spec.d_in)
        self.state_proj = nn.Linear(d_state, spec.d_in)
        self.action_query = nn.Parameter(torch.randn(1, 1, spec.d_in))
        self.embed = nn.Linear(spec.d_in, spec.d_model)
        self.pos_embed = nn.Embedding(spec.n_positions, spec.d_model)
        self.blocks = nn.ModuleList(_block(spec) for _ in range(spec.n_layers))
        self.ln_final = LayerNorm(spec.d_model, spec.eps)
        self.out_proj = nn.Linear(spec.d_model, spec.d_out, bias=False)
        self.hook_embed_image = HookPoint("batch seq d_in", stream="expert.image")
        self.hook_embed_state = HookPoint("batch seq d_in", stream="expert.state")
        # one parameter stands for every query: hooks may not change it in place
        self.hook_embed_action = HookPoint("batch seq d_in", stream="head", reused=True)
        self.hook_embed = HookPoint("batch seq d_in")
        self.hook_pos_embed = HookPoint("seq d_model", reused=True)
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_out = HookPoint("batch seq d_out")

    @property
    def n_queries(self) -> int:
        return self.n_obs_steps + self.n_ahead

    def spans(self, camera: str) -> list[tuple[str, int]]:
        """Segments of the tokens in order."""
        step = [(image_segment(camera), 1), (STATE, 1), (ACTION, 1)]
        return step * self.n_obs_steps + [(ACTION, 1)] * self.n_ahead

    def forward(
        self, images: Float[Tensor, "batch step d_image"], state: Float[Tensor, "batch step d_state"]
    ) -> Float[Tensor, "batch seq d_out"]:
        """Outputs at all tokens."""
        dtype, n = self.embed.weight.dtype, self.n_obs_steps
        image_tokens = self.hook_embed_image(self.image_proj(images.to(dtype)))
        state_tokens = self.hook_embed_state(self.state_proj(state.to(dtype)))
        queries = self.hook_embed_action(self.action_query.expand(len(state), self.n_queries, -1))
        steps = torch.stack([image_tokens, state_tokens, queries[:, :n]], dim=2)
        tokens = self.hook_embed(torch.cat([rearrange(steps, "b n t d -> b (n t) d"), queries[:, n:]], dim=1))
        x = self.hook_tokens(self.embed(tokens) + self.hook_pos_embed(self.pos_embed.weight[: tokens.shape[1]]))
        for block in self.blocks:
            x = block(x)
        return self.hook_out(self.out_proj(self.ln_final(x)))

    def at_queries(self, outputs: Float[Tensor, "batch seq d_out"]) -> Float[Tensor, "batch query d_out"]:
        """Outputs at each step's query, the third token of its step, then at the queries ahead."""
        per_step = 3
        end = per_step * self.n_obs_steps
        return torch.cat([outputs[:, per_step - 1 : end : per_step], outputs[:, end:]], dim=1)


class QuantiserEncoder(nn.Module):
    """Parameters of what turned demonstrated chunks into codes in training; never run here."""

    def __init__(self, d_chunk: int, d_hidden: int, d_code: int, n_queries: int, chunk: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(d_chunk, d_hidden), nn.Linear(d_hidden, d_hidden), nn.Linear(d_hidden, d_code)]
        )
        self.register_buffer("discretized", torch.tensor(True))
        self.register_buffer("freeze_codebook", torch.tensor(True))
        targets = torch.arange(n_queries)[:, None] + torch.arange(chunk)
        self.register_buffer("target_indices", targets)


class VQBeT(Network):
    """The whole network: images and states to the present step's normalised action chunk."""

    def __init__(self, spec: CodePolicySpec) -> None:
        super().__init__()
        self.spec, features, codes = spec, spec.features, spec.codes
        d_image = 2 * spec.keypoints.n_keypoints
        self.vision = KeypointResNet(spec.vision, spec.keypoints, "vision")
        self.connector = FeatureConnector(d_image, "connector")
        self.expert = QueryTransformer(spec.expert, d_image, features.d_state, features.n_obs_steps, codes.n_ahead)
        self.head = CodeHead(codes, spec.expert.d_out, features.n_obs_steps - 1, features.d_action)
        d_chunk = codes.chunk * features.d_action
        self.quantiser = QuantiserEncoder(d_chunk, codes.d_hidden, codes.d_code, self.expert.n_queries, codes.chunk)

    @property
    def n_denoise_steps(self) -> int:
        return 1

    @property
    def dead_ends(self) -> list[str]:
        return []

    def sample_actions(self, inputs: StepInputs, draws: Draws, run: Run) -> Float[Tensor, "batch chunk d_action"]:
        """One draw of codes for all queries and codebooks, or one a codebook where codes are predicted in sequence."""
        assert inputs.state is not None
        features = self.connector(rearrange(self.vision_features(inputs), "b s n d -> (b s n) d"))
        images = rearrange(features, "(b s) d -> b s d", b=inputs.batch_size)
        run.denoise_step = 0
        outputs = self.expert(images, inputs.state)
        run.denoise_step = None
        return self.head(self.expert.at_queries(outputs), draws)

    def see(self, inputs: StepInputs) -> Float[Tensor, "batch step 1 d_keypoints"]:
        """The keypoints of every image: there are no places beside them."""
        keypoints = self.vision(rearrange(pixels(inputs), "b s n c h w -> (b s n) c h w"))
        return rearrange(keypoints, "(b s n) d -> b s n d", b=inputs.batch_size, n=1)

    @property
    def d_features(self) -> int:
        return 2 * self.spec.keypoints.n_keypoints

    def segments(self, inputs: StepInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        batch, n = inputs.batch_size, self.expert.n_obs_steps
        (camera,) = inputs.cameras
        name, size = image_segment(camera), image_size(self.spec.vision, self.spec.keypoints)
        return encoder_segments(self.vision, (name,), batch * n, *size) | {
            "expert": Segments.from_spans(self.expert.spans(camera), batch),
            "expert.image": Segments.from_spans([(name, n)], batch),
            "expert.state": Segments.from_spans([(STATE, n)], batch),
            "head": Segments.from_spans([(ACTION, self.expert.n_queries)], batch),
        }


NETWORK = VQBeT

_GPT = "vqbet.policy.transformer."
_QUANTISER = "vqbet.action_head.vqvae_model."


def read_spec(base: CodePolicySpec, checkpoint: Any) -> CodePolicySpec:
    """`base` with the sizes and options of a LeRobot checkpoint (weights.Checkpoint).

    Raises ValueError for options that are not supported and for sizes that do not fit together.
    """
    config, shape = checkpoint.config, checkpoint.shape
    features = read_step_features(config, base.features)
    inputs = sorted(config["input_features"])
    if len(features.cameras) != 1 or OBS_STATE not in inputs or len(inputs) != 2:
        raise ValueError(f"config.json must have one VISUAL input and {OBS_STATE!r}, nothing else; it has {inputs}")
    prefix = "vqbet.rgb_encoder."
    norm = "batch" if f"{prefix}backbone.1.running_mean" in checkpoint.tensors else "group"
    codes = _read_codes(base.codes, checkpoint)
    expert = _read_transformer(base.expert, checkpoint)
    n_tokens = 3 * features.n_obs_steps + codes.n_ahead
    if n_tokens > expert.n_positions:
        raise ValueError(f"{n_tokens} tokens, but the transformer has {expert.n_positions} positions")
    n_queries = features.n_obs_steps + codes.n_ahead
    trained = shape("vqbet.select_target_actions_indices")
    if trained != (n_queries, codes.chunk):
        expected = (n_queries, codes.chunk)
        raise ValueError(f"the checkpoint was trained for {trained} (queries, chunk), but config.json says {expected}")
    if not bool(checkpoint.read(f"{_QUANTISER}discretized")):
        logger.warning("the checkpoint's quantiser was never trained (discretized is False): its codes mean nothing")
    return replace(
        base,
        features=replace(features, n_action_steps=codes.chunk),
        vision=resnet_from_shapes(base.vision, checkpoint, f"{prefix}backbone.", ("4", "5", "6", "7"), norm),
        keypoints=read_keypoints(checkpoint, prefix),
        expert=expert,
        codes=codes,
    )


def _read_codes(base: CodeSpec, checkpoint: Any) -> CodeSpec:
    config, shape = checkpoint.config, checkpoint.shape
    _, n_codes, d_code = shape(f"{_QUANTISER}vq_layer.layers.0._codebook.embed")
    n_pred = config.get("n_action_pred_token", base.n_ahead + 1)
    if n_pred < 1:
        raise ValueError(f"config.json sets n_action_pred_token={n_pred}: at least the present chunk must be predicted")
    return CodeSpec(
        n_codebooks=layer_count(checkpoint, f"{_QUANTISER}vq_layer.layers."),
        n_codes=n_codes,
        d_code=d_code,
        d_hidden=shape(f"{_QUANTISER}decoder.0.weight")[0],
        sequential=config.get("sequentially_select", base.sequential),
        temperature=config.get("bet_softmax_temperature", base.temperature),
        chunk=config.get("action_chunk_size", base.chunk),
        n_ahead=n_pred - 1,
    )


def _read_transformer(base: CausalSpec, checkpoint: Any) -> CausalSpec:
    shape = checkpoint.shape
    d_model, d_in = shape(f"{_GPT}wte.weight")
    n_heads = checkpoint.config.get("gpt_n_head", base.n_heads)
    if d_model % n_heads:
        raise ValueError(f"width {d_model} does not divide into {n_heads} heads (gpt_n_head in config.json)")
    return replace(
        base,
        d_in=d_in,
        d_model=d_model,
        d_out=shape("vqbet.policy.lm_head.weight")[0],
        n_layers=layer_count(checkpoint, f"{_GPT}h."),
        n_heads=n_heads,
        d_mlp=shape(f"{_GPT}h.0.mlp.0.weight")[0],
        n_positions=shape(f"{_GPT}wpe.weight")[0],
    )


def write_config(spec: CodePolicySpec) -> dict[str, Any]:
    """A LeRobot config.json for a network that no checkpoint was read for."""
    features = write_step_features(spec.features, spec.vision.image_size)
    del features["n_action_steps"]
    return {
        "type": spec.config_type,
        **features,
        **write_encoder_config(spec.vision, spec.keypoints),
        "n_action_pred_token": spec.codes.n_ahead + 1,
        "action_chunk_size": spec.codes.chunk,
        "vqvae_n_embed": spec.codes.n_codes,
        "vqvae_embedding_dim": spec.codes.d_code,
        "vqvae_enc_hidden_dim": spec.codes.d_hidden,
        "gpt_block_size": spec.expert.n_positions,
        "gpt_input_dim": spec.expert.d_in,
        "gpt_output_dim": spec.expert.d_out,
        "gpt_n_layer": spec.expert.n_layers,
        "gpt_n_head": spec.expert.n_heads,
        "gpt_hidden_dim": spec.expert.d_model,
        "bet_softmax_temperature": spec.codes.temperature,
        "sequentially_select": spec.codes.sequential,
    }
