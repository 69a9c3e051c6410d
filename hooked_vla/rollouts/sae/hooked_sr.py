"""Hooked success rate: how often a policy succeeds with a sparse autoencoder in the loop.

Every arm has the scenes and the noise of the unedited policy. Beside the autoencoder stand the identity, which runs it
and must change no bit of any episode, and noise of the same squared error at every token, which tells what an error of
that size does if it has no meaning. How large the errors are is measured on the unedited policy's own activations.

>>> found = hooked_sr(model, "goal", [sae], episodes=100, seed=0, out="loop")
>>> found.arms["token"].ratio, found.arms["noise: token"].ratio

FOLDER/rollouts/       the episodes of all arms, see records.py
FOLDER/fidelity.json   how much every arm changes
FOLDER/report.json     what `HookedSR.to_json` gives
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hooked_vla.analysis.statistics import McNemar, holm, mcnemar
from hooked_vla.folders import write_json
from hooked_vla.inputs import PAD
from hooked_vla.rollouts.acting import prepare
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.cells import spread_scenes
from hooked_vla.rollouts.executor import Executor
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.matched_noise import PREFIX, STEP
from hooked_vla.rollouts.records import read_episodes, read_steps
from hooked_vla.rollouts.sae.fidelity import Fidelity, FidelityWatcher
from hooked_vla.rollouts.sae.loop_arms import IDENTITY, LoopArm
from hooked_vla.rollouts.settings import Options, constant_text, settle
from hooked_vla.rollouts.suites import Suite, get_suite
from hooked_vla.rollouts.summary import Rate, summarise
from hooked_vla.rollouts.sweep import DEFAULTS, run_rollouts
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.vla import HookedVLA

POOLS = ("token", "mean")
ROLLOUTS, FIDELITY, REPORT = "rollouts", "fidelity.json", "report.json"
# below this a policy fails so often by itself that what an edit costs cannot be told
GATE = 0.9


@dataclass(frozen=True)
class ArmResult:
    """One arm against the unedited policy.

    ratio: success over the unedited policy's, None where that never succeeds. unchanged: episodes whose every step is
    that of the unedited policy, bit for bit. test: successes compared with the unedited policy's, episode by episode;
    p_holm: its p-value, adjusted over all arms that put an autoencoder into the loop (NaN for controls). against_noise:
    compared with the arm of noise of the same size. fidelity: how much it changes.
    """

    rate: Rate
    ratio: float | None
    unchanged: int
    test: McNemar
    p_holm: float
    against_noise: McNemar | None
    fidelity: Fidelity

    def to_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in ("ratio", "unchanged")}
        found |= {"rate": self.rate.to_json(), "test": asdict(self.test), "fidelity": self.fidelity.to_json()}
        found["p_holm"] = None if np.isnan(self.p_holm) else self.p_holm
        return found | {"against_noise": None if self.against_noise is None else asdict(self.against_noise)}


@dataclass(frozen=True)
class HookedSR:
    """What `hooked_sr` found. baseline: the unedited policy; arms: by name, controls included."""

    baseline: Rate
    arms: Mapping[str, ArmResult]

    @property
    def is_exact(self) -> bool:
        """Whether the identity left every episode as it was: else the hooks themselves do something."""
        own = [arm for name, arm in self.arms.items() if name.endswith(IDENTITY)]
        return all(arm.unchanged == arm.rate.episodes for arm in own)

    @property
    def is_above_gate(self) -> bool:
        """Whether the unedited policy succeeds often enough for a loss to show."""
        return self.baseline.success_rate >= GATE

    def to_json(self) -> dict[str, Any]:
        return {
            "baseline": self.baseline.to_json(), "is_exact": self.is_exact, "is_above_gate": self.is_above_gate,
            "arms": {name: arm.to_json() for name, arm in self.arms.items()},
        }  # fmt: skip


def loop_arms(
    sae: SparseAutoencoder,
    segments: Sequence[str],
    pools: Sequence[str] = POOLS,
    by_segment: bool = False,
    denoise_steps: Sequence[int] = (),
    lasts: str = STEP,
    drop_negative: bool = False,
    prefix: str = "",
) -> list[LoopArm]:
    """The arms of one autoencoder: the identity, then every way with its noise.

    segments: names of the token segments of its site, none where it has none. pools: ways besides the identity, see
    loop_arms.py. by_segment: also each segment by itself. denoise_steps: also each of these by itself. lasts: how long
    directions of noise do. prefix: of the arms' names.
    Raises ValueError as LoopArm, and for no pools.
    """
    if not pools:
        raise ValueError("say at least one way of putting the autoencoder into the loop")
    named = tuple(segments) or None
    arms = [LoopArm(prefix + IDENTITY, sae, IDENTITY, drop_negative=drop_negative)]
    places: list[tuple[str, tuple[str, ...] | None, tuple[int, ...] | None]] = [("", named, None)]
    if by_segment:
        places += [(f" of {name}", (name,), None) for name in segments]
    places += [(f" at denoise step {step}", named, (step,)) for step in denoise_steps]
    for pool in pools:
        for label, tokens, denoise in places:
            # one mean over all tokens; of a single segment, that segment's
            chosen = None if pool == "mean" and tokens == named else tokens
            name = f"{pool}{label}"
            arms.append(LoopArm(prefix + name, sae, pool, chosen, denoise, None, drop_negative))
            arms.append(LoopArm(f"{prefix}{PREFIX}{name}", sae, pool, chosen, denoise, lasts, drop_negative))
    return arms


def hooked_sr(
    model: HookedVLA | ModelSource | str,
    suite: Suite | str,
    saes: Sequence[SparseAutoencoder],
    episodes: int,
    seed: int,
    out: str | Path,
    pools: Sequence[str] = POOLS,
    by_segment: bool = False,
    denoise_steps: Sequence[int] = (),
    lasts: str = STEP,
    drop_negative: bool = False,
    tasks: Sequence[str] | None = None,
    options: Options = DEFAULTS,
    name: str | None = None,
    executor: Executor | None = None,
    progress: bool = False,
) -> HookedSR:
    """Success with each autoencoder in the loop, by itself, paired with the unedited policy scene by scene.

    model, suite, episodes, seed, tasks, options, name, executor: as for `run_rollouts`; autoencoders and the other
    arguments as for `loop_arms`. The same call goes on where it was interrupted.
    Raises KeyError for a site that the model does not have; ValueError for an autoencoder that does not fit its site or
    cannot stand in for it, two of one site, and what `run_rollouts` raises it for.
    """
    out, suite = Path(out), get_suite(suite) if isinstance(suite, str) else suite
    source = ModelSource(model) if isinstance(model, str) else model
    loaded = source.load() if isinstance(source, ModelSource) else source
    if name is None:
        name = source.name if isinstance(source, ModelSource) else loaded.spec.name
    sites = [sae.config.site for sae in saes]
    if not sites or len(set(sites)) < len(sites):
        raise ValueError(f"one autoencoder a site is put into the loop, at least one: got {sites}")
    for sae in saes:
        LoopArm(sae.config.site, sae, IDENTITY, drop_negative=drop_negative).check(loaded)
    scenes = spread_scenes([task.id for task in suite.tasks] if tasks is None else tasks, episodes, seed)
    found = site_segments(loaded, suite, sites, scenes[0].task, options, name)
    arms: list[LoopArm] = []
    for sae in saes:
        prefix = f"{sae.config.site}: " if len(saes) > 1 else ""
        arms += loop_arms(
            sae, found[sae.config.site], pools, by_segment, denoise_steps, lasts, drop_negative, prefix
        )  # fmt: skip
    for arm in arms:
        arm.check(loaded)
    rollouts = run_rollouts(
        source, suite, episodes, seed, tasks, [BASELINE, *arms], out / ROLLOUTS, options, name, executor, progress
    )  # fmt: skip
    fidelity = _fidelity(loaded, suite, arms, min(episodes, options.n_envs), seed, tasks, options, name, out)
    result = compare(out / ROLLOUTS, arms, fidelity)
    assert result.baseline.episodes == rollouts.summary[BASELINE.name].overall.episodes
    write_json(out / REPORT, result.to_json())
    return result


def site_segments(
    model: HookedVLA, suite: Suite, sites: Sequence[str], task: str, options: Options, name: str
) -> dict[str, list[str]]:
    """Names of the token segments at each site, in the first observation of a task, without padding; none at sites
    that have none. Raises what making the environment raises."""
    settings = settle(options, name, model, suite)
    with closing(suite.make(task, tuple(settings.cameras.values()), settings.image_size)) as env:
        frame = env.reset(seed=0)[0]
    with constant_text(model.processor, settings.constant_text):
        segments = model.segments(prepare(model, settings, [frame]))
    found = {}
    for site in sites:
        streams = model.points[site].streams
        stream = next((streams[axis] for axis in ("seq", "query", "prefix") if axis in streams), None)
        found[site] = [] if stream is None else [each for each in segments[stream].present() if each != PAD]
    return found


def compare(folder: str | Path, arms: Sequence[LoopArm], fidelity: Mapping[str, Fidelity]) -> HookedSR:
    """The numbers of a folder of rollouts that has the baseline and these arms.

    Raises FileNotFoundError for a folder without rollouts, KeyError for an arm that is not there.
    """
    table = read_episodes(folder)
    summary = summarise(table)
    success: dict[str, dict[tuple[str, int], bool]] = {}
    numbers: dict[str, dict[tuple[str, int], int]] = {}
    for row in table.select(["episode", "arm", "task", "seed", "success"]).to_pylist():
        scene = row["task"], row["seed"]
        success.setdefault(row["arm"], {})[scene] = row["success"]
        numbers.setdefault(row["arm"], {})[scene] = row["episode"]
    if missing := [name for name in (BASELINE.name, *(arm.name for arm in arms)) if name not in success]:
        raise KeyError(f"arms {missing} are not in {folder}")
    base = summary[BASELINE.name].overall
    scenes = list(success[BASELINE.name])

    def test(first: str, second: str) -> McNemar:
        one, other = (np.array([success[name][scene] for scene in scenes]) for name in (first, second))
        return mcnemar(one, other)

    tests = {arm.name: test(arm.name, BASELINE.name) for arm in arms}
    counted = [arm.way != IDENTITY and arm.noise is None for arm in arms]
    adjusted = holm(
        [tests[arm.name].p_value if own else np.nan for arm, own in zip(arms, counted, strict=True)]
    )  # fmt: skip
    noises = {(arm.site, arm.way, arm.tokens, arm.denoise): arm.name for arm in arms if arm.noise is not None}
    results = {}
    for arm, own, p_holm in zip(arms, counted, adjusted, strict=True):
        rate, noise = summary[arm.name].overall, noises.get((arm.site, arm.way, arm.tokens, arm.denoise))
        results[arm.name] = ArmResult(
            rate=rate,
            ratio=rate.success_rate / base.success_rate if base.successes else None,
            unchanged=_unchanged(folder, numbers[arm.name], numbers[BASELINE.name]),
            test=tests[arm.name],
            p_holm=float(p_holm),
            against_noise=test(arm.name, noise) if own and noise is not None else None,
            fidelity=fidelity[arm.name],
        )
    return HookedSR(base, results)


def _unchanged(folder: str | Path, first: Mapping[Any, int], second: Mapping[Any, int]) -> int:
    """In how many scenes all steps of two arms are the same, bit for bit."""
    n = 0
    for scene, number in first.items():
        own, other = (read_steps(folder, [each]).drop_columns("episode") for each in (number, second[scene]))
        n += own.equals(other)
    return n


def _fidelity(
    model: HookedVLA, suite: Suite, arms: Sequence[LoopArm], episodes: int, seed: int, tasks: Sequence[str] | None,
    options: Options, name: str, out: Path,
) -> dict[str, Fidelity]:  # fmt: skip
    """How much arms change, on a few episodes of the unedited policy; what was measured is kept."""
    path = out / FIDELITY
    if path.is_file():
        return {arm: Fidelity(**each) for arm, each in json.loads(path.read_text()).items()}
    watcher = FidelityWatcher(arms)
    run_rollouts(model, suite, episodes, seed, tasks, options=options, name=name, watchers=[watcher])
    found = watcher.result()
    kept = {arm: each.to_json() for arm, each in found.items()}
    write_json(path, kept)
    return found
