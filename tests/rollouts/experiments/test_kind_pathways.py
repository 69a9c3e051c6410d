"""E5: noise is as large as what it stands for, sizes are those of the recordings, gaps follow from the table."""

import numpy as np
import pytest
import torch
from injection_case import context, run

from hooked_vla.hooks.point import HookPoint
from hooked_vla.interventions.places import Layout
from hooked_vla.rollouts.experiments.kinds import pathways as kind
from hooked_vla.rollouts.experiments.kinds.pathways_arms import DONOR, NOISE, RANDOM, matched_noise
from hooked_vla.rollouts.injection import open_recording

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E5", tmp_path_factory.mktemp("e5") / "run", episodes=3, max_steps=8)


def test_noise_is_as_long_as_the_change_token_by_token() -> None:
    point = HookPoint("batch seq d_model")
    point.name = EXPERT
    change = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
    change[1, 2] = 0
    noise = matched_noise(change, Layout.of(point), [7, 8])
    torch.testing.assert_close(noise.norm(dim=-1), change.norm(dim=-1))
    assert not noise[1, 2].any()
    cosines = torch.cosine_similarity(noise[0], change[0], dim=-1)
    assert cosines.abs().max() < 0.9
    # rows have noise of their own, whoever shares their batch
    alone = matched_noise(change[1:], Layout.of(point), [8])
    assert torch.equal(alone, noise[1:])


def test_every_condition_is_run_at_a_site_of_each_pathway(done) -> None:
    table = done[1].main
    arms = table[table["condition"] != ""]
    assert set(zip(arms["condition"], arms["site"], strict=True)) == {
        (condition, site) for condition in (DONOR, RANDOM, NOISE) for site in (VLM, EXPERT)
    }
    assert (arms["displacement"] > 10 * arms["floor"]).all()
    # as large a change, and another one
    by = arms.set_index(["condition", "site"])
    for site in (VLM, EXPERT):
        assert by.loc[(DONOR, site), "change"] == by.loc[(NOISE, site), "change"]
        assert by.loc[(DONOR, site), "displacement"] != by.loc[(NOISE, site), "displacement"]
    assert any("expert.blocks.3" in label and label.startswith("replay") for label in done[1].labels)


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


def test_gaps_are_ratios_of_what_the_table_says(done) -> None:
    table, gaps = done[1].main, done[1].tables["gaps"].set_index(["condition", "per"])
    by = table.set_index(["condition", "site"])
    for per in ("displacement", "per_change", "per_change_and_call"):
        expected = by.loc[(DONOR, EXPERT), per] / by.loc[(DONOR, VLM), per]
        assert gaps.loc[(DONOR, per), "ratio"] == pytest.approx(expected)
    raw, counted = (gaps.loc[(DONOR, per), "ratio"] for per in ("per_change", "per_change_and_call"))
    assert counted == pytest.approx(raw / done[0].model.n_denoise_steps)
    low, mean, high = (gaps.loc[(DONOR, "displacement"), each] for each in ("low", "difference", "high"))
    assert low <= mean <= high
    assert {each.rule for each in done[1].verdicts} == {"raw", "gap", "beyond-noise"}


def test_first_chunks_of_replay_are_the_donors(done) -> None:
    """All of the last block's output is all that the actions are made of: there both pathways' whole change is seen."""
    chunks = done[1].tables["chunks"].set_index(["condition", "site"])
    last, first = "expert.blocks.3.hook_resid_post", "vlm.blocks.0.hook_resid_post"
    assert chunks.loc[(DONOR, last), "displacement"] > 2 * chunks.loc[(NOISE, last), "displacement"] > 0
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
