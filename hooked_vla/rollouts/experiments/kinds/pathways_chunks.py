"""The same question on first chunks alone: every block's output patched from another task's run, from the same start."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hooked_vla.analysis.metrics import displacement, integrate_actions
from hooked_vla.analysis.patching_cells import Cell, Runs, quiet
from hooked_vla.analysis.patching_resume import Tape
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.interventions import Patch
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.experiments.compare import layout_of, mean_with_interval
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.injection_runs import turned_tasks
from hooked_vla.rollouts.experiments.kinds.pathways_arms import matched_noise
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import settle
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.acting import prepare

with needs_analysis_extra():
    import pandas as pd

CHUNK_DONOR, CHUNK_RANDOM, CHUNK_NOISE = "donor", "random donor", "noise"


def chunk_sweep(context: Context, suite: str, episodes: int, sites: Sequence[str]) -> pd.DataFrame:
    """One row a site and condition: displacement of the chunk's path from the unpatched one's, metres, mean over starts
    with its interval over tasks; change: ‖Δh‖ of one call, relative: as part of ‖h‖, calls: of the site in a chunk."""
    model, layout = context.model, layout_of(suite)
    settings = settle(context.options, context.model_name, model, get_suite(suite))
    starts = context.observations(suite, episodes)
    tasks = {task: get_suite(suite).task(other).instruction
             for task, other in zip((each.id for each in get_suite(suite).tasks), turned_tasks(suite, 1), strict=True)}  # fmt: skip
    frames = [dict(seen.frame) for seen in starts]
    others = [{**frame, "instruction": tasks[seen.task]} for frame, seen in zip(frames, starts, strict=True)]
    base, donor = (prepare(model, settings, each) for each in (frames, others))
    turned = [*range(1, len(starts)), 0]
    noise = SeededNoise.of(model, prepare(model, settings, frames[:1]))([seen.seed for seen in starts], 0)
    rows = []
    for condition, from_ in ((CHUNK_DONOR, donor), (CHUNK_RANDOM, donor.rows(turned))):
        runs = Runs.of(model, from_, base, "denoising", noise, None)
        runs.run_donor(sites)
        with torch.no_grad():
            _, own = model.run_with_cache(base, list(sites), noise=list(noise))
        tape = Tape.record(model, runs.base, runs.noise, sites, n_steps=1)
        plain = integrate_actions(tape.run([[]] * runs.rows).chunk, layout)
        for site in sites:
            changes = [_change(runs, own, site, pair) for pair in range(runs.rows)]
            size = {
                "change": float(torch.stack([change.flatten(-2).norm(dim=-1).mean() for change, _ in changes]).mean()),
                "relative": float(torch.stack([share.mean() for _, share in changes]).mean()),
                "calls": model.n_denoise_steps if hook_names.is_denoised(site) else 1,
            }
            patches = {condition: runs.patches(Cell(site, None, None))}
            if condition == CHUNK_DONOR:
                patches[CHUNK_NOISE] = _noisy(runs, own, site, [seen.seed for seen in starts])
            for name, lists in patches.items():
                with quiet():
                    path = integrate_actions(tape.run(lists).chunk, layout)
                moved = displacement(path, plain).tolist()
                mean, low, high = mean_with_interval(moved, [seen.task for seen in starts], context.seed)
                rows.append({"site": site, "condition": name, "n": len(moved), "displacement": mean, "low": low,
                             "high": high, **size})  # fmt: skip
    return pd.DataFrame(rows)
