"""E16: each cell ablates what it says, dead ends are not run, and verdicts follow from the table alone."""

import numpy as np
import pandas as pd
import pytest
from injection_case import context, run
from report_numbers import unknown_numbers

from hooked_vla.rollouts.activations import ActivationRecording
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import layers as kind
from hooked_vla.rollouts.experiments.kinds import layers_agreement as agreement


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return run("E16", tmp_path_factory.mktemp("e16") / "run", episodes=2, source_episodes=2, max_steps=8, every=3,
               kinds=["zero", "mean", "resample", "skip"], pairs=2, points=2)  # fmt: skip


def test_every_living_block_is_ablated_in_every_way(done) -> None:
    table = done[1].main
    cells = table[table["block"] != ""]
    # of four blocks each, the first and the last: nothing reads what the vlm's last one hands on
    assert set(cells["block"]) == {"vlm.blocks.0", "expert.blocks.0", "expert.blocks.3"}
    assert cells.groupby("block")["ablation"].apply(list).map(set).map(len).eq(4).all()
    assert [label for label in done[1].labels if "vlm.blocks.3" in label]
    # whatever is taken out, the episode goes another way
    assert (cells["displacement"] > 10 * cells["floor"]).all()
    assert set(done[1].figures) == {"success", "displacement", "agreement"}
    assert unknown_numbers(done[0].out, find_experiment("E16")) == []


def test_estimates_are_held_against_exact_patching(done) -> None:
    cells, table = done[1].tables["patches"], done[1].tables["agreement"]
    # of language tokens, the pad's name alone differs; whatever is patched there leads to the other run
    first = cells[cells["site"] == "vlm.blocks.0.hook_resid_post"].set_index(["segment", "pair"])
    assert first.loc[("language", 0), "exact"] > 0.05 and cells["pair"].nunique() == 2
    assert set(cells["kind"]) == {"residual stream", "written by a block", "queries and keys"}
    by = table.set_index(["method", "kind"])
    assert by.loc[("integrated gradients", "all"), "spearman"] > 0.9
    assert (table["missed"] <= table["top"]).all() and (table["n"] <= len(cells)).all()
    # the QK fix changes what is said of queries and keys, and nothing else
    fixed = (cells["AtP"] - cells["AtP* (QK fix)"]).abs() > 1e-3
    assert fixed.any() and set(cells.loc[fixed, "kind"]) == {"queries and keys"}


def test_a_policy_that_says_its_actions_as_tokens_is_compared_by_its_scores(tmp_path) -> None:
    made = context("E16", tmp_path / "run", model="openvla-tabletop")
    block = "vlm.blocks.2"
    cells = agreement.agreement_cells(made, "goal", [block], 2, 8).set_index(["site", "segment"])
    # pictures come first and attend to nothing behind them: all that differs is in what language tokens hold
    assert cells.loc[(f"{block}.hook_resid_post", "language"), "exact"].tolist() == pytest.approx([1, 1], abs=1e-4)
    assert (cells.loc[(f"{block}.hook_resid_post", "image:top"), "exact"].abs() < 1e-4).all()
    # its keys are where a gradient through a saturated softmax sees nothing, and the whole way does
    keys = cells.loc[(f"{block}.attn.hook_k", "language")]
    assert keys["exact"].abs().max() > 0.1 > 10 * keys[agreement.ATP].abs().max()
    assert (keys["exact"] - keys[agreement.INTEGRATED]).abs().max() < 0.1


def test_estimates_have_a_scale_where_they_lie(done) -> None:
    figure, _ = agreement.agreement_figure(done[1].tables["patches"], done[1].tables["agreement"])
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert len(axes.get_yticks()) >= 3 and all(low <= tick <= high for tick in axes.get_yticks())
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert [float(label) for label in labels] == pytest.approx(list(axes.get_yticks()), rel=5e-3)


def test_what_an_estimate_misses_is_counted() -> None:
    exact = [0.9, 0.8, 0.1, 0.05, 0.02, 0.01, 0.0, 0.0]
    cells = pd.DataFrame([
        {"kind": "residual stream", "site": f"vlm.blocks.{i}.hook_resid_post", "segment": "all", "pair": 0,
         "exact": value, agreement.ATP: 0.0 if i == 0 else value, agreement.ATP_STAR: value,
         agreement.GRAD_DROP: value, agreement.INTEGRATED: -value}
        for i, value in enumerate(exact)
    ])  # fmt: skip
    found = agreement.agreement_table(cells).set_index(["method", "kind"])
    assert found.loc[(agreement.ATP, "all"), ["top", "missed"]].tolist() == [2, 1]
    assert found.loc[(agreement.ATP_STAR, "all"), ["missed", "pearson"]].tolist() == [0, 1]
    assert found.loc[(agreement.INTEGRATED, "all"), "spearman"] == pytest.approx(-1)


def test_means_are_those_of_the_policys_own_episodes_elsewhere(done) -> None:
    made = done[0]
    recording = ActivationRecording(made.folder("on_policy"))
    site = "expert.blocks.0.hook_resid_post"
    mean = kind._mean(recording, site)
    keys = [key for key in recording.keys(site) if key[2] == 4]
    expected = np.mean([recording.get(*key[:2], site, 4).numpy() for key in keys], axis=0)
    np.testing.assert_allclose(mean[4].numpy(), expected, rtol=1e-5, atol=1e-6)
    assert mean.shape[:2] == (made.model.n_denoise_steps, 1)
    assert recording.about["seed"] != made.seed


def judged(tmp_path, successes: dict[str, list[float]], baseline: float = 1.0, n: int = 20) -> dict[str, kind.Verdict]:
    made = context("E16", tmp_path)
    rows = [{"suite": "goal", "arm": "baseline", "ablation": "", "block": "", "success": baseline}]
    rows += [{"suite": "goal", "arm": f"{name} {i}", "ablation": name, "block": f"b{i}", "success": success}
             for name, each in successes.items() for i, success in enumerate(each)]  # fmt: skip
    table, settings = pd.DataFrame(rows), made.definition.settle(False)
    table["success_high"] = table["success"]
    # the first episodes of each arm succeed
    episodes = [{"suite": "goal", "arm": row["arm"], "task": "t", "seed": i, "success": i < round(n * row["success"])}
                for row in rows for i in range(n)]  # fmt: skip
    one = [np.zeros((1, 4))] * len(episodes)
    apart = kind.contrasts(settings, Runs(pd.DataFrame(episodes), one, one, one), table)
    verdicts = [kind._zero_fatal(made, settings, table), *(kind._graded(made, settings, table, apart, each)
                                                           for each in ("mean", "skip"))]  # fmt: skip
    return {each.rule: each for each in verdicts}


def test_rules_are_judged_by_the_table(tmp_path) -> None:
    found = judged(tmp_path, {"zero": [0.0, 0.05], "mean": [0.1, 0.9], "skip": [0.5, 0.55]})
    assert [found[rule].holds for rule in ("zero-fatal", "mean-graded", "skip-graded")] == [True, True, False]
    # as far apart, in episodes so few that chance does it
    found = judged(tmp_path, {"mean": [0.1, 0.9]}, n=4)
    assert found["mean-graded"].holds is None and "undecided" in found["mean-graded"].measured
    found = judged(tmp_path, {"zero": [0.0, 0.5], "mean": [0.1]})
    assert not found["zero-fatal"].holds and "b1 50%" in found["zero-fatal"].measured
    assert found["mean-graded"].holds is None and found["skip-graded"].holds is None
    found = judged(tmp_path, {"zero": [0.0]}, baseline=0.5)
    assert found["zero-fatal"].holds is None and "floor effect" in found["zero-fatal"].measured


def test_wrong_settings_are_refused(tmp_path) -> None:
    for wrong, message in (
        ({"kinds": ["median"]}, "unknown kinds"),
        ({"every": 0}, "every must be at least 1"),
        ({"pairs": 1}, "pairs must be 0, for none, or at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            context("E16", tmp_path, **wrong)
    made = context("E16", tmp_path, pathways=["decode"])
    with pytest.raises(ValueError, match="has no blocks in"):
        made.definition.module.run(made, made.definition.settle(False))
