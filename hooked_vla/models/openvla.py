"""OpenVLA and OpenVLA-OFT. One language model reads image patches and the prompt, and says the actions itself: token
after token, or (OFT) all at once in one pass in which every token sees every other.

Wiring read from openvla/openvla (prismatic/extern/hf) and moojink/openvla-oft. What surprises: the towers are read
one block before their end and without the final norm; image tokens stand between the first and second prompt token;
OFT's action tokens are zero vectors, and what is read begins one token before them. With a diffusion head the whole
language model is the denoiser and runs at every step: its pathway is then `expert`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components import mask as masks
from hooked_vla.components.action_tokens import TokenHead
from hooked_vla.components.attention import KeysValues, RotarySelfAttention
from hooked_vla.components.block import Block
from hooked_vla.components.connector import MLPConnector
from hooked_vla.components.ddim import add_noise, ddim_step, squared_cosine_signal
from hooked_vla.components.decode import CachedAttention, CachedLayer, TokenDecoder, generate_greedily
from hooked_vla.components.embed import cossin_bucket
from hooked_vla.components.losses import check_targets, mean_of_draws, mean_of_steps
from hooked_vla.components.mlp import GatedMLP
from hooked_vla.components.mlp_resnet import MLPResNet
from hooked_vla.components.norm import RMSNorm
from hooked_vla.components.rope import rotation
from hooked_vla.components.tower import Towers
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import ACTION, LANGUAGE, SPECIAL, STATE, Draws, PromptedInputs, Segments, image_segment
from hooked_vla.models.network import Network, expand_ties, pixels, share_parameters
from hooked_vla.models.openvla_config import read_spec, write_config
from hooked_vla.spec import DecoderSpec, LanguageVLASpec, ReadoutSpec


def _block(spec: DecoderSpec, attn: type[RotarySelfAttention]) -> Block:
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
        self.blocks = nn.ModuleList(_block(sizes, RotarySelfAttention) for _ in range(sizes.n_layers))
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


class RegressionHead(MLPResNet):
    """The hidden states of a step's action tokens, side by side, to that step's action."""

    def __init__(self, readout: ReadoutSpec, d_hidden: int) -> None:
        d_action = readout.d_action
        super().__init__(d_action * d_hidden, readout.d_hidden, readout.n_layers, d_action, stream="head")
        self.chunk, self.d_action = readout.chunk, d_action
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(self, hidden: Float[Tensor, "batch token d_hidden"]) -> Float[Tensor, "batch chunk d_action"]:
        return self.hook_actions(super().forward(rearrange(hidden, "b (c d) m -> b c (d m)", c=self.chunk)))


class DenoisedHead(nn.Module):
    """Where the denoised chunk can be seen."""

    def __init__(self, readout: ReadoutSpec) -> None:
        super().__init__()
        self.chunk, self.d_action = readout.chunk, readout.d_action
        self.hook_actions = HookPoint("batch chunk d_action", dtype="float32")

    def forward(self, actions: Float[Tensor, "batch chunk d_action"]) -> Float[Tensor, "batch chunk d_action"]:
        return self.hook_actions(actions)


def _head(readout: ReadoutSpec, sizes: DecoderSpec) -> RegressionHead | DenoisedHead | TokenHead:
    if readout.kind == "regress":
        return RegressionHead(readout, sizes.d_model)
    if readout.kind == "diffuse":
        return DenoisedHead(readout)
    n_ids = (sizes.d_vocab or 0) - readout.n_padding_ids
    return TokenHead(n_ids, readout.n_bins, readout.chunk, readout.d_action)


class OpenVLA(Network):
    """The whole network: images and prompt to a normalised action chunk."""

    def __init__(self, spec: LanguageVLASpec) -> None:
        super().__init__()
        self.spec, readout = spec, spec.readout
        self.vision = Towers(spec.towers, spec.vlm.d_model if spec.film else None)
        self.connector = MLPConnector(self.vision.d_concat, spec.connector, spec.vlm.d_model, "gelu")
        if readout.kind == "diffuse":
            self.expert = DenoisingLanguageModel(spec)
        else:
            self.vlm = LanguageModel(spec)
        if readout.kind == "generate":
            with torch.device("meta"):
                blocks = [_block(spec.vlm, CachedAttention) for _ in range(spec.vlm.n_layers)]
                norm = RMSNorm(spec.vlm.d_model, spec.vlm.eps)
            self.decode = TokenDecoder(
                spec.vlm.d_model, spec.vlm.d_head, spec.vlm.rope_base, self.vlm.d_vocab, blocks, norm
            )
            share_parameters(self, expand_ties(spec.tied, self.state_dict()))
        self.head = _head(readout, spec.vlm)

    @property
    def language_model(self) -> LanguageModel:
        """`vlm`, or `expert` where it denoises."""
        return self.expert if self.spec.readout.kind == "diffuse" else self.vlm

    @property
    def n_denoise_steps(self) -> int:
        readout = self.spec.readout
        if readout.kind == "generate":
            return readout.chunk * readout.d_action - 1
        return readout.n_steps if readout.kind == "diffuse" else 1

    @property
    def dead_ends(self) -> list[str]:
        """None: the actions are read behind the last layer."""
        return []

    def sample_actions(self, inputs: PromptedInputs, draws: Draws, run: Run) -> Float[Tensor, "batch chunk d_action"]:
        """Normalised actions. Only a diffusion head draws: once, the starting noise."""
        kind = self.spec.readout.kind
        if kind == "diffuse":
            return self.head(self._denoise(inputs, draws, run))
        if kind == "regress":
            return self.head(self.read(inputs)[0])
        return self.head(self.generate_action_tokens(inputs, None, run))

    def generate_action_tokens(
        self, inputs: PromptedInputs, max_new_tokens: int | None, run: Run
    ) -> Int[Tensor, "batch token"]:
        """The likeliest token at each place; generation goes on after an end token.

        With action tokens given, nothing is generated: the answer at each place to the given tokens before it.
        Raises ValueError for more tokens than a chunk has, TypeError for a model whose actions are not tokens.
        """
        readout = self.spec.readout
        n_tokens = readout.chunk * readout.d_action
        if readout.kind not in ("generate", "parallel"):
            return super().generate_action_tokens(inputs, max_new_tokens, run)
        n_wanted = n_tokens if max_new_tokens is None else max_new_tokens
        if not 1 <= n_wanted <= n_tokens:
            raise ValueError(f"max_new_tokens must be 1..{n_tokens}, as many as an action chunk has; got {n_wanted}")
        if readout.kind == "parallel" or inputs.action_tokens is not None:
            return self.token_logits(inputs)[:, :n_wanted].argmax(-1)
        hidden, caches, valid = self.read(inputs)
        layers = [CachedLayer(kv, n_tokens - 1) for kv in caches]

        def unembed(hidden: Tensor) -> Tensor:
            return self.vlm.unembed(hidden)

        def next_logits(token: Tensor, step: int) -> Tensor:
            return self.decode(self.vlm.embed(token[:, None]), step, valid, layers, unembed)

        return generate_greedily(self.vlm.hook_logits(unembed(hidden[:, 0])), next_logits, n_wanted, None, run)

    def token_logits(self, inputs: PromptedInputs, n_more: int = 0) -> Float[Tensor, "batch token d_vocab"]:
        """Scores of every id at every place of the answer, from one pass; of the given action tokens, all but the
        last are read. n_more: so many places after those of a parallel answer."""
        logits = self.vlm.unembed(self.read(inputs, n_more)[0])
        if self.spec.readout.kind == "parallel":
            n = logits.shape[1] - n_more
            return torch.cat([self.vlm.hook_logits(logits[:, :n]), logits[:, n:]], dim=1)
        return torch.cat([self.vlm.hook_logits(logits[:, 0])[:, None], logits[:, 1:]], dim=1)

    def training_loss(
        self,
        inputs: PromptedInputs,
        actions: Float[Tensor, "batch chunk d_action"],
        valid: Bool[Tensor, "batch chunk"] | None,
        draws: Draws,
        run: Run,
        n_draws: int = 1,
    ) -> Float[Tensor, " batch"]:
        """As Network's. Tokens: cross-entropy of the actions' and the stop token, which counts as the last step's;
        regression: absolute error; with a diffusion head the noise's squared error, drawn: noise, then each row's
        step, integers [batch]. There the language model is the denoiser, and runs on every draw."""
        readout = self.spec.readout
        check_targets(actions, valid, (inputs.batch_size, readout.chunk, readout.d_action), n_draws)
        if readout.kind == "regress":
            return mean_of_steps((self.head(self.read(inputs)[0]) - actions).abs().mean(-1), valid)
        if readout.kind == "diffuse":
            losses = self._noise_losses(inputs, actions, draws, run, n_draws)
            valid = None if valid is None else repeat(valid, "b c -> (n b) c", n=n_draws)
            return mean_of_draws(mean_of_steps(losses, valid), n_draws)
        stop = torch.full((len(actions), 1), self.spec.prompt.stop, device=actions.device)
        answer = torch.cat([self.head.encode(actions), stop], dim=1)
        if readout.kind == "generate":
            inputs = replace(inputs, action_tokens=answer)
        with self.inputs_replaced(lambda: inputs, run):
            logits = self.token_logits(inputs, n_more=1 if readout.kind == "parallel" else 0)
        losses = functional.cross_entropy(logits.float().transpose(1, 2), answer, reduction="none")
        if valid is not None:
            valid = torch.cat([repeat(valid, "b c -> b (c d)", d=readout.d_action), valid[:, -1:]], dim=1)
        return mean_of_steps(losses, valid)

    def _noise_losses(
        self, inputs: PromptedInputs, actions: Float[Tensor, "batch chunk d_action"], draws: Draws, run: Run, n: int
    ) -> Float[Tensor, "row chunk"]:
        expert, batch = self.expert, inputs.batch_size
        language = expert.embed(inputs.tokens)
        images, state = self.image_tokens(inputs, language), expert.embed_state(inputs)
        drawn = [(draws.normal(actions.shape), draws.integers(self.n_denoise_steps, (batch,))) for _ in range(n)]
        noise, time = (torch.cat(each) for each in zip(*drawn, strict=True))
        signal = torch.tensor(expert.signal, device=actions.device)
        noisy = add_noise(repeat(actions, "b c d -> (n b) c d", n=n), noise, time, signal)
        rows = replace(inputs, images=None, features=None).rows(list(range(batch)) * n)
        own = [repeat(each, "b s d -> (n b) s d", n=n) for each in (language, images, *state)]
        with self.inputs_replaced(lambda: rows, run):
            layout = expert.layout(rows, self.vision.n_patches)
            _, predicted = expert.denoise(noisy, time, own[0], own[1], own[2:], layout)
        return (predicted - noise).square().mean(-1)

    def read(
        self, inputs: PromptedInputs, n_more: int = 0
    ) -> tuple[Float[Tensor, "batch token d_model"], list[KeysValues], Bool[Tensor, "batch seq"]]:
        """One pass over everything known: hidden states where actions are read, keys and values, valid positions."""
        vlm = self.vlm
        language = vlm.hook_embed_language(vlm.embed(inputs.tokens))
        images = self.image_tokens(inputs, language)
        own = [vlm.hook_embed_state(each) for each in vlm.embed_state(inputs)]
        if inputs.action_tokens is not None:
            actions = vlm.embed(inputs.action_tokens[:, :-1])
        else:
            actions = language.new_zeros(len(language), self.n_placeholders, vlm.d_model)
        layout = vlm.layout(inputs, self.vision.n_patches, n_more)
        hidden, caches = vlm(vlm.sequence(language, images, own, actions), layout)
        return hidden, caches, layout.valid

    @property
    def n_placeholders(self) -> int:
        """Zero vectors that stand for action tokens."""
        readout = self.spec.readout
        return 0 if readout.kind == "generate" else readout.chunk * readout.d_action

    def image_tokens(
        self, inputs: PromptedInputs, language: Float[Tensor, "batch text d_model"]
    ) -> Float[Tensor, "batch image_token d_model"]:
        """All images' tokens, one image after the other."""
        n = len(inputs.cameras)
        if not self.spec.film:
            features = rearrange(self.vision_features(inputs), "b n p d -> (b n) p d")
        elif inputs.features is None:
            condition = repeat(self.language_model.describe(language, inputs), "b d -> (b n) d", n=n)
            features = self.vision(rearrange(pixels(inputs), "b n c h w -> (b n) c h w"), condition)
        else:
            raise ValueError("the vision towers read the prompt (FiLM): features kept from before cannot be used")
        return rearrange(self.connector(features), "(b n) p d -> b (n p) d", n=n)

    @property
    def d_features(self) -> int:
        return self.vision.d_concat

    def see(self, inputs: PromptedInputs) -> Float[Tensor, "batch camera patch d_vision"]:
        """Raises TypeError where the towers read the prompt too."""
        if self.spec.film:
            raise TypeError("the vision towers read the prompt (FiLM): they have no features of images alone")
        return super().see(inputs)

    def _denoise(self, inputs: PromptedInputs, draws: Draws, run: Run) -> Float[Tensor, "batch chunk d_action"]:
        expert, n_steps = self.expert, self.n_denoise_steps
        language = expert.embed(inputs.tokens)
        images, state = self.image_tokens(inputs, language), expert.embed_state(inputs)
        layout = expert.layout(inputs, self.vision.n_patches)
        x = draws.normal((inputs.batch_size, expert.chunk, expert.d_action))
        for step, time in enumerate(reversed(range(n_steps))):
            run.denoise_step = step
            times = torch.full((len(x),), time, device=x.device)
            x, noise = expert.denoise(x, times, language, images, state, layout)
            x = ddim_step(x, noise, time, expert.signal)
        run.denoise_step = None
        return x

    def segments(self, inputs: PromptedInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        batch, n_text = inputs.tokens.shape
        n_patches, readout, lm = self.vision.n_patches, self.spec.readout, self.language_model
        cameras = tuple(image_segment(camera) for camera in inputs.cameras)
        camera_of_row = torch.arange(len(cameras)).repeat(batch)[:, None]
        patches = Segments(cameras, camera_of_row.expand(-1, n_patches), row_axis="image")
        found = {"vision": patches, "connector": patches}
        for name, tower in self.spec.towers.items():
            before = Segments.from_spans([(SPECIAL, tower.n_prefix_tokens)], len(camera_of_row))
            found[f"vision.{name}"] = replace(Segments.concatenate(before, patches), row_axis="image")
        layout, n_actions = lm.layout(inputs, n_patches), readout.chunk * readout.d_action
        language = [(SPECIAL, 1), (LANGUAGE, n_text - 1)]
        return found | {
            lm.pathway: Segments.from_spans(layout.spans, batch, layout.valid),
            f"{lm.pathway}.language": Segments.from_spans(language, batch, inputs.token_mask),
            f"{lm.pathway}.state": Segments.from_spans([(STATE, 1)], batch),
            f"{lm.pathway}.action": Segments.from_spans([(ACTION, n_actions)], batch),
            "decode": Segments.from_spans([(ACTION, 1)], batch),
            "decode.slots": Segments.from_spans([(ACTION, n_actions - 1)], batch),
            "head": Segments.from_spans([(ACTION, readout.chunk)], batch),
            "expert.head": Segments.from_spans([(ACTION, readout.chunk)], batch),
        }


NETWORK = OpenVLA
__all__ = ["NETWORK", "read_spec", "write_config"]
