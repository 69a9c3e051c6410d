"""Features that tell concepts, ablated beside random and frequent ones: how many must go until the policy fails?

Three sets of starts are kept apart. Concepts are found in an index over the policy's own episodes, on some of their
seeds, and confirmed on the others, within tasks (sae/concepts.py); what ablating them does is judged on the run's
seeds; the autoencoder, where this run trains it, has seen others still.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float64

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE
from hooked_vla.rollouts.experiments.compare import FLAGS, Runs, mean_with_interval
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import change_interval, decide, interval_of, undecided
from hooked_vla.rollouts.experiments.kinds.autoencoders import (
    SAESettings,
    activations,
    autoencoders,
    origin_notes,
    sae_sites,
)
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    ALPHA,
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
from hooked_vla.rollouts.experiments.kinds.concepts_arms import (
    ALL,
    CONCEPT,
    FREQUENT,
    MATCHED,
    RANDOM,
    SHAM,
    TARGETED,
    Ablation,
    concept_ablations,
    confirmed,
    orders,
    short,
    taken_away,
    titration,
)
from hooked_vla.rollouts.experiments.kinds.concepts_figures import figures, phases_reached
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.sae.feature_index import FeatureIndex
from hooked_vla.rollouts.sae.index import build_index
from hooked_vla.rollouts.sae.training import HELD_OUT
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.sae.autoencoder import SparseAutoencoder
from hooked_vla.sae.store import TokenStore

with needs_analysis_extra():
    import pandas as pd

# a policy has failed when it succeeds half as often as it did
_FAILED = 0.5
RULES = ("concepts-hold", "targeted-over-random", "random-needs-more", "targeted-over-frequent")


@dataclass(frozen=True, kw_only=True)
class Settings(SAESettings):
    """episodes: of every arm. max_steps: of an episode. concept_episodes: that concepts are found in, of concept_tasks
    tasks. counts: how many features are ablated, as far as so many are alive; a top-k autoencoder takes 64 at most.
    small: up to how many of these count as few. n_random: orders of random features. concept_features: ablated of a
    single concept; n_concepts: that are ablated."""

    episodes: int
    max_steps: int
    concept_episodes: int
    concept_tasks: int
    counts: tuple[int, ...]
    small: int
    n_random: int
    concept_features: int
    n_concepts: int

    def __post_init__(self) -> None:
        """Raises ValueError as SAESettings, and for counts or other numbers below 1, and small below all counts."""
        super().__post_init__()
        others = ("n_random", "concept_features", "n_concepts", "concept_tasks")
        if min(*self.counts, *(getattr(self, name) for name in others)) < 1:
            raise ValueError(f"counts, {', '.join(others)} must be at least 1")
        if self.small < min(self.counts):
            raise ValueError(f"none of the counts {list(self.counts)} is as small as {self.small}")


@dataclass(frozen=True)
class _Site:
    """An autoencoder and what its index says."""

    sae: SparseAutoencoder
    index: FeatureIndex
    store: TokenStore
    ablations: tuple[Ablation, ...]


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model without blocks to look at, and more tasks than the suite has."""
    saes, trained = _saes(context, settings)
    store = _collected(context, settings, [sae.config.site for sae in saes])
    sites = [_site(context, settings, sae, store) for sae in saes]
    ablations = [each for site in sites for each in site.ablations]
    options = limited(context, settings.max_steps)
    main = roll_suite(context, settings.suite, [each.arm for each in ablations], settings.episodes, options)
    runs = with_rerun(context, main, settings.suite, settings.episodes, options)
    comparison = compare_suites(context, [runs])
    table = _table(context, sites, comparison)
    concepts = _concepts(sites)
    failure = failures(runs, settings, ablations, context.seed)
    phases = phases_reached(main, [(each.arm.name, each) for each in ablations if each.kind in (CONCEPT, MATCHED)])
    told = confirmed(concepts)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, runs, ablations, table, concepts, failure),
        tables={
            "features_to_failure": failure, "concepts": _best(concepts), "concept_features": told, "phases": phases,
            "autoencoders": trained,
        },
        figures=figures(table, phases),
        notes=_notes(table, concepts, len(told)) + origin_notes(trained, settings),
    )  # fmt: skip


def _saes(context: Context, settings: Settings) -> tuple[list[SparseAutoencoder], pd.DataFrame]:
    """One autoencoder a pathway, of the middle one of its sites that there are, unless sites are asked for; and their
    table."""
    sites = sae_sites(context, settings)
    if not settings.sites:
        by_pathway: dict[str, list[str]] = {}
        for site in sites:
            by_pathway.setdefault(site.partition(".")[0], []).append(site)
        sites = [each[(len(each) - 1) // 2] for each in by_pathway.values()]
    return autoencoders(context, sites, settings)


def _collected(context: Context, settings: Settings, sites: Sequence[str]) -> TokenStore:
    """Activations in episodes that neither trained an autoencoder nor judge it, of some tasks, spread over all."""
    names = [task.id for task in get_suite(settings.suite).tasks]
    if settings.concept_tasks > len(names):
        raise ValueError(f"{settings.suite} has {len(names)} tasks, concepts are asked for in {settings.concept_tasks}")
    tasks = [names[i * len(names) // settings.concept_tasks] for i in range(settings.concept_tasks)]
    return activations(
        context, sites, settings, settings.concept_episodes, "concepts", tasks=tasks,
        seed=context.seed + 2 * HELD_OUT,
    )  # fmt: skip


def _site(context: Context, settings: Settings, sae: SparseAutoencoder, store: TokenStore) -> _Site:
    """An autoencoder's index, and the arms that follow from it."""
    index = build_index(store, sae, context.folder("index") / sae.config.site, progress=context.progress)
    arms = [
        *titration(sae, orders(index, settings.n_random, context.seed), settings.counts),
        *concept_ablations(sae, index, settings.concept_features, settings.n_concepts, context.seed),
    ]
    return _Site(sae, index, store, tuple(arms))


def _table(context: Context, sites: Sequence[_Site], comparison: pd.DataFrame) -> pd.DataFrame:
    """The comparison with what each arm ablates: kind, set, n_features, how frequent these are and how much of a token
    they are."""

    def make() -> pd.DataFrame:
        rows = []
        for site in sites:
            taken = taken_away(site.sae, site.store, [each.features for each in site.ablations])
            density = site.index.sql("SELECT density FROM features ORDER BY feature")["density"].to_numpy()
            for each, size in zip(site.ablations, taken, strict=True):
                rows.append(
                    {"arm": each.arm.name, "site": each.site, "kind": each.kind, "set": each.set,
                     "n_features": len(each.features), "density": float(density[list(each.features)].mean()),
                     "taken_away": 0.0 if each.kind == SHAM else float(size)}
                )  # fmt: skip
        return pd.DataFrame(rows)

    about = context.table("ablations", make)
    by_arm = {row.pop("arm"): row for row in records(about)}
    rows = []
    for row in records(comparison):
        own = by_arm.get(row["arm"], {"kind": row["arm"], "n_features": 0, "density": 0.0, "taken_away": 0.0})
        rows.append({"suite": row["suite"], "site": "", "kind": "", "set": "", **own, **row})
    return pd.DataFrame(rows).astype(dict.fromkeys(FLAGS, "boolean"))


def _concepts(sites: Sequence[_Site]) -> pd.DataFrame:
    """Every concept's best features, on the seeds they were chosen on and on the held-out ones."""
    rows, columns = [], ["site"]
    for site in sites:
        found = site.index.sql("SELECT * FROM concepts ORDER BY kind, value, place")
        columns = ["site", *found.columns]
        rows += [{"site": site.sae.config.site, **row} for row in records(found)]
    return pd.DataFrame(rows, columns=columns)


def _best(concepts: pd.DataFrame) -> pd.DataFrame:
    """The best feature of every concept, with how many of the chosen ones are confirmed; confounded ones last."""
    rows, n = [row for row in records(concepts) if row["place"] == 0], dict[tuple[str, ...], int]()
    for row in records(concepts):
        key = row["site"], row["kind"], row["value"]
        n[key] = n.get(key, 0) + int(row["is_confirmed"])
    for row in rows:
        del row["place"]
        row["confirmed"] = n[row["site"], row["kind"], row["value"]]
    rows.sort(key=lambda row: (row["is_confounded"], row["site"], -row["score"]))
    return pd.DataFrame(rows, columns=[*(name for name in concepts.columns if name != "place"), "confirmed"])


def failures(runs: Runs, settings: Settings, ablations: Sequence[Ablation], seed: int) -> pd.DataFrame:
    """For every site, how many features must go until success is half of the baseline's, frequent and random ones.

    Both orders end with all features that are ever active. frequent, random: numbers of features, NaN where half of the
    success is left even then; ratio: random over frequent, with its 95 % interval by tasks (ratio_low, ratio_high),
    of the draws that were made; draws: the numbers of each draw of random ones, in words; at_most: the fewest features
    that were ablated were enough in the frequent order, so that frequent is an upper bound.
    """
    rows = []
    for site in dict.fromkeys(each.site for each in ablations):
        own = [each for each in ablations if each.site == site]
        named = {(each.kind, each.set, len(each.features)): each.arm.name for each in own}
        whole = next(each for each in own if each.kind == ALL)
        counts = sorted({len(each.features) for each in own if each.kind == FREQUENT} - {len(whole.features)})
        orders_of = [(FREQUENT, ""), *((RANDOM, str(draw)) for draw in range(settings.n_random))]
        arms = [name for order in orders_of for name in (*(named[*order, n] for n in counts), whole.arm.name)]
        counts.append(len(whole.features))
        change, tasks = changes(runs, settings.suite, arms)
        columns = np.column_stack([np.zeros(len(change)), change]) + _base(runs, settings.suite)[:, None]
        means = columns.mean(0, keepdims=True)
        frequent, random = (float(each[0]) for each in _both(means, counts))
        of_draws, half = means[0, 1:].reshape(-1, len(counts))[1:], _FAILED * means[0, 0]
        draws = until_failure(of_draws, counts, np.full(len(of_draws), half))
        estimate, low, high = interval_of(columns, tasks, partial(_ratio, counts=counts), seed)
        if np.isinf(frequent):
            frequent = random = estimate = low = high = float("nan")
        rows.append(
            {"site": site, FREQUENT: frequent, RANDOM: random, "ratio": estimate, "ratio_low": low, "ratio_high": high,
             "draws": ", ".join(_reached(each, counts) for each in draws), "at_most": frequent <= counts[0],
             "alive": counts[-1]}
        )  # fmt: skip
    return pd.DataFrame(rows)


def _reached(n: float, counts: Sequence[int]) -> str:
    """A number of features to failure in words: beyond the last count but all, nothing is known but that."""
    if np.isinf(n):
        return f"none of {counts[-1]}"
    return f"more than {counts[-2]}" if len(counts) > 1 and n > counts[-2] else f"{n:.1f}"


def _base(runs: Runs, suite: str) -> Float64[np.ndarray, " scene"]:
    """Success of the baseline's episodes, in the order of `changes`."""
    found = [row["success"] for row in records(runs.episodes) if (row["suite"], row["arm"]) == (suite, BASELINE.name)]
    return np.array(found, np.float64)


def _both(means: np.ndarray, counts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Features to failure, frequent and random, from mean success: the baseline's, then of every order by counts."""
    parts, limit = means[:, 1:].reshape(len(means), -1, len(counts)), _FAILED * means[:, 0]
    return until_failure(parts[:, 0], counts, limit), until_failure(parts[:, 1:].mean(1), counts, limit)


def _ratio(means: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    few, many = (np.minimum(each, counts[-1]) for each in _both(means, counts))
    return many / few


def until_failure(success: np.ndarray, counts: Sequence[int], limit: np.ndarray) -> np.ndarray:
    """The number of features at which success first falls to a limit, between counts by interpolation of their
    logarithms; infinite where it does not. success: [draw count]; limit: [draw]."""
    found = np.full(len(success), np.inf)
    logs = np.log(np.asarray(counts, float))
    for i in reversed(range(len(counts))):
        below = success[:, i] <= limit
        at = np.full(len(success), logs[i])
        if i:
            fall = success[:, i - 1] - success[:, i]
            share = np.divide(success[:, i - 1] - limit, fall, out=np.ones_like(fall), where=fall > 0)
            at = logs[i - 1] + (logs[i] - logs[i - 1]) * share.clip(0, 1)
        found = np.where(below, np.exp(at), found)
    return found


def _verdicts(
    context: Context, settings: Settings, runs: Runs, ablations: Sequence[Ablation], table: pd.DataFrame,
    concepts: pd.DataFrame, failure: pd.DataFrame,
) -> list[Verdict]:  # fmt: skip
    first = _concepts_hold(context, concepts)
    if why := gate_note(table, settings.suite):
        return [first, *(Verdict(rule, None, why) for rule in RULES[1:])]
    return [
        first,
        _costs_more(context, settings, runs, ablations, RULES[1], RANDOM),
        _needs_more(context, failure, table),
        _costs_more(context, settings, runs, ablations, RULES[3], FREQUENT),
    ]


def _concepts_hold(context: Context, concepts: pd.DataFrame) -> Verdict:
    first = [row for row in records(concepts) if row["place"] == 0]
    best = [row for row in first if not row["is_confounded"]]
    if not best:
        return Verdict(RULES[0], None, "no label has steps with and without it in one task")
    n = sum(bool(row["is_confirmed"]) for row in best)
    chance = sum(row["p_value"] > ALPHA for row in best)
    within = float(np.nanmedian([row["held_out_within"] for row in best]))
    return Verdict(
        RULES[0], n / len(best) >= threshold(context, RULES[0]),
        f"{n} of {len(best)} concepts ({n / len(best):.0%}); the best features' d within tasks on held-out seeds has "
        f"the median {within:.2f}; {chance} score no higher than labels moved at random do. {len(first) - len(best)} "
        "others go with the task and are not counted",
    )  # fmt: skip


def _costs_more(
    context: Context, settings: Settings, runs: Runs, ablations: Sequence[Ablation], rule: str, than: str
) -> Verdict:
    """Success under features of concepts against success under as many others, at the counts that both have."""
    held, texts = [], []
    for site in dict.fromkeys(each.site for each in ablations):
        mine = {len(each.features): each.arm.name for each in ablations
                if (each.site, each.kind) == (site, TARGETED) and len(each.features) <= settings.small}  # fmt: skip
        if not mine:
            held.append(None)
            texts.append(f"{short(site)}: fewer features tell a concept than any of the counts")
            continue
        theirs = [each.arm.name for each in ablations
                  if (each.site, each.kind) == (site, than) and len(each.features) in mine]  # fmt: skip
        own, tasks = changes(runs, settings.suite, list(mine.values()))
        other, _ = changes(runs, settings.suite, theirs)
        more, low, high = change_interval(other.mean(1) - own.mean(1), tasks, seed=context.seed)
        # no difference at all is not more
        held.append(decide(low, high, threshold(context, rule) + 1e-9, below=False))
        texts.append(
            f"{short(site)}: {points(-own.mean())} against {points(-other.mean())} lost, {points(more)} more "
            f"({points(low)} to {points(high)}) at n = {', '.join(map(str, mine))}{undecided(held[-1])}"
        )
    return Verdict(rule, _all(held), "; ".join(texts))


def _needs_more(context: Context, failure: pd.DataFrame, table: pd.DataFrame) -> Verdict:
    left = {row["site"]: row["success"] for row in records(table) if row["kind"] == ALL}
    held, texts = [], []
    for row in records(failure):
        where, rest = short(row["site"]), f"{left[row['site']]:.0%} without any of the {row['alive']} that are alive"
        if np.isnan(row["ratio"]):
            held.append(None)
            texts.append(f"{where}: success is {rest}, so that it does not depend on them")
            continue
        held.append(decide(row["ratio_low"], row["ratio_high"], threshold(context, RULES[2]), below=False))
        few = f"{row[FREQUENT]:.1f}" + (" or fewer" if row["at_most"] else "")
        texts.append(
            f"{where}: {few} frequent ones, {row[RANDOM]:.1f} random ones (each draw: {row['draws']}), "
            f"{row['ratio']:.1f} times as many ({row['ratio_low']:.1f} to {row['ratio_high']:.1f} by tasks, for these "
            f"draws); success is {rest}{undecided(held[-1])}"
        )
    return Verdict(RULES[2], _all(held), "; ".join(texts))


def _all(held: Sequence[bool | None]) -> bool | None:
    """Of all sites: what holds at every one, and what does not at one of them."""
    return False if False in held else None if None in held else True


def _notes(table: pd.DataFrame, concepts: pd.DataFrame, n_told: int) -> list[str]:
    rows = records(table)
    sham = [row for row in rows if row["kind"] == SHAM]
    still = all(row["displacement"] == 0 for row in sham)
    moved = mean_with_interval([row["displacement"] for row in sham], [row["site"] for row in sham])[0]
    went = sorted({f"{row['kind']}={row['value']}" for row in records(concepts) if row["is_confounded"]})
    notes = [
        "The sham, an edit that leaves as many features as they are, "
        + ("moves nothing." if still else f"moves the end effector by {moved:.3g} m: edits are not exact."),
        f"{n_told} times a feature tells a concept; how much of a token each set is stands under taken_away, and "
        "success over it in the second figure. Where all orders lie on one curve there, it is the amount that counts, "
        "not which features it is.",
        "What is chosen by d × frequency is frequent: the most frequent features, and for single concepts others of "
        "the same frequency (matched), stand beside.",
        "Ablation sets features to 0 at all tokens of the site, denoise steps and plans; what the autoencoder misses "
        "of a token is kept.",
    ]
    if went:
        notes.append(
            f"No task has ten held-out steps with and ten without {', '.join(went)}: features of these cannot be told "
            "from those of tasks, so that they are not ablated."
        )
    return notes
