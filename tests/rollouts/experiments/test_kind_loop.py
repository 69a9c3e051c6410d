"""E7: the identity is exact, noise is as large as the error, and verdicts follow from the table."""

import numpy as np
import pandas as pd
import pytest
from report_numbers import unknown_numbers
from sae_case import context, run

from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import loop as kind

VLM, EXPERT = "vlm.blocks.1.hook_resid_post", "expert.blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E7", tmp_path_factory.mktemp("e7") / "run", by_segment=False, by_step=True, sites=[EXPERT])


def test_the_identity_is_exact_and_noise_as_large_as_the_error(done) -> None:
    table = done[1].main.set_index("arm")
    ways = ["identity", "token", "noise: token", "token at denoise step 0", "noise: token at denoise step 0",
            "token at denoise step 9", "noise: token at denoise step 9", "mean", "noise: mean", "means: mean",
            "means: noise: mean", "means: token", "means: noise: token"]  # fmt: skip
    assert [arm for arm in table.index if arm.startswith(EXPERT)] == [f"{EXPERT}: {way}" for way in ways]
    assert table.loc[f"{EXPERT}: identity", "unchanged"] == 2 and table.loc[f"{EXPERT}: identity", "fvu"] == 0
    for way in ("token", "token at denoise step 9", "mean"):
        own, noise = table.loc[f"{EXPERT}: {way}"], table.loc[f"{EXPERT}: noise: {way}"]
        assert own["fvu"] == pytest.approx(noise["fvu"], rel=1e-4) and own["fvu"] > 0.01
        assert own["unchanged"] == 0 and own["displacement"] > 0 and own["displacement"] != noise["displacement"]
    trained = [done[1].tables[name] for name in ("autoencoders", "autoencoders_means")]
    assert [each["pooling"].tolist() for each in trained] == [["token"], ["mean"]]
    assert all(each["origin"].tolist() == ["this run"] for each in trained)
    assert unknown_numbers(done[0].out, find_experiment("E7")) == []
    assert {each.rule: each.holds for each in done[1].verdicts}["identity"] is True


def runs(**arms: list[bool]) -> Runs:
    """Success of arms in scenes of two tasks; nothing moves."""
    rows = [
        {"suite": "goal", "arm": arm, "task": f"t{i % 2}", "seed": i, "success": success}
        for arm, each in arms.items()
        for i, success in enumerate(each)
    ]
    still = [np.zeros((3, 4), np.float32)] * len(rows)
    return Runs(pd.DataFrame(rows), still, still, still)


def judged(tmp_path, arms: dict[str, tuple[list[bool], dict]], base: list[bool]):
    made = context("E7", tmp_path)
    settings = made.definition.settle(False)
    each = runs(baseline=base, **{name: won for name, (won, _) in arms.items()})
    rows = [{"suite": "goal", "arm": "baseline", "success": sum(base) / len(base), "site": "", "way": "baseline"}]
    for name, (won, about) in arms.items():
        row = {"suite": "goal", "arm": name, "success": sum(won) / len(won), "site": EXPERT, "noise": False,
               "ratio": sum(won) / max(1, sum(base)), "explained_variance": 0.9, "of_means": 0.9}  # fmt: skip
        rows += [row | about, row | about | {"arm": f"noise: {row['arm']}", "noise": True, "way": "noise"}]
    return {each.rule: each for each in kind._verdicts(made, settings, each, pd.DataFrame(rows))}


ALL, NONE = [True] * 60, [False] * 60


def test_verdicts_follow_from_success_and_from_what_is_explained(tmp_path) -> None:
    same = {"identity": (ALL, {"way": "identity", "unchanged": 60, "n": 60})}
    token = {"token": (ALL, {"way": "token"})}
    faithful, other = {"way": "mean", "of_means": 0.97}, {"way": "means: mean", "of_means": 0.5}
    found = judged(tmp_path, {**same, **token, "mean": (NONE, faithful), "means": (ALL, other)}, ALL)
    assert [found[rule].holds for rule in ("identity", "per-token", "pooled")] == [True, True, True]
    # a pooled autoencoder that explains little shows nothing by failing
    found = judged(tmp_path, {**same, **token, "mean": (NONE, {**faithful, "of_means": 0.6})}, ALL)
    assert found["pooled"].holds is None and "none explains 95% of the variance" in found["pooled"].measured
    found = judged(tmp_path, {**same, "token": (NONE, {"way": "token"}), "mean": (ALL, faithful)}, ALL)
    assert found["per-token"].holds is False and found["pooled"].holds is False
    # three episodes are too few to say that a tenth is not lost
    few = [True] * 3
    found = judged(tmp_path, {"identity": (few, {"way": "identity", "unchanged": 2, "n": 3}),
                              "token": (few, {"way": "token"}), "mean": (few, faithful)}, few)  # fmt: skip
    assert found["identity"].holds is False and found["per-token"].holds is None


def test_failures_that_lie_evenly_over_tasks_are_no_surer_than_their_number(tmp_path) -> None:
    """29 of 36 against nine tenths: p = 0.06, though each of twelve tasks lost about the same."""
    rows = [{"suite": "goal", "arm": arm, "task": f"t{i % 12}", "seed": i, "success": arm == "baseline" or i >= 7}
            for arm in ("baseline", "a") for i in range(36)]  # fmt: skip
    still = [np.zeros((3, 4), np.float32)] * len(rows)
    mean, low, high = kind.above_share(Runs(pd.DataFrame(rows), still, still, still), "goal", "a", 0.9, 0)
    assert mean == pytest.approx(0.1 - 7 / 36) and low < mean < 0 < high


def test_a_policy_that_fails_by_itself_is_not_judged(tmp_path) -> None:
    half = [True, False] * 30
    found = judged(tmp_path, {"identity": (half, {"way": "identity", "unchanged": 60, "n": 60}),
                              "token": (half, {"way": "token"})}, half)  # fmt: skip
    assert found["identity"].holds is True and found["per-token"].holds is None is found["pooled"].holds
    assert "floor effect" in found["per-token"].measured
