"""An encoder whose outputs join action tokens and soft prompts in one transformer."""

from dataclasses import asdict, dataclass

from hooked_vla.spec.base import ModelSpec


@dataclass(frozen=True)
class ConvTowerSpec:
    """A tower of convolutional stages whose blocks attend inside windows, then between channels; one entry a stage.

    n_heads: of the attention inside windows, n_groups: of that between channels. kernel, stride, padding: of the
    convolution that each stage starts with; prenorm: its norm stands before it. window: side of a window, in tokens.
    """

    d_model: tuple[int, ...]
    n_layers: tuple[int, ...]
    n_heads: tuple[int, ...]
    n_groups: tuple[int, ...]
    d_mlp: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    prenorm: tuple[bool, ...]
    window: int
    act: str
    eps: float


@dataclass(frozen=True)
class EncoderSpec:
    """A post-norm bidirectional transformer with learned positions. pad_token: id that fills up the text."""

    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    act: str
    eps: float
    d_vocab: int
    n_positions: int
    pad_token: int


@dataclass(frozen=True)
class PromptedExpertSpec:
    """A pre-norm bidirectional transformer over actions and everything it reads, with soft prompts for each domain.

    domain_projections: what it reads is projected by weights of the domain's own.
    """

    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    act: str
    eps: float
    n_positions: int
    n_domains: int
    n_prompts: int
    d_time: int
    domain_projections: bool


@dataclass(frozen=True)
class ResampleSpec:
    """Prediction of clean actions, re-noised with the same noise for every next step.

    mode: the public name of the action space. grippers: channels hidden from the network and squashed to 0..1 at the
    end. max_period: of the time embedding.
    """

    n_steps: int
    chunk: int
    d_action: int
    d_state: int
    mode: str
    grippers: tuple[int, ...]
    max_period: float


@dataclass(frozen=True, kw_only=True)
class PromptedVLASpec(ModelSpec):
    """An encoder over the first camera and text, and one transformer over actions, its output and the other cameras.

    n_views: cameras that the expert has places for. grid_positions: rows and columns that image features may have;
    n_times: images of one camera in time. domain_key: entry of a batch that says each row's domain.
    """

    vision: ConvTowerSpec
    grid_positions: int
    n_times: int
    vlm: EncoderSpec
    expert: PromptedExpertSpec
    sampler: ResampleSpec
    n_views: int
    domain_key: str

    def geometry(self) -> dict[str, object]:
        return {"vision": asdict(self.vision), "vlm": asdict(self.vlm), "expert": asdict(self.expert)}
