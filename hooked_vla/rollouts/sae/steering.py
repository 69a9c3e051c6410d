"""Features edited while the policy acts: how many must go until it fails, how much of one moves it, and when.

Every arm has the scenes and noise of the unedited policy, and controls stand beside it: as many features drawn from
all that are alive, random directions at equal strength, and a sham that runs the edit at strength 0.

>>> arms = titration_arms(sae, ranked, alive, counts=(1, 4, 16), seed=0)
>>> arms = dose_arms(site, sae.direction(12), rhos=(-1, -0.5, 0.5, 1), seed=0)
>>> found = steer(model, "goal", arms, episodes=36, seed=0, out="steered")
>>> found.table, dose_response(found, axis=2)

FOLDER/rollouts/    the episodes of all arms, see records.py
FOLDER/steered.csv  one row an arm: see `Steered`
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.folders import write_file
from hooked_vla.hooks.model import HookRequest
from hooked_vla.hooks.point import HookFunction, HookPoint
from hooked_vla.interventions import AddRelative, EditArm, ProjectOut, SAEFeatureEdit
from hooked_vla.rollouts.arms import BASELINE, only_rows
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.experiments.compare import Runs, action_normalizer, compare, layout_of, read_runs
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.runner import Watcher
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.sweep import DEFAULTS, run_rollouts
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd
    from scipy.stats import spearmanr

RANKED, RANDOM, SHAM, OWN = "ranked", "random", "sham", "feature"
ROLLOUTS, TABLE = "rollouts", "steered.csv"


def titration_arms(
    sae: SparseAutoencoder, ranked: Sequence[int], alive: Collection[int], counts: Sequence[int], seed: int,
    drop_negative: bool = False, **where: Any,
) -> list[EditArm]:  # fmt: skip
    """The first n of some ranked features set to 0, for every n of counts, each beside n random ones.

    ranked: best first. alive: what random ones are drawn from; the ranked ones that are ablated are left out, and those
    drawn for a smaller n are among those for a larger one. drop_negative: see `SparseAutoencoder.splice`. where:
    tokens, denoise, env of the edits.
    Raises ValueError for counts that are not positive or more than there are features of either kind.
    """
    largest = max(counts, default=0)
    others = np.array(sorted(set(alive) - set(ranked[:largest])), np.int64)
    if not counts or min(counts) < 1 or largest > min(len(ranked), len(others)):
        raise ValueError(
            f"counts must be in 1..{min(len(ranked), len(others))}, of {len(ranked)} ranked features and {len(others)} "
            f"others that are alive, got {list(counts)}"
        )
    drawn = np.random.default_rng(seed).permutation(others).tolist()
    spliced, arms = sae.splice(drop_negative), []
    for n in sorted(set(counts)):
        for name, features in ((RANKED, list(ranked[:n])), (RANDOM, drawn[:n])):
            edit = SAEFeatureEdit(sae.config.site, spliced, features, scale=0.0, **where)
            arms.append(EditArm(f"{name} {n}", [edit]))
    return arms


def dose_arms(
    site: str, direction: Float[Tensor, " d"], rhos: Sequence[float], seed: int, n_random: int = 1,
    project_out: bool = True, **where: Any,
) -> list[EditArm]:  # fmt: skip
    """ρ·|x| of a direction added to every token x, for every ρ; with the same of random directions, and a sham.

    direction: such as a feature's decoder row; only its direction counts. project_out: also take the direction out of
    every token. where: tokens, denoise, env of the edits.
    Raises ValueError for no ρ, one that is 0 or comes twice, and a direction of zeros.
    """
    if not rhos or 0 in rhos or len(set(rhos)) < len(rhos):
        raise ValueError(f"rhos must be different numbers other than 0, which is the sham, got {list(rhos)}")
    generator = torch.Generator().manual_seed(seed)
    own = direction.detach().float().cpu()
    directions = {OWN: own}
    directions |= {f"{RANDOM} {i}": torch.randn(len(own), generator=generator) for i in range(n_random)}
    arms = [EditArm(SHAM, [AddRelative(site, own, 0.0, **where)])]
    for name, each in directions.items():
        arms += [EditArm(f"{name} {rho:+g}", [AddRelative(site, each, rho, **where)]) for rho in sorted(rhos)]
        if project_out:
            arms.append(EditArm(f"{name} out", [ProjectOut(site, each, **where)]))
    return arms


class PhaseWatcher(Watcher):
    """Knows the simulator's phase of every episode that runs, for PhaseArm; it looks on in this process."""

    def __init__(self) -> None:
        self.now: dict[int, str | None] = {}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        # a group that was interrupted begins again
        for cell in rows:
            self.now.pop(cell.id, None)
        return ()

    def step(
        self, cell: Cell, env_step: int, before: Mapping[str, Any], action: np.ndarray, reward: float,
        info: Mapping[str, Any],
    ) -> None:  # fmt: skip
        """Keep the phase that the step led to, in which the next plan is made."""
        self.now[cell.id] = info.get("phase")


@dataclass(frozen=True, eq=False)
class PhaseArm:
    """Another arm's edits, in the plans that are made in some phases of the task. The first plan of an episode is made
    before any step told its phase, and is not edited. watcher: runs beside the rollouts."""

    name: str
    edits: EditArm
    phases: tuple[str, ...]
    watcher: PhaseWatcher

    def __post_init__(self) -> None:
        if not self.phases:
            raise ValueError(f"arm {self.name!r}: name at least one phase")

    def describe(self) -> Mapping[str, Any]:
        return {**self.edits.describe(), "kind": "edits in phases", "phases": list(self.phases)}

    def hooks(self, rows: Sequence[Cell]) -> Sequence[HookRequest]:
        return [(site, self._limited(fn, rows)) for site, fn in self.edits.hooks(rows)]

    def _limited(self, fn: HookFunction, rows: Sequence[Cell]) -> HookFunction:
        def edit(value: Tensor, hook: HookPoint) -> Tensor | None:
            chosen = torch.tensor([self.watcher.now.get(cell.id) in self.phases for cell in rows])
            return only_rows(fn, chosen)(value, hook) if bool(chosen.any()) else None

        return edit


def in_phases(arms: Sequence[EditArm], phases: Sequence[str]) -> tuple[list[PhaseArm], PhaseWatcher]:
    """The arms, each acting in some phases only, and what is to watch the rollouts."""
    watcher = PhaseWatcher()
    return [PhaseArm(arm.name, arm, tuple(phases), watcher) for arm in arms], watcher


@dataclass(frozen=True, eq=False)
class Steered:
    """What `steer` found. table: one row an arm, as experiments/compare.py has them (success with intervals, the
    difference from the unedited policy with McNemar's and Holm's p-values, displacement in metres, cosine of actions),
    with unchanged: episodes of the same states and actions as the unedited policy's, bit for bit. runs: the episodes.
    """

    table: pd.DataFrame
    runs: Runs
    suite: str

    def shift(self, arm: str, axis: int) -> Float[np.ndarray, " episode"]:
        """How far an arm moves the end effector along an axis (0, 1, 2) in each episode: mean over the steps that it
        has in common with the unedited one, metres. Raises ValueError for an arm that there is not."""
        column = layout_of(self.suite).state_position[axis]
        found = []
        for i, j in _pairs(self.runs, arm):
            mine, theirs = self.runs.states[i][:, column], self.runs.states[j][:, column]
            n = min(len(mine), len(theirs))
            found.append(float((mine[:n] - theirs[:n]).mean()))
        return np.array(found)


def steer(
    model: HookedVLA | ModelSource | str,
    suite: Suite | str,
    arms: Sequence[EditArm],
    episodes: int,
    seed: int,
    out: str | Path,
    phases: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    options: Options = DEFAULTS,
    name: str | None = None,
    progress: bool = False,
) -> Steered:
    """Run arms beside the unedited policy, and compare them with it episode by episode.

    phases: edit only in plans that are made in these, all where None. Other arguments as for `run_rollouts`. The same
    call goes on where it was interrupted.
    Raises ValueError for a suite whose states have no end effector, phases that it does not have, edits that do not fit
    the model, and what `run_rollouts` raises it for.
    """
    out, suite = Path(out), get_suite(suite) if isinstance(suite, str) else suite
    layout = layout_of(suite.name)
    if unknown := sorted(set(phases or ()) - set(suite.phases)):
        known = ", ".join(suite.phases) or "none that its simulator tells"
        raise ValueError(f"the suite {suite.name!r} has no phases {unknown}; it has: {known}")
    source = ModelSource(model) if isinstance(model, str) else model
    loaded = source.load() if isinstance(source, ModelSource) else source
    if name is None:
        name = source.name if isinstance(source, ModelSource) else loaded.spec.name
    for arm in arms:
        arm.check(loaded)
    chosen, watchers = list(arms), []
    if phases is not None:
        chosen, watcher = in_phases(arms, phases)
        watchers = [watcher]
    done = run_rollouts(
        loaded, suite, episodes, seed, tasks, [BASELINE, *chosen], out / ROLLOUTS, options, name, progress=progress,
        watchers=watchers,
    )  # fmt: skip
    runs = read_runs(done)
    table = compare(runs, layout, action_normalizer(loaded), floor=None)
    table["unchanged"] = [
        sum(_same(runs, i, j) for i, j in _pairs(runs, arm)) for arm in table["arm"]
    ]  # fmt: skip
    write_file(out / TABLE, table.to_csv(index=False).encode())
    return Steered(table, runs, suite.name)


def _pairs(runs: Runs, arm: str) -> list[tuple[int, int]]:
    """Rows of an arm's episodes and of the unedited ones of the same scenes."""
    episodes = runs.episodes
    rows = np.flatnonzero(episodes["arm"] == arm).tolist()
    if not rows:
        raise ValueError(f"no arm {arm!r}; arms: {list(dict.fromkeys(episodes['arm']))}")
    scenes = list(zip(episodes["task"].tolist(), episodes["seed"].tolist(), strict=True))
    return [(row, runs.row(BASELINE.name, *scenes[row])) for row in rows]


def _same(runs: Runs, i: int, j: int) -> bool:
    return np.array_equal(runs.states[i], runs.states[j]) and np.array_equal(runs.actions[i], runs.actions[j])


def dose_response(steered: Steered, axis: int) -> pd.DataFrame:
    """How the shift along an axis follows the dose, one row for the feature and each random direction.

    direction; spearman: rank correlation of ρ with the mean shift over episodes, the sham counting as ρ = 0; slope: of
    the line through these, metres for each ρ; largest: the largest mean shift, metres.
    Raises ValueError for results without the arms of `dose_arms`.
    """
    doses: dict[str, dict[float, float]] = {}
    sham = float(steered.shift(SHAM, axis).mean())
    for arm in steered.table["arm"].tolist():
        direction, _, dose = arm.rpartition(" ")
        if dose[:1] in ("+", "-"):
            shift = float(steered.shift(arm, axis).mean())
            doses.setdefault(direction, {0.0: sham})[float(dose)] = shift
    if not doses:
        raise ValueError(f"no arms of `dose_arms` among {steered.table['arm'].tolist()}")
    rows = []
    for direction, found in doses.items():
        rho, shift = np.array(sorted(found)), np.array([found[each] for each in sorted(found)])
        flat = float(np.ptp(shift)) == 0
        rows.append({
            "direction": direction, "spearman": np.nan if flat else float(np.asarray(spearmanr(rho, shift))[0]),
            "slope": float(np.polyfit(rho, shift, 1)[0]), "largest": float(shift[np.abs(shift).argmax()]),
        })  # fmt: skip
    return pd.DataFrame(rows)
