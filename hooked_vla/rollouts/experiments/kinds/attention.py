"""Attention maps against the places of objects, and the policy without the heads that point best.

Maps are scored by how much more of the attention on an image falls on the target than its pixels' share: 1 is chance.
The head that points best is chosen on half of the scenes and judged on the other half. Without it, and without as many
random heads of its pathway, the policy acts in closed loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hooked_vla.analysis.attention import heads_of, knock_out, token_locality
from hooked_vla.extras import needs_analysis_extra
from hooked_vla.hooks.names import layer
from hooked_vla.inputs import Observation
from hooked_vla.interventions import EditArm
from hooked_vla.rollouts.experiments.compare import mean_with_interval
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.intervals import decide, undecided
from hooked_vla.rollouts.experiments.kinds.attention_figures import draw_maps, draw_scores, film
from hooked_vla.rollouts.experiments.kinds.attention_maps import (
    TARGET_WORD,
    Chosen,
    Maps,
    make_maps,
    moments,
    score_table,
    step_table,
)
from hooked_vla.rollouts.experiments.kinds.battery_runs import (
    ALPHA,
    compare_suites,
    few_tasks,
    gate_note,
    points,
    records,
    run_suite,
    threshold,
)
from hooked_vla.rollouts.experiments.outcome import Outcome, Verdict

with needs_analysis_extra():
    import pandas as pd

LAST, TOP = "last layer, mean over heads", "top head"
# scenes whose images are covered cell by cell, to see whether tokens hold what stands at their places
_N_LOCAL = 4


@dataclass(frozen=True)
class Settings:
    """suite: of the tabletop's; wordless_suite: for models that read no words. scenes: for maps, each seen at two
    moments; camera: whose maps are judged.

    episodes: of each arm in closed loop. n_random: heads drawn as controls, for each pathway; n_joint: how many of the
    best heads are also taken out together, and as many random ones; 0 for none. films: how many episodes are filmed.
    """

    suite: str
    wordless_suite: str
    scenes: int
    camera: str
    episodes: int
    n_random: int = 3
    n_joint: int = 4
    films: int = 1


Row = Mapping[str, Any]


def run(context: Context, settings: Settings) -> Outcome:
    """Raises ValueError for another suite than the tabletop's, and a camera that the model does not see."""
    suite = settings.suite if context.reads_words else settings.wordless_suite
    found = moments(context, suite, settings.scenes)
    if settings.camera not in found[0].images:
        raise ValueError(f"{context.model_name} sees the cameras {list(found[0].images)}, not {settings.camera!r}")
    maps = make_maps(context, found)
    scores = records(context.table("scores", lambda: score_table(context, maps)))
    scores = [row for row in scores if row["camera"] == settings.camera]
    chosen = [*last_layers(scores), *top_heads(scores)]
    table = map_table(scores, chosen, context.seed)
    heads = head_table(scores)
    arms = knock_outs(context, scores, chosen, settings)
    compared = compare_suites(context, [run_suite(context, suite, arms, settings.episodes, context.options)])
    compared.insert(2, "heads", [_heads(arms, str(arm)) for arm in compared["arm"]])
    local = context.table("locality", lambda: locality(context, maps))
    best = [each for each in chosen if each.what == TOP]
    steps = step_table(maps, {each.label: (each.reader, each.site, each.head) for each in best}, settings.camera)
    films = film(context, suite, settings.films, best)
    return Outcome(
        main=table,
        verdicts=[
            _beats_chance(context, table, "last-layer", LAST),
            _beats_chance(context, table, "top-head", TOP),
            _knocked_out(context, compared, suite),
        ],
        tables={"knock_out": compared, "heads": heads, "denoise_steps": steps, "locality": local},
        figures={"maps": draw_maps(maps, chosen, settings.camera, context.reads_words), **draw_scores(heads)},
        notes=[*_notes(context, settings, table, local, films), *few_tasks(compared)],
    )


def _held_out(row: Row) -> bool:
    """Whether the scene is one on which maps are judged; on the others they are chosen."""
    return row["seed"] % 2 == 1


def last_layers(scores: Sequence[Row]) -> list[Chosen]:
    """The map that is usually shown of each pathway: its last layer, heads averaged; of a word where words are read."""
    found = []
    for way in dict.fromkeys(row["pathway"] for row in scores):
        part = [row for row in scores if row["pathway"] == way]
        words = [row for row in part if row["reader"].endswith(TARGET_WORD)]
        last = max(words or part, key=lambda row: row["layer"])
        found.append(Chosen(way, LAST, last["reader"], last["site"], -1))
    return found


def rank_heads(scores: Sequence[Row], way: str) -> list[Chosen]:
    """Every head of a pathway that an action depends on, the one that points best on the scenes for choosing first.

    A head counts with the reader under which it points best.
    """
    found: dict[tuple[str, str, int], list[float]] = {}
    for row in scores:
        if row["pathway"] == way and row["head"] >= 0 and row["reaches_action"] and not _held_out(row):
            found.setdefault((row["reader"], row["site"], row["head"]), []).append(row["target"])
    order = sorted(found, key=lambda key: -float(np.mean(found[key])))
    best = {(site, head): Chosen(way, TOP, reader, site, head) for reader, site, head in reversed(order)}
    return [best[place] for place in dict.fromkeys((site, head) for _, site, head in order)]


def top_heads(scores: Sequence[Row]) -> list[Chosen]:
    """The first of `rank_heads` of every pathway that has any; the one that points best of all comes first."""
    ranked = [rank_heads(scores, way) for way in dict.fromkeys(row["pathway"] for row in scores)]
    return sorted((each[0] for each in ranked if each), key=lambda each: -_score(scores, each))


def _score(scores: Sequence[Row], head: Chosen) -> float:
    """Mean score of a head on the scenes for choosing."""
    place = (head.reader, head.site, head.head)
    mine = [row for row in scores if (row["reader"], row["site"], row["head"]) == place and not _held_out(row)]
    return _mean(mine, "target")


def map_table(scores: Sequence[Row], chosen: Sequence[Chosen], seed: int) -> pd.DataFrame:
    """One row for every chosen map and phase, on the scenes for judging: its mean score on the target with a 95 %
    interval by tasks, the same less that of maps of other scenes, objects that are not meant, and the pointing game
    against its chance."""
    rows = []
    for each in chosen:
        place = (each.reader, each.site, each.head)
        mine = [row for row in scores if (row["reader"], row["site"], row["head"]) == place and _held_out(row)]
        for phase in ("both", *dict.fromkeys(row["phase"] for row in mine)):
            part = [row for row in mine if phase in ("both", row["phase"])]
            tasks = [row["task"] for row in part]
            target = mean_with_interval([row["target"] for row in part], tasks, seed)
            more = mean_with_interval([row["target"] - row["shuffled"] for row in part], tasks, seed)
            rows.append(
                {"map": each.what, "where": each.label, "reader": each.reader, "phase": phase, "n": len(part),
                 "target": target[0], "target_low": target[1], "target_high": target[2],
                 "other_scenes": _mean(part, "shuffled"), "more": more[0], "more_low": more[1], "more_high": more[2],
                 "other_objects": _mean(part, "other"), "hits": _mean(part, "hit"), "chance": _mean(part, "chance"),
                 "reaches_action": all(row["reaches_action"] for row in part)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def head_table(scores: Sequence[Row]) -> pd.DataFrame:
    """Mean score of every head on the target, and under maps of other scenes: all scenes, both phases."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    by = ("reader", "site", "layer", "head", "reaches_action")
    for row in scores:
        if row["head"] >= 0:
            found.setdefault(tuple(row[name] for name in by), []).append(row)
    values = {"target": "target", "other_scenes": "shuffled", "other_objects": "other", "hits": "hit",
              "chance": "chance"}  # fmt: skip
    return pd.DataFrame(
        [
            dict(zip(by, key, strict=True)) | {name: _mean(part, of) for name, of in values.items()}
            for key, part in found.items()
        ]
    )


def _mean(rows: Sequence[Row], name: str) -> float:
    """Of those that were measured; NaN where none was."""
    values = [row[name] for row in rows if row[name] == row[name]]
    return float(np.mean(values)) if values else float("nan")


def knock_outs(context: Context, scores: Sequence[Row], chosen: Sequence[Chosen], settings: Settings) -> list[EditArm]:
    """The top heads' arms and their controls: as many random heads of the same pathway, one by one and together."""
    rng, arms = np.random.default_rng(context.seed), []
    for top in (each for each in chosen if each.what == TOP):
        ranked = [(each.site, each.head) for each in rank_heads(scores, top.pathway)]
        every = heads_of(context.model, list(dict.fromkeys(site for site, _ in ranked)))
        rest = [each for each in every if each != ranked[0]]
        arms.append(_arm(f"{top.pathway}: top head", ranked[:1]))
        drawn = rng.permutation(len(rest))[: settings.n_random]
        arms += [_arm(f"{top.pathway}: random head {i + 1}", [rest[j]]) for i, j in enumerate(drawn)]
        if 1 < settings.n_joint <= len(ranked) // 2:
            joint = ranked[: settings.n_joint]
            others = [each for each in every if each not in joint]
            sham = rng.permutation(len(others))[: settings.n_joint]
            arms.append(_arm(f"{top.pathway}: top {settings.n_joint} heads", joint))
            arms.append(_arm(f"{top.pathway}: random {settings.n_joint} heads", [others[j] for j in sham]))
    return arms


def _arm(name: str, heads: Sequence[tuple[str, int]]) -> EditArm:
    sites = dict.fromkeys(site for site, _ in heads)
    return EditArm(name, [knock_out(site, [h for s, h in heads if s == site]) for site in sites])


def _heads(arms: Sequence[EditArm], name: str) -> str:
    """Which heads an arm takes out, in short."""
    edits = next((arm.edits for arm in arms if arm.name == name), ())
    return " ".join(f"L{layer(edit.where.sites[0])}H{head}" for edit in edits for head in edit.where.heads or ())


def locality(context: Context, maps: Maps) -> pd.DataFrame:
    """For every camera, how often covering a cell of the image changes that cell's token most."""
    rows = []
    for camera, view in maps.views.items():
        found = [
            token_locality(context.model, Observation(each.images, each.state, each.instruction), view).float().mean()
            for each in maps.moments[:_N_LOCAL]
        ]
        rows.append({"camera": camera, "cells": view.grid[0] * view.grid[1], "scenes": len(found),
                     "local": float(sum(found) / len(found))})  # fmt: skip
    return pd.DataFrame(rows)


def _beats_chance(context: Context, table: pd.DataFrame, rule: str, which: str) -> Verdict:
    limit = threshold(context, rule)
    rows = [row for row in records(table) if row["map"] == which and row["phase"] == "both"]
    if any(row["target_low"] != row["target_low"] for row in rows):
        return Verdict(rule, None, "one task only: no interval by tasks")
    holds = [row["target_low"] > limit and row["more_low"] > 0 for row in rows]
    # of top heads the first is the best of all; the others are those of their pathways
    holds = holds[:1] if which == TOP else holds
    said = [
        f"{row['where']} ({row['reader']}): {row['target']:.2f} × chance ({row['target_low']:.2f} to "
        f"{row['target_high']:.2f}), maps of other scenes {row['other_scenes']:.2f} (difference {row['more']:+.2f}, "
        f"{row['more_low']:+.2f} to {row['more_high']:+.2f}){'' if row['reaches_action'] else ', reaches no action'}"
        for row in rows
    ]
    return Verdict(rule, all(holds), _with_beside(said) if which == TOP else "; ".join(said))


def _with_beside(said: Sequence[str]) -> str:
    """What is said of the head that points best of all, which is judged, and of those of the other pathways, which
    are not."""
    return said[0] + (f". Beside it, not judged: {'; '.join(said[1:])}" if said[1:] else "")


def _knocked_out(context: Context, compared: pd.DataFrame, suite: str) -> Verdict:
    """Whether success stays within the rule's points without the best head: all of the difference's interval. Whether
    anything changes at all is another question, and said beside it."""
    rule, limit = "knock-out", threshold(context, "knock-out")
    if why := gate_note(compared, suite):
        return Verdict(rule, None, why)
    rows = {row["arm"]: row for row in records(compared)}
    tops = {arm: row for arm, row in rows.items() if arm.endswith(": top head")}
    said = []
    for arm, row in tops.items():
        sham = [each for name, each in rows.items() if name.startswith(f"{arm.split(':')[0]}: random head")]
        control = np.mean([each["displacement"] for each in sham]) if sham else float("nan")
        still = row["zero_effect"]
        moved = "not known" if pd.isna(still) else "no effect" if still else "an effect"
        by = "the test" if row["mcnemar_p"] < ALPHA else "being over twice the rerun's floor alone"
        moved += f", by {by}" if moved == "an effect" else " by the test and twice the rerun's floor"
        said.append(
            f"{arm} ({row['heads']}): {points(row['difference'])} ({points(row['difference_low'])} to "
            f"{points(row['difference_high'])}, Holm-adjusted p = {row['holm_p']:.2g}); moved "
            f"by {1000 * row['displacement']:.1f} mm (rerun {1000 * row['floor']:.1f}, random heads "
            f"{1000 * control:.1f}), which is {moved}"
        )
    # the first is the best of all; the others are those of their pathways
    first = next(iter(tops.values()))
    low, high = first["difference_low"], first["difference_high"]
    within = [decide(low, high, -limit, below=False), decide(low, high, limit, below=True)]
    holds = False if False in within else None if None in within else True
    said[0] += undecided(holds)
    return Verdict(rule, holds, _with_beside(said))


def _notes(
    context: Context, settings: Settings, table: pd.DataFrame, local: pd.DataFrame, films: Sequence[str]
) -> list[str]:
    notes = [
        f"Scores are on the camera {settings.camera!r}, means over denoise steps; masks come from the simulator. "
        "Moments on the way were reached by the scripted expert, not by the policy.",
        "A head is chosen on scenes of even seeds, maps are judged on those of odd ones. Several maps are scored, and "
        "intervals are not adjusted for that.",
        "What a token shows is what its cell of the image shows only where the tower keeps it there: covering a cell "
        "changes that cell's own token most in "
        + ", ".join(f"{row['local']:.0%} of the cells ({row['camera']})" for row in records(local))
        + ". Elsewhere a map over cells is not a map over pixels.",
        "Heads are taken out by making what they write 0, at all tokens and steps.",
    ]
    dead = sorted({row["where"] for row in records(table) if not row["reaches_action"]})
    if dead:
        notes.append(
            f"No action depends on the attention of {', '.join(dead)}: the expert reads each block's keys and values, "
            "so the last block's attention is a dead end. Its map cannot explain the actions."
        )
    if not any(row["reader"].startswith("vlm") for row in records(table)):
        notes.append(f"{context.model_name} reads no words: there is no map of a word.")
    return notes + [f"Film of the top heads over an episode: `{name}`." for name in films]
