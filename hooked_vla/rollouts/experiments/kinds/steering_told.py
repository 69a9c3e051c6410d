"""How much of what the instruction decides is left under an edit, on first chunks: the same scene and noise, told every
task of the suite. An edit that overwrites makes all of them act alike.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_vla.analysis.metrics import ActionLayout
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.inputs import ModelInputs
from hooked_vla.interventions import EditArm
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.experiments.compare import layout_of, mean_with_interval
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.battery_runs import settings_in
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import constant_text
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd


def told_apart(context: Context, suite: str, arms: Sequence[EditArm], scenes: int) -> pd.DataFrame:
    """One row an arm: apart, the mean distance between first chunks that follow from different instructions, as a share
    of what it is without the edit, with its 95 % interval by tasks of the scenes (low, high); NaN where instructions
    make no difference without it either. n: scenes."""
    model, layout = context.model, layout_of(suite)
    settings = settings_in(context, suite, context.options)
    instructions = list(dict.fromkeys(task.instruction for task in get_suite(suite).tasks))
    starts = context.observations(suite, scenes)
    shares: dict[str, list[float]] = {arm.name: [] for arm in arms}
    with constant_text(model.processor, settings.constant_text), torch.no_grad():
        for seen in starts:
            frames = [{**dict(seen.frame), "instruction": each} for each in instructions]
            inputs = prepare(model, settings, frames)
            first = prepare(model, settings, frames[:1])
            # the same draws for all rows
            noise = list(SeededNoise.of(model, first)([seen.seed] * len(frames), 0))
            plain = _spread(_chunks(context, inputs, noise), layout)
            for arm in arms:
                with model.edits(list(arm.edits)):
                    own = _spread(_chunks(context, inputs, noise), layout)
                shares[arm.name].append(own / plain if plain > 0 else float("nan"))
    rows = []
    for name, values in shares.items():
        mean, low, high = mean_with_interval(values, [seen.task for seen in starts], context.seed)
        rows.append({"arm": name, "n": len(values), "apart": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def _chunks(context: Context, inputs: ModelInputs, noise: list[Tensor]) -> Float[Tensor, "row step d_action"]:
    return context.model.sample_actions(inputs, noise=noise).float()


def _spread(chunks: Float[Tensor, "row step d_action"], layout: ActionLayout) -> float:
    """Mean distance between the chunks of two rows, without the gripper."""
    flat = chunks[..., list(layout.moving)].flatten(1)
    n = len(flat)
    return float(torch.cdist(flat, flat).sum() / (n * (n - 1))) if n > 1 else 0.0
