"""E2: what is replay is flagged, what is a dead end changes nothing, and verdicts follow from the tables."""

from pathlib import Path

import pandas as pd
import pytest
from injection_case import context, run

from hooked_vla.rollouts.experiments.kinds import injection_replay as kind


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run(
        "E2", tmp_path_factory.mktemp("e2") / "run", nulls=["empty", "filler"], controls=["expert (*"], max_steps=4
    )


def own(table: pd.DataFrame, null: str) -> dict[str, dict]:
    """Rows of the own donor's injections by site."""
    return {row["site"]: row for row in table.to_dict("records") if (row["donor"], row["null"]) == ("own", null)}


def test_replay_is_flagged_and_dead_ends_change_nothing(done) -> None:
    _, outcome = done
    rows = own(outcome.main, "filler")
    labels = {site: row["label"] for site, row in rows.items()}
    replay = {
        "vlm.blocks.0.hook_resid_pre",
        "expert.blocks.3.hook_resid_post",
        "vlm (all layers)",
        "expert (all layers)",
    }
    assert {site for site, label in labels.items() if label == "replay"} == replay
    assert {site for site, label in labels.items() if label == "dead end"} == {"vlm.blocks.3.hook_resid_post"}
    for site in replay:
        assert rows[site]["identical"] == 1 and rows[site]["cosine"] == pytest.approx(1, abs=1e-6)
    # of the language model's stream, only its first place has all that the prompt leads to
    assert {site for site, row in rows.items() if row["cuts_prompt"]} == replay
    nothing, dead = rows[kind.NONE], rows["vlm.blocks.3.hook_resid_post"]
    assert nothing["cosine"] == dead["cosine"] < 0.99 and nothing["identical"] == 0
    assert outcome.tables["reach"]["agrees"].all()


def test_where_a_mask_still_tells_the_prompt_nothing_is_called_replay(done) -> None:
    """All that the vlm holds is the donor's, but under the empty prompt the expert may not look at its places."""
    rows = own(done[1].main, "empty")
    cut = {site for site, row in rows.items() if row["label"] == "cut set"}
    assert cut == {"vlm.blocks.0.hook_resid_pre", "vlm (all layers)"}
    for site in cut:
        assert not rows[site]["cuts_prompt"] and rows[site]["identical"] == 0
    replay = {site for site, row in rows.items() if row["label"] == "replay"}
    assert replay == {"expert.blocks.3.hook_resid_post", "expert (all layers)"}
    assert all(rows[site]["identical"] == 1 and rows[site]["cuts_prompt"] for site in replay)
    [said] = [label for label in done[1].labels if label.startswith("cut set (")]
    assert "vlm (all layers) (empty prompt only)" in said
    [said] = [label for label in done[1].labels if label.startswith("replay (")]
    assert "vlm (all layers) (filler prompt only)" in said
    assert "expert (all layers)" in said and "expert (all layers) (" not in said


def test_noise_as_large_is_the_control_and_the_floor_stands_beside_everything(done) -> None:
    table = done[1].main
    noise = table[table["donor"] == "noise"]
    assert noise["site"].tolist() == ["expert (all layers)"] * 2 and noise["null"].tolist() == ["empty", "filler"]
    assert noise["identical"].tolist() == [0, 0] and noise["label"].tolist() == ["", ""]
    for column in ("success_low", "success_high", "floor", "displacement"):
        assert table[column].notna().all()
    assert {"mcnemar_p", "holm_p", "difference_low"} <= set(table.columns)


def test_noise_at_a_dead_end_is_no_control(done) -> None:
    """There the injection changes nothing, and noise of the same size does not either."""
    rows = [("own", "(nothing)", "", 0.3), ("own", "a", "open", 0.999), ("own", "b", "dead end", 0.3),
            ("noise", "a", "", 0.2), ("noise", "b", "", 0.3)]  # fmt: skip
    table = pd.DataFrame([{"donor": donor, "null": "empty", "site": site, "label": label, "cosine": cosine}
                          for donor, site, label, cosine in rows])  # fmt: skip
    found = kind._every_site(done[0], kind.Settings(episodes=1, nulls=("empty",)), table)
    assert found.holds is True and "1 of 1 sites (without injection 0.300, with noise as large at most 0.200)" in (
        found.measured
    )


def test_an_unrelated_donor_is_replayed_with_its_noise(done) -> None:
    rows = {row["site"]: row for row in done[1].main.to_dict("records") if row["donor"] == "unrelated"}
    assert set(rows) == {"vlm (all layers)", "expert (all layers)"}
    # under the empty prompt the first of these is no replay
    assert {site: row["identical"] for site, row in rows.items()} == {"vlm (all layers)": 0, "expert (all layers)": 1}


def test_the_report_says_replay_and_nothing_is_judged_below_the_gate(done) -> None:
    made, outcome = done
    assert all(verdict.holds is None and "floor effect" in verdict.measured for verdict in outcome.verdicts)
    text = (made.out / "report.md").read_text()
    assert "> **replay (other scenes and other prompts of this run lead to the same actions" in text
    assert "> **dead end (" in text
    assert {file.name for file in (made.out / "figures").iterdir()} == {"cosine.png", "success.png"}


def test_a_run_that_is_begun_again_gives_the_same_results(done, monkeypatch: pytest.MonkeyPatch) -> None:
    made, outcome = done

    def refuse(*_: object) -> None:
        raise AssertionError("what was run is run again")

    monkeypatch.setattr(kind, "_reach", refuse)
    monkeypatch.setattr("hooked_vla.rollouts.runner.GroupRunner.run", refuse)
    again = made.definition.module.run(made, made.definition.settle(False))
    pd.testing.assert_frame_equal(again.main, outcome.main)


def table(**cosines: float) -> pd.DataFrame:
    rows = [{"site": kind.NONE, "cosine": 0.2, "label": ""}]
    rows += [
        {"site": site, "cosine": cosine, "label": "replay" if site == "a" else "open"}
        for site, cosine in cosines.items()
    ]
    rows.append({"site": "end", "cosine": 0.2, "label": "dead end"})
    return pd.DataFrame([{"donor": "own", "null": "empty", "cuts_prompt": row["site"] in "ab", **row} for row in rows])


def test_rules_are_judged_from_the_table(tmp_path: Path) -> None:
    made = context("E2", tmp_path)
    settings = kind.Settings(2, nulls=("empty",))
    assert kind._every_site(made, settings, table(a=1.0, b=0.995)).holds
    missed = kind._every_site(made, settings, table(a=1.0, b=0.9))
    assert missed.holds is False and "1 of 2 sites" in missed.measured and "b 0.900" in missed.measured
    near = kind._every_site(made, settings, table(a=1.0, b=0.98972))
    assert near.holds is False and "b 0.9897" in near.measured
    unrelated = pd.concat([table(a=1.0, b=0.9), table(a=1.0, b=0.9).assign(donor="unrelated", identical=1.0)])
    tested = kind._replays_unrelated(made, unrelated).measured
    assert tested.startswith("tested at 1 of 1 injections that are replay; cosine with the unrelated donor: a: 1.000")
    assert kind._flagged(made, settings, table(a=1.0, b=0.9)).holds
    open_site = kind._flagged(made, settings, table(a=1.0, b=0.995))
    assert open_site.holds is False and "not replay: b (open, prompts cut)" in open_site.measured
    assert kind._flagged(made, settings, table(a=0.5)).holds is None
    # every null prompt counts
    both = kind.Settings(2, nulls=("empty", "filler"))
    filler = table(a=1.0, b=0.995).assign(null="filler")
    mixed = pd.concat([table(a=1.0, b=0.9), filler])
    assert kind._flagged(made, both, mixed).holds is False and kind._every_site(made, both, mixed).holds is False
    assert kind._every_site(made, both, pd.concat([table(a=1.0, b=0.995), filler])).holds
    assert kind._goes_to_the_old_place(made, None).holds is None

    def moved(n: int) -> pd.DataFrame:
        return pd.DataFrame([{"arm": arm, "task": "t", "seed": seed, "at_old_place": arm == kind.MOVED, "to_old": 0.01}
                             for arm in ("baseline", kind.MOVED) for seed in range(n)])  # fmt: skip

    assert kind._goes_to_the_old_place(made, moved(6)).holds
    few = kind._goes_to_the_old_place(made, moved(2))
    assert few.holds is None and "too few episodes settle it (p = 0.5)" in few.measured
    with pytest.raises(ValueError, match="unknown nulls"):
        kind.Settings(2, nulls=("blank",))
