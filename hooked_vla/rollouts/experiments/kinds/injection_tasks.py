"""Cross-task injection: the policy is told its own task, and gets the values of an episode of another one.

The donor starts from the same state and the same noise. Only arms with the own prompt test injection: told the donor's
prompt, the policy does the donor's task without any. Where the injection is a cut set, what comes out is replay; with
the donor's object moved, replay goes to the old place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hooked_vla.analysis.metrics import SOURCE
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import OPEN
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
    summarise_override,
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import keep, limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_figures import endpoint_figure
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
    gate,
    overrides,
    prompt_badge,
    reach_of,
    reach_row,
    record,
    scene_of,
    scenes_of,
    sites_in,
    starts_of,
    turned_tasks,
    with_noise,
)
from hooked_vla.rollouts.experiments.kinds.injection_scores import paired_p, settle
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import (
    Donors,
    InjectionArm,
    Told,
    ToldArm,
    cross_seed,
    same_scene,
    same_start,
)
from hooked_vla.rollouts.matched_noise import PREFIX, noise_of
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd

SOURCE_PROMPT = "source prompt, no injection"
# forms of the names of arms besides the injections with the own prompt
CROSS_PROMPT, SAME_SCENE, CROSS_SEED = "source prompt: {}", "same scene: {}", "cross seed: {}"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. shift: the donor of task i does task i + shift.
    injected: what is injected, as `choose_sites` takes it; judged: the one of them that the rules are about, which is
    also run from donors of the same scene and, where cross_seed, of the same task from another seed. controls: those
    that get one of noise; cross_prompt: those that are also run with the source's prompt; both by glob.
    max_steps: after which an episode has failed. gate: the least success of the baseline."""

    episodes: int
    injected: tuple[str, ...]
    judged: str = "expert"
    controls: tuple[str, ...] = ("*",)
    cross_prompt: tuple[str, ...] = ()
    cross_seed: bool = True
    suite: str = "goal"
    shift: int = 4
    max_steps: int = 72
    gate: float = 0.9

    def __post_init__(self) -> None:
        if self.judged not in self.injected:
            raise ValueError(f"judged {self.judged!r} is not injected; {list(self.injected)} are")


@dataclass(frozen=True)
class Setup:
    """What is injected by text; the recorded sources, and every scene's donor among them; and the scenes' own
    episodes."""

    sites: Mapping[str, list[str]]
    source: Recorded
    donors: Donors
    own: Recorded

    def told(self, suite: str) -> Told:
        """The donor's instruction, for every scene."""
        tasks = {source.episode: source.scene.task for source in self.source.sources}
        return Told(
            {scene: get_suite(suite).task(tasks[episode]).instruction for scene, episode in self.donors.items()}
        )

    def arm(self, text: str) -> InjectionArm:
        """An injection with the own prompt."""
        return InjectionArm(text, self.source.folder, Injection(self.sites[text], HOLD), self.donors)


@dataclass(frozen=True)
class Planned:
    """An arm, and the episodes that it is set against."""

    arm: Arm
    source: Recorded
    donors: Donors


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for suites of one task or without an end effector, and a model that has none of the sites."""
    sites, lacking = sites_in(context.model, settings.injected)
    if not sites:
        raise ValueError(f"{context.model_name} has none of {list(settings.injected)}: {'; '.join(lacking)}")
    setup = set_up(context, settings, sites)
    planned = plan(context, settings, setup)
    main = _run_arms(context, settings, planned)
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    reach = context.table("reach", lambda: _reach(context, settings, setup))
    each = _overrides(setup, planned, main, layout, normalize)
    compared = compare(main, layout, normalize, seed=context.seed)
    table = _summary(each, reach, compared)
    moved = _moved(context, settings, setup) if can_move(settings.suite) and settings.judged in sites else None
    tables = {"success": compared, "reach": reach, "episodes": each}
    if moved is not None:
        tables["moved_object"] = moved
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, setup, main, each, compared, moved),
        tables=tables,
        figures={
            "endpoints": (
                endpoint_figure(_told_their_own(each), "Where episodes end when their source has ended"),
                _CAPTION,
            ),
            "success": (success_bars(compared, reference=BASELINE.name), "Success of the own task."),
        },
        labels=_labels(reach),
        notes=[*_NOTES, *lacking, *_left_out(settings, setup, moved)],
    )


_CAPTION = (
    "Each dot is an episode: the distance of its end effector from where the source ended, and from where the same "
    "episode ends without injection, at the step at which the source ended. On the diagonal it is as far from both. "
    "Grey: noise as large, in place of what the panel injects. Arms that are told the source's prompt are left out but "
    "for the one without injection."
)
_NOTES = [
    "The donor has another task, the same start and the same noise; after its last step its last values are held. "
    "Distances and cosines are taken at, and up to, the step at which the source ended.",
    "Headline: endpoint_share, 0 at the end of the episode without injection, 1 at the source's. follows_source is the "
    "lenient published definition of an override (cos_src > cos_dst), source / ambiguous / destination the strict one "
    "with a margin of .05; cos_src_dst says what the cosines are worth.",
    "The arm that is told the source's prompt, without any injection, does what its source did: arms that are told it "
    "say nothing of injection, and are shown beside it only (source prompt: ...). All others are told their own task.",
    "Noise stands in for what is injected: as long at every token and step as what the donor would change, in one "
    "direction for each token of an episode.",
    "same scene: the donor is the episode's own run, which must change nothing. cross seed: the donor has the same "
    "task and another start, and gives its noise too, where actions are made from noise.",
    "Over the old place: within half a block along both axes of the table, and nearer to it than to the new one.",
]


def set_up(context: Context, settings: Settings, sites: Mapping[str, list[str]]) -> Setup:
    """Record the sources: the same starts, each with another task; and the scenes' own runs."""
    every = list(dict.fromkeys(site for each in sites.values() for site in each))
    tasks = turned_tasks(settings.suite, settings.shift)
    options = limited(context, settings.max_steps)
    source = record(context, "source", settings.suite, every, settings.episodes, options, tasks)
    # sites that the model lacks are not judged: then what there is stands in
    judged = with_noise(context.model, sites.get(settings.judged, every))
    own = record(context, "own", settings.suite, judged, settings.episodes, options)
    scenes = scenes_of(context, settings.suite, settings.episodes)
    return Setup(sites, source, same_start(source.sources, scenes), own)


def plan(context: Context, settings: Settings, setup: Setup) -> list[Planned]:
    """All arms of the main sweep, in the order of the tables, with whom each is set against."""

    def chosen(globs: Sequence[str]) -> list[str]:
        return [text for text in setup.sites if any(fnmatchcase(text, glob) for glob in globs)]

    told = setup.told(settings.suite)
    arms: list[Arm] = [BASELINE, ToldArm(SOURCE_PROMPT, [told])]
    for text in setup.sites:
        arms += [setup.arm(text), *([noise_of(setup.arm(text))] if text in chosen(settings.controls) else [])]
    arms += [replace(setup.arm(text), name=CROSS_PROMPT.format(text), told=[told])
             for text in chosen(settings.cross_prompt)]  # fmt: skip
    found = [Planned(arm, setup.source, setup.donors) for arm in arms]
    if settings.judged not in setup.sites:
        return found
    scenes, own = list(setup.donors), setup.own
    wanted = [(SAME_SCENE, setup.sites[settings.judged], same_scene)]
    if settings.cross_seed:
        wanted.append((CROSS_SEED, with_noise(context.model, setup.sites[settings.judged]), cross_seed))
    for form, sites, choose in wanted:
        donors = choose(own.sources, scenes)
        arm = InjectionArm(form.format(settings.judged), own.folder, Injection(sites, HOLD), donors)
        found.append(Planned(arm, own, donors))
    return found


def _run_arms(context: Context, settings: Settings, planned: Sequence[Planned]) -> Runs:
    options = limited(context, settings.max_steps)
    arms = [each.arm for each in planned]
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def _reach(context: Context, settings: Settings, setup: Setup) -> pd.DataFrame:
    """What names tell of every injection, and what running two observations shows."""
    starts = starts_of(context, settings.suite, settings.episodes)
    episode, rows = setup.donors[next(iter(setup.donors))], []
    for text, sites in setup.sites.items():
        found = reach_of(context, setup.source, episode, Injection(sites, HOLD), starts)
        rows.append({"injected": text, "sites": len(sites), **reach_row(found)})
    return pd.DataFrame(rows)


def _overrides(setup: Setup, planned: Sequence[Planned], main: Runs, layout: Any, normalize: Any) -> pd.DataFrame:
    """`override` of every arm's episodes, each as far as its source went; the rerun stands behind the baseline."""
    donors: dict[str, tuple[Recorded, Donors]] = {}
    for each in planned:
        donors[each.arm.name] = each.source, each.donors
        if each.arm is BASELINE:
            donors[RERUN] = each.source, each.donors
    return overrides(main, donors, layout, normalize)


def _summary(each: pd.DataFrame, reach: pd.DataFrame, compared: pd.DataFrame) -> pd.DataFrame:
    """Shares and means by arm, with what running showed of its injection, and the standard comparison's columns."""
    labels = {row["injected"]: row["label"] for row in records(reach)}
    table = summarise_override(each)
    cuts = {row["injected"]: row["cuts_prompt"] for row in records(reach)}
    table.insert(2, "label", [labels.get(arm, "") for arm in table["arm"]])
    table.insert(3, "cuts_prompt", [bool(cuts.get(arm, False)) for arm in table["arm"]])
    rows = {row["arm"]: row for row in records(compared)}
    for at, name in enumerate(("success_low", "success_high", "holm_p", "displacement", "floor")):
        table.insert(6 + at, name, [rows[arm][name] for arm in table["arm"]])
    return table


def _told_their_own(each: pd.DataFrame) -> pd.DataFrame:
    return keep(each, lambda row: not row["arm"].startswith(CROSS_PROMPT.format("")))


def _labels(reach: pd.DataFrame) -> list[str]:
    rows = records(reach)
    cut = [row["injected"] for row in rows if row["cuts_prompt"] and row["label"] == OPEN]
    back = "the donor's start and noise, so that injecting does what telling the source's prompt does"
    return badges((row["injected"], row["label"]) for row in rows) + prompt_badge(cut, back)


def _moved(context: Context, settings: Settings, setup: Setup) -> pd.DataFrame:
    """One row an episode in which the donor's block stands elsewhere: where its cup is when its source grasps.

    Arms: told the donor's prompt, without injection; and injected, with the own prompt.
    """
    tasks = {source.episode: source.scene.task for source in setup.source.sources}
    moved = {scene.task: block_of(settings.suite, tasks[episode]) for scene, episode in setup.donors.items()}
    arms = [ToldArm(SOURCE_PROMPT, [setup.told(settings.suite)]), setup.arm(settings.judged)]
    done = context.rollouts(
        "moved", moved_suite(settings.suite, moved), arms, settings.episodes,
        options=limited(context, settings.max_steps),
    )  # fmt: skip
    runs, now = read_runs(done), first_places(done)
    starts = context.observations(settings.suite, settings.episodes)
    before = {Scene(seen.task, seen.seed): seen.info["poses"]["blocks"] for seen in starts}
    rows = []
    for row in range(len(runs.episodes)):
        scene, episode = scene_of(runs, row), int(runs.episodes["episode"].iloc[row])
        block, states = moved[scene.task], setup.source.runs.states[setup.source.row(setup.donors[scene])]
        found = place_at_grasp(runs, row, states, np.array(before[scene][block][:2]), now[episode][block])
        if found is not None:
            arm = str(runs.episodes["arm"].iloc[row])
            rows.append({"arm": arm, "task": scene.task, "seed": scene.seed, "block": block, **found})  # fmt: skip
    return pd.DataFrame(rows)


def _verdicts(
    context: Context,
    settings: Settings,
    setup: Setup,
    main: Runs,
    each: pd.DataFrame,
    compared: pd.DataFrame,
    moved: pd.DataFrame | None,
) -> list[Verdict]:
    why = gate(main, settings.gate) or gate(setup.source.runs, settings.gate)
    if why is None and settings.judged not in setup.sites:
        why = f"the model has no {settings.judged!r}"
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    return [
        _ends_at_source(context, settings, each),
        _fails(context, settings, compared),
        _goes_to_the_old_place(context, settings, moved),
    ]


def _of(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    return keep(table, lambda row: row["arm"] == arm)


def _share(table: pd.DataFrame, column: str) -> float:
    return float(np.mean([row[column] for row in records(table)]))


def _by_scene(table: pd.DataFrame, arm: str, column: str) -> dict[Scene, Any]:
    return {Scene(row["task"], row["seed"]): row[column] for row in records(table) if row["arm"] == arm}


def _ends_at_source(context: Context, settings: Settings, each: pd.DataFrame) -> Verdict:
    """Tested against what ends there anyway: noise as large, or else the episode without injection."""
    limit, mine = threshold(context, "ends-at-source"), _of(each, settings.judged)
    share, told = _share(mine, "ends_at_source"), _of(each, SOURCE_PROMPT)
    noise = f"{PREFIX}{settings.judged}"
    control = noise if noise in set(each["arm"]) else BASELINE.name
    said = ", ".join(f"{arm} {_share(_of(each, arm), 'ends_at_source'):.0%}"
                     for arm in dict.fromkeys((control, BASELINE.name)))  # fmt: skip
    pair = [_by_scene(each, arm, "ends_at_source") for arm in (settings.judged, control)]
    return settle(
        "ends-at-source",
        share >= limit,
        [paired_p(*pair)],
        f"{settings.judged}: {share:.0%} end nearer to the source's end ({_share(mine, 'to_source'):.3f} m from it, "
        f"{_share(mine, 'to_destination'):.3f} m from the own); lenient override {_share(mine, 'follows_source'):.0%}, "
        f"strict {float(np.mean([row['three_way'] == SOURCE for row in records(mine)])):.0%}; controls: {said}; told "
        f"the source's prompt, without injection: {_share(told, 'ends_at_source'):.0%}",
    )


def _fails(context: Context, settings: Settings, compared: pd.DataFrame) -> Verdict:
    limit, rows = threshold(context, "fails"), {row["arm"]: row for row in records(compared)}
    mine, noise = rows[settings.judged], rows.get(f"{PREFIX}{settings.judged}")
    beside = "" if noise is None else f", noise as large {noise['success']:.0%}"
    return settle(
        "fails",
        mine["success"] <= limit,
        [mine["holm_p"]],
        f"{settings.judged}: success {mine['success']:.0%} ({mine['success_low']:.0%} to {mine['success_high']:.0%}), "
        f"without injection {rows[BASELINE.name]['success']:.0%}{beside}",
    )


def _goes_to_the_old_place(context: Context, settings: Settings, moved: pd.DataFrame | None) -> Verdict:
    limit = threshold(context, "moved")
    if moved is None or not len(moved):
        return Verdict("moved", None, "objects of this suite cannot be moved, or no source grasps one")
    old = {arm: _share(_of(moved, arm), "at_old_place") for arm in (settings.judged, SOURCE_PROMPT)}
    near = {arm: _share(_of(moved, arm), "to_old") for arm in old}
    return settle(
        "moved",
        old[settings.judged] >= limit,
        [paired_p(*(_by_scene(moved, arm, "at_old_place") for arm in old))],
        f"when its source grasps, {settings.judged} is over the old place in {old[settings.judged]:.0%} "
        f"({near[settings.judged]:.3f} m from it); told the source's prompt without injection, in "
        f"{old[SOURCE_PROMPT]:.0%} ({near[SOURCE_PROMPT]:.3f} m)",
    )


def _left_out(settings: Settings, setup: Setup, moved: pd.DataFrame | None) -> list[str]:
    """What was not run, and why."""
    found = []
    if moved is None:
        found.append(f"Objects of the suite {settings.suite!r} were not moved: only the tabletop's can be.")
    if not settings.cross_seed:
        found.append("Donors of another seed were not run: no two of these episodes have one task.")
    if bare := [text for text in setup.sites if not any(fnmatchcase(text, glob) for glob in settings.controls)]:
        found.append(f"Without a control of noise: {', '.join(bare)}.")
    return found
