"""A language-model prefix read by joint attention, or continued by action tokens."""

from dataclasses import asdict, dataclass

from hooked_vla.spec.base import DecoderSpec, FlowSpec, ModelSpec, VisionSpec


@dataclass(frozen=True, kw_only=True)
class PrefixVLASpec(ModelSpec):
    """A language model over a prefix of images and text that all see each other.

    template: of the prompt, with {task} and, where the state is told as text, {state} (bins 0..255 of -1..1).
    """

    vision: VisionSpec
    vlm: DecoderSpec
    template: str

    def geometry(self) -> dict[str, object]:
        text = {"tokenizer": self.features.tokenizer, "pad": self.features.pad_text}
        return {"vision": asdict(self.vision), "vlm": asdict(self.vlm), "text": text}


@dataclass(frozen=True, kw_only=True)
class JointFlowVLASpec(PrefixVLASpec):
    """A flow-matching expert that attends to the prefix and to its own tokens in every layer.

    state_input: "token" (the expert's first token) or "text" (in the prompt only). time_input: "tokens" (mixed into
    every action token) or "adaptive_norm" (scale, shift and gate of the expert's norms).
    """

    expert: DecoderSpec
    flow: FlowSpec
    state_input: str
    time_input: str

    def geometry(self) -> dict[str, object]:
        return {**super().geometry(), "expert": asdict(self.expert)}


@dataclass(frozen=True)
class FastSpec:
    """Actions as text: cosine coefficients of the chunk, packed into tokens (FAST, arXiv 2501.09747).

    max_tokens: how many are generated. start: id after the prompt. end: id that ends the actions, None where only
    the tokenizer says. skip: unused ids at the vocabulary's end, before which the action tokens count down.
    tokenizer: of the actions. prefix: text that generated actions start with; required: refuse any others.
    """

    max_tokens: int
    start: int
    end: int | None
    skip: int
    tokenizer: str
    prefix: str
    required: bool


@dataclass(frozen=True, kw_only=True)
class FastVLASpec(PrefixVLASpec):
    """The language model generates the actions as tokens after the prefix. d_state, d_action: padded widths."""

    fast: FastSpec
    d_state: int
    d_action: int
    chunk: int

    def geometry(self) -> dict[str, object]:
        return {**super().geometry(), "fast": {"start": self.fast.start, "end": self.fast.end}}
