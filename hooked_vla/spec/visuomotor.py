"""Policies without language: image trunk, then a transformer, a U-Net or a code predictor."""

from dataclasses import dataclass

from hooked_vla.spec.base import ModelSpec


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
