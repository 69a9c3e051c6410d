"""The image battery in closed loop: every picture of an episode is changed in one way, before any preprocessing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.batteries.arms import ImageArm
from hooked_vla.rollouts.batteries.images import GEOMETRIC, IMAGE_KINDS, PHOTOMETRIC, REMOVAL, check_strength
from hooked_vla.rollouts.batteries.reach import reaches
from hooked_vla.rollouts.experiments.compare import Runs, by_task
from hooked_vla.rollouts.experiments.context import Context, Seen
from hooked_vla.rollouts.experiments.figures import curve, new_figure, success_bars
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, undecided
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    CHANGED,
    PARTLY,
    RUN,
    UNCHANGED,
    arms_of,
    cell_of,
    changes,
    compare_suites,
    few_tasks,
    gate_note,
    keep,
    limited,
    points,
    records,
    run_suite,
    settings_in,
    significant,
    threshold,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict

with needs_analysis_extra():
    import pandas as pd
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Settings:
    """episodes: of each suite and arm. wordless_suites: in place of suites for models that read no words. max_steps:
    after which an episode has failed. kinds: of IMAGE_KINDS; none for all. strengths: of the kinds that have degrees;
    rules are judged at 1. cameras: whose pictures are changed; none for all that the policy sees."""

    episodes: int
    suites: tuple[str, ...] = ("goal", "object")
    wordless_suites: tuple[str, ...] = ("object", "spatial")
    max_steps: int = 120
    kinds: tuple[str, ...] = ()
    strengths: tuple[float, ...] = (1.0,)
    cameras: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if unknown := [kind for kind in self.kinds if kind not in IMAGE_KINDS]:
            raise ValueError(f"unknown kinds {unknown} of image changes; kinds: {list(IMAGE_KINDS)}")
        if 1.0 not in self.strengths:
            raise ValueError(f"strengths must have 1, at which the rules are judged; got {list(self.strengths)}")

    def arms(self) -> list[ImageArm]:
        """Every kind at strength 1 under its own name, at others as "kind x0.5"."""
        made = []
        for kind in self.kinds or IMAGE_KINDS:
            for strength in self.strengths if IMAGE_KINDS[kind].graded else (1.0,):
                check_strength(kind, strength)
                name = kind if strength == 1 else f"{kind} x{strength:g}"
                made.append(ImageArm(name, kind, strength, self.cameras or None))
        return made


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a camera that the policy does not see."""
    arms = {arm.name: arm for arm in settings.arms()}
    suites = settings.suites if context.reads_words else settings.wordless_suites
    reach = context.table("reach", lambda: pd.concat([check_images(context, settings, each) for each in suites]))
    runs = dict[str, Runs]()
    for suite in suites:
        wanted = [row for row in records(reach) if row["suite"] == suite and row["status"] in RUN]
        # where some episodes' pictures are known to stay as they are, these are run all the same
        mine = [
            replace(arms[row["arm"]], inert="run") if row["status"] == PARTLY else arms[row["arm"]] for row in wanted
        ]
        runs[suite] = run_suite(context, suite, mine, settings.episodes, limited(context, settings.max_steps))
    table = compare_suites(context, runs.values())
    table.insert(2, "group", [_group(arms, arm) for arm in table["arm"]])
    table.insert(3, "strength", [arms[arm].strength if arm in arms else float("nan") for arm in table["arm"]])
    at_one = keep(table, lambda row: row["arm"] not in arms or row["strength"] == 1)
    bars = success_bars(at_one, reference=BASELINE.name)
    figures = {
        "success": (bars, "Success under every change of the pictures at strength 1; dashed: the baseline's."),
        "pictures": (_pictures(context, settings), "The first picture of the first episode, as each kind changes it."),
    }
    if len(settings.strengths) > 1:
        graded = keep(table, lambda row: row["arm"] in arms and IMAGE_KINDS[arms[row["arm"]].kind].graded)
        graded.insert(0, "kind", [arms[arm].kind for arm in graded["arm"]])
        for suite in suites:
            mine = keep(graded, lambda row, suite=suite: row["suite"] == suite)
            drawn = curve(mine, "strength", "success", "kind", title=suite, ylabel="success")
            figures[f"strengths_{suite}"] = (drawn, f"Success in {suite} over the strength of the change.")
    return Outcome(
        main=table,
        verdicts=[
            _cost(context, table, runs, "photometric-tolerated", PHOTOMETRIC, below=True),
            _cost(context, table, runs, "geometric-fatal", GEOMETRIC, below=False),
        ],
        tables={"reach": reach, "tasks": pd.concat([by_task(each) for each in runs.values()], ignore_index=True)},
        figures=figures,
        labels=_labels(records(reach)),
        notes=[*_notes(records(reach)), *few_tasks(table)],
    )


def check_images(context: Context, settings: Settings, suite: str) -> pd.DataFrame:
    """What of every arm reaches the model in the run's own first observations: one row an arm.

    changed: share of the episodes in which a pixel differs behind the preprocessing. pixels: mean share of the numbers
    that differ; pixel_change: their mean absolute difference, in the model's units.
    """
    starts = context.observations(suite, settings.episodes)
    prepared = settings_in(context, suite, limited(context, settings.max_steps))
    seen_cameras = sorted(set(prepared.cameras.values()))
    if unseen := sorted(set(settings.cameras) - set(seen_cameras)):
        raise ValueError(f"{context.model_name} does not see the cameras {unseen}; it sees {seen_cameras}")
    # as in a rollout: the policy's cameras alone are drawn
    frames = [_only(seen, seen_cameras) for seen in starts]
    rows = []
    for arm in settings.arms():
        found = [
            reaches(context.model, prepared, frame, arm.observe(cell_of(arm, seen), 0, frame))
            for seen, frame in zip(starts, frames, strict=True)
        ]
        share = sum(each.pixels > 0 for each in found) / len(found)
        rows.append(
            {
                "suite": suite,
                "arm": arm.name,
                "group": IMAGE_KINDS[arm.kind].group,
                "status": CHANGED if share == 1 else PARTLY if share else UNCHANGED,
                "changed": share,
                "pixels": sum(each.pixels for each in found) / len(found),
                "pixel_change": sum(each.pixel_change for each in found) / len(found),
                "description": IMAGE_KINDS[arm.kind].description,
            }
        )
    return pd.DataFrame(rows)


def _only(seen: Seen, cameras: Sequence[str]) -> dict[str, Any]:
    return {**seen.frame, "pixels": {camera: seen.frame["pixels"][camera] for camera in cameras}}


def _group(arms: dict[str, ImageArm], name: str) -> str:
    return IMAGE_KINDS[arms[name].kind].group if name in arms else ""


def _cost(
    context: Context, table: pd.DataFrame, runs: Mapping[str, Runs], rule: str, group: str, below: bool
) -> Verdict:
    """Whether the median cost of a group's kinds at strength 1 is below the rule's limit (below False: reaches it) in
    every suite; not judged where one of them cannot be."""
    limit = threshold(context, rule)
    held, said = list[bool | None](), []
    for suite, mine in runs.items():
        rows = [row for row in arms_of(table, suite) if row["group"] == group and row["strength"] == 1]
        if (why := gate_note(table, suite)) or not rows:
            held.append(None)
            said.append(why or f"no {group} kind was run in {suite}")
            continue
        change, tasks = changes(mine, suite, [row["arm"] for row in rows])
        median, low, high = change_interval(-change, tasks, lambda means: np.median(means, axis=1), context.seed)
        held.append(decide(low, high, limit, below))
        each = ", ".join(f"{row['arm']} {points(row['difference'])}" for row in rows)
        said.append(
            f"{suite}: median change {points(-median)} ({points(-high)} to {points(-low)}; {each}); "
            f"{significant(rows)}{undecided(held[-1])}"
        )
    holds = False if False in held else None if None in held else True
    return Verdict(rule, holds, "; ".join(said))


def _pictures(context: Context, settings: Settings) -> Figure:
    """The policy's first camera at the start of the first episode, under every kind at strength 1."""
    suite = settings.suites[0]
    prepared = settings_in(context, suite, limited(context, settings.max_steps))
    start = context.observations(suite, 1)[0]
    camera = settings.cameras[0] if settings.cameras else sorted(prepared.cameras.values())[0]
    frame = _only(start, [camera])
    arms = [arm for arm in settings.arms() if arm.strength == 1]
    columns = min(7, len(arms) + 1)
    rows = -(-(len(arms) + 1) // columns)
    figure = new_figure(1.5 * columns, 1.75 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for place in axes:
        place.set_axis_off()
    shown = [(BASELINE.name, frame), *((a.name, a.observe(cell_of(a, start), 0, frame)) for a in arms)]
    for place, (name, seen) in zip(axes, shown, strict=False):
        place.imshow(seen["pixels"][camera])
        place.set_title(name, fontsize=8)
    return figure


def _labels(reach: list[dict[str, Any]]) -> list[str]:
    idle = ", ".join(f"{row['arm']} ({row['suite']})" for row in reach if row["status"] == UNCHANGED)
    return [f"no pixel changed: {idle}. The model gets the same images, so these were not run."] if idle else []


def _notes(reach: list[dict[str, Any]]) -> list[str]:
    notes = [
        "Pictures are changed alike at every step of an episode; noise is drawn anew at each, from the episode's seed.",
        "Blocks and pads are told apart by their colours: kinds that change or remove colour take away what goals are "
        "made of, which other photometric kinds do not.",
        f"Kinds of the group {REMOVAL} are controls: what is left of success without the picture, or its middle.",
        "Geometric kinds move what cameras show while the state still tells where the end effector is: the two then "
        "contradict each other, which no demonstration did.",
    ]
    for row in reach:
        if row["status"] == PARTLY:
            notes.append(
                f"{row['arm']} in {row['suite']} changes pixels in {row['changed']:.0%} of the first observations."
            )
    return notes
