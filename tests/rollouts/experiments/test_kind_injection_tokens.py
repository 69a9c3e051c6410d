"""E3: language tokens at the first place are the instruction itself; verdicts follow from the table."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from injection_case import context, run

from hooked_vla.inputs import Segments
from hooked_vla.rollouts.cells import Scene
from hooked_vla.rollouts.experiments.kinds import injection_tokens as kind


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E3", tmp_path_factory.mktemp("e3") / "run", segments=["language+image:*"], draws=1)


def test_language_tokens_at_the_embedding_are_the_instruction_and_nothing_else_counts_as_that(done) -> None:
    """What holds by construction is a control: it is in no other place's arms, and no rule starts with it."""
    _, outcome = done
    rows = {row["arm"]: row for row in outcome.main.to_dict("records")}
    assert rows["null"]["first_cosine"] < 0.99 and rows["null"]["displacement"] > 0
    told = rows["language: vlm.blocks.0.hook_resid_pre"]
    assert told["kind"] == "embedding" and told["displacement"] == 0 and told["first_restored"] == pytest.approx(1)
    every = rows["language: vlm, every layer"]
    assert every["kind"] == "layers" and every["displacement"] > 0 and every["first_restored"] < 0.9
    # other tokens are the same there, whatever the prompt says
    assert rows["random 1: vlm.blocks.0.hook_resid_pre"]["first_cosine"] == rows["null"]["first_cosine"]
    dead = {arm for arm, row in rows.items() if row["label"] == "dead end"}
    segments = ("language", "language+image:*", "random 1")
    assert dead == {f"{tokens}: vlm.blocks.3.hook_resid_post" for tokens in segments}
    assert all(rows[arm]["displacement"] == rows["null"]["displacement"] for arm in dead)
    assert rows["language: prefix keys and values, every layer"]["kind"] == "kv"


def test_language_and_images_together_bring_the_goal_where_language_alone_does_not(done) -> None:
    rows = {row["arm"]: row for row in done[1].main.to_dict("records")}
    for place in ("vlm, every layer", "prefix keys and values, every layer"):
        both, alone = (rows[f"{tokens}: {place}"] for tokens in ("language+image:*", "language"))
        assert both["first_restored"] > 0.95 > alone["first_restored"] + 0.2, place
        assert alone["first_cosine_low"] <= alone["first_cosine"] <= alone["first_cosine_high"]


def test_a_cut_run_is_not_judged(done) -> None:
    made, outcome = done
    assert all(verdict.holds is None for verdict in outcome.verdicts)
    names = {file.name for file in (made.out / "figures").iterdir()}
    assert names == {"fusion_depth.png", "first_chunk.png", "success.png"}


def test_random_tokens_are_as_many_and_no_language(done) -> None:
    from hooked_vla.rollouts.injection import open_recording

    recording = open_recording(done[0].folder("source"))
    site = "vlm.blocks.0.hook_resid_pre"
    segments = recording.segments(0, 0, site)
    language = set(segments.positions("language")[0].tolist())
    first, second = (kind.random_tokens(recording, site, seed) for seed in (0, 1))
    assert len(first) == len(language) and not set(first) & language and first != second
    assert first == kind.random_tokens(recording, site, 0)
    labels = {segments.names[segments.labels[0, place]] for place in first}
    assert "pad" not in labels


def test_random_tokens_are_drawn_for_each_place_anew(done) -> None:
    from hooked_vla.rollouts.injection import open_recording

    recording = open_recording(done[0].folder("source"))
    places = [kind.Place(name, ("vlm.blocks.0.hook_resid_pre",), kind.LAYERS, None) for name in "ab"]
    found = kind.injections(places, recording, kind.Settings(2, segments=(), draws=2))
    # prompts that state the robot's state grow and shrink on the way
    assert {each.injection.align for name, each in found.items() if name.startswith("language")} == {"start"}
    drawn = [each.injection.positions for each in found.values() if each.tokens == kind.RANDOM]
    assert len(drawn) == len(set(drawn)) == 4
    # no rule is judged by those of one layer
    alone = kind.injections([replace(places[0], kind=kind.SINGLE)], recording, kind.Settings(2, segments=(), draws=2))
    assert [name for name, each in alone.items() if each.tokens == kind.RANDOM] == ["random 1: a"]


def test_where_language_has_more_tokens_than_all_others_these_are_taken(done, monkeypatch) -> None:
    from hooked_vla.rollouts.injection import open_recording

    recording, place = open_recording(done[0].folder("source")), kind.Place("all", ("site",), kind.LAYERS, None)
    few = Segments.from_spans([("image:top", 2), ("language", 5), ("state", 1), ("pad", 3)], 1)
    monkeypatch.setattr(kind, "_segments", lambda *_: few)
    assert kind.random_tokens(recording, "site", 0) == (0, 1, 7)
    # and drawn once
    found = kind.injections([place], recording, kind.Settings(2, segments=(), draws=3))
    assert [each.injection.positions for each in found.values() if each.tokens == kind.RANDOM] == [(0, 1, 7)]
    monkeypatch.setattr(kind, "_segments", lambda *_: Segments.from_spans([("language", 5), ("pad", 3)], 1))
    with pytest.raises(ValueError, match="site has no tokens but language to draw from"):
        kind.random_tokens(recording, "site", 0)


def row(tokens: str, place: str, what: str, share: float, first: float, **more) -> dict:
    return {"arm": f"{tokens}: {place}", "tokens": tokens.partition(" ")[0], "place": place, "kind": what,
            "depth": float("nan"), "label": "open", "restored": share, "restored_low": share, "restored_high": share,
            "first_restored": first, "null_p": 0.001, **more}  # fmt: skip


def line(**shares: float) -> list[dict]:
    """Language tokens restore these shares at layers in order, behind the embedding; the last one is a dead end."""
    found = [row("language", name, kind.SINGLE, share, share, depth=float(i))
             for i, (name, share) in enumerate(shares.items())]  # fmt: skip
    end = row("language", "end", kind.SINGLE, 0, 0, depth=99.0, label="dead end")
    return [row("language", "first", kind.EMBEDDING, 1, 1), *found, end]


def test_the_fusion_depth_starts_behind_the_embedding(tmp_path: Path) -> None:
    made = context("E3", tmp_path)
    assert kind._fuses(made, line(a=1.0, b=0.6, c=0.1)).holds
    assert not kind._fuses(made, line(a=1.0, b=0.1, c=0.6)).holds
    # nothing but the dead end is below: no depth was found
    assert not kind._fuses(made, line(a=1.0, b=1.0)).holds
    # the embedding alone is no depth
    nowhere = kind._fuses(made, line(a=0.1, b=0.0))
    assert nowhere.holds is False and "behind no block" in nowhere.measured


def test_each_place_has_its_rule_and_both_measures_count(tmp_path: Path) -> None:
    made = context("E3", tmp_path)
    rows = [row("language", "first", kind.EMBEDDING, 1, 1), row("language", "vlm", kind.LAYERS, 1.0, 0.9),
            row("random 1", "vlm", kind.LAYERS, 0.1, 0.1), row("language", "kv", kind.KV, 0.0, 0.0)]  # fmt: skip
    verdict = kind._restores(made, "language-layers", kind.LAYERS, rows)
    assert verdict.holds and "language 100% and 90%, random 1 10% and 10%" in verdict.measured
    assert kind._restores(made, "language-kv", kind.KV, rows).holds is False
    assert kind._restores(made, "language-kv", kind.KV, rows[:3]).holds is None
    # success alone, or the first chunk alone, is not enough; nor are few episodes
    for part in ({"restored": 0.5}, {"first_restored": 0.5}):
        assert kind._restores(made, "language-layers", kind.LAYERS, [rows[0], {**rows[1], **part}]).holds is False
    few = kind._restores(made, "language-layers", kind.LAYERS, [rows[0], {**rows[1], "null_p": 0.2}])
    assert few.holds is None and "too few episodes" in few.measured


def test_random_tokens_are_compared_episode_by_episode(tmp_path: Path) -> None:
    made = context("E3", tmp_path)
    scenes = [Scene(str(i), i) for i in range(12)]
    rows = [row("language", "vlm", kind.LAYERS, 1.0, 0.9), row("random 1", "vlm", kind.LAYERS, 0.75, 0.1),
            row("random 2", "vlm", kind.LAYERS, 0.5, 0.1)]  # fmt: skip
    won = {"language: vlm": dict.fromkeys(scenes, 1.0)}
    won |= {f"random {i}: vlm": dict.fromkeys(scenes, 0.0) for i in (1, 2)}
    scored = kind.Scored(won, {})
    verdict = kind._beats_random(made, rows, scored)
    assert verdict.holds
    assert "random 62% and 10% (mean of 2 draws: 75% and 10%, 50% and 10%)" in verdict.measured
    rows[0]["restored"] = 0.75
    assert kind._beats_random(made, rows, scored).holds is False


def test_restored_counts_from_the_null_prompt_to_the_baseline() -> None:
    from hooked_vla.rollouts.experiments.compare import FLAGS

    place, scenes = kind.Place("p", ("s",), kind.SINGLE, 3), [Scene(str(i % 4), i) for i in range(8)]
    success = {"baseline": [1.0] * 8, "null": [0.0] * 8, "language: p": [1.0] * 4 + [0.0] * 4}
    first = {"baseline": [1.0] * 8, "null": [0.2] * 8, "language: p": [0.4] * 8}
    scored = kind.Scored(*({arm: dict(zip(scenes, each, strict=True)) for arm, each in part.items()}
                           for part in (success, first)))  # fmt: skip
    table = pd.DataFrame([{"suite": "goal", "arm": arm, "n": 8, **dict.fromkeys(FLAGS, False)} for arm in success])
    injected = {"language: p": kind.Injected("language", place, kind.Injection("s", "hold"))}
    found = kind.restored(table, injected, {"language: p": "open"}, scored, 0).to_dict("records")
    assert [each["restored"] for each in found] == pytest.approx([1, 0, 0.5])
    assert [each["first_restored"] for each in found] == pytest.approx([1, 0, 0.25])
    assert found[2]["depth"] == 3 and found[2]["label"] == "open" and found[0]["label"] == ""
    assert found[2]["restored_low"] <= 0.5 <= found[2]["restored_high"] and found[2]["null_p"] == 0.125
