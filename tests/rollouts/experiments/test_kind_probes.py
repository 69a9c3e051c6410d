"""The probes' experiment: what is asked, where, and a small run to its report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from hooked_vla import HookedVLA
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds.probes_removal import choose_removal
from hooked_vla.rollouts.experiments.kinds.probes_scores import (
    ACTION,
    SUCCESS,
    probe_sites,
    questions,
    random_weights,
)
from hooked_vla.rollouts.experiments.run import run_experiment


def labels(n_failed: int) -> pd.DataFrame:
    """Twelve episodes of two plans, of which the first ones fail."""
    rng, rows = np.random.default_rng(0), []
    for episode, (block, pad) in enumerate((b, p) for b in ("red", "green", "blue", "yellow") for p in ("a", "b", "c")):
        for step in (0, 4):
            rows.append(
                {"episode": episode, "env_step": step, "task": f"{block}-{pad}", "block": block, "pad": pad,
                 "success": episode >= n_failed}
                | {f"state_{i}": rng.normal() for i in range(4)}
                | {f"action_{i}": 0.0 if i == 3 else rng.normal() for i in range(4)}
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_questions_hold_out_tasks_and_shuffle_whole_episodes() -> None:
    asked = {each.label: each for each in questions(labels(6))}
    assert list(asked) == ["block", "pad", "end effector", ACTION, SUCCESS]
    assert asked["block"].groups == labels(6)["task"].tolist() and asked["block"].units == labels(6)["episode"].tolist()
    assert asked[ACTION].y.shape == (24, 3) and asked[ACTION].within == labels(6)["task"].tolist()
    assert asked[SUCCESS].groups == labels(6)["episode"].tolist() and asked[SUCCESS].metric == "auc"
    assert SUCCESS not in {each.label for each in questions(labels(4))}
    assert "pictures" not in asked["block"].blind
    assert set(questions(labels(0), np.zeros((24, 2)))[0].blind) == {"time", "proprioception", "pictures"}


def test_a_goal_in_the_activations_is_read_on_unseen_tasks_and_time_is_not_enough() -> None:
    table = labels(0)
    block, pad = questions(table)[:2]
    rng = np.random.default_rng(1)
    codes = {name: rng.normal(size=32) for name in ("red", "green", "blue", "yellow", "a", "b", "c")}
    x = np.stack([codes[row.block] + codes[row.pad] for row in table.itertuples()]) + 0.05 * rng.normal(size=(24, 32))
    for question in (block, pad):
        found = question.score(x, {"random weights": rng.normal(size=(24, 32))}, 4, 2, 0)
        assert found.probe.score > 0.9 and found.margin > 0.3
        assert set(found.baselines) == {"random weights", "time", "proprioception"}


def test_sites_and_random_weights(tiny_model: HookedVLA) -> None:
    model = tiny_model
    found = probe_sites(model, find_experiment("E14").settle(False).sites)
    assert sum(name.startswith("vision.") for name in found) == 1 and "vlm.hook_tokens" in found
    assert any(name.startswith("expert.blocks") for name in found) and not any(".adapter" in name for name in found)
    with pytest.raises(ValueError, match="no site of smolvla matches"):
        probe_sites(model, ["adapter.*"])
    other, again = random_weights(model, 3), random_weights(model, 3)
    assert [p.shape for p in other.parameters()] == [p.shape for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(other.parameters()), next(model.parameters()))


def test_removals_are_chosen_by_what_they_change_beyond_random() -> None:
    rows: list[dict[str, Any]] = [
        {"site": "a", "segment": "language", "goal": 0.9, "random": 0.8, "as_far": 0.8},
        {"site": "b", "segment": "image:*", "goal": 0.6, "random": 0.1, "as_far": 0.2},
    ]
    assert choose_removal(pd.DataFrame(rows)) == ("b", "image:*")


def test_a_small_run_ends_in_a_report(tmp_path: Path) -> None:
    small = {
        "episodes": 12, "removal_episodes": 1, "n_folds": 2, "n_shuffles": 1, "max_steps": 8,
        "sites": ["vlm.blocks.0.hook_resid_post", "expert.blocks.0.hook_resid_post"],
    }  # fmt: skip
    experiment = replace(find_experiment("E14"), settings=small, quick={})
    outcome = run_experiment(experiment, tmp_path / "out", "smolvla-tabletop")
    held = {verdict.rule: verdict.holds for verdict in outcome.verdicts}
    assert held["removal"] is None and all(held[rule] is not None for rule in held if rule != "removal")
    scores = pd.read_parquet(tmp_path / "out" / "tables" / "scores.parquet")
    assert set(scores["label"]) == {"block", "pad", "end effector", "next action"}
    assert set(scores["segment"]) == {"image:*", "language", "state", "action"}
    language = scores[(scores["segment"] == "language") & scores["label"].isin(["block", "pad"])]
    # a bag of known words: any weights tell them apart, and the control says so
    assert (language["score"] > 0.9).all() and (language["random_weights"] > 0.9).all()
    assert (language["margin"].abs() < 0.1).all()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "success was not probed: 12 of 12 episodes failed" in text
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {"scores", "margins", "removal"}
    before = (tmp_path / "out" / "results.parquet").read_bytes()
    run_experiment(experiment, tmp_path / "out", "smolvla-tabletop")
    assert (tmp_path / "out" / "results.parquet").read_bytes() == before
