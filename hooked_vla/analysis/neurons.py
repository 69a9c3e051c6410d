"""Neurons of MLPs held at a constant: the intervention of Häon et al. (arXiv 2509.00328), its doses and its controls.

>>> fast = Neurons.of_table(find_neurons(model, vocabulary, ["fast"]).head(20))
>>> edits = fast.overwrite(4.0)                       # all tokens, all steps, before the output projection
>>> sham = [fast.random(model, seed).overwrite(4.0) for seed in range(5)]

A constant says nothing by itself: what it comes to depends on how large activations are. `activation_scales` measures
that, so that doses can be given in multiples of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import HookedModel, HookPoint
from hooked_vla.hooks.names import layer, leaf
from hooked_vla.interventions import Overwrite

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Neurons:
    """Neurons by site: hook_post -> their numbers, in ascending order. Raises ValueError for none, or another site."""

    at: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if bad := [site for site in self.at if leaf(site) != "hook_post"]:
            raise ValueError(f"neurons are those of hook_post, before the output projection; got {bad}")
        if not self.at or not all(self.at.values()):
            raise ValueError("no neurons")
        object.__setattr__(self, "at", {site: tuple(sorted(set(chosen))) for site, chosen in self.at.items()})

    @classmethod
    def of_table(cls, table: "pd.DataFrame") -> "Neurons":
        """The neurons of a table with the columns site and neuron."""
        return cls({str(site): tuple(int(n) for n in rows["neuron"]) for site, rows in table.groupby("site")})

    def __len__(self) -> int:
        return sum(len(chosen) for chosen in self.at.values())

    def overwrite(self, value: float, **where: Any) -> list[Overwrite]:
        """The edits that hold every one of them at `value`, one a site.

        where: `tokens`, `denoise`, `env`, `rows`, as in every edit; none: all tokens, at every step.
        """
        return [Overwrite(site, float(value), channels=chosen, **where) for site, chosen in self.at.items()]

    def random(self, model: HookedModel, seed: int) -> "Neurons":
        """As many others of each site, drawn without replacement: the control of the same size.

        Raises ValueError where a site has too few others.
        """
        rng = np.random.default_rng(seed)
        drawn = {}
        for site, chosen in self.at.items():
            width = int(model.hook_points[site].shape[-1])
            others = np.setdiff1d(np.arange(width), chosen)
            if len(others) < len(chosen):
                raise ValueError(f"{site} has {width} neurons: no {len(chosen)} others than the {len(chosen)} chosen")
            drawn[site] = tuple(int(n) for n in rng.choice(others, len(chosen), replace=False))
        return Neurons(drawn)


@dataclass(frozen=True)
class ActivationScale:
    """How large the activations of a site are over tokens and neurons. rms: root mean square; high: 99th percentile of
    the absolute value; largest: of all."""

    rms: float
    high: float
    largest: float


def activation_scales(
    model: HookedModel, obs: Any, sites: Sequence[str], noise: Any = None
) -> dict[str, ActivationScale]:
    """How large activations are, over all tokens that are not padding of a batch of observations, by site.

    Raises KeyError for an unknown site.
    """
    found = {}
    for site, rows in _activations(model, obs, sites, noise).items():
        values = torch.cat(rows).abs().numpy()
        found[site] = ActivationScale(
            float(np.sqrt(np.mean(values**2))), float(np.quantile(values, 0.99)), float(values.max())
        )
    return found


def contrast_neurons(
    model: HookedModel, with_it: Any, without: Any, sites: Sequence[str], noise: Any = None
) -> "pd.DataFrame":
    """Neurons by how much more active they are in one batch of observations than in another; no vocabulary is needed.

    site, layer, neuron; difference: of means over tokens that are not padding, mean over rows; z: the same over the
    standard deviation of the rows' differences; strength: the same over that of all means of the site, the largest
    first.

    with_it, without: batches whose rows are pairs, such as the same scenes under two prompts.
    Raises ValueError for batches of different sizes or a single pair, KeyError for an unknown site.
    """
    with needs_analysis_extra():
        import pandas as pd
    means = [
        {
            site: torch.stack([row.mean(0) for row in rows])
            for site, rows in _activations(model, each, sites, noise).items()
        }
        for each in (with_it, without)
    ]
    parts = []
    for site, first in means[0].items():
        second = means[1][site]
        if len(first) != len(second) or len(first) < 2:
            raise ValueError(f"rows must be pairs, two or more: got {len(first)} and {len(second)}")
        change = first - second
        spread = torch.cat([first, second]).std()
        parts.append(
            pd.DataFrame(
                {
                    "site": site,
                    "layer": layer(site),
                    "neuron": np.arange(change.shape[1]),
                    "difference": change.mean(0).numpy(),
                    "z": (change.mean(0) / change.std(0).clamp(min=1e-12)).numpy(),
                    "strength": (change.mean(0) / spread).numpy(),
                }
            )
        )
    table: pd.DataFrame = pd.concat(parts, ignore_index=True)
    return table.sort_values(by="strength", ascending=False, kind="stable").reset_index(drop=True)


@torch.no_grad()
def _activations(
    model: HookedModel, obs: Any, sites: Sequence[str], noise: Any
) -> dict[str, list[Float[Tensor, "token d_mlp"]]]:
    """Every row's activations of the tokens that are not padding; of a site that runs repeatedly, those of every
    step one after the other."""
    seen: dict[str, list[list[Tensor]]] = {}

    def keep(value: Tensor, hook: HookPoint) -> None:
        segments = hook.segments
        valid = torch.ones(value.shape[:2], dtype=torch.bool)
        if segments is not None and "pad" in segments.names:
            valid = ~segments.mask("pad").cpu()
        rows = seen.setdefault(hook.name, [[] for _ in value])
        for row, each, mask in zip(rows, value.detach().float().cpu(), valid, strict=True):
            row.append(each[mask])

    with model.hooks([(list(sites), keep)]):
        model(obs, noise)
    return {site: [torch.cat(row) for row in rows] for site, rows in seen.items()}
