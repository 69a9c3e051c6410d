"""E3: language tokens at the first place are the instruction itself; verdicts follow from the table."""

from pathlib import Path

import pandas as pd
import pytest
from injection_case import context, run

from hooked_vla.rollouts.experiments.kinds import injection_tokens as kind


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E3", tmp_path_factory.mktemp("e3") / "run", segments=[], draws=1)


def test_language_tokens_at_the_first_place_are_the_instruction(done) -> None:
    _, outcome = done
    rows = {row["arm"]: row for row in outcome.main.to_dict("records")}
    assert rows["null"]["first_cosine"] < 0.99 and rows["null"]["displacement"] > 0
    for name in ("language: vlm.blocks.0.hook_resid_pre", "language: vlm, every layer"):
        assert rows[name]["displacement"] == 0 and rows[name]["first_cosine"] == pytest.approx(1, abs=1e-6)
    # other tokens are the same there, whatever the prompt says
    assert rows["random 1: vlm.blocks.0.hook_resid_pre"]["first_cosine"] == rows["null"]["first_cosine"]
    dead = {arm for arm, row in rows.items() if row["label"] == "dead end"}
    assert dead == {f"{tokens}: vlm.blocks.3.hook_resid_post" for tokens in ("language", "random 1")}
    assert all(rows[arm]["displacement"] == rows["null"]["displacement"] for arm in dead)
    assert any(row["place"].startswith("prefix keys and values") for row in rows.values())


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


def rows(**shares: float) -> list[dict]:
    """Language tokens restore these shares at places in order; the last one is a dead end."""
    found = [{"tokens": "language", "place": name, "depth": float(i), "restored": share, "label": "open"}
             for i, (name, share) in enumerate(shares.items())]  # fmt: skip
    return [*found, {**found[-1], "place": "end", "depth": 99.0, "restored": 0.0, "label": "dead end"}]


def test_rules_are_judged_from_the_table(tmp_path: Path) -> None:
    made = context("E3", tmp_path)
    assert kind._fuses(made, rows(a=1.0, b=0.6, c=0.1)).holds
    assert not kind._fuses(made, rows(a=1.0, b=0.1, c=0.6)).holds
    # nothing but the dead end is below: no depth was found
    assert not kind._fuses(made, rows(a=1.0, b=1.0)).holds
    assert not kind._fuses(made, rows(a=0.1, b=0.0)).holds
    every = [{"tokens": tokens, "place": f"vlm, {kind.EVERY}", "depth": float("nan"), "restored": share}
             for tokens, share in (("language", 0.9), ("image:*", 0.1), ("random", 0.75), ("random", 0.5))]  # fmt: skip
    verdict = kind._restores(made, every)
    assert verdict.holds and "language 90%, image:* 10%" in verdict.measured
    verdict = kind._beats_random(made, every)
    assert verdict.holds and "random 62%" in verdict.measured
    every[0]["restored"] = 0.75
    assert not kind._restores(made, every).holds and not kind._beats_random(made, every).holds


def test_restored_counts_from_the_null_prompt_to_the_baseline() -> None:
    from hooked_vla.rollouts.experiments.compare import FLAGS

    place = kind.Place("p", ("s",), 3)
    table = pd.DataFrame([{"suite": "goal", "arm": arm, "success": success, **dict.fromkeys(FLAGS, False)}
                          for arm, success in (("baseline", 0.9), ("null", 0.1), ("language: p", 0.5))])  # fmt: skip
    injected = {"language: p": kind.Injected("language", place, kind.Injection("s", "hold"))}
    found = kind.restored(table, injected, {"language: p": "open"}).to_dict("records")
    assert [row["restored"] for row in found] == pytest.approx([1, 0, 0.5])
    assert found[2]["depth"] == 3 and found[2]["label"] == "open" and found[0]["label"] == ""
