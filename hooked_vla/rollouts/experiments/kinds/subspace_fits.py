"""From frames of rollouts to subspaces that carry the goal: pairs of instructions, the choice of a site, the fits."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vla.analysis.das import Interchange, Pairs, learn_subspace
from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.subspaces import Subspace, lda, mean_difference, paired_pca, pca, random_subspace
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions import CutSetWarning, Patch
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.experiments.compare import mean_with_interval
from hooked_vla.rollouts.labelled import KeptFrame
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Settings, constant_text
from hooked_vla.rollouts.suites import Suite
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

# the whole stream, as a segment's name
ALL = "all"
DAS, PAIRED, MEAN, LDA, PCA, RANDOM = "das", "paired pca", "mean difference", "lda", "pca", "random"


@dataclass(frozen=True, eq=False)
class ToldPairs:
    """Pairs in which one and the same frame is told its own task and another. tasks: own and other of each pair."""

    pairs: Pairs
    tasks: tuple[tuple[str, str], ...]

    def rows(self, rows: Sequence[int]) -> "ToldPairs":
        """Some of the pairs."""
        return ToldPairs(self.pairs.rows(rows), tuple(self.tasks[i] for i in rows))


def told_otherwise(
    model: HookedVLA, settings: Settings, suite: Suite, frames: Sequence[KeptFrame], others: Sequence[str]
) -> ToldPairs:
    """Pairs of frames: what the policy saw, and the same with the instruction of the task in `others`.

    The noise is what the policy drew there. The other run is source and counterfactual in one: the scene is the same,
    so what the model does when it is told the other goal is what a swap of the goal should lead to.
    """
    with constant_text(model.processor, settings.constant_text), torch.no_grad():
        base = prepare(model, settings, [each.frame for each in frames])
        told = [{**each.frame, "instruction": suite.task(task).instruction}
                for each, task in zip(frames, others, strict=True)]  # fmt: skip
        other = prepare(model, settings, told)
        noise = SeededNoise.of(model, base.rows([0]))
    drawn = [noise([each.seed], each.env_step) for each in frames]
    draws = [torch.cat(each) for each in zip(*drawn, strict=True)]
    return ToldPairs(Pairs(base, other, other, draws), tuple((f.task, t) for f, t in zip(frames, others, strict=True)))


def choose_frames(frames: Sequence[KeptFrame], n: int, seed: int) -> list[KeptFrame]:
    """n of the frames, drawn without replacement; all where there are no more."""
    if len(frames) <= n:
        return list(frames)
    drawn = np.random.default_rng(seed).choice(len(frames), n, replace=False)
    return [frames[i] for i in sorted(drawn.tolist())]


def other_goals(
    frames: Sequence[KeptFrame], suite: Suite, goals: Mapping[str, tuple[str, str]], seed: int
) -> list[str]:
    """For each frame, a task with another block and another pad, drawn at random."""
    rng = np.random.default_rng(seed)
    found = []
    for frame in frames:
        own = goals[frame.task]
        far = [task.id for task in suite.tasks if all(a != b for a, b in zip(goals[task.id], own, strict=True))]
        found.append(far[int(rng.integers(len(far)))])
    return found


def sweep_sites(
    model: HookedVLA, told: ToldPairs, sites: Sequence[str], tokens: Sequence[str], rows: int = 16
) -> pd.DataFrame:
    """How much of the way to the other goal's actions a whole patch leads, at every site and in every segment.

    site, tokens; recovery, its mean over pairs, with low and high by tasks; order: of the site in the model. Sites are
    patched one at a time: where the policy reads earlier layers as well, a late site carries only part of the goal.
    """
    found: dict[tuple[str, str], list[Tensor]] = {}
    n = len(told.pairs)
    with torch.no_grad():
        for start in range(0, n, rows):
            part = told.pairs.rows(range(start, min(start + rows, n)))
            clean = model(part.base, part.noise).normalized
            other, cache = model.run_with_cache(part.source, list(sites), part.noise)
            assert other is not None
            for site in sites:
                for segment in tokens:
                    edit = _whole_patch(cache[site], site, segment)
                    with warnings.catch_warnings():
                        # replay of the other run is what a whole patch is to show
                        warnings.simplefilter("ignore", CutSetWarning)
                        edited = model(part.base, part.noise, edits=[edit]).normalized
                    found.setdefault((site, segment), []).append(recovery(edited, clean, other.normalized))
    clusters = [own for own, _ in told.tasks]
    table = []
    for (site, segment), parts in found.items():
        mean, low, high = mean_with_interval(torch.cat(parts).numpy(), clusters)
        table.append({"site": site, "tokens": segment, "recovery": mean, "low": low, "high": high,
                      "order": list(sites).index(site)})  # fmt: skip
    return pd.DataFrame(table)


def patchable(model: HookedVLA, globs: Sequence[str]) -> list[str]:
    """Sites that match, run once a chunk on a row and tokens for each input, and reach the action, in model order.

    Globs that match nothing are passed over: not every family has every pathway. Raises ValueError where none is left.
    """
    points = model.hook_points
    found = [
        name
        for name, site in points.items()
        if site.reaches_action and not site.denoised and site.axes[:2] == ("batch", "seq")
        and any(name in _matches(glob, list(points)) for glob in globs)
    ]  # fmt: skip
    if not found:
        raise ValueError(
            f"no site of {model.spec.name} matches {list(globs)}, runs once a chunk and reaches the action"
        )
    return found


def choose_site(sites: pd.DataFrame, enough: float) -> tuple[str, str]:
    """The last site of the model, and there the segment of the largest recovery, that leads `enough` of the way; of all
    where none does. The whole stream is taken only where no segment suffices."""
    rows = sites.to_dict("records")
    good = [row for row in rows if row["recovery"] >= enough]
    last = [row for row in good if row["order"] == max(each["order"] for each in good)]
    parts = [row for row in last if row["tokens"] != ALL]
    best = max(parts or last or rows, key=lambda row: row["recovery"])
    return str(best["site"]), str(best["tokens"])


@dataclass(frozen=True)
class Search:
    """How DAS searches: `learn_subspace`'s arguments."""

    steps: int
    batch: int
    lr: float


def fit_subspaces(
    swaps: Interchange, told: ToldPairs, sizes: Sequence[int], search: Search, seed: int
) -> tuple[dict[str, Subspace], tuple[float, ...]]:
    """Every method's subspace of at most max(sizes) dimensions, fitted on the same pairs; and DAS's losses.

    Classes are tasks; PCA, LDA and class means are taken around the mean of each place among the tokens, which a word
    at another place would else outweigh. DAS begins at the principal components of the pairs' differences.
    """
    own, other, keys = swaps.examples()
    x = torch.cat([own, other])
    places = [place for _, place in keys] * 2
    labels = [told.tasks[pair][which] for which in (0, 1) for pair, _ in keys]
    most = min(max(sizes), swaps.d)
    paired = _at_most(lambda k: paired_pca(own, other, k, swaps.site), most)
    learned = learn_subspace(
        swaps, [k for k in sizes if k <= paired.k], search.steps, search.batch, search.lr, seed, start=paired
    )
    found = {
        DAS: learned.subspace,
        PAIRED: paired,
        MEAN: _at_most(lambda k: mean_difference(x, labels, k, swaps.site, places), most),
        LDA: _at_most(lambda k: lda(x, labels, k, swaps.site, places), most),
        PCA: _at_most(lambda k: pca(x, k, swaps.site, places), most),
        RANDOM: random_subspace(swaps.d, most, seed, swaps.site, x.double().mean(0)),
    }
    return found, learned.losses


def effect_curve(
    swaps: Interchange, told: ToldPairs, subspaces: Mapping[str, Subspace], sizes: Sequence[int]
) -> pd.DataFrame:
    """Effect of swaps on held-out pairs by method and number of dimensions: 0 the base's actions, 1 the other goal's.

    A method with fewer dimensions than the largest size ends where it has all of them. The method "all" has k = d.
    """
    clusters = [own for own, _ in told.tasks]
    wanted = [(name, k) for name, space in subspaces.items() for k in sorted({min(size, space.k) for size in sizes})]
    rows: list[dict[str, Any]] = []
    for name, k in [*wanted, (ALL, swaps.d)]:
        effect = swaps.effect(None if name == ALL else subspaces[name].first(k))
        mean, low, high = mean_with_interval(effect.numpy(), clusters)
        rows.append({"method": name, "k": k, "effect": mean, "low": low, "high": high, "n": len(effect)})
    return pd.DataFrame(rows)


def matching_strength(swaps: Interchange, small: Subspace, large: Subspace) -> float:
    """By what a swap in `small` must be multiplied to move tokens as far as one in `large`, in root mean square."""
    own, other, _ = swaps.examples()
    change = (other - own).double()
    lengths = [float((change @ space.basis.T).square().sum(1).mean().sqrt()) for space in (small, large)]
    return lengths[1] / lengths[0]


def _at_most(fit: Any, most: int) -> Subspace:
    """A fit of `most` dimensions, or of as many as there are."""
    whole = fit(None)
    return whole.first(min(most, whole.k))


def _whole_patch(value: Any, site: str, segment: str) -> Patch:
    if segment == ALL:
        return Patch(site, value)
    return Patch(site, value.segment(segment), tokens=segment)


def _matches(glob: str, names: Sequence[str]) -> list[str]:
    try:
        return hook_names.resolve(glob, list(names))
    except KeyError:
        return []
