"""Taking what goal probes read out of a policy while it acts: does it still pursue the goal, and which one?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_vla.analysis.probes import fit_probe
from hooked_vla.analysis.statistics import mcnemar
from hooked_vla.analysis.subspaces import Subspace, from_probes, random_subspace
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.inputs import ModelInputs
from hooked_vla.interventions import Edit, EditArm
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.activation_reader import ActivationRecording
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, undecided
from hooked_vla.rollouts.experiments.kinds.battery_runs import changes, gate_note, points, records, threshold
from hooked_vla.rollouts.experiments.kinds.probes_scores import GOAL, IMAGES, segments_at
from hooked_vla.rollouts.experiments.outcome import Verdict
from hooked_vla.rollouts.labelled import KeptFrame, labelled_segments
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import Settings, constant_text
from hooked_vla.vla import HookedVLA

with needs_analysis_extra():
    import pandas as pd

_SEGMENTS = (IMAGES, "language")


@dataclass(frozen=True, eq=False)
class Removal:
    """What goal probes read at one site in one segment. random: as many random dimensions around the same center;
    stretch: the strength at which taking those out moves tokens as far, in root mean square."""

    site: str
    segment: str
    goal: Subspace
    random: Subspace
    another: Subspace
    stretch: float

    def edit(self, which: str) -> Edit:
        """Taking out "goal", "random" or "another" random subspace; or "as far", the first random one, stretched."""
        space = {"goal": self.goal, "another": self.another}.get(which, self.random)
        return space.project_out(self.stretch if which == "as far" else 1.0, tokens=self.segment)


def fit_removals(
    model: HookedVLA,
    settings: Settings,
    frames: Sequence[KeptFrame],
    recording: ActivationRecording,
    labels: pd.DataFrame,
    seed: int,
) -> dict[tuple[str, str], Removal]:
    """Probes of block and pad at every recorded site before the expert that reaches the action, on all plans; what
    taking them out does to a token is measured on the frames."""
    found: dict[tuple[str, str], tuple[Subspace, Subspace, Subspace]] = {}
    for site, about in model.hook_points.items():
        if site not in recording.sites or about.denoised or not about.reaches_action or about.axes[0] != "batch":
            continue
        segments: list[str | None] = [each for each in segments_at(recording, site) if each in _SEGMENTS]
        for segment, (x, rows) in labelled_segments(recording, labels, site, segments).items():
            probes = [fit_probe(x, rows[goal].to_numpy(object), "logistic") for goal in GOAL]
            goal = from_probes(probes, site)
            random, another = (
                random_subspace(goal.d, goal.k, seed + i, site, goal.center) for i in range(2)
            )  # fmt: skip
            found[site, str(segment)] = goal, random, another
    tokens = _tokens(model, settings, frames, list(found))
    removals = {}
    for place, (goal, random, another) in found.items():
        moved = [float(each.coordinates(tokens[place]).square().sum(1).mean().sqrt()) for each in (goal, random)]
        removals[place] = Removal(*place, goal, random, another, moved[0] / moved[1])
    return removals


def _tokens(
    model: HookedVLA, settings: Settings, frames: Sequence[KeptFrame], places: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Float[Tensor, "n d"]]:
    """The tokens of segments at sites, on frames as the policy sees them."""
    with constant_text(model.processor, settings.constant_text), torch.no_grad():
        inputs, noise = _prepared(model, settings, frames)
        _, cache = model.run_with_cache(inputs, list(dict.fromkeys(site for site, _ in places)), noise=noise)
    found = {}
    for site, segment in places:
        rows = rearrange(cache[site].segment(segment, pad_value=float("nan")), "b t d -> (b t) d")
        found[site, segment] = rows[~rows.isnan().any(1)].cpu()
    return found


def _prepared(model: HookedVLA, settings: Settings, frames: Sequence[KeptFrame]) -> tuple[ModelInputs, Any]:
    """Inputs of frames, and the noise of their episodes at their steps."""
    inputs = prepare(model, settings, [each.frame for each in frames])
    noise = SeededNoise.of(model, inputs.rows([0]))
    drawn = [noise([each.seed], each.env_step) for each in frames]
    return inputs, [torch.cat(each) for each in zip(*drawn, strict=True)]


def removal_effects(
    model: HookedVLA, settings: Settings, frames: Sequence[KeptFrame], removals: Mapping[tuple[str, str], Removal]
) -> pd.DataFrame:
    """How much each removal changes the chunk that is planned on frames: ‖edited - clean‖ ÷ ‖clean‖, mean over frames,
    for the goal's directions (goal), random ones (random), and those stretched (as_far)."""
    with constant_text(model.processor, settings.constant_text), torch.no_grad():
        inputs, draws = _prepared(model, settings, frames)
        clean = model(inputs, draws).normalized.flatten(1)
        rows = []
        for removal in removals.values():
            row: dict[str, Any] = {"site": removal.site, "segment": removal.segment, "k": removal.goal.k}
            for column, which in (("goal", "goal"), ("random", "random"), ("as_far", "as far")):
                edited = model(inputs, draws, edits=[removal.edit(which)]).normalized.flatten(1)
                row[column] = float(((edited - clean).norm(dim=1) / clean.norm(dim=1)).mean())
            rows.append(row | {"stretch": removal.stretch})
    return pd.DataFrame(rows)


def choose_removal(effects: pd.DataFrame) -> tuple[str, str]:
    """Site and segment where taking the goal's directions out changes plans most, over what random ones change."""
    rows = effects.to_dict("records")
    best = max(rows, key=lambda row: row["goal"] - max(row["random"], row["as_far"]))
    return str(best["site"]), str(best["segment"])


GOAL_OUT, RANDOM_OUT, ANOTHER_OUT, AS_FAR_OUT = (
    "goal probes out",
    "random out",
    "other random out",
    "random out, as far",
)
GOAL_ALL, RANDOM_ALL, ANOTHER_ALL, AS_FAR_ALL = (
    "goal probes out, all layers",
    "random out, all layers",
    "other random out, all layers",
    "random out, as far, all layers",
)
# columns of `pursued_goals` that are shares of episodes
PURSUED = ("right_block", "another_goal")


def removal_arms(removals: Mapping[tuple[str, str], Removal], chosen: tuple[str, str]) -> list[EditArm]:
    """Removals at the chosen site, and in its segment at all sites at once."""
    one = removals[chosen]
    every = [each for (_, segment), each in removals.items() if segment == one.segment]
    single = ((GOAL_OUT, "goal"), (RANDOM_OUT, "random"), (ANOTHER_OUT, "another"), (AS_FAR_OUT, "as far"))
    whole = ((GOAL_ALL, "goal"), (RANDOM_ALL, "random"), (ANOTHER_ALL, "another"), (AS_FAR_ALL, "as far"))
    return [EditArm(name, [one.edit(which)]) for name, which in single] + [
        EditArm(name, [each.edit(which) for each in every]) for name, which in whole
    ]


def pursued_goals(goals: pd.DataFrame) -> pd.DataFrame:
    """`goal_table` with right_block: the task's block is lifted first; another_goal: another block is, or another goal
    is done and the own is not."""
    own = [str(task).partition("-")[0] for task in goals["task"]]
    first = goals["first_lifted"].tolist()
    wrong = [lifted not in ("", block) for lifted, block in zip(first, own, strict=True)]
    astray = (goals["placed"] & ~goals["own"]).to_numpy(bool)
    return goals.assign(
        right_block=[lifted == block for lifted, block in zip(first, own, strict=True)],
        another_goal=np.array(wrong) | astray,
    )


def removal_verdicts(
    context: Context, suite: str, table: pd.DataFrame, pursued: pd.DataFrame, runs: Runs
) -> list[Verdict]:
    """Whether taking the goal's directions out at all layers costs success, and the goal, beyond what random directions
    that move tokens as far cost: differences of the same episodes, with intervals by tasks."""
    rules = ("removal", "removal-goal")
    if why := gate_note(table, suite):
        return [Verdict(rule, None, why) for rule in rules]
    rows = {row["arm"]: row for row in records(table)}
    shown = (GOAL_ALL, AS_FAR_ALL, RANDOM_ALL, ANOTHER_ALL)
    success = ", ".join(f"{arm} {points(rows[arm]['difference'])}" for arm in shown)
    astray = ", ".join(f"{arm} {rows[arm]['another_goal']:.0%}" for arm in (*shown, BASELINE.name))
    said = (f"success {success}", f"another goal is pursued: {astray}")
    cost, tasks = changes(runs, suite, [GOAL_ALL], than=AS_FAR_ALL)
    both = {arm: part.sort_values(["task", "seed"]) for arm, part in pursued.groupby("arm")}
    goal, far = (both[arm]["another_goal"].to_numpy(bool) for arm in (GOAL_ALL, AS_FAR_ALL))
    won = [~each["own"].to_numpy(bool) for each in (both[GOAL_ALL], both[AS_FAR_ALL])]
    found = []
    for rule, text, change, names, pair in (
        (rules[0], said[0], -cost[:, 0], tasks, won),
        (rules[1], said[1], goal.astype(float) - far, both[GOAL_ALL]["task"].tolist(), [goal, far]),
    ):
        more, low, high = change_interval(change, names, seed=context.seed)
        holds = decide(low, high, threshold(context, rule), below=False)
        p = mcnemar(pair[0], pair[1]).p_value
        found.append(
            Verdict(
                rule,
                holds,
                f"{text}; beyond directions moved as far: {points(more)} ({points(low)} to {points(high)}, McNemar p = "
                f"{p:.2g}){undecided(holds)}",
            )
        )
    return found
