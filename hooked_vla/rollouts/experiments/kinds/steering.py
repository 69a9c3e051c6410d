"""Steering along a feature: how the end effector follows the dose, from which dose on it is an overwrite, and what
taking the direction out does.

Which feature, and along which axis it should move the end effector, is decided on other episodes before anything is
steered. Doses are shares ρ of each token's length. Beside the feature's direction: random ones at equal ρ, the sham,
which runs the edit at ρ = 0, and a mere rerun. Some doses also act in single phases of the task only.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.interventions import EditArm
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import Runs, layout_of, mean_with_interval, read_runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import decide, interval_of, undecided
from hooked_vla.rollouts.experiments.kinds.autoencoders import (
    OWN,
    SAESettings,
    activations,
    autoencoders,
    origin_notes,
    sae_sites,
)
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    compare_suites,
    gate_note,
    limited,
    records,
    run_suite,
    threshold,
)
from hooked_vla.rollouts.experiments.kinds.steering_features import AXES, Choice, chosen, rank_features
from hooked_vla.rollouts.experiments.kinds.steering_figures import steering_figures
from hooked_vla.rollouts.experiments.kinds.steering_told import told_apart
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.sae.steering import OWN as FEATURE
from hooked_vla.rollouts.sae.steering import RANDOM, SHAM, PhaseArm, PhaseWatcher, Steered, dose_arms, dose_response
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.store import TokenStore

with needs_analysis_extra():
    import pandas as pd

OUT = "out"
_MONOTONE, _BEYOND, _OVERWRITE, _SHAM = "monotone", "beyond-random", "overwrite", "sham"
_N_RANKED = 8


@dataclass(frozen=True, kw_only=True)
class Settings(SAESettings):
    """episodes: of each arm. rhos: the doses. small: the largest that counts as small. n_random: random directions at
    the same doses. phases: in each of which `phase_rho` acts by itself, both ways. scenes: whose first chunks are told
    every task. choice_episodes: on which the feature is chosen, where its autoencoder comes with the package (else on
    those of training). densities: least and largest share of tokens in which it is active. max_steps: after which an
    episode has failed."""

    episodes: int
    rhos: tuple[float, ...]
    small: float = 0.5
    n_random: int = 2
    phases: tuple[str, ...] = ()
    phase_rho: float = 0.5
    scenes: int = 12
    choice_episodes: int = 48
    densities: tuple[float, float] = (0.01, 0.6)
    max_steps: int = 96

    def __post_init__(self) -> None:
        """Raises ValueError without small doses to both sides, and without one beyond 1."""
        super().__post_init__()
        small = [rho for rho in self.rhos if 0 < abs(rho) <= self.small]
        if not (any(rho < 0 for rho in small) and any(rho > 0 for rho in small)):
            raise ValueError(f"rhos need doses to both sides of 0 within {self.small:g}, got {list(self.rhos)}")
        if not any(abs(rho) > 1 for rho in self.rhos):
            raise ValueError(f"rhos need a dose beyond 1, got {list(self.rhos)}")
        if self.phases and not {self.phase_rho, -self.phase_rho} <= set(self.rhos):
            raise ValueError(
                f"phase_rho must be among rhos, both ways: ±{self.phase_rho:g} is not in {list(self.rhos)}"
            )

    @property
    def small_rhos(self) -> list[float]:
        """The small doses, ascending, with 0."""
        return sorted([0.0, *(rho for rho in self.rhos if abs(rho) <= self.small)])


@dataclass(frozen=True, eq=False)
class Steering:
    """One site's feature and its arms, whose names begin with the site."""

    choice: Choice
    arms: Sequence[EditArm]

    def name(self, arm: str) -> str:
        return f"{self.choice.site}: {arm}"


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a suite whose states do not tell the end effector's place, and where no feature goes with a
    motion; else as `autoencoders`."""
    sites, options = sae_sites(context, settings), limited(context, settings.max_steps)
    saes, trained = autoencoders(context, sites, settings)
    features, parts = _parts(context, settings, saes, trained)
    arms = [arm for part in parts for arm in part.arms]
    runs = run_suite(context, settings.suite, arms, settings.episodes, options)
    steered = {part.choice.site: _steered(runs, part, settings.suite) for part in parts}
    table = _table(context, settings, runs, parts)
    told = context.table("instructions", lambda: told_apart(context, settings.suite, arms, settings.scenes))
    doses = pd.concat([_doses(part, steered[part.choice.site]) for part in parts], ignore_index=True)
    slopes = pd.DataFrame([row for part in parts for row in _slopes(context, settings, runs, part)])
    tables = {"features": features, "slopes": slopes, "doses": doses, "instructions": told}
    if settings.phases:
        tables["phases"] = _phases(context, settings, parts)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, table, slopes, told, parts),
        tables={**tables, "autoencoders": trained},
        figures=steering_figures(table, told, tables.get("phases"), [part.choice for part in parts]),
        notes=[*origin_notes(trained, settings), *_notes(settings, parts)],
    )  # fmt: skip


def _parts(
    context: Context, settings: Settings, saes: Sequence[SparseAutoencoder], trained: pd.DataFrame
) -> tuple[pd.DataFrame, list[Steering]]:
    """The best features of every site, and the arms of the first one. trained: the autoencoders' table."""
    layout = layout_of(settings.suite)

    def rank() -> pd.DataFrame:
        store = _store(context, settings, trained)
        found = [rank_features(store, sae, layout, settings.densities, _N_RANKED) for sae in saes]
        return pd.concat(found, ignore_index=True)

    features = context.table("features", rank)
    parts = []
    for number, sae in enumerate(saes):
        choice = chosen(next(row for row in records(features) if row["site"] == sae.config.site))
        arms = dose_arms(
            choice.site, choice.direction(sae), settings.rhos, context.seed + number, settings.n_random
        )  # fmt: skip
        parts.append(Steering(choice, [replace(arm, name=f"{choice.site}: {arm.name}") for arm in arms]))
    return features, parts


def _store(context: Context, settings: Settings, trained: pd.DataFrame) -> TokenStore:
    """Activations to choose by: those of training where there are any of all sites."""
    sites = trained["site"].tolist()
    if set(trained["origin"]) == {OWN}:
        return activations(context, sites, settings, settings.train_episodes)
    return activations(context, sites, settings, settings.choice_episodes, "choice")


def _steered(runs: Runs, part: Steering, suite: str) -> Steered:
    """The part's arms under their own names, as steering.py has them."""
    prefix = part.name("")
    rows = [i for i, arm in enumerate(runs.episodes["arm"]) if arm == BASELINE.name or arm.startswith(prefix)]
    episodes = runs.episodes.iloc[rows].reset_index(drop=True)
    episodes["arm"] = [arm.removeprefix(prefix) for arm in episodes["arm"]]
    kept = Runs(
        episodes, *([each[i] for i in rows] for each in (runs.states, runs.actions, runs.chunks))
    )  # fmt: skip
    return Steered(pd.DataFrame({"arm": list(dict.fromkeys(episodes["arm"]))}), kept, suite)


def _doses(part: Steering, steered: Steered) -> pd.DataFrame:
    """`dose_response` along the feature's axis."""
    about = {"site": part.choice.site, "axis": AXES[part.choice.axis]}
    return pd.DataFrame([about | row for row in records(dose_response(steered, part.choice.axis))])


def shifts(runs: Runs, arm: str, suite: str) -> tuple[np.ndarray, np.ndarray, int, list[str]]:
    """What an arm does to the end effector in each episode, paired with the baseline's: mean shift over the common
    steps [episode 3] and distance of the last places, metres; how many episodes are the same to the last bit; tasks."""
    columns = list(layout_of(suite).state_position)
    moved, ends, tasks, same = [], [], [], 0
    names = ("task", "seed")
    for row in np.flatnonzero(runs.episodes["arm"] == arm).tolist():
        task, seed = (runs.episodes[name].iloc[row] for name in names)
        base = runs.row(BASELINE.name, str(task), int(seed))
        mine, theirs = runs.states[row][:, columns], runs.states[base][:, columns]
        n = min(len(mine), len(theirs))
        moved.append((mine[:n] - theirs[:n]).mean(0))
        ends.append(float(np.linalg.norm(mine[-1] - theirs[-1])))
        tasks.append(str(task))
        equal = (np.array_equal(each[row], each[base]) for each in (runs.states, runs.actions))
        same += all(equal)
    return np.array(moved, np.float64), np.array(ends), same, tasks


def _about(parts: Sequence[Steering], arm: str) -> tuple[Steering | None, str, float]:
    """An arm's part, its direction ("sham", "feature", "random 0"), and its dose; NaN where the direction is taken
    out."""
    for part in parts:
        if arm.startswith(part.name("")):
            name = arm.removeprefix(part.name(""))
            if name == SHAM:
                return part, SHAM, 0.0
            direction, _, dose = name.rpartition(" ")
            return part, direction, float("nan") if dose == OUT else float(dose)
    return None, arm, float("nan")


def _table(context: Context, settings: Settings, runs: Runs, parts: Sequence[Steering]) -> pd.DataFrame:
    """The standard comparison; before it, what each arm is, and what it does to the end effector. shift: along the
    feature's axis; endpoint: distance of the last places; metres."""
    rows = []
    for row in records(compare_suites(context, [runs])):
        part, direction, rho = _about(parts, row["arm"])
        moved, ends, same, tasks = shifts(runs, row["arm"], settings.suite)
        axis = 0 if part is None else part.choice.axis
        mean, low, high = mean_with_interval(moved[:, axis], tasks, context.seed)
        if part is None:
            mean = low = high = float("nan")
        rows.append({
            "site": "" if part is None else part.choice.site, "direction": direction, "rho": rho,
            "taken_out": row["arm"].endswith(f" {OUT}"), "axis": "" if part is None else AXES[axis],
            "shift": mean, "shift_low": low, "shift_high": high,
            **{f"shift_{name}": float(moved[:, i].mean()) for i, name in enumerate(AXES)},
            "endpoint": float(ends.mean()), "unchanged": same, **row,
        })  # fmt: skip
    return pd.DataFrame(rows)


def _scene_slopes(settings: Settings, runs: Runs, part: Steering, direction: str) -> tuple[np.ndarray, list[str]]:
    """Each scene's slope of shift over small doses, metres for each ρ, and its task."""
    rhos, columns, tasks = settings.small_rhos, [], list[str]()
    for rho in rhos:
        name = SHAM if rho == 0 else f"{direction} {rho:+g}"
        moved, _, _, tasks = shifts(runs, part.name(name), settings.suite)
        columns.append(moved[:, part.choice.axis])
    x = np.array(rhos) - np.mean(rhos)
    return (np.stack(columns, 1) @ x) / (x @ x), tasks


def _slopes(context: Context, settings: Settings, runs: Runs, part: Steering) -> list[dict[str, Any]]:
    """Slope of the shift along the feature's axis over small doses, with its interval by tasks, for each direction;
    rank: correlation of the ranks of dose and mean shift. Last, by how much the feature's is steeper, whatever its
    sign, than random ones on the mean."""
    names = [FEATURE, *(f"{RANDOM} {i}" for i in range(settings.n_random))]
    steered = _steered(runs, part, settings.suite)
    each, tasks = [], list[str]()
    rows: list[dict[str, Any]] = []
    for name in names:
        slopes, tasks = _scene_slopes(settings, runs, part, name)
        each.append(slopes)
        mean, low, high = interval_of(slopes, tasks, seed=context.seed)
        rows.append({"site": part.choice.site, "direction": name, "axis": AXES[part.choice.axis], "slope": mean,
                     "low": low, "high": high, "rank": _rank(settings, steered, part, name)})  # fmt: skip
    if settings.n_random:
        mean, low, high = interval_of(np.stack(each, 1), tasks, _steeper, context.seed)
        rows.append({"site": part.choice.site, "direction": _BEYOND, "axis": AXES[part.choice.axis], "slope": mean,
                     "low": low, "high": high, "rank": np.nan})  # fmt: skip
    return rows


def _steeper(means: np.ndarray) -> np.ndarray:
    size = np.abs(means)
    return size[:, 0] - size[:, 1:].mean(1)


def _rank(settings: Settings, steered: Steered, part: Steering, direction: str) -> float:
    """Of the small doses alone."""
    names = [SHAM, *(f"{direction} {rho:+g}" for rho in settings.small_rhos if rho)]
    [row] = records(dose_response(replace(steered, table=pd.DataFrame({"arm": names})), part.choice.axis))
    return float(row["spearman"])


def _phases(context: Context, settings: Settings, parts: Sequence[Steering]) -> pd.DataFrame:
    """The standard comparison of arms that act in one phase each; shift as in the main table."""
    watcher, arms, about = PhaseWatcher(), list[PhaseArm](), dict[str, tuple[Steering, str, float]]()
    for part in parts:
        for rho in (-settings.phase_rho, settings.phase_rho):
            whole = next(arm for arm in part.arms if arm.name == part.name(f"{FEATURE} {rho:+g}"))
            for phase in settings.phases:
                name = f"{whole.name} in {phase}"
                arms.append(PhaseArm(name, whole, (phase,), watcher))
                about[name] = part, phase, rho
    options = limited(context, settings.max_steps)
    done = context.rollouts(
        "phases", settings.suite, [BASELINE, *arms], settings.episodes, watchers=[watcher], options=options
    )  # fmt: skip
    runs, rows = read_runs(done), []
    for name, (part, phase, rho) in about.items():
        moved, ends, same, tasks = shifts(runs, name, settings.suite)
        mean, low, high = mean_with_interval(moved[:, part.choice.axis], tasks, context.seed)
        won = [bool(each) for each in runs.episodes["success"][runs.episodes["arm"] == name]]
        rows.append({"site": part.choice.site, "phase": phase, "rho": rho, "axis": AXES[part.choice.axis],
                     "n": len(won), "success": sum(won) / len(won), "shift": mean, "shift_low": low,
                     "shift_high": high, "endpoint": float(ends.mean()), "unchanged": same})  # fmt: skip
    return pd.DataFrame(rows)


def _verdicts(
    context: Context, settings: Settings, table: pd.DataFrame, slopes: pd.DataFrame, told: pd.DataFrame,
    parts: Sequence[Steering],
) -> list[Verdict]:  # fmt: skip
    rows = records(table)
    sham = [row for row in rows if row["direction"] == SHAM]
    exact = all(row["unchanged"] == row["n"] for row in sham)
    said = "; ".join(
        f"{row['site']}: {row['unchanged']} of {row['n']} episodes unchanged, to the last bit" for row in sham
    )
    found = [Verdict(_SHAM, exact, said), _overwrite(context, told, parts)]
    if why := gate_note(table, settings.suite):
        return [*found, *(Verdict(rule, None, why) for rule in (_MONOTONE, _BEYOND))]
    return [*found, _monotone(context, slopes), _beyond(context, slopes)]


def _slope(row: Mapping[str, Any]) -> str:
    return f"{100 * row['slope']:+.2f} cm ({100 * row['low']:+.2f} to {100 * row['high']:+.2f})"


def _monotone(context: Context, slopes: pd.DataFrame) -> Verdict:
    limit, held, said = threshold(context, _MONOTONE), [], []
    for row in records(slopes):
        if row["direction"] == FEATURE:
            away = row["low"] > 0 or row["high"] < 0
            ordered = abs(row["rank"]) >= limit
            held.append(False if not ordered else True if away else None)
            said.append(f"{row['site']}: {_slope(row)} along {row['axis']} for each ρ, rank correlation "
                        f"{row['rank']:.2f}")  # fmt: skip
    return Verdict(_MONOTONE, _all(held), "; ".join(said) + undecided(_all(held)))


def _beyond(context: Context, slopes: pd.DataFrame) -> Verdict:
    limit, rows = threshold(context, _BEYOND), records(slopes)
    apart = [row for row in rows if row["direction"] == _BEYOND]
    held = [decide(-row["high"], -row["low"], -limit, below=True) for row in apart]
    said = [f"{row['site']}: {_slope(row)} more for each ρ" for row in apart]
    return Verdict(_BEYOND, _all(held), "; ".join(said) + undecided(_all(held)) if said else "no random directions")


def _overwrite(context: Context, told: pd.DataFrame, parts: Sequence[Steering]) -> Verdict:
    limit, held, said = threshold(context, _OVERWRITE), [], []
    for row in records(told):
        part, direction, rho = _about(parts, row["arm"])
        # NaN where the direction is taken out
        if part is None or direction != FEATURE or not abs(rho) > 1:
            continue
        held.append(decide(row["low"], row["high"], limit, below=True))
        said.append(f"{row['arm']}: {row['apart']:.0%} ({row['low']:.0%} to {row['high']:.0%})")
    return Verdict(_OVERWRITE, _all(held), f"left of it: {'; '.join(said)}{undecided(_all(held))}")


def _all(held: Sequence[bool | None]) -> bool | None:
    return False if False in held else None if None in held or not held else True


def _notes(settings: Settings, parts: Sequence[Steering]) -> list[str]:
    signs = [f"{part.choice.site}: feature {part.choice.feature}, along {AXES[part.choice.axis]}" for part in parts]
    return [
        f"Chosen before any steering, on other episodes: {'; '.join(signs)}. Positive doses are those with which the "
        "end effector should go up the axis; a correlation need not be a cause, and the sign is a finding.",
        "A dose is added to every token at every call, in lengths of the token. Random directions are drawn from a "
        "normal distribution, and lie less in what tokens vary along than a decoder's row does.",
        f"{OUT}: the direction is taken out of every token. Phases are those in which a plan is made; the first plan "
        "of an episode is made before its phase is known, and is never edited there.",
    ]
