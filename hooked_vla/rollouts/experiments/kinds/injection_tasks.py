"""Cross-task injection: the policy is told its own task, and gets the values of an episode of another one.

The donor starts from the same state and the same noise. Only arms with the own prompt test injection: told the donor's
prompt, the policy does the donor's task without any. Where the injection is a cut set, what comes out is replay; with
the donor's object moved, replay goes to the old place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.analysis.metrics import SOURCE
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import REPLAY
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.compare import (
    RERUN,
    Runs,
    action_normalizer,
    compare,
    join,
    layout_of,
    override,
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
    nearer_places,
)
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    cut,
    gate,
    reach_of,
    record,
    rows_of,
    scene_of,
    scenes_of,
    sites_in,
    starts_of,
    turned_tasks,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import Donors, InjectionArm, Told, ToldArm, same_start
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd

SOURCE_PROMPT = "source prompt, no injection"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. shift: the donor of task i does task i + shift.
    injected: what is injected, as `choose_sites` takes it; judged: the one of them that the rules are about.
    max_steps: after which an episode has failed. gate: the least success of the baseline."""

    episodes: int
    injected: tuple[str, ...]
    judged: str = "expert"
    suite: str = "goal"
    shift: int = 4
    max_steps: int = 72
    gate: float = 0.9

    def __post_init__(self) -> None:
        if self.judged not in self.injected:
            raise ValueError(f"judged {self.judged!r} is not injected; {list(self.injected)} are")


@dataclass(frozen=True)
class Setup:
    """What is injected by text, the recorded sources, and every scene's donor among them."""

    sites: Mapping[str, list[str]]
    source: Recorded
    donors: Donors

    def told(self, suite: str) -> Told:
        """The donor's instruction, for every scene."""
        tasks = {source.episode: source.scene.task for source in self.source.sources}
        return Told(
            {scene: get_suite(suite).task(tasks[episode]).instruction for scene, episode in self.donors.items()}
        )

    def arms(self, texts: Sequence[str]) -> list[Arm]:
        return [
            InjectionArm(text, self.source.folder, Injection(self.sites[text], HOLD), self.donors) for text in texts
        ]


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for suites of one task or without an end effector, and a model that has none of the sites."""
    sites, lacking = sites_in(context.model, settings.injected)
    if not sites:
        raise ValueError(f"{context.model_name} has none of {list(settings.injected)}: {'; '.join(lacking)}")
    setup = set_up(context, settings, sites)
    main = _run_arms(context, settings, setup)
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    reach = context.table("reach", lambda: _reach(context, settings, setup))
    each = _overrides(settings, setup, main, layout, normalize)
    table = _summary(each, reach)
    moved = _moved(context, settings, setup) if can_move(settings.suite) and settings.judged in sites else None
    tables = {"success": compare(main, layout, normalize, seed=context.seed), "reach": reach, "episodes": each}
    if moved is not None:
        tables["moved_object"] = moved
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, setup, main, each, moved),
        tables=tables,
        figures={
            "endpoints": (endpoint_figure(each, "Where episodes end when their source has ended"), _CAPTION),
            "success": (success_bars(tables["success"], reference=BASELINE.name), "Success of the own task."),
        },
        labels=_labels(reach),
        notes=[*_NOTES, *lacking, *_unmoved(settings, moved)],
    )


_CAPTION = (
    "Each dot is an episode: the distance of its end effector from where the source ended, and from where the same "
    "episode ends without injection, at the step at which the source ended. On the diagonal it is as far from both."
)
_NOTES = [
    "The donor has another task, the same start and the same noise; after its last step its last values are held. "
    "Distances and cosines are taken at, and up to, the step at which the source ended.",
    "Headline: endpoint_share, 0 at the end of the episode without injection, 1 at the source's. follows_source is the "
    "lenient published definition of an override (cos_src > cos_dst), source / ambiguous / destination the strict one "
    "with a margin of .05; cos_src_dst says what the cosines are worth.",
    "The arm that is told the source's prompt, without any injection, does what its source did: arms that are told it "
    "say nothing of injection, so all others are told their own task.",
]


def set_up(context: Context, settings: Settings, sites: Mapping[str, list[str]]) -> Setup:
    """Record the sources: the same starts, each with another task."""
    every = list(dict.fromkeys(site for each in sites.values() for site in each))
    tasks = turned_tasks(settings.suite, settings.shift)
    options = limited(context, settings.max_steps)
    source = record(context, "source", settings.suite, every, settings.episodes, options, tasks)
    return Setup(sites, source, same_start(source.sources, scenes_of(context, settings.suite, settings.episodes)))


def _run_arms(context: Context, settings: Settings, setup: Setup) -> Runs:
    arms = [BASELINE, ToldArm(SOURCE_PROMPT, [setup.told(settings.suite)]), *setup.arms(list(setup.sites))]
    options = limited(context, settings.max_steps)
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def _reach(context: Context, settings: Settings, setup: Setup) -> pd.DataFrame:
    """What names tell of every injection, and what running two observations shows."""
    starts = starts_of(context, settings.suite, settings.episodes)
    episode, rows = setup.donors[next(iter(setup.donors))], []
    for text, sites in setup.sites.items():
        found = reach_of(context, setup.source, episode, Injection(sites, HOLD), starts)
        rows.append({"injected": text, "sites": len(sites), "cut_set": found.cut or "", "label": found.label,
                     "dead_end_by_name": found.dead_end, "agrees": found.agrees})  # fmt: skip
    return pd.DataFrame(rows)


def _overrides(settings: Settings, setup: Setup, main: Runs, layout: Any, normalize: Any) -> pd.DataFrame:
    """`override` of every arm's episodes, each as far as its source went."""
    source = setup.source.runs
    named = Runs(source.episodes.assign(arm="source"), source.states, source.actions, source.chunks)
    lengths = [setup.source.length(setup.donors[scene_of(main, row)]) for row in range(len(main.episodes))]
    both, offset = join(cut(main, lengths), named), len(main.episodes)
    own = {scene_of(main, row): row for row in rows_of(main, BASELINE.name)}
    arms = [BASELINE.name, RERUN, SOURCE_PROMPT, *setup.sites]
    triples = [
        (row, offset + setup.source.row(setup.donors[scene_of(main, row)]), own[scene_of(main, row)])
        for arm in arms for row in rows_of(main, arm)
    ]  # fmt: skip
    return override(both, triples, layout, normalize)


def _summary(each: pd.DataFrame, reach: pd.DataFrame) -> pd.DataFrame:
    """Shares and means by arm, with what running showed of its injection."""
    labels = {row["injected"]: row["label"] for row in records(reach)}
    table = summarise_override(each)
    table.insert(2, "label", [labels.get(arm, "") for arm in table["arm"]])
    return table


def _moved(context: Context, settings: Settings, setup: Setup) -> pd.DataFrame:
    """One row an episode in which the donor's block stands elsewhere: where its cup is when its source grasps.

    Arms: told the donor's prompt, without injection; and injected, with the own prompt.
    """
    tasks = {source.episode: source.scene.task for source in setup.source.sources}
    moved = {scene.task: block_of(settings.suite, tasks[episode]) for scene, episode in setup.donors.items()}
    arms = [ToldArm(SOURCE_PROMPT, [setup.told(settings.suite)]), *setup.arms([settings.judged])]
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
        found = nearer_places(runs, row, states, np.array(before[scene][block][:2]), now[episode][block])
        if found is not None:
            arm = str(runs.episodes["arm"].iloc[row])
            rows.append({"arm": arm, "task": scene.task, "seed": scene.seed, "block": block, **found,
                         "at_old_place": found["to_old"] < found["to_new"]})  # fmt: skip
    return pd.DataFrame(rows)


def _verdicts(
    context: Context, settings: Settings, setup: Setup, main: Runs, each: pd.DataFrame, moved: pd.DataFrame | None
) -> list[Verdict]:
    why = gate(main, settings.gate) or gate(setup.source.runs, settings.gate)
    if why is None and settings.judged not in setup.sites:
        why = f"the model has no {settings.judged!r}"
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    return [
        _ends_at_source(context, settings, each),
        _fails(context, settings, each),
        _goes_to_the_old_place(context, settings, moved),
    ]


def _of(table: pd.DataFrame, arm: str) -> pd.DataFrame:
    return keep(table, lambda row: row["arm"] == arm)


def _share(table: pd.DataFrame, column: str) -> float:
    return float(np.mean([row[column] for row in records(table)]))


def _ends_at_source(context: Context, settings: Settings, each: pd.DataFrame) -> Verdict:
    limit, mine = threshold(context, "ends-at-source"), _of(each, settings.judged)
    share, told = _share(mine, "ends_at_source"), _of(each, SOURCE_PROMPT)
    return Verdict(
        "ends-at-source",
        share >= limit,
        f"{settings.judged}: {share:.0%} end nearer to the source's end ({_share(mine, 'to_source'):.3f} m from it, "
        f"{_share(mine, 'to_destination'):.3f} m from the own); lenient override {_share(mine, 'follows_source'):.0%}, "
        f"strict {float(np.mean([row['three_way'] == SOURCE for row in records(mine)])):.0%}; without injection, "
        f"told the source's prompt: {_share(told, 'ends_at_source'):.0%}",
    )


def _fails(context: Context, settings: Settings, each: pd.DataFrame) -> Verdict:
    limit = threshold(context, "fails")
    share, own = (_share(_of(each, arm), "success") for arm in (settings.judged, BASELINE.name))
    return Verdict("fails", share <= limit, f"{settings.judged}: success {share:.0%}, without injection {own:.0%}")


def _goes_to_the_old_place(context: Context, settings: Settings, moved: pd.DataFrame | None) -> Verdict:
    limit = threshold(context, "moved")
    if moved is None or not len(moved):
        return Verdict("moved", None, "objects of this suite cannot be moved, or no source grasps one")
    old = {arm: _share(_of(moved, arm), "at_old_place") for arm in (settings.judged, SOURCE_PROMPT)}
    near = {arm: _share(_of(moved, arm), "to_old") for arm in old}
    return Verdict(
        "moved",
        old[settings.judged] >= limit,
        f"when its source grasps, {settings.judged} is at the old place in {old[settings.judged]:.0%} "
        f"({near[settings.judged]:.3f} m from it); told the source's prompt without injection, in "
        f"{old[SOURCE_PROMPT]:.0%} ({near[SOURCE_PROMPT]:.3f} m)",
    )


def _labels(reach: pd.DataFrame) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in records(reach):
        found.setdefault(row["label"], []).append(row["injected"])
    return [f"{label}: {', '.join(texts)}" for label, texts in found.items() if label != "open"] + (
        [f"{REPLAY}: what ends at the source's place is the source's actions, not what the model makes of its values"]
        if REPLAY in found else []
    )  # fmt: skip


def _unmoved(settings: Settings, moved: pd.DataFrame | None) -> list[str]:
    if moved is not None:
        return []
    return [f"Objects of the suite {settings.suite!r} were not moved: only the tabletop's can be."]
