"""Expert against VLM: which of the two moves the arm farther when another run's activations are put into it, and what
is left of that once the size of the change, the number of calls and the distance to the output are counted.

Donors are runs of another task from the same start, with the same noise. Controls: noise as large as the change, token
by token, in one direction all along the episode (as a donor's change goes on in one way) or in another at every call;
donors of other starts; the rerun's floor. Ratios are of means over the same episodes, with intervals by tasks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    path_distance,
    read_runs,
    rerun,
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import decide, interval_of, undecided
from hooked_vla.rollouts.experiments.kinds.battery_runs import compare_suites, gate_note, limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_runs import Recorded, record, rows_of, scene_of, turned_tasks
from hooked_vla.rollouts.experiments.kinds.pathways_arms import CONDITIONS, DONOR, LASTS, NOISE, RANDOM, WHITE
from hooked_vla.rollouts.experiments.kinds.pathways_chunks import chunk_sweep
from hooked_vla.rollouts.experiments.kinds.pathways_figures import PER, by_distance, ratios
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import InjectionArm, cross_task, open_recording, same_start
from hooked_vla.rollouts.matched_noise import MatchedNoiseArm

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
    """Raises ValueError for a model without the pathways' blocks, or where every one of them is replay."""
    model, options = context.model, limited(context, settings.max_steps)
    sites = [site for way in (settings.pathway, EXPERT) for site in _sites(model, way)]
    chosen = {way: _chosen(model, way, settings.layers) for way in (settings.pathway, EXPERT)}
    if empty := [way for way, each in chosen.items() if not each]:
        raise ValueError(
            f"what any block of {', '.join(empty)} of {context.model_name} hands on is all that its actions are made "
            "of: injecting it is replay, and nothing is left to compare"
        )
    source = record(context, "source", settings.suite, sites, settings.episodes, options)
    others = turned_tasks(settings.suite, 1)
    turned = record(context, "turned", settings.suite, sites, settings.episodes, options, others)
    arms, cells = _arms(source, turned, [site for each in chosen.values() for site in each])
    main = context.rollouts("main", settings.suite, [BASELINE, *arms], settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    runs = join(read_runs(main), read_runs(again, {BASELINE.name: RERUN}))
    sizes = context.table("sizes", lambda: _sizes(source, turned, sites))
    chunks = context.table("chunks", lambda: chunk_sweep(context, settings.suite, settings.episodes, sites))
    chunks = _with_distance(model, chunks)
    change = _changes(sizes)
    table = _compare(context, runs, cells, change)
    moved = by_scene(settings, runs, cells, sizes)
    gaps = _gaps(context, settings, moved)
    beyond = _beyond(context, settings, moved)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, table, gaps, beyond),
        tables={"gaps": gaps, "beyond_noise": beyond, "change": change, "chunks": chunks},
        figures={
            "ratios": (ratios(gaps, settings.pathway), "How much farther the expert's injection moves the arm than the "
                       f"{settings.pathway}'s, raw and per unit of what was changed, with 95 % intervals by tasks; 1 "
                       "is no difference."),
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
        for condition in CONDITIONS:
            name = f"{condition} {site}"
            cells[name] = condition, site
            recorded, donors = (source, far) if condition == RANDOM else (turned, near)
            arms.append(
                MatchedNoiseArm(name, recorded.folder, injection, donors, lasts=LASTS[condition])
                if condition in LASTS else InjectionArm(name, recorded.folder, injection, donors)
            )  # fmt: skip
    return arms, cells


def _sizes(source: Recorded, turned: Recorded, sites: Sequence[str]) -> pd.DataFrame:
    """How large the injected change is before it has any effect: the donor's values less the episode's own, at the
    environment steps that both have. One row a site, condition and scene.

    change: ‖Δh‖ of all tokens of one call, mean over calls; relative: as part of ‖h‖; calls: of the site in one chunk.
    """
    near, far = same_start(turned.sources, source.scenes), cross_task(source.sources, source.scenes)
    own = {each.scene: each.episode for each in source.sources}
    rows = []
    for site in sites:
        for condition, recorded, donors in ((DONOR, turned, near), (RANDOM, source, far)):
            pairs = {scene: (own[scene], donors[scene]) for scene in source.scenes}
            for scene, found in _size(source, recorded, site, pairs).items():
                about = {"site": site, "task": scene.task, "seed": scene.seed}
                # noise is as large as what the donor changes
                same = (NOISE, WHITE) if condition == DONOR else ()
                rows += [{**about, "condition": each, **found} for each in (condition, *same)]
    return pd.DataFrame(rows)


def _size(
    source: Recorded, donors: Recorded, site: str, pairs: Mapping[Scene, tuple[int, int]]
) -> dict[Scene, dict[str, float]]:
    mine, theirs = open_recording(source.folder), open_recording(donors.folder)
    there, by_episode = set(theirs.keys(site)), {}
    for key in mine.keys(site):
        by_episode.setdefault(key[0], []).append(key)
    found = {}
    for scene, (own, donor) in pairs.items():
        keys = [key for key in by_episode[own] if (donor, *key[1:]) in there]
        first = mine.fetch(site, keys).flatten(1).double()
        second = theirs.fetch(site, [(donor, *key[1:]) for key in keys]).flatten(1).double()
        size = (second - first).norm(dim=1)
        found[scene] = {"change": float(size.mean()), "relative": float((size / first.norm(dim=1)).mean()),
                        "calls": float(len({key[2] for key in keys}))}  # fmt: skip
    return found


def _changes(sizes: pd.DataFrame) -> pd.DataFrame:
    """`_sizes` on the mean over scenes: one row a site and condition."""
    return _means(sizes, ["site", "condition"], ["change", "relative", "calls"])


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


def by_scene(settings: Settings, runs: Runs, cells: Mapping[str, tuple[str, str]], sizes: pd.DataFrame) -> pd.DataFrame:
    """One row a scene, condition and pathway, means over its sites: displacement from the baseline's episode, metres,
    and the same per each of PER."""
    about = {(row["condition"], row["site"], row["task"], row["seed"]): row for row in records(sizes)}
    layout, rows = layout_of(settings.suite), []
    for arm, (condition, site) in cells.items():
        for row in rows_of(runs, arm):
            scene = scene_of(runs, row)
            base = runs.row(BASELINE.name, scene.task, scene.seed)
            moved, size = path_distance(runs, row, runs, base, layout), about[condition, site, scene.task, scene.seed]
            rows.append(
                {"condition": condition, "pathway": hook_names.pathway(site), "task": scene.task, "seed": scene.seed,
                 "displacement": moved, "per_change": moved / size["change"],
                 "per_change_and_call": moved / (size["change"] * size["calls"]),
                 "per_relative_and_call": moved / (size["relative"] * size["calls"])}
            )  # fmt: skip
    return _means(pd.DataFrame(rows), ["condition", "pathway", "task", "seed"], list(PER))


def _means(table: pd.DataFrame, by: Sequence[str], values: Sequence[str]) -> pd.DataFrame:
    """Means of some columns over the rows that are alike in others."""
    found: dict[tuple[Any, ...], list[list[float]]] = {}
    for row in records(table):
        found.setdefault(tuple(row[name] for name in by), []).append([row[name] for name in values])
    rows = [[*key, *np.mean(each, axis=0)] for key, each in found.items()]
    return pd.DataFrame(rows, columns=[*by, *values])


def _columns(moved: pd.DataFrame, *wanted: tuple[str, str, str]) -> tuple[np.ndarray, list[str]]:
    """Numbers by scene, [scene column], for each (condition, pathway, per) that is wanted; and every scene's task."""
    by = {(row["condition"], row["pathway"], row["task"], row["seed"]): row for row in records(moved)}
    scenes = [key[2:] for key in by if key[:2] == wanted[0][:2]]
    values = [[by[condition, way, *scene][per] for condition, way, per in wanted] for scene in scenes]
    return np.array(values, np.float64), [str(task) for task, _ in scenes]


def _log_ratio(means: np.ndarray) -> np.ndarray:
    return np.log(means[:, 0] / means[:, 1])


def _shrinking(means: np.ndarray) -> np.ndarray:
    """How much nearer to 1 the second ratio is than the first one, on a logarithmic scale."""
    return np.abs(_log_ratio(means)) - np.abs(_log_ratio(means[:, 2:]))


def _gaps(context: Context, settings: Settings, moved: pd.DataFrame) -> pd.DataFrame:
    """Displacement of the expert's injections ÷ that of the other pathway's, by condition and by what it is counted
    per: means over scenes, their ratio with its interval by tasks; nearer: by how much the ratio is nearer to 1 than
    the raw one, as a difference of logarithms, with its interval."""
    rows = []
    for condition in CONDITIONS:
        ways = ((condition, EXPERT), (condition, settings.pathway))
        for per in PER:
            values, tasks = _columns(moved, *((*way, per) for way in ways))
            ratio, low, high = (float(np.exp(each)) for each in interval_of(values, tasks, _log_ratio, context.seed))
            both, tasks = _columns(moved, *((*way, each) for each in ("displacement", per) for way in ways))
            nearer = interval_of(both, tasks, _shrinking, context.seed)
            means = values.mean(0)
            rows.append(
                {"condition": condition, "per": per, EXPERT: means[0], "other": means[1], "ratio": ratio, "low": low,
                 "high": high, "nearer": nearer[0], "nearer_low": nearer[1], "nearer_high": nearer[2]}
            )  # fmt: skip
    return pd.DataFrame(rows)


def _beyond(context: Context, settings: Settings, moved: pd.DataFrame) -> pd.DataFrame:
    """For each pathway, the donor's displacement ÷ that of noise of either kind, of the same episodes."""
    rows = []
    for way in (EXPERT, settings.pathway):
        for condition in (NOISE, WHITE):
            values, tasks = _columns(moved, (DONOR, way, "displacement"), (condition, way, "displacement"))
            ratio, low, high = (float(np.exp(each)) for each in interval_of(values, tasks, _log_ratio, context.seed))
            rows.append({"pathway": way, "than": condition, "donor": values.mean(0)[0], "noise": values.mean(0)[1],
                         "ratio": ratio, "low": low, "high": high})  # fmt: skip
    return pd.DataFrame(rows)


def _verdicts(
    context: Context, settings: Settings, table: pd.DataFrame, gaps: pd.DataFrame, beyond: pd.DataFrame
) -> list[Verdict]:
    why = gate_note(table, settings.suite)
    if why:
        return [Verdict(rule, None, why) for rule in ("raw", "gap", "beyond-noise")]
    by = {row["per"]: row for row in records(gaps) if row["condition"] == DONOR}
    raw = by["displacement"]
    larger = _above(raw["low"], raw["high"], threshold(context, "raw"))
    return [
        Verdict(
            "raw",
            larger,
            f"expert {100 * raw[EXPERT]:.1f} cm, {settings.pathway} {100 * raw['other']:.1f} cm: "
            f"{_ratio(raw)}{undecided(larger)}",
        ),
        _gap(context, larger, by),
        _beyond_verdict(context, beyond),
    ]


def _above(low: float, high: float, limit: float) -> bool | None:
    """Whether a quantity is above a limit, and not at it, by its interval."""
    return decide(-high, -low, -limit, below=True)


def _ratio(row: Mapping[str, Any]) -> str:
    return f"{row['ratio']:.2g} times ({row['low']:.2g} to {row['high']:.2g})"


def _gap(context: Context, larger: bool | None, by: Mapping[str, Mapping[str, Any]]) -> Verdict:
    """Whether every way of counting brings the ratio nearer to 1; where the expert's injection is not the larger one,
    there is no gap of the kind that is asked about."""
    rule, counted = "gap", [per for per in PER if per != "displacement"]
    said = "; ".join(f"{PER[per]} {_ratio(by[per])}" for per in PER)
    if larger is not True:
        return Verdict(rule, None, f"raw, the expert's injection is not shown to move the arm farther. {said}")
    limit = threshold(context, rule)
    each = {per: _above(by[per]["nearer_low"], by[per]["nearer_high"], limit) for per in counted}
    holds = False if False in each.values() else None if None in each.values() else True
    words = {True: "smaller", False: "not smaller", None: "undecided"}
    return Verdict(rule, holds, f"{said}; the gap is {', '.join(f'{words[each[per]]} {PER[per]}' for per in counted)}")


def _beyond_verdict(context: Context, beyond: pd.DataFrame) -> Verdict:
    """Against noise that keeps its direction: what changes at every call averages out, and is the weaker control."""
    rule, limit = "beyond-noise", threshold(context, "beyond-noise")
    rows = records(beyond)
    held = [_above(row["low"], row["high"], limit) for row in rows if row["than"] == NOISE]
    holds = False if False in held else None if None in held else True
    said = "; ".join(f"{row['pathway']}: {_ratio(row)} the displacement of {row['than']}" for row in rows)
    return Verdict(rule, holds, said + undecided(holds))


def _notes(model: HookedModel, settings: Settings, chosen: Mapping[str, Sequence[str]]) -> list[str]:
    where = "; ".join(f"{way}: {', '.join(sites)}" for way, sites in chosen.items())
    return [
        f"In closed loop all tokens were injected at every call of the whole episode, at one site an arm ({where}).",
        "Streams differ in width and scale: ‖Δh‖ of one is not ‖Δh‖ of the other. As part of ‖h‖ they compare better.",
        "‖Δh‖ is the donor's value less the episode's own where neither has been edited yet: over all tokens of one "
        "call, mean over calls. Later the two episodes drift apart, and the change grows with it.",
        "Noise keeps one direction a token for the whole episode; white noise takes another at every call, so that it "
        "averages out along the way. Intervals resample whole tasks, of which there are few.",
        "A random donor has another start and another noise: its expert's activations carry more than its task.",
        "Blocks behind a site: in the expert those that follow; in the other pathway those of its own that follow, and "
        "the expert's where these read its end only.",
    ]
