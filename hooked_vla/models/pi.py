"""π0 and π0.5. The prefix (images, language) runs once and only its keys and values reach the action expert, which in
every layer attends to prefix and own tokens in one softmax, each stream with weights of its own.

Wiring read from LeRobot 0.6.1, policies/pi0 and pi05, which agrees with openpi. π0 tells the expert the state as its
first token and the time inside every action token; π0.5 tells the state in the prompt and the time through the
expert's norms. Image tokens enter the prefix as `connector.hook_out` has them; language embeddings are scaled.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components import mask as masks
from hooked_vla.components.action_head import FlowMatchingHead
from hooked_vla.components.attention import KeysValues, RotarySelfAttention
from hooked_vla.components.block import Block, GatedBlock
from hooked_vla.components.connector import LinearConnector
from hooked_vla.components.embed import GridPositions, sincos_time
from hooked_vla.components.joint import JointAttention, PrefixLayer
from hooked_vla.components.mlp import GatedMLP
from hooked_vla.components.norm import AdaRMSNorm, OneCentredRMSNorm
from hooked_vla.components.rope import Rotation, rotation
from hooked_vla.components.vit import ViT
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import ACTION, LANGUAGE, STATE, Segments, VLAInputs, image_segment
from hooked_vla.models.network import ExpertNetwork, Network, count_patches, expand_ties, share_parameters
from hooked_vla.models.pi_config import read_spec, write_config
from hooked_vla.spec import DecoderSpec, JointFlowVLASpec, PrefixVLASpec, VisionSpec

__all__ = ["NETWORK", "read_spec", "write_config"]


def decoder_block(spec: DecoderSpec, attn: nn.Module) -> Block:
    """A block with one-centred norms and a gated MLP around any attention."""
    return Block(
        spec.d_model,
        ln1=OneCentredRMSNorm(spec.d_model, spec.eps),
        attn=attn,
        ln2=OneCentredRMSNorm(spec.d_model, spec.eps),
        mlp=GatedMLP(spec.d_model, spec.d_mlp, spec.act),
    )


class PixelTower(ViT):
    """SigLIP at the image size of its positions."""

    def __init__(self, spec: VisionSpec) -> None:
        super().__init__(spec)
        self.pos_embed = GridPositions(spec.image_size // spec.patch_size, spec.d_model)


class PrefixModel(nn.Module):
    """The decoder over the prefix, whose tokens all see each other."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__()
        assert spec.d_vocab is not None
        self.d_model, self.d_vocab = spec.d_model, spec.d_vocab
        self.d_head, self.rope_base = spec.d_head, spec.rope_base
        self.embed = nn.Embedding(spec.d_vocab, spec.d_model)
        # of variance 1 when they are scaled: otherwise they drown what random blocks write
        nn.init.normal_(self.embed.weight, std=spec.d_model**-0.5)
        heads = (spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head)
        self.blocks = nn.ModuleList(
            decoder_block(spec, RotarySelfAttention(*heads, bias=False)) for _ in range(spec.n_layers)
        )
        self.ln_final = OneCentredRMSNorm(spec.d_model, spec.eps)
        self.unembed = nn.Linear(spec.d_model, spec.d_vocab, bias=False)
        self.hook_embed_language = HookPoint("batch seq d_model", stream="vlm.language")
        self.hook_tokens = HookPoint("batch seq d_model")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return rearrange(self.unembed.weight, "v m -> m v")

    def embed_tokens(self, tokens: Int[Tensor, "batch seq"]) -> Float[Tensor, "batch seq d_model"]:
        """Token embeddings times sqrt(d_model), the factor rounded to the stream's dtype."""
        scale = torch.tensor(math.sqrt(self.d_model), dtype=self.embed.weight.dtype, device=tokens.device)
        return self.embed(tokens) * scale

    def forward(
        self,
        image_tokens: Float[Tensor, "batch image_token d_model"],
        tokens: Int[Tensor, "batch text"],
        valid: Bool[Tensor, "batch seq"],
    ) -> tuple[Float[Tensor, "batch seq d_model"], list[KeysValues]]:
        """Final hidden states, and each layer's keys and values; images come first."""
        language = self.hook_embed_language(self.embed_tokens(tokens))
        x = self.hook_tokens(torch.cat([image_tokens.to(language.dtype), language], dim=1))
        by = rotation(masks.positions(valid), self.d_head, self.rope_base)
        mask = masks.additive(masks.block_mask(valid, torch.zeros_like(valid[0])), x.dtype)
        caches = []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, kv = block.with_keys_values(x, by, mask)
            caches.append(kv)
        return self.ln_final(x), caches


class PrefixNetwork(Network):
    """Images to tokens, and the prefix model over them: what π0, π0.5 and π0-FAST share."""

    def __init__(self, spec: PrefixVLASpec) -> None:
        super().__init__()
        self.vision = PixelTower(spec.vision)
        self.connector = LinearConnector(spec.vision.d_model, spec.vlm.d_model, bias=True)

    def share_tied(self, spec: PrefixVLASpec) -> None:
        """Share what the spec ties; to be called when all parts stand."""
        share_parameters(self, expand_ties(spec.tied, self.state_dict()))

    @property
    def d_features(self) -> int:
        return self.vision.d_model

    def embed_images(self, inputs: VLAInputs) -> Float[Tensor, "batch image_token d_model"]:
        """Every camera's tokens, one camera after the other."""
        features = rearrange(self.vision_features(inputs), "b n s d -> (b n) s d")
        return rearrange(self.connector(features), "(b n) s d -> b (n s) d", n=len(inputs.cameras))

    def valid(self, inputs: VLAInputs, text_mask: Bool[Tensor, "batch text"]) -> Bool[Tensor, "batch seq"]:
        """Which tokens of the prefix are neither padding nor of a camera that is not there."""
        seen = repeat(inputs.image_mask, "b n -> b (n s)", s=count_patches(self.vision, inputs))
        return torch.cat([seen, text_mask], dim=1)

    def prefix_segments(
        self, inputs: VLAInputs, text: list[tuple[str, int]], text_mask: Bool[Tensor, "batch text"]
    ) -> dict[str, Segments]:
        """Segments of every stream up to the prefix; text: (segment, length) of what follows the images."""
        n_tokens, batch = count_patches(self.vision, inputs), inputs.batch_size
        names = tuple(image_segment(camera) for camera in inputs.cameras)
        camera_of_row = torch.arange(len(names)).repeat(batch)[:, None]
        images = Segments(names, camera_of_row.expand(-1, n_tokens), row_axis="image")
        spans = [*((name, n_tokens) for name in names), *text]
        return {
            "vision": images,
            "connector": images,
            "vlm": Segments.from_spans(spans, batch, self.valid(inputs, text_mask)),
            "vlm.language": Segments.from_spans(text, batch, text_mask),
        }


@dataclass(frozen=True)
class PrefixReads:
    """What the expert reads, the same at every denoise step."""

    layers: list[PrefixLayer]
    by: Rotation
    mask: Float[Tensor, "batch 1 seq key"]
    state: Float[Tensor, "batch 1 d_model"] | None

    def repeat(self, n: int) -> "PrefixReads":
        """The same for n batches in a row."""
        return PrefixReads(
            layers=[layer.repeat(n) for layer in self.layers],
            by=self.by.repeat(n),
            mask=repeat(self.mask, "b ... -> (n b) ...", n=n),
            state=None if self.state is None else repeat(self.state, "b s d -> (n b) s d", n=n),
        )


class ActionExpert(nn.Module):
    """Velocity of a noisy action chunk, given the prefix. Its tokens: the state, where it is one, then the actions."""

    def __init__(self, spec: JointFlowVLASpec) -> None:
        super().__init__()
        sizes, flow = spec.expert, spec.flow
        self.d_model, self.d_head, self.rope_base = sizes.d_model, sizes.d_head, sizes.rope_base
        self.flow, self.chunk, self.d_action = flow, flow.chunk, flow.d_action
        self.adaptive = spec.time_input == "adaptive_norm"
        self.action_in_proj = nn.Linear(flow.d_action, sizes.d_model)
        self.state_proj = nn.Linear(flow.d_state, sizes.d_model) if spec.state_input == "token" else None
        self.time_mlp_in = nn.Linear(sizes.d_model if self.adaptive else 2 * sizes.d_model, sizes.d_model)
        self.time_mlp_out = nn.Linear(sizes.d_model, sizes.d_model)
        self.blocks = nn.ModuleList(self._block(sizes) for _ in range(sizes.n_layers))
        self.ln_final = (
            AdaRMSNorm(sizes.d_model, sizes.d_model, sizes.eps, gated=False)
            if self.adaptive
            else OneCentredRMSNorm(sizes.d_model, sizes.eps)
        )
        self.action_out_proj = nn.Linear(sizes.d_model, flow.d_action)
        # checkpoints carry it although nothing reads it
        self.unembed = None if sizes.d_vocab is None else nn.Linear(sizes.d_model, sizes.d_vocab, bias=False)
        self.hook_noisy_actions = HookPoint("batch chunk d_action", dtype="float32", reused=True)
        self.hook_time = HookPoint("batch d_model", dtype="float32")
        if self.adaptive:
            self.hook_condition = HookPoint("batch d_model", dtype="float32")
        if self.state_proj is not None:
            self.hook_embed_state = HookPoint(
                "batch seq d_model", dtype="float32", stream="expert.state", per_chunk=True
            )
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_velocity = HookPoint("batch chunk d_action", dtype="float32")

    def _block(self, sizes: DecoderSpec) -> Block:
        attn = JointAttention(sizes.d_model, sizes.n_heads, sizes.n_kv_heads, sizes.d_head, bias=False)
        if not self.adaptive:
            return decoder_block(sizes, attn)
        return GatedBlock(
            sizes.d_model,
            ln1=AdaRMSNorm(sizes.d_model, sizes.d_model, sizes.eps, gated=True),
            attn=attn,
            ln2=AdaRMSNorm(sizes.d_model, sizes.d_model, sizes.eps, gated=True),
            mlp=GatedMLP(sizes.d_model, sizes.d_mlp, sizes.act),
        )

    @property
    def spans(self) -> list[tuple[str, int]]:
        """(segment, length) of the expert's own tokens."""
        return [*([] if self.state_proj is None else [(STATE, 1)]), (ACTION, self.chunk)]

    def reads(
        self, caches: list[KeysValues], valid: Bool[Tensor, "batch prefix"], state: Float[Tensor, "batch d_state"]
    ) -> PrefixReads:
        """Positions and masks of the expert's tokens against a prefix whose valid tokens are given.

        The state sees prefix and itself, the actions everything.
        """
        device = valid.device
        lengths = [length for _, length in self.spans]
        own = torch.ones(len(valid), sum(lengths), dtype=torch.bool, device=device)
        starts_block = torch.cat([torch.arange(length, device=device) == 0 for length in lengths])
        sees_prefix = repeat(valid, "b key -> b query key", query=own.shape[1])
        visible = torch.cat([sees_prefix, masks.block_mask(own, starts_block)], dim=2)
        after_prefix = valid.long().sum(1, keepdim=True) + masks.positions(own)
        return PrefixReads(
            layers=[PrefixLayer(kv) for kv in caches],
            by=rotation(after_prefix, self.d_head, self.rope_base),
            mask=masks.additive(visible, caches[0].k.dtype),
            state=None if self.state_proj is None else self.state_proj(state)[:, None],
        )

    def embed_actions(
        self, noisy: Float[Tensor, "batch chunk d_action"], time: Float[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch chunk d_model"], Float[Tensor, "batch d_model"] | None]:
        """One token an action step, and the condition of adaptive norms; in float32."""
        embedded = sincos_time(time, self.d_model, self.flow.min_period, self.flow.max_period)
        embedded = self.hook_time(embedded.to(self.action_in_proj.weight.dtype))
        actions = self.action_in_proj(noisy)
        if self.adaptive:
            condition = functional.silu(self.time_mlp_out(functional.silu(self.time_mlp_in(embedded))))
            return actions, self.hook_condition(condition)
        both = torch.cat([actions, repeat(embedded, "b d -> b c d", c=self.chunk)], dim=-1)
        return self.time_mlp_out(functional.silu(self.time_mlp_in(both))), None

    def forward(
        self, noisy: Float[Tensor, "batch chunk d_action"], time: Float[Tensor, " batch"], reads: PrefixReads
    ) -> tuple[Float[Tensor, "batch chunk d_action"], Float[Tensor, "batch chunk d_action"]]:
        """The noisy actions as hooks left them, and the velocity there."""
        noisy = self.hook_noisy_actions(noisy)
        tokens, condition = self.embed_actions(noisy, time)
        if reads.state is not None:
            tokens = torch.cat([self.hook_embed_state(reads.state), tokens], dim=1)
        x = self.hook_tokens(tokens.to(reads.mask.dtype))
        conditions = () if condition is None else (condition,)
        for block, prefix in zip(self.blocks, reads.layers, strict=True):
            x = block(x, *conditions, prefix, reads.by, reads.mask)
        x = self.ln_final(x, condition)[0] if self.adaptive else self.ln_final(x)
        velocity = self.action_out_proj(x[:, -self.chunk :].to(self.action_out_proj.weight.dtype))
        return noisy, self.hook_velocity(velocity)


class Pi(PrefixNetwork, ExpertNetwork):
    """The whole network: images, tokens, state and noise to a normalised action chunk at its padded width."""

    def __init__(self, spec: JointFlowVLASpec) -> None:
        super().__init__(spec)
        self.spec = spec
        self.vlm = PrefixModel(spec.vlm)
        self.expert = ActionExpert(spec)
        self.head = FlowMatchingHead(spec.flow.n_steps, spec.flow.chunk, spec.flow.d_action)
        self.share_tied(spec)

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

    def prefill(self, inputs: VLAInputs) -> PrefixReads:
        """Everything that does not depend on the denoise step."""
        valid = self.valid(inputs, inputs.token_mask)
        _, caches = self.vlm(self.embed_images(inputs), inputs.tokens, valid)
        return self.expert.reads(caches, valid, inputs.state)

    def segments(self, inputs: VLAInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        text = [(LANGUAGE, inputs.tokens.shape[1])]
        return {
            **self.prefix_segments(inputs, text, inputs.token_mask),
            "expert": Segments.from_spans(self.expert.spans, inputs.batch_size),
            "expert.state": Segments.from_spans([(STATE, 1)], inputs.batch_size),
        }


NETWORK = Pi
