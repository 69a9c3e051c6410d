"""The layer grid: every block of prefix and expert is taken out in closed loop: zero, its mean, or skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast, get_args

import torch
from torch import Tensor

from hooked_vla.analysis.ablation import (
    OUTPUT,
    Ablation,
    ablate_block,
    list_blocks,
    reaches_action,
    skips_exactly,
)
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions import EditArm, cut_set
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import by_task
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    compare_suites,
    gate_note,
    keep,
    limited,
    records,
    run_suite,
    threshold,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict

with needs_analysis_extra():
    import pandas as pd

# starts of the episodes that means are taken from, away from those that are judged
_APART = 50_000


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. source_episodes: of the policy's own, from other starts, that means and tokens are taken
    from. kinds: of ablation. pathways: whose blocks; those that the model lacks are left out. every: only every so many
    blocks of a pathway, from its first on. max_steps: after which an episode has failed."""

    episodes: int
    source_episodes: int
    suite: str = "goal"
    kinds: tuple[str, ...] = ("zero", "mean", "skip")
    pathways: tuple[str, ...] = ("vlm", "encoder", "adapter", "expert")
    every: int = 1
    max_steps: int = 72

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in get_args(Ablation)]:
            raise ValueError(f"unknown kinds {unknown} of ablation; kinds: {list(get_args(Ablation))}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model without blocks in the pathways."""
    model = context.model
    there = {hook_names.pathway(block) for block in list_blocks(model)}
    ways = [way for way in settings.pathways if way in there]
    if not ways:
        raise ValueError(f"{context.model_name} has no blocks in {list(settings.pathways)}; it has {sorted(there)}")
    blocks = [block for way in ways for block in list_blocks(model, [way])[:: settings.every]]
    alive = [block for block in blocks if reaches_action(model, block)]
    sources = _sources(context, settings, [f"{block}.{OUTPUT}" for block in alive])
    kinds = cast(tuple[Ablation, ...], settings.kinds)
    cells: dict[str, tuple[Ablation, str]] = {f"{kind} {block}": (kind, block) for block in alive for kind in kinds}
    arms = [EditArm(name, ablate_block(model, block, kind, sources[kind])) for name, (kind, block) in cells.items()]
    options = limited(context, settings.max_steps)
    runs = run_suite(context, settings.suite, arms, settings.episodes, options)
    table = compare_suites(context, [runs])
    for place, (column, i) in enumerate((("ablation", 0), ("block", 1)), start=2):
        table.insert(place, column, [cells[arm][i] if arm in cells else "" for arm in table["arm"]])
    return Outcome(
        main=table,
        verdicts=[
            _zero_fatal(context, settings, table),
            *(_graded(context, settings, table, kind) for kind in ("mean", "skip")),
        ],
        tables={"tasks": by_task(runs)},
        figures=_figures(context, keep(table, lambda row: row["arm"] in cells)),
        labels=_labels(context, blocks, alive),
        notes=_notes(context, settings, alive),
    )  # fmt: skip


def _sources(context: Context, settings: Settings, sites: Sequence[str]) -> Mapping[str, dict[str, Tensor]]:
    """What each kind of ablation takes the place of the sites' values from: the policy's own episodes, elsewhere."""
    found: dict[str, dict[str, Tensor]] = {kind: {} for kind in settings.kinds}
    if not {"mean", "resample"} & set(settings.kinds):
        return found
    seed = context.seed + _APART
    about = {"model": context.model_name, "suite": settings.suite, "seed": seed}
    with ActivationRecorder(context.folder("on_policy"), about) as recorder:
        context.rollouts(
            "on_policy", settings.suite, (BASELINE,), settings.source_episodes,
            watchers=[ActivationWatcher(recorder, list(sites))], seed=seed,
            options=limited(context, settings.max_steps),
        )  # fmt: skip
    recording = ActivationRecording(context.folder("on_policy"))
    for site in sites:
        if "mean" in found:
            found["mean"][site] = _mean(recording, site)
        if "resample" in found:
            tokens = recording.stack(site).values.flatten(0, 1)
            chosen = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(context.seed))
            found["resample"][site] = tokens[chosen[:4096]]
    return found


def _mean(recording: ActivationRecording, site: str) -> Tensor:
    """Of every place, and at sites of the expert of every denoise step: [seq channels], or [denoise 1 seq channels]."""
    steps = sorted({step for _, _, step in recording.keys(site) if step is not None})
    if not steps:
        return recording.stack(site).values.double().mean(0).float()
    means = [recording.stack(site, denoise_steps=[step]).values.double().mean(0, keepdim=True) for step in steps]
    return torch.stack(means).float()


def _cells(table: pd.DataFrame, kind: str) -> list[dict[str, Any]]:
    return [row for row in records(table) if row["ablation"] == kind]


def _zero_fatal(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    rule, limit = "zero-fatal", threshold(context, "zero-fatal")
    rows, why = _cells(table, "zero"), gate_note(table, settings.suite)
    if why or not rows:
        return Verdict(rule, None, why or "zero was not run")
    survive = [f"{row['block']} {row['success']:.0%}" for row in rows if row["success"] > limit]
    mean = sum(row["success"] for row in rows) / len(rows)
    said = f"success at most {limit:.0%} in {len(rows) - len(survive)} of {len(rows)} blocks, {mean:.0%} on the mean"
    return Verdict(rule, not survive, said + (f"; above it: {', '.join(survive)}" if survive else ""))


def _graded(context: Context, settings: Settings, table: pd.DataFrame, kind: str) -> Verdict:
    rule = f"{kind}-graded"
    limit, rows, why = threshold(context, rule), _cells(table, kind), gate_note(table, settings.suite)
    if why or len(rows) < 2:
        return Verdict(rule, None, why or f"{kind} was run in {len(rows)} blocks: nothing to compare")
    ordered = sorted(rows, key=lambda row: row["success"])
    spread = ordered[-1]["success"] - ordered[0]["success"]
    ends = ", ".join(f"{row['block']} {row['success']:.0%}" for row in (ordered[0], ordered[-1]))
    each = ", ".join(f"{row['block']} {row['success']:.0%}" for row in rows)
    return Verdict(rule, spread >= limit, f"from {ends}: {100 * spread:.0f} pp apart ({each})")


def _figures(context: Context, cells: pd.DataFrame) -> dict[str, tuple[Any, str]]:
    success = heat_map(
        cells, "block", "ablation", "success", f"Success without a block, {context.model_name}", limits=(0.0, 1.0),
        form=".0%",
    )  # fmt: skip
    moved = heat_map(
        cells, "block", "ablation", "displacement", title="Distance from the unablated episode", unit="metres",
    )  # fmt: skip
    return {
        "success": (success, "Success with one block taken out, by what takes its place; n per cell in the table."),
        "displacement": (
            moved,
            "Mean distance of the end effector from that of the paired unablated episode, metres; the rerun's is in "
            "the table's column floor.",
        ),
    }


def _labels(context: Context, blocks: Sequence[str], alive: Sequence[str]) -> list[str]:
    cut = [block for block in alive if cut_set(context.model, {f"{block}.{OUTPUT}"})]
    return [
        *(f"dead end: no action depends on what {block} hands on or writes, so it was not ablated"
          for block in blocks if block not in alive),
        *(f"cut set: what {block} hands on is all that actions are made of; zero and mean there leave nothing of what "
          "the model sees" for block in cut),
    ]  # fmt: skip


def _notes(context: Context, settings: Settings, alive: Sequence[str]) -> list[str]:
    notes = [
        "zero sets the residual stream that a block hands on to 0, whatever came before it; skip takes out what this "
        "block alone adds: the two are not degrees of one thing.",
        f"Means are of each place of the stream (and each denoise step) over {settings.source_episodes} of the "
        "policy's own episodes from other starts.",
    ]
    if normed := [block for block in alive if not skips_exactly(context.model, block)]:
        ways = ", ".join(dict.fromkeys(hook_names.pathway(block) for block in normed))
        notes.append(f"Blocks of {ways} are post-norm: where they are skipped, their norms are left.")
    return notes
