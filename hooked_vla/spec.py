"""Frozen descriptions of models: sizes, choices between components, key rules. Standard library only.

A file in model_specs holds one literal VLASpec at the published size. Loading a checkpoint replaces the sizes in
it by those that the checkpoint states; nothing else is decided anywhere but here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class VisionSpec:
    """A pre-norm vision transformer. image_size is that of the position table, in pixels."""

    image_size: int
    patch_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_mlp: int
    act: str
    eps: float


@dataclass(frozen=True)
class ConnectorSpec:
    """Space-to-depth by `scale` on both sides, then one linear map to the language width."""

    scale: int
    bias: bool


@dataclass(frozen=True)
class DecoderSpec:
    """A pre-norm RMSNorm transformer with grouped-query attention, rotary positions and a gated MLP."""

    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    d_mlp: int
    act: str
    eps: float
    rope_base: float
    d_vocab: int | None = None


@dataclass(frozen=True)
class ExpertSpec:
    """An action expert that reads the language model's cached keys and values.

    schedule: per layer "joint" (attends to prefix and own tokens) or "cross" (attends to the prefix only).
    """

    decoder: DecoderSpec
    schedule: tuple[str, ...]


@dataclass(frozen=True)
class FlowSpec:
    """Flow matching from noise (t = 1) to actions (t = 0) by Euler steps; widths are the padded ones."""

    n_steps: int
    chunk: int
    d_action: int
    d_state: int
    min_period: float
    max_period: float


@dataclass(frozen=True)
class PrefixSpec:
    """Layout of the language model's tokens: how the prefix is put together.

    image_start, image_end: token ids around each image; empty when the images stand bare.
    min_length: the prefix is padded up to this many tokens; -1 or 0 for no padding.
    """

    image_start: tuple[int, ...] = ()
    image_end: tuple[int, ...] = ()
    min_length: int = -1


@dataclass(frozen=True)
class FeatureSpec:
    """What the robot side looks like; a checkpoint's own files decide it.

    cameras: names in the order that the model reads them. resize: (width, height) or None.
    d_state, d_action: the robot's real widths. normalization: feature kind -> LeRobot's mode name.
    empty_cameras: how many missing cameras may be replaced by masked blank images. rename: key of a raw batch ->
    the key that this checkpoint knows it by. n_obs_steps: how many observations the policy sees at once, the last
    ones. d_environment: width of `observation.environment_state`, 0 without it (d_state may be 0 too).
    """

    cameras: tuple[str, ...]
    d_state: int
    d_action: int
    resize: tuple[int, int] | None
    empty_cameras: int
    n_action_steps: int
    max_text: int
    pad_text: str
    tokenizer: str
    normalization: Mapping[str, str] = field(default_factory=dict)
    rename: Mapping[str, str] = field(default_factory=dict)
    n_obs_steps: int = 1
    d_environment: int = 0


@dataclass(frozen=True)
class CheckpointSpec:
    """One published checkpoint and what distinguishes it."""

    repo_id: str
    note: str


@dataclass(frozen=True)
class Transposed:
    """A checkpoint tensor that fills its parameter with the last two axes exchanged."""

    target: str


@dataclass(frozen=True)
class Split:
    """A checkpoint tensor whose equal parts along the first axis fill several parameters, such as fused q, k, v."""

    targets: tuple[str, ...]


# "{}" stands for a number, "{+1}" for one that is ours plus 1; a tuple offers alternatives, of which the one that
# exists is meant; None: known, dropped
KeyTarget = str | tuple[str, ...] | Transposed | Split | None


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What every model states, whatever its wiring; each family adds its sizes in a subclass.

    family names the file in models/; config_type is how the public config.json announces it. keys maps the
    public checkpoint's key prefix ("a|b": either, the first is written) -> rest of key -> our parameter. fp32
    lists the modules that stay in float32 whatever the model's dtype; tied maps a parameter to the one it shares
    where the checkpoint holds none of its own. parts: what has files of its own beside the weights
    (part_files.py); a checkpoint with one of them is this model rather than another of the same config_type.
    """

    name: str
    family: str
    config_type: str
    description: str
    paper: str
    licence: str
    source: str
    n_parameters: int
    checkpoints: tuple[CheckpointSpec, ...]
    features: FeatureSpec
    keys: Mapping[str, Mapping[str, KeyTarget]]
    fp32: tuple[str, ...] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    def geometry(self) -> dict[str, object]:
        """The sizes that a public config.json leaves out, as `geometry.json` holds them."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class FlowVLASpec(ModelSpec):
    """A language model over images, text and state, whose keys and values a flow-matching action expert reads."""

    vision: VisionSpec
    connector: ConnectorSpec
    vlm: DecoderSpec
    expert: ExpertSpec
    flow: FlowSpec
    prefix: PrefixSpec

    def geometry(self) -> dict[str, object]:
        return {
            "vision": asdict(self.vision),
            "connector": asdict(self.connector),
            "vlm": asdict(self.vlm),
            "expert": {**asdict(self.expert.decoder), "schedule": list(self.expert.schedule)},
            "prefix": {
                "image_start": list(self.prefix.image_start),
                "image_end": list(self.prefix.image_end),
            },
        }


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
        }


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


@dataclass(frozen=True)
class ResNetSpec:
    """A residual convolutional trunk of basic blocks: a 7 × 7 stem, then four stages.

    image_size: (height, width) of the cameras' images in pixels. norm: "frozen_batch", "batch" or "group".
    """

    image_size: tuple[int, int]
    widths: tuple[int, int, int, int]
    n_blocks: tuple[int, int, int, int]
    norm: str
    eps: float


@dataclass(frozen=True)
class EncoderDecoderSpec:
    """A transformer encoder over observation tokens and a decoder whose queries are the action steps."""

    d_model: int
    n_heads: int
    d_mlp: int
    n_encoder_layers: int
    n_decoder_layers: int
    act: str
    eps: float
    pre_norm: bool


@dataclass(frozen=True)
class LatentSpec:
    """A latent variable, 0 when acting. n_vae_layers: depth of the encoder that training draws it from; 0 without."""

    d_latent: int
    n_vae_layers: int


@dataclass(frozen=True, kw_only=True)
class ChunkTransformerSpec(ModelSpec):
    """Convolutional image features, state and a latent into an encoder–decoder that regresses a whole chunk."""

    vision: ResNetSpec
    transformer: EncoderDecoderSpec
    latent: LatentSpec
    chunk: int

    def geometry(self) -> dict[str, object]:
        return {}


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


@dataclass(frozen=True)
class KeypointSpec:
    """Spatial softmax over a feature map. resize, then crop the images first: (height, width), or None for neither."""

    n_keypoints: int
    resize: tuple[int, int] | None
    crop: tuple[int, int] | None


@dataclass(frozen=True)
class UNetSpec:
    """A convolutional U-Net over time, told by FiLM. film_scale: it scales the features, besides shifting them."""

    widths: tuple[int, ...]
    kernel_size: int
    n_groups: int
    d_time: int
    film_scale: bool


@dataclass(frozen=True)
class SamplerSpec:
    """Diffusion. kind: "ddpm" or "ddim"; schedule: diffusers' name; prediction: "epsilon" or "sample".

    clip: clean actions are held in -clip..clip at every step; None: they are not.
    """

    kind: str
    n_train_steps: int
    n_steps: int
    schedule: str
    beta_start: float
    beta_end: float
    prediction: str
    clip: float | None


@dataclass(frozen=True, kw_only=True)
class DiffusionPolicySpec(ModelSpec):
    """Keypoints of several images and states, which condition a U-Net that denoises `horizon` actions.

    encoder_per_camera: each camera has an encoder of its own.
    """

    vision: ResNetSpec
    keypoints: KeypointSpec
    encoder_per_camera: bool
    unet: UNetSpec
    sampler: SamplerSpec
    horizon: int

    def geometry(self) -> dict[str, object]:
        return {}


@dataclass(frozen=True)
class CausalSpec:
    """A pre-norm causal transformer over given vectors. d_in, d_out: widths before and after it; n_positions: of its
    table."""

    d_in: int
    d_model: int
    d_out: int
    n_layers: int
    n_heads: int
    d_mlp: int
    act: str
    eps: float
    n_positions: int


@dataclass(frozen=True)
class CodeSpec:
    """Actions as codes of a residual quantiser, drawn at `temperature`, and offsets to them.

    d_hidden: of the quantiser's encoder and decoder. sequential: each code is predicted after the one before it.
    chunk: actions a code stands for. n_ahead: queries for chunks after the present one.
    """

    n_codebooks: int
    n_codes: int
    d_code: int
    d_hidden: int
    sequential: bool
    temperature: float
    chunk: int
    n_ahead: int


@dataclass(frozen=True, kw_only=True)
class CodePolicySpec(ModelSpec):
    """Keypoints, states and action queries of several steps through a causal transformer that predicts action codes."""

    vision: ResNetSpec
    keypoints: KeypointSpec
    expert: CausalSpec
    codes: CodeSpec

    def geometry(self) -> dict[str, object]:
        return {}
