"""What the experiments on batteries share: what becomes of an arm, its runs beside a rerun, and when to judge."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float64

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import Cell
from hooked_vla.rollouts.experiments.compare import (
    GATE,
    RERUN,
    Runs,
    action_normalizer,
    compare,
    join,
    layout_of,
    read_runs,
    rerun,
)
from hooked_vla.rollouts.experiments.context import Context, Seen
from hooked_vla.rollouts.settings import Options, Settings, settle
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import Rollouts

with needs_analysis_extra():
    import pandas as pd

# what becomes of an arm: all its episodes change, some do, none does, all are as under another arm, or the model cannot
# take them
CHANGED, PARTLY, UNCHANGED = "changed", "partly changed", "unchanged: not run"
SAME, REFUSED = "as another kind: not run", "refused: not run"
RUN = (CHANGED, PARTLY)
# of tests, as in the flags of a comparison
ALPHA = 0.05
# of tasks: with fewer, intervals that resample them are too narrow (analysis/statistics.py)
FEW_TASKS = 10


def few_tasks(table: pd.DataFrame) -> list[str]:
    """What a reader must know of intervals in suites of few tasks; table: a comparison."""
    suites = {row["suite"]: row["n_tasks"] for row in records(table) if row["n_tasks"] < FEW_TASKS}
    return [
        f"Intervals that resample the {n} tasks of {suite} are narrower than they should be: so few can be drawn in "
        "few ways." for suite, n in suites.items()
    ]  # fmt: skip


def limited(context: Context, max_steps: int) -> Options:
    """The run's options with a limit of environment steps."""
    return replace(context.options, max_steps=max_steps)


def settings_in(context: Context, suite: str, options: Options) -> Settings:
    """How rollouts of the run's model in a suite will be."""
    return settle(options, context.model_name, context.model, get_suite(suite))


def cell_of(arm: Arm, seen: Seen) -> Cell:
    """The episode that starts so, under an arm; its number does not matter to arms that observe."""
    return Cell(0, arm.name, seen.task, seen.seed)


def roll_suite(context: Context, suite: str, arms: Sequence[Arm], episodes: int, options: Options) -> Rollouts:
    """The suite's episodes under the baseline and all arms."""
    return context.rollouts(suite, suite, [BASELINE, *arms], episodes, options=options)


def with_rerun(context: Context, main: Rollouts, suite: str, episodes: int, options: Options) -> Runs:
    """What `roll_suite` made, and the baseline's rerun."""
    again = rerun(context, f"{suite}_rerun", suite, episodes, options=options)
    return join(read_runs(main), read_runs(again, {BASELINE.name: RERUN}))


def run_suite(context: Context, suite: str, arms: Sequence[Arm], episodes: int, options: Options) -> Runs:
    """The suite's episodes under the baseline and all arms, and the baseline's rerun."""
    return with_rerun(context, roll_suite(context, suite, arms, episodes, options), suite, episodes, options)


def compare_suites(context: Context, runs: Iterable[Runs]) -> pd.DataFrame:
    """`compare` of all suites together, so that p-values are adjusted for all tests of the experiment."""
    joined = join(*runs)
    suites = list(dict.fromkeys(joined.episodes["suite"]))
    layouts = {layout_of(suite) for suite in suites}
    if len(layouts) != 1:
        raise ValueError(f"the suites {suites} differ in what their actions are: run them apart")
    return compare(joined, layouts.pop(), action_normalizer(context.model), seed=context.seed)


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """A table's rows as plain values by column."""
    return [dict(zip(table.columns, row, strict=True)) for row in table.itertuples(index=False, name=None)]


def keep(table: pd.DataFrame, wanted: Callable[[dict[str, Any]], bool]) -> pd.DataFrame:
    """The rows of a table that are wanted."""
    return pd.DataFrame([row for row in records(table) if wanted(row)], columns=list(table.columns))


def arms_of(table: pd.DataFrame, suite: str) -> list[dict[str, Any]]:
    """A suite's rows of a comparison, without the baseline's and its rerun's."""
    return [row for row in records(table) if row["suite"] == suite and row["arm"] not in (BASELINE.name, RERUN)]


def threshold(context: Context, rule: str) -> float:
    """The number that decides a rule. Raises ValueError where the definition gives none."""
    number = context.rules[rule].threshold
    if number is None:
        raise ValueError(f"{context.definition.id}: the rule {rule!r} needs a threshold")
    return float(number)


def gate_note(table: pd.DataFrame, suite: str) -> str | None:
    """Why a suite's rows decide nothing: its baseline fails too often; None where it does not."""
    base = next(row["success"] for row in records(table) if (row["suite"], row["arm"]) == (suite, BASELINE.name))
    return None if base >= GATE else f"the baseline succeeds in {base:.0%} of {suite}: a floor effect, not judged"


def changes(
    runs: Runs, suite: str, arms: Sequence[str], than: str = BASELINE.name
) -> tuple[Float64[np.ndarray, "scene arm"], list[str]]:
    """Success of every scene's episode under each arm less that under `than`, and each scene's task.

    Raises KeyError for a scene that one of them lacks.
    """
    names = ("suite", "arm", "task", "seed")
    keys = zip(*(runs.episodes[name].tolist() for name in names), strict=True)
    won = dict(zip(keys, runs.episodes["success"].tolist(), strict=True))
    scenes = [key[2:] for key in won if key[:2] == (suite, than)]
    rows = [[float(won[suite, arm, *scene]) - float(won[suite, than, *scene]) for arm in arms] for scene in scenes]
    return np.array(rows, np.float64).reshape(len(scenes), len(arms)), [scene[0] for scene in scenes]


def significant(rows: Iterable[Mapping[str, Any]]) -> str:
    """The arms whose success differs from the baseline's by McNemar's test, after Holm's correction, in words."""
    found = ", ".join(str(row["arm"]) for row in rows if row["holm_p"] < ALPHA)
    return f"by McNemar's test and Holm's correction at {ALPHA:g} success changes under {found or 'none'}"


def points(share: float) -> str:
    """A difference of shares in percentage points; "?" where it is not known."""
    # a sum with 0 has no minus sign before it
    return f"{100 * share + 0.0:+.1f} pp" if share == share else "?"
