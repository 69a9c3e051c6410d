"""A language model that says its actions itself, as tokens or through a head on its hidden states."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from hooked_vla.spec.base import DecoderSpec, ModelSpec, VisionSpec


@dataclass(frozen=True)
class TowerSpec(VisionSpec):
    """A vision transformer whose next-to-last block's output is read, without the final norm.

    n_prefix_tokens: class token and registers before the patches. attention_pool: the checkpoint holds a pooling
    head, which nothing reads. mean, std: of the channels in 0..1, as the tower was trained.
    """

    n_prefix_tokens: int
    layer_scale: bool
    attention_pool: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True)
class PromptSpec:
    """How an instruction becomes token ids.

    template: with {} for the instruction in lower case. start: the first id. end: the id that every prompt ends
    with. stop: the id after the actions, where they are read in one pass.
    """

    template: str
    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class ReadoutSpec:
    """How a language model's outputs become a chunk of actions.

    kind: "generate" (one token after another), "parallel" (every token in one bidirectional pass), "regress" (an
    MLP reads that pass's last hidden states) or "diffuse" (the same MLP predicts noise, and the language model runs
    at every denoise step).
    chunk, d_action: steps, and action tokens a step. d_state: width of the state token's input, 0 for no such token.
    n_bins: edges of the bins of -1..1 that action tokens stand for; n_padding_ids: unused ids at the vocabulary's
    end, right before which the action tokens are. d_hidden, n_layers: of the MLP. n_steps: denoise steps.
    bounds: the statistics that -1 and 1 stand for.
    """

    kind: str
    chunk: int
    d_action: int
    d_state: int
    n_bins: int
    n_padding_ids: int
    bounds: tuple[str, str]
    d_hidden: int = 0
    n_layers: int = 0
    n_steps: int = 1


@dataclass(frozen=True, kw_only=True)
class LanguageVLASpec(ModelSpec):
    """Image towers, an MLP to the width of a language model, and the language model that says the actions itself.

    towers: by name, in the order of their channels. connector: widths of its hidden layers. film: the towers are
    modulated by the mean of the prompt's embeddings.
    """

    towers: Mapping[str, TowerSpec]
    connector: tuple[int, ...]
    film: bool
    vlm: DecoderSpec
    prompt: PromptSpec
    readout: ReadoutSpec

    def geometry(self) -> dict[str, object]:
        return {
            "vision": {name: asdict(tower) for name, tower in self.towers.items()},
            "connector": {"hidden": list(self.connector), "film": self.film},
            "vlm": asdict(self.vlm),
            "prompt": asdict(self.prompt),
            "readout": {**asdict(self.readout), "bounds": list(self.readout.bounds)},
            "cameras": list(self.features.cameras),
            "tokenizer": self.features.tokenizer,
            "pad_text": self.features.pad_text,
            "n_action_steps": min(self.features.n_action_steps, self.readout.chunk),
        }
