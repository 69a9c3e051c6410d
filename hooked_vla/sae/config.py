"""What a sparse autoencoder is and how it was trained: frozen data that is stored beside the weights as JSON."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from typing import Any

from hooked_vla.sae.rows import POOLING

# what makes a code sparse, and what else is special of the training
ARCHITECTURES = {
    "relu": "ReLU, L1 penalty on the code (arXiv 2309.08600)",
    "topk": "the k largest of each token (arXiv 2406.04093)",
    "batch_topk": "the n·k largest of n tokens; one threshold for all when used (arXiv 2412.06410)",
    "jumprelu": "a learned threshold for each feature, L0 penalty (arXiv 2407.14435)",
    "gated": "one half says which features are on, the other how much (arXiv 2404.16014)",
    "matryoshka": "batch_topk whose first features have to do without the later ones (arXiv 2503.17547)",
    "transcoder": "predicts another site's activation; topk with k, else relu (arXiv 2406.11944)",
    "temporal": "topk, codes of a token at adjacent steps drawn together (arXiv 2511.05541)",
}
# architectures that are told how many features to use
WITH_K = ("topk", "batch_topk", "matryoshka", "temporal")
# what tokens are divided by (and what is taken off before), so that training does not see the model's units
NORMALISATIONS = {
    "none": "tokens as they are",
    "zscore": "every channel: its mean off, over its standard deviation",
    "mean_norm": "over one number: the mean length of a token becomes √d",
    "mean_square": "over one number: the mean squared length of a token becomes 1",
    "token_norm": "every token: b_dec and the mean of its channels off, over its own length",
}
LOSSES = {
    "mse": "squared error, the mean over channels",
    "sum": "squared error, the sum over channels",
    "fvu": "squared error over the variance of the tokens that training began with",
}
BIASES = ("geometric_median", "mean", "zeros")


@dataclass(frozen=True, kw_only=True)
class Training:
    """How an autoencoder is trained. Rows are tokens (or means of tokens).

    steps, each on batch_size rows; the learning rate rises over `warmup` steps to `rate` and from `decay_from` on falls
    in a line to zero. clip: of the gradient's norm, None for not at all. loss: one of LOSSES; penalty: weight of the
    L1 (relu, gated; lengths of decoder rows count in) or L0 (jumprelu) term, which grows over `penalty_warmup` steps.
    A feature is dead that was not active in the last `dead_after` rows; the aux_k largest of the dead ones reconstruct
    what is left of a token, which counts with aux_weight (AuxK; aux_k 0: not). Every `resample_every` steps until
    `resample_until` dead features start anew on tokens that are reconstructed badly (0: never).
    init_rows: tokens from which normalisation and initial_bias are found; decoder_length: of decoder rows at first;
    encoder_scale: the encoder starts as that times the decoder's transpose. threshold, bandwidth: jumprelu's first
    threshold, and the width of the kernel that stands in for a step's derivative. contrast, temperature: temporal's
    InfoNCE term.
    """

    steps: int
    batch_size: int
    rate: float
    seed: int
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    warmup: int = 0
    decay_from: int | None = None
    clip: float | None = None
    loss: str = "fvu"
    penalty: float = 0.0
    penalty_warmup: int = 0
    aux_k: int = 0
    aux_weight: float = 1 / 32
    dead_after: int = 10_000_000
    resample_every: int = 0
    resample_until: int | None = None
    init_rows: int = 10_000
    initial_bias: str = "geometric_median"
    decoder_length: float = 1.0
    encoder_scale: float = 1.0
    threshold: float = 0.001
    bandwidth: float = 0.001
    contrast: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        """Raises ValueError for figures out of range, naming them."""
        _at_least(self, 1, "steps", "batch_size", "dead_after", "init_rows")
        _at_least(self, 0, "warmup", "penalty_warmup", "penalty", "aux_k", "aux_weight", "resample_every", "contrast")
        _one_of(self, "loss", LOSSES)
        _one_of(self, "initial_bias", BIASES)
        for name in ("rate", "eps", "decoder_length", "encoder_scale", "threshold", "bandwidth", "temperature"):
            if not (isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {self.betas}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None, got {self.clip}")

    def factor(self, step: int) -> float:
        """Share of the learning rate at a step, counted from 0."""
        rising = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        start = self.steps if self.decay_from is None else self.decay_from
        falling = 1.0 if step < start else (self.steps - step) / (self.steps - start + 1)
        return rising * max(falling, 0.0)

    def penalty_at(self, step: int) -> float:
        """Weight of the sparsity term at a step, counted from 0."""
        return self.penalty * (min(1.0, (step + 1) / self.penalty_warmup) if self.penalty_warmup else 1.0)


@dataclass(frozen=True, kw_only=True)
class SAEConfig:
    """A sparse autoencoder of a site: what is needed to use it, and how it was trained.

    model: the checkpoint whose activations it is of; site: their hook point, d_model wide. architecture: one of
    ARCHITECTURES; k: how many features a token has (on average, for batch_topk and matryoshka), None elsewhere.
    relu: whether top-k raises what it chose to zero where that is below. normalisation: one of NORMALISATIONS, what it
    needs is stored with the weights. encoder_bias, decoder_bias: whether there are such; the decoder's is taken off
    tokens before they are encoded if subtract_decoder_bias. unit_decoder: whether decoder rows are kept at length 1.
    pooling: what a row was in training; training: None where others trained it. output_site, d_output: what a
    transcoder predicts. prefixes: matryoshka's numbers of features, ascending up to n_features.
    """

    model: str
    site: str
    d_model: int
    n_features: int
    architecture: str
    normalisation: str
    training: Training | None
    k: int | None = None
    relu: bool = True
    encoder_bias: bool = True
    decoder_bias: bool = True
    subtract_decoder_bias: bool = True
    unit_decoder: bool = True
    pooling: str = "token"
    output_site: str | None = None
    d_output: int | None = None
    prefixes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for values that are unknown or do not go together, naming them."""
        _at_least(self, 1, "d_model", "n_features")
        _one_of(self, "architecture", ARCHITECTURES)
        _one_of(self, "normalisation", NORMALISATIONS)
        _one_of(self, "pooling", POOLING)
        self._check_k()
        self._check_prefixes()
        self._check_biases()

    def _check_biases(self) -> None:
        transcodes = self.architecture == "transcoder"
        if transcodes != (self.output_site is not None) or transcodes != (self.d_output is not None):
            raise ValueError(f"{self.label}: output_site and d_output are a transcoder's, and it needs both")
        if self.normalisation == "token_norm" and transcodes:
            raise ValueError(f"{self.label}: token_norm cannot be undone at another site; choose another normalisation")
        if self.normalisation == "token_norm" and self.architecture != "topk":
            raise ValueError(f"{self.label}: token_norm goes with topk, as in the preset that it is of")
        if not self.relu and (self.k is None or self.architecture not in ("topk", "temporal")):
            raise ValueError(f"{self.label}: relu=False goes with topk and temporal only")
        if self.architecture == "gated" and not self.subtract_decoder_bias:
            raise ValueError(f"{self.label}: gated needs subtract_decoder_bias")
        if transcodes and self.subtract_decoder_bias:
            raise ValueError(
                f"{self.label}: a transcoder's decoder bias is of another site: subtract_decoder_bias=False"
            )
        if self.normalisation == "token_norm" and not (self.decoder_bias and self.subtract_decoder_bias):
            raise ValueError(f"{self.label}: token_norm needs decoder_bias and subtract_decoder_bias")
        if self.architecture in ("relu", "gated", "jumprelu") and not self.encoder_bias:
            raise ValueError(f"{self.label}: {self.architecture} needs encoder_bias, which is where features begin")

    def _check_k(self) -> None:
        needs = self.architecture in WITH_K
        if needs and self.k is None:
            raise ValueError(f"{self.label}: {self.architecture} needs k")
        if self.k is not None and not needs and self.architecture != "transcoder":
            raise ValueError(f"{self.label}: {self.architecture} has no k; training.penalty makes it sparse")
        if self.k is not None and not 1 <= self.k <= self.n_features:
            raise ValueError(f"{self.label}: k must be in 1..{self.n_features}, the number of features, got {self.k}")

    def _check_prefixes(self) -> None:
        if (self.architecture == "matryoshka") != (self.prefixes is not None):
            raise ValueError(f"{self.label}: prefixes are matryoshka's, which needs them")
        if self.prefixes is None:
            return
        ascending = all(a < b for a, b in zip((0, *self.prefixes), self.prefixes, strict=False))
        if not ascending or self.prefixes[-1] != self.n_features:
            raise ValueError(f"{self.label}: prefixes must ascend from 1 or more to {self.n_features}, "
                             f"got {list(self.prefixes)}")  # fmt: skip

    @property
    def schedule(self) -> Training:
        """How it is trained. Raises ValueError where that is not known."""
        if self.training is None:
            raise ValueError(f"{self.label}: how it was trained is not known, so it cannot be trained on")
        return self.training

    @property
    def label(self) -> str:
        """What it is of, for messages."""
        return f"SAE of {self.site}"

    @property
    def d_decoded(self) -> int:
        """Width of what it gives back."""
        return self.d_output or self.d_model

    @property
    def target(self) -> str:
        """The site that it gives back."""
        return self.output_site or self.site

    def changed(self, **changes: Any) -> "SAEConfig":
        """The same with other values; those of `training` go by their own names.

        Raises TypeError for an unknown name, ValueError as the constructor does.
        """
        own = {field.name for field in fields(self)}
        inner = {name: changes.pop(name) for name in list(changes) if name not in own}
        if unknown := sorted(set(inner) - {field.name for field in fields(Training)}):
            raise TypeError(f"unknown settings {unknown}")
        return replace(self, **changes, training=replace(changes.get("training", self.schedule), **inner)) \
            if inner else replace(self, **changes)  # fmt: skip

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> "SAEConfig":
        """Read what `to_json` wrote. Raises ValueError naming what is damaged, unknown or missing."""
        try:
            found = json.loads(text)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"the config is not JSON: {error}") from error
        if not isinstance(found, dict) or not isinstance(found.get("training"), dict | None):
            raise ValueError('the config must be an object with "training", another one or null')
        training = found.get("training")
        made = None if training is None else _made(Training, _exactly(Training, training))
        return _made(cls, {**_exactly(cls, found), "training": made})


def _exactly(kind: type, found: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(found) - known):
        raise ValueError(f"the config has unknown entries {unknown}")
    # JSON has no tuples
    return {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}


def _made(kind: Any, found: Mapping[str, Any]) -> Any:
    try:
        return kind(**found)
    except TypeError as error:
        raise ValueError(f"the config is incomplete or has values of wrong kinds: {error}") from error


def _at_least(config: Any, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value >= least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _one_of(config: Any, name: str, known: Any) -> None:
    if getattr(config, name) not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {getattr(config, name)!r}")
