"""Injection by token segment: which tokens carry the goal, and down to which layer?

The policy is told a filler prompt of as many tokens as its own, so that the language tokens' places are there to be
seen; then tokens of one segment of the instructed run, and nothing else, are put into one layer's residual stream, or
into what the expert reads of the prefix. As many random tokens that are not language are the control.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.inputs import LANGUAGE, PAD, Segments
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import DEAD_END, REPLAY, is_dead_end
from hooked_vla.interventions.injection_sites import PREFIX_KV, choose_sites, residual_sites
from hooked_vla.rollouts.activation_reader import ActivationRecording
from hooked_vla.rollouts.arms import BASELINE, Arm
from hooked_vla.rollouts.experiments.compare import (
    FLAGS,
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
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    fillers,
    gate,
    reach_of,
    record,
    starts_of,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import InjectionArm, Told, ToldArm, open_recording, same_scene

with needs_analysis_extra():
    import pandas as pd

NULL, RANDOM = "null", "random"
EVERY = "every layer"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. max_steps: after which an episode has failed. segments:
    of the token axis, besides language; those that a site does not have are left out there. gate: the least success of
    the baseline. draws: sets of random tokens for each place."""

    episodes: int
    suite: str = "goal"
    max_steps: int = 72
    segments: tuple[str, ...] = ("image:*",)
    gate: float = 0.9
    draws: int = 1


@dataclass(frozen=True)
class Place:
    """Where tokens are injected. depth: of its layer along vlm and expert, None for what is not one layer."""

    name: str
    sites: tuple[str, ...]
    depth: int | None


@dataclass(frozen=True)
class Injected:
    """What an arm injects. tokens: a segment, or "random"."""

    tokens: str
    place: Place
    injection: Injection


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for a model that reads no text, or has no residual stream with language tokens."""
    every = list(dict.fromkeys([*residual_sites(context.model), *_prefix(context)]))
    options = limited(context, settings.max_steps)
    source = record(context, "source", settings.suite, every, settings.episodes, options)
    recording = open_recording(source.folder)
    places = find_places(context, recording)
    injected = injections(places, recording, settings)
    main = _run_arms(context, settings, source, injected)
    compared = compare(main, layout_of(settings.suite), action_normalizer(context.model), seed=context.seed)
    table = restored(compared, injected, _reach(context, settings, source, injected))
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, source, table),
        figures=_figures(table),
        labels=_labels(table),
        notes=_notes(settings, context, places),
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

    def has_language(site: str) -> bool:
        return LANGUAGE in _segments(recording, site).present()

    single = [site for site in residual_sites(context.model) if has_language(site)]
    if not single:
        raise ValueError(f"no residual stream of {context.model_name} has language tokens")
    found = [Place(site, (site,), depth) for depth, site in enumerate(single)]
    way = hook_names.pathway(single[0])
    found.append(Place(f"{way}, {EVERY}", tuple(site for site in single if site.startswith(f"{way}.")), None))
    if sites := [site for site in _prefix(context) if has_language(site)]:
        found.append(Place(f"prefix keys and values, {EVERY}", tuple(sites), None))
    return found


def _segments(recording: ActivationRecording, site: str) -> Segments:
    """Who owns the tokens of a site, in the first value that was recorded."""
    episode, env_step, step = recording.keys(site)[0]
    axes = recording.token_axes(episode, env_step, site, step)
    return recording.segments(episode, env_step, site, step, axes[0])


def random_tokens(recording: ActivationRecording, site: str, seed: int) -> tuple[int, ...]:
    """As many places of the site's token axis as it has language tokens, drawn from those that are neither language nor
    padding. Raises ValueError where there are fewer."""
    segments = _segments(recording, site)
    labels = np.array([segments.names[i] for i in segments.labels[0].tolist()])
    others, n = np.flatnonzero((labels != LANGUAGE) & (labels != PAD)), int((labels == LANGUAGE).sum())
    if len(others) < n:
        raise ValueError(f"{site} has {n} language tokens, but only {len(others)} others to draw from")
    return tuple(sorted(np.random.default_rng(seed).choice(others, n, replace=False).tolist()))


def injections(places: Sequence[Place], recording: ActivationRecording, settings: Settings) -> dict[str, Injected]:
    """What every arm injects, by its name."""
    found = {}
    for place in places:
        present = _segments(recording, place.sites[0]).present()
        for segment in (LANGUAGE, *settings.segments):
            if any(name == segment or (segment.endswith("*") and name.startswith(segment[:-1])) for name in present):
                injection = Injection(place.sites, HOLD, tokens=segment)
                found[f"{segment}: {place.name}"] = Injected(segment, place, injection)
        for draw in range(settings.draws):
            chosen = Injection(place.sites, HOLD, positions=random_tokens(recording, place.sites[0], draw))
            found[f"{RANDOM} {draw + 1}: {place.name}"] = Injected(RANDOM, place, chosen)
    return found


def _run_arms(context: Context, settings: Settings, source: Recorded, injected: Mapping[str, Injected]) -> Runs:
    told = [Told(fillers(context, settings.suite, source.scenes))]
    donors = same_scene(source.sources, source.scenes)
    arms: list[Arm] = [BASELINE, ToldArm(NULL, told)]
    arms += [InjectionArm(name, source.folder, each.injection, donors, told) for name, each in injected.items()]
    options = limited(context, settings.max_steps)
    done = context.rollouts("main", settings.suite, arms, settings.episodes, options=options)
    again = rerun(context, "rerun", settings.suite, settings.episodes, options=options)
    return join(read_runs(done), read_runs(again, {BASELINE.name: RERUN}))


def _reach(
    context: Context, settings: Settings, source: Recorded, injected: Mapping[str, Injected]
) -> Mapping[str, str]:
    """What running two observations under every arm's injection shows."""
    text = fillers(context, settings.suite, source.scenes[:1])[source.scenes[0]]
    starts = starts_of(context, settings.suite, settings.episodes, text)
    episode = source.sources[0].episode
    return {name: reach_of(context, source, episode, each.injection, starts).label for name, each in injected.items()}


def restored(table: pd.DataFrame, injected: Mapping[str, Injected], reach: Mapping[str, str]) -> pd.DataFrame:
    """The comparison with what each arm is: tokens, place, depth, what running showed of it (label), and restored, the
    share of what the null prompt took of the success that came back; NaN where it took nothing."""
    base, null = (next(row["success"] for row in records(table) if row["arm"] == arm) for arm in (BASELINE.name, NULL))
    rows = []
    for row in records(table):
        each = injected.get(row["arm"])
        depth = None if each is None else each.place.depth
        share = (row["success"] - null) / (base - null) if base > null else float("nan")
        named = {
            "tokens": "" if each is None else each.tokens,
            "place": "" if each is None else each.place.name,
            "depth": float("nan") if depth is None else float(depth),
            "label": reach.get(row["arm"], ""),
            "restored": share,
        }
        rows.append({"suite": row["suite"], "arm": row["arm"], **named, **row})
    return pd.DataFrame(rows).astype(dict.fromkeys(FLAGS, "boolean"))


def _verdicts(context: Context, settings: Settings, source: Recorded, table: pd.DataFrame) -> list[Verdict]:
    why, rows = gate(source.runs, settings.gate), records(table)
    null = next(row for row in rows if row["arm"] == NULL)
    if why is None and null["difference"] > -0.5:
        why = f"the null prompt costs {-null['difference']:.0%} of the success only: there is no goal to restore"
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    return [_restores(context, rows), _beats_random(context, rows), _fuses(context, rows)]


def _restores(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit = threshold(context, "language-restores")
    shares: dict[str, dict[str, float]] = {}
    for row in rows:
        if EVERY in row["place"] and row["tokens"] != RANDOM:
            shares.setdefault(row["place"], {})[row["tokens"]] = row["restored"]
    each = [f"{place}: " + ", ".join(f"{tokens} {share:.0%}" for tokens, share in found.items())
            for place, found in shares.items()]  # fmt: skip
    holds = all(found[LANGUAGE] >= limit for found in shares.values())
    return Verdict("language-restores", holds, f"of what the null prompt took, {'; '.join(each)}")


def _beats_random(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    limit, means = threshold(context, "random-does-not"), {}
    for place in dict.fromkeys(row["place"] for row in rows if EVERY in row["place"]):
        means[place] = [
            float(np.mean([row["restored"] for row in rows if row["place"] == place and row["tokens"] == tokens]))
            for tokens in (LANGUAGE, RANDOM)
        ]
    said = ", ".join(f"{place}: language {a:.0%}, random {b:.0%}" for place, (a, b) in means.items())
    return Verdict("random-does-not", all(a - b >= limit for a, b in means.values()), said)


def _fuses(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    """Whether there is a layer down to which, and not below which, language tokens alone restore the goal."""
    limit = threshold(context, "fusion-depth")
    line = [row for row in rows if row["tokens"] == LANGUAGE and row["depth"] == row["depth"]]
    line = sorted((row for row in line if row["label"] != DEAD_END), key=lambda row: row["depth"])
    said = ", ".join(f"{row['place']} {row['restored']:.0%}" for row in line)
    enough = [row["restored"] >= limit for row in line]
    if not any(enough):
        return Verdict("fusion-depth", False, f"nowhere do language tokens alone restore {limit:.0%}: {said}")
    n = sum(enough)
    holds = all(enough[:n]) and n < len(line)
    return Verdict("fusion-depth", holds, f"language tokens alone do at {n} of {len(line)} places: {said}")


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    rows = [row for row in records(table) if row["depth"] == row["depth"]]
    short = [row["place"].replace(".blocks", "").replace(".hook_resid", "") for row in rows]
    kinds = [
        f"{RANDOM} {row['arm'].split()[1].rstrip(':')}" if row["tokens"] == RANDOM else row["tokens"] for row in rows
    ]
    line = pd.DataFrame(
        [{**row, "layer": name, "tokens": kind} for row, name, kind in zip(rows, short, kinds, strict=True)]
    )
    null = next(row["success"] for row in records(table) if row["arm"] == NULL)
    shown = success_bars(table, group=None, reference=BASELINE.name, title="Success under a prompt that says nothing")
    drawn = curve(
        line, "layer", "success", "tokens", "success_low", "success_high", "Fusion depth", ylabel="success",
        floor=null, floor_label="nothing injected",
    )  # fmt: skip
    chunk = curve(
        line, "layer", "first_cosine", "tokens", title="First chunk", ylabel="action cosine with the instructed run",
        floor=next(row["first_cosine"] for row in records(table) if row["arm"] == NULL), floor_label="nothing injected",
    )  # fmt: skip
    return {
        "first_chunk": (chunk, "The first actions, which all arms plan from the same state: their cosine with those of "
                        "the instructed run. Cosines leave the gripper out."),
        "fusion_depth": (drawn, "Success when tokens of the instructed run are injected into one place of the residual "
                         "stream, by segment, or as many random ones as language has; Wilson's 95 % intervals."),
        "success": (shown, "Success of every arm; dashed: the baseline, which is told its task."),
    }  # fmt: skip


def _labels(table: pd.DataFrame) -> list[str]:
    found: dict[str, list[str]] = {}
    for row in records(table):
        if row["label"] in (REPLAY, DEAD_END):
            found.setdefault(row["label"], []).append(row["arm"])
    return [f"{label}: {'; '.join(arms)}" for label, arms in found.items()]


def _notes(settings: Settings, context: Context, places: Sequence[Place]) -> list[str]:
    notes = [
        "The null prompt is a filler of as many tokens as the own prompt: networks hide padding, so under the empty "
        "prompt the places of language tokens cannot be seen, whatever they hold.",
        "At the stream's first place, language tokens are word embeddings: injecting them is telling the instruction. "
        "What is deeper down also carries what these tokens have read, of the donor's images and state; and a prompt "
        "that states the robot's state has its tokens in this segment too.",
        f"Random tokens are drawn {settings.draws} time(s) for each place, of the tokens that are neither language nor "
        "padding: the same ones at every step and in every episode.",
        "restored: (success - success under the null prompt) / (baseline - success under the null prompt).",
    ]
    dead = [place.name for place in places if is_dead_end(context.model, list(place.sites))]
    if dead:
        notes.append(f"No action depends on {', '.join(dead)}: shown as a check, not counted as a layer that fails.")
    return notes
