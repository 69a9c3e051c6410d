"""When does a policy decide? Injection in a window of the episode, and a prompt that changes at some step.

Windows and switches count environment steps. A donor of another task is injected whole, with the own prompt, for a
third of the episode. Each window's floor is the same injection of the episode's own values, which changes nothing; its
control is noise as large as what the donor changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from hooked_vla.analysis.statistics import wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions.injection import STOP, Injection
from hooked_vla.interventions.injection_reach import REPLAY
from hooked_vla.interventions.injection_sites import choose_sites
from hooked_vla.interventions.where import Window
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
from hooked_vla.rollouts.experiments.goals import goal_of, goals_done
from hooked_vla.rollouts.experiments.kinds.battery_runs import limited, records, settings_in, threshold
from hooked_vla.rollouts.experiments.kinds.injection_figures import dodged
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    badges,
    gate,
    overrides,
    reach_of,
    reach_row,
    record,
    rows_of,
    scene_of,
    scenes_of,
    starts_of,
    turned_tasks,
)
from hooked_vla.rollouts.experiments.kinds.injection_scores import (
    Scores,
    difference,
    mean_score,
    paired_p,
    settle,
    share_difference,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import Donors, InjectionArm, Told, ToldArm, same_scene, same_start
from hooked_vla.rollouts.matched_noise import PREFIX, noise_of
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd

INJECTED, OWN, NOISE, SWITCH = "window", "own values", "noise", "switch"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. shift: the donor of task i does task i + shift.
    injected: as `choose_sites` takes it. steps: what is cut into `windows` windows of equal length, about as long as an
    episode takes. switches: environment steps at which the prompt becomes the donor's. Both are multiples of the number
    of actions executed of a chunk. max_steps: after which an episode has failed. gate: the least success of the
    baseline."""

    episodes: int
    suite: str = "goal"
    shift: int = 4
    injected: str = "expert"
    steps: int = 36
    windows: int = 3
    switches: tuple[int, ...] = (0, 4, 8, 12, 16, 20, 24, 28, 32)
    max_steps: int = 96
    gate: float = 0.9

    def __post_init__(self) -> None:
        if self.windows < 2 or self.steps % self.windows:
            raise ValueError(f"{self.steps} steps cannot be cut into {self.windows} equal windows, of at least 2")
        if len(self.switches) < 2 or sorted(set(self.switches)) != list(self.switches):
            raise ValueError(f"switches must be two steps or more, in ascending order, got {list(self.switches)}")


@dataclass(frozen=True)
class Setup:
    """What was recorded: donors of other tasks (other) and the episodes themselves (own); donors: every scene's."""

    sites: Sequence[str]
    other: Recorded
    own: Recorded
    donors: Donors

    def goal(self, suite: str, scene: Scene) -> str:
        """What a scene's donor does, as goals are named."""
        return goal_of(suite, str(self.other.runs.episodes["task"].iloc[self.other.row(self.donors[scene])]))


@dataclass(frozen=True)
class Scored:
    """What every arm comes to, scene by scene. within: distance from the same episode without injection in the arm's
    own window, metres. other_goal: whether the donor's goal was done at any step; empty where places are not
    recorded. own_goal: whether the own one was. Both without the episodes that had ended before the arm's first
    step."""

    within: Mapping[str, Scores]
    other_goal: Mapping[str, Scores]
    own_goal: Mapping[str, Scores]


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for suites of one task or without an end effector, a model without the sites, and windows or
    switches that fall between the steps at which the policy plans."""
    _check_rhythm(context, settings)
    setup = _set_up(context, settings)
    done, runs = _run_arms(context, settings, setup)
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    compared = compare(runs, layout, normalize, seed=context.seed)
    reach = context.table("reach", lambda: _reach(context, settings, setup))
    scored = Scored(_within(settings, runs, layout), _other_goal(settings, setup, done), _own_goal(settings, done))
    _check_zero(setup, runs, scored)
    arms = list(dict.fromkeys(runs.episodes["arm"]))
    each = overrides(runs, {arm: (setup.other, setup.donors) for arm in arms}, layout, normalize)
    table = _timed(context, settings, compared, scored, each, str(reach["label"].iloc[0]))
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, setup, runs, scored, table),
        tables={"success": compared, "reach": reach},
        figures=_figures(table),
        labels=badges([(f"{settings.injected}, within its window", str(reach["label"].iloc[0]))]),
        notes=_notes(settings),
    )


def _check_rhythm(context: Context, settings: Settings) -> None:
    n = settings_in(context, settings.suite, limited(context, settings.max_steps)).n_action_steps
    length = settings.steps // settings.windows
    if wrong := [step for step in (length, *settings.switches) if step % n]:
        raise ValueError(
            f"{context.model_name} plans every {n} environment steps: windows and switches must fall on these, "
            f"but {wrong} do not"
        )


def _windows(settings: Settings) -> list[Window]:
    length = settings.steps // settings.windows
    return [Window(i * length, (i + 1) * length) for i in range(settings.windows)]


def _set_up(context: Context, settings: Settings) -> Setup:
    sites, options = choose_sites(context.model, settings.injected), limited(context, settings.max_steps)
    tasks = turned_tasks(settings.suite, settings.shift)
    other = record(context, "source", settings.suite, sites, settings.episodes, options, tasks)
    own = record(context, "own", settings.suite, sites, settings.episodes, options)
    scenes = scenes_of(context, settings.suite, settings.episodes)
    return Setup(sites, other, own, same_start(other.sources, scenes))


def _run_arms(context: Context, settings: Settings, setup: Setup) -> tuple[Rollouts, Runs]:
    """The sweep of all arms, and with it the baseline's rerun."""
    scenes = list(setup.donors)
    arms: list[Arm] = [BASELINE]
    for window in _windows(settings):
        injection = Injection(setup.sites, STOP, env=window)
        donor = InjectionArm(f"{INJECTED} {window}", setup.other.folder, injection, setup.donors)
        itself = same_scene(setup.own.sources, scenes)
        arms += [donor, noise_of(donor), InjectionArm(f"{OWN} {window}", setup.own.folder, injection, itself)]
    tasks = {source.episode: source.scene.task for source in setup.other.sources}
    told = {scene: get_suite(settings.suite).task(tasks[donor]).instruction for scene, donor in setup.donors.items()}
    arms += [ToldArm(f"{SWITCH} at {step}", [Told(told, step)]) for step in settings.switches]
    options = limited(context, settings.max_steps)
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return done, join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def _reach(context: Context, settings: Settings, setup: Setup) -> pd.DataFrame:
    """What names tell of the injection, and what running two observations shows, where it acts."""
    starts = starts_of(context, settings.suite, settings.episodes)
    episode = setup.donors[next(iter(setup.donors))]
    found = reach_of(context, setup.other, episode, Injection(setup.sites, STOP), starts)
    return pd.DataFrame([{"injected": settings.injected, **reach_row(found)}])


def _cells(settings: Settings) -> list[tuple[str, str, int, int | None]]:
    """Kind, arm, first step, and the step after the last one, of everything that has a time."""
    found: list[tuple[str, str, int, int | None]] = []
    for kind, form in ((INJECTED, "{}"), (NOISE, PREFIX + "{}")):
        found += [(kind, form.format(f"{INJECTED} {each}"), each.start, each.stop) for each in _windows(settings)]
    return found + [(SWITCH, f"{SWITCH} at {step}", step, None) for step in settings.switches]


def _timed(
    context: Context, settings: Settings, compared: pd.DataFrame, scored: Scored, each: pd.DataFrame, label: str
) -> pd.DataFrame:
    """One row for every window, its noise, and every switch: from which step; within: how far it moves the end effector
    in the window's own steps (after a switch, in as many), in the n_within episodes that last so long; displacement:
    over all common steps (both in metres, with intervals by tasks; no_op_floor: the same injection of own values, or
    the rerun); the first prompt's success; own_goal, donors_goal: shares, with Wilson's intervals, of the n_begun
    episodes that had not ended before `start` that do the own goal, or the donor's at any step; endpoint_share: 0 where
    the episode ends by itself, 1 where its donor ended."""
    rows = {row["arm"]: row for row in records(compared)}
    ends = {str(arm): float(np.nanmean(part["endpoint_share"])) for arm, part in each.groupby("arm", sort=False)}
    found = []
    for kind, arm, start, stop in _cells(settings):
        row = rows[arm]
        floor = row["floor"] if stop is None else rows[f"{OWN} {Window(start, stop)}"]["displacement"]
        within, low, high = mean_score(scored.within[arm], context.seed)
        own = scored.own_goal.get(arm, {})
        found.append({
            "kind": kind, "arm": arm, "label": label if kind == INJECTED else "", "start": start, "stop": stop,
            "n": row["n"], "n_within": len(scored.within[arm]), "within": within, "within_low": low,
            "within_high": high,
            **{name: row[name] for name in ("displacement", "displacement_low", "displacement_high")},
            "no_op_floor": floor,
            **{name: row[name] for name in ("success", "success_low", "success_high", "difference", "mcnemar_p",
                                            "holm_p")},
            "n_begun": len(own),
            **_share("own_goal", own),
            **_share("donors_goal", scored.other_goal.get(arm, {})),
            "endpoint_share": ends[arm],
        })  # fmt: skip
    return pd.DataFrame(found).astype({"stop": "Int64"})


def _share(name: str, scores: Scores) -> dict[str, float]:
    """Share of scenes with Wilson's interval, as columns; NaN without any."""
    if not scores:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), float("nan"))
    won = sum(map(bool, scores.values()))
    low, high = wilson_interval(won, len(scores))
    return {name: won / len(scores), f"{name}_low": low, f"{name}_high": high}


def _within(settings: Settings, runs: Runs, layout: Any) -> dict[str, dict[Scene, float]]:
    """Mean distance of the end effector from the same episode without injection, in the arm's own window or as many
    steps after a switch: windows of equal length are compared without what comes after them. Metres; scenes whose
    episode does not last so long are left out."""
    own = {scene_of(runs, row): row for row in rows_of(runs, BASELINE.name)}
    columns, length = list(layout.state_position), settings.steps // settings.windows
    found: dict[str, dict[Scene, float]] = {}
    for _, arm, start, _ in _cells(settings):
        found[arm] = {}
        for row in rows_of(runs, arm):
            scene = scene_of(runs, row)
            # the state after a step is what the step did
            paths = [runs.states[i][start + 1 : start + length + 1, columns] for i in (row, own[scene])]
            if all(len(path) == length for path in paths):
                found[arm][scene] = float(np.linalg.norm(paths[0] - paths[1], axis=1).mean())
    return found


def _begun(settings: Settings, done: Rollouts) -> list[dict[str, Any]]:
    """Episodes that last longer than until the first step of their arm's injection or switch."""
    starts = {arm: start for _, arm, start, _ in _cells(settings)}
    return [row for row in done.episodes.to_pylist() if row["n_steps"] > starts.get(row["arm"], 0)]


def _own_goal(settings: Settings, done: Rollouts) -> dict[str, dict[Scene, float]]:
    """1 for every episode that succeeds, else 0, of those in which anything was changed."""
    found = dict[str, dict[Scene, float]]()
    for row in _begun(settings, done):
        found.setdefault(row["arm"], {})[Scene(row["task"], row["seed"])] = float(row["success"])
    return found


def _other_goal(settings: Settings, setup: Setup, done: Rollouts) -> dict[str, dict[Scene, float]]:
    """1 for every episode that does its donor's goal at any step, else 0, of those in which anything was changed: the
    environment knows the own goal only, so a policy that did the other one goes on, and may undo it. Empty where places
    are not recorded."""
    reached, found = goals_done(done), dict[str, dict[Scene, float]]()
    for row in _begun(settings, done):
        if row["episode"] not in reached:
            return {}
        scene = Scene(row["task"], row["seed"])
        goal = setup.goal(settings.suite, scene)
        found.setdefault(row["arm"], {})[scene] = float(goal in reached[row["episode"]])
    return found


def _check_zero(setup: Setup, runs: Runs, scored: Scored) -> None:
    """Told the donor's prompt from the first step on, an episode is its donor's. Where its actions are, bit for bit,
    the goal must be done where the donor succeeds: else the two measures of it differ.

    Raises RuntimeError there.
    """
    arm = f"{SWITCH} at 0"
    for scene, did in scored.other_goal.get(arm, {}).items():
        donor, row = setup.other.row(setup.donors[scene]), runs.row(arm, scene.task, scene.seed)
        theirs = setup.other.runs.actions[donor]
        if np.array_equal(runs.actions[row][: len(theirs)], theirs):
            succeeds = bool(setup.other.runs.episodes["success"].iloc[donor])
            if succeeds and not did:
                raise RuntimeError(f"{scene}: the donor succeeds, and the same actions do not do its goal")


def _verdicts(
    context: Context, settings: Settings, setup: Setup, runs: Runs, scored: Scored, table: pd.DataFrame
) -> list[Verdict]:
    why = gate(runs, settings.gate) or gate(setup.other.runs, settings.gate)
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    rows = records(table)
    return [
        _early_windows(context, rows, scored),
        _early_switches(context, rows, scored),
        _floors(context, rows),
    ]


def _early_windows(context: Context, rows: Sequence[dict[str, Any]], scored: Scored) -> Verdict:
    """Judged within the windows, in the episodes that last through all of them: over the whole episode, an early one
    has more steps to differ in."""
    limit = threshold(context, "early-windows")
    moved = [row for row in rows if row["kind"] == INJECTED]
    noise = {row["start"]: row["within"] for row in rows if row["kind"] == NOISE}
    scores = [scored.within[row["arm"]] for row in moved]
    lasting = [scene for scene in scores[0] if all(scene in each for each in scores)]
    if not lasting:
        return Verdict("early-windows", None, "no episode lasts through all windows")
    means = [float(np.mean([each[scene] for scene in lasting])) for each in scores]
    said = ", ".join(f"steps {row['start']} to {row['stop'] - 1}: {mean:.3f} m (noise as large "
                     f"{noise[row['start']]:.3f})" for row, mean in zip(moved, means, strict=True))  # fmt: skip
    first, last = moved[0], moved[-1]
    ratio = means[0] / means[-1] if means[-1] else float("inf")
    falls = all(a > b for a, b in pairwise(means))
    ends = [{scene: each[scene] for scene in lasting} for each in (scores[0], scores[-1])]
    more, low, high = difference(ends[0], ends[1], context.seed)
    whole = first["displacement"] / last["displacement"] if last["displacement"] else float("inf")
    return Verdict(
        "early-windows",
        ratio >= limit and falls and low > 0,
        f"within the windows, in the {len(lasting)} episodes that last through all of them, {said}; first ÷ last "
        f"{ratio:.2f}, first less last {more:+.3f} m ({low:+.3f} to {high:+.3f}), {'less' if falls else 'not less'} "
        "from each to the next; over whole episodes, where an early one has more steps to differ in, "
        f"{whole:.2f}",
    )


def _early_switches(context: Context, rows: Sequence[dict[str, Any]], scored: Scored) -> Verdict:
    limit = threshold(context, "early-switches")
    changed = [row for row in rows if row["kind"] == SWITCH]
    if any(row["donors_goal"] != row["donors_goal"] for row in changed):
        return Verdict(
            "early-switches", None, "the places of objects are not recorded: which goal is done is not known"
        )
    said = "; ".join(
        f"at {row['start']}: second {row['donors_goal']:.0%}, first {row['own_goal']:.0%} of {row['n_begun']}"
        for row in changed
    )
    first, last = (scored.other_goal[changed[i]["arm"]] for i in (0, -1))
    more, low, high = share_difference(first, last, context.seed)
    return settle(
        "early-switches",
        more >= limit,
        [paired_p(first, last)],
        "goals done at any step, of the second and the first prompt, of the episodes that had not ended before it "
        f"changed, {said}; the second's, at the first of these less at the last, in the episodes of both, "
        f"{100 * more:+.0f} points ({100 * low:+.0f} to {100 * high:+.0f})",
    )


def _floors(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit = threshold(context, "floor")
    worst = max((row for row in rows if row["kind"] == INJECTED), key=lambda row: row["no_op_floor"])
    return Verdict(
        "floor", worst["no_op_floor"] <= limit, f"at most {worst['no_op_floor']:.1e} m (from step {worst['start']})"
    )


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    rows = records(table)
    named = {INJECTED: "another task's values", NOISE: "noise as large"}
    windows = [{**row, "steps": f"{row['start']} to {row['stop'] - 1}", "what": named[row["kind"]]}
               for row in rows if row["kind"] in named]  # fmt: skip
    outcomes = []
    for row in rows:
        if row["kind"] == SWITCH:
            goals = (("the first prompt's", "own_goal"), ("the second prompt's", "donors_goal"))
            outcomes += [
                {"start": row["start"], "goal": goal, "share": row[name], "low": row[f"{name}_low"],
                 "high": row[f"{name}_high"]}
                for goal, name in goals if row[name] == row[name]
            ]  # fmt: skip
    floor = max(row["no_op_floor"] for row in rows if row["kind"] == INJECTED)
    return {
        "windows": (
            dodged(pd.DataFrame(windows), "steps", "within", "what", "within_low", "within_high",
                   title="Injection in a window", xlabel="environment steps of the injection",
                   ylabel="distance within the window, m", floor=floor, floor_label="own values injected"),
            "Mean distance of the end effector, in the steps of the window alone, from the same episode without "
            "injection, when another task's values are injected there, or noise as large; 95 % intervals by tasks.",
        ),
        "switches": (
            dodged(pd.DataFrame(outcomes), "start", "share", "goal", "low", "high", title="A prompt that changes",
                   xlabel="environment step of the change", ylabel="share of episodes"),
            "Which goal is done, at any step, by the step at which the prompt becomes another task's, of the episodes "
            "that had not ended before it (n_begun in the table); Wilson's 95 % intervals.",
        ),
    }  # fmt: skip


def _notes(settings: Settings) -> list[str]:
    return [
        f"The donor has another task, the same start and the same noise; {settings.injected} is injected whole: where "
        f"that is {REPLAY}, the arm does as the donor did within the window, whatever the model makes of what it sees. "
        "Outside of it, and after the donor's last step, nothing is injected.",
        "An early window leaves more steps to differ in: displacement is over the common steps of the whole episode, "
        "and an episode that recovers has a small one. The rule is judged on within: the window's own steps, as many "
        "for every window, in the episodes that last through all of them. How far the donor itself is from the episode "
        "there bounds it.",
        "Noise keeps one direction for each token of an episode, and is as long as the donor's change at every step.",
        f"Windows of {settings.steps // settings.windows} and switches up to {settings.switches[-1]} environment steps "
        "suit this suite's short episodes; published switches come later, in longer ones.",
        "Settings count environment steps; published code counts forward calls, of which a flow-matching expert makes "
        "one for every denoise step.",
    ]
