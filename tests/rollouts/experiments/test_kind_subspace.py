"""Subspace injection: where goals are looked for, how they are read off poses, and a small run to its report."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from injection_case import context

from hooked_vla import HookedVLA
from hooked_vla.analysis.subspaces import random_subspace
from hooked_vla.rollouts.experiments.definition import find_experiment
from hooked_vla.rollouts.experiments.kinds import subspace as kind
from hooked_vla.rollouts.experiments.kinds.subspace_arms import swapped
from hooked_vla.rollouts.experiments.kinds.subspace_fits import ALL, choose_site, patchable
from hooked_vla.rollouts.experiments.kinds.subspace_goals import LIFTED, far_donors, first_lifted, goal_table
from hooked_vla.rollouts.experiments.outcome import Verdict
from hooked_vla.rollouts.experiments.run import run_experiment
from hooked_vla.rollouts.suites import get_suite
from hooked_vla.rollouts.sweep import run_rollouts


def test_a_swap_takes_the_part_in_the_subspace() -> None:
    x, source = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    space = random_subspace(6, 2, 0)
    found = swapped(x, source, space)
    inside, outside = space.basis.float(), torch.eye(6) - space.basis.T.float() @ space.basis.float()
    assert torch.allclose(found @ inside.T, source @ inside.T, atol=1e-5)
    assert torch.allclose(found @ outside, x @ outside, atol=1e-5)
    assert torch.equal(swapped(x, source, None), source)
    assert torch.allclose(swapped(x, source, None, 0.5), (x + source) / 2)


def test_far_donors_share_neither_block_nor_pad_and_each_task_is_one() -> None:
    donors = far_donors("goal")
    assert sorted(donors) == sorted(donors.values()) == sorted(task.id for task in get_suite("goal").tasks)
    for task, other in donors.items():
        assert not set(task.split("-")) & set(other.split("-"))
    with pytest.raises(ValueError, match="the suite 'object' has no task of another block and pad"):
        far_donors("object")


def test_the_last_site_that_leads_far_enough_is_chosen() -> None:
    def table(*rows: tuple[str, str, float, int]) -> pd.DataFrame:
        return pd.DataFrame(rows, columns=["site", "tokens", "recovery", "order"])

    rows = [
        ("a", "language", 1.0, 0),
        ("a", ALL, 1.0, 0),
        ("b", "image:*", 0.92, 1),
        ("b", ALL, 0.97, 1),
        ("c", ALL, 0.5, 2),
    ]
    assert choose_site(table(*rows), 0.9) == ("b", "image:*")
    assert choose_site(table(*rows[:2], *rows[3:]), 0.9) == ("b", ALL)
    assert choose_site(table(*rows[2:]), 0.99) == ("b", ALL)


def test_sites_that_can_be_patched(tiny_model: HookedVLA) -> None:
    model = tiny_model
    found = patchable(model, ["vlm.hook_tokens", "vlm.blocks.*.hook_resid_post", "adapter.*"])
    assert found[0] == "vlm.hook_tokens" and all(model.hook_points[name].reaches_action for name in found)
    for nothing in ("adapter.*", "expert.blocks.*.hook_resid_post", "vision.*"):
        with pytest.raises(ValueError, match="no site of smolvla matches"):
            patchable(model, [nothing])


def test_what_was_done_is_read_off_the_poses(tmp_path: Path) -> None:
    """The scripted expert does what it is told: nothing is switched, and the right block is lifted first."""
    done = run_rollouts("expert", "goal", 2, 700_000, ["red-orange", "green-cyan"], out=tmp_path)
    rows = goal_table(done, {"red-orange": "green-cyan", "green-cyan": "red-purple"})
    assert rows["own"].all() and rows["lifted"].all() and not rows["switched"].any()
    assert list(rows["first_lifted"]) == ["red", "green"] and list(rows["donor"]) == ["green-cyan", "red-purple"]
    other = goal_table(done, {"red-orange": "red-orange", "green-cyan": "green-cyan"})
    assert other["switched"].all() and other["switched_block"].all()


def test_the_first_block_that_goes_up() -> None:
    def poses(red: float, blue: float) -> dict[str, list[float]]:
        return {"blocks/red": [0.0, 0.0, red], "blocks/blue": [0.0, 0.0, blue], "pads/cyan": [0.0, 0.0]}

    path = [poses(0.03, 0.03), poses(0.03, 0.03 + LIFTED / 2), poses(0.03, 0.031 + LIFTED), poses(0.2, 0.2)]
    assert first_lifted(path) == "blue" and first_lifted(path[:2]) is None


def judged(tmp_path: Path, **switched: float) -> dict[str, Verdict]:
    """Two dimensions suffice on held-out frames, as DAS finds them; numbers: what switches the goal in closed loop."""
    spaces = {name: random_subspace(8, 4, i) for i, name in enumerate((kind.DAS, kind.PAIRED, kind.RANDOM))}
    effects = {kind.DAS: (0.5, 0.95, 0.97), kind.PAIRED: (0.2, 0.5, 0.9), kind.RANDOM: (0.0, 0.1, 0.1)}
    curve = [{"method": name, "k": k, "effect": effect}
             for name, each in effects.items() for k, effect in zip((1, 2, 4), each, strict=True)]  # fmt: skip
    fits = kind.Fits("site", "language", spaces, pd.DataFrame([*curve, {"method": ALL, "k": 8, "effect": 1.0}]), 2, 1.5)
    assert kind._chosen(fits) == (kind.DAS, 2)
    rows = [("baseline", "", 0, 0.0), (kind.WHOLE, ALL, 8, 1.0), ("das k=1", kind.DAS, 1, switched["fewer"]),
            ("das k=2", kind.DAS, 2, switched["chosen"]), ("random k=2", kind.RANDOM, 2, 0.0)]  # fmt: skip
    table = pd.DataFrame([
        {"arm": arm, "method": method, "k": k, "n": 20, "switched": share, "switched_low": 0.0, "switched_high": 1.0,
         "own": 1.0, "lifted": 1.0, "lifted_low": 0.8, "lifted_high": 1.0} for arm, method, k, share in rows
    ])  # fmt: skip
    goals = pd.DataFrame([{"arm": arm, "task": "t", "seed": i, "switched": i < share * 20}
                          for arm, _, _, share in rows for i in range(20)])  # fmt: skip
    made = context("E15", tmp_path)
    found = kind._verdicts(made, made.definition.settle(False), fits, table, goals)
    return {each.rule: each for each in found}


def test_dimensions_are_judged_as_they_were_chosen_and_not_by_what_they_are_judged_by(tmp_path: Path) -> None:
    found = judged(tmp_path, fewer=0.95, chosen=0.5)
    assert found["few-dimensions"].holds is False and "beside it, das k=1 95%" in found["few-dimensions"].measured
    found = judged(tmp_path, fewer=0.2, chosen=0.95)
    assert found["few-dimensions"].holds is True and "against das k=2" in found["random-control"].measured


def test_a_small_run_ends_in_a_report(tmp_path: Path) -> None:
    small = {
        "episodes": 1, "fit_episodes": 4, "pairs": 6, "held_out": 4, "sizes": [1, 2], "closed_sizes": [1], "steps": 2,
        "batch": 2, "rate": 0.05, "max_steps": 8, "sites": ["vlm.blocks.0.hook_resid_post"], "tokens": ["all"],
    }  # fmt: skip
    experiment = replace(find_experiment("E15"), settings=small, quick={})
    outcome = run_experiment(experiment, tmp_path / "out", "smolvla-tabletop")
    assert {verdict.rule: verdict.holds for verdict in outcome.verdicts} == dict.fromkeys(
        ("few-dimensions", "grasp-kept", "random-control")
    )
    assert "baseline succeeds in 0%" in outcome.verdicts[0].measured
    text = (tmp_path / "out" / "report.md").read_text()
    assert "replay: a patch of all tokens" in text and "vlm.blocks.0.hook_resid_post" in text
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {"goals", "curve", "sites"}
    before = (tmp_path / "out" / "results.parquet").read_bytes()
    run_experiment(experiment, tmp_path / "out", "smolvla-tabletop")
    assert (tmp_path / "out" / "results.parquet").read_bytes() == before
