"""Null prompt and full-residual injection: the published result, and what it is worth.

Every residual site is injected whole, one by one, from the episode's own run with its prompt, while the policy is told
nothing. That the episode comes back says little where two different observations lead to the same actions under the
same injection: then it is replay, which is found out for every site by running. Its control is noise as large as what
is injected.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import CUT_SET, DEAD_END, REPLAY
from hooked_vla.interventions.injection_sites import residual_sites, stream_sites
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import (
    RERUN,
    Runs,
    action_normalizer,
    compare,
    join,
    layout_of,
    read_runs,
    rerun,
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import heat_map
from hooked_vla.rollouts.experiments.kinds.battery_runs import limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_moved import (
    block_of,
    can_move,
    first_places,
    moved_suite,
    place_at_grasp,
)
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    badges,
    fillers,
    gate,
    likeness,
    prompt_badge,
    reach_of,
    reach_row,
    record,
    rows_of,
    scene_of,
    starts_of,
    with_noise,
)
from hooked_vla.rollouts.experiments.kinds.injection_scores import paired_p, settle
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import (
    Donors,
    InjectionArm,
    Told,
    ToldArm,
    cross_task,
    same_scene,
)
from hooked_vla.rollouts.matched_noise import PREFIX, noise_of

with needs_analysis_extra():
    import pandas as pd

EMPTY, FILLER = "empty", "filler"
NONE = "(nothing)"
MOVED = "replay"
# groups of sites that are whole residual streams
STREAM = "{} (all layers)"
# whose values are injected
OWN, CONTROL, UNRELATED = "own", "noise", "unrelated"
# columns of the standard comparison that are shown beside how like an arm is to its donor
_COMPARED = ("success_low", "success_high", "difference", "difference_low", "difference_high", "mcnemar_p", "holm_p",
             "displacement", "displacement_low", "displacement_high", "floor")  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene, so that the prompt counts. max_steps: after which an
    episode has failed. nulls: prompts that say nothing: "empty", or "filler", as many tokens as the own prompt's; rules
    are judged under all of them. controls: which injections get one of noise, by glob. gate: the
    least success of the baseline. moved: run the moved object too."""

    episodes: int
    suite: str = "goal"
    max_steps: int = 72
    nulls: tuple[str, ...] = (EMPTY, FILLER)
    controls: tuple[str, ...] = ("*",)
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
        notes=_notes(settings, moved),
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
    """Every group under every null prompt, from the scene's own run, and noise as large; under the first null, an
    unrelated episode's values, noise included; and the baseline's rerun."""
    own, unrelated = (choose(source.sources, source.scenes) for choose in (same_scene, cross_task))
    arms: list[Arm] = [BASELINE]
    for null, each in told.items():
        arms.append(ToldArm(f"{null}: {NONE}", [each]))
        arms += [_arm(f"{null}: {name}", source, sites, own, each) for name, sites in groups.items()]
    arms += [noise_of(_arm(f"{null}: {name}", source, groups[name], own, each))
             for null, each in told.items() for name in _controlled(settings, groups)]  # fmt: skip
    null = settings.nulls[0]
    arms += [_arm(_unrelated(name), source, with_noise(context.model, sites), unrelated, told[null])
             for name, sites in groups.items() if len(sites) > 1]  # fmt: skip
    options = limited(context, settings.max_steps)
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def _controlled(settings: Settings, groups: Mapping[str, list[str]]) -> list[str]:
    """The groups that get a control of noise."""
    return [name for name in groups if any(fnmatchcase(name, glob) for glob in settings.controls)]


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
        for name, sites in groups.items():
            found = reach_of(context, source, episode, Injection(sites, HOLD), starts)
            rows.append({"null": null, "site": name, **reach_row(found)})
    return pd.DataFrame(rows)


def _compare(
    context: Context, settings: Settings, source: Recorded, main: Runs, reach: pd.DataFrame,
    groups: Mapping[str, list[str]],
) -> pd.DataFrame:  # fmt: skip
    """One row for every null prompt and group, nothing injected included, then noise and the unrelated donors: how like
    the donor's episodes are, and how they compare with the baseline's, beside the floor of a rerun."""
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    own, unrelated = (choose(source.sources, source.scenes) for choose in (same_scene, cross_task))
    found = {(row["null"], row["site"]): row for row in records(reach)}
    compared = {row["arm"]: row for row in records(compare(main, layout, normalize, seed=context.seed))}
    null, controlled = settings.nulls[0], _controlled(settings, groups)
    cells = [(OWN, each, name, f"{each}: {name}", own) for each in settings.nulls for name in (NONE, *groups)]
    cells += [(CONTROL, each, name, f"{PREFIX}{each}: {name}", own) for each in settings.nulls for name in controlled]
    cells += [(UNRELATED, null, name, _unrelated(name), unrelated) for name in groups if len(groups[name]) > 1]
    rows = []
    for donor, each, name, arm, donors in cells:
        about = found.get((each, name), {"label": "", "cuts_prompt": False})
        # noise as large is no donor's values: what was found of the injection is not said of it
        label = "" if donor == CONTROL else about["label"]
        rows.append({"donor": donor, "null": each, "site": name, "label": label,
                     "cuts_prompt": donor != CONTROL and bool(about["cuts_prompt"]),
                     **likeness(main, arm, source, donors, layout, normalize),
                     **{column: compared[arm][column] for column in _COMPARED}})  # fmt: skip
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
            found = place_at_grasp(runs, row, states, before[scene][block], now[episode][block])
            if found is not None:
                rows.append({"arm": arm, "task": scene.task, "seed": scene.seed, **found,
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
    return [row for row in records(table) if row["donor"] == OWN and row["null"] == null
            and row["site"] != NONE and "(" not in row["site"]]  # fmt: skip


def _every_site(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    limit, told, holds = threshold(context, "every-site"), [], True
    for null in settings.nulls:
        live = [row for row in _single(table, null) if row["label"] != DEAD_END]
        high = [row for row in live if row["cosine"] >= limit]
        low = ", ".join(f"{row['site']} {_below(row['cosine'], limit)}" for row in live if row["cosine"] < limit)
        low = low or "none"
        without = next(row["cosine"] for row in records(table)
                       if (row["donor"], row["null"], row["site"]) == (OWN, null, NONE))  # fmt: skip
        # where an injection changes nothing, noise does not either
        dead = [row["site"] for row in _single(table, null) if row["label"] == DEAD_END]
        noise = [row["cosine"] for row in records(table)
                 if (row["donor"], row["null"]) == (CONTROL, null) and row["site"] not in dead]  # fmt: skip
        beside = f", with noise as large at most {max(noise):.3f}" if noise else ""
        told.append(f"{null} prompt: {len(high)} of {len(live)} sites (without injection {without:.3f}{beside}); "
                    f"below: {low}")  # fmt: skip
        holds = holds and len(high) == len(live)
    return Verdict("every-site", holds, "; ".join(told))


def _below(cosine: float, limit: float) -> str:
    """Three digits, or as many more as it takes to see that it is below."""
    return next(text for digits in range(3, 17) if float(text := f"{cosine:.{digits}f}") < limit)


def _flagged(context: Context, settings: Settings, table: pd.DataFrame) -> Verdict:
    """Judged under every null prompt: an injection that brings the episode back and is not replay contradicts it."""
    limit, told, holds = threshold(context, "flagged"), [], []
    for null in settings.nulls:
        rows = [row for row in records(table) if row["donor"] == OWN and row["null"] == null
                and row["site"] != NONE and row["cosine"] >= limit]  # fmt: skip
        others = [row for row in rows if row["label"] != REPLAY]
        holds += [not others] if rows else []
        named = ", ".join(f"{row['site']} ({row['label']}{', prompts cut' if row['cuts_prompt'] else ''})"
                          for row in others) or "none"  # fmt: skip
        told.append(f"{null} prompt: {len(rows) - len(others)} of {len(rows)} injections that bring it back are "
                    f"replay; not replay: {named}")  # fmt: skip
    if not holds:
        return Verdict("flagged", None, "no injection brings the episode back: there is nothing to flag")
    return Verdict("flagged", all(holds), "; ".join(told))


def _replays_unrelated(context: Context, table: pd.DataFrame) -> Verdict:
    limit = threshold(context, "unrelated")
    rows = [row for row in records(table) if row["donor"] == UNRELATED and row["label"] == REPLAY]
    if not rows:
        return Verdict("unrelated", None, "no whole residual stream is replay under this prompt")
    each = ", ".join(f"{row['site']}: {row['cosine']:.3f}, {row['identical']:.0%} identical" for row in rows)
    flagged = {(row["null"], row["site"]) for row in records(table) if row["donor"] == OWN and row["label"] == REPLAY}
    return Verdict(
        "unrelated",
        all(row["cosine"] >= limit for row in rows),
        f"tested at {len(rows)} of {len(flagged)} injections that are replay; cosine with the unrelated donor: {each}",
    )


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
    at = {arm: {Scene(row["task"], row["seed"]): row["at_old_place"] for row in rows} for arm, rows in parts.items()}
    return settle(
        "moved",
        old[MOVED] >= limit,
        [paired_p(at[MOVED], at[BASELINE.name])],
        f"when its source grasps, replay is over the old place in {old[MOVED]:.0%} ({distance[MOVED]:.3f} m from it), "
        f"the policy without injection in {old[BASELINE.name]:.0%} ({distance[BASELINE.name]:.3f} m)",
    )


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    rows = [{**row, "prompt": row["null"] if row["donor"] == OWN else f"{row['null']}, {row['donor']}"}
            for row in records(table) if row["donor"] != UNRELATED]  # fmt: skip
    shown = pd.DataFrame(rows)
    return {
        "cosine": (
            heat_map(shown, "site", "prompt", "cosine", "Action cosine with the donor", centre=0.0, limits=(-1, 1),
                     form=".3f"),
            "Cosine of the actions in closed loop with those of the episode that the values came from, under prompts "
            "that say nothing; noise: as large as what was injected, in its place. Hatched: not run.",
        ),
        "success": (
            heat_map(shown, "site", "prompt", "success", "Success", limits=(0, 1)),
            "Success of the task that the prompt no longer names.",
        ),
    }  # fmt: skip


def _labels(table: pd.DataFrame) -> list[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for row in records(table):
        if row["donor"] == OWN:
            found.setdefault((row["label"], row["site"]), []).append(row["null"])
    nulls = {row["null"] for row in records(table)}
    named = [(site + ("" if set(each) == nulls else f" ({' and '.join(each)} prompt only)"), label)
             for (label, site), each in found.items()]  # fmt: skip
    cut = sorted({f"{row['site']} ({row['null']} prompt)" for row in records(table)
                  if row["cuts_prompt"] and row["label"] not in (REPLAY, CUT_SET, DEAD_END)})  # fmt: skip
    return badges(named) + prompt_badge(cut, "the donor's own, so its episode comes back")


def _notes(settings: Settings, moved: pd.DataFrame | None) -> list[str]:
    notes = [
        "Whole values are injected at every step of the episode and every denoise step; after the donor's last step, "
        "its last values.",
        "Networks that hide padding hide what is injected where the empty prompt has padding: no residual edit reaches "
        "that mask. The filler prompt has as many tokens as the own one, and hides nothing.",
        "Noise stands in for what is injected: as long at every token and step as what the donor would change, in one "
        "direction for each token of an episode. Where the injection changes nothing, noise does not either.",
        "Over the old place: within half a block along both axes of the table, and nearer to it than to the new one.",
        "Starts and the policy's noise are the donor's own, so a site that is not a cut set brings an episode back as "
        "far as its values decide what the prompt would have.",
        "The unrelated donor, run under the first null prompt only, has another task and seed; where actions are "
        "made from noise, its noise is injected too: without it, a flow-matching expert ends elsewhere by the "
        "difference of the two noises. Actions are moves: from another start, the same ones end elsewhere (to_source).",
    ]
    if settings.moved and moved is None:
        notes.append(f"Objects of the suite {settings.suite!r} cannot be moved: this control was not run.")
    return notes
