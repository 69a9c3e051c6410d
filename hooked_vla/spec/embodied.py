"""A vision-language model whose features a diffusion transformer reads, with weights for each embodiment."""

from dataclasses import asdict, dataclass

from hooked_vla.spec.base import DecoderSpec, ModelSpec, VisionSpec


@dataclass(frozen=True)
class PatchVisionSpec:
    """A pre-norm vision transformer over patches given as vectors, merge × merge neighbours following each other.

    grid: side of the position table, which is interpolated. frames: how often each image stands in its patches.
    taps: blocks whose outputs the language model's first layers receive besides the tower's last.
    """

    patch_size: int
    frames: int
    grid: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    act: str
    eps: float
    rope_base: float
    merge: int
    taps: tuple[int, ...]


@dataclass(frozen=True)
class AdapterSpec:
    """A norm, then self-attention blocks without mask or positions, between language model and expert."""

    n_layers: int
    n_heads: int
    d_head: int
    d_mlp: int
    act: str
    eps: float


@dataclass(frozen=True)
class DiTSpec:
    """A diffusion transformer over state, learned and action tokens, its norms adaptive to the time.

    schedule: per block "self", or "cross" to the prefix features, or "cross:image", "cross:text" to some of them.
    d_out: width of its outputs, which the action decoder reads. eps: of the norms before MLPs; eps_ada: of the
    adaptive norms before attention; eps_final: of the last.
    """

    schedule: tuple[str, ...]
    d_model: int
    n_heads: int
    d_head: int
    d_mlp: int
    d_out: int
    act: str
    eps: float
    eps_ada: float
    eps_final: float


@dataclass(frozen=True)
class EmbodimentFlowSpec:
    """Flow matching from noise (t = 0) to actions (t = 1), with encoders and decoders for each embodiment.

    d_state, d_action: padded widths; n_state_steps states are read at once. n_buckets: whole times per unit.
    d_hidden: hidden width of the state encoder and the action decoder. n_future: learned tokens beside the actions.
    n_positions: rows of the table of action positions, 0 without. embodiment: which one unless a batch says so.
    train_times: what the ends 0 and 1 of the Beta distribution that training draws from become.
    """

    n_steps: int
    chunk: int
    d_action: int
    d_state: int
    n_state_steps: int
    n_buckets: int
    n_embodiments: int
    embodiment: int
    d_hidden: int
    n_future: int
    n_positions: int
    train_times: tuple[float, float]


@dataclass(frozen=True)
class ChatSpec:
    """How an instruction and camera images become the language model's tokens, and images become pixels.

    start, then each image's tokens between image_start and image_end ("{}" is its number, from 1), the instruction,
    end; padded on the left. listed: the instruction is spelled as Python spells a list of it. formal: in lower case,
    without punctuation. crop: share of the image's sides that is kept of its middle before it is scaled back.
    pixels: least and most pixels of an image, whose sides are made multiples of a token's; None where any do.
    """

    start: str
    image_start: str
    image_end: str
    end: str
    listed: bool
    formal: bool
    crop: float
    pixels: tuple[int, int] | None


@dataclass(frozen=True, kw_only=True)
class FeatureVLASpec(ModelSpec):
    """A causal language model over images and text, whose output features a diffusion transformer attends to.

    vision_pool: the checkpoint carries the vision tower's pooling head, which nothing reads. rope_sections: how many
    rotary frequencies turn with a token's time, row and column; empty where positions are counted. final_norm: the
    features are those after the language model's last norm. image_token: id of the places that image tokens take.
    padding_attends_evenly: a token padded on the left, which may see nothing, attends to all tokens evenly (as eager
    attention does) rather than to none (as fused kernels do); its features reach the expert.
    """

    vision: VisionSpec | PatchVisionSpec
    vision_pool: bool
    vlm: DecoderSpec
    rope_sections: tuple[int, ...]
    final_norm: bool
    padding_attends_evenly: bool
    image_token: int
    adapter: AdapterSpec | None
    expert: DiTSpec
    flow: EmbodimentFlowSpec
    chat: ChatSpec

    def geometry(self) -> dict[str, object]:
        return {
            "vision": asdict(self.vision),
            "vlm": asdict(self.vlm),
            "rope_sections": list(self.rope_sections),
            "padding_attends_evenly": self.padding_attends_evenly,
            "image_token": self.image_token,
            "embodiment": self.flow.embodiment,
            "chat": asdict(self.chat),
            "features": asdict(self.features),
        }
