"""E8: noise leaves the variance that it should in both models, each is compared with itself, and gaps follow."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_numbers import unknown_numbers
from sae_case import context, run

from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import heads as kind
from hooked_vla.training.language import vocabulary
from hooked_vla.training.packaging import new_checkpoint


@pytest.fixture(scope="module")
def spoken(tmp_path_factory) -> Path:
    """A policy that says its actions as tokens, with random weights."""
    folder, drawn = tmp_path_factory.mktemp("openvla"), np.random.default_rng(0)
    values = {"observation.state": drawn.random((50, 4), np.float32), "action": drawn.random((50, 1, 4), np.float32)}
    new_checkpoint("openvla", folder, vocabulary(), values, seed=0)
    return folder


@pytest.fixture(scope="module")
def done(spoken, tmp_path_factory):
    return run(
        "E8", tmp_path_factory.mktemp("e8") / "run", discrete=str(spoken), levels=[0.9, 0.5], ks=[4], max_steps=3
    )


def test_noise_leaves_as_much_in_both_models(done, spoken) -> None:
    table = done[1].main
    for model, head in (("smolvla-tabletop", "continuous"), (str(spoken), "discrete")):
        mine = table[table["model"] == model].set_index("arm")
        assert set(mine["head"]) == {head} and set(mine.index) >= {"baseline", "rerun", "noise 0.9", "noise 0.5"}
        for level in (0.9, 0.5):
            row = mine.loc[f"noise {level}"]
            assert row["explained_variance"] == pytest.approx(level, abs=0.02) and row["n"] == 2
            assert row["fvu"] == pytest.approx(1 - level, rel=1e-4) and row["displacement"] > 0
        assert mine.loc["noise 0.5", "displacement"] != mine.loc["noise 0.9", "displacement"]
        # tokens that were said run through the block again, and get noise too
        assert np.isnan(mine.loc["noise 0.9", "said_explained"]) == (head == "continuous")
        # a share of no success is not known
        assert mine.loc["baseline", "success"] == 0 and np.isnan(mine.loc["baseline", "ratio"])
    assert done[1].tables["coders"]["site"].tolist() == [
        "vlm.blocks.1.hook_resid_post", "vlm.blocks.1.hook_resid_post", "decode.blocks.1.hook_resid_post",
    ]  # fmt: skip
    assert (
        done[1].tables["models"]["sites"].tolist()[1] == "vlm.blocks.1.hook_resid_post, decode.blocks.1.hook_resid_post"
    )
    assert unknown_numbers(done[0].out, find_experiment("E8")) == []


def test_models_that_fail_by_themselves_are_not_judged(done, spoken) -> None:
    assert [each.holds for each in done[1].verdicts] == [None, None]
    assert all(f"{spoken} succeeds in 0% by itself" in each.measured for each in done[1].verdicts)
    assert len(done[1].labels) == 2 and all("floor effect" in label for label in done[1].labels)


def half(head: str, wins: dict[float, list[bool]]) -> kind.Half:
    """Success of scenes of five tasks by explained variance; 1 is unedited."""
    episodes, rows = [], []
    for level, won in wins.items():
        arm = "baseline" if level == 1 else f"noise {level:g}"
        rows.append({"suite": "goal", "kind": "" if level == 1 else "noise", "arm": arm, "explained_variance": level,
                     "success": sum(won) / len(won)})  # fmt: skip
        episodes += [
            {"suite": "goal", "arm": arm, "task": f"t{i % 5}", "seed": i, "success": success}
            for i, success in enumerate(won)
        ]
    still = [np.zeros((3, 4), np.float32)] * len(episodes)
    runs = Runs(pd.DataFrame(episodes), still, still, still)
    return kind.Half(head, head, ["vlm.blocks.1.hook_resid_post"], pd.DataFrame(rows), runs, [])


def judged(tmp_path, continuous: dict[float, list[bool]], discrete: dict[float, list[bool]]):
    made, halves = context("E8", tmp_path, discrete="x"), [half("continuous", continuous), half("discrete", discrete)]
    gaps = pd.DataFrame(kind.gap(halves, "noise", "goal", 0))
    return gaps, kind._verdict(made, halves, gaps, "noise")


ALL, NONE = [True] * 40, [False] * 40


def test_the_gap_is_between_curves_of_equal_explained_variance(tmp_path) -> None:
    gaps, found = judged(tmp_path, {0.5: ALL, 1.0: ALL}, {0.5: NONE, 1.0: ALL})
    # a straight line from nothing to everything leaves half on the mean
    assert found.holds is True and gaps["difference"].tolist() == pytest.approx([-0.5])
    # the range that both have begins at .8, where the line is at .6
    gaps, _ = judged(tmp_path, {0.8: ALL, 1.0: ALL}, {0.5: NONE, 1.0: ALL})
    assert gaps["from"].tolist() == [0.8] and gaps["difference"].tolist() == pytest.approx([-0.2])
    _, found = judged(tmp_path, {0.5: NONE, 1.0: ALL}, {0.5: ALL, 1.0: ALL})
    assert found.holds is False
    _, found = judged(tmp_path, {0.5: ALL[:3], 1.0: ALL[:3]}, {0.5: ALL[:3], 1.0: ALL[:3]})
    assert found.holds is None and "undecided" in found.measured


def test_success_is_counted_against_each_models_own_and_a_weak_one_is_a_floor_effect(tmp_path) -> None:
    most = [i >= 4 for i in range(40)]
    gaps, found = judged(tmp_path, {0.5: ALL, 1.0: ALL}, {0.5: most, 1.0: most})
    assert gaps["difference"].tolist() == pytest.approx([0.0]) and found.holds is False
    half_of_them = [i % 2 == 0 for i in range(40)]
    _, found = judged(tmp_path, {0.5: ALL, 1.0: ALL}, {0.5: NONE, 1.0: half_of_them})
    assert found.holds is None and "discrete succeeds in 50% by itself" in found.measured


def test_models_with_the_wrong_head_are_refused(tmp_path) -> None:
    made = context("E8", tmp_path, discrete="act-tabletop", ks=[])
    settings = made.definition.settle(False)
    with pytest.raises(ValueError, match="smolvla-tabletop has continuous actions; a model with discrete"):
        kind._sites(made, settings, "discrete")
    with pytest.raises(ValueError, match="sites follow from depth"):
        context("E8", tmp_path, sites=["vlm.blocks.0.hook_resid_post"])
    with pytest.raises(ValueError, match="levels must be different numbers below 1"):
        context("E8", tmp_path, levels=[1.0])
