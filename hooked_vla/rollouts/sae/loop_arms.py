"""Arms that put a sparse autoencoder into the loop: its site then holds what the autoencoder makes of it.

    token          every token is reconstructed by itself
    mean           the mean of a row's tokens is reconstructed, and what that changes is added to every one of them
    segment_mean   the same for every token segment by itself
    identity       the autoencoder is run, and the value stays as it is

Tokens of padding are left alone. With noise, random directions take the place of what would be changed: of the same
length at every token, so that the squared error, and with it FVU, is the same, and says nothing of features.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel, HookRequest
from hooked_vla.hooks.point import HookFunction, HookPoint
from hooked_vla.inputs import PAD
from hooked_vla.interventions import EditArm, SAEFeatureEdit, SAEReconstruct
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.matched_noise import EPISODE, STEP, NoiseHook
from hooked_vla.sae.autoencoder import SparseAutoencoder

IDENTITY = "identity"
WAYS = ("token", "mean", "segment_mean", IDENTITY)


@dataclass(frozen=True, eq=False)
class LoopArm:
    """One autoencoder in the loop at its own site, one of WAYS. name: unique in the sweep.

    tokens: names or globs ("image:*") of the token segments that change, all but padding where None; segment_mean needs
    names. denoise: the denoise steps at which they do, all where None. noise: None; "step": another direction for each
    token at every environment and denoise step; "episode": one for a whole episode (a pooled way has one direction for
    all tokens of a row). drop_negative: see `SparseAutoencoder.splice`.
    """

    name: str
    sae: SparseAutoencoder
    way: str
    tokens: tuple[str, ...] | None = None
    denoise: tuple[int, ...] | None = None
    noise: str | None = None
    drop_negative: bool = False

    def __post_init__(self) -> None:
        """Raises ValueError for unknown values, those that do not go together, and what cannot stand in its site."""
        if self.way not in WAYS:
            raise ValueError(f"arm {self.name!r}: way must be one of {', '.join(WAYS)}, got {self.way!r}")
        if self.noise not in (None, STEP, EPISODE):
            raise ValueError(f"arm {self.name!r}: noise must be {STEP!r}, {EPISODE!r} or None, got {self.noise!r}")
        if self.way == IDENTITY and self.noise is not None:
            raise ValueError(f"arm {self.name!r}: the identity changes nothing that noise could be as large as")
        if self.way == "segment_mean" and not self.tokens:
            raise ValueError(f"arm {self.name!r}: segment_mean needs the names of segments")
        config = self.sae.config
        if config.output_site is not None:
            raise ValueError(
                f"{config.label}: a transcoder reads {config.site} and gives {config.output_site}: it cannot stand in "
                "for the value it reads"
            )
        if self._is_spliced:
            # what cannot be spliced is refused here and not in the loop
            self._edits  # noqa: B018

    @property
    def site(self) -> str:
        return self.sae.config.site

    @property
    def _is_spliced(self) -> bool:
        """Whether an edit does it: a mean over segments without padding, and lengths of tokens, are no edits."""
        return self.way != "mean" and self.sae.config.normalisation != "token_norm"

    @cached_property
    def _edits(self) -> EditArm:
        spliced = self.sae.splice(self.drop_negative)
        where: dict[str, Any] = {"tokens": self.tokens, "denoise": self.denoise}
        if self.way == IDENTITY:
            return EditArm(self.name, [SAEFeatureEdit(self.site, spliced, [0], **where)])
        pool = "segment" if self.way == "segment_mean" else "token"
        return EditArm(self.name, [SAEReconstruct(self.site, spliced, pool, **where)])

    @cached_property
    def sha256(self) -> str:
        """Of config and weights."""
        return weights_hash(self.sae)

    def describe(self) -> Mapping[str, Any]:
        return {
            "kind": "autoencoder in the loop" if self.noise is None else "noise as large as an autoencoder's error",
            "site": self.site, "sae": self.sha256, "way": self.way,
            "tokens": None if self.tokens is None else list(self.tokens),
            "denoise": None if self.denoise is None else list(self.denoise),
            "noise": self.noise, "drop_negative": self.drop_negative,
        }  # fmt: skip

    def check(self, model: HookedModel) -> None:
        """Raises KeyError for a model without the site, ValueError where its values are of another width, for denoise
        steps that it does not have, and where EditSet would refuse the edits."""
        if self.site not in model.points:
            raise KeyError(f"the SAE is of {self.site} ({self.sae.config.model}), which this model does not have")
        if self.denoise is not None and not hook_names.is_denoised(self.site):
            raise ValueError(f"arm {self.name!r}: {self.site} runs once per chunk, not at denoise steps")
        if wrong := [step for step in self.denoise or () if not 0 <= step < model.n_denoise_steps]:
            raise ValueError(f"arm {self.name!r}: no denoise steps {wrong}: there are {model.n_denoise_steps}")
        if self._is_spliced:
            self._edits.check(model)
            return
        point = model.hook_points[self.site]
        sizes = point.shape[2:] if len(point.axes) > 2 else point.shape[1:]
        if all(isinstance(size, int) for size in sizes):
            self.sae.check_fits(self.site, prod(int(size) for size in sizes))

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        """The hook of its site; rows as for `Arm.hooks`."""
        fn: HookFunction = self._direct
        if self._is_spliced:
            ((_, fn),) = self._edits.hooks(rows)
        if self.noise is not None:
            fn = NoiseHook(fn, [cell.seed for cell in rows], self.noise, self.way != "token")
        return [(self.site, fn)]

    def _direct(self, value: Tensor, hook: HookPoint) -> Tensor | None:
        """The autoencoder as it is, without splicing it."""
        if self.denoise is not None and hook.denoise_step not in self.denoise:
            return None
        layout = Layout.of(hook)
        flat = layout.flatten(value)
        masks = self._masks(hook, flat)
        delta = torch.zeros_like(flat, dtype=torch.float32)
        with torch.no_grad():
            for mask in masks:
                delta = delta + mask[..., None] * self._change(flat.float(), mask)
        changed = torch.where(delta == 0, flat, (flat.float() + delta).to(flat.dtype))
        return layout.restore(changed, value)

    def _change(
        self, x: Float[Tensor, "row place channel"], mask: Bool[Tensor, "row place"]
    ) -> Float[Tensor, " row #place channel"]:
        """What is added to the tokens of the mask."""
        if self.way in ("token", IDENTITY):
            # rows that are not meant may hold anything
            x = torch.where(mask[..., None], x, 0)
            made = self.sae(x)
            return made - x if self.way == "token" else made - made
        weights = mask.float() / mask.sum(1, keepdim=True).clamp_min(1)
        mean = torch.einsum("r p, r p c -> r c", weights, torch.where(mask[..., None], x, 0))
        return (self.sae(mean) - mean)[:, None]

    def _masks(self, hook: HookPoint, flat: Tensor) -> list[Bool[Tensor, "row place"]]:
        """The tokens that change; for segment_mean, those of each segment."""
        if self.way != "segment_mean" or self.tokens is None:
            return [chosen_tokens(hook, flat, self.tokens)]
        masks: list[Tensor] = []
        for name in self.tokens:
            here = chosen_tokens(hook, flat, (name,))
            # a token of several names counts for the first, as in edits
            for earlier in masks:
                here = here & ~earlier
            masks.append(here)
        return masks


def weights_hash(sae: SparseAutoencoder) -> str:
    """SHA-256 of an autoencoder's config and weights."""
    found = hashlib.sha256(sae.config.to_json().encode())
    for name, tensor in sae.state_dict().items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def chosen_tokens(
    hook: HookPoint, flat: Float[Tensor, "row place channel"], tokens: tuple[str, ...] | None
) -> Bool[Tensor, "row place"]:
    """Which tokens of a value are of some segments, of any but padding where None.

    Raises KeyError for a segment that the stream does not have, ValueError for segments of a value without them.
    """
    segments = hook.segments
    if segments is None or segments.labels.shape[1] != flat.shape[1]:
        if tokens is not None:
            raise ValueError(f"{hook.name} ({' '.join(hook.axes)}) has no token segments {list(tokens)}")
        return torch.ones(flat.shape[:2], dtype=torch.bool, device=flat.device)
    if tokens is None:
        pad = segments.names.index(PAD) if PAD in segments.names else -1
        mask = segments.labels != pad
    else:
        mask = torch.stack([segments.mask(name) for name in tokens]).any(0)
    return mask.expand(flat.shape[:2]).to(flat.device)
