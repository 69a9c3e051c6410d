"""π0-FAST. The language model says the actions itself: after a prefix of images, prompt and one start token, whose
tokens all see each other, it generates action tokens one at a time (pathway `decode`, see hooks/names.py).

Wiring read from LeRobot 0.6.1, policies/pi0_fast. What the network returns are token ids; the processor makes actions
of them. A surprise: the start token stands after the prompt's padding.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooked_vla.components.decode import CachedAttention, CachedLayer, TokenDecoder, generate_greedily
from hooked_vla.components.norm import OneCentredRMSNorm
from hooked_vla.hooks.point import HookPoint, Run
from hooked_vla.inputs import ACTION, LANGUAGE, SPECIAL, Draws, Segments, VLAInputs
from hooked_vla.models.pi import PrefixModel, PrefixNetwork, decoder_block
from hooked_vla.models.pi_config import read_fast_spec as read_spec
from hooked_vla.models.pi_config import write_fast_config as write_config
from hooked_vla.spec import DecoderSpec, FastVLASpec

__all__ = ["NETWORK", "read_spec", "write_config"]


class GeneratingModel(PrefixModel):
    """The prefix model, whose last position chooses the first action token."""

    def __init__(self, spec: DecoderSpec) -> None:
        super().__init__(spec)
        self.hook_logits = HookPoint("batch d_vocab")

    def first_logits(self, final: Float[Tensor, "batch seq d_model"]) -> Float[Tensor, "batch d_vocab"]:
        """Scores of the token after the prefix."""
        return self.hook_logits(self.logits(final[:, -1]))

    def logits(self, final: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_vocab"]:
        """Scores of the vocabulary; a method, for accelerate would move a module that is passed to another."""
        return self.unembed(final)


class TokenHead(nn.Module):
    """The ids of the generated tokens; those after an early end are 0."""

    def __init__(self, n_tokens: int) -> None:
        super().__init__()
        self.n_tokens = n_tokens
        self.hook_action_tokens = HookPoint("batch n_tokens", dtype="int64")

    def forward(self, tokens: Int[Tensor, "batch token"]) -> Int[Tensor, "batch token"]:
        return self.hook_action_tokens(tokens)


def _token_decoder(spec: DecoderSpec) -> TokenDecoder:
    assert spec.d_vocab is not None
    heads = (spec.d_model, spec.n_heads, spec.n_kv_heads, spec.d_head)
    return TokenDecoder(
        spec.d_model, spec.d_head, spec.rope_base, spec.d_vocab,
        blocks=(decoder_block(spec, CachedAttention(*heads, bias=False)) for _ in range(spec.n_layers)),
        ln_final=OneCentredRMSNorm(spec.d_model, spec.eps),
    )  # fmt: skip


class PiFast(PrefixNetwork):
    """The whole network: images and tokens to the ids of the action tokens."""

    def __init__(self, spec: FastVLASpec) -> None:
        super().__init__(spec)
        self.spec = spec
        self.vlm = GeneratingModel(spec.vlm)
        # without memory of its own: every parameter is tied to the vlm's
        with torch.device("meta"):
            self.decode = _token_decoder(spec.vlm)
        self.head = TokenHead(spec.fast.max_tokens)
        self.share_tied(spec)

    @property
    def n_denoise_steps(self) -> int:
        return self.spec.fast.max_tokens - 1

    @property
    def dead_ends(self) -> list[str]:
        """None: the prefix's last position chooses the first token, all others are read while decoding."""
        return []

    def sample_actions(self, inputs: VLAInputs, draws: Draws, run: Run) -> Float[Tensor, "batch token 1"]:
        """Ids of the action tokens, one a step; nothing is drawn."""
        return self.generate_action_tokens(inputs, None, run)[..., None].float()

    def generate_action_tokens(
        self, inputs: VLAInputs, max_new_tokens: int | None, run: Run
    ) -> Int[Tensor, "batch token"]:
        """The likeliest token at every step, up to the end token in every row.

        Raises ValueError for more tokens than an action chunk may take.
        """
        limit = self.spec.fast.max_tokens
        n_tokens = limit if max_new_tokens is None else max_new_tokens
        if not 1 <= n_tokens <= limit:
            raise ValueError(f"max_new_tokens must be in 1..{limit}, got {n_tokens}")
        tokens, text_mask = self._text(inputs)
        valid = self.valid(inputs, text_mask)
        final, prefix = self.vlm(self.embed_images(inputs), tokens, valid)
        caches = [CachedLayer(kv, self.n_denoise_steps) for kv in prefix]

        def next_logits(token: Int[Tensor, " batch"], step: int) -> Float[Tensor, "batch d_vocab"]:
            return self.decode(self.vlm.embed_tokens(token[:, None]), step, valid, caches, self.vlm.logits)

        first = self.vlm.first_logits(final)
        return self.head(generate_greedily(first, next_logits, n_tokens, self.spec.fast.end, run))

    def _text(self, inputs: VLAInputs) -> tuple[Int[Tensor, "batch seq"], Bool[Tensor, "batch seq"]]:
        """The prompt and the start token."""
        return (
            functional.pad(inputs.tokens, (0, 1), value=self.spec.fast.start),
            functional.pad(inputs.token_mask, (0, 1), value=True),
        )

    def segments(self, inputs: VLAInputs) -> dict[str, Segments]:
        """Token segments of every stream."""
        text = [(LANGUAGE, inputs.tokens.shape[1]), (SPECIAL, 1)]
        return {
            **self.prefix_segments(inputs, text, self._text(inputs)[1]),
            "decode": Segments.from_spans([(ACTION, 1)], inputs.batch_size),
            "decode.slots": Segments.from_spans([(ACTION, self.n_denoise_steps)], inputs.batch_size),
        }


NETWORK = PiFast
