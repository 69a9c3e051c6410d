"""Injection by token segment: do the language tokens carry the goal, how deep, and do other tokens carry it too?

The policy is told a filler prompt of as many tokens as its own, so that the language tokens' places are there to be
seen; then the language tokens of the instructed run, and nothing else, are put into one layer's residual stream, or
into what the expert reads of the prefix. As many random other tokens are the control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.inputs import LANGUAGE, PAD
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import is_dead_end
from hooked_vla.interventions.injection_sites import PREFIX_KV, choose_sites, residual_sites
from hooked_vla.rollouts.activation_reader import ActivationRecording
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.experiments.compare import (
    RERUN,
    Runs,
    action_normalizer,
    compare,
    join,
    layout_of,
    read_runs,
    rerun,
)
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.figures import curve, success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_runs import Recorded, fillers, gate, reach_of, record
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import InjectionArm, Told, ToldArm, open_recording, same_scene

with needs_analysis_extra():
    import pandas as pd

NULL, RANDOM = "null", "random"
EVERY = "every layer"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. max_steps: after which an episode has failed. gate: the
    least success of the baseline. draws: sets of random tokens for each place."""

    episodes: int
    suite: str = "goal"
    max_steps: int = 72
    gate: float = 0.9
    draws: int = 1


@dataclass(frozen=True)
class Place:
    """Where tokens are injected. depth: of its layer along vlm and expert, None for what is not one layer."""

    name: str
    sites: tuple[str, ...]
    depth: int | None


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model that reads no text, or has no residual stream with language tokens."""
    every = list(dict.fromkeys([*residual_sites(context.model), *_prefix(context)]))
    options = limited(context, settings.max_steps)
    source = record(context, "source", settings.suite, every, settings.episodes, options)
    places = find_places(context, open_recording(source.folder))
    main = _run_arms(context, settings, source, places)
    table = restored(
        compare(main, layout_of(settings.suite), action_normalizer(context.model), seed=context.seed), places
    )
    table.insert(4, "label", _labels_of(context, settings, source, places, table))
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, source, table),
        figures=_figures(table),
        labels=_labels(table),
        notes=_notes(settings, context, source, places),
    )


def _prefix(context: Context) -> list[str]:
    try:
        return choose_sites(context.model, PREFIX_KV)
    except ValueError:
        return []


def find_places(context: Context, recording: ActivationRecording) -> list[Place]:
    """Every residual site with language tokens, in order; all those of the vlm together; and the prefix's keys and
    values, where the expert reads such.

    Raises ValueError where no residual site has language tokens.
    """
    single = [site for site in residual_sites(context.model) if LANGUAGE in _present(recording, site)]
    if not single:
        raise ValueError(f"no residual stream of {context.model_name} has language tokens")
    found = [Place(site, (site,), depth) for depth, site in enumerate(single)]
    way = hook_names.pathway(single[0])
    found.append(Place(f"{way}, {EVERY}", tuple(s for s in single if s.startswith(f"{way}.")), None))
    if sites := [site for site in _prefix(context) if LANGUAGE in _present(recording, site)]:
        found.append(Place(f"prefix keys and values, {EVERY}", tuple(sites), None))
    return found


def _present(recording: ActivationRecording, site: str) -> list[str]:
    episode, env_step, step = recording.keys(site)[0]
    return recording.segments(
        episode, env_step, site, step, recording.token_axes(episode, env_step, site, step)[0]
    ).present()


def random_tokens(recording: ActivationRecording, site: str, seed: int) -> tuple[int, ...]:
    """As many places of the site's token axis as it has language tokens, drawn from those that are neither language nor
    padding. Raises ValueError where there are fewer."""
    episode, env_step, step = recording.keys(site)[0]
    segments = recording.segments(episode, env_step, site, step, recording.token_axes(episode, env_step, site, step)[0])
    labels = np.array([segments.names[i] for i in segments.labels[0].tolist()])
    others, n = np.flatnonzero((labels != LANGUAGE) & (labels != PAD)), int((labels == LANGUAGE).sum())
    if len(others) < n:
        raise ValueError(f"{site} has {n} language tokens, but only {len(others)} others to draw from")
    return tuple(sorted(np.random.default_rng(seed).choice(others, n, replace=False).tolist()))


def _run_arms(context: Context, settings: Settings, source: Recorded, places: Sequence[Place]) -> Runs:
    told = [Told(fillers(context, settings.suite, source.scenes))]
    donors, recording = same_scene(source.sources, source.scenes), open_recording(source.folder)
    arms: list[Arm] = [BASELINE, ToldArm(NULL, told)]
    for place in places:
        chosen: list[tuple[str, Mapping[str, Any]]] = [(LANGUAGE, {"tokens": LANGUAGE})]
        chosen += [(f"{RANDOM} {draw + 1}", {"positions": random_tokens(recording, place.sites[0], draw)})
                   for draw in range(settings.draws)]  # fmt: skip
        for tokens, where in chosen:
            injection = Injection(place.sites, HOLD, **where)
            arms.append(InjectionArm(f"{tokens}: {place.name}", source.folder, injection, donors, told))
    options = limited(context, settings.max_steps)
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def restored(table: pd.DataFrame, places: Sequence[Place]) -> pd.DataFrame:
    """The comparison with what each arm is: tokens ("language", "random"), place, depth, and restored, the share of
    what the null prompt took of the success that came back; NaN where it took nothing."""
    by_name = {place.name: place for place in places}
    base, null = (next(row["success"] for row in records(table) if row["arm"] == arm) for arm in (BASELINE.name, NULL))
    extra = []
    for row in records(table):
        tokens, _, name = row["arm"].partition(": ")
        place = by_name.get(name)
        lost = base - null
        extra.append({
            "tokens": tokens.split()[0] if place else "",
            "place": name,
            "depth": float("nan") if place is None or place.depth is None else float(place.depth),
            "restored": (row["success"] - null) / lost if lost > 0 else float("nan"),
        })  # fmt: skip
    added = pd.DataFrame(extra)
    table = table.copy()
    for i, column in enumerate(("tokens", "place", "depth")):
        table.insert(2 + i, column, added[column])
    table.insert(table.columns.get_loc("success_high") + 1, "restored", added["restored"])
    return table


def _labels_of(
    context: Context, settings: Settings, source: Recorded, places: Sequence[Place], table: pd.DataFrame
) -> list[str]:
    """What running two observations under each arm's injection shows, "" for arms without one."""
    starts, recording = context.observations(settings.suite, settings.episodes), open_recording(source.folder)
    text = fillers(context, settings.suite, source.scenes)[source.scenes[0]]
    from dataclasses import replace

    first, second = (replace(starts[i].observation, instruction=text) for i in (0, -1))
    by_name, found = {place.name: place for place in places}, []
    for row in records(table):
        tokens, _, name = row["arm"].partition(": ")
        if name not in by_name:
            found.append("")
            continue
        place, draw = by_name[name], tokens.removeprefix(RANDOM).strip()
        where = {"positions": random_tokens(recording, place.sites[0], int(draw) - 1)} if draw != LANGUAGE else {
            "tokens": LANGUAGE}  # fmt: skip
        injection = Injection(place.sites, HOLD, **where)
        found.append(
            reach_of(context, source, source.sources[0].episode, injection, first, second, starts[0].seed).label
        )
    return found


def _verdicts(context: Context, settings: Settings, source: Recorded, table: pd.DataFrame) -> list[Verdict]:
    why = gate(source.runs, settings.gate)
    rows = records(table)
    null = next(row for row in rows if row["arm"] == NULL)
    if why is None and not null["mcnemar_p"] < 0.05 and null["difference"] > -0.5:
        why = f"the null prompt costs {-null['difference']:.0%} of the success only: there is no goal to restore"
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    return [_restores(context, rows), _beats_random(context, rows), _fuses(context, rows)]


def _restores(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit = threshold(context, "language-restores")
    whole = [row for row in rows if row["tokens"] == LANGUAGE and EVERY in row["place"]]
    said = ", ".join(f"{row['place']}: {row['restored']:.0%} of what the null prompt took" for row in whole)
    return Verdict("language-restores", all(row["restored"] >= limit for row in whole), said)


def _beats_random(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit, gaps = threshold(context, "random-does-not"), {}
    for place in dict.fromkeys(row["place"] for row in rows if EVERY in row["place"]):
        means = [float(np.mean([row["restored"] for row in rows if row["place"] == place and row["tokens"] == tokens]))
                 for tokens in (LANGUAGE, RANDOM)]  # fmt: skip
        gaps[place] = means
    said = ", ".join(f"{place}: language {a:.0%}, random {b:.0%}" for place, (a, b) in gaps.items())
    return Verdict("random-does-not", all(a - b >= limit for a, b in gaps.values()), said)


def _fuses(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    """The deepest layer from which language tokens alone still restore the goal."""
    limit = threshold(context, "fusion-depth")
    line = sorted((row["depth"], row["place"], row["restored"], row["label"]) for row in rows
                  if row["tokens"] == LANGUAGE and row["depth"] == row["depth"])  # fmt: skip
    enough = [place for _, place, share, _ in line if share >= limit]
    said = ", ".join(f"{place} {share:.0%}" for _, place, share, _ in line)
    if not enough:
        return Verdict("fusion-depth", False, f"nowhere do they restore {limit:.0%}: {said}")
    deepest = max(i for i, each in enumerate(line) if each[2] >= limit)
    holds = all(each[2] >= limit for each in line[: deepest + 1]) and deepest < len(line) - 1
    return Verdict("fusion-depth", holds, f"they do down to {line[deepest][1]}: {said}")


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    rows = [row for row in records(table) if row["depth"] == row["depth"]]
    line = pd.DataFrame(
        [{**row, "layer": row["place"].replace(".blocks", "").replace(".hook_resid", "")} for row in rows]
    )
    shown = success_bars(table, group=None, reference=BASELINE.name, title="Success under a prompt that says nothing")
    drawn = curve(
        line, "layer", "success", "tokens", "success_low", "success_high", "Fusion depth", ylabel="success",
        floor=float(table["success"][table["arm"] == NULL].iloc[0]), floor_label="nothing injected",
    )  # fmt: skip
    return {
        "fusion_depth": (drawn, "Success when the instructed run's tokens are injected into one place of the residual "
                         "stream, language or as many random others; Wilson's 95 % intervals."),
        "success": (shown, "Success of every arm; dashed: the baseline, which is told its task."),
    }  # fmt: skip


def _labels(table: pd.DataFrame) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in records(table):
        if row["label"] in ("replay", "dead end"):
            found.setdefault(row["label"], []).append(row["arm"])
    return [f"{label}: {'; '.join(arms)}" for label, arms in found.items()]


def _notes(settings: Settings, context: Context, source: Recorded, places: Sequence[Place]) -> list[str]:
    notes = [
        "The null prompt is a filler of as many tokens as the own prompt: networks hide padding, so under the empty "
        "prompt the places of language tokens cannot be seen, whatever they hold.",
        "At the stream's first place, language tokens are word embeddings: injecting them is telling the instruction. "
        "What is deeper down also carries what these tokens have read, of the donor's images and state.",
        f"Random tokens are drawn {settings.draws} time(s) for each place, of the tokens that are neither language nor "
        "padding: the same ones at every step and in every episode.",
        "restored: (success - success under the null prompt) / (baseline - success under the null prompt).",
    ]
    dead = [place.name for place in places if is_dead_end(context.model, list(place.sites))]
    if dead:
        notes.append(f"No action depends on {', '.join(dead)}: shown as a check, not counted as a layer that fails.")
    return notes
