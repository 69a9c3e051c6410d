"""What gradients say of a policy's sites, against patching each of them: sites × segments of one batch of observations.

Each observation is told its own task and another one; what a site holds of the other is patched into the first. Exact
activation patching runs every patch; the estimates come from gradients (analysis/attribution.py). Models that read no
text are given another scene's observation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hooked_vla.analysis.attribution import agreement, attribution_patching, integrated_gradients
from hooked_vla.analysis.metrics import recovery
from hooked_vla.analysis.patching import PatchingResult, activation_patching
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.batteries.reach import reads_text
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import COLOURS, MARKERS, new_figure
from hooked_vla.rollouts.experiments.kinds.battery_runs import records, settings_in
from hooked_vla.rollouts.experiments.kinds.injection_runs import turned_tasks
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import constant_text
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

# kinds of sites, by their last word
KINDS = {
    "hook_resid_post": "residual stream",
    "hook_attn_out": "written by a block",
    "hook_cross_attn_out": "written by a block",
    "hook_mlp_out": "written by a block",
    "hook_q": "queries and keys",
    "hook_k": "queries and keys",
}
ALL = "all"
EXACT = "exact"
ATP, ATP_STAR, GRAD_DROP, INTEGRATED = "AtP", "AtP* (QK fix)", "AtP* (QK fix, GradDrop)", "integrated gradients"
# scores of the first token that a discrete head says; which one it says has no gradient
LOGITS = "vlm.hook_logits"
# of the cells of a kind, those whose exact effects are this share of the largest are what an estimate must not miss
_TOP = 0.25
_KEYS = ["site", "segment", "pair"]


def agreement_sites(model: HookedModel, blocks: Sequence[str]) -> list[str]:
    """What these blocks hand on, write, ask and offer, where an action depends on it."""
    about = model.hook_points
    return [
        name for name in model.points
        if hook_names.leaf(name) in KINDS and about[name].reaches_action and about[name].axes[0] == "batch"
        and any(name.startswith(f"{block}.") for block in blocks)
    ]  # fmt: skip


def agreement_cells(context: Context, suite: str, blocks: Sequence[str], n_pairs: int, n_points: int) -> pd.DataFrame:
    """One row a site, segment and pair of runs: its kind, the exact effect of the patch, and every estimate of it.

    An effect is the share of the way to the other run's actions, or to its first token's scores where a policy says
    its actions as tokens. n_points: of integrated gradients.
    """
    model, starts = context.model, context.observations(suite, n_pairs)
    settings = settings_in(context, suite, context.options)
    frames = [dict(seen.frame) for seen in starts]
    others = [*frames[1:], frames[0]]
    if reads_text(model, settings, frames[0]):
        names = [task.id for task in get_suite(suite).tasks]
        told = dict(zip(names, turned_tasks(suite, 1), strict=True))
        others = [
            {**frame, "instruction": get_suite(suite).task(told[seen.task]).instruction}
            for frame, seen in zip(frames, starts, strict=True)
        ]
    with constant_text(model.processor, settings.constant_text):
        base, donor = (prepare(model, settings, each) for each in (frames, others))
        noise = SeededNoise.of(model, prepare(model, settings, frames[:1]))([seen.seed for seen in starts], 0)
        given: dict[str, Any] = {"sites": agreement_sites(model, blocks), "noise": list(noise)}
        if LOGITS in model.points:
            given |= {"read": LOGITS, "metric": _recovered_scores}
        found = {EXACT: activation_patching(model, donor, base, **given)}
        for name, method in _methods(n_points).items():
            found[name] = method(model, donor, base, **given)
    effects = {
        name: {tuple(row[key] for key in _KEYS): row["effect"] for row in records(result.table)}
        for name, result in found.items()
    }
    return pd.DataFrame(
        [
            {"kind": KINDS[hook_names.leaf(place[0])], **dict(zip(_KEYS, place, strict=True))}
            | {name: each[place] for name, each in effects.items()}
            for place in effects[EXACT]
        ]
    )


def _recovered_scores(edited: Tensor, clean: Tensor, source: Tensor) -> Tensor:
    """`recovery` of scores [row ... vocab]."""
    return recovery(*(scores.flatten(1).unsqueeze(1) for scores in (edited, clean, source)))


def _methods(n_points: int) -> dict[str, Callable[..., PatchingResult]]:
    return {
        ATP: lambda *args, **given: attribution_patching(*args, **given, qk_fix=False),
        ATP_STAR: lambda *args, **given: attribution_patching(*args, **given),
        GRAD_DROP: lambda *args, **given: attribution_patching(*args, **given, grad_drop=True),
        INTEGRATED: lambda *args, **given: integrated_gradients(*args, **given, n_points=n_points),
    }


def agreement_table(cells: pd.DataFrame) -> pd.DataFrame:
    """One row a method and kind of site ("all": all of them): correlations with exact patching, overlap of the quarter
    of the cells with the largest effects, and how many of these the method puts in its lower half (missed)."""
    rows = []
    for method in (ATP, ATP_STAR, GRAD_DROP, INTEGRATED):
        for kind in (ALL, *dict.fromkeys(cells["kind"])):
            mine = [row for row in records(cells) if kind in (ALL, row["kind"])]
            if len(mine) < 2:
                continue
            both = (_result(mine, [_exact(row, method) for row in mine]), _result(mine, [row[method] for row in mine]))
            found = agreement(*both, top=max(1, round(_TOP * len(mine))))
            rows.append(
                {"method": method, "kind": kind, "n": found.n, "pearson": found.pearson, "spearman": found.spearman,
                 "top": found.top, "top_overlap": found.top_overlap, "missed": found.missed}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _exact(row: Mapping[str, Any], method: str) -> float:
    """The exact effect as a method estimates it: GradDrop's estimates are magnitudes."""
    return abs(row[EXACT]) if method == GRAD_DROP else row[EXACT]


def _result(cells: Sequence[Mapping[str, Any]], effects: Sequence[float]) -> PatchingResult:
    rows = [
        {**{key: row[key] for key in _KEYS}, "denoise_step": None, "effect": effect, "reaches_action": True}
        for row, effect in zip(cells, effects, strict=True)
    ]
    n = max(row["pair"] for row in cells) + 1
    return PatchingResult(pd.DataFrame(rows), torch.zeros(n), torch.ones(n))


def agreement_figure(cells: pd.DataFrame, table: pd.DataFrame) -> tuple[Figure, str]:
    """Every estimate over the exact effect, a panel a method, a colour and marker a kind of site."""
    methods, rows = list(dict.fromkeys(table["method"])), records(cells)
    figure = new_figure(3.1 * len(methods) + 0.6, 3.9)
    panels = figure.subplots(1, len(methods), squeeze=False)[0]
    rho = {row["method"]: row["spearman"] for row in records(table) if row["kind"] == ALL}
    for axes, method in zip(panels, methods, strict=True):
        exact = [_exact(row, method) for row in rows]
        for i, kind in enumerate(dict.fromkeys(row["kind"] for row in rows)):
            mine = [j for j, row in enumerate(rows) if row["kind"] == kind]
            axes.scatter([exact[j] for j in mine], [rows[j][method] for j in mine], s=14, alpha=0.6, color=COLOURS[i],
                         marker=MARKERS[i], linewidths=0, label=kind)  # fmt: skip
        ends = [min(exact), max(exact)]
        axes.plot(ends, ends, color="#555555", linestyle="--", linewidth=1)
        # far outliers would hide all others: they are drawn at the edge's scale
        scale = max(abs(np.array(ends)).max(), 1e-6)
        axes.set_yscale("symlog", linthresh=scale)
        # a logarithmic axis names powers of ten alone, which here are 0 and 1
        shown = axes.get_ylim()
        inner = MaxNLocator(5).tick_values(max(shown[0], -scale), min(shown[1], scale))
        linear = [tick for tick in inner if abs(tick) <= scale]
        ticks = [*linear, *(tick for tick in axes.get_yticks() if abs(tick) > scale)]
        ticks = [tick for tick in ticks if shown[0] <= tick <= shown[1]]
        axes.set_yticks(ticks, [f"{tick:.3g}" for tick in ticks])
        axes.set_yticks([], minor=True)
        axes.set_title(f"{method}\nSpearman {rho[method]:.2f}", fontsize=9)
        axes.set_xlabel("|exact effect|" if method == GRAD_DROP else "exact effect", fontsize=9)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("estimate", fontsize=9)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8,
                  frameon=False)  # fmt: skip
    caption = (
        "Estimates from gradients over the exact effect of patching, a point a site, segment and pair of runs; dashed: "
        "where the two are equal. Beyond the largest exact effect the vertical axis is logarithmic."
    )
    return figure, caption
