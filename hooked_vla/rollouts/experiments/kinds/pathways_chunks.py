"""Expert against VLM on first chunks: every block's output patched from another task's run, from the same start."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_vla.analysis.metrics import displacement, integrate_actions
from hooked_vla.analysis.patching_cells import Cell, Runs, quiet
from hooked_vla.analysis.patching_resume import Tape
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.hooks.cache import ActivationCache
from hooked_vla.interventions import Patch
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.experiments.compare import layout_of, mean_with_interval
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.battery_runs import settings_in
from hooked_vla.rollouts.experiments.kinds.injection_runs import turned_tasks
from hooked_vla.rollouts.experiments.kinds.pathways_arms import DONOR, NOISE, RANDOM
from hooked_vla.rollouts.matched_noise import matched_noise
from hooked_vla.rollouts.noise import SeededNoise
from hooked_vla.rollouts.settings import constant_text
from hooked_vla.rollouts.suites import get_suite

with needs_analysis_extra():
    import pandas as pd


def chunk_sweep(context: Context, suite: str, episodes: int, sites: Sequence[str]) -> pd.DataFrame:
    """One row a site and condition: displacement of the chunk's path from the unpatched one's, metres, mean over starts
    with its interval over tasks; change: ‖Δh‖ of one call, relative: as part of ‖h‖, calls: of the site in a chunk."""
    model, starts = context.model, context.observations(suite, episodes)
    settings = settings_in(context, suite, context.options)
    tasks = [task.id for task in get_suite(suite).tasks]
    told = dict(zip(tasks, (get_suite(suite).task(other).instruction for other in turned_tasks(suite, 1)), strict=True))
    frames = [dict(seen.frame) for seen in starts]
    others = [{**frame, "instruction": told[seen.task]} for frame, seen in zip(frames, starts, strict=True)]
    seeds = [seen.seed for seen in starts]
    # a random donor: the next start's run, of another task too
    turned = [*range(1, len(starts)), 0]
    rows: list[dict[str, Any]] = []
    with constant_text(model.processor, settings.constant_text):
        base, donor = (prepare(model, settings, each) for each in (frames, others))
        noise = SeededNoise.of(model, prepare(model, settings, frames[:1]))(seeds, 0)
        for condition, given in ((DONOR, donor), (RANDOM, donor.rows(turned))):
            runs = Runs.of(model, given, base, "denoising", noise, None)
            runs.run_donor(sites)
            with torch.no_grad():
                _, own = model.run_with_cache(base, list(sites), noise=list(noise))
            tape = Tape.record(model, runs.base, runs.noise, sites, n_steps=1)
            plain = integrate_actions(tape.run([[]] * runs.rows).chunk.float(), layout_of(suite))
            for site in sites:
                size = _size(runs, own, site)
                patches = {condition: runs.patches(Cell(site, None, None))}
                if condition == DONOR:
                    patches[NOISE] = _noisy(runs, own, site, seeds)
                for name, lists in patches.items():
                    with quiet():
                        path = integrate_actions(tape.run(lists).chunk.float(), layout_of(suite))
                    mean, low, high = mean_with_interval(
                        displacement(path, plain).tolist(), [seen.task for seen in starts], context.seed
                    )
                    rows.append({"site": site, "condition": name, "n": len(starts), "displacement": mean, "low": low,
                                 "high": high, **size})  # fmt: skip
    return pd.DataFrame(rows)


def _both(runs: Runs, own: ActivationCache, site: str) -> tuple[Tensor, Tensor]:
    """What the site holds in base and donor: [step row ...], one step at sites that run once."""
    values = own[site], runs.donor_cache[site]
    return values if hook_names.is_denoised(site) else (values[0][None], values[1][None])


def _size(runs: Runs, own: ActivationCache, site: str) -> dict[str, float]:
    mine, theirs = (each.flatten(2).double() for each in _both(runs, own, site))
    change = (theirs - mine).norm(dim=-1)
    return {
        "change": float(change.mean()),
        "relative": float((change / mine.norm(dim=-1)).mean()),
        "calls": float(len(mine)),
    }


def _noisy(runs: Runs, own: ActivationCache, site: str, seeds: Sequence[int]) -> list[list[Patch]]:
    """For each start a patch of the base's value plus noise as large as the donor's change, token by token, in one
    direction at all denoise steps."""
    layout = Layout.of(runs.model.points[site])
    mine, theirs = _both(runs, own, site)
    noisy = torch.stack([
        value + matched_noise(other - value, layout, list(seeds)) for value, other in zip(mine, theirs, strict=True)
    ])  # fmt: skip
    if not hook_names.is_denoised(site):
        return [[Patch(site, noisy[0][i])] for i in range(len(seeds))]
    return [[Patch(site, noisy[:, i : i + 1])] for i in range(len(seeds))]
