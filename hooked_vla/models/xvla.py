"""X-VLA. Florence-2's encoder reads the first camera and the text; one transformer reads noisy actions, the encoder's
output, the other cameras' image tokens and soft prompts of the robot's domain, and predicts clean actions.

Wiring read from LeRobot 0.6.1, policies/xvla, and transformers 5.5, models/florence2 and models/bart. Rules that
surprise: padding text is attended; tokens of a hidden or absent camera are zeros, and attended; every denoise step
starts from the last prediction and the same noise; soft prompts get no positions.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.action_head import ResamplingHead, channel_mask
from hooked_vla.components.attention import SelfAttention
from hooked_vla.components.block import Block, PostNormBlock
from hooked_vla.components.connector import GridConnector
from hooked_vla.components.davit import ConvTower, to_windows
from hooked_vla.components.domain import DomainLinear
from hooked_vla.components.embed import SequencePositions, cossin_time
from hooked_vla.components.mlp import MLP
from hooked_vla.components.norm import LayerNorm, StreamLayerNorm
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import (
    ACTION,
    LANGUAGE,
    PAD,
    SOFT_PROMPT,
    DomainInputs,
    Segments,
    image_segment,
)
from hooked_vla.models.network import ExpertNetwork, pixels
from hooked_vla.models.xvla_config import loss_terms, read_spec, write_config
from hooked_vla.spec import EncoderSpec, PromptedExpertSpec, PromptedVLASpec, ResampleSpec

__all__ = ["NETWORK", "read_spec", "write_config"]


class Encoder(nn.Module):
    """BART's encoder over the first camera's image tokens and the text; every token sees every token."""

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.d_model = spec.d_model
        self.embed = nn.Embedding(spec.d_vocab, spec.d_model)
        # BART leaves the first two rows of its table unused
        self.pos_embed = SequencePositions(spec.n_positions, spec.d_model, offset=2)
        self.ln_pre = LayerNorm(spec.d_model, spec.eps)
        d_head = spec.d_model // spec.n_heads
        self.blocks = nn.ModuleList(
            PostNormBlock(
                spec.d_model,
                attn=SelfAttention(spec.d_model, spec.n_heads, spec.n_heads, d_head, bias=True),
                ln1_post=LayerNorm(spec.d_model, spec.eps),
                mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
                ln2_post=LayerNorm(spec.d_model, spec.eps),
            )
            for _ in range(spec.n_layers)
        )
        self.hook_embed_image = HookPoint("batch seq d_model", stream="vlm.image")
        self.hook_embed_language = HookPoint("batch seq d_model", stream="vlm.language")
        self.hook_pos_embed = HookPoint("seq d_model")
        self.hook_tokens = HookPoint("batch seq d_model")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    def forward(
        self, image_tokens: Float[Tensor, "batch place d_model"], tokens: Int[Tensor, "batch text"]
    ) -> Float[Tensor, "batch seq d_model"]:
        image_tokens = self.hook_embed_image(image_tokens)
        x = torch.cat([image_tokens, self.hook_embed_language(self.embed(tokens))], dim=1)
        x = self.hook_tokens(self.ln_pre(x + self.hook_pos_embed(self.pos_embed(x.shape[1]))))
        for block in self.blocks:
            x = block(x)
        return x


@dataclass(frozen=True)
class ExpertReads:
    """What the expert reads besides noisy actions and time, the same at every denoise step."""

    vlm: Float[Tensor, "batch vlm d_model"]
    aux: Float[Tensor, "batch aux d_model"]
    positions: Float[Tensor, "placed d_model"]
    soft_prompts: Float[Tensor, "batch prompt d_model"] | None
    state: Float[Tensor, "batch d_state"]
    domain: Int[Tensor, " batch"]

    def repeat(self, n: int) -> "ExpertReads":
        """The same for n batches in a row: the expert's layers see all of it beside every batch's actions."""
        rows = {
            each.name: repeat(value, "b ... -> (n b) ...", n=n)
            for each in fields(self)
            if (value := getattr(self, each.name)) is not None
        }
        return replace(self, **rows | {"positions": self.positions})


class ExpertPositions(nn.Module):
    """Learned positions of the expert's tokens, stored with a batch axis of 1."""

    def __init__(self, n_positions: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, n_positions, d_model).normal_(std=0.02))

    def forward(self, length: int) -> Float[Tensor, "length d_model"]:
        """Raises ValueError for more positions than there are."""
        if length > self.weight.shape[1]:
            raise ValueError(f"{length} tokens for the expert, but there are {self.weight.shape[1]} positions")
        return self.weight[0, :length].clone()


class PromptedExpert(nn.Module):
    """Clean actions behind a noisy chunk. State and time are part of every action token."""

    def __init__(self, spec: PromptedExpertSpec, sampler: ResampleSpec, d_vlm: int) -> None:
        super().__init__()
        self.d_model, self.d_time, self.n_prompts = spec.d_model, spec.d_time, spec.n_prompts
        self.chunk, self.d_action, self.d_state = sampler.chunk, sampler.d_action, sampler.d_state
        self.grippers, self.max_period = sampler.grippers, sampler.max_period
        d_in = sampler.d_action + sampler.d_state + spec.d_time
        self.action_in = DomainLinear(spec.n_domains, d_in, spec.d_model, flat=True)
        self.vlm_proj = _projection(spec, d_vlm)
        self.aux_proj = _projection(spec, d_vlm)
        self.pos_embed = ExpertPositions(spec.n_positions, spec.d_model)
        d_head = spec.d_model // spec.n_heads
        self.blocks = nn.ModuleList(
            Block(
                spec.d_model,
                ln1=LayerNorm(spec.d_model, spec.eps),
                attn=SelfAttention(spec.d_model, spec.n_heads, spec.n_heads, d_head, bias=True),
                ln2=LayerNorm(spec.d_model, spec.eps),
                mlp=MLP(spec.d_model, spec.d_mlp, spec.act),
            )
            for _ in range(spec.n_layers)
        )
        self.ln_final = StreamLayerNorm(spec.d_model, spec.eps, "expert.action")
        self.action_out = DomainLinear(spec.n_domains, spec.d_model, sampler.d_action, flat=True)
        self.hook_noisy_actions = HookPoint("batch chunk d_action", dtype="float32")
        self.hook_state = HookPoint("batch d_state", dtype="float32", per_chunk=True)
        self.hook_time = HookPoint("batch d_time", dtype="float32")
        self.hook_embed_action = HookPoint("batch seq d_model", stream="expert.action")
        self.hook_embed_vlm = HookPoint("batch seq d_model", stream="expert.vlm", per_chunk=True)
        self.hook_embed_aux = HookPoint("batch seq d_model", stream="expert.aux", per_chunk=True)
        self.hook_pos_embed = HookPoint("seq d_model", stream="expert.placed", per_chunk=True)
        if self.n_prompts:
            self.soft_prompts = nn.Embedding(spec.n_domains, spec.n_prompts * spec.d_model)
            self.hook_soft_prompts = HookPoint("batch seq d_model", stream="expert.soft_prompt", per_chunk=True)
        self.hook_tokens = HookPoint("batch seq d_model")
        self.hook_clean_actions = HookPoint("batch chunk d_action", dtype="float32")

    def reads(
        self,
        encoded: Float[Tensor, "batch seq d_vlm"],
        aux: Float[Tensor, "batch place d_vlm"],
        state: Float[Tensor, "batch d_state"],
        domain: Int[Tensor, " batch"],
    ) -> ExpertReads:
        """Projections of the encoder's output and of the other cameras' tokens, their positions, and the prompts.

        Raises ValueError for more tokens than there are positions.
        """
        prompts = rearrange(self.soft_prompts(domain), "b (p d) -> b p d", p=self.n_prompts) if self.n_prompts else None
        return ExpertReads(
            vlm=_project(self.vlm_proj, encoded, domain),
            aux=_project(self.aux_proj, aux, domain),
            positions=self.pos_embed(self.chunk + encoded.shape[1] + aux.shape[1]),
            soft_prompts=prompts,
            state=state.masked_fill(channel_mask(self.grippers, state), 0.0),
            domain=domain,
        )

    def forward(
        self, noisy: Float[Tensor, "batch chunk d_action"], time: Float[Tensor, " batch"], reads: ExpertReads
    ) -> Float[Tensor, "batch chunk d_action"]:
        """The clean chunk that the expert sees behind the noisy one; it sees no gripper channels."""
        noisy = self.hook_noisy_actions(noisy.masked_fill(channel_mask(self.grippers, noisy), 0.0))
        embedded = self.hook_time(cossin_time(time, self.d_time, self.max_period))
        row = torch.cat([self.hook_state(reads.state), embedded], dim=-1)
        together = torch.cat([noisy, repeat(row, "b d -> b c d", c=self.chunk)], dim=-1)
        actions = self.hook_embed_action(self.action_in(together.to(reads.positions.dtype), reads.domain))
        x = torch.cat([actions, self.hook_embed_vlm(reads.vlm), self.hook_embed_aux(reads.aux)], dim=1)
        x = x + self.hook_pos_embed(reads.positions)
        if reads.soft_prompts is not None:
            x = torch.cat([x, self.hook_soft_prompts(reads.soft_prompts)], dim=1)
        x = self.hook_tokens(x)
        for block in self.blocks:
            x = block(x)
        clean = self.action_out(self.ln_final(x[:, : self.chunk]), reads.domain)
        return self.hook_clean_actions(clean.float())


def _projection(spec: PromptedExpertSpec, d_in: int) -> nn.Module:
    if spec.domain_projections:
        return DomainLinear(spec.n_domains, d_in, spec.d_model, flat=True)
    return nn.Linear(d_in, spec.d_model)


def _project(module: nn.Module, x: Tensor, domain: Tensor) -> Tensor:
    return module(x, domain) if isinstance(module, DomainLinear) else module(x)


class XVLA(ExpertNetwork):
    """The whole network: images, tokens, state, domain and noise to a chunk of actions at its padded width."""

    def __init__(self, spec: PromptedVLASpec) -> None:
        super().__init__()
        self.spec, self.n_views = spec, spec.n_views
        self.vision = ConvTower(spec.vision)
        self.connector = GridConnector(
            spec.vision.d_model[-1], spec.vlm.d_model, spec.grid_positions, spec.n_times, spec.vision.eps
        )
        self.vlm = Encoder(spec.vlm)
        self.expert = PromptedExpert(spec.expert, spec.sampler, spec.vlm.d_model)
        sampler = spec.sampler
        self.head = ResamplingHead(
            sampler.n_steps, sampler.chunk, sampler.d_action, sampler.grippers,
            terms=loss_terms(sampler.mode, spec.features.d_action),
        )  # fmt: skip

    @property
    def dead_ends(self) -> list[str]:
        """Every value reaches the actions; with places for one camera only, no tokens of other cameras exist."""
        return ["expert.hook_embed_aux"] if self.n_views == 1 else []

    @property
    def d_features(self) -> int:
        return self.connector.d_vision

    def see(self, inputs: DomainInputs) -> Float[Tensor, "batch camera row column d_vision"]:
        features, (rows, _) = self.vision(rearrange(pixels(inputs), "b n c h w -> (b n) c h w"))
        return rearrange(features, "(b n) (h w) d -> b n h w d", n=len(inputs.cameras), h=rows)

    def prefill(self, inputs: DomainInputs) -> ExpertReads:
        """Everything that does not depend on the denoise step."""
        features = self.vision_features(inputs)
        n_cameras, *grid = features.shape[1:4]
        tokens = self.connector(rearrange(features, "b n h w d -> (b n) (h w) d"), tuple(grid))
        views = rearrange(tokens, "(b n) s d -> b n s d", n=n_cameras)
        views = views.masked_fill(~inputs.image_mask[:, :, None, None], 0.0)
        encoded = self.vlm(views[:, 0], inputs.tokens)
        views = functional.pad(views, (0, 0, 0, 0, 0, self._n_absent(inputs)))
        aux = rearrange(views[:, 1:], "b n s d -> b (n s) d")
        return self.expert.reads(encoded, aux, inputs.state, inputs.domain)

    def _n_absent(self, inputs: DomainInputs) -> int:
        return max(0, self.n_views - len(inputs.cameras))

    def segments(self, inputs: DomainInputs) -> dict[str, Segments]:
        """Token segments of every stream; tokens of absent cameras and of padding text are "pad" though attended."""
        batch, n_text, n_cameras = inputs.batch_size, inputs.tokens.shape[1], len(inputs.cameras)
        names = tuple(image_segment(camera) for camera in inputs.cameras)
        camera_of_row = torch.arange(n_cameras).repeat(batch)[:, None]
        found = {}
        if inputs.features is None:
            grids = self.vision.grids(*pixels(inputs).shape[-2:])
        else:
            # the tower does not run: only the places of what it made are known
            grids = [tuple(inputs.features.shape[2:4])]
            found["vision"] = Segments(names, camera_of_row.expand(-1, math.prod(grids[-1])), row_axis="image")
        for stage, (height, width) in enumerate(grids if inputs.features is None else []):
            labels = camera_of_row.expand(-1, height * width)
            found[f"vision.stages.{stage}"] = found["vision"] = Segments(names, labels, row_axis="image")
            # counted from 1, so that the zeros that fill up windows can be told apart
            windows = to_windows(labels[..., None] + 1.0, (height, width), self.vision.side)[..., 0].long() - 1
            labels = torch.where(windows < 0, n_cameras, windows)
            found[f"vision.stages.{stage}.windows"] = Segments((*names, PAD), labels, row_axis="image")
        n_places = 1 + math.prod(grids[-1])
        found["connector"] = Segments(names, camera_of_row.expand(-1, n_places), row_axis="image")
        seen = repeat(inputs.image_mask, "b n -> b n s", s=n_places)
        every = torch.ones(batch, max(self.expert.chunk, self.expert.n_prompts), dtype=torch.bool, device=seen.device)
        unseen = ~every[:, :1].expand(-1, self._n_absent(inputs) * n_places)
        # stream -> its (segment, length) spans and which positions are valid
        vlm = ([(names[0], n_places), (LANGUAGE, n_text)], torch.cat([seen[:, 0], inputs.token_mask], dim=1))
        aux = ([(name, n_places) for name in names[1:]] + [(PAD, unseen.shape[1])],
               torch.cat([rearrange(seen[:, 1:], "b n s -> b (n s)"), unseen], dim=1))  # fmt: skip
        action = ([(ACTION, self.expert.chunk)], every[:, : self.expert.chunk])
        prompts = ([(SOFT_PROMPT, self.expert.n_prompts)], every[:, : self.expert.n_prompts])
        layouts = {
            "vlm": [vlm],
            "vlm.image": [(vlm[0][:1], seen[:, 0])],
            "vlm.language": [(vlm[0][1:], inputs.token_mask)],
            "expert": [action, vlm, aux, prompts],
            "expert.action": [action],
            "expert.vlm": [vlm],
            "expert.aux": [aux],
            "expert.placed": [action, vlm, aux],
            "expert.soft_prompt": [prompts],
        }
        for stream, parts in layouts.items():
            spans = [span for part, _ in parts for span in part]
            found[stream] = Segments.from_spans(spans, batch, torch.cat([valid for _, valid in parts], dim=1))
        return found


NETWORK = XVLA
