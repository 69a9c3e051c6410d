"""Null prompt and full-residual injection: the published result, and what it is worth.

Every residual site is injected whole, one by one, from the episode's own run with its prompt, while the policy is told
nothing. That the episode comes back says little where two different observations lead to the same actions under the
same injection: then it is replay, which is found out for every site by running.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import DEAD_END, REPLAY
from hooked_vla.interventions.injection_sites import residual_sites, stream_sites
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import Runs, action_normalizer, layout_of, read_runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map
from hooked_vla.rollouts.experiments.kinds.battery_runs import keep, limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_moved import (
    block_of,
    can_move,
    first_places,
    moved_suite,
    nearer_places,
)
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    Starts,
    fillers,
    gate,
    likeness,
    reach_of,
    record,
    rows_of,
    scene_of,
    starts_of,
    with_noise,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import (
    Donors,
    InjectionArm,
    Told,
    ToldArm,
    cross_task,
    same_scene,
)

with needs_analysis_extra():
    import pandas as pd

EMPTY, FILLER = "empty", "filler"
NONE = "(nothing)"
MOVED = "replay"
# groups of sites that are whole residual streams
STREAM = "{} (all layers)"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene, so that the prompt counts. max_steps: after which an
    episode has failed. nulls: prompts that say nothing: "empty", or "filler", as many tokens as the own prompt's; the
    rules are judged on the first. gate: the least success of the baseline. moved: run the moved object too."""

    episodes: int
    suite: str = "goal"
    max_steps: int = 72
    nulls: tuple[str, ...] = (EMPTY, FILLER)
    gate: float = 0.9
    moved: bool = True

    def __post_init__(self) -> None:
        if unknown := [each for each in self.nulls if each not in (EMPTY, FILLER)]:
            raise ValueError(f"unknown nulls {unknown}; there are {EMPTY!r} and {FILLER!r}")


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model without text or residual streams, and for suites without an end effector."""
    sites = residual_sites(context.model)
    if not sites:
        raise ValueError(f"{context.model_name} has no residual streams to inject")
    groups = _groups(context, sites)
    options = limited(context, settings.max_steps)
    source = record(context, "source", settings.suite, with_noise(context.model, sites), settings.episodes, options)
    told = _told(context, settings, source)
    main = _run_arms(context, settings, source, groups, told)
    reach = context.table("reach", lambda: _reach(context, settings, source, groups, told))
    table = _compare(context, settings, source, main, reach, groups)
    moved = _moved(context, settings, source) if settings.moved and can_move(settings.suite) else None
    tables = {"reach": reach} | ({} if moved is None else {"moved_object": moved})
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, source, table, moved),
        tables=tables,
        figures=_figures(table),
        labels=_labels(table),
        notes=_notes(settings, table, moved),
    )


def _groups(context: Context, sites: Sequence[str]) -> dict[str, list[str]]:
    """What is injected, by name: every site by itself, then every pathway's whole stream."""
    ways = dict.fromkeys(hook_names.pathway(site) for site in sites)
    return {site: [site] for site in sites} | {STREAM.format(way): stream_sites(context.model, way) for way in ways}


def _told(context: Context, settings: Settings, source: Recorded) -> dict[str, Told]:
    told = {EMPTY: Told("")}
    if FILLER in settings.nulls:
        told[FILLER] = Told(fillers(context, settings.suite, source.scenes))
    return {null: told[null] for null in settings.nulls}


def _run_arms(
    context: Context, settings: Settings, source: Recorded, groups: Mapping[str, list[str]], told: Mapping[str, Told]
) -> Runs:
    """Every group under every null prompt, from the scene's own run; and from an unrelated one's, noise included."""
    own, unrelated = (choose(source.sources, source.scenes) for choose in (same_scene, cross_task))
    arms: list[Arm] = [BASELINE]
    for null, each in told.items():
        arms.append(ToldArm(f"{null}: {NONE}", [each]))
        arms += [_arm(f"{null}: {name}", source, sites, own, each) for name, sites in groups.items()]
    first = settings.nulls[0]
    arms += [_arm(_unrelated(name), source, with_noise(context.model, sites), unrelated, told[first])
             for name, sites in groups.items() if len(sites) > 1]  # fmt: skip
    return read_runs(
        context.rollouts("main", settings.suite, arms, settings.episodes, options=limited(context, settings.max_steps))
    )


def _arm(name: str, source: Recorded, sites: Sequence[str], donors: Donors, told: Told | None) -> InjectionArm:
    return InjectionArm(name, source.folder, Injection(sites, HOLD), donors, () if told is None else [told])


def _unrelated(name: str) -> str:
    return f"unrelated: {name}"


def _reach(
    context: Context, settings: Settings, source: Recorded, groups: Mapping[str, list[str]], told: Mapping[str, Told]
) -> pd.DataFrame:
    """For every group and null prompt: what names tell of it, and what running two observations shows; cuts_prompt: two
    that differ in the prompt alone, the null one and the own, lead to the same actions."""
    episode, rows = source.sources[0].episode, []
    for null, each in told.items():
        text = each.text if isinstance(each.text, str) else (each.text or {})[source.scenes[0]]
        starts = starts_of(context, settings.suite, settings.episodes, text)
        own = starts_of(context, settings.suite, 1)
        prompts = Starts(starts.first, own.first, starts.seed)
        for name, sites in groups.items():
            found = reach_of(context, source, episode, Injection(sites, HOLD), starts)
            only_prompt = reach_of(context, source, episode, Injection(sites, HOLD), prompts)
            rows.append({"null": null, "site": name, "cut_set": found.cut or "", "dead_end_by_name": found.dead_end,
                         "label": found.label, "cuts_prompt": only_prompt.replays, "agrees": found.agrees})  # fmt: skip
    return pd.DataFrame(rows)


def _compare(
    context: Context, settings: Settings, source: Recorded, main: Runs, reach: pd.DataFrame,
    groups: Mapping[str, list[str]],
) -> pd.DataFrame:  # fmt: skip
    """One row for every null prompt and group, nothing injected included, then the unrelated donors."""
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    own, unrelated = (choose(source.sources, source.scenes) for choose in (same_scene, cross_task))
    labels = {(row["null"], row["site"]): row["label"] for row in records(reach)}
    cuts = {(row["null"], row["site"]): bool(row["cuts_prompt"]) for row in records(reach)}
    rows = []
    for null in settings.nulls:
        for name in (NONE, *groups):
            found = likeness(main, f"{null}: {name}", source, own, layout, normalize)
            at = (null, name)
            rows.append({"donor": "own", "null": null, "site": name, "label": labels.get(at, ""),
                         "cuts_prompt": cuts.get(at, False), **found})  # fmt: skip
    for name, sites in groups.items():
        if len(sites) > 1:
            found = likeness(main, _unrelated(name), source, unrelated, layout, normalize)
            null = settings.nulls[0]
            rows.append({"donor": "unrelated", "null": null, "site": name, "label": labels[null, name],
                         "cuts_prompt": cuts[null, name], **found})  # fmt: skip
    return pd.DataFrame(rows)


def _moved(context: Context, settings: Settings, source: Recorded) -> pd.DataFrame:
    """One row an episode, with the task's block moved and the own prompt: without injection, and under replay."""
    sites = with_noise(context.model, _last_stream(context))
    donors: dict[Scene, int] = same_scene(source.sources, source.scenes)
    arms = [BASELINE, _arm(MOVED, source, sites, donors, None)]
    done = context.rollouts(
        "moved", moved_suite(settings.suite), arms, settings.episodes, options=limited(context, settings.max_steps)
    )
    runs, now = read_runs(done), first_places(done)
    before = _places(context, settings, source)
    rows = []
    for arm in (BASELINE.name, MOVED):
        for row in rows_of(runs, arm):
            scene = scene_of(runs, row)
            block, episode = block_of(settings.suite, scene.task), int(runs.episodes["episode"].iloc[row])
            states = source.runs.states[source.row(donors[scene])]
            found = nearer_places(runs, row, states, before[scene][block], now[episode][block])
            if found is not None:
                rows.append({"arm": arm, "task": scene.task, "seed": scene.seed, **found,
                             "at_old_place": found["to_old"] < found["to_new"],
                             "success": bool(runs.episodes["success"].iloc[row])})  # fmt: skip
    return pd.DataFrame(rows)


def _places(context: Context, settings: Settings, source: Recorded) -> dict[Scene, dict[str, np.ndarray]]:
    """Where blocks stood when the sources began."""
    starts = context.observations(settings.suite, len(source.sources))
    blocks = {Scene(seen.task, seen.seed): seen.info["poses"]["blocks"] for seen in starts}
    return {scene: {name: np.array(pose[:2]) for name, pose in each.items()} for scene, each in blocks.items()}


def _last_stream(context: Context) -> list[str]:
    """The stream behind which there is nothing but the actions."""
    ways = list(dict.fromkeys(hook_names.pathway(site) for site in residual_sites(context.model)))
    return stream_sites(context.model, ways[-1])


def _verdicts(
    context: Context, settings: Settings, source: Recorded, table: pd.DataFrame, moved: pd.DataFrame | None
) -> list[Verdict]:
    why = gate(source.runs, settings.gate)
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    return [
        _every_site(context, settings, table),
        _flagged(context, settings, table),
        _replays_unrelated(context, table),
        _goes_to_the_old_place(context, moved),
    ]


def _single(table: pd.DataFrame, null: str) -> list[dict[str, Any]]:
    """Rows of single sites under a null prompt, from the own donor."""
    return [row for row in records(table) if row["donor"] == "own" and row["null"] == null
            and row["site"] != NONE and "(" not in row["site"]]  # fmt: skip


def _every_site(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    rule, limit = "every-site", threshold(context, "every-site")
    told, holds = [], False
    for null in settings.nulls:
        live = [row for row in _single(table, null) if row["label"] != DEAD_END]
        high = [row for row in live if row["cosine"] >= limit]
        low = ", ".join(f"{row['site']} {row['cosine']:.3f}" for row in live if row["cosine"] < limit) or "none"
        without = next(row["cosine"] for row in records(table) if row["null"] == null and row["site"] == NONE)
        told.append(f"{null} prompt: {len(high)} of {len(live)} sites (without injection {without:.3f}); below: {low}")
        if null == settings.nulls[0]:
            holds = len(high) == len(live)
    return Verdict(rule, holds, "; ".join(told))


def _flagged(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    limit = threshold(context, "flagged")
    rows = [row for row in records(table) if row["donor"] == "own" and row["null"] == settings.nulls[0]
            and row["site"] != NONE and row["cosine"] >= limit]  # fmt: skip
    if not rows:
        return Verdict("flagged", None, "no injection brings the episode back: there is nothing to flag")
    others = [row for row in rows if row["label"] != REPLAY]
    named = ", ".join(row["site"] for row in others) or "none"
    cut = sum(bool(row["cuts_prompt"]) for row in others)
    return Verdict(
        "flagged",
        not others,
        f"{len(rows) - len(others)} of {len(rows)} injections that bring it back are replay; not replay: {named}"
        + (f"; {cut} of these cut every path from the prompt, and all else is the donor's own here" if others else ""),
    )


def _replays_unrelated(context: Context, table: pd.DataFrame) -> Verdict:
    limit = threshold(context, "unrelated")
    rows = [row for row in records(table) if row["donor"] == "unrelated" and row["label"] == REPLAY]
    if not rows:
        return Verdict("unrelated", None, "no whole residual stream is replay under this prompt")
    each = ", ".join(f"{row['site']}: {row['cosine']:.3f}, {row['identical']:.0%} identical" for row in rows)
    return Verdict("unrelated", all(row["cosine"] >= limit for row in rows), f"cosine with the unrelated donor: {each}")


def _goes_to_the_old_place(context: Context, moved: pd.DataFrame | None) -> Verdict:
    limit = threshold(context, "moved")
    if moved is None:
        return Verdict("moved", None, "objects of this suite cannot be moved, or it was not asked for")
    parts = {arm: [row for row in records(moved) if row["arm"] == arm] for arm in (BASELINE.name, MOVED)}
    if not all(parts.values()):
        return Verdict("moved", None, "no source grasps a block")
    old, distance = (
        {arm: float(np.mean([row[column] for row in rows])) for arm, rows in parts.items()}
        for column in ("at_old_place", "to_old")
    )
    return Verdict(
        "moved",
        old[MOVED] >= limit,
        f"when its source grasps, replay is at the old place in {old[MOVED]:.0%} ({distance[MOVED]:.3f} m from it), "
        f"the policy without injection in {old[BASELINE.name]:.0%} ({distance[BASELINE.name]:.3f} m)",
    )


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    own = keep(table, lambda row: row["donor"] == "own")
    return {
        "cosine": (
            heat_map(own, "site", "null", "cosine", "Action cosine with the donor", limits=(0, 1), form=".3f"),
            "Cosine of the actions in closed loop with those of the episode that the values came from, under prompts "
            "that say nothing.",
        ),
        "success": (
            heat_map(own, "site", "null", "success", "Success", limits=(0, 1)),
            "Success of the task that the prompt no longer names.",
        ),
    }


def _labels(table: pd.DataFrame) -> list[str]:
    meaning = {
        REPLAY: "two observations lead to the same actions, bit for bit: they are made of the donor's values, and "
        "are no evidence of what the model does with what it sees",
        DEAD_END: "no action depends on what is replaced: what comes out is the run without injection",
    }
    found: dict[tuple[str, str], list[str]] = {}
    for row in records(table):
        if row["donor"] == "own" and row["label"] in meaning:
            found.setdefault((row["label"], row["site"]), []).append(row["null"])
    nulls = {row["null"] for row in records(table)}
    named = {key: "" if set(each) == nulls else f" ({' and '.join(each)} prompt only)" for key, each in found.items()}
    cut = sorted({row["site"] for row in records(table) if row["cuts_prompt"] and row["label"] not in meaning})
    prompts = [f"prompt cut (prompts alone make no difference, but what else is seen does; here that is the donor's "
               f"own, so its episode comes back): {', '.join(cut)}"]  # fmt: skip
    return [
        f"{label} ({text}): " + ", ".join(f"{site}{said}" for (each, site), said in named.items() if each == label)
        for label, text in meaning.items() if any(each == label for each, _ in named)
    ] + (prompts if cut else [])  # fmt: skip


def _notes(settings: Settings, table: pd.DataFrame, moved: pd.DataFrame | None) -> list[str]:
    notes = [
        "Whole values are injected at every step of the episode and every denoise step; after the donor's last step, "
        "its last values.",
        "Networks that hide padding hide what is injected where the empty prompt has padding: no residual edit reaches "
        "that mask. The filler prompt has as many tokens as the own one, and hides nothing.",
        "Starts and the policy's noise are the donor's own, so a site that is not a cut set brings an episode back as "
        "far as its values decide what the prompt would have.",
        "The unrelated donor has another task and another seed; where actions are made from noise, its noise is "
        "injected too: without it, a flow-matching expert ends elsewhere by the difference of the two noises. "
        "Actions are moves: from another start, the same ones end elsewhere (to_source).",
    ]
    if settings.moved and moved is None:
        notes.append(f"Objects of the suite {settings.suite!r} cannot be moved: this control was not run.")
    return notes
