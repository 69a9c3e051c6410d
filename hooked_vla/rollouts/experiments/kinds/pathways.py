"""Expert against VLM: which of the two moves the arm farther when another run's activations are put into it, and what
is left of that once the size of the change, the number of calls and the distance to the output are counted.

Donors are runs of another task from the same start, with the same noise. Controls: noise as large as the change, token
by token; donors of other starts; the rerun's floor.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.model import HookedModel
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_sites import choose_layers, layer_sites
from hooked_vla.interventions.reach import cut_set
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import (
    RERUN,
    Runs,
    join,
    layout_of,
    mean_with_interval,
    path_distance,
    read_runs,
    rerun,
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.battery_runs import compare_suites, gate_note, limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_runs import Recorded, record, rows_of, scene_of, turned_tasks
from hooked_vla.rollouts.experiments.kinds.pathways_arms import DONOR, NOISE, RANDOM, MatchedNoiseArm
from hooked_vla.rollouts.experiments.kinds.pathways_chunks import chunk_sweep
from hooked_vla.rollouts.experiments.kinds.pathways_figures import PER, by_distance, ratios
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import InjectionArm, cross_task, open_recording, same_start

with needs_analysis_extra():
    import pandas as pd

EXPERT = "expert"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. pathway: what the expert is set against. layers: at
    which blocks, counted among those that reach the action and are no replay: "all", "middle", "first", "last" or a
    third of them. max_steps: after which an episode has failed."""

    episodes: int
    suite: str = "goal"
    pathway: str = "vlm"
    layers: str = "middle"
    max_steps: int = 72


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model without the pathways' blocks."""
    model, options = context.model, limited(context, settings.max_steps)
    sites = [site for way in (settings.pathway, EXPERT) for site in _sites(model, way)]
    source = record(context, "source", settings.suite, sites, settings.episodes, options)
    others = turned_tasks(settings.suite, 1)
    turned = record(context, "turned", settings.suite, sites, settings.episodes, options, others)
    chosen = {way: _chosen(model, way, settings.layers) for way in (settings.pathway, EXPERT)}
    arms, cells = _arms(source, turned, [site for each in chosen.values() for site in each])
    main = context.rollouts("main", settings.suite, [BASELINE, *arms], settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    runs = join(read_runs(main), read_runs(again, {BASELINE.name: RERUN}))
    change = context.table("change", lambda: _changes(source, turned, sites))
    chunks = context.table("chunks", lambda: chunk_sweep(context, settings.suite, settings.episodes, sites))
    chunks = _with_distance(model, chunks)
    table = _compare(context, runs, cells, change)
    gaps = _gaps(context, settings, runs, table)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, table, gaps),
        tables={"gaps": gaps, "change": change, "chunks": chunks},
        figures={
            "ratios": (ratios(gaps, settings.pathway), "How much farther the expert's injection moves the arm than the "
                       f"{settings.pathway}'s, raw and per unit of what was changed; 1 is no difference."),
            "distance": (by_distance(chunks), "First chunks: displacement over the number of blocks behind the site, "
                         "raw, and per unit of ‖Δh‖ and call."),
        },
        labels=[f"replay: all of {site} is all that actions are made of; it is left out of the comparison"
                for way in chosen for site in _sites(model, way) if cut_set(model, {site})],
        notes=_notes(model, settings, chosen),
    )  # fmt: skip


def _sites(model: HookedModel, pathway: str) -> list[str]:
    """What the pathway's blocks hand on, where any action depends on it."""
    about = model.hook_points
    return [site for site in layer_sites(model, pathway) if about[site].reaches_action]


def _chosen(model: HookedModel, pathway: str, layers: str) -> list[str]:
    """The sites that are injected in closed loop."""
    found = [site for site in _sites(model, pathway) if not cut_set(model, {site})]
    return [found[i] for i in choose_layers(list(range(len(found))), layers)]


def _arms(source: Recorded, turned: Recorded, sites: Sequence[str]) -> tuple[list[Arm], dict[str, tuple[str, str]]]:
    """The arms, and (condition, site) by their names."""
    near, far = same_start(turned.sources, source.scenes), cross_task(source.sources, source.scenes)
    arms, cells = list[Arm](), dict[str, tuple[str, str]]()
    for site in sites:
        injection = Injection([site], HOLD)
        for condition, kind, recorded, donors in (
            (DONOR, InjectionArm, turned, near), (RANDOM, InjectionArm, source, far),
            (NOISE, MatchedNoiseArm, turned, near),
        ):  # fmt: skip
            name = f"{condition} {site}"
            cells[name] = condition, site
            arms.append(kind(name, recorded.folder, injection, donors))
    return arms, cells


def _changes(source: Recorded, turned: Recorded, sites: Sequence[str]) -> pd.DataFrame:
    """How large the injected change is before it has any effect: the donor's values less the episode's own, at the
    environment steps that both have. One row a site and condition.

    change: ‖Δh‖ of all tokens of one call, mean over calls; relative: as part of ‖h‖; calls: of the site in one chunk.
    """
    near, far = same_start(turned.sources, source.scenes), cross_task(source.sources, source.scenes)
    own = {each.scene: each.episode for each in source.sources}
    rows = []
    for site in sites:
        for condition, recorded, donors in ((DONOR, turned, near), (RANDOM, source, far)):
            pairs = [(own[scene], donors[scene]) for scene in source.scenes]
            found = _change(source, recorded, site, pairs)
            rows.append({"site": site, "condition": condition, **found})
            if condition == DONOR:
                rows.append({"site": site, "condition": NOISE, **found})
    return pd.DataFrame(rows)


def _change(source: Recorded, donors: Recorded, site: str, pairs: Sequence[tuple[int, int]]) -> dict[str, float]:
    mine, theirs = open_recording(source.folder), open_recording(donors.folder)
    there = set(theirs.keys(site))
    keys = [(key, (donor, *key[1:])) for own, donor in pairs for key in mine.keys(site) if key[0] == own]
    keys = [(a, b) for a, b in keys if b in there]
    first = mine.fetch(site, [a for a, _ in keys]).flatten(1).double()
    second = theirs.fetch(site, [b for _, b in keys]).flatten(1).double()
    size = (second - first).norm(dim=1)
    calls = len({step for (_, _, step), _ in keys})
    return {"change": float(size.mean()), "relative": float((size / first.norm(dim=1)).mean()), "calls": float(calls)}


def blocks_after(model: HookedModel, site: str) -> int:
    """Blocks behind a site through which a change there can still go."""
    way, number = hook_names.pathway(site), hook_names.layer(site) or 0
    own, expert = (_depth(model, each) for each in (way, EXPERT))
    later = own - 1 - number
    # where the expert reads the prefix layer by layer, block i of it reads what block i of the prefix was given
    by_layer = any(hook_names.same_tensor_as(name) in model.points for name in model.points if "hook_prefix_k" in name)
    if way == EXPERT or by_layer:
        return later
    return later + expert + (_depth(model, "adapter") if way == "vlm" else 0)


def _depth(model: HookedModel, pathway: str) -> int:
    return sum(1 for name in model.points if name.startswith(f"{pathway}.blocks.") and name.endswith("hook_resid_post"))


def _with_distance(model: HookedModel, chunks: pd.DataFrame) -> pd.DataFrame:
    return chunks.assign(
        pathway=[hook_names.pathway(site) for site in chunks["site"]],
        blocks_after=[blocks_after(model, site) for site in chunks["site"]],
    )


def _compare(context: Context, runs: Runs, cells: Mapping[str, tuple[str, str]], change: pd.DataFrame) -> pd.DataFrame:
    """The standard comparison, with what was changed at each arm's site and displacement per unit of it."""
    sizes = {(row["condition"], row["site"]): row for row in records(change)}
    rows = []
    for row in records(compare_suites(context, [runs])):
        condition, site = cells.get(row["arm"], ("", ""))
        size = sizes.get((condition, site), {"change": np.nan, "relative": np.nan, "calls": np.nan})
        moved = row["displacement"]
        rows.append(
            {"arm": row["arm"], "condition": condition, "pathway": hook_names.pathway(site), "site": site,
             "blocks_after": blocks_after(context.model, site) if site else pd.NA,
             **{name: size[name] for name in ("change", "relative", "calls")},
             "displacement": moved, "per_change": moved / size["change"],
             "per_change_and_call": moved / (size["change"] * size["calls"]),
             "per_relative_and_call": moved / (size["relative"] * size["calls"])}
            | {name: value for name, value in row.items() if name not in ("arm", "displacement")}
        )  # fmt: skip
    return pd.DataFrame(rows).astype({"blocks_after": "Int64"})


def _gaps(context: Context, settings: Settings, runs: Runs, table: pd.DataFrame) -> pd.DataFrame:
    """Displacement of the expert's injections ÷ that of the other pathway's, by condition and by what it is counted
    per; difference, low, high: of the means, metres, with its interval over tasks (raw only)."""
    rows = []
    for condition in (DONOR, RANDOM, NOISE):
        mine = [row for row in records(table) if row["condition"] == condition]
        by_way = {way: [row for row in mine if row["pathway"] == way] for way in (EXPERT, settings.pathway)}
        moved = {way: _by_scene(context, settings, runs, [row["arm"] for row in each]) for way, each in by_way.items()}
        scenes = list(moved[EXPERT])
        apart = [moved[EXPERT][scene] - moved[settings.pathway][scene] for scene in scenes]
        _, low, high = mean_with_interval(apart, [scene.task for scene in scenes], context.seed)
        for per in PER:
            means = {way: float(np.mean([row[per] for row in each])) for way, each in by_way.items()}
            raw = per == "displacement"
            rows.append(
                {"condition": condition, "per": per, EXPERT: means[EXPERT], "other": means[settings.pathway],
                 "ratio": means[EXPERT] / means[settings.pathway],
                 "difference": float(np.mean(apart)) if raw else np.nan,
                 "low": low if raw else np.nan, "high": high if raw else np.nan}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _by_scene(context: Context, settings: Settings, runs: Runs, arms: Sequence[str]) -> dict[Scene, float]:
    """Displacement of every scene's episodes from the baseline's, metres, mean over arms."""
    layout, found = layout_of(settings.suite), dict[Scene, list[float]]()
    for arm in arms:
        for row in rows_of(runs, arm):
            scene = scene_of(runs, row)
            base = runs.row(BASELINE.name, scene.task, scene.seed)
            found.setdefault(scene, []).append(path_distance(runs, row, runs, base, layout))
    return {scene: float(np.mean(each)) for scene, each in found.items()}


def _verdicts(context: Context, settings: Settings, table: pd.DataFrame, gaps: pd.DataFrame) -> list[Verdict]:
    why = gate_note(table, settings.suite)
    if why:
        return [Verdict(rule, None, why) for rule in ("raw", "gap", "beyond-noise")]
    by = {(row["condition"], row["per"]): row for row in records(gaps)}
    raw, normed = by[DONOR, "displacement"], by[DONOR, "per_change_and_call"]
    noise = by[NOISE, "displacement"]
    larger = raw["ratio"] > threshold(context, "raw") and not raw["low"] <= 0
    said = (
        f"expert {100 * raw[EXPERT]:.1f} cm, {settings.pathway} {100 * raw['other']:.1f} cm: {raw['ratio']:.2g} times; "
        f"difference {100 * raw['difference']:+.1f} cm ({100 * raw['low']:+.1f} to {100 * raw['high']:+.1f})"
    )
    left = abs(np.log(normed["ratio"])) / abs(np.log(raw["ratio"]))
    per = by[DONOR, "per_change"]["ratio"]
    beyond = {way: raw[key] / noise[key] for way, key in ((EXPERT, EXPERT), (settings.pathway, "other"))}
    return [
        Verdict("raw", bool(larger), said),
        Verdict(
            "gap",
            bool(left < threshold(context, "gap")),
            f"{raw['ratio']:.2g} times raw, {per:.2g} times per unit of ‖Δh‖, {normed['ratio']:.2g} times per unit and "
            f"call; on a logarithmic scale {left:.2g} of the raw gap is left",
        ),
        Verdict(
            "beyond-noise",
            all(each > threshold(context, "beyond-noise") for each in beyond.values()),
            ", ".join(f"{way}: {each:.2g} times the noise's displacement" for way, each in beyond.items()),
        ),
    ]


def _notes(model: HookedModel, settings: Settings, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    where = "; ".join(f"{way}: {', '.join(sites)}" for way, sites in chosen.items())
    return [
        f"In closed loop all tokens were injected at every call of the whole episode, at one site an arm ({where}).",
        "Streams differ in width and scale: ‖Δh‖ of one is not ‖Δh‖ of the other. As part of ‖h‖ they compare better.",
        "‖Δh‖ is the donor's value less the episode's own where neither has been edited yet: over all tokens of one "
        "call, mean over calls. Later the two episodes drift apart, and the change grows with it.",
        "A random donor has another start and another noise: its expert's activations carry more than its task.",
        "Blocks behind a site: in the expert those that follow; in the other pathway those of its own that follow, and "
        "the expert's where these read its end only.",
    ]
