"""When does a policy decide? Injection in a window of the episode, and a prompt that changes at some step.

Windows and switches count environment steps. A donor of another task is injected whole, with the own prompt, for a
third of the episode; the floor of each window is the same injection of the episode's own values, which changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions.injection import STOP, Injection
from hooked_vla.interventions.injection_sites import choose_sites
from hooked_vla.interventions.where import Window
from hooked_vla.rollouts.arms import BASELINE, Arm
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
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import curve
from hooked_vla.rollouts.experiments.kinds.battery_runs import limited, records, settings_in, threshold
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    gate,
    record,
    rows_of,
    scene_of,
    scenes_of,
    turned_tasks,
)
from hooked_vla.rollouts.experiments.kinds.prompts_goals import placed_goals
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import InjectionArm, Told, ToldArm, same_scene, same_start
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd

INJECTED, OWN, SWITCH = "window", "own values", "switch"


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


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for suites of one task or without an end effector, a model without the sites, and windows or
    switches that fall between the steps at which the policy plans."""
    _check_rhythm(context, settings)
    sites = choose_sites(context.model, settings.injected)
    options = limited(context, settings.max_steps)
    tasks = turned_tasks(settings.suite, settings.shift)
    other = record(context, "source", settings.suite, sites, settings.episodes, options, tasks)
    own = record(context, "own", settings.suite, sites, settings.episodes, options)
    runs = _run_arms(context, settings, sites, other, own)
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    compared = compare(runs, layout, normalize, seed=context.seed)
    table = _timed(settings, compared, runs, other, layout, normalize)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, runs, other, table),
        tables={"success": compared},
        figures=_figures(table),
        labels=[],
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


def _run_arms(context: Context, settings: Settings, sites: Sequence[str], other: Recorded, own: Recorded) -> Runs:
    scenes = scenes_of(context, settings.suite, settings.episodes)
    donors = same_start(other.sources, scenes)
    arms: list[Arm] = [BASELINE]
    for window in _windows(settings):
        injection = Injection(sites, STOP, env=window)
        arms.append(InjectionArm(f"{INJECTED} {window}", other.folder, injection, donors))
        itself = same_scene(own.sources, scenes)
        arms.append(InjectionArm(f"{OWN} {window}", own.folder, injection, itself))
    tasks = {source.episode: source.scene.task for source in other.sources}
    told = {scene: get_suite(settings.suite).task(tasks[donor]).instruction for scene, donor in donors.items()}
    arms += [ToldArm(f"{SWITCH} at {step}", [Told(told, step)]) for step in settings.switches]
    options = limited(context, settings.max_steps)
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def _timed(
    settings: Settings, compared: pd.DataFrame, runs: Runs, other: Recorded, layout: Any, normalize: Any
) -> pd.DataFrame:
    """One row for every window and switch: from which step; how far it moves the end effector (metres, mean over the
    common steps with the episode's own run, and within the window alone; no_op_floor: the same injection of own values,
    or the rerun); the first prompt's success; donors_goal, share of episodes that end with the donor's goal done; and
    where they end (endpoint_share)."""
    rows = {row["arm"]: row for row in records(compared)}
    ends = _endpoints(runs, other, layout, normalize)
    done = _donors_goal(settings, runs, other)
    starts = {f"{INJECTED} {window}": window.start for window in _windows(settings)}
    starts |= {f"{SWITCH} at {step}": step for step in settings.switches}
    length = settings.steps // settings.windows
    within = {arm: _within(runs, arm, start, start + length, layout) for arm, start in starts.items()}
    found = []
    for arm, row in rows.items():
        kind = next((kind for kind in (INJECTED, SWITCH) if arm.startswith(f"{kind} ")), None)
        if kind is None:
            continue
        window = next((each for each in _windows(settings) if arm == f"{INJECTED} {each}"), None)
        start = int(arm.rpartition(" ")[2]) if window is None else window.start
        floor = row["floor"] if window is None else rows[f"{OWN} {window}"]["displacement"]
        found.append({
            "kind": kind, "arm": arm, "start": start, "stop": None if window is None else window.stop, "n": row["n"],
            **{name: row[name] for name in ("displacement", "displacement_low", "displacement_high")},
            "within": within[arm],
            "no_op_floor": floor,
            **{name: row[name] for name in ("success", "success_low", "success_high", "difference", "mcnemar_p",
                                            "holm_p")},
            "donors_goal": done.get(arm, float("nan")),
            "endpoint_share": ends[arm],
        })  # fmt: skip
    return pd.DataFrame(found).astype({"stop": "Int64"})


def _within(runs: Runs, arm: str, start: int, stop: int, layout: Any) -> float:
    """Mean distance of the end effector from the same episode without injection, from step `start` to before `stop`:
    windows of equal length are compared without what comes after them. Metres; NaN where no episode lasts so long."""
    own = {scene_of(runs, row): row for row in rows_of(runs, BASELINE.name)}
    columns, found = list(layout.state_position), []
    for row in rows_of(runs, arm):
        # the state after a step is what the step did
        paths = [runs.states[i][start + 1 : stop + 1, columns] for i in (row, own[scene_of(runs, row)])]
        n = min(len(path) for path in paths)
        if n:
            found.append(float(np.linalg.norm(paths[0][:n] - paths[1][:n], axis=1).mean()))
    return float(np.mean(found)) if found else float("nan")


def _endpoints(runs: Runs, other: Recorded, layout: Any, normalize: Any) -> dict[str, float]:
    """Mean endpoint_share of every arm: 0 where the episode ends by itself, 1 where its donor ended."""
    source, offset = other.runs, len(runs.episodes)
    both = join(runs, Runs(source.episodes.assign(arm="source"), source.states, source.actions, source.chunks))
    seeds = {int(seed): row for row, seed in enumerate(source.episodes["seed"])}
    own = {scene_of(runs, row): row for row in rows_of(runs, BASELINE.name)}
    triples = [(row, offset + seeds[scene_of(runs, row).seed], own[scene_of(runs, row)]) for row in range(offset)]
    shares: dict[str, list[float]] = {}
    for row in records(override(both, triples, layout, normalize)):
        shares.setdefault(row["arm"], []).append(row["endpoint_share"])
    return {arm: float(np.nanmean(each)) for arm, each in shares.items()}


def _donors_goal(settings: Settings, runs: Runs, other: Recorded) -> Mapping[str, float]:
    """Share of every arm's episodes at whose end the donor's goal is done; nothing where places are not recorded."""
    goals = {
        int(seed): task for seed, task in zip(other.runs.episodes["seed"], other.runs.episodes["task"], strict=True)
    }
    found: dict[str, list[bool]] = {}
    for row in records(runs.episodes):
        poses = row["final_poses"]
        if poses is None or not any(name.startswith("pads/") for name, _ in poses):
            return {}
        found.setdefault(row["arm"], []).append(goals[row["seed"]] in placed_goals(poses))
    return {arm: float(np.mean(each)) for arm, each in found.items()}


def _verdicts(context: Context, settings: Settings, runs: Runs, other: Recorded, table: pd.DataFrame) -> list[Verdict]:
    why = gate(runs, settings.gate) or gate(other.runs, settings.gate)
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    rows = records(table)
    return [_early_windows(context, rows), _early_switches(context, rows), _floors(context, rows)]


def _early_windows(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit = threshold(context, "early-windows")
    moved = [row for row in rows if row["kind"] == INJECTED]
    said = ", ".join(f"steps {row['start']} to {row['stop'] - 1}: {row['displacement']:.3f} m "
                     f"(floor {row['no_op_floor']:.1e}), success {row['success']:.0%}" for row in moved)  # fmt: skip
    ratios = {name: moved[0][name] / moved[-1][name] if moved[-1][name] else float("inf")
              for name in ("displacement", "within")}  # fmt: skip
    return Verdict(
        "early-windows",
        ratios["displacement"] >= limit,
        f"{said}; first ÷ last {ratios['displacement']:.2f}, within the windows themselves {ratios['within']:.2f}",
    )


def _early_switches(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit = threshold(context, "early-switches")
    changed = [row for row in rows if row["kind"] == SWITCH]
    said = "; ".join(
        f"at {row['start']}: second {row['donors_goal']:.0%}, first {row['success']:.0%}" for row in changed
    )
    if any(row["donors_goal"] != row["donors_goal"] for row in changed):
        return Verdict(
            "early-switches", None, "the places of objects are not recorded: which goal is done is not known"
        )
    holds = changed[0]["donors_goal"] - changed[-1]["donors_goal"] >= limit
    return Verdict("early-switches", holds, f"goals done, of the second and the first prompt, when it changes {said}")


def _floors(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit = threshold(context, "floor")
    worst = max((row for row in rows if row["kind"] == INJECTED), key=lambda row: row["no_op_floor"])
    return Verdict(
        "floor", worst["no_op_floor"] <= limit, f"at most {worst['no_op_floor']:.1e} m (from step {worst['start']})"
    )


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    moved = [row for row in records(table) if row["kind"] == INJECTED]
    windows = pd.DataFrame([{**row, "steps": f"{row['start']} to {row['stop'] - 1}"} for row in moved])
    switched = [row for row in records(table) if row["kind"] == SWITCH]
    outcomes = []
    for row in switched:
        outcomes.append({"start": row["start"], "goal": "the first prompt's", "share": row["success"]})
        if row["donors_goal"] == row["donors_goal"]:
            outcomes.append({"start": row["start"], "goal": "the second prompt's", "share": row["donors_goal"]})
    floor = max(row["no_op_floor"] for row in moved)
    return {
        "windows": (
            curve(windows, "steps", "displacement", low="displacement_low", high="displacement_high",
                  title="Injection in a window", xlabel="environment steps of the injection",
                  ylabel="displacement, m", floor=floor, floor_label="own values injected"),
            "Mean distance of the end effector from the same episode without injection, by the window in which another "
            "task's values are injected; band: 95 % by tasks.",
        ),
        "switches": (
            curve(pd.DataFrame(outcomes), "start", "share", "goal", title="A prompt that changes",
                  xlabel="environment step of the change", ylabel="share of episodes"),
            "Which goal is done, by the step at which the prompt becomes another task's. Success of the first ends an "
            "episode.",
        ),
    }  # fmt: skip


def _notes(settings: Settings) -> list[str]:
    return [
        f"The donor has another task, the same start and the same noise; {settings.injected} is injected whole, which "
        "replays the donor's actions within the window. Outside of it, and after the donor's last step, nothing is.",
        "An early window leaves more steps to differ in: displacement is over the common steps of the whole episode, "
        "and an episode that recovers has a small one. within: over the window's own steps, as many for every window.",
        f"Windows of {settings.steps // settings.windows} and switches up to {settings.switches[-1]} environment steps "
        "suit episodes of about 40 steps; published switches are at 20, 50, 100 and 200 of a few hundred.",
        "Settings count environment steps; published code counts forward calls, of which a flow-matching expert makes "
        "one for every denoise step.",
    ]
