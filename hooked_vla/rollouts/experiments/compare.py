"""The standard comparison: every arm against the baseline of the same episodes, beside the floor of a mere rerun.

>>> main = read_runs(context.rollouts("main", "goal", [BASELINE, *arms], 36))
>>> again = read_runs(rerun(context, "rerun", "goal", 36), {"baseline": RERUN})
>>> table = compare(join(main, again), layout_of("goal"), action_normalizer(context.model))
>>> by_task(main)                                        # success of every task under every arm
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import ArrayLike
from torch import Tensor

from hooked_vla import lerobot
from hooked_vla.analysis.metrics import (
    AMBIGUOUS,
    DESTINATION,
    SOURCE,
    ActionLayout,
    action_cosine,
    common_steps,
    displacement,
    endpoint_share,
    follows_source,
    target_distance,
    three_way,
)
from hooked_vla.analysis.statistics import cluster_bootstrap, holm, mcnemar, wilson_interval
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import change_interval
from hooked_vla.rollouts.records import read_steps
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.sweep import Rollouts
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

RERUN = "rerun"
# a cell whose baseline succeeds less often says little about what an arm breaks
GATE = 0.9
# two runs of one arm may differ by twice what two runs of the baseline do
_FLOORS = 2.0
_ALPHA = 0.05
_TABLETOP = ("goal", "object", "spatial", "shift", "style")

FLAGS = ("zero_effect_1pp", "zero_effect_10pp", "zero_effect", "floor_effect")
COLUMNS = (
    "suite", "arm", "n", "n_tasks", "success", "success_low", "success_high", "baseline_success", "difference",
    "difference_low", "difference_high", "mcnemar_p", "holm_p", "displacement", "displacement_low", "displacement_high",
    "floor", "cosine", "first_cosine", *FLAGS,
)  # fmt: skip

Normalize = Callable[[Float[np.ndarray, "step d_action"]], Float[Tensor, "step d_action"]]


@dataclass(frozen=True)
class Runs:
    """Episodes and their steps, from one sweep or several.

    episodes: one row each, as records.EPISODES has them; the other entries are one for each of them. states:
    [n_steps + 1, d_state], those in which actions were chosen, and the last. actions: [n_steps, d_action], in the
    robot's units. chunks: [n_steps], number of the chunk that each action came from.
    """

    episodes: pd.DataFrame
    states: Sequence[np.ndarray]
    actions: Sequence[np.ndarray]
    chunks: Sequence[np.ndarray]

    def __post_init__(self) -> None:
        if not len(self.episodes) == len(self.states) == len(self.actions) == len(self.chunks):
            raise ValueError(f"{len(self.episodes)} episodes, but the steps of {len(self.states)}")

    def row(self, arm: str, task: str, seed: int) -> int:
        """Row of the only episode of an arm, task and seed. Raises KeyError where there is none, or more than one."""
        table = self.episodes
        found = np.flatnonzero((table["arm"] == arm) & (table["task"] == task) & (table["seed"] == seed))
        if len(found) != 1:
            raise KeyError(f"{len(found)} episodes of arm {arm!r}, task {task!r}, seed {seed}; one was expected")
        return int(found[0])


def read_runs(rollouts: Rollouts, rename: Mapping[str, str] | None = None) -> Runs:
    """What a sweep recorded. rename: arms that get another name, such as {"baseline": "rerun"}.

    Raises ValueError for a sweep that kept nothing, or a name of no arm.
    """
    if rollouts.folder is None:
        raise ValueError("these rollouts were not kept: run them with a folder")
    episodes = rollouts.episodes.to_pandas()
    names = dict(rename or {})
    if unknown := sorted(set(names) - set(episodes["arm"])):
        raise ValueError(f"no arms {unknown} to rename; arms: {sorted(set(episodes['arm']))}")
    episodes["arm"] = episodes["arm"].map(lambda arm: names.get(arm, arm))
    table = read_steps(rollouts.folder).select(["episode", "chunk", "state", "action"])
    steps = {name: table[name].to_numpy() for name in table.column_names}
    bounds = np.flatnonzero(np.diff(steps["episode"])) + 1
    states, actions, chunks = (np.split(_stack(steps[name]), bounds) for name in ("state", "action", "chunk"))
    last = [np.asarray(state)[None] for state in episodes["final_state"]]
    return Runs(
        episodes, [np.concatenate(pair) for pair in zip(states, last, strict=True)], list(actions), list(chunks)
    )


def join(*runs: Runs) -> Runs:
    """Several sweeps as one. Raises ValueError where two of them have an episode of one scene under one arm."""
    episodes = pd.concat([each.episodes for each in runs], ignore_index=True)
    twice = episodes.duplicated(["suite", "arm", "task", "seed"])
    if twice.any():
        first = episodes[twice].iloc[0]
        raise ValueError(
            f"arm {first['arm']!r} has the task {first['task']!r} from seed {first['seed']} twice in the suite "
            f"{first['suite']!r}: rename an arm when reading"
        )
    lists = ([item for each in runs for item in getattr(each, name)] for name in ("states", "actions", "chunks"))
    return Runs(episodes, *lists)


def rerun(
    context: Context,
    label: str,
    suite: str,
    episodes: int,
    tasks: Sequence[str] | None = None,
    options: Options | None = None,
    seed: int | None = None,
) -> Rollouts:
    """The baseline once more, from the same starts and noise, one episode at a time (two, where it ran one at a time).

    Nothing else differs, so what comes out otherwise is rounding and its growth in closed loop: the floor under every
    difference. In batches of several rows, whatever their number, it would be the same bits.
    """
    options = context.options if options is None else options
    other = replace(options, n_envs=2 if options.n_envs == 1 else 1)
    return context.rollouts(label, suite, (BASELINE,), episodes, tasks, seed=seed, options=other)


def layout_of(suite: str) -> ActionLayout:
    """What the channels of a suite's actions and states are.

    Raises ValueError for suites whose actions are not moves of an end effector that the state has.
    """
    if suite in _TABLETOP:
        # 0.03: tabletop/expert.py, ACTION_SCALE
        return ActionLayout(4, (0, 1, 2), (3,), 0.03, 1.0, (0, 1, 2))
    if suite.startswith("libero_"):
        # robosuite 1.4.0, controllers/config/osc_pose.json: output_max
        return ActionLayout(7, (0, 1, 2), (6,), 0.05, 1.0, (0, 1, 2))
    if suite == "metaworld":
        # metaworld 3.1.1, sawyer_xyz_env.py: action_scale
        return ActionLayout(4, (0, 1, 2), (3,), 0.01, 1.0, (0, 1, 2))
    raise ValueError(f"actions of the suite {suite!r} are not moves of an end effector whose place its state tells")


def action_normalizer(model: HookedVLA) -> Normalize:
    """Actions in the robot's units -> as the network makes them."""
    normalizer = model.processor.normalizer
    return lambda actions: normalizer(lerobot.ACTION, torch.as_tensor(np.asarray(actions), dtype=torch.float32))


def compare(
    runs: Runs,
    layout: ActionLayout,
    normalize: Normalize,
    baseline: str = BASELINE.name,
    floor: str | None = RERUN,
    gate: float = GATE,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for every suite and arm, compared with the baseline's episodes of the same starts and noise.

    n, n_tasks; success with Wilson's 95 % interval (success_low, success_high); baseline_success, of the same episodes;
    difference of the two with its interval (difference_low, difference_high) by a bootstrap of whole tasks, widened
    where all tasks changed alike (`change_interval`; NaN where there is one task); mcnemar_p, exact, and holm_p,
    adjusted for all tests of the table.
    displacement: mean distance of the end effector from that of the paired baseline episode, metres, over their common
    steps, with displacement_low and displacement_high by tasks; floor: the same of the arm named `floor`, which must be
    a mere rerun (None: there is none, and floor is NaN). cosine: of normalised actions over the common steps;
    first_cosine: over the first chunk, which all arms plan from the same state.
    zero_effect_1pp, zero_effect_10pp: the difference is below 1 or 10 percentage points, as the published scripts have
    it. zero_effect, ours: McNemar's test is not significant at .05 (before Holm's correction, which would call more
    effects zero) and displacement is at most twice the floor. floor_effect: the baseline succeeds less often than
    `gate`, so the row cannot show what an arm breaks.
    Flags are missing (NA) in rows of the baseline itself, and where what they need was not measured.
    Raises ValueError for an arm with an episode that the baseline lacks, or no episodes of baseline or floor.
    """
    partners = _partners(runs, baseline)
    rows: list[dict[str, Any]] = []
    for (suite, arm), mine in _groups(runs.episodes, "suite", "arm").items():
        theirs = [partners[i] for i in mine]
        rows.append(
            {
                "suite": suite,
                "arm": arm,
                **_success(runs, mine, theirs, tested=arm not in (baseline, floor), seed=seed),
                **_movement(runs, mine, theirs, layout, normalize, seed),
            }
        )
    for row, adjusted in zip(rows, holm([row["mcnemar_p"] for row in rows]), strict=True):
        row["holm_p"] = adjusted
    floors = {row["suite"]: row["displacement"] for row in rows if row["arm"] == floor}
    if floor is not None and (lacking := sorted({row["suite"] for row in rows} - set(floors))):
        raise ValueError(f"no episodes of the arm {floor!r} in the suites {lacking}: run it, or say floor=None")
    for row in rows:
        row["floor"] = floors.get(row["suite"], np.nan)
        row |= _flags(row, row["arm"] == baseline, gate)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict.fromkeys(FLAGS, "boolean"))


def by_task(runs: Runs) -> pd.DataFrame:
    """One row for every suite, arm and task: n, success, and Wilson's 95 % interval (success_low, success_high)."""
    won, rows = runs.episodes["success"].to_numpy(bool), []
    for (suite, arm, task), mine in _groups(runs.episodes, "suite", "arm", "task").items():
        wins, n = int(won[mine].sum()), len(mine)
        low, high = wilson_interval(wins, n)
        rows.append({"suite": suite, "arm": arm, "task": task, "n": n, "success": wins / n,
                     "success_low": low, "success_high": high})  # fmt: skip
    return pd.DataFrame(rows)


def mean_with_interval(values: ArrayLike, clusters: Sequence[Any], seed: int = 0) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by a bootstrap of whole clusters (tasks). NaN without values, NaN ends where there
    is one cluster only."""
    numbers = np.asarray(values, np.float64)
    if not len(numbers):
        return float("nan"), float("nan"), float("nan")
    if len(set(clusters)) < 2:
        return float(numbers.mean()), float("nan"), float("nan")
    found = cluster_bootstrap(numbers, list(clusters), seed=seed)
    return found.estimate, found.low, found.high


def override(
    runs: Runs, triples: Sequence[tuple[int, int, int]], layout: ActionLayout, normalize: Normalize
) -> pd.DataFrame:
    """Whether injected episodes do as their source did, or as they would have done: one row for every triple.

    triples: rows of `runs`: the injected episode, the source's own, and the destination's without injection.
    to_source, to_destination: how far, in metres, the end effector ends from where it ended in each; endpoint_share: 0
    at the destination's end, 1 at the source's (the headline). cos_src, cos_dst: per-step cosine of normalised actions
    with each, over the common steps; cos_src_dst: between the two themselves, which says what the others are worth.
    ends_at_source: nearer to the source's end. follows_source: cos_src > cos_dst, the lenient published definition.
    three_way: "source", "destination" or "ambiguous", the strict one with its margin of .05.
    """
    table = runs.episodes
    rows = []
    for here, source, there in triples:
        acts = [normalize(runs.actions[i]) for i in (here, source, there)]
        ends = [torch.as_tensor(runs.states[i][-1, list(layout.state_position)]) for i in (here, source, there)]
        cos_src, cos_dst = (torch.tensor([cosine(acts[0], acts[i], layout)]) for i in (1, 2))
        share = float(endpoint_share(ends[0], ends[1], ends[2]))
        rows.append(
            {
                **{name: table[name].iloc[here] for name in ("suite", "arm", "task", "seed", "success")},
                "source_task": table["task"].iloc[source],
                "source_seed": table["seed"].iloc[source],
                "to_source": float(target_distance(ends[0], ends[1])),
                "to_destination": float(target_distance(ends[0], ends[2])),
                "endpoint_share": share,
                "cos_src": float(cos_src),
                "cos_dst": float(cos_dst),
                "cos_src_dst": cosine(acts[1], acts[2], layout),
                "ends_at_source": share > 0.5,
                "follows_source": bool(follows_source(cos_src, cos_dst)),
                "three_way": three_way(cos_src, cos_dst)[0],
            }
        )
    return pd.DataFrame(rows)


def summarise_override(table: pd.DataFrame) -> pd.DataFrame:
    """`override`'s rows by suite and arm: shares of episodes by each definition, with Wilson's 95 % intervals for the
    endpoint's and the strict one, and means of distances (metres) and cosines."""
    rows = []
    for (suite, arm), mine in _groups(table, "suite", "arm").items():
        part, n = table.iloc[mine], len(mine)
        strict = part["three_way"].value_counts()
        row: dict[str, Any] = {"suite": suite, "arm": arm, "n": n, "success": float(part["success"].mean())}
        for name, wins in (("ends_at_source", part["ends_at_source"].sum()), ("source", strict.get(SOURCE, 0))):
            low, high = wilson_interval(int(wins), n)
            row |= {name: int(wins) / n, f"{name}_low": low, f"{name}_high": high}
        row |= {name: float(strict.get(name, 0)) / n for name in (AMBIGUOUS, DESTINATION)}
        row["follows_source"] = float(part["follows_source"].mean())
        means = ("endpoint_share", "to_source", "to_destination", "cos_src", "cos_dst", "cos_src_dst")
        rows.append(row | {name: float(part[name].mean()) for name in means})
    return pd.DataFrame(rows)


def _groups(episodes: pd.DataFrame, *columns: str) -> dict[tuple[str, ...], list[int]]:
    """Rows by what they have in some columns, in the order of their first ones."""
    found: dict[tuple[str, ...], list[int]] = {}
    for row, key in enumerate(zip(*(episodes[name].tolist() for name in columns), strict=True)):
        found.setdefault(key, []).append(row)
    return found


def _partners(runs: Runs, baseline: str) -> dict[int, int]:
    """Row of every episode -> row of the baseline's episode of the same scene."""
    keys = list(zip(*(runs.episodes[name].tolist() for name in ("suite", "task", "seed")), strict=True))
    arms = runs.episodes["arm"].tolist()
    found = {key: i for i, (key, arm) in enumerate(zip(keys, arms, strict=True)) if arm == baseline}
    for key, arm in zip(keys, arms, strict=True):
        if key not in found:
            raise ValueError(f"arm {arm!r} has the episode {key}, but the arm {baseline!r} has not: nothing to compare")
    return {i: found[key] for i, key in enumerate(keys)}


def _success(runs: Runs, mine: list[int], theirs: list[int], tested: bool, seed: int) -> dict[str, Any]:
    won = runs.episodes["success"].to_numpy(bool)
    tasks = [runs.episodes["task"].tolist()[i] for i in mine]
    low, high = wilson_interval(int(won[mine].sum()), len(mine))
    change = won[mine].astype(float) - won[theirs]
    interval = change_interval if tested else mean_with_interval
    difference, difference_low, difference_high = interval(change, tasks, seed=seed)
    return {
        "n": len(mine), "n_tasks": len(set(tasks)), "success": float(won[mine].mean()), "success_low": low,
        "success_high": high, "baseline_success": float(won[theirs].mean()), "difference": difference,
        "difference_low": difference_low, "difference_high": difference_high,
        "mcnemar_p": mcnemar(won[mine], won[theirs]).p_value if tested else np.nan,
    }  # fmt: skip


def _movement(
    runs: Runs, mine: list[int], theirs: list[int], layout: ActionLayout, normalize: Normalize, seed: int
) -> dict[str, float]:
    moved, cosines, firsts = [], [], []
    for i, j in zip(mine, theirs, strict=True):
        moved.append(path_distance(runs, i, runs, j, layout))
        pair = [normalize(runs.actions[k]) for k in (i, j)]
        cosines.append(cosine(pair[0], pair[1], layout))
        # both plan their first chunk from the start, and execute as much of it as the other
        firsts.append(cosine(pair[0][runs.chunks[i] == 0], pair[1][runs.chunks[j] == 0], layout))
    tasks = [runs.episodes["task"].tolist()[i] for i in mine]
    mean, low, high = mean_with_interval(moved, tasks, seed)
    return {"displacement": mean, "displacement_low": low, "displacement_high": high,
            "cosine": _mean(cosines), "first_cosine": _mean(firsts)}  # fmt: skip


def path_distance(runs: Runs, episode: int, others: Runs, other: int, layout: ActionLayout) -> float:
    """Mean distance of the end effector in two episodes over their common steps, metres.

    episode, other: rows of `runs` and of `others`.
    """
    columns = list(layout.state_position)
    mine, theirs = (torch.as_tensor(states[:, columns]) for states in (runs.states[episode], others.states[other]))
    return float(displacement(*common_steps(mine, theirs)))


def cosine(first: Tensor, second: Tensor, layout: ActionLayout) -> float:
    """Per-step action cosine of two episodes' normalised actions [step, d_action] over their common steps."""
    return float(action_cosine(*common_steps(first, second), layout))


def _flags(row: Mapping[str, Any], is_baseline: bool, gate: float) -> dict[str, Any]:
    """FLAGS of a row; NA where nothing is compared, and where the floor or the test is not known."""
    if is_baseline:
        return dict.fromkeys(FLAGS, pd.NA)
    change = abs(row["difference"])
    unknown = np.isnan(row["floor"]) or np.isnan(row["mcnemar_p"])
    still = row["mcnemar_p"] >= _ALPHA and row["displacement"] <= _FLOORS * row["floor"]
    return {
        "zero_effect_1pp": bool(change < 0.01),
        "zero_effect_10pp": bool(change < 0.10),
        "zero_effect": pd.NA if unknown else bool(still),
        "floor_effect": bool(row["baseline_success"] < gate),
    }


def _mean(values: Sequence[float]) -> float:
    """Of those that are defined; NaN where none is."""
    defined = [value for value in values if value == value]
    return float(np.mean(defined)) if defined else float("nan")


def _stack(column: np.ndarray) -> np.ndarray:
    """A column of lists as one array with rows; numbers as they are."""
    return np.stack(list(column)) if column.dtype == object else column
