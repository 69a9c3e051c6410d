"""Autoencoders of as many frames from one task, a few, or all: which features does DrVLA's metric call general?

The policy plans at every environment step, so that a frame is a step as in a data set; what a site holds then, the mean
over its tokens (at the last denoise step), is a row. Every episode gives as many frames, evenly spaced over its time,
so that neither its length nor where it was cut tells tasks apart. Draw i orders the tasks by chance; its autoencoders
take the first one, the first few, and all of them, the same number of episodes each, and start from the same seed. Each
is judged twice: on its own episodes, as published, and on held-out episodes of all tasks, which are the same for all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import decide, interval_of, undecided
from hooked_vla.rollouts.experiments.kinds.autoencoders import SAESettings, sae_sites
from hooked_vla.rollouts.experiments.kinds.battery_runs import records, threshold
from hooked_vla.rollouts.experiments.kinds.concepts_arms import short
from hooked_vla.rollouts.experiments.kinds.generality_figures import figures
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.records import read_episodes
from hooked_vla.rollouts.sae.collect import ROLLOUTS, collect
from hooked_vla.rollouts.sae.training import HELD_OUT
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.evaluate import evaluate
from hooked_vla.sae.feature_steps import FeatureSteps
from hooked_vla.sae.generality import PUBLISHED, GeneralityReport, generality
from hooked_vla.sae.presets import preset
from hooked_vla.sae.rows import IDS, Capture
from hooked_vla.sae.run_folder import folder_names
from hooked_vla.sae.source import TensorSource
from hooked_vla.sae.store import TokenStore
from hooked_vla.sae.trainer import train

with needs_analysis_extra():
    import pandas as pd

# judged on what each was trained on, and on the same held-out episodes
OWN, SAME = "own episodes", "same episodes"
MEMORISED, NULL = "memorised", "memorised_null"
RULES = ("falls", "same-episodes", "beyond-frequency")
_PRESET = "drvla"
# where more than this are memorised whatever an autoencoder has seen, the metric tells nothing apart
_CEILING = 0.99
# more than any store has episodes
_MANY = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """sites: whose autoencoders, none for the middle block of each pathway. suite: where the policy acts. tasks: how
    many of its tasks an autoencoder sees. draws: of which. episodes: that each is trained on. frames: of an episode,
    or of every one as many as the shortest has. held_out_episodes: of each task. coefficients: of the metric, libero or
    droid. steps, batch_size, rate: of training. width_over_k: of d channels, d / width_over_k features are active, as
    about in the publication's larger models. n_shuffles: of the null."""

    sites: tuple[str, ...]
    suite: str
    tasks: tuple[int, ...]
    draws: int
    episodes: int
    frames: int
    held_out_episodes: int
    coefficients: str
    steps: int
    batch_size: int
    rate: float
    width_over_k: int
    n_shuffles: int

    def __post_init__(self) -> None:
        """Raises ValueError for fewer than two numbers of tasks, episodes that they do not divide, other coefficients,
        and other numbers below 1."""
        if len(set(self.tasks)) < 2 or min(self.tasks) < 1:
            raise ValueError(f"tasks must be two different numbers of tasks or more, got {list(self.tasks)}")
        if odd := [n for n in self.tasks if self.episodes % n or not self.episodes]:
            raise ValueError(f"{self.episodes} episodes cannot be spread evenly over {odd} tasks")
        if self.coefficients not in PUBLISHED:
            raise ValueError(f"unknown coefficients {self.coefficients!r}; choose one of {list(PUBLISHED)}")
        counts = ("draws", "frames", "held_out_episodes", "steps", "batch_size", "width_over_k", "n_shuffles")
        if low := [name for name in counts if getattr(self, name) < 1]:
            raise ValueError(f"{low} must be at least 1")


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a store. episode: of each, by a number that no other part's has."""

    store: TokenStore
    rows: Int64[np.ndarray, " n"]
    episode: Int64[np.ndarray, " n"]


class Frames:
    """Stores of one mean a plan, by task. episodes: task -> where its episodes are: number of the store, and in it."""

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores, self.episodes = list(stores), dict[str, list[tuple[int, int]]]()
        columns = [IDS.index("episode"), IDS.index("env_step")]
        self._ids = [store.ids(store.sites[0])[:, columns].numpy().astype(np.int64) for store in stores]
        for number, store in enumerate(stores):
            for row in read_episodes(store.folder / ROLLOUTS).select(["episode", "task"]).to_pylist():
                self.episodes.setdefault(row["task"], []).append((number, row["episode"]))

    @property
    def shortest(self) -> int:
        """Rows of the episode with the fewest."""
        return min(int(np.unique(ids[:, 0], return_counts=True)[1].min()) for ids in self._ids)

    def of(self, episodes: Sequence[tuple[int, int]], frames: int) -> list[Part]:
        """So many rows of each of some episodes, evenly spaced from its first to its last, in order of time.

        Raises ValueError for an episode with fewer."""
        parts = []
        for number, episode in episodes:
            ids = self._ids[number]
            rows = np.flatnonzero(ids[:, 0] == episode)
            rows = rows[np.argsort(ids[rows, 1], kind="stable")]
            if len(rows) < frames:
                raise ValueError(
                    f"episode {episode} has {len(rows)} frames, fewer than the {frames} that are asked for"
                )
            rows = rows[np.linspace(0, len(rows) - 1, frames).round().astype(np.int64)]
            # stores count their episodes from 0
            parts.append(Part(self.stores[number], rows, np.full(frames, number * _MANY + episode)))
        return parts

    def all(self, frames: int) -> list[Part]:
        """So many rows of every episode."""
        return self.of([each for listed in self.episodes.values() for each in listed], frames)


def values(parts: Sequence[Part], site: str) -> Float[Tensor, "n d"]:
    """What a site holds in some rows."""
    return torch.cat([each.store.read(site, torch.from_numpy(each.rows)) for each in parts]).float()


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for more tasks than the suite has."""
    names = [task.id for task in get_suite(settings.suite).tasks]
    if max(settings.tasks) > len(names):
        raise ValueError(f"{settings.suite} has {len(names)} tasks, asked for {max(settings.tasks)}")
    sites = list(settings.sites) or sae_sites(context, SAESettings(suite=settings.suite, shipped=False))
    plans = [_tasks(context, names, draw) for draw in range(settings.draws)]
    own, same = _collected(context, settings, sites, names, plans)
    settings = replace(settings, frames=min(settings.frames, own.shortest, same.shortest))
    measured = cache(lambda: _measure(context, settings, sites, plans, own, same))
    each = context.table("autoencoders", lambda: measured()[0])
    features = context.table("features", lambda: measured()[1])
    table = summary(each, context.seed)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, each),
        tables={"autoencoders": each},
        figures=figures(table, features, max(settings.tasks)),
        notes=_notes(context, settings, each),
    )


def _tasks(context: Context, names: Sequence[str], draw: int) -> list[str]:
    """A draw's tasks, the first ones first."""
    order = np.random.default_rng((context.seed, draw)).permutation(len(names)).tolist()
    return [str(names[i]) for i in order]


def _collected(
    context: Context, settings: Settings, sites: Sequence[str], names: Sequence[str], plans: Sequence[Sequence[str]]
) -> tuple[Frames, Frames]:
    """What the sites hold in episodes to train on, as many of each task as a draw needs, and in held-out ones."""
    capture = Capture(list(sites), "mean", denoise_steps=frozenset({context.model.n_denoise_steps - 1}))
    options = replace(context.options, n_action_steps=1)

    def store(label: str, tasks: Sequence[str], episodes: int, seed: int) -> TokenStore:
        return collect(
            context.model, settings.suite, capture, episodes * len(tasks), seed, context.folder(label), tasks, options,
            context.model_name, progress=context.progress,
        )  # fmt: skip

    held_out = Frames([store("held_out", names, settings.held_out_episodes, context.seed)])
    stores, seed = [], context.seed + HELD_OUT
    for need, tasks in sorted(needed(settings, plans).items()):
        stores.append(store(f"episodes-{need}", tasks, need, seed))
        seed += need * len(tasks)
    return Frames(stores), held_out


def needed(settings: Settings, plans: Sequence[Sequence[str]]) -> dict[int, list[str]]:
    """How many episodes are needed, at most, of which tasks. plans: the tasks of every draw, in its order."""
    most: dict[str, int] = {}
    for tasks in plans:
        for n in settings.tasks:
            for task in tasks[:n]:
                most[task] = max(most.get(task, 0), settings.episodes // n)
    found: dict[int, list[str]] = {}
    for task in sorted(most):
        found.setdefault(most[task], []).append(task)
    return found


def _measure(
    context: Context, settings: Settings, sites: Sequence[str], plans: Sequence[Sequence[str]], own: Frames,
    same: Frames,
) -> tuple[pd.DataFrame, pd.DataFrame]:  # fmt: skip
    """One row for each autoencoder and what it is judged on; and features of the first draw on their own episodes."""
    rows, features, everything = [], [], same.all(settings.frames)
    for draw, tasks in enumerate(plans):
        rng = np.random.default_rng((context.seed, draw, 1))
        order = {task: [each[i] for i in rng.permutation(len(each))] for task, each in own.episodes.items()}
        for n in sorted(set(settings.tasks)):
            episodes = [each for task in tasks[:n] for each in order[task][: settings.episodes // n]]
            chosen = own.of(episodes, settings.frames)
            for sae in _trained(context, settings, sites, chosen, n, draw):
                for judged, parts in ((OWN, chosen), (SAME, everything)):
                    x, site = values(parts, sae.config.site), sae.config.site
                    report = _judge(sae, x, np.concatenate([each.episode for each in parts]), settings, draw)
                    about = {"site": site, "judged_on": judged, "tasks": n, "draw": draw}
                    rows.append({**about, **_numbers(report), "fvu": evaluate(sae, x).fvu, "frames": len(x),
                                 "episodes": report.statistics.n_episodes})  # fmt: skip
                    if judged == OWN and draw == 0:
                        features += _features(about, report)
    return pd.DataFrame(rows), pd.DataFrame(features)


def _trained(
    context: Context, settings: Settings, sites: Sequence[str], chosen: Sequence[Part], n: int, draw: int
) -> list[SparseAutoencoder]:
    """One autoencoder a site, of the chosen rows."""
    configs, rows = [], {site: values(chosen, site) for site in sites}
    for site, x in rows.items():
        d = x.shape[1]
        configs.append(preset(
            _PRESET, context.model_name, site, d, settings.steps, k=max(1, d // settings.width_over_k),
            batch_size=settings.batch_size, rate=settings.rate, aux_k=d // 2, seed=draw,
            dead_after=settings.batch_size * max(1, settings.steps // 5),
        ))  # fmt: skip
    out = context.folder("autoencoders") / f"draw-{draw}-tasks-{n}"
    there = [out / name for name in folder_names(configs)]
    if all((each / "sae.safetensors").is_file() for each in there):
        return [SparseAutoencoder.from_pretrained(each) for each in there]
    return train(TensorSource(rows, seed=draw), configs, out, progress=False)


@torch.no_grad()
def _judge(
    sae: SparseAutoencoder, x: Float[Tensor, "n d"], episode: Int64[np.ndarray, " n"], settings: Settings, draw: int
) -> GeneralityReport:
    steps = FeatureSteps.from_code(sae.encode_sparse(x), sae.config.n_features, episode)
    return generality(steps, PUBLISHED[settings.coefficients], n_shuffles=settings.n_shuffles, seed=draw)


def _numbers(report: GeneralityReport) -> dict[str, float]:
    alive = report.statistics.alive
    return {
        MEMORISED: 1 - report.general, NULL: 1 - report.general_null, "alive": int(alive.sum()),
        "probability": float(report.probability[alive].mean()),
        "frequency": float(np.median(report.statistics.frequency[alive])),
        "coverage": float(np.median(report.statistics.coverage[alive])),
        "frequency_correlation": report.frequency_correlation,
    }  # fmt: skip


def _features(about: Mapping[str, object], report: GeneralityReport) -> list[dict[str, object]]:
    statistics = report.statistics
    return [
        {**about, "feature": int(i), "frequency": float(statistics.frequency[i]),
         "general": float(report.probability[i]), "general_null": float(report.null[i])}
        for i in np.flatnonzero(statistics.alive)
    ]  # fmt: skip


def summary(each: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row for every site, what is judged and number of tasks: means over draws, with 95 % intervals of the share of
    memorised features and of its null."""
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {}
    for row in records(each):
        found.setdefault((row["site"], row["judged_on"], row["tasks"]), []).append(row)
    rows = []
    for (site, judged, tasks), part in found.items():
        draws = [row["draw"] for row in part]
        line: dict[str, object] = {"site": site, "judged_on": judged, "tasks": tasks, "draws": len(part)}
        for name in (MEMORISED, NULL):
            line |= dict(zip((name, f"{name}_low", f"{name}_high"),
                             interval_of([row[name] for row in part], draws, seed=seed), strict=True))  # fmt: skip
        means = ("probability", "frequency", "coverage", "frequency_correlation", "alive", "fvu", "frames", "episodes")
        rows.append(line | {name: float(np.mean([row[name] for row in part])) for name in means})
    return pd.DataFrame(rows).sort_values(by=["site", "judged_on", "tasks"], ignore_index=True)


def _verdicts(context: Context, settings: Settings, each: pd.DataFrame) -> list[Verdict]:
    falls, same = (
        _falls(context, settings, each, rule, judged) for rule, judged in zip(RULES, (OWN, SAME), strict=False)
    )
    beyond = _falls(context, settings, each, RULES[2], OWN, beyond=True)
    if falls.holds is not True:
        why = f"there is no fall that frequency could explain: {beyond.measured}"
        beyond = Verdict(RULES[2], None, why)
    return [falls, same, beyond]


def _falls(
    context: Context, settings: Settings, each: pd.DataFrame, rule: str, judged: str, beyond: bool = False
) -> Verdict:  # fmt: skip
    """Whether the share falls from the fewest tasks to the most, draw by draw; beyond: by more than the null's does."""
    few, many = min(settings.tasks), max(settings.tasks)
    rows = [row for row in records(each) if row["judged_on"] == judged]
    held, texts = [], []
    for site in dict.fromkeys(row["site"] for row in rows):
        by = {(row["tasks"], row["draw"]): row for row in rows if row["site"] == site}
        draws = sorted({draw for _, draw in by})
        changes = {name: [by[many, i][name] - by[few, i][name] for i in draws] for name in (MEMORISED, NULL)}
        both = np.array([changes[MEMORISED], changes[NULL]]).T
        decides = both[:, 0] - both[:, 1] if beyond else both[:, 0]
        change, low, high = interval_of(decides, draws, seed=context.seed)
        shares = {n: float(np.mean([by[n, i][MEMORISED] for i in draws])) for n in sorted(set(settings.tasks))}
        full = min(shares.values()) > _CEILING
        # a share that stays the same does not fall
        held.append(None if full else decide(low, high, -threshold(context, rule) - 1e-9, below=True))
        levels = ", ".join(f"{share:.1%} of {n}" for n, share in shares.items())
        null = f", shuffled {100 * both[:, 1].mean():+.1f}, by itself {100 * both[:, 0].mean():+.1f}" if beyond else ""
        why = "; nearly all are called memorised whatever was seen: a ceiling" if full else undecided(held[-1])
        texts.append(
            f"{short(site)}: {levels} tasks; change {100 * change:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
            f"{null}{why}"
        )
    holds = False if False in held else None if None in held else True
    return Verdict(rule, holds, "; ".join(texts))


def _notes(context: Context, settings: Settings, each: pd.DataFrame) -> list[str]:
    given = [row["frequency_correlation"] for row in records(each)]
    followed = [value for value in given if value == value]
    notes = [
        "One policy acts everywhere: what differs is which tasks an autoencoder has seen. In the publication policies "
        "differ too, and the number of frames; that a policy learns more general features from more diverse data is "
        "not asked here.",
        "Coefficients are the published ones, fitted on other policies' features; frames of one policy that plans at "
        f"every step, {settings.frames} of each episode; features as many as channels, of which one in "
        f"{settings.width_over_k} is active. Intervals are "
        "over draws of tasks.",
        "probability is the mean of P(general), which still differs where nearly all are beyond one half.",
        "The null shuffles steps over all episodes: frequency and size of a feature stay, when it comes does not.",
    ]
    if followed:
        notes.append(
            f"Rank correlation of P(general) and frequency over features: {min(followed):.2f} to {max(followed):.2f} "
            "in all autoencoders."
        )
    return notes
