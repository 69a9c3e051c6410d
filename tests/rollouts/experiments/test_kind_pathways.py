"""E5: noise is as large as what it stands for, sizes are those of the recordings, gaps follow from the table."""

import numpy as np
import pandas as pd
import pytest
from injection_case import context, run
from report_numbers import unknown_numbers

from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import pathways as kind
from hooked_vla.rollouts.experiments.kinds.pathways_arms import CONDITIONS, DONOR, NOISE, WHITE
from hooked_vla.rollouts.injection import open_recording

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E5", tmp_path_factory.mktemp("e5") / "run", episodes=3, max_steps=8)


def test_every_condition_is_run_at_a_site_of_each_pathway(done) -> None:
    table = done[1].main
    arms = table[table["condition"] != ""]
    assert set(zip(arms["condition"], arms["site"], strict=True)) == {
        (condition, site) for condition in CONDITIONS for site in (VLM, EXPERT)
    }
    assert (arms["displacement"] > 10 * arms["floor"]).all()
    # as large a change, and another one
    by = arms.set_index(["condition", "site"])
    for site in (VLM, EXPERT):
        assert by.loc[(DONOR, site), "change"] == by.loc[(NOISE, site), "change"]
        moved = {by.loc[(condition, site), "displacement"] for condition in (DONOR, NOISE, WHITE)}
        assert len(moved) == 3
    assert unknown_numbers(done[0].out, find_experiment("E5")) == []
    assert any("expert.blocks.3" in label and label.startswith("replay") for label in done[1].labels)


def test_a_policy_whose_every_block_is_replay_is_refused_before_anything_runs(tmp_path) -> None:
    made = context("E5", tmp_path / "run", model="xvla-tabletop")
    with pytest.raises(
        ValueError, match=r"any block of expert of xvla-tabletop hands on is all .*: injecting it is re"
    ):
        made.definition.module.run(made, made.definition.settle(False))
    assert not (tmp_path / "run").exists()


def test_sizes_are_those_of_the_recorded_values(done) -> None:
    made, outcome = done
    change = outcome.tables["change"].set_index(["condition", "site"])
    own, other = (open_recording(made.folder(name)) for name in ("source", "turned"))
    sizes = []
    for episode in own.episodes:
        for key in own.keys(EXPERT):
            if key[0] == episode and key in set(other.keys(EXPERT)):
                pair = [each.get(*key[:2], EXPERT, key[2]) for each in (own, other)]
                sizes.append(float((pair[1] - pair[0]).norm()))
    # the two sweeps number their episodes alike: the same seeds, the tasks turned
    assert change.loc[(DONOR, EXPERT), "change"] == pytest.approx(np.mean(sizes), rel=1e-4)
    assert change.loc[(DONOR, EXPERT), "calls"] == made.model.n_denoise_steps
    assert change.loc[(DONOR, VLM), "calls"] == 1


def test_gaps_are_ratios_of_means_over_scenes(done) -> None:
    table, gaps = done[1].main, done[1].tables["gaps"].set_index(["condition", "per"])
    by = table.set_index(["condition", "site"])
    expected = by.loc[(DONOR, EXPERT), "displacement"] / by.loc[(DONOR, VLM), "displacement"]
    assert gaps.loc[(DONOR, "displacement"), "ratio"] == pytest.approx(expected)
    raw, counted = (gaps.loc[(DONOR, per), "ratio"] for per in ("per_change", "per_change_and_call"))
    assert counted == pytest.approx(raw / done[0].model.n_denoise_steps)
    assert ((gaps["low"] <= gaps["ratio"]) & (gaps["ratio"] <= gaps["high"])).all()
    log = np.abs(np.log(gaps["ratio"]))
    assert gaps.loc[(NOISE, "per_change"), "nearer"] == pytest.approx(
        log[NOISE, "displacement"] - log[NOISE, "per_change"]
    )
    assert {each.rule for each in done[1].verdicts} == {"raw", "gap", "beyond-noise"}


def moved(**columns: list[float]) -> pd.DataFrame:
    """Displacements of six scenes, by condition and pathway; sizes are alike unless they are given."""
    rows = []
    for name, values in columns.items():
        condition, way = name.rsplit("_", 1)
        for i, value in enumerate(values):
            row = {"condition": condition.replace("_", " "), "pathway": way, "task": f"t{i}", "seed": 0}
            rows.append(row | dict.fromkeys(kind.PER, value))
    return pd.DataFrame(rows)


def judged(tmp_path, change=lambda table: table, donor_expert: tuple[float, ...] = (2, 2.2, 2.4, 1.9, 2.1, 2.3)):
    """The verdicts where the expert's donor moves twice as far as the VLM's, and noise about as far as either."""
    made = context("E5", tmp_path)
    settings = made.definition.settle(False)
    one = [1.0, 1.1, 1.2, 0.9, 1.0, 1.1]
    each = {f"{condition.replace(' ', '_')}_{way}": one for condition in CONDITIONS for way in ("expert", "vlm")}
    table = change(moved(**{**each, "donor_expert": list(donor_expert)}))
    gaps, beyond = kind._gaps(made, settings, table), kind._beyond(made, settings, table)
    base = pd.DataFrame([{"suite": "goal", "arm": "baseline", "success": 1.0}])
    return {each.rule: each for each in kind._verdicts(made, settings, base, gaps, beyond)}


def counted(**shares: float):
    """The expert's numbers, divided by what they are counted per."""

    def change(table: pd.DataFrame) -> pd.DataFrame:
        mine = table["pathway"] == "expert"
        return table.assign(**{per: table[per].where(~mine, table[per] * share) for per, share in shares.items()})

    return change


def test_a_gap_that_one_way_of_counting_reverses_is_not_said_to_shrink(tmp_path) -> None:
    less = {"per_change": 0.6, "per_change_and_call": 0.5, "per_relative_and_call": 0.6}
    found = judged(tmp_path, counted(**less))
    assert found["raw"].holds is True and found["gap"].holds is True
    assert judged(tmp_path, counted(**less | {"per_change": 8.0}))["gap"].holds is False
    # the expert's is the smaller one: there is no gap of that kind, whatever a reverse one does
    reverse = judged(tmp_path, counted(**less), donor_expert=(0.4, 0.5, 0.45, 0.4, 0.5, 0.4))
    assert reverse["raw"].holds is False and reverse["gap"].holds is None
    # as far as each other: no logarithm of 1 is divided by
    same = judged(tmp_path, donor_expert=(1.0, 1.1, 1.2, 0.9, 1.0, 1.1))
    assert same["raw"].holds is False and same["gap"].holds is None


def test_a_donor_must_go_beyond_noise_that_keeps_its_direction(tmp_path) -> None:
    found = judged(tmp_path)["beyond-noise"]
    # in the VLM the donor does what noise does
    assert found.holds is False and "vlm: 1 times (1 to 1) the displacement of noise" in found.measured
    noisy = judged(tmp_path, donor_expert=(0.5, 3.0, 1.0, 0.6, 2.0, 1.0))
    assert noisy["raw"].holds is None and "undecided" in noisy["raw"].measured


def test_one_task_decides_nothing(tmp_path) -> None:
    found = judged(tmp_path, lambda table: table.assign(task="t"))
    assert [each.holds for each in found.values()] == [None] * 3


def test_first_chunks_of_replay_are_the_donors(done) -> None:
    """All of the last block's output is all that the actions are made of: there both pathways' whole change is seen."""
    chunks = done[1].tables["chunks"].set_index(["condition", "site"])
    last, first = "expert.blocks.3.hook_resid_post", "vlm.blocks.0.hook_resid_post"
    assert chunks.loc[(DONOR, last), "displacement"] > chunks.loc[(NOISE, last), "displacement"] > 0
    assert chunks.loc[(DONOR, last), "blocks_after"] == 0 and chunks.loc[(DONOR, first), "blocks_after"] == 3


def test_blocks_behind_a_site_count_those_that_read_it() -> None:
    from hooked_vla import HookedVLA

    groot = HookedVLA.from_spec("groot_n15", "tiny")
    n_vlm, n_expert, n_adapter = (kind._depth(groot, way) for way in ("vlm", "expert", "adapter"))
    assert kind.blocks_after(groot, "vlm.blocks.0.hook_resid_post") == n_vlm - 1 + n_adapter + n_expert
    assert kind.blocks_after(groot, "expert.blocks.0.hook_resid_post") == n_expert - 1


def test_other_pathways_are_refused(tmp_path) -> None:
    made = context("E5", tmp_path, pathway="encoder")
    with pytest.raises(ValueError, match="no blocks with hook_resid_post in a pathway 'encoder'"):
        made.definition.module.run(made, made.definition.settle(False))
