"""What every model states, and the parts that several wirings share."""

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


# "{}" stands for a number; a tuple offers alternatives, of which the one that exists is meant; None: known, dropped
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
