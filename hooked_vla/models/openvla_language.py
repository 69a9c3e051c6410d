"""The language model of OpenVLA and OpenVLA-OFT: what stands where in its one sequence, and the decoder over it.

With a diffusion head it is the denoiser, and its pathway is then `expert`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components import mask as masks
from hooked_vla.components.attention import KeysValues, RotarySelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.ddim import squared_cosine_signal
from hooked_vla.components.embed import cossin_bucket
from hooked_vla.components.mlp import GatedMLP
from hooked_vla.components.mlp_resnet import MLPResNet
from hooked_vla.components.norm import RMSNorm
from hooked_vla.components.rope import rotation
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import ACTION, LANGUAGE, SPECIAL, STATE, PromptedInputs, image_segment
from hooked_vla.spec import DecoderSpec, LanguageVLASpec


def decoder_block(spec: DecoderSpec, attn: type[RotarySelfAttention]) -> Block:
    """A pre-norm block with a gated MLP around any attention."""
    return Block(
        spec.d_model,
        ln1=RMSNorm(spec.d_model, spec.eps),
        attn=attn(spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head, bias=False),
        ln2=RMSNorm(spec.d_model, spec.eps),
        mlp=GatedMLP(spec.d_model, spec.d_mlp, spec.act),
    )


class Projector(nn.Module):
    """Numbers to a token: two linear maps with a GELU between them."""

    def __init__(self, d_in: int, d_model: int) -> None:
        super().__init__()
        self.in_proj, self.out_proj = nn.Linear(d_in, d_model), nn.Linear(d_model, d_model)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_model"]:
        return self.out_proj(functional.gelu(self.in_proj(x.to(self.in_proj.weight.dtype))))


@dataclass(frozen=True)
class Layout:
    """Where tokens stand: (segment, length) spans, which are valid, and at which positions the actions are read."""

    spans: list[tuple[str, int]]
    valid: Bool[Tensor, "batch seq"]
    read_at: Int[Tensor, "batch token"]


class LanguageModel(nn.Module):
    """The decoder over [first prompt token, images, state, time, rest of the prompt, actions, stop token].

    State and time only where there are any; actions and the stop token where the model does not generate.
    """

    def __init__(self, spec: LanguageVLASpec) -> None:
        super().__init__()
        sizes, self.readout, self.stop = spec.vlm, spec.readout, spec.prompt.stop
        assert sizes.d_vocab is not None
        self.d_model, self.d_head, self.rope_base, self.d_vocab = (
            sizes.d_model, sizes.d_head, sizes.rope_base, sizes.d_vocab,
        )  # fmt: skip
        # with a diffusion head this runs at every denoise step, and the prompt is the same each time
        self.pathway, steps = ("expert", True) if spec.readout.kind == "diffuse" else ("vlm", False)
        self.embed = nn.Embedding(sizes.d_vocab, sizes.d_model)
        self.state_proj = Projector(spec.readout.d_state, sizes.d_model) if spec.readout.d_state else None
        self.blocks = nn.ModuleList(decoder_block(sizes, RotarySelfAttention) for _ in range(sizes.n_layers))
        self.ln_final = RMSNorm(sizes.d_model, sizes.eps)
        self.unembed = nn.Linear(sizes.d_model, sizes.d_vocab, bias=False)
        self.hook_embed_language = HookPoint("batch seq d_model", stream=f"{self.pathway}.language", per_chunk=steps)
        if self.state_proj is not None:
            self.hook_embed_state = HookPoint("batch seq d_model", stream=f"{self.pathway}.state", per_chunk=steps)
        self.hook_tokens = HookPoint("batch seq d_model")
        if self.readout.kind == "generate":
            self.hook_logits = HookPoint("batch d_vocab")
        elif self.readout.kind == "parallel":
            self.hook_logits = HookPoint("batch seq d_vocab", stream="vlm.action")

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        return self.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        return rearrange(self.unembed.weight, "v m -> m v")

    def layout(self, inputs: PromptedInputs, n_patches: int, n_more: int = 0) -> Layout:
        """n_more: places after the actions that are read too."""
        batch, n_text = inputs.tokens.shape
        n_actions = self.readout.chunk * self.readout.d_action
        generates = self.readout.kind == "generate"
        n_given = 0 if inputs.action_tokens is None else inputs.action_tokens.shape[1] - 1
        n_read = (n_given + 1 if generates else n_actions) + n_more
        own = [(STATE, int(self.readout.d_state > 0)), (SPECIAL, int(self.readout.kind == "diffuse"))]
        after = [(ACTION, n_given)] if generates else [(ACTION, n_actions), (SPECIAL, 1)]
        images = [(image_segment(camera), n_patches) for camera in inputs.cameras]
        spans = [(SPECIAL, 1), *images, *own, (LANGUAGE, n_text - 1), *after]
        true = torch.ones(batch, 1, dtype=torch.bool, device=inputs.tokens.device)
        before = [inputs.token_mask[:, :1], repeat(inputs.image_mask, "b n -> b (n p)", p=n_patches)]
        n_own, n_after = (sum(length for _, length in part) for part in (own, after))
        valid = [*before, true.expand(-1, n_own), inputs.token_mask[:, 1:], true.expand(-1, n_after)]
        # a prompt may be padded on its right: its last token, then the actions, whose first is read from it
        n_inserted = len(inputs.cameras) * n_patches + n_own
        last = n_inserted + inputs.token_mask.sum(1, keepdim=True) - 1
        following = n_inserted + n_text + torch.arange(n_read - 1, device=last.device)
        read_at = torch.cat([last, following.expand(batch, -1)], dim=1)
        return Layout([span for span in spans if span[1]], torch.cat(valid, dim=1), read_at)

    def embed_state(self, inputs: PromptedInputs) -> list[Float[Tensor, "batch 1 d_model"]]:
        """The state token, if the model has one."""
        return [] if self.state_proj is None else [self.state_proj(inputs.state)[:, None]]

    def describe(
        self, language: Float[Tensor, "batch text d_model"], inputs: PromptedInputs
    ) -> Float[Tensor, "batch d_model"]:
        """Mean of the embeddings of the prompt and the stop token: what FiLM reads."""
        total = torch.where(inputs.token_mask[..., None], language, 0).sum(1) + self.stop_token(language)[:, 0]
        return total / (inputs.token_mask.sum(1, keepdim=True) + 1)

    def stop_token(self, language: Float[Tensor, "batch text d_model"]) -> Float[Tensor, "batch 1 d_model"]:
        return self.embed(torch.full((len(language), 1), self.stop, device=language.device))

    def sequence(
        self,
        language: Float[Tensor, "batch text d_model"],
        images: Float[Tensor, "batch image_token d_model"],
        own: Sequence[Float[Tensor, "batch 1 d_model"]],
        actions: Float[Tensor, "batch action d_model"],
    ) -> Float[Tensor, "batch seq d_model"]:
        """The decoder's input; own: state and time tokens."""
        stop = [] if self.readout.kind == "generate" else [self.stop_token(language)]
        return self.hook_tokens(torch.cat([language[:, :1], images, *own, language[:, 1:], actions, *stop], dim=1))

    def forward(
        self, tokens: Float[Tensor, "batch seq d_model"], layout: Layout
    ) -> tuple[Float[Tensor, "batch token d_model"], list[KeysValues]]:
        """Normed hidden states where the actions are read, and each layer's keys and values."""
        by = rotation(masks.positions(layout.valid), self.d_head, self.rope_base)
        causal = self.readout.kind == "generate"
        sees = masks.causal(layout.valid) if causal else repeat(layout.valid, "b k -> b q k", q=layout.valid.shape[1])
        mask = masks.additive(sees, tokens.dtype)
        x, caches = tokens, []
        for block in self.blocks:
            assert isinstance(block, Block)
            x, kv = block.with_keys_values(x, by, mask)
            caches.append(kv)
        hidden = self.ln_final(x)
        return hidden.gather(1, repeat(layout.read_at, "b t -> b t d", d=self.d_model)), caches


class DenoisingLanguageModel(LanguageModel):
    """Predicts the noise in an action chunk: the action tokens embed the noisy numbers, one token each."""

    def __init__(self, spec: LanguageVLASpec) -> None:
        super().__init__(spec)
        self.chunk, self.d_action = spec.readout.chunk, spec.readout.d_action
        self.signal = squared_cosine_signal(spec.readout.n_steps)
        self.action_in_proj = Projector(1, self.d_model)
        self.head = MLPResNet(
            self.d_action * self.d_model, spec.readout.d_hidden, spec.readout.n_layers, self.d_action, "expert.head"
        )
        self.hook_noisy_actions = HookPoint("batch chunk d_action", dtype="float32", reused=True)
        self.hook_time = HookPoint("batch d_model")
        self.hook_embed_action = HookPoint("batch seq d_model", stream="expert.action")
        self.hook_noise = HookPoint("batch chunk d_action", dtype="float32")

    def denoise(
        self,
        noisy: Float[Tensor, "batch chunk d_action"],
        time: Int[Tensor, " batch"],
        language: Float[Tensor, "batch text d_model"],
        images: Float[Tensor, "batch image_token d_model"],
        state: Sequence[Float[Tensor, "batch 1 d_model"]],
        layout: Layout,
    ) -> tuple[Float[Tensor, "batch chunk d_action"], Float[Tensor, "batch chunk d_action"]]:
        """The noisy actions as hooks left them, and the noise in them."""
        noisy = self.hook_noisy_actions(noisy)
        cosines, sines = cossin_bucket(time, self.d_model).chunk(2, -1)
        embedded = self.hook_time(torch.cat([sines, cosines], dim=-1).to(language.dtype))
        actions = self.hook_embed_action(self.action_in_proj(rearrange(noisy, "b c d -> b (c d) 1")))
        own = [*(self.hook_embed_state(each) for each in state), embedded[:, None]]
        hidden, _ = self(self.sequence(self.hook_embed_language(language), images, own, actions), layout)
        return noisy, self.hook_noise(self.head(rearrange(hidden, "b (c d) m -> b c (d m)", c=self.chunk)))
