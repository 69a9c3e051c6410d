"""Injection by token segment: which tokens carry the goal, and down to which layer?

The policy is told a filler prompt of as many tokens as its own, so that the language tokens' places are there to be
seen; then tokens of one segment of the instructed run, and nothing else, are put into one layer's residual stream, or
into what the expert reads of the prefix. As many random tokens that are not language are the control.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks import names as hook_names
from hooked_vla.inputs import LANGUAGE, PAD, Segments
from hooked_vla.interventions.injection import HOLD, Injection
from hooked_vla.interventions.injection_reach import DEAD_END, is_dead_end
from hooked_vla.interventions.injection_sites import PREFIX_KV, choose_sites, residual_sites
from hooked_vla.interventions.injection_tokens import START
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
from hooked_vla.rollouts.experiments.figures import success_bars
from hooked_vla.rollouts.experiments.kinds.battery_runs import limited, records, threshold
from hooked_vla.rollouts.experiments.kinds.injection_figures import dodged
from hooked_vla.rollouts.experiments.kinds.injection_runs import (
    Recorded,
    badges,
    fillers,
    gate,
    reach_of,
    record,
    rows_of,
    scene_of,
    starts_of,
)
from hooked_vla.rollouts.experiments.kinds.injection_scores import (
    Scores,
    first_cosines,
    mean_score,
    paired_p,
    settle,
    share_restored,
    successes,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict
from hooked_vla.rollouts.injection import InjectionArm, Told, ToldArm, open_recording, same_scene

with needs_analysis_extra():
    import pandas as pd

NULL, RANDOM = "null", "random"
EVERY = "every layer"
LAYERS, KV = "layers", "kv"
EMBEDDING, SINGLE = "embedding", "one layer"


@dataclass(frozen=True)
class Settings:
    """episodes: of each arm. suite: whose tasks share a scene. max_steps: after which an episode has failed. segments:
    of the token axis, besides language; several joined by "+"; those that a site does not have are left out there.
    gate: the least success of the baseline. draws: sets of random tokens where a rule is judged against them (behind
    all blocks, and in keys and values); at single layers one."""

    episodes: int
    suite: str = "goal"
    max_steps: int = 72
    segments: tuple[str, ...] = ("image:*", "language+image:*")
    gate: float = 0.9
    draws: int = 1


@dataclass(frozen=True)
class Place:
    """Where tokens are injected. kind: "embedding", where language tokens are word embeddings; "one layer", what a
    block leaves; "layers", all of these of the first stream; "kv", what the expert reads of the prefix. depth: of a
    layer along vlm and expert, None for others."""

    name: str
    sites: tuple[str, ...]
    kind: str
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
    layout, normalize = layout_of(settings.suite), action_normalizer(context.model)
    compared, scored = compare(main, layout, normalize, seed=context.seed), Scored.of(main, layout, normalize)
    table = restored(compared, injected, _reach(context, settings, source, injected), scored, context.seed)
    return Outcome(
        main=table,
        verdicts=_verdicts(context, settings, source, table, scored),
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
    """Every residual site with language tokens, in order; all blocks' outputs of the first stream together; and the
    prefix's keys and values, where the expert reads such.

    The first site is the embedding: injecting language tokens there is telling the instruction, whatever the model
    does with it. It is a control, and no part of "every layer".
    Raises ValueError where no residual site behind the embedding has language tokens.
    """

    def has_language(site: str) -> bool:
        return LANGUAGE in _segments(recording, site).present()

    first, *layers = [site for site in residual_sites(context.model) if has_language(site)] or [""]
    if not layers:
        raise ValueError(f"no residual stream of {context.model_name} has language tokens behind the embedding")
    found = [Place(first, (first,), EMBEDDING, None)]
    found += [Place(site, (site,), SINGLE, depth) for depth, site in enumerate(layers)]
    way = hook_names.pathway(first)
    found.append(Place(f"{way}, {EVERY}", tuple(site for site in layers if site.startswith(f"{way}.")), LAYERS, None))
    if sites := [site for site in _prefix(context) if has_language(site)]:
        found.append(Place(f"prefix keys and values, {EVERY}", tuple(sites), KV, None))
    return found


def _segments(recording: ActivationRecording, site: str) -> Segments:
    """Who owns the tokens of a site, in the first value that was recorded."""
    episode, env_step, step = recording.keys(site)[0]
    axes = recording.token_axes(episode, env_step, site, step)
    return recording.segments(episode, env_step, site, step, axes[0])


def random_tokens(recording: ActivationRecording, site: str, seed: int) -> tuple[int, ...]:
    """As many places of the site's token axis as it has language tokens, drawn from those that are neither language nor
    padding; all of these where there are no more of them. Raises ValueError where there are none."""
    segments = _segments(recording, site)
    labels = np.array([segments.names[i] for i in segments.labels[0].tolist()])
    others, n = np.flatnonzero((labels != LANGUAGE) & (labels != PAD)), int((labels == LANGUAGE).sum())
    if not len(others):
        raise ValueError(f"{site} has no tokens but language to draw from")
    return tuple(sorted(np.random.default_rng(seed).choice(others, min(n, len(others)), replace=False).tolist()))


def injections(places: Sequence[Place], recording: ActivationRecording, settings: Settings) -> dict[str, Injected]:
    """What every arm injects, by its name. Random tokens are drawn for each place, and each draw is the same in all
    episodes."""
    found = {}
    for place in places:
        present = _segments(recording, place.sites[0]).present()
        for text in (LANGUAGE, *settings.segments):
            parts = tuple(text.split("+"))
            if all(any(fnmatchcase(name, part) for name in present) for part in parts):
                found[f"{text}: {place.name}"] = Injected(
                    text, place, Injection(place.sites, HOLD, tokens=parts, align=START)
                )
        drawn = [
            random_tokens(recording, place.sites[0], zlib.crc32(f"{place.name} {draw}".encode()))
            for draw in range(settings.draws if place.kind in (LAYERS, KV) else 1)
        ]
        # where there is nothing to draw, all draws are one
        for draw, positions in enumerate(dict.fromkeys(drawn)):
            chosen = Injection(place.sites, HOLD, positions=positions)
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


@dataclass(frozen=True)
class Scored:
    """What every arm comes to, scene by scene: success, and the cosine of its first actions with the instructed
    run's."""

    success: Mapping[str, Scores]
    first: Mapping[str, Scores]

    @classmethod
    def of(cls, runs: Runs, layout: Any, normalize: Any) -> "Scored":
        own = {scene_of(runs, row): row for row in rows_of(runs, BASELINE.name)}
        arms = list(dict.fromkeys(runs.episodes["arm"]))
        return cls(
            {arm: successes(runs, arm) for arm in arms},
            {arm: first_cosines(runs, arm, runs, own, layout, normalize) for arm in arms},
        )

    def shares(self, arm: str, seed: int) -> dict[str, float]:
        """What an arm restores of success (restored) and of the first chunk (first_restored), with intervals by task,
        as columns, and of the first chunk's cosine (first_cosine_low, first_cosine_high)."""
        found = {}
        for name, each in (("restored", self.success), ("first_restored", self.first)):
            values = share_restored(each[arm], each[NULL], each[BASELINE.name], seed)
            found |= dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))
        _, low, high = mean_score(self.first[arm], seed)
        return {**found, "first_cosine_low": low, "first_cosine_high": high}


def restored(
    table: pd.DataFrame, injected: Mapping[str, Injected], reach: Mapping[str, str], scored: Scored, seed: int
) -> pd.DataFrame:
    """The comparison with what each arm is: tokens, place, depth, what running showed of it (label); restored, the
    share of what the null prompt took of the success that came back, and first_restored, the same of the first chunk's
    cosine with the instructed run (NaN where it took nothing); null_p: McNemar's p-value against the null prompt."""
    rows = []
    for row in records(table):
        each, arm = injected.get(row["arm"]), row["arm"]
        depth = None if each is None else each.place.depth
        named = {
            "tokens": "" if each is None else each.tokens,
            "place": "" if each is None else each.place.name,
            "kind": "" if each is None else each.place.kind,
            "depth": float("nan") if depth is None else float(depth),
            "label": reach.get(arm, ""),
            **scored.shares(arm, seed),
            "null_p": paired_p(scored.success[arm], scored.success[NULL]),
        }
        rows.append({"suite": row["suite"], "arm": arm, **named, **row})
    return pd.DataFrame(rows).astype(dict.fromkeys(FLAGS, "boolean"))


def _verdicts(
    context: Context, settings: Settings, source: Recorded, table: pd.DataFrame, scored: Scored
) -> list[Verdict]:
    why, rows = gate(source.runs, settings.gate), records(table)
    null = next(row for row in rows if row["arm"] == NULL)
    if why is None and null["difference"] > -0.5:
        why = f"the null prompt costs {-null['difference']:.0%} of the success only: there is no goal to restore"
    if why is not None:
        return [Verdict(rule, None, why) for rule in context.rules]
    return [
        _restores(context, "language-layers", LAYERS, rows),
        _restores(context, "language-kv", KV, rows),
        _beats_random(context, rows, scored),
        _fuses(context, rows),
    ]


def _both(row: Mapping[str, Any]) -> str:
    """What an arm restores, of success and of the first chunk."""
    return f"{row['restored']:.0%} and {row['first_restored']:.0%}"


def _restores(context: Context, rule: str, kind: str, rows: Sequence[dict[str, Any]]) -> Verdict:
    """Judged on success and on the first chunk: success alone hides what comes close to it."""
    limit, mine = threshold(context, rule), [row for row in rows if row["kind"] == kind]
    language = next((row for row in mine if row["tokens"] == LANGUAGE), None)
    if language is None:
        return Verdict(rule, None, "the model's expert reads no keys and values of a prefix with language tokens")
    said = ", ".join(f"{row['arm'].partition(':')[0] if row['tokens'] == RANDOM else row['tokens']} {_both(row)}"
                     for row in mine)  # fmt: skip
    control = next(row for row in rows if row["kind"] == EMBEDDING and row["tokens"] == LANGUAGE)
    return settle(
        rule,
        min(language["restored"], language["first_restored"]) >= limit,
        [language["null_p"]],
        f"of success and of the first chunk's likeness, {said}; language between {language['restored_low']:.0%} and "
        f"{language['restored_high']:.0%} of success; at the embedding, which is telling it, {_both(control)}",
    )


def _beats_random(context: Context, rows: Sequence[dict[str, Any]], scored: Scored) -> Verdict:
    rule = "random-does-not"
    limit, said, passes, p_values = threshold(context, rule), [], [], []
    for place in dict.fromkeys(row["place"] for row in rows if row["kind"] in (LAYERS, KV)):
        mine = [row for row in rows if row["place"] == place]
        language = next(row for row in mine if row["tokens"] == LANGUAGE)
        random = [row for row in mine if row["tokens"] == RANDOM]
        means = {name: float(np.mean([row[name] for row in random])) for name in ("restored", "first_restored")}
        each = f"mean of {len(random)} draws: {', '.join(map(_both, random))}" if len(random) > 1 else "one draw"
        said.append(f"{place}: language {_both(language)}, random {_both(means)} ({each})")
        passes += [language[name] - mean >= limit for name, mean in means.items()]
        p_values += [paired_p(scored.success[language["arm"]], scored.success[row["arm"]]) for row in random]
    return settle(rule, all(passes), p_values, f"of success and of the first chunk's likeness, {'; '.join(said)}")


def _fuses(context: Context, rows: Sequence[dict[str, Any]]) -> Verdict:
    """Whether there is a layer down to which, and not below which, language tokens alone restore the goal; from the
    first block's output on, since at the embedding they always do."""
    limit = threshold(context, "fusion-depth")
    line = [row for row in rows if row["tokens"] == LANGUAGE and row["kind"] == SINGLE]
    line = sorted((row for row in line if row["label"] != DEAD_END), key=lambda row: row["depth"])
    images = {row["place"]: f", image tokens {_both(row)}" for row in rows
              if row["tokens"] == "image:*" and row["kind"] == SINGLE}  # fmt: skip
    said = "; ".join(f"{row['place']} {_both(row)}{images.get(row['place'], '')}" for row in line)
    said = f"of success and of the first chunk's likeness, {said}"
    enough = [min(row["restored"], row["first_restored"]) >= limit for row in line]
    if not any(enough):
        return Verdict("fusion-depth", False, f"behind no block do language tokens alone restore {limit:.0%}: {said}")
    n = sum(enough)
    holds = all(enough[:n]) and n < len(line)
    return Verdict("fusion-depth", holds, f"language tokens alone do at {n} of {len(line)} places: {said}")


def _figures(table: pd.DataFrame) -> dict[str, Any]:
    rows = [row for row in records(table) if row["kind"] in (EMBEDDING, SINGLE)]
    short = [row["place"].replace(".blocks", "").replace(".hook_resid", "") for row in rows]
    kinds = [
        f"{RANDOM} {row['arm'].split()[1].rstrip(':')}" if row["tokens"] == RANDOM else row["tokens"] for row in rows
    ]
    line = pd.DataFrame(
        [{**row, "layer": name, "tokens": kind} for row, name, kind in zip(rows, short, kinds, strict=True)]
    )
    null = next(row for row in records(table) if row["arm"] == NULL)
    shown = success_bars(table, group=None, reference=BASELINE.name, title="Success under a prompt that says nothing")
    drawn, chunk = (
        dodged(line, "layer", value, "tokens", low, high, title, ylabel=name, floor=null[value],
               floor_label="nothing injected")
        for value, low, high, title, name in (
            ("success", "success_low", "success_high", "Fusion depth", "success"),
            ("first_cosine", "first_cosine_low", "first_cosine_high", "First chunk",
             "action cosine with the instructed run"),
        )
    )  # fmt: skip
    return {
        "first_chunk": (chunk, "The first actions, which all arms plan from the same state: their cosine with those of "
                        "the instructed run, with 95 % intervals by tasks. Cosines leave the gripper out. The first "
                        "place is the embedding, where language tokens are the instruction itself."),
        "fusion_depth": (drawn, "Success when tokens of the instructed run are injected into one place of the residual "
                         "stream, by segment, or as many random ones as language has; Wilson's 95 % intervals."),
        "success": (shown, "Success of every arm; dashed: the baseline, which is told its task."),
    }  # fmt: skip


def _labels(table: pd.DataFrame) -> list[str]:
    return badges((row["arm"], row["label"]) for row in records(table))


def _notes(settings: Settings, context: Context, places: Sequence[Place]) -> list[str]:
    notes = [
        "The null prompt is a filler of as many tokens as the own prompt: networks hide padding, so under the empty "
        "prompt the places of language tokens cannot be seen, whatever they hold.",
        "At the stream's first place, language tokens are word embeddings: injecting them is telling the instruction. "
        "What is deeper down also carries what these tokens have read, of the donor's images and state; and a prompt "
        "that states the robot's state has its tokens in this segment too.",
        "Where a segment has another number of tokens than the donor's (a prompt that states the state), tokens "
        "are paired from its start, and what is left over stays as it is.",
        f"Random tokens are drawn for each place anew, {settings.draws} times where a rule is judged against them and "
        "once at single layers, of the tokens that are neither language nor padding: the same ones at every step and "
        "in every episode. Where these are no more than the language tokens, all of them are taken, once.",
        "restored: (success - success under the null prompt) / (baseline - success under the null prompt). "
        "first_restored: the same of the first chunk's cosine with the instructed run, which is 1 for the baseline. "
        "Success may stay at 0 while the first actions are nearly those of the instructed run: both are judged.",
        "Language tokens behind all blocks, but not at the embedding: what block 0 lets other tokens read of the "
        "instruction is not restored by them. All tokens that are read together (language and images) show whether "
        "what is injected there can decide at all.",
    ]
    dead = [place.name for place in places if is_dead_end(context.model, list(place.sites))]
    if dead:
        notes.append(f"No action depends on {', '.join(dead)}: shown as a check, not counted as a layer that fails.")
    return notes
