"""Ablations: whole blocks, heads and neurons taken out by zero, by a mean, by other inputs' activations, or skipped.

All of them are edits, so they run wherever edits do: in one forward pass, row by row in a sweep, in rollouts as an
`EditArm`. Means and banks of tokens come from inputs that the policy meets when it acts: means over inputs that it
never sees take it away from them for reasons of their own.

>>> means = mean_activations(model, runs, ["vlm.blocks.2.hook_resid_post"])
>>> arms = [EditArm(kind, ablate_block(model, "vlm.blocks.2", kind, means)) for kind in ("zero", "mean", "skip")]
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.point import HookPoint
from hooked_vla.inputs import PAD
from hooked_vla.interventions import Ablate, Edit
from hooked_vla.interventions.places import Layout

Ablation = Literal["zero", "mean", "resample", "skip"]
Per = Literal["position", "site"]
OUTPUT = "hook_resid_post"
# what a block adds to its residual stream
WRITES = (
    "hook_conv1_out", "hook_attn_out", "hook_cross_attn_out", "hook_conv2_out", "hook_mlp_out", "hook_deepstack",
)  # fmt: skip
# norms of the stream itself: without its writes such a block still changes what passes it
_POST_NORMS = ("hook_pre_ln1", "hook_pre_ln_cross", "hook_pre_ln2")


def list_blocks(model: HookedModel, pathways: Sequence[str] | None = None) -> list[str]:
    """Names of the blocks that have a residual stream, as in "vlm.blocks.3", in the order of the model.

    Raises ValueError for a pathway without any.
    """
    found = [name.removesuffix(f".{OUTPUT}") for name in model.points if name.endswith(f".{OUTPUT}")]
    if pathways is None:
        return found
    if empty := [way for way in pathways if not any(block.startswith(f"{way}.") for block in found)]:
        known = list(dict.fromkeys(hook_names.pathway(block) for block in found))
        raise ValueError(f"pathways {empty} have no blocks; those that have are {known}")
    return [block for block in found if hook_names.pathway(block) in pathways]


def skips_exactly(model: HookedModel, block: str) -> bool:
    """Whether a block without its writes hands on what it got, bit for bit: post-norm blocks norm it all the same."""
    return not any(f"{block}.{leaf}" in model.points for leaf in _POST_NORMS)


def reaches_action(model: HookedModel, block: str) -> bool:
    """Whether any action depends on what the block hands on or writes."""
    about = model.hook_points
    return any(about[name].reaches_action for name in [f"{block}.{OUTPUT}", *_writes(model, block)])


def ablate_block(
    model: HookedModel, block: str, kind: Ablation, sources: Mapping[str, Tensor] | None = None, seed: int = 0
) -> list[Edit]:
    """The edits that ablate a block.

    zero: its output, the residual stream itself, is 0. mean: its output is `sources[its output]`. resample: every token
    of its output is one of those in `sources[...]`, [n channels], drawn with the seed. skip: it adds nothing to the
    stream; of a post-norm block only the norms are left (see `skips_exactly`).
    Raises KeyError for an unknown block or a missing source, ValueError for another kind.
    """
    output = f"{block}.{OUTPUT}"
    if output not in model.points:
        blocks = list_blocks(model)
        raise KeyError(f"no block {block!r}; nearest: {hook_names.nearest(block, blocks)}")
    if kind == "skip":
        return [Ablate(_writes(model, block), "zero")]
    if kind not in get_args(Ablation):
        raise ValueError(f"unknown ablation {kind!r}; there are {', '.join(get_args(Ablation))}")
    return [Ablate(output, kind, _source(output, kind, sources), seed)]


def ablate_heads(
    site: str, heads: Sequence[int], kind: Ablation, sources: Mapping[str, Tensor] | None = None, seed: int = 0
) -> list[Edit]:
    """The edits that ablate heads at what they write before the output projection, as in "vlm.blocks.3.attn.hook_z".

    Raises as `ablate_block`; ValueError for "skip": a head that adds nothing is one whose z is 0.
    """
    return [Ablate(site, _elementwise(kind), _source(site, kind, sources), seed, heads=heads)]


def ablate_neurons(
    site: str, neurons: Sequence[int], kind: Ablation, sources: Mapping[str, Tensor] | None = None, seed: int = 0
) -> list[Edit]:
    """The edits that ablate neurons of an MLP, as in "expert.blocks.3.mlp.hook_post". Raises as `ablate_heads`."""
    return [Ablate(site, _elementwise(kind), _source(site, kind, sources), seed, channels=neurons)]


def _elementwise(kind: Ablation) -> str:
    if kind == "skip":
        raise ValueError("blocks can be skipped; heads and neurons that add nothing are ablated by 'zero'")
    return kind


def _source(site: str, kind: Ablation, sources: Mapping[str, Tensor] | None) -> Tensor | None:
    if kind == "zero":
        return None
    if sources is None or site not in sources:
        raise KeyError(f"ablation {kind!r} of {site} needs sources[{site!r}], its activations on other inputs")
    return sources[site]


def _writes(model: HookedModel, block: str) -> list[str]:
    return [name for leaf in WRITES if (name := f"{block}.{leaf}") in model.points]


def mean_activations(
    model: HookedModel, runs: Iterable[tuple[Any, Any]], sites: NamesFilter, per: Per = "position"
) -> dict[str, Tensor]:
    """Mean activations over inputs, shaped as sources of edits.

    runs: pairs of what the model sees and its noise, any number of rows each; only sums are kept. per="position": each
    place of the stream has a mean of its own, and at sites that run repeatedly each denoise step: [seq channels] or
    [denoise 1 seq channels]; "site": one for all tokens but padding, [channels].
    Raises ValueError for no runs, streams of different length (per position), and another `per`.
    """
    if per not in get_args(Per):
        raise ValueError(f"per must be one of {', '.join(get_args(Per))}, got {per!r}")
    names = hook_names.resolve(sites, list(model.points))
    sums = {name: _Sum(model, name, per) for name in names}
    seen = 0
    for obs, noise in runs:
        with torch.no_grad(), model.hooks([(name, each.add) for name, each in sums.items()]):
            model(obs, noise)
        seen += 1
    if not seen:
        raise ValueError("there are no runs to take a mean over")
    return {name: each.mean() for name, each in sums.items()}


class _Sum:
    """Adds up what one site holds, for each denoise step where places are told apart."""

    def __init__(self, model: HookedModel, site: str, per: Per) -> None:
        self.site, self.per = site, per
        self.denoised = hook_names.is_denoised(site)
        self.totals: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}
        self.channels: tuple[int, ...] = ()
        self.dtype = torch.float32

    def add(self, value: Tensor, hook: HookPoint) -> None:
        """A hook."""
        layout = Layout.of(hook)
        flat = layout.flatten(value)
        self.dtype, self.channels = value.dtype, tuple(value.shape[i] for i in layout.channels)
        if self.per == "site":
            tokens = _tokens(flat, hook).double()
            step, total, count = 0, tokens.sum(0), len(tokens)
        else:
            step, total, count = hook.denoise_step or 0, flat.double().sum(0), len(flat)
        held = self.totals.get(step)
        if held is not None and held.shape != total.shape:
            raise ValueError(
                f"{self.site} has {held.shape[0]} places in one run and {total.shape[0]} in another: take means per "
                "site, or of inputs of one length"
            )
        self.totals[step] = total if held is None else held + total
        self.counts[step] = self.counts.get(step, 0) + count

    def mean(self) -> Tensor:
        """Raises RuntimeError where the site was never passed."""
        if not self.totals:
            raise RuntimeError(f"{self.site} was not passed in any run")
        means = torch.stack([self.totals[step] / self.counts[step] for step in sorted(self.totals)]).to(self.dtype)
        means = means.unflatten(-1, self.channels)
        return means[:, None] if self.denoised and self.per == "position" else means[0]


def _tokens(flat: Tensor, hook: HookPoint) -> Tensor:
    """All tokens [token channel] of a value [row place channel] but padding."""
    segments = hook.segments
    if segments is None or PAD not in segments.names or segments.labels.shape != flat.shape[:2]:
        return flat.flatten(0, 1)
    return flat[~segments.mask(PAD).to(flat.device)]


def sample_tokens(
    model: HookedModel, runs: Iterable[tuple[Any, Any]], sites: NamesFilter, n: int, seed: int
) -> dict[str, Tensor]:
    """Tokens that sites hold on some inputs, as banks for "resample": [n channels] each, padding left out.

    runs: as for `mean_activations`. n: how many of each site are kept, drawn with the seed; all where there are fewer.
    Raises ValueError for no runs and n below 1.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    names = hook_names.resolve(sites, list(model.points))
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def keep(value: Tensor, hook: HookPoint) -> None:
        found[hook.name].append(_tokens(Layout.of(hook).flatten(value), hook).detach().clone())

    for obs, noise in runs:
        with torch.no_grad(), model.hooks([(names, keep)]):
            model(obs, noise)
    banks = {}
    for name, parts in found.items():
        if not parts:
            raise ValueError(f"there are no runs to take tokens of {name} from")
        tokens = torch.cat(parts)
        chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))[:n].sort().values
        banks[name] = tokens[chosen.to(tokens.device)]
    return banks
