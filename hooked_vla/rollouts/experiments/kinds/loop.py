"""Autoencoders in the loop, token by token or through the mean token: does the policy still work, and does the variance
that they explain tell?

Every autoencoder stands in for its site in closed loop, by itself: one that was trained on tokens, used on every token
and on the mean token (whose change every token gets), and one that was trained on mean tokens, used on both too. Beside
them: the identity, which runs the autoencoder and must change no bit; noise of the same squared error at every token;
the unedited policy once more. What each explains of the variance is measured on the unedited policy in the same scenes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.names import is_denoised, pathway
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, undecided
from hooked_vla.rollouts.experiments.kinds.autoencoders import (
    SAESettings,
    autoencoders,
    origin_notes,
    sae_sites,
)
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    changes,
    compare_suites,
    gate_note,
    limited,
    points,
    records,
    roll_suite,
    threshold,
    with_rerun,
)
from hooked_vla.rollouts.experiments.kinds.loop_figures import loop_figures
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.matched_noise import PREFIX, STEP
from hooked_vla.rollouts.sae.fidelity import Fidelity, FidelityWatcher
from hooked_vla.rollouts.sae.hooked_sr import ArmResult, loop_arms, site_segments
from hooked_vla.rollouts.sae.hooked_sr import compare as compare_loop
from hooked_vla.rollouts.sae.loop_arms import IDENTITY, LoopArm
from hooked_vla.rollouts.settings import Options
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import run_rollouts
from hooked_vla.sae.autoencoder import SparseAutoencoder

with needs_analysis_extra():
    import pandas as pd

EXPERT = "expert"
TOKEN, MEAN = "token", "mean"
# label of the autoencoders that are trained on mean tokens
MEANS = "means"
_KEEP, _POOLED, _SAME = "per-token", "pooled", "identity"


@dataclass(frozen=True, kw_only=True)
class Settings(SAESettings):
    """episodes: of each arm. max_steps: after which an episode has failed. lasts: how long a direction of noise does,
    "step" or "episode". by_segment: also each token segment by itself. by_step: also the first and the last denoise
    step by itself, at sites that have them. explained: share of the variance of mean tokens from which on a pooled
    autoencoder counts as faithful."""

    episodes: int
    max_steps: int = 96
    lasts: str = STEP
    by_segment: bool = False
    by_step: bool = False
    explained: float = 0.95


@dataclass(frozen=True)
class _Set:
    """Autoencoders that were trained on one kind of rows, and their arms."""

    trained: str
    table: pd.DataFrame
    arms: Sequence[LoopArm]


def run(context: Context, settings: Settings) -> Outcome:
    """Raises KeyError and ValueError for sites that the model does not have, as `autoencoders`."""
    sites, options = sae_sites(context, settings), limited(context, settings.max_steps)
    suite = get_suite(settings.suite)
    segments = site_segments(
        context.model, suite, sites, suite.tasks[0].id, options, context.model_name
    )  # fmt: skip
    sets = [_on_tokens(context, settings, sites, segments), _on_means(context, settings, sites, segments)]
    arms = [arm for each in sets for arm in each.arms]
    main = roll_suite(context, settings.suite, arms, settings.episodes, options)
    runs = with_rerun(context, main, settings.suite, settings.episodes, options)
    fidelity = _fidelity(context, settings, arms, options)
    results: dict[str, ArmResult] = {}
    assert main.folder is not None
    for each in sets:
        results |= compare_loop(main.folder, each.arms, fidelity).arms
    table = _table(context, runs, sets, results)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, runs, table),
        tables={"autoencoders": sets[0].table, f"autoencoders_{MEANS}": sets[1].table},
        figures=loop_figures(table, BASELINE.name),
        notes=[*origin_notes(sets[0].table, settings), *_notes(settings)],
    )


def _on_tokens(
    context: Context, settings: Settings, sites: Sequence[str], segments: Mapping[str, Sequence[str]]
) -> _Set:
    saes, table = autoencoders(context, sites, settings)
    arms: list[LoopArm] = []
    for sae in saes:
        site = sae.config.site
        denoised = settings.by_step and is_denoised(site)
        steps = dict.fromkeys((0, context.model.n_denoise_steps - 1)) if denoised else ()
        # segments and steps by themselves are asked of the way that is to be kept
        arms += loop_arms(
            sae, segments[site], (TOKEN,), settings.by_segment, list(steps), settings.lasts, prefix=f"{site}: "
        )  # fmt: skip
        arms += _pooled(sae, segments[site], (MEAN,), settings, f"{site}: ")
    return _Set(TOKEN, table, arms)


def _on_means(
    context: Context, settings: Settings, sites: Sequence[str], segments: Mapping[str, Sequence[str]]
) -> _Set:
    saes, table = autoencoders(context, sites, settings, MEAN, MEANS)
    arms = [
        arm
        for sae in saes
        for arm in _pooled(sae, segments[sae.config.site], (MEAN, TOKEN), settings, f"{sae.config.site}: {MEANS}: ")
    ]
    return _Set(MEAN, table, arms)


def _pooled(
    sae: SparseAutoencoder, segments: Sequence[str], pools: Sequence[str], settings: Settings, prefix: str
) -> list[LoopArm]:
    """The ways with their noise, without another identity."""
    found = loop_arms(sae, segments, pools, lasts=settings.lasts, prefix=prefix)
    return [arm for arm in found if arm.way != IDENTITY]


def _fidelity(
    context: Context, settings: Settings, arms: Sequence[LoopArm], options: Options
) -> dict[str, Fidelity]:  # fmt: skip
    """How much every arm changes, on the first episodes of the unedited policy."""

    def measure() -> pd.DataFrame:
        watcher = FidelityWatcher(arms)
        run_rollouts(
            context.model, settings.suite, min(settings.episodes, options.n_envs), context.seed, options=options,
            name=context.model_name, watchers=[watcher],
        )  # fmt: skip
        return pd.DataFrame([{"arm": arm, **each.to_json()} for arm, each in watcher.result().items()])

    rows = records(context.table("fidelity", measure))
    return {row.pop("arm"): Fidelity(**row) for row in rows}


def _table(
    context: Context, runs: Runs, sets: Sequence[_Set], results: Mapping[str, ArmResult]
) -> pd.DataFrame:  # fmt: skip
    """The standard comparison; before it, what each arm is, how much it changes, and what is left of the baseline's
    success. against_noise_p: McNemar's test against noise of the same size."""
    about = {arm.name: (arm, each.trained) for each in sets for arm in each.arms}
    rows = []
    for row in records(compare_suites(context, [runs])):
        arm, trained = about.get(row["arm"], (None, ""))
        own: dict[str, Any] = {
            "site": "", "way": row["arm"], "trained": trained, "noise": False, "explained_variance": np.nan,
            "of_means": np.nan, "fvu": np.nan, "relative": np.nan, "ratio": np.nan, "unchanged": pd.NA,
            "against_noise_p": np.nan,
        }  # fmt: skip
        if arm is not None:
            result = results[arm.name]
            means, test = result.fidelity.of_means, result.against_noise
            own |= {
                "site": arm.site, "way": arm.name.removeprefix(f"{arm.site}: "), "noise": arm.noise is not None,
                "explained_variance": result.fidelity.explained_variance,
                "of_means": np.nan if means is None else means, "fvu": result.fidelity.fvu,
                "relative": result.fidelity.relative, "ratio": np.nan if result.ratio is None else result.ratio,
                "unchanged": result.unchanged, "against_noise_p": np.nan if test is None else test.p_value,
            }  # fmt: skip
        rows.append(own | row)
    return pd.DataFrame(rows).astype({"unchanged": "Int64"})


def above_share(runs: Runs, suite: str, arm: str, share: float, seed: int) -> tuple[float, float, float]:
    """By how much an arm's success is above a share of the baseline's, with its 95 % interval: to either side the wider
    one of that by tasks and that by episodes. Where failures are spread evenly over tasks, resampling tasks alone is
    surer than so few episodes allow."""
    change, tasks = changes(runs, suite, [arm])
    table = runs.episodes
    base = table["success"].to_numpy(float)[(table["suite"] == suite) & (table["arm"] == BASELINE.name)]
    above = change[:, 0] + (1 - share) * base
    mean, *ends = change_interval(above, tasks, seed=seed)
    _, low, high = change_interval(above, range(len(above)), seed=seed)
    return mean, float(np.minimum(ends[0], low)), float(np.maximum(ends[1], high))


def _verdicts(context: Context, settings: Settings, runs: Runs, table: pd.DataFrame) -> list[Verdict]:
    rows = [row for row in records(table) if row["site"]]
    same = [row for row in rows if row["way"] == IDENTITY]
    exact = all(row["unchanged"] == row["n"] for row in same)
    found = [Verdict(_SAME, exact, "; ".join(f"{row['site']}: {row['unchanged']} of {row['n']} episodes unchanged, to "
                                             "the last bit" for row in same))]  # fmt: skip
    if why := gate_note(table, settings.suite):
        return [*found, Verdict(_KEEP, None, why), Verdict(_POOLED, None, why)]
    return [*found, _kept(context, settings, runs, rows), _collapse(context, settings, runs, rows)]


def _kept(context: Context, settings: Settings, runs: Runs, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    limit, said, held = threshold(context, _KEEP), [], []
    for row in rows:
        if row["way"] == TOKEN:
            more, low, high = above_share(runs, settings.suite, row["arm"], limit, context.seed)
            held.append(decide(low, high, 0.0, below=False))
            said.append(f"{_said(row, rows, 'explained_variance')}; {points(more)} ({points(low)} to {points(high)}) "
                        f"from {limit:.0%} of it")  # fmt: skip
    return Verdict(_KEEP, _all(held), "; ".join(said) + undecided(_all(held)))


def _collapse(context: Context, settings: Settings, runs: Runs, rows: Sequence[Mapping[str, Any]]) -> Verdict:
    """Of the pooled ways in expert tokens, those whose autoencoder explains enough of the means."""
    limit = threshold(context, _POOLED)
    pooled = [row for row in rows if row["way"] in (MEAN, f"{MEANS}: {MEAN}") and pathway(row["site"]) == EXPERT]
    said = "; ".join(_said(row, rows, "of_means") for row in pooled)
    if not pooled:
        return Verdict(_POOLED, None, "no autoencoder is of an expert's tokens")
    faithful = [row for row in pooled if row["of_means"] >= settings.explained]
    if not faithful:
        return Verdict(_POOLED, None, f"{said}: none explains {settings.explained:.0%} of the variance of means")
    held = []
    for row in faithful:
        _, low, high = above_share(runs, settings.suite, row["arm"], limit, context.seed)
        held.append(decide(low, high, 0.0, below=True))
    return Verdict(_POOLED, _all(held), said + undecided(_all(held)))


def _said(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], explained: str) -> str:
    other = next(each for each in rows if each["noise"] and _stands_for(each) == row["arm"])
    of = "of means " if explained == "of_means" else ""
    return (
        f"{row['arm']}: {_share(row['ratio'])} of the baseline's success with an explained variance {of}of "
        f"{row[explained]:.3f}, noise of that size {_share(other['ratio'])}"
    )


def _stands_for(noise: Mapping[str, Any]) -> str:
    """The arm whose error an arm of noise is as large as."""
    return str(noise["arm"]).replace(PREFIX, "", 1)


def _share(ratio: float) -> str:
    return "none is known" if ratio != ratio else f"{ratio:.2f}"


def _all(held: Sequence[bool | None]) -> bool | None:
    return False if False in held else None if None in held or not held else True


def _notes(settings: Settings) -> list[str]:
    return [
        "mean: the mean of all tokens is reconstructed, and what that changes is added to every token. However much of "
        "the variance of means is explained, all tokens move by one and the same vector.",
        "means: autoencoders that were trained in this run on mean tokens, as pooled ones are; used on every token, "
        "they see what they were not trained on.",
        f"Noise has, at every token and call, the length of the error, in a direction that lasts one {settings.lasts}; "
        "for pooled ways all tokens of a row have one direction. What is explained is that of the unedited policy's "
        "activations: in the loop the policy goes where autoencoders have not been.",
    ]
