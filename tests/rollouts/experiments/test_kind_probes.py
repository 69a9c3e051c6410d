"""The probes' experiment: what is asked, where, and a small run to its report."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from injection_case import context
from report_numbers import unknown_numbers

from hooked_vla import HookedVLA
from hooked_vla.rollouts.experiments.compare import Runs
from hooked_vla.rollouts.experiments.context import Context
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import probes
from hooked_vla.rollouts.experiments.kinds.probes import _margin_verdicts
from hooked_vla.rollouts.experiments.kinds.probes_held_out import AHEAD, ALONE, EXPERT, VLM, HeldOut, _ahead, hold_out
from hooked_vla.rollouts.experiments.kinds.probes_removal import (
    ANOTHER_ALL,
    AS_FAR_ALL,
    GOAL_ALL,
    RANDOM_ALL,
    _prepared,
    choose_removal,
    fit_removals,
    pursued_goals,
    removal_verdicts,
)
from hooked_vla.rollouts.experiments.kinds.probes_scores import (
    ACTION,
    SUCCESS,
    Scored,
    probe_sites,
    questions,
    random_weights,
)
from hooked_vla.rollouts.experiments.outcome import Verdict
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.jobs import ModelSource
from hooked_vla.rollouts.records import read_episodes


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
    assert sum(name.startswith("vision.") for name in found) == 1 and "vlm.hook_tokens" not in found
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


def noise_everywhere(n_places: int, signal: float = 0.0) -> list[Scored]:
    """A goal asked at many places of pure noise; the last one also holds the goal, as strong as `signal`."""
    table = pd.concat([labels(0)] * 2).sort_values(["episode", "env_step"]).reset_index(drop=True)
    question, rng, found = questions(table)[0], np.random.default_rng(3), []
    codes = {block: rng.normal(size=6) for block in sorted(set(table["block"]))}
    truth = np.stack([codes[block] for block in table["block"]])
    for i in range(n_places):
        x = rng.normal(size=truth.shape) + (signal * truth if i == n_places - 1 else 0.0)
        scored = question.score(x, {"random weights": rng.normal(size=truth.shape)}, 4, 1, i)
        found.append(Scored(f"vlm.blocks.{i}.hook_resid_post", "language", None, question.label, scored))
    return found


def test_the_largest_of_many_margins_is_not_what_is_judged() -> None:
    row = hold_out(noise_everywhere(12), 0).iloc[0]
    assert row["places"] == 12 and row["side"] == "language model"
    # among so many places of noise one is ahead of its controls; not so on tasks that did not choose it
    assert row["margin"] < row["largest"] and row["low"] < 0.05
    row = hold_out(noise_everywhere(3, signal=3.0), 0).iloc[0]
    assert row["chosen"] == "vlm.blocks.2.hook_resid_post (language)" and row["low"] > 0.2
    assert row["low"] <= row["margin"] <= row["high"]


def test_a_control_that_reads_more_says_nothing_for_the_other_side() -> None:
    def held(estimate: float) -> HeldOut:
        return HeldOut((), estimate, np.full(8, estimate), estimate)

    found = {("block", "language model"): held(0.1), ("block", "expert"): held(-0.7)}
    ahead = _ahead("block", "language model", "expert", ("block",), found)
    assert (ahead["margin"], ahead["low"], ahead["high"]) == (0.1, 0.1, 0.1)


def margin_row(label: str, side: str, margin: float, control: float, **more: object) -> dict[str, object]:
    return {"label": label, "side": side, "margin": margin, "low": margin - 0.01, "high": margin + 0.01,
            "least_control": control, "score": control + margin, "best_control": "random weights", "chosen": "a place",
            **more}  # fmt: skip


def margin_case(tmp_path: Path, control: float, margin: float) -> dict[str, Verdict]:
    """Goals read off the language model with a margin over a control, off the expert with none."""
    rows = [margin_row(label, side, margin if side == VLM else -0.001, control)
            for label in ("block", "pad", "end effector", "next action") for side in (VLM, EXPERT)]  # fmt: skip
    rows += [margin_row(label, AHEAD[VLM], margin, 0) for label in ("block and pad",)]
    rows += [margin_row(label, AHEAD[EXPERT], -margin, 0) for label in ("end effector", "next action")]
    rows += [margin_row("pad", ALONE, 0.0, control)]
    made = context("E14", tmp_path)
    return {each.rule: each for each in _margin_verdicts(made, pd.DataFrame(rows))}


def test_a_margin_that_a_control_leaves_no_room_for_is_not_judged(tmp_path: Path) -> None:
    """Random weights tell fixed words apart as well as any model: no margin of 20 points is there to be had."""
    room = margin_case(tmp_path, 0.5, 0.3)
    assert room["goal-in-vlm"].holds is True and room["goal-vlm-over-expert"].holds is True
    assert room["state-in-expert"].holds is False
    assert "pad, language model without the adapter: +0.00 (" in room["goal-in-vlm"].measured
    assert margin_case(tmp_path, 0.5, 0.1)["goal-in-vlm"].holds is False
    full = margin_case(tmp_path, 0.995, 0.0)
    assert [full[rule].holds for rule in full] == [None] * 4
    assert "some control reads block with 0.99 or more, pad with" in full["goal-in-vlm"].measured
    assert "-0.00" not in full["state-in-expert"].measured


def removal_case(tmp_path: Path, goal: float, far: float, astray: float) -> dict[str, bool | None]:
    """Verdicts where so many of forty episodes succeed without the goal's directions, or random ones moved as far; and
    in so many of the former's another goal is pursued."""
    context = Context(find_experiment("E14"), ModelSource("smolvla-tabletop"), tmp_path)
    shares = {"baseline": 1.0, GOAL_ALL: goal, AS_FAR_ALL: far, RANDOM_ALL: 1.0, ANOTHER_ALL: 1.0}
    rows = [{"suite": "goal", "arm": arm, "task": f"t{i % 4}", "seed": i, "success": i < 40 * share,
             "own": i < 40 * share, "another_goal": arm == GOAL_ALL and i >= 40 * (1 - astray)}
            for arm, share in shares.items() for i in range(40)]  # fmt: skip
    pursued, one = pd.DataFrame(rows), [np.zeros((1, 4))] * len(rows)
    table = pd.DataFrame([
        {"suite": "goal", "arm": arm, "success": share, "difference": share - 1,
         "another_goal": astray if arm == GOAL_ALL else 0.0}
        for arm, share in shares.items()
    ])  # fmt: skip
    found = removal_verdicts(context, "goal", table, pursued, Runs(pursued, one, one, one))
    return {each.rule: each.holds for each in found}


def test_removals_are_judged_against_directions_moved_as_far_and_by_the_goal(tmp_path: Path) -> None:
    assert removal_case(tmp_path, 0.2, 1.0, 0.8) == {"removal": True, "removal-goal": True}
    # random directions that move tokens as far do the same damage
    assert removal_case(tmp_path, 0.2, 0.2, 0.0) == {"removal": False, "removal-goal": False}
    # what is lost is not the goal: nothing else is pursued
    assert removal_case(tmp_path, 0.2, 1.0, 0.0) == {"removal": True, "removal-goal": False}


def test_another_goal_is_another_block_or_pad() -> None:
    rows = [("red", True, True), ("red", True, False), ("red", False, False), ("blue", False, False)]
    rows.append(("", False, False))
    goals = pd.DataFrame([{"arm": "a", "task": "red-cyan", "first_lifted": lifted, "placed": placed, "own": own}
                          for lifted, placed, own in rows])  # fmt: skip
    found = pursued_goals(goals)
    assert found["another_goal"].tolist() == [False, True, False, True, False]
    assert found["right_block"].tolist() == [True, True, True, False, False]


def test_a_small_run_ends_in_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[Any] = []

    def fit(model: HookedVLA, settings: Any, frames: Any, *rest: Any) -> Any:
        fitted.append((model, settings, frames, fit_removals(model, settings, frames, *rest)))
        return fitted[-1][-1]

    monkeypatch.setattr(probes, "fit_removals", fit)
    small = {
        "episodes": 12, "removal_episodes": 1, "n_folds": 2, "n_shuffles": 1, "max_steps": 8,
        "sites": ["vlm.blocks.0.hook_resid_post", "expert.blocks.0.hook_resid_post"],
    }  # fmt: skip
    experiment = replace(find_experiment("E14"), settings=small, quick={})
    outcome = run_experiment(experiment, tmp_path / "out", "smolvla-tabletop")
    held = {verdict.rule: verdict for verdict in outcome.verdicts}
    assert held["removal"].holds is None and held["removal-goal"].holds is None
    assert "floor effect" in held["removal"].measured and held["shuffled-at-chance"].holds is not None
    # words that any weights tell apart are no goal that is read
    assert held["goal-in-vlm"].holds is False
    assert unknown_numbers(tmp_path / "out", experiment) == []
    scores = pd.read_parquet(tmp_path / "out" / "tables" / "scores.parquet")
    assert set(scores["label"]) == {"block", "pad", "end effector", "next action"}
    # an input token says what it was given: directions are taken out of it, but it is not scored
    assert "vlm.hook_tokens" not in set(scores["site"])
    assert "vlm.hook_tokens" in set(outcome.tables["removal_effects"]["site"])
    # directions are judged in other episodes than those that they were fitted on
    seeds = {name: set(read_episodes(tmp_path / "out" / "rollouts" / name)["seed"].to_pylist())
             for name in ("recorded", "removal", "rerun")}  # fmt: skip
    assert not seeds["recorded"] & seeds["removal"] and seeds["removal"] == seeds["rerun"]
    assert "random out, as far, all layers" in set(outcome.tables["removal"]["arm"])
    assert set(scores["segment"]) == {"image:*", "language", "state", "action"}
    language = scores[(scores["segment"] == "language") & scores["label"].isin(["block", "pad"])]
    # a bag of known words: any weights tell them apart, and the control says so
    assert (language["score"] > 0.9).all() and (language["random_weights"] > 0.9).all()
    assert (language["margin"].abs() < 0.1).all()
    text = (tmp_path / "out" / "report.md").read_text()
    assert "success was not probed: 12 of 12 episodes failed" in text
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {"scores", "margins", "removal"}
    for removal in fitted[0][-1].values():
        check_moved_as_far(*fitted[0][:3], removal)
    before = (tmp_path / "out" / "results.parquet").read_bytes()
    run_experiment(experiment, tmp_path / "out", "smolvla-tabletop")
    assert (tmp_path / "out" / "results.parquet").read_bytes() == before


@torch.no_grad()
def check_moved_as_far(model: HookedVLA, settings: Any, frames: Any, removal: Any) -> None:
    """Stretched, random directions move the tokens themselves as far as the goal's do, and not only their means."""
    inputs, noise = _prepared(model, settings, frames)
    tokens = []
    for edits in ([], [removal.edit("goal")], [removal.edit("as far")]):
        with model.edits(edits):
            _, cache = model.run_with_cache(inputs, removal.site, noise=noise)
        tokens.append(cache[removal.site].segment(removal.segment, pad_value=0.0).flatten(0, 1))
    goal, far = (float((edited - tokens[0]).square().sum(1).mean().sqrt()) for edited in tokens[1:])
    assert goal == pytest.approx(far, rel=1e-3) and goal > 0
