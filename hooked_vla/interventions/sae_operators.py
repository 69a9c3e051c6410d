"""Operators of edits through a sparse autoencoder: per token, or on the mean token of a segment."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hooked_vla.interventions.edits import Edit
from hooked_vla.interventions.operators import OPERATORS, Made, Masks, Operator, Tokens
from hooked_vla.interventions.places import Scene, Site, segment_numbers
from hooked_vla.interventions.sae_edits import SAEFeatureEdit, SAEReconstruct
from hooked_vla.kernels import segment_add, segment_mean, segment_mean_delta
from hooked_vla.kernels.delta_splice import MAX_FEATURES
from hooked_vla.sae.splice import Rows, Tables, Weights, edit_features, rows_of, splice, weights_of


class Splice(Operator):
    """SAEReconstruct and SAEFeatureEdit.

    w_enc, b_enc, threshold, w_dec: rows of the edited features, where those are all that is needed: while the error of
    an autoencoder with thresholds is kept. weights: the whole autoencoder, elsewhere. scale, shift, lo, hi: [edit S].
    segment: of each token the segment whose mean is edited, segment_row: which edit each segment has.
    """

    w_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    w_dec: Tensor
    scale: Tensor
    shift: Tensor
    lo: Tensor
    hi: Tensor
    features: Tensor | None = None
    weights: Weights | None = None
    segment: Tensor | None = None
    segment_row: Tensor | None = None
    n_segments: int = 0

    def __init__(self, edits: Sequence[Edit], labels: Sequence[str], site: Site) -> None:
        first = edits[0]
        assert isinstance(first, SAEFeatureEdit | SAEReconstruct)
        if site.width != first.sae.d_model:
            raise ValueError(
                f"{labels[0]}: sae is for tokens {first.sae.d_model} wide, but {site.name} is "
                f"{'of no fixed width' if site.width is None else f'{site.width} wide'} ({site.axes})"
            )
        self.sae, self.pooled = first.sae, first.pool == "segment"
        self.error = isinstance(first, SAEFeatureEdit) and first.keep_error
        self.by_rows = self.error and self.sae.k is None
        self.has_features = isinstance(first, SAEFeatureEdit)
        # means are wide, whatever tokens are
        self.dtype = site.wide if self.pooled else site.dtype
        if not self.by_rows:
            self.weights = weights_of(self.sae, self.dtype, site.device)
        super().__init__(edits, labels, site)

    def load(self, edits: Sequence[Edit]) -> None:
        before, after = len(features_of(self.edits)), len(features_of(edits))
        if self.edits and before != after:
            raise ValueError(
                f"{', '.join(self.labels)}: features would be {after} in place of {before}, all rows together: make a "
                "new EditSet"
            )
        super().load(edits)

    def parameters(self, edits: Sequence[Edit]) -> Made:
        chosen = features_of(edits)
        if not chosen:
            return Made({})
        if self.error and not self.by_rows and len(chosen) > MAX_FEATURES:
            raise ValueError(
                f"{self.labels[0]}: features: at most {MAX_FEATURES} of a TopK autoencoder while the error is kept, "
                f"got {len(chosen)}"
            )
        made: dict[str, Tensor] = {}
        identity = {"scale": 1.0, "shift": 0.0, "low": -torch.inf, "high": torch.inf}
        for name, table in zip(identity, Tables._fields, strict=True):
            # features that only other rows edit stay as they are
            values = torch.full((len(edits), len(chosen)), identity[name], dtype=self.site.wide, device="cpu")
            for i, edit in enumerate(edits):
                assert isinstance(edit, SAEFeatureEdit)
                for feature, value in zip(edit.numbers, edit.column(name), strict=True):
                    values[i, chosen.index(feature)] = value
            made[table] = values
        if self.by_rows:
            return Made(made | rows_of(self.sae, chosen, self.dtype, self.site.device)._asdict())
        return Made(made | {"features": torch.tensor(chosen, dtype=torch.int32, device="cpu")})

    @property
    def needs_placing(self) -> bool:
        return super().needs_placing or self.pooled

    def place_parts(self, masks: Masks, scene: Scene) -> None:
        if not self.pooled:
            return
        # edits that run together name the same segments
        numbers = torch.full_like(masks[0], -1, dtype=torch.int32)
        for edit, label, mask in zip(self.edits, self.labels, masks, strict=True):
            own, self.n_segments = segment_numbers(edit.where, mask, scene, label)
            numbers = torch.where(mask, own, numbers)
        if self.mask is not None:
            numbers = torch.where(self._placed[scene.sizes]["mask"][1], numbers, -1)
        self.put("segment", numbers.flatten(), scene.sizes)
        if self.row_of is not None:
            row_of = self._placed[scene.sizes]["row_of"][1].int()
            self.put("segment_row", row_of.repeat_interleave(self.n_segments // scene.rows), scene.sizes)

    def __call__(self, x: Tokens, step: int | None) -> Tokens:
        flat = x.flatten(0, 1).contiguous()
        tables = Tables(self.scale, self.shift, self.lo, self.hi) if self.has_features else None
        if not self.pooled:
            return self._spliced(flat, tables, self.row, self.flat_mask()).view(x.shape)
        assert self.segment is not None
        if self.by_rows and tables is not None and len(self.threshold) <= MAX_FEATURES:
            rows = (self.w_enc, self.b_enc, self.threshold, self.w_dec)
            y = segment_mean_delta(
                flat, self.segment, self.n_segments, *rows, *tables, row=self.segment_row
            )  # fmt: skip
            return y.view(x.shape)
        mean = segment_mean(flat, self.segment, self.n_segments)
        delta = self._spliced(mean, tables, self.segment_row, None) - mean
        return segment_add(flat, delta, self.segment).view(x.shape)

    def _spliced(self, flat: Tensor, tables: Tables | None, row: Tensor | None, mask: Tensor | None) -> Tensor:
        if self.by_rows:
            assert tables is not None
            rows = Rows(self.w_enc, self.b_enc, self.threshold, self.w_dec)
            return edit_features(flat, rows, tables, row, mask)
        assert self.weights is not None
        return splice(flat, self.weights, self.sae.k, self.error, self.features, tables, row, mask)


def features_of(edits: Sequence[Edit]) -> list[int]:
    """Every feature that one of the edits names, once."""
    return list(dict.fromkeys(f for edit in edits if isinstance(edit, SAEFeatureEdit) for f in edit.numbers))


OPERATORS |= {SAEReconstruct: Splice, SAEFeatureEdit: Splice}
