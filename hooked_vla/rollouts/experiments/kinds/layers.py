"""The layer grid: every block of prefix and expert is taken out in closed loop: zero, its mean, or skipped."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
from hooked_vla.analysis.statistics import mcnemar
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions import EditArm, cut_set
from hooked_vla.rollouts.activations import ActivationRecorder, ActivationRecording, ActivationWatcher
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import Runs, by_task
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    ALPHA,
    changes,
    compare_suites,
    gate_note,
    keep,
    limited,
    records,
    run_suite,
    threshold,
)
from hooked_vla.rollouts.experiments.kinds.layers_agreement import (
    LOGITS,
    agreement_cells,
    agreement_figure,
    agreement_table,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict

with needs_analysis_extra():
    import pandas as pd

# starts of the episodes that means are taken from, away from those that are judged
_APART = 50_000


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. wordless_suite: in place of suite for models that read no words. source_episodes: of the
    policy's own, from other starts, that means and tokens are taken from. kinds: of ablation. pathways: whose blocks;
    those that the model lacks are left out. every: only every so many blocks of a pathway, from its first on.
    max_steps: after which an episode has failed. pairs: of runs in which estimates by gradients are held against exact
    patching, 0 for none; points: of integrated gradients."""

    episodes: int
    source_episodes: int
    suite: str = "goal"
    wordless_suite: str = "object"
    kinds: tuple[str, ...] = ("zero", "mean", "skip")
    pathways: tuple[str, ...] = ("vlm", "encoder", "adapter", "expert")
    every: int = 1
    max_steps: int = 72
    pairs: int = 0
    points: int = 8

    def __post_init__(self) -> None:
        if self.pairs == 1 or self.pairs < 0:
            raise ValueError(f"pairs must be 0, for none, or at least 2, got {self.pairs}")
        if unknown := [kind for kind in self.kinds if kind not in get_args(Ablation)]:
            raise ValueError(f"unknown kinds {unknown} of ablation; kinds: {list(get_args(Ablation))}")
        if self.every < 1:
            raise ValueError(f"every must be at least 1, got {self.every}")


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model without blocks in the pathways."""
    model = context.model
    settings = settings if context.reads_words else replace(settings, suite=settings.wordless_suite)
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
    apart = contrasts(settings, runs, table)
    tables, figures = _agreement(context, settings, alive)
    return Outcome(
        main=table,
        verdicts=[
            _zero_fatal(context, settings, table),
            *(_graded(context, settings, table, apart, kind) for kind in ("mean", "skip")),
        ],
        tables={"contrasts": apart, "tasks": by_task(runs), **tables},
        figures={**_figures(context, keep(table, lambda row: row["arm"] in cells)), **figures},
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


def _agreement(
    context: Context, settings: Settings, alive: Sequence[str]
) -> tuple[dict[str, pd.DataFrame], dict[str, tuple[Any, str]]]:
    """How estimates of patches by gradients agree with exact patching in these blocks."""
    if not settings.pairs:
        return {}, {}
    cells = context.table(
        "patches", lambda: agreement_cells(context, settings.suite, alive, settings.pairs, settings.points)
    )
    table = agreement_table(cells)
    return {"agreement": table, "patches": cells}, {"agreement": agreement_figure(cells, table)}


def contrasts(settings: Settings, runs: Runs, table: pd.DataFrame) -> pd.DataFrame:
    """For every kind of ablation the blocks in which success is least and most, and McNemar's test between the two.

    adjusted_p: times the number of pairs of blocks, of which these were chosen (Bonferroni).
    """
    rows = []
    for kind in settings.kinds:
        ordered = sorted(_cells(table, kind), key=lambda row: row["success"])
        if len(ordered) < 2:
            continue
        low, high = ordered[0], ordered[-1]
        change, _ = changes(runs, settings.suite, [high["arm"]], than=low["arm"])
        only = [int((change == sign).sum()) for sign in (1, -1)]
        p = mcnemar(change[:, 0] > 0, change[:, 0] < 0).p_value
        pairs = len(ordered) * (len(ordered) - 1) // 2
        rows.append(
            {"ablation": kind, "least": low["block"], "most": high["block"], "spread": high["success"] - low["success"],
             "only_most": only[0], "only_least": only[1], "p": p, "pairs": pairs, "adjusted_p": min(1.0, p * pairs)}
        )  # fmt: skip
    names = ["ablation", "least", "most", "spread", "only_most", "only_least", "p", "pairs", "adjusted_p"]
    return pd.DataFrame(rows, columns=names)


def _zero_fatal(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    rule, limit = "zero-fatal", threshold(context, "zero-fatal")
    rows, why = _cells(table, "zero"), gate_note(table, settings.suite)
    if why or not rows:
        return Verdict(rule, None, why or "zero was not run")
    survive = [f"{row['block']} {row['success']:.0%}" for row in rows if row["success"] > limit]
    mean = sum(row["success"] for row in rows) / len(rows)
    said = (
        f"success at most {limit:.0%} in {len(rows) - len(survive)} of {len(rows)} blocks, {mean:.0%} on the mean; the "
        f"largest upper end of an interval is {max(row['success_high'] for row in rows):.0%}"
    )
    return Verdict(rule, not survive, said + (f"; above the rule's share: {', '.join(survive)}" if survive else ""))


def _graded(context: Context, settings: Settings, table: pd.DataFrame, apart: pd.DataFrame, kind: str) -> Verdict:
    """Whether blocks differ by as much as the rule says, and by more than the extremes of so many blocks do by
    chance."""
    rule = f"{kind}-graded"
    limit, rows, why = threshold(context, rule), _cells(table, kind), gate_note(table, settings.suite)
    found = [row for row in records(apart) if row["ablation"] == kind]
    if why or not found:
        return Verdict(rule, None, why or f"{kind} was run in {len(rows)} blocks: nothing to compare")
    ends, each = found[0], ", ".join(f"{row['block']} {row['success']:.0%}" for row in rows)
    sure = ends["adjusted_p"] < ALPHA
    holds = False if ends["spread"] < limit else True if sure else None
    few = "" if holds is not None else "; too few episodes to tell that from chance: undecided"
    return Verdict(
        rule,
        holds,
        f"{ends['most']} and {ends['least']} are {100 * ends['spread']:.0f} pp apart (McNemar p = {ends['p']:.2g}, "
        f"{ends['adjusted_p']:.2g} for {ends['pairs']} pairs of blocks; {each}){few}",
    )


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
    if settings.pairs:
        goal = "first token's scores" if LOGITS in context.model.points else "actions"
        donor = "is told another task" if context.reads_words else "sees another scene, since it reads no words"
        notes.append(
            f"Estimates by gradients are of patches from a run that {donor}, in every segment of what each "
            f"block hands on, writes, asks and offers; effects are shares of the way to the other run's {goal}. An "
            "estimate misses a cell that is in the quarter with the largest exact effects and in the lower half of "
            "its own. GradDrop's are magnitudes and are held against magnitudes."
        )
    if normed := [block for block in alive if not skips_exactly(context.model, block)]:
        ways = ", ".join(dict.fromkeys(hook_names.pathway(block) for block in normed))
        notes.append(f"Blocks of {ways} are post-norm: where they are skipped, their norms are left.")
    return notes
