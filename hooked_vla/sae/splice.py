"""A sparse autoencoder as edits use it: its weights, and features edited or tokens reconstructed by `kernels`.

    z = (x - b_dec)·w_encᵀ + b_enc
    f = z where z > threshold else 0            (JumpReLU; ReLU with threshold 0; BatchTopK at inference)
      = max(z, 0) where z is one of the k largest, else 0                                          (TopK)
    x̂ = f·w_dec + b_dec

Normalisations that are affine and the same for every token (`normalised_by`) fold into the weights.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int32
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_vla.hooks.cache_file import write_safetensors
from hooked_vla.kernels import delta_splice, fold_bias, sae_splice
from hooked_vla.kernels.checks import wide
from hooked_vla.kernels.delta_splice import MAX_FEATURES, splice_edit

FORMAT = "hooked-vla splice 1"
_WEIGHTS = ("w_enc", "b_enc", "w_dec", "b_dec")


@dataclass(frozen=True, eq=False)
class SpliceSAE:
    """Weights of a sparse autoencoder; exactly one of `threshold` and `k` says which features are active.

    w_enc, w_dec: the features' encoder and decoder rows. file: where it is kept, for JSON that refers to it.
    Two are equal when all their numbers are.
    """

    w_enc: Float[Tensor, "m d"]
    b_enc: Float[Tensor, " m"]
    w_dec: Float[Tensor, "m d"]
    b_dec: Float[Tensor, " d"]
    threshold: Float[Tensor, " m"] | None = None
    k: int | None = None
    file: Path | None = None

    def __post_init__(self) -> None:
        """Raises ValueError for shapes that do not fit together, NaN, and for both or neither of threshold and k."""
        if self.w_enc.ndim != 2:
            raise ValueError(f"SAE: w_enc must be [m d], got {list(self.w_enc.shape)}")
        m, d = self.w_enc.shape
        shapes = {"w_dec": (m, d), "b_enc": (m,), "b_dec": (d,)} | (
            {} if self.threshold is None else {"threshold": (m,)}
        )
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(
                    f"SAE: {name} must be {list(shape)} beside w_enc [{m} {d}], got {list(getattr(self, name).shape)}"
                )
        if (self.threshold is None) == (self.k is None):
            raise ValueError("SAE: give exactly one of threshold (JumpReLU, ReLU, BatchTopK) and k (TopK)")
        if self.k is not None and not 1 <= self.k <= m:
            raise ValueError(f"SAE: k must be in 1..{m}, the number of features, got {self.k}")
        for name, tensor in self.tensors().items():
            # detached: splicing does not train the autoencoder
            object.__setattr__(self, name, tensor.detach().contiguous())
            if bool(tensor.isnan().any()) or (name != "threshold" and not bool(tensor.isfinite().all())):
                raise ValueError(f"SAE: {name} holds NaN or infinity")

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that there are."""
        named = {name: getattr(self, name) for name in _WEIGHTS}
        return named if self.threshold is None else named | {"threshold": self.threshold}

    @property
    def d_model(self) -> int:
        return self.w_enc.shape[1]

    @property
    def n_features(self) -> int:
        return self.w_enc.shape[0]

    @cached_property
    def sha256(self) -> str:
        """Over k, and name, dtype, shape and bytes of every tensor."""
        found = hashlib.sha256(f"k={self.k}\n".encode())
        for name, tensor in self.tensors().items():
            found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            found.update(tensor.cpu().view(-1).view(torch.uint8).numpy().data)
        return found.hexdigest()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SpliceSAE):
            return NotImplemented
        return self is other or self.sha256 == other.sha256

    def __hash__(self) -> int:
        return hash((tuple(self.w_enc.shape), self.k))

    def __repr__(self) -> str:
        kind = "threshold" if self.k is None else f"TopK {self.k}"
        return f"SAE[{self.n_features} {self.d_model}, {kind}]"

    def normalised_by(
        self, mean: Float[Tensor, " d"], std: Float[Tensor, " d"] | Float[Tensor, " 1"]
    ) -> "SpliceSAE":  # fmt: skip
        """The same autoencoder for tokens as the model has them, where it was trained on (x - mean) / std.

        std may have one number for all channels, [1]. Raises ValueError for other widths.
        """
        d = self.d_model
        if mean.shape != (d,) or std.shape not in ((d,), (1,)) or not bool((std > 0).all()):
            raise ValueError(
                f"SAE: mean must be [{d}] and std [{d}] or [1] and positive, got {list(mean.shape)}, {list(std.shape)}"
            )
        mean, std = mean.double(), std.double().expand(d)
        w_enc, w_dec = self.w_enc.double() / std, self.w_dec.double() * std
        # (x - mean) / std - b_dec = (x - (mean + std·b_dec)) / std
        b_dec = self.b_dec.double() * std + mean
        cast = {"w_enc": w_enc, "w_dec": w_dec, "b_dec": b_dec}
        return replace(self, **{name: t.to(getattr(self, name).dtype) for name, t in cast.items()}, file=None)

    def to(self, dtype: torch.dtype) -> "SpliceSAE":
        """The same autoencoder with its encoder and decoder rounded to a dtype; biases and thresholds stay as they are.

        With the dtype of a bfloat16 model, encodings of the whole dictionary run on a GPU's tensor cores, and it takes
        half the memory; pre-activations are then those of rounded weights, in which other features may be among the k.
        Raises TypeError for a dtype that holds no fractions.
        """
        if not dtype.is_floating_point:
            raise TypeError(f"SAE: dtype must be a floating-point one, got {dtype}")
        return replace(self, w_enc=self.w_enc.to(dtype), w_dec=self.w_dec.to(dtype), file=None)

    def save(self, path: str | Path) -> "SpliceSAE":
        """Write a safetensors file, which appears when complete; returns the autoencoder that knows it."""
        path = Path(path)
        metadata = {"format": FORMAT, "splice": json.dumps({"k": self.k})}
        entries = [(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in self.tensors().items()]
        write_safetensors(path, entries, metadata)
        return replace(self, file=path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> "SpliceSAE":
        """Read what `save` wrote.

        Raises FileNotFoundError; ValueError for a file that is damaged or of another format.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"SAE: {path} does not exist")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"SAE: {path} has format {metadata.get('format')!r}, expected {FORMAT!r}")
                names = set(file.keys())
                if missing := sorted(set(_WEIGHTS) - names):
                    raise ValueError(f"SAE: {path} lacks {missing}")
                tensors = {name: file.get_tensor(name) for name in sorted(names)}
        except SafetensorError as error:
            raise ValueError(f"SAE: {path} is truncated or not a safetensors file: {error}") from error
        return cls(**tensors, k=json.loads(metadata["splice"])["k"], file=path)


class Tables(NamedTuple):
    """What becomes of edited features: g = clamp(scale·f + shift, lo, hi); one row for each kind of edit."""

    scale: Float[Tensor, "R S"]
    shift: Float[Tensor, "R S"]
    lo: Float[Tensor, "R S"]
    hi: Float[Tensor, "R S"]


class Rows(NamedTuple):
    """Edited features of an autoencoder with thresholds: all that is needed of it while the error is kept."""

    w_enc: Float[Tensor, "S d"]
    b_enc: Float[Tensor, " S"]
    threshold: Float[Tensor, " S"]
    w_dec: Float[Tensor, "S d"]


class Weights(NamedTuple):
    """A whole autoencoder."""

    w_enc: Float[Tensor, "m d"]
    b_enc: Float[Tensor, " m"]
    w_dec: Float[Tensor, "m d"]
    b_dec: Float[Tensor, " d"]
    threshold: Float[Tensor, " m"] | None


def _placed(tensor: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Weights in the tokens' dtype if they have it already, else in float32 (float64 for float64 tokens)."""
    return tensor.to(device, dtype if tensor.dtype == dtype else wide(dtype)).contiguous()


def _folded(w_enc: Tensor, b_enc: Tensor, b_dec: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The encoder's bias with the decoder's folded in; for float64 tokens nothing is rounded below that."""
    exact = w_enc.double() if dtype == torch.float64 else w_enc
    return fold_bias(exact, b_enc, b_dec).to(device, wide(dtype))


def rows_of(sae: SpliceSAE, features: Sequence[int], dtype: torch.dtype, device: torch.device) -> Rows:
    """The rows of some features, for tokens of a dtype on a device; the decoder's bias is folded into b_enc.

    Raises ValueError for an autoencoder without thresholds.
    """
    if sae.threshold is None:
        raise ValueError("SAE: the features of a TopK autoencoder compete, so all of them are needed")
    sums = wide(dtype)
    chosen = torch.tensor(features, device=sae.w_enc.device)
    w_enc, w_dec = sae.w_enc[chosen], sae.w_dec[chosen]
    return Rows(
        _placed(w_enc, dtype, device),
        _folded(w_enc, sae.b_enc[chosen], sae.b_dec, dtype, device),
        sae.threshold[chosen].to(device, sums),
        _placed(w_dec, dtype, device),
    )


def weights_of(sae: SpliceSAE, dtype: torch.dtype, device: torch.device) -> Weights:
    """The whole autoencoder, for tokens of a dtype on a device; the decoder's bias is folded into b_enc."""
    sums = wide(dtype)
    return Weights(
        _placed(sae.w_enc, dtype, device),
        _folded(sae.w_enc, sae.b_enc, sae.b_dec, dtype, device),
        _placed(sae.w_dec, dtype, device),
        sae.b_dec.to(device, sums),
        None if sae.threshold is None else sae.threshold.to(device, sums),
    )


def edit_features(
    x: Float[Tensor, "n d"], rows: Rows, tables: Tables, row: Int32[Tensor, " n"] | None,
    mask: Bool[Tensor, " n"] | None,
) -> Float[Tensor, "n d"]:  # fmt: skip
    """x with features edited and the error kept: `kernels.delta_splice`, for any number of features.

    row: which row of the tables each token uses; None for the only one. mask: tokens to edit; None for all.
    """
    if len(rows.threshold) <= MAX_FEATURES:
        return delta_splice(x, *rows, *tables, row=row, mask=mask)
    # edits of different features add up
    delta = x.new_zeros(x.shape, dtype=wide(x.dtype))
    for start in range(0, len(rows.threshold), MAX_FEATURES):
        few = slice(start, start + MAX_FEATURES)
        chosen = tuple(each[few] for each in rows)
        delta += splice_edit(x, chosen, tuple(each[:, few].contiguous() for each in tables), row, mask)
    # x + 0 is not x where x is -0.0; a token outside the mask may hold NaN, which makes no sum
    return torch.where(delta == 0, x, (x.to(wide(x.dtype)) + delta).to(x.dtype))


def splice(
    x: Float[Tensor, "n d"], weights: Weights, k: int | None, error: bool, features: Int32[Tensor, " S"] | None,
    tables: Tables | None, row: Int32[Tensor, " n"] | None, mask: Bool[Tensor, " n"] | None,
) -> Float[Tensor, "n d"]:  # fmt: skip
    """x through the whole autoencoder, by `kernels.sae_splice`; without features, reconstructed as it is."""
    named = {} if tables is None else tables._asdict()
    return sae_splice(
        x, weights.w_enc, weights.b_enc, weights.w_dec, weights.b_dec, error=error, k=k, threshold=weights.threshold,
        features=features, row=row if tables is not None else None, mask=mask, **named,
    )  # fmt: skip
