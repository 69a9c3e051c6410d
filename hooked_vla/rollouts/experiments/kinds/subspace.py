"""Subspace injection: how few dimensions of a site decide which goal a policy pursues, and what else they decide.

Frames of unedited rollouts are told another goal; a sweep says where, and in which tokens, a whole patch carries it;
there, subspaces are fitted in several ways and compared on frames of other episodes, and in closed loop, where every
plan takes the donor's part in the subspace.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hooked_vla.analysis.das import Interchange
from hooked_vla.analysis.statistics import mcnemar
from hooked_vla.analysis.subspaces import Subspace, load_subspaces, random_subspace, save_subspaces, smallest_k
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.cells import spread_scenes
from hooked_vla.rollouts.experiments.compare import (
    RERUN,
    action_normalizer,
    compare,
    join,
    layout_of,
    read_runs,
    rerun,
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.kinds.battery_runs import gate_note, limited, records, settings_in, threshold
from hooked_vla.rollouts.experiments.kinds.subspace_arms import DonorArm, twin_of
from hooked_vla.rollouts.experiments.kinds.subspace_figures import effects, site_map, what_was_done
from hooked_vla.rollouts.experiments.kinds.subspace_fits import (
    ALL,
    DAS,
    PAIRED,
    RANDOM,
    Search,
    ToldPairs,
    choose_frames,
    choose_site,
    effect_curve,
    fit_subspaces,
    matching_strength,
    other_goals,
    patchable,
    sweep_sites,
    told_otherwise,
)
from hooked_vla.rollouts.experiments.kinds.subspace_goals import far_donors, goal_table, share
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import Told, ToldArm
from hooked_vla.rollouts.labelled import FrameRecorder, read_frames
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.tabletop.tasks import find_task

with needs_analysis_extra():
    import pandas as pd

# episodes that subspaces are fitted on start from seeds of their own
_FIT_SEED = 50_000
# of those, one in so many is held out
_HELD_OUT = 3
_SHARE = 0.9
TOLD, WHOLE = "told the donor's goal", "all dimensions"
# a whole patch that seldom switches the goal says that it is decided elsewhere
_DECIDES = 0.5


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm in closed loop. fit_episodes: unedited ones whose frames serve to fit. pairs, held_out:
    frames told another goal to fit on, and of other episodes to evaluate on. sizes: dimensions of the curve;
    closed_sizes: those that DAS and the pairs' components also run in closed loop with. steps, batch, rate: of the
    search by DAS. sites: where a goal may be carried; tokens: segments, "all" for the whole stream; enough: of the way
    to the other goal's actions that a whole patch must lead for a site to be chosen. max_steps: after which an episode
    has failed."""

    episodes: int
    fit_episodes: int
    pairs: int
    held_out: int
    sizes: tuple[int, ...]
    closed_sizes: tuple[int, ...]
    steps: int
    batch: int
    rate: float
    suite: str = "goal"
    sites: tuple[str, ...] = ("vlm.hook_tokens", "vlm.blocks.*.hook_resid_post", "adapter.blocks.*.hook_resid_post")
    tokens: tuple[str, ...] = ("language", "image:*", ALL)
    enough: float = 0.9
    max_steps: int = 90

    def __post_init__(self) -> None:
        if not set(self.closed_sizes) <= set(self.sizes):
            raise ValueError(f"closed_sizes {list(self.closed_sizes)} must be among sizes {list(self.sizes)}")


@dataclass(frozen=True, eq=False)
class Fits:
    """What was fitted, and where. curve: `effect_curve`. k: the fewest dimensions of any method with `_SHARE` of the
    whole patch's effect on held-out frames; stretch: what makes random swaps of as many move tokens as far as DAS."""

    site: str
    tokens: str
    subspaces: Mapping[str, Subspace]
    curve: pd.DataFrame
    k: int
    stretch: float

    @property
    def full(self) -> float:
        """Effect of all dimensions."""
        return next(row["effect"] for row in records(self.curve) if row["method"] == ALL)

    @property
    def name(self) -> str:
        """Site and tokens, in words."""
        return f"{self.site}, {self.tokens} tokens"


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a suite whose tasks are not blocks and pads, and a model without a site to patch."""
    far_donors(settings.suite)
    train, test = _pairs(context, settings)
    sites = context.table(
        "sites",
        lambda: sweep_sites(
            context.model, test, patchable(context.model, settings.sites), _segments(context, settings, test)
        ),
    )
    fits = _fit(context, settings, sites, train, test)
    table, goals = _closed_loop(context, settings, fits)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, fits, table, goals),
        tables={"fewest": pd.DataFrame(_fewest_rows(fits))},
        figures={
            "goals": (what_was_done(table), f"What episodes did while tokens took the donor's part, at {fits.name}."),
            "curve": (effects(fits.curve.loc[fits.curve["method"] != ALL], fits.full, fits.name),
                      "Held-out frames: how far swaps of k dimensions lead from one goal's actions to the other's"),
            "sites": (site_map(sites), "Where the goal is: whole patches from the run that was told the other goal"),
        },
        labels=_labels(fits),
        notes=_notes(settings, fits, sites),
    )  # fmt: skip


def _pairs(context: Context, settings: Settings) -> tuple[ToldPairs, ToldPairs]:
    """Frames of unedited rollouts, told another goal: of episodes to fit on, and of others."""
    options = limited(context, settings.max_steps)
    prepared = settings_in(context, settings.suite, options)
    folder = context.folder("frames")
    context.rollouts(
        "fit", settings.suite, episodes=settings.fit_episodes, seed=context.seed + _FIT_SEED, options=options,
        watchers=[FrameRecorder(folder, prepared.n_action_steps)],
    )  # fmt: skip
    suite, found = get_suite(settings.suite), []
    goals = {task.id: _goal(settings.suite, task.id) for task in suite.tasks}
    frames = read_frames(folder)
    for n, held_out in ((settings.pairs, False), (settings.held_out, True)):
        mine = [each for each in frames if (each.episode % _HELD_OUT == 0) == held_out]
        chosen = choose_frames(mine, n, context.seed)
        others = other_goals(chosen, suite, goals, context.seed)
        found.append(told_otherwise(context.model, prepared, suite, chosen, others))
    return found[0], found[1]


def _goal(suite: str, task: str) -> tuple[str, str]:
    found = find_task(suite, task)
    return found.block, found.pad


def _segments(context: Context, settings: Settings, told: ToldPairs) -> list[str]:
    """The segments that the model's own stream has."""
    there = context.model.segments(told.pairs.base)["vlm"].present()
    return [
        each
        for each in settings.tokens
        if each == ALL or any(name == each or (each.endswith("*") and name.startswith(each[:-1])) for name in there)
    ]


def _fit(context: Context, settings: Settings, sites: pd.DataFrame, train: ToldPairs, test: ToldPairs) -> Fits:
    site, tokens = choose_site(sites, settings.enough)
    segment = None if tokens == ALL else tokens
    held_out = Interchange(context.model, test.pairs, site, segment)
    path = context.folder("subspaces") / "subspaces.safetensors"
    swaps = Interchange(context.model, train.pairs, site, segment)
    if not path.is_file():
        search = Search(settings.steps, settings.batch, settings.rate)
        found, losses = fit_subspaces(swaps, train, settings.sizes, search, context.seed)
        context.table("losses", lambda: pd.DataFrame({"step": range(len(losses)), "loss": losses}))
        save_subspaces(path, found)
    subspaces = load_subspaces(path)
    curve = context.table("curve", lambda: effect_curve(held_out, test, subspaces, settings.sizes))
    enough = [k for method in subspaces if (k := _fewest(curve, method)) is not None]
    k = min(enough, default=subspaces[DAS].k)
    stretch = matching_strength(swaps, subspaces[RANDOM].first(k), subspaces[DAS].first(k))
    return Fits(site, tokens, subspaces, curve, k, stretch)


def _arms(context: Context, settings: Settings, fits: Fits) -> tuple[list[Arm], dict[str, tuple[str, int]]]:
    """The arms, and the method and number of dimensions of those that swap."""
    suite = get_suite(settings.suite)
    donors = {task: suite.task(donor).instruction for task, donor in far_donors(settings.suite).items()}
    prepared, twin = settings_in(context, settings.suite, limited(context, settings.max_steps)), twin_of(context.model)
    segment, d = None if fits.tokens == ALL else fits.tokens, fits.subspaces[DAS].d
    names = [task.id for task in suite.tasks]
    told = {scene: donors[scene.task] for scene in spread_scenes(names, settings.episodes, context.seed)}
    arms: list[Arm] = [ToldArm(TOLD, [Told(told)])]
    about: dict[str, tuple[str, int]] = {}

    def add(name: str, method: str, space: Subspace | None, strength: float = 1.0) -> None:
        arms.append(DonorArm(name, donors, fits.site, segment, space, strength, twin, prepared))
        about[name] = (method, d if space is None else space.k)

    add(WHOLE, ALL, None)
    for method, space in fits.subspaces.items():
        sizes = {fits.k, *(settings.closed_sizes if method in (DAS, PAIRED) else ())}
        for k in sorted({min(size, space.k) for size in sizes}):
            add(f"{method} k={k}", method, space.first(k))
    again = random_subspace(d, fits.k, context.seed + 1, fits.site)
    add(f"another {RANDOM} k={fits.k}", RANDOM, again)
    add(f"{RANDOM} k={fits.k}, as far as {DAS}", RANDOM, fits.subspaces[RANDOM].first(fits.k), fits.stretch)
    return arms, about


def _closed_loop(context: Context, settings: Settings, fits: Fits) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The comparison with what each arm did, and one row an episode of the latter."""
    arms, about = _arms(context, settings, fits)
    options = limited(context, settings.max_steps)
    done = context.rollouts("closed_loop", settings.suite, [BASELINE, *arms], settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    compared = compare(
        join(read_runs(done), read_runs(again, {BASELINE.name: RERUN})), layout_of(settings.suite),
        action_normalizer(context.model), seed=context.seed,
    )  # fmt: skip
    goals = context.table("goals", lambda: goal_table(done, far_donors(settings.suite)))
    rows: list[dict[str, Any]] = []
    for row in records(compared):
        mine = goals.loc[goals["arm"] == row["arm"]]
        if row["arm"] == RERUN:
            continue
        method, k = about.get(row["arm"], ("", 0))
        shares = [share(mine, column) for column in ("switched", "own", "lifted", "switched_block")]
        kept = ("displacement", "displacement_low", "displacement_high", "floor", "baseline_success")
        rows.append(
            {"suite": row["suite"], "arm": row["arm"], "method": method, "k": k, "n": row["n"]}
            | {name: value for each in shares for name, value in each.items()}
            | {name: row[name] for name in kept}
        )
    return pd.DataFrame(rows), goals


def _fewest(curve: pd.DataFrame, method: str) -> int | None:
    """The fewest dimensions of a method with `_SHARE` of the whole patch's effect on held-out frames; None where no
    number has, and where the whole patch has no effect."""
    full = next(row["effect"] for row in records(curve) if row["method"] == ALL)
    effect = {row["k"]: row["effect"] for row in records(curve) if row["method"] == method}
    return smallest_k(effect, full, _SHARE) if full > 0 else None


def _fewest_rows(fits: Fits) -> list[dict[str, Any]]:
    """For each method, the fewest dimensions that suffice, and how it lies to DAS."""
    rows = []
    for method, space in fits.subspaces.items():
        effects = [row["effect"] for row in records(fits.curve) if row["method"] == method]
        overlap = fits.subspaces[DAS].first(fits.k).overlap(space.first(min(fits.k, space.k)))
        rows.append(
            {"method": method, "fewest": _fewest(fits.curve, method), "of": space.d, "dimensions": space.k,
             "largest_effect": max(effects), "whole_patch": fits.full, "overlap_with_das": overlap}
        )  # fmt: skip
    return rows


def _verdicts(
    context: Context, settings: Settings, fits: Fits, table: pd.DataFrame, goals: pd.DataFrame
) -> list[Verdict]:
    rows = {row["arm"]: row for row in records(table)}
    rules = ("few-dimensions", "grasp-kept", "random-control")
    base = pd.DataFrame([{"suite": settings.suite, "arm": BASELINE.name, "success": rows[BASELINE.name]["own"]}])
    whole = rows[WHOLE]["switched"]
    why = gate_note(base, settings.suite)
    if why is None and whole < _DECIDES:
        why = f"a patch of all dimensions at {fits.site} switches the goal in {whole:.0%}: it is decided elsewhere"
    if why is not None:
        return [Verdict(rule, None, why) for rule in rules]
    most, grasp, chance = (threshold(context, rule) for rule in rules)
    found = [row for row in rows.values() if row["method"] not in ("", ALL, RANDOM)]
    judged = next(row for row in found if (row["method"], row["k"]) == _chosen(fits))
    every = ", ".join(f"{row['arm']} {row['switched']:.0%}" for row in found if row is not judged)
    few = Verdict(
        rules[0],
        judged["switched"] >= _SHARE * whole and judged["k"] <= most,
        f"{judged['arm']}, which was chosen on held-out frames: {judged['switched']:.0%} ({judged['switched_low']:.0%} "
        f"to {judged['switched_high']:.0%}); all {fits.subspaces[DAS].d} dimensions {whole:.0%}; beside it, {every}",
    )
    kept = Verdict(
        rules[1],
        judged["lifted"] >= grasp,
        f"{judged['arm']}: some block is lifted in {judged['lifted']:.0%} of {judged['n']} episodes "
        f"({judged['lifted_low']:.0%} to {judged['lifted_high']:.0%}), in the baseline in "
        f"{rows[BASELINE.name]['lifted']:.0%}",
    )
    return [few, kept, _random_verdict(rules[2], chance, table, goals, judged["arm"])]


def _chosen(fits: Fits) -> tuple[str, int]:
    """The method with the fewest dimensions that suffice on held-out frames, and their number; of several the one with
    the larger effect there, and DAS where none suffices."""
    effect = {row["method"]: row["effect"] for row in records(fits.curve) if row["k"] == fits.k}
    enough = [method for method in fits.subspaces if method != RANDOM and _fewest(fits.curve, method) == fits.k]
    return max(enough, key=lambda method: effect[method], default=DAS), fits.k


def _random_verdict(rule: str, chance: float, table: pd.DataFrame, goals: pd.DataFrame, other: str) -> Verdict:
    mine = [row for row in records(table) if row["method"] == RANDOM]
    said = []
    switched = {
        arm: part.sort_values(["task", "seed"])["switched"].to_numpy(bool) for arm, part in goals.groupby("arm")
    }
    for row in mine:
        p = mcnemar(switched[other], switched[row["arm"]]).p_value
        said.append(f"{row['arm']}: {row['switched']:.0%} (p = {p:.2g} against {other})")
    return Verdict(rule, all(row["switched"] <= chance for row in mine), "; ".join(said))


def _labels(fits: Fits) -> list[str]:
    if fits.tokens != ALL:
        return []
    return [
        f"replay: a patch of all tokens and all dimensions at {fits.site} is the run that was told the other goal, as "
        "far as later layers decide; it is the ceiling here, and no evidence."
    ]


def _notes(settings: Settings, fits: Fits, sites: pd.DataFrame) -> list[str]:
    each = ", ".join(f"{row['site']} {row['recovery']:.0%}" for row in records(sites) if row["tokens"] == ALL)
    return [
        f"The site was chosen by the sweep: the last one at which a whole patch leads {settings.enough:.0%} of the way "
        f"(whole stream: {each}). Where a policy's expert reads the keys and values of every layer, a late site alone "
        "carries only what the layers after it add.",
        "Donor and acting run see the same pictures and state at every plan; only the instruction differs. So nothing "
        "of a scene can be carried over, and a whole patch keeps grasping by construction.",
        f"The chosen number of dimensions ({fits.k}) is the fewest with which a method has {_SHARE:.0%} of the whole "
        "patch's effect on frames of episodes that it was not fitted on; all methods run with as many, or all they "
        "have. DAS begins at the principal components of the pairs' differences.",
        f"The stream is {fits.subspaces[DAS].d} wide, and those of published policies are far wider: what counts of a "
        "number of dimensions that suffices is its share of these.",
        "Random swaps move tokens less than those of DAS; one arm makes them as long, by a factor of "
        f"{fits.stretch:.1f}.",
        "The donor's goal counts as done when its block lay on its pad and was let go at any step; doing the told "
        "goal ends an episode. Donors mean another block and another pad.",
    ]
