"""A sparse autoencoder: tokens into features and back, in the model's own units.

z = (y - b_dec)·w_encᵀ + b_enc        y: the token, normalised
f = a few of z, by the architecture
x̂ = f·w_dec + b_dec                   the normalisation undone
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_vla.sae.activations import Code, choose, chosen_values, decoded, spread
from hooked_vla.sae.config import SAEConfig
from hooked_vla.sae.initialise import initial_bias, initial_dictionary
from hooked_vla.sae.normalise import Normalisation, of_token
from hooked_vla.sae.splice import SpliceSAE

# tokens that are encoded at once where all features are needed; in elements of [n m], 256 MB of float32
BLOCK = 1 << 26


class SparseAutoencoder(nn.Module):
    """The weights and what they compute; see SAEConfig for what there is.

    w_enc [m d], b_enc [m], w_dec [m d_out], b_dec [d_out]; threshold: [m], or one for all of batch_topk and
    matryoshka; gated: magnitude_scale (its logarithm) and magnitude_bias, [m]. Features are active where z > threshold
    (0 for relu). Weights are float32; tokens may be narrower, and reconstructions have their dtype.
    """

    w_enc: nn.Parameter
    b_enc: Tensor
    w_dec: nn.Parameter
    b_dec: Tensor

    def __init__(self, config: SAEConfig) -> None:
        """Weights drawn from the seed; `start` fits the rest to tokens."""
        super().__init__()
        self.config = config
        m = config.n_features
        w_enc, w_dec = initial_dictionary(config)
        self.w_enc, self.w_dec = nn.Parameter(w_enc.clone()), nn.Parameter(w_dec.clone())
        self._bias("b_enc", m, config.encoder_bias)
        self._bias("b_dec", config.d_decoded, config.decoder_bias)
        self.normalisation = Normalisation(config.normalisation, config.d_model)
        if config.output_site is not None:
            self.target_normalisation = Normalisation(config.normalisation, config.d_decoded)
        if config.architecture == "jumprelu":
            first = 1.0 if config.training is None else config.training.threshold
            # wide enough for a threshold to come back as it was
            self.log_threshold = nn.Parameter(torch.full((m,), first, dtype=torch.float64).log())
        elif config.architecture in ("batch_topk", "matryoshka"):
            self.register_buffer("batch_threshold", torch.zeros(1))
        elif config.architecture == "gated":
            self.magnitude_scale = nn.Parameter(torch.zeros(m))
            self.magnitude_bias = nn.Parameter(torch.zeros(m))

    def _bias(self, name: str, width: int, there: bool) -> None:
        if there:
            setattr(self, name, nn.Parameter(torch.zeros(width)))
        else:
            self.register_buffer(name, torch.zeros(width))

    def __repr__(self) -> str:
        c = self.config
        return f"SparseAutoencoder({c.site}, {c.architecture}, {c.n_features} features of {c.d_model} channels)"

    @torch.no_grad()
    def start(self, rows: Float[Tensor, "n d"], output: Float[Tensor, "n d_out"] | None = None) -> None:
        """Fit normalisation and decoder bias to rows of the model. output: a transcoder's other site, row by row.

        Raises ValueError for other widths, and where all rows are equal.
        """
        config = self.config
        self._check_width(rows)
        self.normalisation.fit(rows, config.label)
        target = rows
        if config.output_site is not None:
            if output is None or output.shape != (len(rows), config.d_decoded):
                raise ValueError(f"{config.label}: output must be [{len(rows)} {config.d_decoded}], rows of "
                                 f"{config.output_site}")  # fmt: skip
            self.output_normalisation.fit(output, f"{config.label}: {config.output_site}")
            target = output
        if config.decoder_bias:
            target = self.output_normalisation.normalise(target.float())
            self.b_dec.copy_(initial_bias(config.schedule.initial_bias, target))

    @property
    def output_normalisation(self) -> Normalisation:
        """That of what it gives back."""
        return self.normalisation if self.config.output_site is None else self.target_normalisation

    @property
    def threshold(self) -> Float[Tensor, " m"] | Float[Tensor, " 1"]:
        """What z must exceed for a feature to be on. Raises ValueError for top-k, where it is each token's own."""
        config = self.config
        if config.architecture == "jumprelu":
            return self.log_threshold.exp().to(self.w_enc.dtype)
        if config.architecture in ("batch_topk", "matryoshka"):
            return self.get_buffer("batch_threshold")
        if config.k is not None:
            raise ValueError(f"{config.label}: the {config.k} largest features are active, whatever they are")
        return torch.zeros(1, device=self.w_enc.device)

    @property
    def by_k(self) -> bool:
        """Whether the k largest features of each token are the active ones."""
        return self.config.k is not None and self.config.architecture not in ("batch_topk", "matryoshka")

    def inputs(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """What the encoder multiplies: normalised, and without the decoder's bias if that is subtracted."""
        y = self.normalisation.normalise(x.to(self.w_enc.dtype))
        if self.config.normalisation == "token_norm":
            y = y - self.b_dec
            mean, length = of_token(y)
            return (y - mean) / length
        return y - self.b_dec if self.config.subtract_decoder_bias else y

    def encode(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch m"]:
        """All features. Differentiable. Raises ValueError for tokens of another width."""
        self._check_width(x)
        if self.by_k:
            code = self._code(x)
            return spread(code, self.config.n_features).view(*x.shape[:-1], -1)
        y = self.inputs(x)
        z = nn.functional.linear(y, self.w_enc, self.b_enc)
        if self.config.architecture == "gated":
            magnitude = nn.functional.linear(y, self.w_enc) * self.magnitude_scale.exp() + self.magnitude_bias
            return torch.where(z > 0, magnitude.relu(), 0)
        return torch.where(z > self.threshold, z, 0)

    def encode_sparse(self, x: Float[Tensor, "n d"]) -> Code:
        """The features of each token that are on: (values, indices), [n k].

        For others than top-k, k is the most that a token has, and what is short of it is filled up with value 0.
        Not differentiable. Raises ValueError for tokens of another width.
        """
        self._check_width(x)
        with torch.no_grad():
            if self.by_k:
                return self._code(x)
            parts = [self._active(part) for part in x.split(max(1, BLOCK // self.config.n_features))]
            most = max(part.values.shape[1] for part in parts)
            pad = nn.functional.pad
            values, indices = (torch.cat([pad(each[i], (0, most - each[i].shape[1])) for each in parts])
                               for i in range(2))  # fmt: skip
            return Code(values, indices)

    def _active(self, x: Tensor) -> Code:
        f = self.encode(x)
        most = max(1, int((f != 0).sum(1).max())) if len(f) else 1
        values, indices = f.topk(most, dim=1)
        return Code(values, indices.int())

    def _code(self, x: Tensor) -> Code:
        """The k largest features of each token, with gradients; x of any shape counts as [n d]."""
        config = self.config
        assert config.k is not None
        y = self.inputs(x).reshape(-1, config.d_model).contiguous()
        code = choose(y, self.w_enc, self.b_enc, config.k, config.relu)
        if not torch.is_grad_enabled():
            return code
        return Code(chosen_values(y, None, self.w_enc, self.b_enc, code, config.relu), code.indices)

    def decode(
        self, f: Float[Tensor, "*batch m"], x: Float[Tensor, "*batch d"] | None = None
    ) -> Float[Tensor, "*batch d_out"]:
        """Features back into the model's units; the inverse of `encode` as far as there is one.

        x: the tokens that were encoded; token_norm needs them, since it divides each by a number of its own.
        Raises ValueError for another number of features, and without x where that is needed.
        """
        if f.shape[-1] != self.config.n_features:
            raise ValueError(f"{self.config.label}: it has {self.config.n_features} features, got {f.shape[-1]}")
        return self._undone(f @ self.w_dec, x)

    def _undone(self, y: Tensor, x: Tensor | None) -> Tensor:
        """f·w_dec into the model's units."""
        if self.config.normalisation == "token_norm":
            if x is None:
                raise ValueError(
                    f"{self.config.label}: token_norm is undone by the tokens themselves: give x to decode"
                )
            mean, length = of_token(x.to(y.dtype) - self.b_dec)
            return y * length + mean + self.b_dec
        return self.output_normalisation.undo(y + self.b_dec)

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d_out"]:
        """The reconstruction of x, or a transcoder's prediction, in x's dtype.

        Raises ValueError for tokens of another width.
        """
        if not self.by_k:
            return self.decode(self.encode(x), x).to(x.dtype)
        self._check_width(x)
        code = self._code(x)
        y = decoded(code, self.w_dec, self.w_dec.new_zeros(self.config.d_decoded))
        return self._undone(y.view(*x.shape[:-1], -1), x).to(x.dtype)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.config.d_model:
            raise ValueError(
                f"{self.config.label}: its tokens are {self.config.d_model} wide, got {x.shape[-1]}; is it of another "
                "site or model?"
            )

    def check_fits(self, site: str, width: int) -> None:
        """Raises ValueError unless this autoencoder is of that site, and its tokens as wide."""
        if site != self.config.site:
            raise ValueError(f"the SAE is of {self.config.site} ({self.config.model}), not of {site}")
        if width != self.config.d_model:
            raise ValueError(f"{self.config.label} has tokens {self.config.d_model} wide, the model's are {width}")

    @torch.no_grad()
    def direction(self, feature: int) -> Float[Tensor, " d"]:
        """What a feature adds to a token of its site where it is 1, in the model's units; for token_norm, to a token at
        distance 1 from its centre.

        Raises ValueError for a number that is none of a feature, and for transcoders, which add to another site.
        """
        c = self.config
        if not 0 <= feature < c.n_features:
            raise ValueError(f"{c.label} has no feature {feature}: its features are 0..{c.n_features - 1}")
        if c.output_site is not None:
            raise ValueError(f"{c.label}: what a transcoder's feature adds is of {c.output_site}, not of {c.site}")
        return self.w_dec.detach()[feature] * self.normalisation.scale

    def splice(self, drop_negative: bool = False) -> SpliceSAE:
        """The same autoencoder for edits, its normalisation folded into the weights.

        drop_negative: of a top-k without ReLU, leave out what it chose below zero, which edits cannot keep; there is
        none of that while at least k features of a token are positive.
        Raises ValueError for what cannot be spliced: a transcoder gives back another site, token_norm is not the same
        for every token (use the autoencoder as a hook: `fwd_hooks=[(site, lambda value, hook: sae(value))]`), and a
        top-k without ReLU unless drop_negative.
        """
        c = self.config
        if c.output_site is not None:
            raise ValueError(f"{c.label}: a transcoder reads {c.site} and gives {c.output_site}; it cannot be spliced")
        if c.normalisation == "token_norm":
            raise ValueError(
                f"{c.label}: token_norm is each token's own and does not fold into weights; use the autoencoder as a "
                "hook: fwd_hooks=[(site, lambda value, hook: sae(value))]"
            )
        if not c.relu and not drop_negative:
            raise ValueError(f"{c.label}: top-k without ReLU keeps features below zero, edits do not; "
                             "drop_negative=True leaves them out")  # fmt: skip
        weights = folded(self)
        m = c.n_features
        return SpliceSAE(
            weights["w_enc"], weights["b_enc"], weights["w_dec"], weights["b_dec"],
            threshold=None if self.by_k else weights["threshold"].expand(m), k=c.k if self.by_k else None,
        )  # fmt: skip

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
        """Write config.json and sae.safetensors; see `files.save`. dtype: of the weights in the file."""
        from hooked_vla.sae.files import save

        save(self, Path(folder), dtype)

    @classmethod
    def from_pretrained(cls, folder_or_name: str | Path, device: str | torch.device = "cpu") -> "SparseAutoencoder":
        """Read what `save_pretrained` wrote, or one that comes with the package, `<model>/<site>`.

        Raises FileNotFoundError naming what there is, ValueError for files that are damaged.
        """
        from hooked_vla.sae.files import load

        return load(cls, folder_or_name, device)


@torch.no_grad()
def folded(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """w_enc, b_enc, w_dec, b_dec and, but for top-k, threshold, for tokens in the model's units.

    The encoder is z = (x - b_dec)·w_encᵀ + b_enc, and a feature is z where it exceeds its threshold; gated
    autoencoders are written that way too. Not for token_norm and transcoders.
    """
    c = sae.config
    w_enc, b_enc, w_dec, b_dec = (each.double() for each in (sae.w_enc, sae.b_enc, sae.w_dec, sae.b_dec))
    if not c.subtract_decoder_bias:
        b_enc = b_enc + w_enc @ b_dec
    threshold = None if sae.by_k else sae.threshold.double()
    if c.architecture == "gated":
        # the gate, w·y + b_enc > 0, in terms of z = e^r·w·y + magnitude_bias
        factor = sae.magnitude_scale.double().exp()
        threshold = (sae.magnitude_bias.double() - factor * b_enc).clamp_min(0)
        w_enc, b_enc = w_enc * factor[:, None], sae.magnitude_bias.double()
    mean, scale = sae.normalisation.mean.double(), sae.normalisation.scale.double()
    found = {"w_enc": w_enc / scale, "b_enc": b_enc, "w_dec": w_dec * scale, "b_dec": b_dec * scale + mean}
    if threshold is not None:
        found["threshold"] = threshold
    return {name: each.to(sae.w_enc.dtype).contiguous() for name, each in found.items()}
