"""Attribution: what every patch would do, from gradients instead of from a forward pass each.

Attribution patching is the first-order estimate, gradient × (donor - base): one pass forth and back for all cells
(Nanda 2022; arXiv 2310.10348). Where attention saturates it misses queries and keys: their attention pattern is
computed anew with the donor's (AtP*, arXiv 2403.00745, section 3.1.1). Integrated gradients average the gradient along
the way from base to donor (arXiv 1703.01365), and add up to the patch's exact effect as points grow in number.
`agreement` says how far an estimate is from exact patching: without it, estimates are guesses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.analysis.attribution_attention import PatternChange, pattern_of
from hooked_vla.analysis.attribution_graph import GraphRun, Place, donor_tokens, linear_effect, steps_of
from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.patching import PatchingResult, tabulated
from hooked_vla.analysis.patching_cells import RESIDUALS, Cell, Direction, Metric, Runs, plan_cells
from hooked_vla.analysis.patching_resume import Noise, Tape
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.hooks.names import NamesFilter
from hooked_vla.hooks.point import HookPoint

with needs_analysis_extra():
    import pandas as pd
    from scipy.stats import rankdata

# what a block adds to its residual stream
WRITES = ("hook_attn_out", "hook_mlp_out", "hook_cross_attn_out")


@dataclass(frozen=True)
class Agreement:
    """An estimate against exact patching, over cells and pairs. pearson, spearman: correlations of the effects.
    top_overlap: share of the `top` cells with the largest exact effects (by magnitude) that are among the estimate's;
    missed: how many of them are in the lower half of the estimate's: its false negatives. n: how many were compared."""

    pearson: float
    spearman: float
    top_overlap: float
    missed: int
    top: int
    n: int


def attribution_patching(
    model: HookedModel,
    clean: object,
    corrupted: object,
    sites: NamesFilter = RESIDUALS,
    segments: Sequence[str | None] | None = None,
    denoise_steps: Sequence[int] | None = None,
    metric: Metric = recovery,
    direction: Direction = "denoising",
    *,
    noise: Noise,
    read: str | None = None,
    qk_fix: bool = True,
    grad_drop: bool = False,
) -> PatchingResult:
    """Estimates of what `activation_patching` measures; arguments and result as there, `effect` being the estimate.

    To first order they are exact for sites that run once, and for single denoise steps. A patch of all steps overwrites
    what its own earlier steps have changed; the estimate counts that too (`integrated_gradients` do not).
    qk_fix: at queries and keys, the change of the attention pattern with the donor's tokens, times the gradient at
    the pattern, instead of a gradient through the softmax; whatever else reads the keys (an expert) stays linear.
    grad_drop: against direct and indirect effects that cancel, one backward pass for each block whose writes then pass
    no gradient, and the mean magnitude of the estimates (GradDrop, section 3.1.2): effects lose their sign.
    Raises as `activation_patching`; ValueError for a metric without gradient.
    """
    runs, cells, tape = _begin(
        model, clean, corrupted, sites, segments, denoise_steps, direction, noise, read, grad_drop
    )
    names = list(dict.fromkeys(cell.site for cell in cells))
    fixed = [cell for cell in cells if qk_fix and pattern_of(model, cell.site) is not None]
    patterns = list(dict.fromkeys(pattern for cell in fixed if (pattern := pattern_of(model, cell.site))))
    scores = [name.replace("hook_pattern", "hook_attn_scores") for name in patterns]
    dropped: list[str] = []
    graph = GraphRun.of(
        runs, tape, [[]] * runs.rows, list(dict.fromkeys([*names, *patterns, *scores])),
        [(_writes(model), _dropping(dropped))] if grad_drop else [],
    )  # fmt: skip
    base = graph.came_to.detach()
    value = graph.measured(runs, metric, base)
    change = PatternChange.of(runs, tape, fixed, graph.nodes) if fixed else None
    blocks = _blocks(model) if grad_drop else [""]
    total: dict[tuple[Cell, int], Tensor] = {}
    for block in blocks:
        dropped[:] = [block] if block else []
        gradients = graph.nodes.gradients(value.sum(), graph.nodes.keys(graph.nodes.values))
        for cell in cells:
            for pair in range(runs.rows):
                if not runs.has(cell, pair):
                    continue
                if change is not None and cell in fixed:
                    effect = change.effect(cell, pair, gradients)
                else:
                    effect = linear_effect(runs, cell, pair, graph.nodes, gradients)
                total[cell, pair] = total.get((cell, pair), 0.0) + (effect.abs() if grad_drop else effect)
    # a node's own block passes it nothing, so one of the passes is always empty
    n = max(1, len(blocks) - 1)
    return _result(runs, cells, {key: effect / n for key, effect in total.items()}, metric, base)


def integrated_gradients(
    model: HookedModel,
    clean: object,
    corrupted: object,
    sites: NamesFilter = RESIDUALS,
    segments: Sequence[str | None] | None = None,
    denoise_steps: Sequence[int] | None = None,
    metric: Metric = recovery,
    direction: Direction = "denoising",
    *,
    noise: Noise,
    read: str | None = None,
    n_points: int = 8,
    batch_rows: int = 32,
) -> PatchingResult:
    """As `attribution_patching`, the gradient averaged over `n_points` midpoints on the straight way to the donor.

    Each cell has a way of its own, on which only its tokens move; at a site that runs repeatedly those of all its
    steps move together. Rows of a batch are points and cells.
    Raises as `attribution_patching`; ValueError for no points.
    """
    if n_points < 1:
        raise ValueError(f"n_points must be at least 1, got {n_points}")
    runs, cells, tape = _begin(model, clean, corrupted, sites, segments, denoise_steps, direction, noise, read, False)
    base = runs.run([[]] * runs.rows, tape)
    points = [(cell, (i + 0.5) / n_points) for cell in cells for i in range(n_points)]
    points.sort(key=lambda each: tape.first(each[0].site, each[0].steps))
    per_batch = max(1, batch_rows // runs.rows)
    total: dict[tuple[Cell, int], Tensor] = {}
    for start in range(0, len(points), per_batch):
        batch = points[start : start + per_batch]
        edits = [patch for cell, share in batch for patch in runs.patches(cell, share)]
        names = list(dict.fromkeys(cell.site for cell, _ in batch))
        graph = GraphRun.of(runs, tape, edits, names)
        value = graph.measured(runs, metric, base)
        gradients = graph.nodes.gradients(value.sum(), graph.nodes.keys(names))
        for i, (cell, share) in enumerate(batch):
            for pair in range(runs.rows):
                if runs.has(cell, pair):
                    slope = _slope(runs, cell, pair, graph, gradients, i * runs.rows + pair, len(edits), share)
                    total[cell, pair] = total.get((cell, pair), 0.0) + slope / n_points
    return _result(runs, cells, total, metric, base)


def _slope(
    runs: Runs, cell: Cell, pair: int, graph: GraphRun, gradients: dict, row: int, n_rows: int, share: float
) -> Float[Tensor, ""]:
    """How the metric changes with the share of the donor, at that share. For y = x + share·(donor - x),
    dy/dshare = donor - x = (donor - y)/(1 - share)."""
    total = torch.zeros((), dtype=torch.float64)
    for step in steps_of(cell, graph.nodes):
        value = graph.nodes.values[cell.site][step].detach()
        place = Place.of(runs, cell, pair, value, n_rows, row)
        change = (donor_tokens(runs, cell, pair, place, step) - place.pick(value)) / (1 - share)
        total += (change.double() * place.pick(gradients[cell.site, step]).double()).sum().cpu()
    return total


def agreement(exact: PatchingResult, estimate: PatchingResult, top: int = 10) -> Agreement:
    """How well an estimate's effects agree with exact ones. top: for the overlap, at most as many as there are.

    Dead ends are left out: both know them to be 0. Correlations are NaN where one of the two is constant.
    Raises ValueError where the two are not of the same cells, or of fewer than two.
    """
    both = [_effects(each) for each in (exact, estimate)]
    cells = list(both[0])
    if set(both[0]) != set(both[1]) or len(cells) < 2:
        raise ValueError(
            "exact and estimate must be of the same cells, at least two of which reach the action; they have "
            f"{len(both[0])} and {len(both[1])}, {len(set(both[0]) & set(both[1]))} in common"
        )
    first, second = (np.array([each[cell] for cell in cells]) for each in both)
    top = min(top, len(cells))
    order = [np.argsort(-np.abs(each), kind="stable").tolist() for each in (first, second)]
    largest = [set(each[:top]) for each in order]
    return Agreement(
        pearson=_correlation(first, second),
        spearman=_correlation(rankdata(first), rankdata(second)),
        top_overlap=len(largest[0] & largest[1]) / top,
        missed=len(largest[0] & set(order[1][-(len(cells) // 2) :])),
        top=top,
        n=len(cells),
    )


def _effects(result: PatchingResult) -> dict[tuple[str, str, int, int], float]:
    """Effects of the cells that reach the action."""
    return {
        (row["site"], row["segment"], -1 if pd.isna(row["denoise_step"]) else row["denoise_step"], row["pair"]): effect
        for row in result.table.to_dict("records")
        if row["reaches_action"] and (effect := row["effect"]) is not None
    }


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    a, b = first - first.mean(), second - second.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale else float("nan")


def _begin(
    model: HookedModel,
    clean: object,
    corrupted: object,
    sites: NamesFilter,
    segments: Sequence[str | None] | None,
    denoise_steps: Sequence[int] | None,
    direction: Direction,
    noise: Noise,
    read: str | None,
    from_the_start: bool,
) -> tuple[Runs, list[Cell], Tape]:
    """The runs with their donor, the cells, and a tape that ends where the first of them begins."""
    runs = Runs.of(model, clean, corrupted, direction, noise, read)
    cells = plan_cells(model, runs.segments, sites, segments, denoise_steps)
    names = list(dict.fromkeys(cell.site for cell in cells))
    runs.run_donor(names)
    return runs, cells, Tape.record(model, runs.base, runs.noise, [] if from_the_start else names, n_steps=1)


def _result(
    runs: Runs, cells: Sequence[Cell], effects: dict[tuple[Cell, int], Tensor], metric: Metric, base: Tensor
) -> PatchingResult:
    with torch.no_grad():
        both = [metric(each, base, runs.donor_came_to) for each in (base, runs.donor_came_to)]
    unpatched, given = both
    rows = []
    for cell in cells:
        about, caveats = cell.describe(), runs.caveats(cell)
        for pair in range(runs.rows):
            if (cell, pair) in effects:
                effect, start = float(effects[cell, pair]), float(unpatched[pair])
                share = effect / (float(given[pair]) - start) if given[pair] != unpatched[pair] else float("nan")
                rows.append(about | {"pair": pair, "value": start + effect, "effect": effect, "share": share} | caveats)
    return PatchingResult(tabulated(rows), unpatched, given)


def _block(name: str) -> str | None:
    """The block that a point belongs to."""
    number = hook_names.layer(name)
    return None if number is None else f"{name.split('.blocks.')[0]}.blocks.{number}"


def _writes(model: HookedModel) -> list[str]:
    return [name for name in model.points if hook_names.leaf(name) in WRITES and _block(name) is not None]


def _blocks(model: HookedModel) -> list[str]:
    return list(dict.fromkeys(block for name in _writes(model) if (block := _block(name)) is not None))


def _dropping(dropped: list[str]):
    """A hook at what blocks write: no gradient passes it while its block is in the list."""

    def drop(value: Tensor, hook: HookPoint) -> Tensor | None:
        if not value.requires_grad:
            return None
        node, block = value.view_as(value), _block(hook.name)
        node.register_hook(lambda gradient: torch.zeros_like(gradient) if block in dropped else None)
        return node

    return drop
