"""GR00T N1.5 and N1.7. A causal vision-language model runs once; its output features pass an adapter, and a diffusion
transformer over state and noisy actions alternates between cross-attention to them and self-attention.

Wiring read from LeRobot 0.5.1 and 0.6.1, policies/groot. Rules that surprise: the adapter and (N1.5) the
cross-attention read the features of padding too; time runs from noise at 0 to actions at 1, and enters by two different
sinusoids.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components import mask as masks
from hooked_vla.components.action_head import ForwardFlowHead
from hooked_vla.components.attention import KeysValues, QKNormAttention, SelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.connector import LinearConnector
from hooked_vla.components.dit import ConditionedBlock, SourceAttention
from hooked_vla.components.domain import DomainLinear, DomainMLP
from hooked_vla.components.embed import GridPositions, cossin_bucket, sincos_bucket
from hooked_vla.components.mlp import MLP, GatedMLP
from hooked_vla.components.norm import AdaLayerNorm, LayerNorm, RMSNorm, UnitLayerNorm
from hooked_vla.components.patch_vit import DeepstackBlock, DeepstackConnector, PatchViT
from hooked_vla.components.rope import Rotation, multimodal_rotation, rotation
from hooked_vla.components.vit import AttentionPool, ViT
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import (
    ACTION,
    FUTURE,
    LANGUAGE,
    STATE,
    EmbodiedInputs,
    Segments,
    image_segment,
)
from hooked_vla.models.groot_config import read_spec, write_config
from hooked_vla.models.network import ExpertNetwork, pixels, share_parameters
from hooked_vla.spec import AdapterSpec, DecoderSpec, DiTSpec, EmbodimentFlowSpec, FeatureVLASpec, VisionSpec

# width of the time's sinusoid before its MLP; diffusers: Timesteps(num_channels=256)
D_SINUSOID = 256


class PixelTower(ViT):
    """SigLIP at the image size of its positions; `pool` holds the unused pooling head where a checkpoint has one."""

    def __init__(self, spec: VisionSpec, pool: bool) -> None:
        super().__init__(spec)
        self.pos_embed = GridPositions(spec.image_size // spec.patch_size, spec.d_model)
        self.pool = AttentionPool(spec) if pool else None

    def forward(
        self, images: Float[Tensor, "image 3 height width"], grid: tuple[int, int]
    ) -> tuple[Float[Tensor, "image seq d_model"], list[Tensor]]:
        return super().forward(images), []


class LanguageModel(nn.Module):
    """Token embeddings with image tokens in their places, and a causal decoder over them."""

    def __init__(self, spec: FeatureVLASpec, n_taps: int) -> None:
        super().__init__()
        vlm = spec.vlm
        assert vlm.d_vocab is not None
        self.d_model, self.d_head, self.rope_base = vlm.d_model, vlm.d_head, vlm.rope_base
        self.image_token, self.final_norm, self.rope_sections = spec.image_token, spec.final_norm, spec.rope_sections
        self.additive_mask = masks.additive if spec.padding_attends_evenly else masks.additive_or_blind
        # the last block's output is the feature: what would be added to it afterwards is not read
        self.n_deepstack = min(n_taps, vlm.n_layers - 1)
        self.embed = nn.Embedding(vlm.d_vocab, vlm.d_model)
        self.blocks = nn.ModuleList(
            _decoder_block(vlm, DeepstackBlock if i < self.n_deepstack else Block) for i in range(vlm.n_layers)
        )
        self.ln_final = RMSNorm(vlm.d_model, vlm.eps)
        # unused by the policy; the logit lens reads it
        self.unembed = nn.Linear(vlm.d_model, vlm.d_vocab, bias=False)
        self.hook_embed = HookPoint("batch seq d_model")
        self.hook_tokens = HookPoint("batch seq d_model")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return rearrange(self.unembed.weight, "v m -> m v")

    def is_image(self, inputs: EmbodiedInputs) -> Bool[Tensor, "batch seq"]:
        return inputs.tokens == self.image_token

    def rotation(self, inputs: EmbodiedInputs, image_grid: tuple[int, int]) -> Rotation:
        """Positions counted from the first token, padding included; or, with sections, in time, rows and columns."""
        if not self.rope_sections:
            positions = torch.arange(inputs.tokens.shape[1], device=inputs.tokens.device)
            return rotation(repeat(positions, "s -> b s", b=inputs.batch_size), self.d_head, self.rope_base)
        positions = grid_positions(self.is_image(inputs), inputs.token_mask, image_grid)
        return multimodal_rotation(positions, self.d_head, self.rope_base, self.rope_sections)

    def forward(
        self,
        inputs: EmbodiedInputs,
        image_grid: tuple[int, int],
        image_tokens: Float[Tensor, "batch token d_model"],
        deepstack: list[Float[Tensor, "batch token d_model"]],
    ) -> Float[Tensor, "batch seq d_model"]:
        """The features that the expert is to read. image_grid: rows and columns of tokens of every image."""
        is_image = self.is_image(inputs)
        embedded = self.hook_embed(self.embed(inputs.tokens))
        x = self.hook_tokens(place(image_tokens, is_image, embedded))
        by = self.rotation(inputs, image_grid)
        mask = self.additive_mask(masks.causal(inputs.token_mask), x.dtype)
        nowhere = torch.zeros_like(x)
        for i, block in enumerate(self.blocks):
            added = [place(deepstack[i], is_image, nowhere)] if i < self.n_deepstack else []
            x = block(x, by, mask, *added)
        normed = self.ln_final(x)
        return normed if self.final_norm else x


def _decoder_block(spec: DecoderSpec, kind: type[Block]) -> Block:
    return kind(
        spec.d_model,
        ln1=RMSNorm(spec.d_model, spec.eps),
        attn=QKNormAttention(spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head, spec.eps),
        ln2=RMSNorm(spec.d_model, spec.eps),
        mlp=GatedMLP(spec.d_model, spec.d_mlp, spec.act),
    )


def place(
    tokens: Float[Tensor, "batch token d_model"],
    where: Bool[Tensor, "batch seq"],
    elsewhere: Float[Tensor, "batch seq d_model"],
) -> Float[Tensor, "batch seq d_model"]:
    """The tokens, in order, at the true positions of `where`."""
    index = (where.long().cumsum(1) - 1).clamp(min=0)
    placed = tokens.gather(1, repeat(index, "b s -> b s d", d=tokens.shape[-1]))
    return torch.where(where[..., None], placed, elsewhere)


def grid_positions(
    is_image: Bool[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"], grid: tuple[int, int]
) -> Int[Tensor, "3 batch seq"]:
    """Position of every token in time, rows and columns; 0 for padding (transformers: Qwen3-VL's get_rope_index).

    Text counts by one in all three. An image's tokens share its time and count rows and columns from there; what
    follows goes on after the longer side of its grid.
    """
    rows, columns = grid
    text, image = (valid & ~is_image).long(), (valid & is_image).long()
    seen = image.cumsum(1) - image
    start = text.cumsum(1) - text + seen // (rows * columns) * max(rows, columns)
    within = seen % (rows * columns) * image
    positions = torch.stack([start, start + within // columns, start + within % columns])
    return positions * valid


class Adapter(nn.Module):
    """A norm and self-attention among all features, padding included."""

    def __init__(self, d_model: int, spec: AdapterSpec) -> None:
        super().__init__()
        self.d_model = d_model
        self.ln_pre = LayerNorm(d_model, spec.eps)
        if spec.n_layers:
            self.blocks = nn.ModuleList(
                Block(
                    d_model,
                    ln1=LayerNorm(d_model, spec.eps),
                    attn=SelfAttention(d_model, spec.n_heads, spec.n_heads, spec.d_head, bias=True),
                    ln2=LayerNorm(d_model, spec.eps),
                    mlp=MLP(d_model, spec.d_mlp, spec.act),
                )
                for _ in range(spec.n_layers)
            )
        self.hook_tokens = HookPoint("batch seq d_model")

    def forward(self, features: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch seq d_model"]:
        x = self.hook_tokens(self.ln_pre(features))
        for block in getattr(self, "blocks", ()):
            x = block(x)
        return x


@dataclass(frozen=True)
class Reads:
    """What the expert reads at every denoise step: its own fixed tokens, and the prefix by layer and kind of mask."""

    state: Float[Tensor, "batch 1 d_model"]
    future: Float[Tensor, "batch n_future d_model"] | None
    embodiment: Int[Tensor, " batch"]
    layers: list[KeysValues | None]
    masks: dict[str, Tensor | None]

    def repeat(self, n: int) -> "Reads":
        """The same for n batches in a row."""

        def rows(value: Tensor) -> Tensor:
            return repeat(value, "b ... -> (n b) ...", n=n)

        return Reads(
            state=rows(self.state),
            future=None if self.future is None else rows(self.future),
            embodiment=rows(self.embodiment),
            layers=[None if kv is None else KeysValues(rows(kv.k), rows(kv.v)) for kv in self.layers],
            masks={kind: None if mask is None else rows(mask) for kind, mask in self.masks.items()},
        )


class ActionExpert(nn.Module):
    """Velocity of a noisy action chunk."""

    def __init__(self, spec: DiTSpec, flow: EmbodimentFlowSpec, d_source: int, source: str) -> None:
        super().__init__()
        self.schedule, self.flow = spec.schedule, flow
        self.d_model, self.d_out, self.d_action, self.chunk = spec.d_model, spec.d_out, flow.d_action, flow.chunk
        n = flow.n_embodiments
        self.state_encoder = DomainMLP(n, flow.d_state * flow.n_state_steps, flow.d_hidden, spec.d_model)
        self.action_in_proj = DomainLinear(n, flow.d_action, spec.d_model)
        self.action_time_in = DomainLinear(n, 2 * spec.d_model, spec.d_model)
        self.action_time_out = DomainLinear(n, spec.d_model, spec.d_model)
        self.pos_embed = nn.Embedding(flow.n_positions, spec.d_model) if flow.n_positions else None
        self.future = nn.Embedding(flow.n_future, spec.d_model) if flow.n_future else None
        self.time_mlp_in = nn.Linear(D_SINUSOID, spec.d_model)
        self.time_mlp_out = nn.Linear(spec.d_model, spec.d_model)
        self.blocks = nn.ModuleList(_dit_block(spec, kind, d_source, source) for kind in spec.schedule)
        self.ln_final = AdaLayerNorm(spec.d_model, spec.d_model, spec.eps_final, shift_first=True)
        self.out_proj = nn.Linear(spec.d_model, spec.d_out)
        self.action_decoder = DomainMLP(n, spec.d_out, flow.d_hidden, flow.d_action)
        self.hook_noisy_actions = HookPoint("batch chunk d_action", dtype="float32", reused=True)
        self.hook_time = HookPoint("batch d_model")
        self.hook_embed_state = HookPoint("batch seq d_model", stream="expert.state", per_chunk=True)
        if self.future is not None:
            self.hook_embed_future = HookPoint("batch seq d_model", stream="expert.future", per_chunk=True)
        self.hook_embed_action = HookPoint("batch seq d_model", stream="expert.action")
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_out = HookPoint("batch seq d_out")
        self.hook_velocity = HookPoint("batch chunk d_action", dtype="float32")

    def reads(
        self,
        features: Float[Tensor, "batch prefix d_source"],
        inputs: EmbodiedInputs,
        is_image: Bool[Tensor, "batch prefix"],
    ) -> Reads:
        """Everything that does not depend on the denoise step."""
        seen = {"cross:image": is_image & inputs.token_mask, "cross:text": ~is_image & inputs.token_mask}
        attentions = [getattr(block, "cross_attn", None) for block in self.blocks]
        state = inputs.state.to(features.dtype)[:, None]
        return Reads(
            state=self.state_encoder(state, inputs.embodiment),
            future=None if self.future is None else repeat(self.future.weight, "s d -> b s d", b=len(state)),
            embodiment=inputs.embodiment,
            layers=[None if attention is None else attention.project(features) for attention in attentions],
            masks={kind: masks.additive_or_blind(keys[:, None], features.dtype) for kind, keys in seen.items()}
            | {"cross": None},
        )

    def embed_time(self, bucket: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """What every adaptive norm is conditioned on."""
        sinusoid = cossin_bucket(bucket, D_SINUSOID).to(self.time_mlp_in.weight.dtype)
        return self.hook_time(self.time_mlp_out(functional.silu(self.time_mlp_in(sinusoid))))

    def embed_actions(
        self, noisy: Float[Tensor, "batch chunk d_action"], bucket: Int[Tensor, " batch"], domain: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch chunk d_model"]:
        """One token per action step: action and time through the embodiment's layers, then the step's position."""
        actions = self.action_in_proj(noisy.to(self.action_in_proj.W.dtype), domain)
        time = repeat(sincos_bucket(bucket, self.d_model).to(actions.dtype), "b d -> b c d", c=self.chunk)
        hidden = functional.silu(self.action_time_in(torch.cat([actions, time], dim=-1), domain))
        tokens = self.action_time_out(hidden, domain)
        if self.pos_embed is not None:
            tokens = tokens + self.pos_embed.weight[: self.chunk]
        return self.hook_embed_action(tokens)

    def forward(
        self, noisy: Float[Tensor, "batch chunk d_action"], bucket: Int[Tensor, " batch"], reads: Reads
    ) -> tuple[Float[Tensor, "batch chunk d_action"], Float[Tensor, "batch chunk d_action"]]:
        """The noisy actions as hooks left them, and the velocity there."""
        noisy = self.hook_noisy_actions(noisy)
        tokens = [self.hook_embed_state(reads.state)]
        if reads.future is not None:
            tokens.append(self.hook_embed_future(reads.future))
        tokens.append(self.embed_actions(noisy, bucket, reads.embodiment))
        time = self.embed_time(bucket)
        x = self.hook_tokens(torch.cat(tokens, dim=1))
        for block, kind, kv in zip(self.blocks, self.schedule, reads.layers, strict=True):
            x = block(x, time) if kv is None else block(x, time, kv, reads.masks[kind])
        out = self.hook_out(self.out_proj(self.ln_final(x, time)))
        velocity = self.action_decoder(out[:, -self.chunk :], reads.embodiment)
        return noisy, self.hook_velocity(velocity.float())


def _dit_block(spec: DiTSpec, kind: str, d_source: int, source: str) -> ConditionedBlock:
    own = kind == "self"
    return ConditionedBlock(
        spec.d_model,
        ln1=AdaLayerNorm(spec.d_model, spec.d_model, spec.eps_ada, shift_first=False),
        attn=SelfAttention(spec.d_model, spec.n_heads, spec.n_heads, spec.d_head, bias=True) if own
        else SourceAttention(spec.d_model, spec.n_heads, spec.d_head, d_source, bias=True, source=source),
        ln2=UnitLayerNorm(spec.d_model, spec.eps),
        mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
        attn_name="attn" if own else "cross_attn",
    )  # fmt: skip


class GR00T(ExpertNetwork):
    """The whole network: images, tokens, state, embodiment and noise to a normalised chunk at its padded width."""

    def __init__(self, spec: FeatureVLASpec) -> None:
        super().__init__()
        self.spec = spec
        d_vlm = spec.vlm.d_model
        if isinstance(spec.vision, VisionSpec):
            self.vision = PixelTower(spec.vision, spec.vision_pool)
            self.connector = LinearConnector(spec.vision.d_model, d_vlm, bias=True)
            self.merge, self.n_taps = 1, 0
        else:
            self.vision = PatchViT(spec.vision)
            self.merge, self.n_taps = spec.vision.merge, len(spec.vision.taps)
            self.connector = DeepstackConnector(
                spec.vision.d_model, d_vlm, spec.vision.merge, spec.vision.eps, self.n_taps
            )
        self.vlm = LanguageModel(spec, self.n_taps)
        self.source = "vlm" if spec.adapter is None else "adapter"
        if spec.adapter is not None:
            self.adapter = Adapter(d_vlm, spec.adapter)
        self.expert = ActionExpert(spec.expert, spec.flow, d_vlm, self.source)
        flow = spec.flow
        self.head = ForwardFlowHead(flow.n_steps, flow.n_buckets, flow.chunk, flow.d_action, flow.train_times)
        share_parameters(self, spec.tied)

    @property
    def dead_ends(self) -> list[str]:
        """Every feature is read, padding's too: only what comes after the features is not."""
        unread = [] if self.vlm.final_norm else ["vlm.ln_final.*"]
        return unread + [f"connector.deepstack.{i}.*" for i in range(self.vlm.n_deepstack, self.n_taps)]

    @property
    def d_features(self) -> int:
        return self.vision.d_model * (1 + self.n_taps)

    def see(self, inputs: EmbodiedInputs) -> Float[Tensor, "batch camera patch d_vision"]:
        """The tower's last features of each patch, then those at its taps, channel by channel."""
        last, tapped = self.vision(rearrange(pixels(inputs), "b n ... -> (b n) ..."), inputs.grid)
        return rearrange(torch.cat([last, *tapped], dim=-1), "(b n) s d -> b n s d", b=inputs.batch_size)

    def prefill(self, inputs: EmbodiedInputs) -> Reads:
        """Everything that does not depend on the denoise step."""
        seen = rearrange(self.vision_features(inputs), "b n s (t d) -> t (b n) s d", t=1 + self.n_taps)
        mergers = [self.connector, *getattr(self.connector, "deepstack", ())]
        tokens = [merger(each.contiguous()) for merger, each in zip(mergers, seen, strict=True)]
        image_tokens, *deepstack = (rearrange(each, "(b n) s d -> b (n s) d", b=inputs.batch_size) for each in tokens)
        features = self.vlm(inputs, self.image_grid(inputs), image_tokens, deepstack)
        if self.source == "adapter":
            features = self.adapter(features)
        return self.expert.reads(features, inputs, self.vlm.is_image(inputs))

    def image_grid(self, inputs: EmbodiedInputs) -> tuple[int, int]:
        """Rows and columns of language-model tokens of every image."""
        return inputs.grid[0] // self.merge, inputs.grid[1] // self.merge

    def segments(self, inputs: EmbodiedInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        names = tuple(image_segment(camera) for camera in inputs.cameras)
        n_patches, n_tokens = math.prod(inputs.grid), math.prod(self.image_grid(inputs))
        camera_of_row = torch.arange(len(names)).repeat(inputs.batch_size)[:, None]
        prefix = _prefix_segments(inputs, self.vlm.is_image(inputs), names, n_tokens)
        flow, batch = self.spec.flow, inputs.batch_size
        spans = [(STATE, 1), (FUTURE, flow.n_future), (ACTION, flow.chunk)]
        return {
            "vision": Segments(names, camera_of_row.expand(-1, n_patches), row_axis="image"),
            "connector": Segments(names, camera_of_row.expand(-1, n_tokens), row_axis="image"),
            "vlm": prefix,
            "adapter": prefix,
            "expert": Segments.from_spans([span for span in spans if span[1]], batch),
            **{f"expert.{name}": Segments.from_spans([(name, length)], batch) for name, length in spans if length},
        }


def _prefix_segments(
    inputs: EmbodiedInputs, is_image: Bool[Tensor, "batch seq"], names: tuple[str, ...], n_tokens: int
) -> Segments:
    camera = (is_image.long().cumsum(1) - 1) // n_tokens
    labels = torch.where(is_image, camera, len(names))
    labels = labels.masked_fill(~inputs.token_mask, len(names) + 1)
    return Segments((*names, LANGUAGE, "pad"), labels)


NETWORK = GR00T
__all__ = ["NETWORK", "read_spec", "write_config"]
