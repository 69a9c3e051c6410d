"""OpenVLA and OpenVLA-OFT. One language model reads image patches and the prompt, and says the actions itself: token
after token, or (OFT) all at once in one pass in which every token sees every other.

Wiring read from openvla/openvla (prismatic/extern/hf) and moojink/openvla-oft. What surprises: the towers are read
one block before their end and without the final norm; image tokens stand between the first and second prompt token;
OFT's action tokens are zero vectors, and what is read begins one token before them. With a diffusion head the whole
language model is the denoiser and runs at every step: its pathway is then `expert`.
"""

from dataclasses import replace

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.action_tokens import TokenHead
from hooked_vla.components.attention import KeysValues
from hooked_vla.components.connector import MLPConnector
from hooked_vla.components.ddim import ddim_step
from hooked_vla.components.decode import CachedAttention, CachedLayer, TokenDecoder, generate_greedily
from hooked_vla.components.denoising import add_noise
from hooked_vla.components.losses import check_targets, mean_of_draws, mean_of_steps
from hooked_vla.components.mlp_resnet import MLPResNet
from hooked_vla.components.norm import RMSNorm
from hooked_vla.components.tower import Towers
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import ACTION, LANGUAGE, SPECIAL, STATE, Draws, PromptedInputs, Segments, image_segment
from hooked_vla.models.network import Network, expand_ties, pixels, share_parameters
from hooked_vla.models.openvla_config import read_spec, write_config
from hooked_vla.models.openvla_language import DenoisingLanguageModel, LanguageModel, decoder_block
from hooked_vla.spec import DecoderSpec, LanguageVLASpec, ReadoutSpec


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
                blocks = [decoder_block(spec.vlm, CachedAttention) for _ in range(spec.vlm.n_layers)]
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
        assert isinstance(self.head, TokenHead)
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
